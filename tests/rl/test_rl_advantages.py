"""Advantages: known values of the specifications, other trainers' formulas, invariants, wrong inputs, processes."""

import datetime
import math
import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.rl import advantages as A

GROUPS = [1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
FORMATS = [1.5, 0.5, 0.5, 0, 1.5, 1.5, 1.5, 1.5, 0, 0, 0, 0, 0.5, 0.5, 0, 0.5]
PAIR = [1] * 7 + [0] + [1, 0, 0, 0, 1, 0, 0, 0]
EIGHT = dict(pair_ids=[0] * 16, branch=[0] * 8 + [1] * 8)
# Float32 results next to numbers printed with six digits.
SIX = dict(abs=1e-6)


def draw(n, *, seed=0, dtype=torch.float64):
    return torch.randn(n, generator=generator(seed, "rewards"), dtype=torch.float64).to(dtype)


def binary(*correct, G):
    """Rewards of groups of G answers of which so many are right."""
    return [float(i < c) for c in correct for i in range(G)]


def one_pair(real, cf, G, **options):
    return A.dna_advantages(
        torch.tensor(binary(real, cf, G=G), dtype=torch.float64),
        pair_ids=[0] * (2 * G),
        branch=["real"] * G + ["cf"] * G,
        return_info=True,
        **options,
    )


# ---------------------------------------------------------------- groups


def test_ids_of_neighbours():
    assert A.group_ids_from_count(6, 3).tolist() == [0, 0, 0, 1, 1, 1]
    assert A.group_ids_from_count(2, 1).tolist() == [0, 1]


@pytest.mark.parametrize("n, G, kind", [(5, 2, ValueError), (0, 2, ValueError), (4, 0, ValueError), (4, 2.0, TypeError)])
def test_ids_of_neighbours_refuse(n, G, kind):
    with pytest.raises(kind, match="n_rows|num_generations"):
        A.group_ids_from_count(n, G)


def test_stats_of_small_groups():
    stats = A.group_stats([1, 0, 1, 5.0, 3], ["a", "b", "a", "b", "c"])
    assert stats.ids == ["a", "b", "c"] and stats.inverse.tolist() == [0, 1, 0, 1, 2]
    assert stats.mean.tolist() == [1, 2.5, 3] and stats.count.tolist() == [2, 2, 1] and stats.range.tolist() == [0, 5, 0]
    assert stats.std.tolist() == pytest.approx([0, 5 / math.sqrt(2), 0])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.floats(-5, 5, width=32)), min_size=1, max_size=40), st.sampled_from([0, 1]))
def test_stats_equal_numpy(rows, ddof):
    ids, rewards = np.array([i for i, _ in rows]), np.array([r for _, r in rows], dtype=np.float64)
    stats = A.group_stats(torch.tensor(rewards), torch.tensor(ids), ddof=ddof)
    for k, label in enumerate(np.unique(ids)):
        own = rewards[ids == label]
        assert stats.ids[k] == label and stats.count[k] == len(own)
        assert float(stats.mean[k]) == pytest.approx(own.mean(), abs=1e-12)
        assert float(stats.std[k]) == pytest.approx(own.std(ddof=ddof) if len(own) > ddof else 0, abs=1e-12)
        assert float(stats.range[k]) == own.max() - own.min()


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([3, 3, 7, 7]),
        torch.tensor([-5, -5, 2**60, 2**60]),
        torch.tensor([0, 0, 1, 1], dtype=torch.uint8),
        torch.tensor([False, False, True, True]),
        np.array([9, 9, 1, 1]),
        np.array(["u", "u", "v", "v"], dtype=object),
        np.array([4, 4, 5, 5], dtype=np.uint64),
        [("a", 1), ("a", 1), ("b", 1), ("b", 1)],
        (0, 0, None, None),
    ],
)
def test_any_kind_of_ids(ids):
    found = A.group_advantages([1, 0, 3, 1.0], ids)
    assert torch.equal(found, A.group_advantages([1, 0, 3, 1.0], num_generations=2))


# ---------------------------------------------------------------- known values


@pytest.mark.parametrize(
    "options, right, wrong",
    [({"ddof": 0, "eps": 0}, 1, -1), ({}, 0.866024, -0.866024), ({"scale": "none"}, 0.5, -0.5)],
)
def test_two_of_four(options, right, wrong):
    found = A.group_advantages([1, 0, 1, 0.0], num_generations=4, **options)
    assert found.tolist() == pytest.approx([right, wrong, right, wrong], **SIX)


