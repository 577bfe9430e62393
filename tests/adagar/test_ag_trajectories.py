"""Paths with noise and gaps, and the methods that predict them."""

import pytest
import torch

from papers10.adagar.trajectories import METHODS, PATHS, _interpolate, observe, random_paths, trajectory_errors


@pytest.mark.parametrize("kind", PATHS)
def test_paths_repeat_and_stay_near_the_origin(kind):
    first, second = (random_paths(kind, 7, 49, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (7, 49, 2)
    assert first.abs().max() < 3


def test_observation_hides_every_second_frame_and_a_gap():
    paths = random_paths("smooth", 20, 49, torch.Generator().manual_seed(0))
    seen, visible = observe(paths, torch.Generator().manual_seed(1), noise=0.0)
    assert not visible[:, 1::2].any()
    gaps = (~visible[:, ::2]).sum(1)
    assert (gaps >= 3).all() and (gaps <= 5).all()
    torch.testing.assert_close(seen[visible], paths[visible])


def test_knots_without_a_penalty_break_in_the_gap():
    free = trajectory_errors("smooth", "Hermite, K = 17, λ = 0", 5)
    held = trajectory_errors("smooth", "Hermite, K = 17, λ = 0.0001", 5)
    assert free > 10 * held


@pytest.mark.parametrize("arguments", [("smoth", "linear interpolation", 0), ("smooth", "linear", 0)])
def test_refusals(arguments):
    with pytest.raises(ValueError):
        trajectory_errors(*arguments)


def test_tuned_rows_refuse_the_seeds_they_were_tuned_on():
    tuned = next(name for name in METHODS if "any size" in name)
    with pytest.raises(ValueError, match="seed"):
        trajectory_errors("smooth", tuned, 100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: observe(torch.ones(2, 49, 3), g), "paths: expected"),
        (lambda g: observe(torch.ones(2, 20, 2), g), "gap: expected"),
        (lambda g: random_paths("smooth", 0, 49, g), "n: expected"),
    ],
)
def test_observation_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.Generator())


def test_interpolation_is_exact_on_straight_lines():
    line = torch.linspace(0, 1, 49, dtype=torch.float64)[:, None] * torch.tensor([1.0, -2.0], dtype=torch.float64)
    seen, visible = observe(line[None], torch.Generator().manual_seed(2), noise=0.0)
    torch.testing.assert_close(_interpolate(seen[0], visible[0]), line)
