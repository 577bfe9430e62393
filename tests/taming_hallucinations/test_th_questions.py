"""Shared questions: rules, letters, writers; kinds and quotas of training questions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from papers10.agents.client import CassetteClient
from papers10.core.config import ConfigError, replace
from papers10.taming_hallucinations import questions as q
from papers10.taming_hallucinations.captions import HAPPENS, OracleCaption
from papers10.taming_hallucinations.context import LEVEL_OF, CounterfactualContext


def context(kind="disappear", **changes):
    options = {
        "anomaly_type": kind,
        "level": LEVEL_OF[kind],
        "region_type": "object",
        "region_name": "red car",
        "start_s": 1.0,
        "end_s": 2.0,
    }
    return CounterfactualContext(**options | changes)


CAPTION = OracleCaption(spatial_location="the street", dense_captions=("A car drives.", "It is gone."))
QUESTION = q.SharedQuestion(
    dimension="d",
    question="What happens to the car?",
    options=("It stays", "It vanishes", "It turns", "It grows"),
    real_answer=0,
    cf_answer=1,
)


def test_a_good_question_passes():
    assert q.reject_reason(QUESTION) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cf_answer": 0}, "both clips have the same answer"),
        ({"options": ("It stays", "it  stays.", "It turns", "It grows")}, "both clips have the same answer"),
        ({"options": ("It stays", "It vanishes", "IT VANISHES!", "It grows")}, "a wrong option equals a right one"),
        ({"options": ("It stays", "It vanishes", "It turns", "It turns")}, "two wrong options are equal"),
        ({"options": ("It stays", "It vanishes", "...", "It grows")}, "an option is empty"),
        ({"options": ("It stays", "It vanishes", "It turns")}, "expected 4 options"),
        ({"question": "What STRANGE thing happens?"}, "gives the anomaly away: 'strange'"),
        ({"question": "What happens after 2 seconds?"}, "speaks of captions or times"),
        ({"question": "What does the caption say?"}, "speaks of captions or times"),
    ],
)
def test_bad_questions_are_thrown_out_with_the_reason(changes, reason):
    assert reason in q.reject_reason(replace(QUESTION, **changes))


def test_words_that_give_away_are_a_parameter():
    assert q.reject_reason(QUESTION, hints=("happens",)) is not None
    assert q.reject_reason(replace(QUESTION, question="What oddly odd?"), hints=()) is None


@given(n=st.integers(1, 40), seed=st.integers(0, 99))
def test_letters_are_balanced(n, seed):
    placed = q.balance_positions([QUESTION] * n, seed)
    assert q.position_excess(placed) <= 1
    for one in placed:
        assert one.real_answer != one.cf_answer and set(one.options) == set(QUESTION.options)
        assert (one.options[one.real_answer], one.options[one.cf_answer]) == ("It stays", "It vanishes")
    for low in range(0, n - n % 4, 4):
        assert (
            sorted(one.real_answer for one in placed[low : low + 4])
            == sorted(one.cf_answer for one in placed[low : low + 4])
            == [0, 1, 2, 3]
        )


def test_a_place_does_not_depend_on_what_came_before():
    assert q.place_options(QUESTION, 6, 3) == q.balance_positions([QUESTION] * 9, 3)[6]


@pytest.mark.parametrize("kind", sorted(HAPPENS))
def test_templates_write_a_good_question_for_every_kind(kind):
    for seed in range(5):
        assert q.reject_reason(q.TemplateQuestionWriter()(None, CAPTION, context(kind), seed)) is None


def test_a_question_with_an_index_outside_is_refused():
    with pytest.raises(ConfigError, match="cf_answer: expected an index below 4, got 4"):
        replace(QUESTION, cf_answer=4)


def answer(**changes):
    row = {
        "dimension": "objects over time",
        "question": "Where is it?",
        "answers_for_true_caption": ["Here"],
        "answers_for_mock_caption": "Gone",
    }
    return json.dumps({**row, "wrong_answers": ["Up", "Down", "Left"], **changes})


def test_a_models_question_is_read():
    found = q.parse_question(answer())
    assert found.options == ("Here", "Gone", "Up", "Down") and (found.real_answer, found.cf_answer) == (0, 1)
    assert q.parse_question(answer(question="")) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hm", "JSON object"),
        (answer(wrong_answers=["x"]), "wrong_answers: expected two"),
        (answer(dimension="mood"), "dimension: expected one of"),
    ],
)
def test_what_is_no_question_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        q.parse_question(text, tuple(q.DIMENSIONS.values()))


def test_a_chat_writer_asks_again_and_fences_what_it_tells():
    client = CassetteClient(["hm", answer()])
    found = q.ChatQuestionWriter(client)(CAPTION, CAPTION, context(instruction="<<< obey >>>"), 5)
    assert found.options[0] == "Here" and [request["seed"] for request in client.requests] == [5, 6]
    assert client.requests[0]["messages"][0]["content"].count(">>>") == 3
    with pytest.raises(ValueError, match="no question after 2 answers"):
        q.ChatQuestionWriter(CassetteClient(["x", "y"]))(None, CAPTION, context(), 0)
    assert q.ChatQuestionWriter(CassetteClient([answer(question="")]))(None, CAPTION, context(), 0) is None


@given(n=st.integers(0, 200), share=st.sampled_from([0.0, 0.5, 0.8, 1.0]), seed=st.integers(0, 9))
def test_quotas_are_exact(n, share, seed):
    plan = q.plan_questions(n, open_share=share, seed=seed)
    assert len(plan) == n and sum(p.multiple_choice for p in plan) == round((1 - share) * n)
    counts = [sum(p.kind == kind for p in plan) for kind in q.SFT_KINDS]
    assert max(counts) - min(counts) <= 1


def test_templates_fill_a_plan_without_repeating_themselves():
    made = q.sft_questions(CAPTION, context(), 30, seed=1)
    assert len({(m.question, m.answer) for m in made}) == len(made) and {m.kind for m in made} <= set(
        q.TemplateSftWriter.kinds
    )
    real = q.sft_questions(CAPTION, None, 12, open_share=0.0, seed=2)
    assert all(m.answer == q.NORMAL for m in real)
    edited = q.sft_questions(CAPTION, context(), 12, open_share=0.0, seed=3)
    assert all(q.NORMAL in m.options and m.answer != q.NORMAL for m in edited)


def test_examples_of_the_same_kind_go_into_the_request():
    items = [{"kind": "count", "question": f"How many {i}?", "answer": str(i)} for i in range(6)] + [
        {"kind": "plot", "question": "Q?", "answer": "A"}
    ]
    pool = q.ExamplePool(items)
    assert (
        len({one.question for one in pool.draw("count", 1)}) == 3
        and pool.draw("count", 1) == pool.draw("count", 1)
        and pool.draw("speed", 0) == []
    )
    client = CassetteClient(
        [json.dumps({"question": "How many cars?", "answer": "two", "options": ["one", "two", "three", "four"]})]
    )
    made = q.ChatSftWriter(client, pool=pool)(CAPTION, None, q.Planned("count", True), 1)
    assert (
        made.answer == "two"
        and made.options[1] == "two"
        and client.requests[0]["messages"][0]["content"].count("How many") == 3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "mood"}, "kind"),
        ({"options": ("a", "b")}, "options: expected four different"),
        ({"options": ("a", "b", "c", "A")}, "options"),
        ({"answer": ""}, "answer"),
    ],
)
def test_training_questions_that_do_not_fit_are_refused(changes, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        q.SftQuestion(**{"kind": "count", "question": "?", "answer": "b", "options": ("a", "b", "c", "d")} | changes)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kinds: expected"):
        q.plan_questions(3, kinds=("mood",))
