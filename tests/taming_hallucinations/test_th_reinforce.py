"""Reinforcement on pairs: exact signals, one sample a row, resume, what differs between the arms."""

import copy
import warnings

import numpy as np
import pytest
import torch

from papers10.core.random import generator
from papers10.rl.advantages import dna_advantages, group_advantages
from papers10.taming_hallucinations.clips import draw_pairs
from papers10.taming_hallucinations.model import load_base
from papers10.taming_hallucinations.reinforce import ARMS, PairRows, PairTask, branch_gradients, reinforce


@pytest.fixture(scope="module")
def pairs():
    return draw_pairs(40, seed=0)


def quick(pairs, arm, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dynamic sampling")
        return reinforce(load_base(), pairs, arm, **{"steps": 3, "pairs_per_step": 4, "generations": 8} | options)


@pytest.mark.parametrize("arm", ARMS)
def test_signals_lie_on_the_curve_of_equation_9(pairs, arm):
    _, _, signals = quick(pairs, arm)
    p, s = signals.array("accuracy"), signals.array("signal")
    # eps = 1e-6 beside a standard deviation of at least 0.33
    assert abs(s - 2 * np.sqrt(p * (1 - p)) * np.sqrt(7 / 8)).max() < 1e-5


def test_dna_gives_both_members_one_signal(pairs):
    _, _, signals = quick(pairs, "dna")
    s, scaled = signals.array("signal"), signals.array("scaled")
    both = (s > 1e-6).all(1)
    assert both.any() and abs(scaled[both, 0] - scaled[both, 1]).max() < 1e-6
    assert np.allclose(scaled[both].mean(1), s[both].mean(1), atol=1e-6)


def test_pairs_differs_from_dna_in_the_scaling_alone(pairs):
    plain, scaled = (quick(pairs, arm, steps=1, pairs_per_step=30) for arm in ("pairs", "dna"))
    assert (plain[2].array("signal") == scaled[2].array("signal")).all()
    assert (plain[2].array("scaled") != scaled[2].array("scaled")).any()


def test_grpo_uses_every_group_once(pairs):
    _, _, signals = quick(pairs, "grpo")
    assert signals.samples == 3 * 4 * 2 * 8 and len(signals.step) == 3 * 4


def test_a_group_is_one_clip_and_its_branch_is_the_parity(pairs):
    task = PairTask.of(pairs)
    rollouts = task.roll_out(load_base(), torch.tensor([3, 7]), generator(0, "test"), generations=5)
    assert rollouts.group_ids.tolist() == [6] * 5 + [7] * 5 + [14] * 5 + [15] * 5
    assert rollouts.meta["pair"].tolist() == [3] * 10 + [7] * 10
    assert rollouts.meta["branch"].tolist() == ([0] * 5 + [1] * 5) * 2
    expected = torch.where(
        rollouts.meta["branch"] == 0,
        torch.from_numpy(pairs.real_answer)[rollouts.meta["pair"]],
        torch.from_numpy(pairs.cf_answer)[rollouts.meta["pair"]],
    )
    assert (task.reward(rollouts) == (rollouts.actions[:, 0] == expected)).all()
    torch.testing.assert_close(task.logp(load_base(), rollouts), rollouts.logprobs, atol=1e-5, rtol=0)


def test_the_branches_gradients_add_up_to_the_whole(pairs):
    task, policy = PairTask.of(pairs), copy.deepcopy(load_base()).double()
    rollouts = task.roll_out(policy, torch.arange(20), generator(1, "test"), generations=8)
    rewards = task.reward(rollouts)
    plain = group_advantages(rewards, rollouts.group_ids)
    scaled = dna_advantages(rewards, rollouts.group_ids, pair_ids=rollouts.meta["pair"], branch=rollouts.meta["branch"])
    found = {name: branch_gradients(policy, task, rollouts, a) for name, a in (("plain", plain), ("dna", scaled))}
    logp = task.logp(policy, rollouts)
    whole = torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(-(logp[:, 0] * plain).mean(), list(policy.parameters()), allow_unused=True)
            if g is not None
        ]
    )
    one = found["plain"]
    length = one["real"] ** 2 + one["cf"] ** 2 + 2 * one["cosine"] * one["real"] * one["cf"]
    assert abs(length**0.5 - float(whole.norm())) < 1e-6 * float(whole.norm())
    assert found["dna"] != found["plain"]


@pytest.mark.parametrize("updates", [1, 3])
def test_training_taken_up_again_ends_with_the_same_bits(pairs, tmp_path, updates):
    class Stopped(Exception):
        pass

    def stop(state):
        if state.step == 4:
            raise Stopped

    from papers10.core import loop

    def weights(folder, **where):
        original = loop.LoopConfig
        options = {"steps": 6, "updates": updates, "folder": folder}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "papers10.taming_hallucinations.reinforce.LoopConfig", lambda **given: original(**given, save_every=1)
            )
            return quick(pairs, "dna", **options, **where)[0].head.weight.detach()

    whole = weights(tmp_path / "whole")
    with pytest.raises(Stopped):
        weights(tmp_path / "parts", after_step=[stop])
    assert (weights(tmp_path / "parts") == whole).all()


def test_every_pair_comes_once_an_epoch_and_order_is_taken_up():
    rows = PairRows(10, 4, seed=1)
    first = torch.cat([next(rows), next(rows)])
    assert len(set(first.tolist())) == 8
    other = PairRows(10, 4, seed=1)
    other.load_state_dict(rows.state_dict())
    assert (next(rows) == next(other)).all() and rows.epoch == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arm": "ppo"}, "arm: expected"),
        ({"arm": "dna", "generations": 1}, "generations"),
        ({"arm": "dna", "pairs_per_step": 41}, "pairs_per_step: expected 1 to 40"),
        ({"arm": "dna", "scope": "all"}, "scope"),
    ],
)
def test_refusals_name_argument_and_value(pairs, arguments, message):
    with pytest.raises(ValueError, match=message):
        quick(pairs, **arguments)