@pytest.mark.parametrize(
    "rewards, rollouts, trajectory, turn",
    [
        ([1, 1, 0, 1, 1, 0], [0, 0, 1, 2, 2, 3], (0.866024, -0.866024), (0.645496, -1.290992)),
        ([1] * 8 + [0] * 3, [0] * 8 + [1, 2, 3], (1.499997, -0.499999), (0.583873, -1.556995)),
    ],
)
def test_trajectory_and_turn_level(rewards, rollouts, trajectory, turn):
    for level, (right, wrong) in (("trajectory", trajectory), ("turn", turn)):
        found = A.group_advantages(rewards, [0] * len(rewards), trajectory_ids=rollouts, level=level)
        assert found.tolist() == pytest.approx([right if r else wrong for r in rewards], **SIX)


def test_trajectory_ids_count_within_their_group():
    # Rollout 0 of one prompt is not rollout 0 of the other.
    rewards, groups, rollouts = [1, 1, 0, 3, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1]
    found = A.group_advantages(rewards, groups, trajectory_ids=rollouts, scale="none")
    assert found.tolist() == [0.5, 0.5, -0.5, 1.5, -1.5, -1.5]


def test_leave_one_out():
    found = A.group_advantages([3, 1, 2.0], [0, 0, 0], baseline="leave_one_out", scale="none")
    assert found.tolist() == pytest.approx([3 - 1.5, 1 - 2.5, 2 - 2], abs=1e-12)


@pytest.mark.parametrize("singleton, expected", [("zero", 0), ("raw", 0.999999)])
def test_group_of_one(singleton, expected):
    found = A.group_advantages([1, 1, 0.0], [5, 6, 6], singleton=singleton)
    assert found[0] == pytest.approx(expected, **SIX)
    with pytest.raises(ValueError, match="group 5 has one"):
        A.group_advantages([1, 1, 0.0], [5, 6, 6], singleton="error")


@pytest.mark.parametrize("rewards, G", [(GROUPS, 4), (FORMATS, 4)])
def test_batch_std_is_the_share_of_informative_groups(rewards, G):
    _, info = A.bn_advantages(rewards, num_generations=G, eps=0, return_info=True)
    assert info.frac_informative == 0.5
    assert float(info.std) == pytest.approx(math.sqrt(0.5 * 3 / 4), abs=1e-6)
    assert float(info.mean) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    "rewards, options, first, last",
    [
        (GROUPS, {"eps": 0}, [0.816497] * 3 + [-2.449490], [2.449490] + [-0.816497] * 3),
        (FORMATS, {}, [2.271103, -0.324443, -0.324443, -1.622216], [0.816496, 0.816496, -2.449487, 0.816496]),
    ],
)
def test_batch_normalised_values(rewards, options, first, last):
    found = A.bn_advantages(rewards, num_generations=4, **options).view(4, 4)
    assert found[0].tolist() == pytest.approx(first, **SIX)
    other = found[1] if rewards is GROUPS else found[3]
    assert other.tolist() == pytest.approx(last, **SIX)
    assert found[2].abs().max() == 0


def test_batch_normalised_values_with_the_numbers_of_trl():
    options = dict(ddof=1, eps=1e-4, batch_ddof=1, batch_eps=1e-4)
    found = A.bn_advantages(FORMATS, num_generations=4, **options).view(4, 4)
    # Printed with four digits.
    assert found[0].tolist() == pytest.approx([2.1989, -0.3141, -0.3141, -1.5706], abs=6e-5)
    assert found[3].tolist() == pytest.approx([0.79035, 0.79035, -2.3710, 0.79035], abs=6e-5)


def test_dna_values_of_the_chapter():
    found, info = one_pair(7, 2, 8, ddof=0, eps=0)
    assert info.signal.tolist()[0] == pytest.approx([0.661438, 0.866025], **SIX)
    assert info.branch_scale.tolist()[0] == pytest.approx([1.154654, 0.881881], abs=1.5e-6)
    assert info.scaled_signal.tolist()[0] == pytest.approx([0.763732] * 2, **SIX)
    assert found.tolist() == pytest.approx([0.436418] * 7 + [-3.054926] + [1.527463] * 2 + [-0.509154] * 6, **SIX)
    assert (1 / info.branch_scale).sum() == pytest.approx(2, abs=1e-12)


