"""Closed forms of duality normalisation: known values, drawn rewards, bounds, wrong inputs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.rl.advantages import batch_normalize, bn_advantages, dna_advantages, group_advantages
from papers10.taming_hallucinations import duality as D


@pytest.mark.parametrize("p, signal", [(7 / 8, 0.661438), (1 / 4, 0.866025), (15 / 16, 0.484123), (0.5, 1), (0, 0), (1, 0)])
def test_signal_of_the_population(p, signal):
    assert D.binary_signal(p) == pytest.approx(signal, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 32), st.data(), st.sampled_from([0, 1]))
def test_signal_is_that_of_the_advantages(G, data, ddof):
    right = data.draw(st.integers(0, G))
    rewards = torch.tensor([1.0] * right + [0.0] * (G - right), dtype=torch.float64)
    found = group_advantages(rewards, num_generations=G, ddof=ddof, eps=0).abs().mean()
    assert float(found) == pytest.approx(D.binary_signal(right / G, G, ddof=ddof), abs=1e-12)


def test_factors_of_the_chapter():
    scales = D.branch_scales(D.binary_signal(7 / 8), D.binary_signal(1 / 4))
    assert scales == pytest.approx((1.154654, 0.881881), abs=1e-6)
    scales = D.branch_scales(D.binary_signal(15 / 16), D.binary_signal(1 / 2))
    assert scales == pytest.approx((1.532795, 0.742061), abs=1e-6)
    assert D.branch_scales(0.7, 0.7) == (1, 1)


@given(st.floats(1e-3, 1), st.floats(1e-3, 1))
def test_harmonic_identity_and_bound(real, cf):
    a, b = D.branch_scales(real, cf)
    assert 1 / a + 1 / b == pytest.approx(2, abs=1e-12) and a > 0.5 and b > 0.5
    assert a * real == pytest.approx((real + cf) / 2) and b * cf == pytest.approx((real + cf) / 2)
    assert D.branch_scales(cf, real) == (b, a)


def test_a_branch_without_signal_leaves_the_other():
    real, cf = D.branch_scales([0, 0.5, 0], [0.5, 0, 0])
    assert real.tolist() == cf.tolist() == [1, 1, 1]


@pytest.mark.parametrize("G", [2, 4, 8, 16])
def test_largest_factor_is_reached_and_not_passed(G):
    grid = D.binary_signal(np.arange(1, G) / G)
    found = D.branch_scales(np.repeat(grid[None], G - 1, 0), np.repeat(grid[:, None], G - 1, 1))[0]
    assert found.max() == pytest.approx(D.largest_branch_scale(G), abs=1e-12)
    assert D.largest_branch_scale(16) == pytest.approx(1.532796, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_closed_forms_hold_for_drawn_rewards(seed):
    P, G, draw = 200, 16, generator(seed, "duality")
    rewards = (torch.rand(P, 2, G, generator=draw) < torch.rand(P, 2, 1, generator=draw)).double()
    ids = torch.arange(2 * P).repeat_interleave(G)
    scaled, info = dna_advantages(rewards.view(-1), pair_ids=ids // 2, branch=ids % 2, return_info=True)
    expected = D.binary_signal(rewards.mean(2).numpy(), G, ddof=1)
    # eps = 1e-6 beside a deviation of at least one quarter.
    np.testing.assert_allclose(info.signal, expected, atol=5e-6)
    np.testing.assert_allclose(info.branch_scale, np.stack(D.branch_scales(*info.signal.numpy().T), 1), atol=1e-12)
    mass, both = scaled.view(P, 2, G).abs().mean(2), ~info.degenerate.any(1)
    assert float((mass[both, 0] - mass[both, 1]).abs().max()) < 1e-12
    plain = info.signal[both]
    assert float((plain[:, 0] - plain[:, 1]).abs().max()) > 0.1


def test_dna_lengthens_the_root_mean_square_by_that_of_its_factors():
    rewards = torch.tensor([1.0] * 7 + [0] + [1, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    found, info = dna_advantages(rewards, pair_ids=[0] * 16, branch=[0] * 8 + [1] * 8, eps=0, return_info=True)
    ratio = batch_normalize(found, return_info=True)[1].std / bn_advantages(rewards, num_generations=8, eps=0, return_info=True)[1].std
    assert float(ratio) == pytest.approx(float(info.branch_scale.square().mean().sqrt()), abs=1e-6)
    assert ratio > 1


@pytest.mark.parametrize("likeness", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ddof", [0, 1])
def test_gradient_norm_of_built_answers(likeness, ddof):
    G, right = 8, 6
    rewards = torch.tensor([1.0] * right + [0] * (G - right), dtype=torch.float64)
    basis = torch.eye(G + 2, dtype=torch.float64)
    gradients = math.sqrt(likeness) * basis[:2][rewards.long()] + math.sqrt(1 - likeness) * basis[2:]
    advantages = group_advantages(rewards, num_generations=G, ddof=ddof, eps=0)
    expected = (advantages[:, None] * gradients).mean(0).norm()
    signal = D.binary_signal(right / G, G, ddof=ddof)
    assert D.expected_gradient_norm(signal, G, likeness, ddof=ddof) == pytest.approx(float(expected), abs=1e-12)


def test_gradient_norm_in_the_two_limits():
    signals = np.array([0, 0.5, 1])
    assert D.expected_gradient_norm(signals, 16, 1.0).tolist() == pytest.approx((signals / math.sqrt(2)).tolist())
    assert D.expected_gradient_norm(signals, 16, 0.0).tolist() == pytest.approx([0, 0.25, 0.25])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: D.binary_signal(1.2), "p.*1.2"),
        (lambda: D.binary_signal([0.1, math.nan]), "p.*nan"),
        (lambda: D.binary_signal(0.5, ddof=1), "num_generations"),
        (lambda: D.binary_signal(0.5, ddof=2), "ddof"),
        (lambda: D.branch_scales(-0.1, 1), "signal_real.*-0.1"),
        (lambda: D.branch_scales([0.1], [0.1, 0.2]), "signal_cf.*shape"),
        (lambda: D.largest_branch_scale(1), "num_generations"),
        (lambda: D.expected_gradient_norm(0.5, 16, 1.5), "likeness"),
        (lambda: D.expected_gradient_norm(math.inf, 16, 0.5), "signal"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
