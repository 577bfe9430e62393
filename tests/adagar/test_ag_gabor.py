"""The Gabor primitive and its fit to pictures."""

import math

import pytest
import torch

from papers10.adagar.gabor import initial_waves, spectral_waves, ste_clamp01
from papers10.adagar.images import ImagePrimitives, compare_images, fit_image, image_arms
from papers10.adagar.images import test_picture as picture_of


def test_straight_through():
    x = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    assert ste_clamp01(x).tolist() == [0, 0.5, 1]
    ste_clamp01(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 1]
    with pytest.raises(TypeError, match="x"):
        ste_clamp01(torch.tensor([1]))


@pytest.mark.parametrize("angle", [0.0, 0.7, 1.6, 2.9])
def test_spectrum_finds_a_plane_wave(angle):
    wave = 1.4 * torch.tensor([math.cos(angle), math.sin(angle)])
    y, x = torch.meshgrid(torch.arange(40.0) + 0.5, torch.arange(40.0) + 0.5, indexing="ij")
    found = spectral_waves(0.5 + 0.4 * torch.cos(wave[0] * x + wave[1] * y), torch.tensor([[20.0, 20.0]]), 1)[0, 0]
    # The grid of the transform has a spacing of 2 pi / 32.
    assert min((found - wave).norm(), (found + wave).norm()) < 0.2


def test_spectrum_at_borders_and_of_nothing():
    corners = torch.tensor([[0.0, 0.0], [9.9, 0.0], [0.0, 9.9]])
    assert torch.equal(spectral_waves(torch.ones(10, 10), corners, 2), torch.zeros(3, 2, 2))
    assert torch.isfinite(spectral_waves(torch.rand(10, 10, 3), corners, 3)).all()
    assert spectral_waves(torch.ones(10, 10), corners, 0).shape == (3, 0, 2)


@pytest.mark.parametrize("call, message", [
    (lambda: spectral_waves(torch.ones(8, 8), torch.ones(1, 3)), "xy"),
    (lambda: spectral_waves(torch.full((8, 8), math.nan), torch.ones(1, 2)), "image"),
    (lambda: spectral_waves(torch.ones(8, 8), torch.ones(1, 2), window=7), "window"),
    (lambda: initial_waves(2, 3, start="spectral"), "image"),
    (lambda: initial_waves(2, 3, start="none"), "start"),
    (lambda: picture_of("gras"), "name"),
    (lambda: fit_image(torch.rand(16, 16, 3), 0), "n"),
    (lambda: fit_image(torch.rand(16, 16, 3), 4, steps=0), "steps"),
    (lambda: ImagePrimitives(torch.rand(16, 16, 3), 4, 2, energy="gama"), "energy"),
    (lambda: ImagePrimitives(torch.rand(16, 16), 4), "image"),
    (lambda: compare_images("stripes", ["gabo"], steps=1), "arms"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_parameters_are_counted_as_the_page_says():
    image = picture_of("stripes", 16)
    assert ImagePrimitives(image, 10).num_parameters() == 90
    assert ImagePrimitives(image, 10, 2).num_parameters() == 150
    arms = image_arms(60)
    assert arms["gaussian_still"].n == 100 and arms["gaussian_dynamic"].n == 64 and arms["gabor_one_wave"].n == 75


def test_weights_of_zero_give_the_picture_of_gaussians():
    image = picture_of("stripes", 24)
    gabor = ImagePrimitives(image, 8, 2, seed=1).double()
    torch.nn.init.zeros_(gabor.wave_weights)
    plain = ImagePrimitives(image, 8, 0, seed=1).double()
    torch.testing.assert_close(gabor(), plain(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_fit_lowers_the_error_and_repeats(backend):
    image = picture_of("stripes", 24)
    first, second = (fit_image(image, 12, 2, steps=60, seed=3, log_every=10, backend=backend) for _ in range(2))
    assert first.psnr == second.psnr and first.history.column("psnr")[1][0] < first.psnr
    assert 0 <= first.gaussian_share <= 1
