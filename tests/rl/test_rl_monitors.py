"""Monitors: branch signals by hand, the factor of batch normalisation, the clip, guards and their states."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.rl.advantages import bn_advantages, dna_advantages
from papers10.rl.losses import policy_loss
from papers10.rl.monitors import (
    EntropyGuard,
    KLGuard,
    PolicyDiverged,
    batch_scale,
    branch_names,
    branch_signals,
    clip_fraction,
    frac_informative,
)


def info_of(rewards, pair_ids, branch, **options):
    return dna_advantages(rewards, pair_ids=pair_ids, branch=branch, return_info=True, **options)[1]


def known():
    rewards = torch.tensor([1.0] * 7 + [0] + [1, 0, 0, 0, 1, 0, 0, 0], dtype=torch.float64)
    return rewards, torch.zeros(16, dtype=torch.int64), ["real"] * 8 + ["cf"] * 8


def test_signals_of_the_known_pair():
    rewards, pairs, branch = known()
    told = branch_signals(info_of(rewards, pairs, branch, ddof=0, eps=0.0), rewards, branch)
    # Specification section 9: S = 0.661438 and 0.866025, target 0.763732, factors 1.154654 and 0.881881.
    assert told["dna/signal_real"] == pytest.approx(0.661438, abs=1e-6) and told["dna/signal_cf"] == pytest.approx(0.866025, abs=1e-6)
    assert told["dna/scaled_signal_real"] == pytest.approx(0.763732, abs=1e-6) == told["dna/scaled_signal_cf"]
    for quantile in ("mean", "q05", "q50", "q95"):
        assert told[f"dna/scale_real_{quantile}"] == pytest.approx(1.154654, abs=1e-6) and told[f"dna/scale_cf_{quantile}"] == pytest.approx(0.881881, abs=1e-6)
    assert (told["dna/reward_real"], told["dna/reward_cf"], told["dna/frac_degenerate"], told["dna/frac_one_sided"]) == (0.875, 0.25, 0.0, 0.0)
    assert all(isinstance(value, float) for value in told.values())


def test_degenerate_pairs_count_in_signals_but_not_in_factors():
    rewards, _, branch = known()
    rewards = torch.cat([rewards, torch.ones(16, dtype=torch.float64), torch.ones(8, dtype=torch.float64), rewards[8:]])
    info = info_of(rewards, torch.arange(3).repeat_interleave(16), branch * 3, ddof=0, eps=0.0)
    told = branch_signals(info)
    assert told["dna/signal_real"] == pytest.approx(0.661438 / 3, abs=1e-6) and told["dna/signal_cf"] == pytest.approx(2 * 0.866025 / 3, abs=1e-6)
    assert told["dna/scale_real_mean"] == pytest.approx(1.154654, abs=1e-6)
    assert told["dna/frac_degenerate"] == pytest.approx(1 / 3) and told["dna/frac_one_sided"] == pytest.approx(1 / 3)


def test_nothing_informative_gives_finite_numbers():
    told = branch_signals(info_of(torch.ones(4), [0] * 4, [0, 0, 1, 1]), torch.ones(4), [0, 0, 1, 1])
    assert all(math.isfinite(value) for value in told.values()) and told["dna/scale_real_mean"] == 1.0 and told["dna/frac_degenerate"] == 1.0


def test_names_of_branches():
    rewards = torch.rand(12, generator=generator(0, "monitors"))
    assert branch_names(info_of(rewards, [0] * 12, [0] * 4 + [1] * 4 + [2] * 4)) == ["real", "cf1", "cf2"]
    assert branch_names(info_of(rewards[:8], [0] * 8, [1] * 4 + [0] * 4)) == ["real", "cf"]
    assert "dna/signal_cf2" in branch_signals(info_of(rewards, [0] * 12, [0] * 4 + [1] * 4 + [2] * 4))


def test_unjudged_rewards_do_not_enter_the_means():
    rewards = torch.tensor([1.0, 0, math.nan, 1, 0, 1])
    branch = [0, 0, 0, 1, 1, 1]
    told = branch_signals(info_of(rewards, [0] * 6, branch, nan="zero"), rewards, branch)
    assert told["dna/reward_real"] == 0.5
    with pytest.raises(ValueError, match="branch"):
        branch_signals(info_of(rewards, [0] * 6, branch, nan="zero"), rewards)
    with pytest.raises(ValueError, match="6 labels"):
        branch_signals(info_of(rewards, [0] * 6, branch, nan="zero"), rewards, branch[:2])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(2, 9), st.integers(0, 99))
def test_batch_scale_is_what_batch_normalisation_does(informative, generations, seed):
    rewards = torch.zeros(8, generations, dtype=torch.float64)
    rewards[:informative, 0] = 1 + torch.rand(informative, generator=generator(seed, "scale"), dtype=torch.float64)
    share = frac_informative(rewards.view(-1), torch.arange(8 * generations) // generations)
    assert share == informative / 8
    _, info = bn_advantages(rewards.view(-1), num_generations=generations, eps=0.0, batch_eps=0.0, return_info=True)
    # The information is stored in float32.
    assert float(info.scale) == pytest.approx(batch_scale(share, generations), rel=1e-6)


def test_batch_scale_known_values_and_bounds():
    assert [round(batch_scale(f, 8), 3) for f in (1, 0.5, 0.25, 1 / 16)] == [1.069, 1.512, 2.138, 4.276] and batch_scale(0, 8) == 1.0
    for arguments in ((1.5, 8), (0.5, 1), (-0.1, 8)):
        with pytest.raises(ValueError):
            batch_scale(*arguments)


def test_clip_fraction_counts_only_where_the_gradient_is_cut():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]])
    advantages = torch.tensor([[1.0, -1, 1, -1, 1]])
    assert clip_fraction(ratio.log(), torch.zeros(1, 5), advantages, torch.ones(1, 5)) == (0.2, 0.2, 0.4, 0.8)
    assert clip_fraction(ratio.log(), torch.zeros(1, 5), advantages, torch.zeros(1, 5)) == (0, 0, 0, 0)
    assert clip_fraction(torch.tensor([[1e4]]), torch.tensor([[-1e4]]), torch.tensor([1.0]), torch.ones(1, 1)).high == 1.0


def test_clip_fraction_is_that_of_the_loss():
    draws = generator(3, "clip")
    logp, old = (torch.randn(6, 9, generator=draws, dtype=torch.float64) * 0.3 - 2 for _ in range(2))
    advantages, mask = torch.randn(6, generator=draws, dtype=torch.float64), (torch.rand(6, 9, generator=draws) < 0.7).double()
    _, metrics = policy_loss(logp, old, advantages, mask, ratio="token", agg="token-mean")
    found = clip_fraction(logp, old, advantages, mask)
    assert (found.low, found.high, found.total) == pytest.approx((float(metrics["clip_frac_low"]), float(metrics["clip_frac_high"]), float(metrics["clip_frac"])), abs=1e-6)


@pytest.mark.parametrize("change", [{"old_logp": torch.zeros(2, 2)}, {"mask": torch.ones(3)}, {"advantages": torch.zeros(4)}, {"clip_low": 2.0}, {"clip_high": -1.0}])
def test_clip_fraction_names_what_does_not_fit(change):
    arguments = {"logp": torch.zeros(2, 3), "old_logp": torch.zeros(2, 3), "advantages": torch.zeros(2), "mask": torch.ones(2, 3), **change}
    with pytest.raises(ValueError, match=next(iter(change))):
        clip_fraction(**arguments)


def test_one_odd_update_does_not_trip_a_guard():
    guard = EntropyGuard(warmup=3, patience=3, smoothing=0.0)
    assert [guard.update(x) for x in (1, 1, 1, 9, 1, 9, 9, 1)] == ["ok"] * 8 and not guard.tripped


@pytest.mark.parametrize("values, status", [([0.1] * 3, "collapse"), ([9.0] * 3, "explosion"), ([math.nan], "non-finite"), ([math.inf], "non-finite")])
def test_entropy_guard_trips_and_stays_tripped(values, status):
    guard = EntropyGuard(warmup=2, patience=3, smoothing=0.0)
    for value in [1.0, 1.0, *values]:
        guard.update(value)
    assert guard.status == status and guard.update(1.0) == status and guard.metrics()["guard/entropy_tripped"] == 1.0
    guard.reset()
    assert not guard.tripped and guard.update(1.0) == "ok"


def test_bounds_in_nats_need_no_warmup():
    guard = EntropyGuard(0.5, None, absolute=True, patience=1, smoothing=0.0)
    assert guard.update(0.4) == "collapse"


def test_kl_guard_looks_at_the_moving_average():
    guard = KLGuard(0.1, patience=2, smoothing=0.5)
    assert [guard.update(x) for x in (0.0, 0.3, 0.3, 0.3)] == ["ok", "ok", "drift", "drift"]


@pytest.mark.parametrize("make", [lambda: EntropyGuard(warmup=4, patience=2), lambda: KLGuard(0.2, patience=4)])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_saved_guard_goes_on_as_before(make, stop):
    values = [1.0, 1.1, 0.9, 1.0, 0.05, 0.04, 0.03, 0.02, 0.02, 0.01]
    whole, first, second = make(), make(), make()
    expected = [whole.update(value) for value in values]
    said = [first.update(value) for value in values[:stop]]
    second.load_state_dict(first.state_dict())
    assert said + [second.update(value) for value in values[stop:]] == expected
    with pytest.raises(ValueError, match="state"):
        make().load_state_dict({"average": 1.0})


def test_a_guard_that_raises():
    with pytest.raises(PolicyDiverged, match="kl: drift at update 1") as caught:
        KLGuard(0.1, patience=1, action="raise").update(1.0)
    assert caught.value.status == "drift"


@pytest.mark.parametrize("make", [
    lambda: EntropyGuard(2.0, 1.0), lambda: EntropyGuard(-1.0), lambda: EntropyGuard(patience=0), lambda: EntropyGuard(smoothing=1), lambda: KLGuard(0.0), lambda: KLGuard(action="stop"), lambda: EntropyGuard(warmup=0),
])
def test_guards_refuse_settings_that_cannot_work(make):
    with pytest.raises(ValueError):
        make()
