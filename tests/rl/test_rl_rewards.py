"""Rewards: what counts as an answer, the regressions of public code, conversations, combination, bad input."""

import pickle
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.rl.rewards import (
    Reward,
    combine,
    completion_text,
    exact_match,
    extract_answer,
    extract_option,
    format_reward,
    gold_letter,
    math_match,
    normalize_text,
    numeric_match,
    option_reward,
    read_number,
    token_f1,
)

OPTIONS = ["it stays", "it vanishes", "it grows", "it splits"]
GOOD = "<think>look\nagain</think>\n<answer>B</answer>"


@pytest.mark.parametrize("text", ["<answer></answer>", "<answer> \n </answer>", "<think>x</think><answer></answer>"])
def test_an_empty_answer_is_never_right(text):
    # Visual-RFT#176: the empty string is a substring of every gold answer.
    assert option_reward(None, [text], answer=["B"]) == [0.0]
    assert exact_match(None, [text], answer=["B"]) == [0.0] and token_f1(None, [text], answer=["B"]) == [0.0]
    assert numeric_match(None, [text], answer=[1]) == [0.0] and format_reward()(None, [text]) == [0.0]


def test_line_breaks_do_not_spoil_the_form():
    # open-r1#237, unsloth#1761: a pattern whose dot stops at line breaks gives 0 to every completion.
    assert format_reward()(None, ["<think>one\ntwo\n\nthree</think>\n\n<answer>\nB\n</answer>\n"]) == [1.0]
    assert option_reward(None, ["<think>one\ntwo</think>\n<answer>\nB\n</answer>"], answer=["B"]) == [1.0]


@pytest.mark.parametrize("text", ["ABCD", "A B C D", "Bob and Beth", "<answer>ABCD</answer>", "<answer>A, B</answer>", "<answer>A. or B.</answer>", "<answer>not B</answer>", "not B", "The answer is B or C", "because B"])
def test_containing_the_right_letter_is_not_enough(text):
    assert option_reward(None, [text], answer=["B"]) == [0.0]


@pytest.mark.parametrize("text, letter", [
    ("<answer>B</answer>", "B"), ("<answer>(b)</answer>", "B"), ("<answer>[C].</answer>", "C"), ("<answer>B. it vanishes</answer>", "B"), ("<answer>(D) splits</answer>", "D"), ("<answer>Option C</answer>", "C"),
    ("<answer>It  vanishes!</answer>", "B"), ("<answer>**A**</answer>", "A"), ("<answer>A</answer><answer>C</answer>", "C"), ("<answer>A</answer> so <answer>", "A"),
    ("The answer is (A).", "A"), ("the answer is A because it stays", "A"), ("The answer is A dog", None), ("Answer: D", "D"), ("the final answer is: **C**", "C"), ("the answer is a", "A"), ("the answer is it", None),
    ("The answer is B, a red square.", "B"), ("The answer is B, C", None), ("The answer is (B) and not C", "B"),
    (r"thus $\boxed{A}$ done", "A"), (r"\boxed{\text{A}}", None), ("<think>the answer is C", None), ("<think>the answer is C</think>", None), ("<think>C</think>D", "D"), ("B<|im_end|>\n", "B"), ("", None),
    ("<answer>E</answer>", None), ("The answer is E.", None), ("<answer>maybe B?</answer>", None),
])
def test_which_option_a_text_names(text, letter):
    assert extract_option(text, OPTIONS) == letter


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_any_text_names_at_most_an_existing_option(text):
    assert extract_option(text, OPTIONS) in (None, "A", "B", "C", "D")
    assert format_reward()(None, [text]) == [0.0] or "<answer>" in text
    assert extract_answer(f"<answer>{text}</answer>") == extract_answer(f"<answer>x</answer><answer>{text}</answer>") or "answer>" in text


def test_repeated_tags_are_read_without_backtracking():
    # A pattern with two unbounded gaps would need hours here and meet the suite's time limit.
    text = "<answer>" * 20_000 + "<think>" * 20_000 + "the answer is " * 5_000
    assert extract_option(text, 4) is None and format_reward()(None, [text]) == [0.0]


