"""Supervised fine-tuning: balance, rehearsal, resume, refusals."""

import pytest
import torch

from papers10.taming_hallucinations.clips import QUESTIONS, draw_pairs
from papers10.taming_hallucinations.model import examples, load_base
from papers10.taming_hallucinations.sft import PairBatches, fine_tune


@pytest.fixture(scope="module")
def pairs():
    return draw_pairs(100, seed=0)


def rows_of(batch, pairs, branch):
    """How many clips of a batch are clips of `branch` and not of the other."""
    clips = {bytes(v.numpy().tobytes()) for v in examples(pairs, branch).video}
    return sum(v.numpy().tobytes() in clips for v in batch.video)


def test_every_balanced_batch_holds_as_many_edits_as_real_clips(pairs):
    batches = PairBatches(pairs, "paired", batch_size=10, seed=1)
    for _ in range(25):  # more than one epoch
        batch = next(batches)
        assert rows_of(batch, pairs, "real") == rows_of(batch, pairs, "cf") == 5


@pytest.mark.parametrize("setting", ["real", "cf"])
def test_one_sided_batches_hold_one_side(pairs, setting):
    batch = next(PairBatches(pairs, setting, batch_size=10, seed=1))
    assert rows_of(batch, pairs, setting) == 10


def test_an_epoch_shows_every_pair_once(pairs):
    batches = PairBatches(pairs, "cf", batch_size=20, seed=2)
    seen = torch.cat([next(batches).video for _ in range(5)])
    assert len({v.numpy().tobytes() for v in seen}) == 100


def test_rehearsal_asks_the_old_question_in_each_half(pairs):
    batch = next(PairBatches(pairs, "paired", batch_size=16, seed=3, rehearse=0.25))
    old = QUESTIONS.index("side")
    assert (batch.question[:8] == old).sum() == (batch.question[8:] == old).sum() == 2


def test_batches_taken_up_again_go_on_where_they_stopped(pairs):
    first = PairBatches(pairs, "paired", batch_size=30, seed=4)
    for _ in range(8):
        next(first)
    second = PairBatches(pairs, "paired", batch_size=30, seed=4)
    second.load_state_dict(first.state_dict())
    for _ in range(5):
        assert (next(first).video == next(second).video).all()


def test_the_base_stays_as_it_is(pairs):
    base = load_base()
    before = base.head.weight.clone()
    model, history = fine_tune(base, pairs, "paired", steps=2, batch_size=8)
    assert (base.head.weight == before).all() and (model.head.weight != before).any()
    assert history.last("loss") > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"setting": "both"}, "setting: expected"),
        ({"setting": "real", "batch_size": 0}, "batch_size: expected at least 1"),
        ({"setting": "real", "batch_size": 101}, "batch_size: expected at most the 100 pairs"),
        ({"setting": "paired", "batch_size": 7}, "batch_size"),
        ({"setting": "paired", "rehearse": 1.5}, "rehearse: expected"),
    ],
)
def test_refusals_name_argument_and_value(pairs, arguments, message):
    with pytest.raises(ValueError, match=message):
        PairBatches(pairs, **arguments)