def test_dna_values_with_sample_deviation():
    found = A.dna_advantages(PAIR, **EIGHT)
    right, wrong = 1.428808, -0.476269
    assert found.tolist() == pytest.approx(
        [0.408231] * 7 + [-2.857615] + [right if r else wrong for r in PAIR[8:]], abs=1.5e-6
    )


def test_dna_values_of_sixteen():
    _, info = one_pair(15, 8, 16, ddof=0, eps=0)
    assert info.signal.tolist()[0] == pytest.approx([0.484123, 1], **SIX)
    assert info.branch_scale.tolist()[0] == pytest.approx([1.532795, 0.742061], **SIX)


@pytest.mark.parametrize(
    "rule, cf, scale, keep",
    [
        ("keep", [1.5, -0.5, -0.5, -0.5], [1, 1], [False] * 4 + [True] * 4),
        ("halve", [0.75, -0.25, -0.25, -0.25], [1, 0.5], [False] * 4 + [True] * 4),
        ("drop_pair", [0] * 4, [1, 1], [False] * 8),
    ],
)
def test_one_branch_without_signal(rule, cf, scale, keep):
    found, info = one_pair(4, 1, 4, degenerate=rule)
    # eps = 1e-6 next to a deviation of one half.
    assert found.tolist() == pytest.approx([0] * 4 + cf, abs=4e-6)
    assert info.branch_scale.tolist() == [scale] and info.keep.tolist() == keep
    assert info.degenerate.tolist() == [[True, False]]
    assert (info.frac_pairs_degenerate, info.frac_pairs_one_sided) == (0, 1)


def test_no_branch_with_signal():
    found, info = one_pair(4, 0, 4)
    assert found.abs().max() == 0 and info.branch_scale.tolist() == [[1, 1]]
    assert (info.frac_pairs_degenerate, info.frac_pairs_one_sided) == (1, 0)


@pytest.mark.parametrize("target, level", [("mean", (1 + 0.75**0.5) / 2), ("max", 1), ("min", 0.75**0.5), (0.3, 0.3)])
def test_targets(target, level):
    _, info = one_pair(4, 2, 8, ddof=0, eps=0, target=target)
    assert info.scaled_signal.tolist()[0] == pytest.approx([level] * 2, abs=1e-12)


def test_cap_of_the_factor():
    _, info = one_pair(15, 8, 16, max_branch_scale=1.2)
    assert info.branch_scale[0, 0] == 1.2 and info.branch_scale[0, 1] < 1


def test_three_branches():
    rewards = torch.tensor(binary(7, 2, 4, G=8), dtype=torch.float64)
    branch = ["real"] * 8 + ["removed"] * 8 + ["frozen"] * 8
    _, info = A.dna_advantages(rewards, pair_ids=[3] * 24, branch=branch, ddof=0, eps=0, return_info=True)
    assert info.branches == ["real", "removed", "frozen"]
    expected = (2 * math.sqrt(7 / 64) + 2 * math.sqrt(3 / 16) + 1) / 3
    assert info.scaled_signal.tolist()[0] == pytest.approx([expected] * 3, abs=1e-12)
    rewards[:8] = 1
    _, info = A.dna_advantages(rewards, pair_ids=[3] * 24, branch=branch, ddof=0, eps=0, return_info=True)
    # The target is over the branches that have something to say.
    assert info.scaled_signal.tolist()[0] == pytest.approx([0] + [(2 * math.sqrt(3 / 16) + 1) / 2] * 2, abs=1e-12)


def test_one_factor_a_branch_for_the_batch():
    rewards = torch.tensor(binary(7, 2, 8, 3, G=8), dtype=torch.float64)
    pairs, branch = [0] * 16 + [1] * 16, (["real"] * 8 + ["cf"] * 8) * 2
    found, info = A.dna_advantages(rewards, pair_ids=pairs, branch=branch, scope="batch", return_info=True)
    real = torch.tensor([b == "real" for b in branch])
    assert float(found[real].abs().mean()) == pytest.approx(float(found[~real].abs().mean()), abs=1e-12)
    scale = info.branch_scale
    # The degenerate group keeps factor 1; it has nothing to scale.
    assert scale[0, 1] == scale[1, 1] != 1 and scale[1, 0] == 1