@pytest.mark.parametrize("text, formed", [
    (GOOD, 1), (GOOD + "<|im_end|>", 1), (GOOD + "</s>\n", 1), ("  " + GOOD, 1), ("so: " + GOOD, 0), (GOOD + " done", 0), ("<think></think><answer>B</answer>", 0), ("<think> \n</think><answer>B</answer>", 0),
    ("<think>a</think>x<answer>B</answer>", 0), ("<think>a</think><answer>BC</answer>", 0), ("<think>a</think><answer>b</answer>", 0), ("<think>a<think>b</think><answer>B</answer>", 0),
    ("<answer>B</answer><think>a</think>", 0), ("<think>a</think><answer>B</answer><answer>B</answer>", 0), ("</think>a<think><answer>B</answer>", 0), ("<think>a</think><answer>B", 0), ("<Think>a</Think><answer>B</answer>", 0),
])
def test_the_form(text, formed):
    assert format_reward()(None, [text]) == [float(formed)]


def test_form_with_other_tags_free_answers_and_an_opened_prompt():
    assert format_reward("thinking", "reply", letters=None)(None, ["<thinking>a</thinking><reply>the red one</reply>"]) == [1.0]
    assert format_reward(opened=True)(None, ["a</think><answer>B</answer>", GOOD]) == [1.0, 0.0]
    assert format_reward()(None, [GOOD], options=[["yes"]]) == [0.0]
    assert format_reward(ends=("", "END"))(None, [GOOD + "END"]) == [1.0]
    with pytest.raises(ValueError, match="think_tag"):
        format_reward("a b")


def test_conversations_and_parts_are_read():
    chat = [{"role": "user", "content": "<answer>A</answer>"}, {"role": "assistant", "content": [{"type": "text", "text": "<answer>"}, {"type": "text", "text": "B</answer>"}]}]
    assert option_reward(None, [chat, chat[-1], "B"], answer=["B"] * 3) == [1.0] * 3
    assert completion_text([{"role": "assistant", "content": None, "tool_calls": []}]) == "" and completion_text([]) == ""


@pytest.mark.parametrize("answer", ["B", "b", "(B)", 1, "it vanishes", "It vanishes."])
def test_gold_answers_by_letter_position_or_text(answer):
    assert option_reward(None, [GOOD], answer=[answer], options=[OPTIONS]) == [1.0]


@pytest.mark.parametrize("answer, error", [("E", ValueError), ("", ValueError), (4, ValueError), (1.0, TypeError), (True, TypeError), ("it flies", ValueError)])
def test_gold_answers_that_are_none(answer, error):
    with pytest.raises(error, match=r"answer\[0\]"):
        option_reward(None, [GOOD], answer=[answer], options=[OPTIONS])


def test_option_texts_that_are_letters_win_over_letters():
    assert gold_letter("B", ["C", "B", "A"]) == "B" and gold_letter("A", ["C", "B", "A"]) == "C"


def test_rows_without_gold_are_none_and_other_columns_do_no_harm():
    assert option_reward(prompts=["q"] * 2, completions=[GOOD] * 2, answer=["B", None], pair_id=[1, 1], completion_ids=[[1], [2]]) == [1.0, None]
    assert exact_match(None, [GOOD], answer=[None]) == [None]


@pytest.mark.parametrize("completions, answer, error", [("text", ["A"], TypeError), (None, ["A"], TypeError), (["x"], ["A", "B"], ValueError), (["x"], "A", TypeError), ([3], ["A"], TypeError)])
def test_columns_of_another_length_or_type(completions, answer, error):
    with pytest.raises(error):
        option_reward(None, completions, answer=answer)


def test_normalisation():
    assert normalize_text("The  Eiffel-Tower, (a) “Tour”!") == "eiffel tower tour"
    assert exact_match(None, ["<answer>A</answer>"], answer=["A"]) == [1.0], "an answer that is an article must not vanish"
    assert exact_match(None, ["<answer>a</answer>"], answer=["the"]) == [0.0]


