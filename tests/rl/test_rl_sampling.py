"""Samplers and the filter of groups: balance, whole pairs, several processes, resuming, bad input."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.rl.sampling import (
    BalancedBatchSampler,
    PairRepeatSampler,
    degenerate_probability,
    dynamic_filter,
    generations_for,
    pair_degenerate_probability,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([2, 4, 6, 10]), st.integers(1, 4), st.integers(0, 3))
def test_every_rank_is_balanced_and_the_larger_kind_is_seen_once(n_real, n_cf, batch_size, world_size, seed):
    ranks = [BalancedBatchSampler(n_real, n_cf, batch_size, seed, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [list(sampler) for sampler in ranks]
    assert len({tuple(map(len, each)) for each in batches}) == 1, "ranks must do the same steps with the same sizes"
    real = [i for each in batches for batch in each for i in batch if i < n_real]
    cf = [i - n_real for each in batches for batch in each for i in batch if i >= n_real]
    assert all(sum(i < n_real for i in batch) * 2 == len(batch) for each in batches for batch in each)
    larger, smaller = (real, cf) if n_real >= n_cf else (cf, real)
    counts = Counter(larger)
    assert set(counts) == set(range(max(n_real, n_cf))) and len(larger) - len(counts) < world_size
    few = Counter(smaller).values()
    assert max(few) - min(few) <= 1 and set(smaller) == set(range(min(n_real, n_cf)))


def test_drop_last_leaves_only_full_batches():
    batches = list(BalancedBatchSampler(11, 5, 4, 0, drop_last=True, rank=1, world_size=2))
    assert [len(batch) for batch in batches] == [4, 4]


def test_real_samples_stand_first():
    assert all(max(batch[:2]) < 8 <= min(batch[2:]) for batch in BalancedBatchSampler(8, 8, 4, 0))


@pytest.mark.parametrize("arguments, named", [
    ((4, 4, 3, 0), "batch_size"), ((0, 4, 2, 0), "n_real"), ((4, 0, 2, 0), "n_cf"), ((4, 4, 0, 0), "batch_size"), ((4, 4, 2, -1), "seed"), ((4, 4, 20, 0, True), "batch_size"),
    ((4, 4, 2, 0, False, 2, 2), "rank"), ((4, 4, 2, 0, False, 0, 0), "world_size"),
])
def test_balanced_sampler_names_what_is_wrong(arguments, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        BalancedBatchSampler(*arguments)
    with pytest.raises(TypeError, match="^n_real"):
        BalancedBatchSampler(4.0, 4, 2, 0)


def pairs_of(n, **options):
    ids = [f"p{i // 2}" for i in range(2 * n)]
    return PairRepeatSampler(ids, ["real", "cf"] * n, **{"num_generations": 3, "pairs_per_batch": 2, "seed": 0, **options})


def makers():
    return {"balanced": lambda: BalancedBatchSampler(9, 4, 4, 7), "pairs": lambda: pairs_of(5)}


@pytest.mark.parametrize("kind", ["balanced", "pairs"])
@pytest.mark.parametrize("taken", [0, 1, 3, "all"])
def test_a_resumed_stream_goes_on_with_the_next_item(kind, taken):
    make = makers()[kind]
    whole, other = make(), make()
    expected = list(whole) + list(whole)
    taken = len(other) if taken == "all" else taken
    before = [item for item, _ in zip(other, range(taken))]
    # zip asks for one item more than it gives when the range ends first, so the place is set by hand.
    state = {**other.state_dict(), "epoch": 0 if taken < len(other) else 1, "position": taken % len(other)}
    resumed = make()
    resumed.load_state_dict(state)
    rest = list(resumed) + (list(resumed) if taken < len(other) else [])
    assert before + rest == expected


def test_state_counts_what_was_handed_out():
    sampler = pairs_of(5)
    stream = iter(sampler)
    next(stream), next(stream)
    assert sampler.state_dict()["position"] == 2
    assert sampler.state_dict(consumed=1)["position"] == 1
    for _ in stream:
        pass
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (1, 0)
    assert sampler.state_dict(consumed=5) | {} == {**sampler.state_dict(), "epoch": 0, "position": 5}
    assert sampler.state_dict(consumed=len(sampler))["epoch"] == 1


def test_naming_the_present_epoch_keeps_the_place():
    sampler = pairs_of(5)
    next(iter(sampler))
    sampler.set_epoch(0)
    assert sampler.position == 1
    sampler.set_epoch(2)
    assert (sampler.epoch, sampler.position) == (2, 0)


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_real": 8}, {"position": 99}])
def test_a_foreign_state_is_refused(change):
    sampler = BalancedBatchSampler(9, 4, 4, 7)
    with pytest.raises(ValueError, match="state"):
        sampler.load_state_dict({**sampler.state_dict(), **change})


def test_orders_depend_on_seed_and_epoch_alone():
    first, again, other = pairs_of(6), pairs_of(6), pairs_of(6, seed=1)
    epoch = list(first)
    assert epoch == list(again) != list(other)
    assert list(first) != epoch


def test_pairs_stay_whole_and_members_adjacent():
    rows = np.array(list(pairs_of(7, num_generations=4, pairs_per_batch=3, seed=2))).reshape(-1, 2, 4)
    assert len(rows) == 6, "the pair that does not fill a batch waits for another epoch"
    assert (rows[:, 1] == rows[:, 0] + 1).all() and (rows[:, 0] % 2 == 0).all() and len(set(rows[:, 0, 0].tolist())) == 6


def test_each_batch_is_repeated_in_a_row():
    rows = np.array(list(pairs_of(4, repeat=2))).reshape(2, 2, -1)
    assert (rows[:, 0] == rows[:, 1]).all() and len(pairs_of(4, repeat=2)) == rows.size


def test_without_shuffling_pairs_come_in_order_of_appearance():
    assert list(pairs_of(2, shuffle=False, num_generations=1)) == [0, 1, 2, 3]


def test_the_real_clip_comes_first_whatever_the_order_of_rows():
    sampler = PairRepeatSampler(torch.tensor([4, 4, 2, 2]), ["cf", "real", "cf", "real"], num_generations=1, pairs_per_batch=1, seed=0, shuffle=False)
    assert list(sampler) == [1, 0, 3, 2]


def test_several_edits_of_one_clip():
    sampler = PairRepeatSampler([0] * 3, [2, 0, 1], num_generations=2, pairs_per_batch=1, seed=0)
    assert list(sampler) == [1, 1, 2, 2, 0, 0]


@pytest.mark.parametrize("ids, branch, said", [
    (["a", "a", "b"], ["real", "cf", "real"], "pair 'b' has no row of branch 'cf'"), (["a", "a", "a"], ["real", "cf", "cf"], "pair 'a' has two of branch 'cf'"),
    (["a", "a"], ["real", "real"], "at least two branches"), ([], [], "at least one row"), (["a", "a"], ["real"], "branch: expected 2 labels"),
])
def test_pair_sampler_names_the_pair(ids, branch, said):
    with pytest.raises(ValueError, match=said):
        PairRepeatSampler(ids, branch, num_generations=2, pairs_per_batch=1, seed=0)


def test_pair_sampler_needs_enough_pairs():
    with pytest.raises(ValueError, match="pairs_per_batch: expected at most the 2 pairs"):
        pairs_of(2, pairs_per_batch=3)
    with pytest.raises(TypeError, match="num_generations"):
        pairs_of(2, num_generations=2.0)


def test_filter_keeps_groups_with_two_rewards():
    rewards = torch.tensor([1.0, 1, 0, 1, 0, 0])
    assert dynamic_filter(rewards, torch.tensor([7, 7, 3, 3, 9, 9])).tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("rule, expected", [("either", [True, True, False]), ("both", [True, False, False])])
def test_filter_keeps_or_drops_pairs_whole(rule, expected):
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1])
    keep = dynamic_filter(rewards, torch.arange(12) // 2, pair_ids=torch.arange(12) // 4, rule=rule)
    assert keep.view(3, 4).tolist() == [[value] * 4 for value in expected]


def test_filter_takes_rows_in_any_order():
    order = torch.tensor([3, 0, 2, 1, 5, 4])
    rewards, groups, pairs = torch.tensor([1.0, 0, 1, 1, 0, 0]), torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 1, 1])
    pairs, groups, rewards = torch.cat([pairs, torch.tensor([1])]), torch.cat([groups, torch.tensor([3])]), torch.cat([rewards, torch.tensor([1.0])])
    order = torch.cat([order, torch.tensor([6])])
    assert dynamic_filter(rewards[order], groups[order], pair_ids=pairs[order]).tolist() == dynamic_filter(rewards, groups, pair_ids=pairs)[order].tolist()


def test_equal_rewards_of_a_tenth_are_no_signal():
    assert not dynamic_filter(torch.full((3,), 0.1), ["g"] * 3).any()
    assert dynamic_filter(torch.tensor([1e6, 1e6 + 1]), [0, 0]).all()


def test_filter_without_unjudged_rows():
    keep = dynamic_filter([1.0, None, 0.0, None, None, 1.0], [0, 0, 0, 1, 1, 2], nan="zero")
    assert keep.tolist() == [True, False, True, False, False, False]
    both = dynamic_filter([1.0, 0.0, None, None], [0, 0, 1, 1], pair_ids=[0] * 4, rule="either", nan="zero")
    assert both.tolist() == [True, True, False, False]
    assert not dynamic_filter([1.0, 0.0, None, None], [0, 0, 1, 1], pair_ids=[0] * 4, rule="both", nan="zero").any()


@pytest.mark.parametrize("arguments, options, said", [
    (([1.0, math.nan], [0, 0]), {}, "index 1"), (([1.0, 0.0], [0, 0]), {"rule": "all"}, "rule"), (([1.0, 0.0], [0, 0]), {"pair_ids": [0, 1]}, "group 0 has several"),
    (([1.0, 0.0], [0, 0]), {"pair_ids": [5, 5]}, "pair 5 has one"), (([1.0], [0, 0]), {}, "group_ids"), (([1.0, 0.0], [0, 0]), {"atol": -1}, "atol"),
])
def test_filter_names_what_is_wrong(arguments, options, said):
    with pytest.raises(ValueError, match=said):
        dynamic_filter(*arguments, **options)


@given(st.floats(0, 1), st.integers(1, 32))
def test_degenerate_probability_is_symmetric_and_sums_to_one_for_one_answer(p, count):
    chance = degenerate_probability(p, count)
    assert 0 <= chance <= 1 + 1e-12 and chance == pytest.approx(degenerate_probability(1 - p, count), abs=1e-12)
    assert degenerate_probability(p, 1) == pytest.approx(1)


def test_degenerate_probability_known_values():
    assert degenerate_probability(0.5, 2) == 0.5 and degenerate_probability(0.8, 2) == pytest.approx(0.68)
    assert degenerate_probability(np.array([0.0, 0.5]), 2).tolist() == [1.0, 0.5] and degenerate_probability(torch.tensor([1.0]), 4).tolist() == [1.0]
    assert pair_degenerate_probability(0.5, 0.8, 2) == pytest.approx(0.5 * 0.68) and pair_degenerate_probability(0.5, 0.8, 2, "both") == pytest.approx(1 - 0.5 * 0.32)


def test_generations_for_is_the_smallest_count():
    for p in (0.5, 0.8, 0.95):
        count = generations_for(p, limit=0.3)
        assert degenerate_probability(p, count) <= 0.3 < degenerate_probability(p, count - 1)
    with pytest.raises(ValueError, match="4 answers"):
        generations_for(0.999, most=4)


@pytest.mark.parametrize("p", [1.5, -0.1, math.nan, [0.5, 2.0]])
def test_degenerate_probability_refuses_what_is_no_chance(p):
    with pytest.raises(ValueError, match="^p"):
        degenerate_probability(p, 2)