def test_edits_without_partner_can_be_left_alone():
    rewards = binary(3, 1, 2, G=4)
    ids = dict(pair_ids=[0] * 8 + [1] * 4, branch=[0] * 4 + [1] * 8)
    with pytest.raises(ValueError, match="pair 1 has no rows of branch 0"):
        A.dna_advantages(rewards, **ids)
    found, info = A.dna_advantages(rewards, **ids, unpaired="base", return_info=True)
    assert torch.equal(found[8:], A.group_advantages(rewards[8:], num_generations=4))
    assert info.present.tolist() == [[True, True], [False, True]] and info.signal[1, 0] == 0
    with pytest.raises(ValueError, match="only 1.* pair 0 has no partner"):
        A.dna_advantages(binary(1, G=4), pair_ids=[0] * 4, branch=[1] * 4)


# ---------------------------------------------------------------- numerics


def test_equal_rewards_give_exactly_zero():
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert A.group_advantages(rewards.to(dtype), num_generations=3).abs().max() == 0
    assert A.bn_advantages(rewards, num_generations=3).abs().max() == 0
    assert A.dna_advantages(rewards, pair_ids=[0] * 6, branch=[0] * 3 + [1] * 3).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_rewards_lose_nothing(dtype):
    rewards = torch.tensor(GROUPS, dtype=dtype)
    for function in (A.group_advantages, A.bn_advantages):
        near = function(rewards, num_generations=4)
        assert torch.equal(function(rewards + 1e6, num_generations=4), near)


def test_range_decides_what_is_degenerate():
    _, info = A.dna_advantages(
        torch.tensor([1, 1 + 2e-9, 0, 1], dtype=torch.float64), pair_ids=[0] * 4, branch=[0, 0, 1, 1], return_info=True
    )
    assert info.degenerate.tolist() == [[True, False]]
    _, info = one_pair(3, 1, 4, eps=1e3)
    assert not info.degenerate.any() and float((1 / info.branch_scale).sum()) == pytest.approx(2, abs=1e-12)


@pytest.mark.parametrize(
    "rewards, dtype",
    [
        (torch.tensor(GROUPS), torch.float32),
        (torch.tensor(GROUPS).bool(), torch.float32),
        (torch.tensor(GROUPS).bfloat16(), torch.bfloat16),
        (torch.tensor(GROUPS).half(), torch.float16),
        (torch.tensor(GROUPS).double(), torch.float64),
        (np.array(GROUPS, dtype=np.float64), torch.float64),
        (GROUPS, torch.float32),
    ],
)
def test_result_has_the_dtype_of_the_rewards(rewards, dtype):
    expected = A.group_advantages(torch.tensor(GROUPS).double(), num_generations=4)
    for function in (A.group_advantages, A.bn_advantages):
        found = function(rewards, num_generations=4)
        assert found.dtype == dtype and not found.requires_grad
    found = A.group_advantages(rewards, num_generations=4)
    torch.testing.assert_close(found, expected.to(dtype))
    assert A.dna_advantages(rewards, **EIGHT).dtype == dtype


def test_no_gradient_and_no_change_of_the_input():
    rewards = draw(8).requires_grad_()
    before = rewards.detach().clone()
    assert not A.group_advantages(rewards, num_generations=4).requires_grad
    A.dna_advantages(rewards, pair_ids=[0] * 8, branch=[0] * 4 + [1] * 4)
    A.batch_normalize(rewards)
    assert torch.equal(rewards.detach(), before)


def test_rows_without_reward_do_not_count():
    rewards = [1, 0, None, 1, 0, 0]
    found, info = A.group_advantages(rewards, [0, 0, 0, 1, 1, 2], nan="zero", return_info=True)
    expected = A.group_advantages([1, 0, 1, 0, 0], [0, 0, 1, 1, 2])
    assert found[2] == 0 and torch.equal(found[[0, 1, 3, 4, 5]], expected)
    assert info.stats.count.tolist() == [2, 2, 1]
    batch = A.bn_advantages(rewards, [0, 0, 0, 1, 1, 2], nan="zero")
    assert torch.equal(batch[[0, 1, 3, 4, 5]], A.bn_advantages([1, 0, 1, 0, 0], [0, 0, 1, 1, 2]))
    assert A.group_advantages([None, math.nan], num_generations=2, nan="zero").tolist() == [0, 0]


def test_pairs_with_rows_without_reward():
    rewards = [1, 1, 0, None, 1, 0, 0, 0]
    found, info = A.dna_advantages(rewards, pair_ids=[0] * 8, branch=[0] * 4 + [1] * 4, nan="zero", return_info=True)
    assert info.keep.tolist() == [True] * 3 + [False] + [True] * 4 and found[3] == 0
    assert float(found[:3].abs().mean()) == pytest.approx(float(found[4:].abs().mean()), abs=1e-6)
    _, info = A.dna_advantages([None, None, 1, 0], pair_ids=[0] * 4, branch=[0, 0, 1, 1], nan="zero", return_info=True)
    assert info.degenerate.tolist() == [[True, False]]


