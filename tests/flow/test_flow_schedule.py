"""Noise levels, samplers, guidance: known values, round trips, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.flow.guidance import Guidance, batched, independent, joint
from papers10.flow.sampler import euler, invert_euler
from papers10.flow.schedule import (
    bell_weight,
    clean_from_velocity,
    clean_time,
    flow_loss,
    noise_from_velocity,
    noised,
    per_block,
    sample_sigma,
    shifted,
    sigma_grid,
    velocity,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_grid_of_the_paper():
    assert [round(s, 5) for s in sigma_grid(4, 5.0).tolist()] == [1.0, 0.9375, 0.83333, 0.625, 0.0]
    assert sigma_grid(50, 5.0, include_end=False).shape == (50,)
    assert sigma_grid(16, 5.0)[::4].tolist() == pytest.approx(sigma_grid(4, 5.0).tolist(), abs=1e-15)
    assert torch.equal(sigma_grid(8), torch.linspace(1, 0, 9, dtype=torch.float64))


def test_shift_multiplies_the_ratio_of_noise_to_data():
    sigma = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    bent = shifted(sigma, 3.0)
    torch.testing.assert_close(bent / (1 - bent), 3 * sigma / (1 - sigma))


@settings(max_examples=20, deadline=None)
@given(sigma=st.floats(0, 1), sigma_min=st.floats(0, 0.1))
def test_both_ends_from_state_and_velocity(sigma, sigma_min):
    clean, noise = normal(3, 4), normal(3, 4, seed=1)
    x, u = noised(clean, noise, sigma, sigma_min=sigma_min), velocity(noise, clean, sigma_min=sigma_min)
    torch.testing.assert_close(clean_from_velocity(x, u, sigma, sigma_min=sigma_min), clean)
    torch.testing.assert_close(noise_from_velocity(x, u, sigma), noise)


def test_levels_of_frames_and_blocks():
    clean, noise = normal(2, 6, 3), normal(2, 6, 3, seed=1)
    sigma = per_block(torch.tensor([[0.0, 1.0], [0.5, 0.0]], dtype=torch.float64), 3)
    x = noised(clean, noise, sigma)
    assert torch.equal(x[0, :3], clean[0, :3]) and torch.equal(x[0, 3:], noise[0, 3:])
    torch.testing.assert_close(x[1, 0], (clean[1, 0] + noise[1, 0]) / 2)
    assert clean_time(0.25) == 0.75 and torch.equal(clean_time(torch.tensor([1.0])), torch.zeros(1))


def test_bell_weight():
    grid = torch.linspace(0, 1, 1000, dtype=torch.float64)
    weight = bell_weight(grid, grid=grid)
    assert weight.max().item() == pytest.approx(1.581, abs=5e-4) and weight.mean().item() == pytest.approx(1.0)
    assert bell_weight(0.5).item() == pytest.approx(
        (1 - math.exp(-0.5)) / (math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - math.exp(-0.5))
    )


def test_draws_are_named_by_the_generator():
    draw = lambda **how: sample_sigma(2000, generator=torch.Generator().manual_seed(3), **how)
    assert torch.equal(draw(), draw()) and abs(draw().mean() - 0.5) < 0.02
    table = sigma_grid(10, 5.0, include_end=False)
    assert set(draw(kind="table", table=table, dtype=torch.float64).tolist()) == set(table.tolist())
    assert draw(kind="logit_normal", mean=1.0).median().item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)
    assert sample_sigma((3, 5)).shape == (3, 5)


def test_loss_sign_mask_and_weight():
    clean, noise = normal(2, 4, 3), normal(2, 4, 3, seed=1)
    right = velocity(noise, clean)
    assert flow_loss(right, noise, clean) == 0
    torch.testing.assert_close(flow_loss(-right, noise, clean), 4 * right.square().mean())
    broken = right.clone().requires_grad_()
    with torch.no_grad():
        broken[:, 2:] = math.inf
    loss = flow_loss(broken, noise, clean, mask=torch.tensor([1, 1, 0, 0]).expand(2, 4), norm="l1")
    loss.backward()
    assert loss == 0 and torch.isfinite(broken.grad).all()
    assert flow_loss(right + 1, noise, clean, mask=torch.zeros(2)) == 0
    torch.testing.assert_close(
        flow_loss(right + 1, noise, clean, weight=torch.tensor([3.0, 0.0])), torch.tensor(1.5, dtype=torch.float64)
    )


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_one_data_point_is_reached_by_any_grid(steps):
    point, noise = normal(2, 5), normal(2, 5, seed=1)
    out = euler(lambda x, sigma: (x - point) / sigma, noise, sigma_grid(steps, 5.0))
    torch.testing.assert_close(out, point, atol=1e-12, rtol=1e-12)


def test_inverse_and_frozen_rows():
    matrix = 0.3 * normal(5, 5) / 5**0.5
    field = lambda x, sigma: torch.tanh(x @ matrix)
    noise = normal(2, 3, 5)
    grid = sigma_grid(10, 3.0)
    torch.testing.assert_close(
        invert_euler(field, euler(field, noise, grid), grid, iterations=25), noise, atol=1e-13, rtol=0
    )
    rows = grid[:, None, None].expand(-1, 2, 3).clone()
    rows[:, :, 0] = 0.25
    out = euler(field, noise, rows)
    assert torch.equal(out[:, 0], noise[:, 0])
    torch.testing.assert_close(out[:, 1:], euler(field, noise[:, 1:], grid))
    seen = []
    stopped = euler(field, noise, grid, callback=lambda i, sigma, x, u: seen.append(i) or x * 0)
    assert seen == list(range(10)) and stopped.abs().max() == 0


def test_guidance_known_values():
    x = torch.zeros(1, 1)
    answers = {(): 0.0, ("a",): 1.0, ("u",): 2.0, ("a", "u"): 5.0, ("condition",): 3.0}
    mix = lambda rule, sigma=0.5: rule.combine(
        torch.tensor([[[answers[b]]] for b in rule.branches(sigma)]), x, sigma
    ).item()
    assert mix(independent({"a": 2, "u": 1})) == 4 and mix(joint({"a": 2, "u": 1})) == 6
    assert mix(independent({"a": 0, "u": 0})) == 0 and mix(joint({"a": 1, "u": 1})) == 5
    assert mix(Guidance(2.0)) == 6 and mix(Guidance(0.0)) == 0 and mix(Guidance(1.0)) == 3
    assert mix(Guidance(2.0, interval=(0.6, 1.0))) == 3
    assert joint({"a": 1, "u": 2}).branches(0.5) == (("a",), ("a", "u"))


@pytest.mark.parametrize("sigma", [0.6, torch.tensor([0.2, 0.8, 0.0]), torch.tensor([[0.2, 0.4], [0.5, 0.9], [1.0, 0.1]])])
def test_rescale_keeps_the_spread_at_every_level(sigma):
    x, pair = normal(3, 2, 50), normal(2, 3, 2, 50, seed=1)
    for least in (0.0, 1e-2):
        out = Guidance(7.5, rescale=1.0, sigma_min=least).combine(pair, x, sigma)
        assert bool(out.isfinite().all())
        spread, wanted = (clean_from_velocity(x, u, sigma, sigma_min=least).flatten(1).std(1) for u in (out, pair[1]))
        torch.testing.assert_close(spread, wanted)


def test_batched_network_is_called_once_a_step():
    calls = []

    def network(x, sigma, text):
        calls.append(len(x))
        return x * sigma + text

    x, text = normal(3, 4), normal(3, 4, seed=1)
    out = euler(batched(network, {"text": text}), x, sigma_grid(2), guidance=Guidance(3.0, interval=(0.6, 1.0)))
    first = x - 0.5 * (x + 3 * text)
    torch.testing.assert_close(out, first - 0.5 * (0.5 * first + text))
    assert calls == [6, 3]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: sigma_grid(0), "steps"),
        (lambda: sigma_grid(4, 0.0), "shift"),
        (lambda: noised(normal(2), normal(3), 0.5), "noise"),
        (lambda: noised(normal(2), normal(2), 1.5), "sigma"),
        (lambda: noised(normal(2, 3), normal(2, 3), torch.rand(3)), "sigma"),
        (lambda: sample_sigma(3, "table"), "table"),
        (lambda: sample_sigma(3, "normal"), "kind"),
        (lambda: flow_loss(normal(2), normal(2), normal(2), norm="l3"), "norm"),
        (lambda: flow_loss(normal(3), normal(2), normal(2)), "pred"),
        (lambda: euler(lambda x, s: x, normal(2), [0.0, 1.0]), "sigmas"),
        (lambda: euler(lambda x, s: x, normal(2), [1.0]), "sigmas"),
        (lambda: euler(lambda x, s: x[:1], normal(2), [1.0, 0.0]), "velocity_fn"),
        (lambda: invert_euler(lambda x, s: x, normal(2), [1.0, 0.0], iterations=0), "iterations"),
        (lambda: Guidance(2.0, interval=(0.8, 0.2)), "interval"),
        (lambda: Guidance(math.nan), "scale"),
        (lambda: independent({}), "weights"),
        (lambda: Guidance(2.0).combine(normal(1, 2), normal(2), 0.5), "velocities"),
        (lambda: batched(lambda x, s: x, {"a": normal(2)}, nulls={"b": normal(2)}), "nulls"),
    ],
)
def test_refusals_name_the_argument(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_integer_states_are_refused():
    with pytest.raises(TypeError, match="x"):
        euler(lambda x, s: x, torch.ones(2, dtype=torch.int64), [1.0, 0.0])
