"""splat.geometry: merging by cells against a plain loop, signs of quaternions, gradients, range and refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.splat.gaussians import Gaussians
from papers10.splat.geometry import voxel_keys, voxel_merge
from papers10.splat.rotations import quat_to_matrix

FLOAT64 = torch.float64


def scene(n=30, seed=0, waves=1):
    source = generator(seed, "geometry")

    def normal(*shape):
        return torch.randn(*shape, generator=source, dtype=FLOAT64)

    return Gaussians(
        normal(n, 3),
        normal(n, 4),
        normal(n, 3).exp(),
        normal(n).sigmoid(),
        sh=normal(n, 4, 3),
        waves=normal(n, waves, 3),
        wave_weights=normal(n, waves),
        extra={"a": normal(n, 2)},
    )


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 40), seed=st.integers(0, 99), voxel=st.floats(0.05, 5))
def test_against_a_loop(n, seed, voxel):
    before = scene(n, seed)
    weights = torch.rand(n, generator=generator(seed, "weights"), dtype=FLOAT64)
    merged, index = voxel_merge(before, voxel, weights)
    cells = {}
    for i, point in enumerate(before.means.tolist()):
        cells.setdefault(tuple(math.floor(x / voxel) for x in point), []).append(i)
    assert len(merged) == len(cells) == int(index.max() + 1 if n else 0)
    for number, cell in enumerate(sorted(cells)):
        members = cells[cell]
        assert index[members].tolist() == [number] * len(members)
        share = weights[members] / weights[members].sum()
        for name, value in before.tensors().items():
            value = value[members]
            if name == "quats":
                value = value / value.norm(dim=-1, keepdim=True)
                value = value * torch.where(value @ value[weights[members].argmax()] < 0, -1.0, 1.0)[:, None]
            wanted = torch.einsum("n,n...->...", share, value)
            wanted = wanted / wanted.norm() if name == "quats" else wanted
            torch.testing.assert_close(merged.tensors()[name][number], wanted)
    merged.check()


def test_opposite_signs_do_not_cancel_and_order_does_not_matter():
    q = torch.nn.functional.normalize(scene(1).quats, dim=-1)
    many = scene(1).index([0] * 8)
    signs = torch.tensor([1.0, -1] * 4, dtype=FLOAT64)[:, None]
    merged, _ = voxel_merge(many.replace(quats=q * signs), 1.0)
    torch.testing.assert_close(quat_to_matrix(merged.quats), quat_to_matrix(q))
    before, weights = scene(40), torch.rand(40, generator=generator(0, "weights"), dtype=FLOAT64)
    shuffled = torch.randperm(40, generator=generator(0, "order"))
    a, b = voxel_merge(before, 1.0, weights)[0], voxel_merge(before.index(shuffled), 1.0, weights[shuffled])[0]
    for name, value in a.tensors().items():
        torch.testing.assert_close(b.tensors()[name], value)


def test_zero_weights_count_as_equal():
    before = scene(10)
    a, b = voxel_merge(before, 100.0, torch.zeros(10)), voxel_merge(before, 100.0)
    torch.testing.assert_close(a[0].means, b[0].means)
    assert len(a[0]) == len(set(map(tuple, (before.means > 0).tolist()))) < 10


def test_gradients():
    before = scene(6)

    def run(means, quats, weights):
        merged, _ = voxel_merge(before.replace(means=means, quats=quats), 0.9, weights)
        return merged.means, merged.quats

    weights = torch.rand(6, dtype=FLOAT64, generator=generator(1, "w")) + 0.1
    inputs = [value.clone().requires_grad_() for value in (before.means, before.quats, weights)]
    assert torch.autograd.gradcheck(run, inputs)


def test_keys_are_apart_up_to_the_border_and_refused_beyond():
    edge = float(1 << 20)
    points = torch.tensor([[-edge, -edge, -edge], [edge - 1, edge - 1, edge - 1], [0, 0, 0], [-1, 0, 0], [0, -1, 0]], dtype=FLOAT64)
    keys = voxel_keys(points, 1.0)
    assert keys.unique().numel() == 5 and int(keys.min()) >= 0
    with pytest.raises(ValueError, match=r"voxel: expected all points within 1048576 cells of the origin, got point \[1048576"):
        voxel_keys(torch.tensor([[edge, 0, 0]], dtype=FLOAT64), 1.0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"gaussians": 3}, TypeError, "gaussians: expected Gaussians"),
        ({"voxel": 0.0}, ValueError, "voxel"),
        ({"weights": torch.ones(4)}, ValueError, "weights: expected shape"),
        ({"weights": -torch.ones(30)}, ValueError, "weights: expected numbers >= 0, got -1"),
        ({"weights": torch.full((30,), math.nan)}, ValueError, "weights: expected finite"),
        ({"gaussians": scene().replace(means=scene().means * math.inf)}, ValueError, "means: expected finite"),
    ],
)
def test_refusals(change, error, words):
    with pytest.raises(error, match=words):
        voxel_merge(**{"gaussians": scene(), "voxel": 1.0, **change})