# ---------------------------------------------------------------- other trainers' formulas


def verl_outcome_advantage(scores, index, epsilon=1e-6, norm=True):
    """verl's rule, written from its description: sample std, a group of one has mean 0 and std 1."""
    found = torch.empty_like(scores)
    for label in set(index):
        rows = torch.tensor([i for i, other in enumerate(index) if other == label])
        own = scores[rows]
        mean, std = (own.mean(), own.std()) if len(own) > 1 else (torch.tensor(0.0), torch.tensor(1.0))
        found[rows] = (own - mean) / (std + epsilon) if norm else own - mean
    return found


@pytest.mark.parametrize("norm", [True, False])
def test_parity_with_verl(norm):
    index = [f"uid{int(i)}" for i in torch.randint(9, (40,), generator=generator(1, "ids"))] + ["alone"]
    scores = draw(41, dtype=torch.float32)
    expected = verl_outcome_advantage(scores, index, norm=norm)
    found = A.group_advantages(scores, index, singleton="raw", scale="group" if norm else "none")
    # Two float32 computations of numbers below 10.
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", ["group", "batch", "none"])
def test_parity_with_trl(kind):
    rewards, G = draw(24, dtype=torch.float32), 4
    grouped = rewards.view(-1, G)
    mean = grouped.nanmean(1).repeat_interleave(G)
    std = grouped.std(1).repeat_interleave(G) if kind == "group" else rewards.std()
    expected = rewards - mean if kind == "none" else (rewards - mean) / (std + 1e-4)
    found = A.group_advantages(rewards, num_generations=G, scale=kind, eps=1e-4)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)


def test_scale_batch_is_not_scale_group():
    # huggingface/trl#3991: a "batch" std that was taken per group.
    rewards = [0, 1, 0, 10.0]
    found = A.group_advantages(rewards, num_generations=2, scale="batch", eps=0)
    assert found.tolist() == pytest.approx([v / np.std(rewards, ddof=1) for v in (-0.5, 0.5, -5, 5)], **SIX)


# ---------------------------------------------------------------- invariants

FUNCTIONS = {
    "group": A.group_advantages,
    "loo": lambda r, g, **o: A.group_advantages(r, g, baseline="leave_one_out", **o),
    "batch": lambda r, g, **o: A.group_advantages(r, g, scale="batch", **o),
    "bn": A.bn_advantages,
    "dna": lambda r, g, **o: A.dna_advantages(r, g, pair_ids=g // 2, branch=g % 2, unpaired="base", **o),
    "dna batch": lambda r, g, **o: A.dna_advantages(
        r, g, pair_ids=g // 2, branch=g % 2, unpaired="base", scope="batch", **o
    ),
}
rows = st.lists(st.tuples(st.integers(0, 7), st.integers(-3, 3)), min_size=1, max_size=32)


def tensors(rows):
    return torch.tensor([float(r) for _, r in rows], dtype=torch.float64), torch.tensor([g for g, _ in rows])


def branches_present(groups):
    return len(set((groups % 2).tolist())) > 1


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=20, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(name, rows, shuffle):
    rewards, groups = tensors(rows)
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    order = torch.tensor(order)
    found = FUNCTIONS[name](rewards[order], groups[order])
    torch.testing.assert_close(found, FUNCTIONS[name](rewards, groups)[order], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=20, deadline=None)
@given(rows, st.floats(0.1, 10), st.floats(-10, 10))
def test_affine_rewards_give_the_same_advantages(name, rows, a, b):
    rewards, groups = tensors(rows)
    # With eps = 0 the invariance is exact; what is left is the rounding of a r + b.
    found = FUNCTIONS[name](a * rewards + b, groups, eps=0)
    torch.testing.assert_close(found, FUNCTIONS[name](rewards, groups, eps=0), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=20, deadline=None)
@given(rows)
def test_every_group_sums_to_zero(name, rows):
    rewards, groups = tensors(rows)
    found = FUNCTIONS[name](rewards, groups)
    sums = torch.zeros(8, dtype=torch.float64).index_add_(0, groups, found)
    assert sums.abs().max() < 1e-9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=6))