def test_exact_and_f1_take_the_best_gold():
    told = ["<answer>Eiffel tower in Paris</answer>"]
    assert exact_match(None, told, answer=[["tour", "eiffel tower in paris"]]) == [1.0]
    assert token_f1(None, told, answer=["eiffel tower"]) == [pytest.approx(2 * 2 / (4 + 2))]
    assert token_f1(None, ["<answer>b b b</answer>"], answer=["b c"]) == [pytest.approx(2 * 1 / 5)], "a repeated word counts as often as the gold has it"
    assert exact_match(None, ["Paris</s>"], answer=["paris"], answer_tag=None) == [1.0]
    with pytest.raises(ValueError, match=r"answer\[0\]"):
        exact_match(None, told, answer=[[]])


@pytest.mark.parametrize("text, value", [
    ("1,234.5", (1234.5, False)), ("-3/4", (-0.75, False)), ("about 12 km", (12.0, False)), ("2e-3", (0.002, False)), ("−7 %", (-7.0, True)), (".5", (0.5, False)), ("$1,000", (1000.0, False)),
    ("3.", (3.0, False)), ("12 or 13", None), ("none", None), ("1/0", None), ("v2", None), ("1e999", None), ("", None),
])
def test_numbers_in_texts(text, value):
    assert read_number(text) == value


def test_numbers_within_a_tolerance():
    told = [f"<answer>{x}</answer>" for x in ("3.1416", "3.2", "12%", "12%", "0.12", "seven")]
    assert numeric_match(None, told, answer=[3.14159, 3.14159, 0.12, "12 %", "12 %", 7], rel_tol=1e-4) == [1, 0, 1, 1, 1, 0]
    for gold in ("none", float("nan"), "1 or 2"):
        with pytest.raises(ValueError, match="answer"):
            numeric_match(None, told[:1], answer=[gold])
    with pytest.raises(ValueError, match="rel_tol"):
        numeric_match(None, told[:1], answer=[1], rel_tol=-1)


def test_formulas_by_math_verify():
    pytest.importorskip("math_verify")
    told = [r"<answer>\frac{1}{2}</answer>", r"so \boxed{x^2+2x+1}", "<answer>3</answer>", "<answer></answer>", "no tag 0.5", r"\boxed{}"]
    gold = ["0.5", "(x+1)^2", "4", "1", "0.5", "1"]
    assert math_match(None, told, answer=gold) == [1, 1, 0, 0, 0, 0]
    assert math_match(None, ["1/2", r"\boxed{0.5}"], answer=["0.5", "1/2"], answer_tag=None) == [1, 1]
    assert math_match(None, ["<answer>2</answer>"], answer=[["3", "2"]]) == [1.0] and math_match(None, ["<answer>2</answer>"], answer=[None]) == [None]


def test_formulas_in_a_thread():
    pytest.importorskip("math_verify")
    found = []
    thread = threading.Thread(target=lambda: found.extend(math_match(None, ["<answer>2</answer>"], answer=["2"])))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_the_weighted_sum_and_its_parts():
    reward = combine({option_reward: 1.0, format_reward(): 0.5})
    texts = [GOOD, "B", "<think>a</think><answer>C</answer>", "?"]
    assert reward(prompts=None, completions=texts, answer=["B"] * 4) == [1.5, 1.0, 0.5, 0.0]
    assert reward.parts(None, texts, answer=["B"] * 4) == {"option_reward": [1, 1, 0, 0], "format_reward": [1, 0, 1, 0]}
    assert reward(None, texts, answer=["B", None, "B", "B"])[1] is None
    assert reward.__name__ == "reward" and pickle.loads(pickle.dumps(reward))(None, texts, answer=["B"] * 4)[0] == 1.5


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(ValueError, match="different names"):
        combine({format_reward(): 1.0, format_reward("thinking"): 1.0})
    twice = combine({format_reward(): 1.0, Reward(option_reward, "strict", answer_tag=None): 2.0})
    assert twice(None, ["B"], answer=["B"]) == [2.0]


@pytest.mark.parametrize("weights, error", [({}, TypeError), ([option_reward], TypeError), ({"a": 1.0}, TypeError), ({option_reward: float("nan")}, ValueError)])
def test_bad_weights(weights, error):
    with pytest.raises(error, match="weights"):
        combine(weights)


def test_a_part_with_another_number_of_rewards():
    with pytest.raises(ValueError, match="short: expected 1 rewards"):
        combine({Reward(lambda p, c, **k: [], "short"): 1.0})(None, ["x"])
