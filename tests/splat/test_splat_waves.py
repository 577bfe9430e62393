"""Waves in projected Gaussians and the bias that balances them."""

import pytest
import torch

from papers10.splat.waves import energy_bias, project_waves

DOUBLE = {"dtype": torch.float64}


def two_step(to_pixels, wave, eps):
    """The projection in two steps: integrate along the line of sight, then filter the pixel."""
    full = torch.cat([to_pixels, torch.tensor([[0.3, -0.2, 1.1]], **DOUBLE)])
    sigma = full @ full.T
    a, b, c = sigma[:2, :2], sigma[:2, 2], sigma[2, 2]
    k3 = torch.linalg.solve(full.T, wave)
    k, kz = k3[:2], k3[2]
    flat = k + kz * torch.linalg.solve(a, b)
    along = torch.exp(-0.5 * kz**2 * (c - b @ torch.linalg.solve(a, b)))
    filtered = a + eps * torch.eye(2, **DOUBLE)
    seen = torch.linalg.solve(filtered, a @ flat)
    blurred = torch.exp(-0.5 * flat @ (a - a @ torch.linalg.solve(filtered, a)) @ flat)
    return seen, along * blurred


@pytest.mark.parametrize("eps", [0.3, 0.05])
def test_projection_is_integration_then_filter(eps):
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        to_pixels = torch.randn(2, 3, generator=generator, **DOUBLE) * 2
        wave = torch.randn(3, generator=generator, **DOUBLE) * 2
        seen, kept = project_waves(to_pixels, wave[None], eps2d=eps)
        expected, attenuation = two_step(to_pixels, wave, eps)
        torch.testing.assert_close(seen[0], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(kept[0], attenuation, rtol=1e-9, atol=1e-12)


def test_wave_along_the_view_is_averaged_away():
    seen, kept = project_waves(3 * torch.eye(3, **DOUBLE)[:2], torch.tensor([[0.0, 0.0, 2.0]], **DOUBLE))
    assert seen.abs().max() == 0
    assert kept.item() == pytest.approx(torch.exp(torch.tensor(-2.0)).item())


def test_flat_primitive_has_no_special_case():
    to_pixels = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], **DOUBLE)
    seen, kept = project_waves(to_pixels, torch.tensor([[1.0, 2.0, 0.5]], **DOUBLE))
    assert torch.isfinite(seen).all() and 0 < kept.item() < 1


def test_projection_has_gradients():
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(4, 2, 3, generator=generator, **DOUBLE).requires_grad_(), torch.randn(4, 2, 3, generator=generator, **DOUBLE).requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: project_waves(a, b), operands)


@pytest.mark.parametrize("mode", ["gamma", "integral"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_zero_weights_are_a_gaussian(mode, gamma):
    bias = energy_bias(torch.zeros(5, 2), mode=mode, gamma=gamma, waves=torch.randn(5, 2, 2), covs2d=torch.eye(2).expand(5, 2, 2))
    assert torch.equal(bias, torch.ones(5))


def test_no_waves_need_no_bias():
    assert torch.equal(energy_bias(torch.zeros(3, 0), mode="none"), torch.ones(3))


def test_slow_wave_with_integral_is_a_gaussian():
    weights = torch.tensor([0.7, 0.3], **DOUBLE)
    bias = energy_bias(weights, mode="integral", waves=torch.zeros(2, 2, **DOUBLE), covs2d=torch.eye(2, **DOUBLE))
    assert bias + weights.mean() == pytest.approx(1)


@pytest.mark.parametrize("arguments", [{"mode": "gama"}, {"gamma": 1.5}, {"mode": "integral"}])
def test_bias_refuses(arguments):
    with pytest.raises(ValueError):
        energy_bias(torch.ones(2), **arguments)


def test_projection_refuses_other_shapes():
    with pytest.raises(ValueError, match="waves"):
        project_waves(torch.eye(3)[:2], torch.ones(2, 2))
    with pytest.raises(ValueError, match="to_pixels"):
        project_waves(torch.eye(3), torch.ones(2, 3))