def test_dna_balances_every_informative_pair(correct):
    G = 8
    rewards = torch.tensor([r for pair in correct for r in binary(*pair, G=G)], dtype=torch.float64)
    ids = dict(
        pair_ids=torch.arange(len(correct)).repeat_interleave(2 * G),
        branch=torch.arange(2).repeat_interleave(G).repeat(len(correct)),
    )
    found, info = A.dna_advantages(rewards, **ids, return_info=True)
    assert torch.equal(A.dna_advantages(rewards, num_generations=G, **ids), found)
    mass = found.view(-1, 2, G).abs().mean(2)
    both = ~info.degenerate.any(1)
    assert (mass[both, 0] - mass[both, 1]).abs().sum() < 1e-12
    assert torch.allclose(mass, info.scaled_signal, atol=1e-12, rtol=0)
    scale = info.branch_scale[both]
    # 1/alpha_R + 1/alpha_CF = 2, each above one half.
    assert (1 / scale).sum(1).sub(2).abs().sum() < 1e-12 and (scale > 0.5).all()
    other = A.dna_advantages(rewards, **ids, ddof=0, eps=0, return_info=True)[1]
    sample = A.dna_advantages(rewards, **ids, ddof=1, eps=0, return_info=True)[1]
    torch.testing.assert_close(other.branch_scale, sample.branch_scale, atol=1e-12, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.integers(0, 9))
def test_dna_of_equally_hard_clips_is_grpo(right, seed):
    order = torch.randperm(8, generator=generator(seed, "order"))
    real = torch.tensor(binary(right, G=8))
    rewards = torch.cat([real, real[order]])
    found = A.dna_advantages(rewards, **EIGHT)
    torch.testing.assert_close(found, A.group_advantages(rewards, num_generations=8), atol=1e-7, rtol=0)


def test_repeated_rows_change_nothing_for_the_population():
    once, twice = (
        A.dna_advantages(r, pair_ids=[0] * len(r), branch=b, ddof=0, eps=0, return_info=True)[1]
        for r, b in ((PAIR, EIGHT["branch"]), (PAIR * 2, EIGHT["branch"] * 2))
    )
    torch.testing.assert_close(once.signal, twice.signal, atol=1e-6, rtol=0)
    torch.testing.assert_close(once.branch_scale, twice.branch_scale, atol=1e-6, rtol=0)


def test_batch_normalisation_after_dna_keeps_the_balance():
    scaled = A.batch_normalize(A.dna_advantages(torch.tensor(PAIR).double(), **EIGHT))
    assert float(scaled[:8].abs().mean()) == pytest.approx(float(scaled[8:].abs().mean()), abs=1e-12)
    assert float(scaled.square().mean()) == pytest.approx(1, abs=1e-8)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 16), st.integers(1, 12), st.integers(0, 99))
def test_batch_std_closed_form(G, groups, seed):
    rewards = torch.randint(0, 2, (groups, G), generator=generator(seed, "rewards")).double()
    _, info = A.bn_advantages(rewards.view(-1), num_generations=G, eps=0, return_info=True)
    assert float(info.std) == pytest.approx(math.sqrt(info.frac_informative * (G - 1) / G), abs=1e-6)


def test_batch_normalisation_twice_is_once():
    once = A.batch_normalize(draw(50))
    torch.testing.assert_close(A.batch_normalize(once), once, atol=1e-8, rtol=0)
    torch.testing.assert_close(A.batch_normalize(draw(50), minibatch_ids=[7] * 50), once, atol=1e-14, rtol=0)


def test_minibatches_are_separate():
    values, ids = draw(12), torch.arange(12) % 3
    found, info = A.batch_normalize(values, minibatch_ids=ids, return_info=True)
    for k in range(3):
        torch.testing.assert_close(found[ids == k], A.batch_normalize(values[ids == k]))
    assert info.count.tolist() == [4, 4, 4] and info.ids.tolist() == [0, 1, 2]
    joined = A.bn_advantages(values, num_generations=4, batch_minibatch_ids=[0] * 4 + [1] * 8)
    parts = [A.bn_advantages(values[:4], num_generations=4), A.bn_advantages(values[4:], num_generations=4)]
    torch.testing.assert_close(joined, torch.cat(parts))


def test_factor_of_the_batch_is_bounded():
    rewards = binary(1, *[0] * 127, G=8)
    _, info = A.bn_advantages(rewards, num_generations=8, eps=0, return_info=True)
    assert float(info.scale) == pytest.approx(math.sqrt(128 * 8 / 7), rel=1e-6)
    found, info = A.bn_advantages(rewards, num_generations=8, batch_max_scale=2.0, return_info=True)
    assert float(info.scale) == 2 and float(found.max()) == pytest.approx(2 * math.sqrt(7 * 7 / 8), rel=1e-5)


