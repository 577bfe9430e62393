"""The small network and its base: shapes, refusals, resume."""

import pytest
import torch

from papers10.core.random import generator
from papers10.taming_hallucinations.clips import draw_pairs
from papers10.taming_hallucinations.model import (
    EveryQuestion,
    TinyVideoQA,
    accuracies,
    build_model,
    examples,
    load_base,
    pretrain,
    untouched,
    without_pictures,
)


@pytest.fixture(scope="module")
def pairs():
    return draw_pairs(200, seed=0)


def test_several_questions_share_the_frames(pairs):
    model, asked = build_model(0), examples(pairs[:6], "real")
    table = torch.arange(5).repeat(6, 1)
    together = model(asked.video, table)
    assert together.shape == (6, 5, 4)
    for q in range(5):
        torch.testing.assert_close(together[:, q], model(asked.video, table[:, q]))


def test_bytes_and_shares_are_the_same_clip(pairs):
    model, asked = build_model(0), examples(pairs[:3], "cf")
    torch.testing.assert_close(model(asked.video, asked.question), model(asked.video.float() / 255, asked.question))


def test_sampled_answers_follow_the_distribution(pairs):
    model, asked = load_base(), examples(pairs[:2], "real")
    drawn = model.generate(asked.video, asked.question, n=20_000, generator=generator(0, "test"), temperature=2.0)
    expected = (model(asked.video, asked.question) / 2).softmax(-1)
    for i in range(2):
        # Standard deviation of a share of 20,000 draws is below 0.0036.
        assert (drawn[i].bincount(minlength=4) / 20_000 - expected[i]).abs().max() < 0.015


def test_the_shipped_base_does_not_look():
    held_out = draw_pairs(600, seed=77)
    scores = accuracies(load_base(), held_out)
    assert scores["real"] > 0.95 and scores["cf"] < 0.25 and scores["both"] <= scores["cf"]
    assert untouched(load_base(), held_out) > 0.9
    assert accuracies(load_base(), without_pictures(held_out, 0))["both"] < 0.1


def test_training_taken_up_again_ends_with_the_same_bits(pairs, tmp_path):
    class Stopped(Exception):
        pass

    def stop(state):
        if state.step == 5:
            raise Stopped

    from papers10.core.loop import LoopConfig, TrainState, train
    from papers10.taming_hallucinations.model import answer_loss

    def weights(folder, **where):
        model = build_model(1)
        state = TrainState(model, torch.optim.Adam(model.parameters()), batches=EveryQuestion(pairs, 8, 1))
        train(state, answer_loss, LoopConfig(steps=8, save_every=2), folder=folder, **where)
        return model.head.weight.detach()

    whole = weights(tmp_path / "whole")
    with pytest.raises(Stopped):
        weights(tmp_path / "parts", after_step=[stop])
    assert (weights(tmp_path / "parts") == whole).all()


def test_one_seed_is_one_base(pairs):
    first, second = (pretrain(pairs, steps=3, seed=4)[0].head.weight for _ in range(2))
    assert (first == second).all()


def test_an_empty_batch_has_no_answers(pairs):
    asked = examples(pairs, "real")[torch.arange(0)]
    assert load_base().answer(asked.video, asked.question).shape == (0,)


@pytest.mark.parametrize(
    ("video", "question", "error", "message"),
    [
        (
            torch.zeros(2, 5, 3, 16, 16),
            torch.zeros(2, dtype=torch.int64),
            ValueError,
            r"video: expected \[B, 6, 3, 16, 16\]",
        ),
        (
            torch.zeros(2, 6, 3, 16, 16),
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            "question: expected one index a clip",
        ),
        (torch.zeros(2, 6, 3, 16, 16), torch.zeros(2), TypeError, "question: expected int64"),
        (torch.zeros(2, 6, 3, 16, 16), torch.tensor([0, 9]), ValueError, r"indices in \[0, 5\), got 0 to 9"),
        (
            torch.zeros(2, 6, 3, 16, 16, dtype=torch.int64),
            torch.tensor([0, 1]),
            TypeError,
            "video: expected uint8 or floats",
        ),
    ],
)
def test_refusals_name_argument_and_value(video, question, error, message):
    with pytest.raises(error, match=message):
        build_model(0)(video, question)


def test_sizes_that_the_convolutions_cannot_halve_are_refused():
    with pytest.raises(ValueError, match="size: expected a multiple of 4"):
        TinyVideoQA(size=18)
