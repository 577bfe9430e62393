"""Descriptions instead of clips: rows, rewards, accuracy, and a step of TRL's trainer on them."""

import numpy as np
import pytest
import torch

from papers10.rl.rewards import format_reward, option_reward
from papers10.taming_hallucinations import language
from papers10.taming_hallucinations.clips import OPTIONS, QUESTIONS, draw_pairs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CLIPS = draw_pairs(12, seed=0)
ROWS = language.description_rows(CLIPS)


@pytest.fixture(scope="module")
def tiny():
    pytest.importorskip("transformers")
    from papers10.rl.integrations.trl import rehearsal_model

    return rehearsal_model(language.vocabulary(ROWS), seed=0)


def test_two_rows_a_pair_with_one_question_and_two_answers():
    assert len(ROWS) == 24 and [row["branch"] for row in ROWS] == ["real", "cf"] * 12
    for real, cf in zip(ROWS[0::2], ROWS[1::2]):
        assert real["pair_id"] == cf["pair_id"] and real["options"] == cf["options"] and real["answer"] != cf["answer"]
        assert real["caption"] != cf["caption"] and real["prompt"].endswith(language.PREFILL)


@pytest.mark.parametrize("shuffle", [True, False])
def test_answers_are_those_of_the_clips(shuffle):
    rows = language.description_rows(CLIPS, shuffle_options=shuffle)
    for pair in range(12):
        texts = OPTIONS[QUESTIONS[CLIPS.question[pair]]]
        for row, gold in zip(rows[2 * pair : 2 * pair + 2], (CLIPS.real_answer, CLIPS.cf_answer)):
            assert row["options"]["ABCD".index(row["answer"])] == texts[gold[pair]]
            assert shuffle or row["options"] == list(texts)


def test_the_position_of_an_answer_tells_nothing_of_the_branch():
    rows = language.description_rows(draw_pairs(400, seed=1))
    for branch in ("real", "cf"):
        letters = [row["answer"] for row in rows if row["branch"] == branch]
        # 400 draws of four letters: five standard deviations of a share are 0.11
        assert max(abs(letters.count(letter) / 400 - 0.25) for letter in "ABCD") < 0.11


def test_rewards_see_the_prefill():
    reward = language.language_reward()
    columns = {"answer": ["B", "B", "B"], "options": [["a", "b", "c", "d"]] * 3}
    assert reward(None, [" B </answer>", " C </answer>", " B"], **columns) == [1.5, 0.5, 0.0]
    assert language.prefilled(format_reward(), language.PREFILL)(None, [" B </answer>"]) == [1.0]
    assert option_reward(None, [" B </answer>"], answer=["B"]) != [None]
    with pytest.raises(ValueError, match="format_weight"):
        language.language_reward(format_weight=-1)


def test_report_counts_both():
    right = [f" {row['answer']} </answer>" for row in ROWS]
    report = language.language_report(right, ROWS)
    assert (report.real.mean, report.cf.mean, report.both.mean, report.unparsable) == (1, 1, 1, 0)
    worse = [*right[:-1], "nothing"]
    report = language.language_report(worse, ROWS)
    assert report.real.mean == 1 and report.cf.mean == report.both.mean == pytest.approx(11 / 12) and report.unparsable == 1
    with pytest.raises(ValueError, match="two rows a pair"):
        language.language_report(right[:-1], ROWS)


def test_chat_templates(tiny):
    _, tokenizer = tiny
    with pytest.raises(ValueError, match="chat template"):
        language.description_rows(CLIPS, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="example"):
        language.description_rows(CLIPS, example=True)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
    try:
        plain, shown = (language.description_rows(CLIPS, tokenizer=tokenizer, example=example)[0]["prompt"] for example in (False, True))
    finally:
        tokenizer.chat_template = None
    assert plain.count("[user]") == 1 and shown.count("[user]") == 2
    assert plain.endswith(f"[assistant] {language.PREFILL}") and language.EXAMPLE[0] in shown


def test_supervised_steps_learn_the_answer_only(tiny):
    model, tokenizer = tiny
    losses = language.supervised_steps(model, tokenizer, ROWS[:2], steps=20, batch_size=4, lr=1e-2)
    assert losses[-1] < losses[0]
    chances = language.option_probabilities(model, tokenizer, ROWS, batch_size=7)
    assert chances.shape == (24, 4) and torch.allclose(chances.sum(1), torch.ones(24))
    whole = language.answer_texts(model, tokenizer, ROWS, max_new_tokens=2)
    # padding on the left must not change what a row is told
    assert whole == language.answer_texts(model, tokenizer, ROWS, max_new_tokens=2, batch_size=5)


def test_a_step_with_trl(tiny, tmp_path):
    pytest.importorskip("trl")
    model, tokenizer = tiny
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = language.language_trainer(
        model, tokenizer, ROWS, tmp_path, pairs_per_step=2, num_generations=8, max_completion_length=2, max_steps=1, learning_rate=1e-2, report_to=[], save_strategy="no",
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, logging_steps=1, seed=0,
    )
    assert trainer.args.generation_batch_size == 32 and (trainer.args.loss_type, trainer.args.epsilon_high, trainer.args.beta) == ("dapo", 0.28, 0.0)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert np.isfinite(logged["grad_norm"]) and "dna/signal_real" in logged
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