def test_batch_of_equal_values():
    for values in (torch.zeros(4), torch.full((4,), 3.0)):
        found, info = A.batch_normalize(values, return_info=True)
        assert found.abs().max() == 0 and info.scale == 1
    assert A.batch_normalize(torch.ones(1), ddof=1).item() == 0


def test_trajectories_count_once_in_the_batch():
    rewards, groups, rollouts = [1, 1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 1, 2]
    first = [0, 3, 4, 5, 6]
    found = A.bn_advantages(rewards, groups, trajectory_ids=rollouts)
    single = A.bn_advantages([rewards[i] for i in first], [groups[i] for i in first])
    assert torch.equal(found[first], single) and torch.equal(found[:3], found[[0, 0, 0]])
    with pytest.raises(ValueError, match="mini-batch"):
        A.bn_advantages(rewards, groups, trajectory_ids=rollouts, batch_minibatch_ids=[0, 1, 0, 0, 0, 0, 0])


# ---------------------------------------------------------------- processes


def _rank(rank, values, ids, path, answers):
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    group = dist.group.WORLD
    whole = A.batch_normalize(values[rank], process_group=group)
    parts = A.batch_normalize(values[rank], minibatch_ids=ids[rank], process_group=group)
    answers.put((rank, whole.tolist(), parts.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_with_unequal_rows(tmp_path):
    values, ids = draw(11) + 100, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 1, 1, 0])
    cut = [slice(0, 7), slice(7, 11)]
    context = multiprocessing.get_context("fork" if torch.get_num_threads() == 1 else "spawn")
    answers = context.SimpleQueue()
    arguments = ([values[c] for c in cut], [ids[c] for c in cut], tmp_path / "store", answers)
    processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(answers.get() for _ in processes)
    for process in processes:
        process.join(60)
    # The merged moments differ from those of one process by rounding only.
    assert found[0][1] + found[1][1] == pytest.approx(A.batch_normalize(values).tolist(), abs=1e-10)
    expected = A.batch_normalize(values, minibatch_ids=ids).tolist()
    assert found[0][2] + found[1][2] == pytest.approx(expected, abs=1e-10)


def test_processes_that_are_not_there():
    with pytest.raises(RuntimeError, match="process_group"):
        A.batch_normalize(draw(4), process_group=object())


# ---------------------------------------------------------------- annotations and devices


def test_shapes_in_the_annotations_are_kept():
    beartype = pytest.importorskip("beartype", reason="development extra: pip install 'papers10[dev]'").beartype
    from jaxtyping import jaxtyped

    def checked(function):
        return jaxtyped(typechecker=beartype)(function)

    rewards, ids = torch.tensor(PAIR), torch.arange(16) // 8
    for values in (rewards, rewards.tolist(), rewards.numpy()):
        found = checked(A.group_advantages)(values, ids)
        checked(A.bn_advantages)(values, ids, return_info=True)
        checked(A.dna_advantages)(values, **EIGHT, return_info=True)
        checked(A.group_stats)(values, ids)
    checked(A.batch_normalize)(found)
    checked(A.expand_to_tokens)(found, torch.ones(16, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_card_gives_the_same(name):
    rewards, groups = draw(4096), torch.randint(512, (4096,), generator=generator(0, "card"))
    found = FUNCTIONS[name](rewards.cuda(), groups.cuda())
    assert found.is_cuda
    # Sums in float64, in another order.
    torch.testing.assert_close(found.cpu(), FUNCTIONS[name](rewards, groups), atol=1e-12, rtol=1e-12)


# ---------------------------------------------------------------- tokens


def test_expand_to_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    found = A.expand_to_tokens(torch.tensor([0.5, -1.0]), mask)
    assert found.tolist() == [[0.5, 0.5, 0], [-1, 0, -1]]
    with pytest.raises(ValueError, match="advantages"):
        A.expand_to_tokens(torch.ones(3), mask)


# ---------------------------------------------------------------- wrong inputs

WRONG = {
    "reward that is NaN": (lambda: A.group_advantages([1, math.nan], [0, 0]), ValueError, "nan at index 1.*nan=.zero"),
    "reward that is infinite": (lambda: A.group_advantages([1, math.inf], [0, 0], nan="zero"), ValueError, "inf at index 1"),
    "no rows": (lambda: A.group_advantages([], []), ValueError, "at least one row"),
    "a table of rewards": (lambda: A.group_advantages(torch.ones(2, 2), [0, 0]), ValueError, "rewards"),
    "rewards that are text": (lambda: A.group_advantages(["good"], [0]), TypeError, "rewards.*'good'"),
    "one number": (lambda: A.group_advantages(1.0, [0]), TypeError, "rewards.*float"),
    "too few ids": (lambda: A.group_advantages([1, 2.0], [0]), ValueError, "group_ids: expected 2 ids.*got 1"),
    "too few ids in a tensor": (lambda: A.group_advantages([1, 2.0], torch.zeros(3).long()), ValueError, "group_ids"),
    "float ids": (lambda: A.group_advantages([1, 2.0], torch.zeros(2)), TypeError, "group_ids"),
    "ids without hash": (lambda: A.group_advantages([1, 2.0], [[0], [0]]), TypeError, "hashable ids, got list"),
    "a word as ids": (lambda: A.group_advantages([1, 2.0], "ab"), TypeError, "group_ids"),
    "no groups": (lambda: A.group_advantages([1, 2.0]), ValueError, "exactly one.*neither"),
    "groups twice": (lambda: A.group_advantages([1, 2.0], [0, 0], num_generations=2), ValueError, "exactly one.*both"),
    "rows left over": (lambda: A.group_advantages([1, 2, 3.0], num_generations=2), ValueError, "divisor of the 3 rows"),
    "ddof": (lambda: A.group_advantages([1, 2.0], [0, 0], ddof=2), ValueError, "ddof.*2"),
    "ddof that is True": (lambda: A.group_stats([1, 2.0], [0, 0], ddof=True), ValueError, "ddof"),
    "negative eps": (lambda: A.group_advantages([1, 2.0], [0, 0], eps=-1), ValueError, "eps"),
    "misspelt scale": (lambda: A.group_advantages([1, 2.0], [0, 0], scale="grup"), ValueError, "did you mean 'group'"),
    "unknown level": (lambda: A.group_advantages([1, 2.0], [0, 0], level="token"), ValueError, "level"),
    "a trajectory with two rewards": (
        lambda: A.group_advantages([1, 0, 0.0], [5, 5, 5], trajectory_ids=["a", "a", "b"]),
        ValueError,
        "index 1, trajectory 'a' of group 5",
    ),
    "scale of a batch": (lambda: A.batch_normalize(draw(4), max_scale=0), ValueError, "max_scale"),
    "advantage that is NaN": (lambda: A.batch_normalize([0, math.nan]), ValueError, "advantages.*index 1"),
    "batch_ddof": (lambda: A.bn_advantages([1, 0.0], [0, 0], batch_ddof=3), ValueError, "batch_ddof"),
    "a group of two pairs": (
        lambda: A.dna_advantages([1, 0, 1, 0], [8, 8, 9, 9], pair_ids=[0, 1, 0, 1], branch=[0, 0, 1, 1]),
        ValueError,
        "group 8 has several, at index",
    ),
    "two groups of one branch": (
        lambda: A.dna_advantages([1, 0, 1, 0], [0, 0, 1, 1], pair_ids=["p"] * 4, branch=["real"] * 4),
        ValueError,
        "pair 'p' has two groups of branch 'real'",
    ),
    "three groups in a pair": (
        lambda: A.dna_advantages([1, 0, 1, 0, 1, 0], num_generations=2, pair_ids=[4] * 6, branch=[0, 0, 1, 1, 1, 1]),
        ValueError,
        "pair 4 has two groups of branch 1",
    ),
    "a target of nothing": (lambda: A.dna_advantages(PAIR, **EIGHT, target=0.0), ValueError, "target"),
    "unknown target": (lambda: A.dna_advantages(PAIR, **EIGHT, target="median"), ValueError, "target"),
    "unknown scope": (lambda: A.dna_advantages(PAIR, **EIGHT, scope="pairs"), ValueError, "did you mean 'pair'"),
    "unknown rule": (lambda: A.dna_advantages(PAIR, **EIGHT, degenerate="drop"), ValueError, "degenerate"),
    "a cap of nothing": (lambda: A.dna_advantages(PAIR, **EIGHT, max_branch_scale=0), ValueError, "max_branch_scale"),
    "too few pair ids": (lambda: A.dna_advantages(PAIR, pair_ids=[0], branch=[0] * 16), ValueError, "pair_ids"),
    "misspelt argument": (lambda: A.group_advantages([1, 2.0], [0, 0], grup=1), TypeError, "grup"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()
