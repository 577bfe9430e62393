"""splat.geometry: merging by cells against a plain loop, Chamfer distance three ways, surfaces of grids, grids of meshes that are whole, holed, turned and doubled, and refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.data import available, locate
from papers10.core.random import generator
from papers10.splat import geometry
from papers10.splat.gaussians import Gaussians
from papers10.splat.geometry import (
    Mesh,
    chamfer_distance,
    distance_transform,
    join_meshes,
    load_mesh,
    marching_cubes,
    normalize_mesh,
    tsdf_grid,
    voxel_keys,
    voxel_merge,
    voxelize,
)
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


def points(n, name, seed=0, dtype=FLOAT64):
    return torch.randn(n, 3, generator=generator(seed, name), dtype=dtype)


def voxels(share, seed, shape=(9, 7, 8)):
    grid = torch.rand(shape, generator=generator(seed, "occupancy")) < share
    grid[seed % shape[0], 0, 0] = True
    return grid


class TestChamfer:
    def test_known_value(self):
        a, b = torch.zeros(1, 3), torch.tensor([[1.0, 0, 0], [0, 2, 0]])
        assert float(chamfer_distance(a, b)) == 3.5
        assert float(chamfer_distance(a, b, squared=False)) == 2.5
        assert float(chamfer_distance(a, b, reduction="sum")) == 6
        assert [value.tolist() for value in chamfer_distance(a, b, reduction="none")] == [[1], [1, 4]]

    @settings(max_examples=25, deadline=None)
    @given(n=st.integers(1, 60), m=st.integers(1, 60), seed=st.integers(0, 99), squared=st.booleans())
    def test_against_scipy(self, n, m, seed, squared):
        from scipy.spatial import cKDTree

        a, b = points(n, "a", seed), points(m, "b", seed)
        power = 2 if squared else 1
        wanted = (cKDTree(b).query(a)[0] ** power).mean() + (cKDTree(a).query(b)[0] ** power).mean()
        assert float(chamfer_distance(a, b, squared=squared, chunk=7)) == pytest.approx(wanted, rel=1e-12)

    def test_symmetric_zero_and_blind_to_order(self):
        a, b = points(20, "a"), points(30, "b")
        assert float(chamfer_distance(a, a.flip(0))) == 0
        torch.testing.assert_close(chamfer_distance(a, b), chamfer_distance(b.flip(0), a))

    def test_gradients(self):
        inputs = [points(6, "a").requires_grad_(), points(5, "b").requires_grad_()]
        assert torch.autograd.gradcheck(lambda a, b: chamfer_distance(a, b, squared=False), inputs)
        assert torch.autograd.gradcheck(chamfer_distance, inputs)

    def test_whole_numbers_and_half_precision(self):
        a, b = torch.tensor([[0, 0, 0], [3, 1, 2]]), torch.tensor([[1, 0, 0]])
        assert chamfer_distance(a, b).dtype == FLOAT64 and float(chamfer_distance(a, b)) == 6
        assert chamfer_distance(a.half(), b.half()).dtype == torch.float32

    @pytest.mark.parametrize(
        ("a", "options", "error", "words"),
        [
            (torch.zeros(0, 3), {}, ValueError, "a: expected at least one point"),
            (torch.zeros(4, 2), {}, ValueError, "a: expected shape"),
            (torch.full((1, 3), math.nan), {}, ValueError, "a: expected finite"),
            (torch.zeros(1, 3, dtype=torch.bool), {}, TypeError, "a: expected a tensor of numbers, got torch.bool"),
            ([[0, 0, 0]], {}, TypeError, "a: expected a tensor of numbers, got list"),
            (torch.zeros(1, 3), {"reduction": "max"}, ValueError, "reduction"),
            (torch.zeros(1, 3), {"chunk": 0}, ValueError, "chunk"),
        ],
    )
    def test_refusals(self, a, options, error, words):
        with pytest.raises(error, match=words):
            chamfer_distance(a, torch.zeros(2, 3), **options)


class TestDistanceTransform:
    @settings(max_examples=20, deadline=None)
    @given(share=st.floats(0.005, 0.6), seed=st.integers(0, 99))
    def test_nearest_voxel_of_every_voxel(self, share, seed):
        grid = voxels(share, seed)
        squared, index = distance_transform(grid)
        own = torch.ones_like(grid).nonzero()
        wanted = (own[:, None] - grid.nonzero()).square().sum(-1).amin(1).double()
        assert torch.equal(squared.flatten(), wanted)
        assert bool(grid[tuple(index.movedim(-1, 0))].all())
        assert torch.equal((index.flatten(0, 2) - own).square().sum(-1).double(), wanted)

    @settings(max_examples=20, deadline=None)
    @given(share=st.floats(0.01, 0.5), other=st.floats(0.01, 0.5), seed=st.integers(0, 50))
    def test_two_transforms_are_the_chamfer_distance(self, share, other, seed):
        a, b = voxels(share, seed), voxels(other, seed + 100)
        through = distance_transform(b)[0][a].mean() + distance_transform(a)[0][b].mean()
        # Both add whole numbers and divide once or twice: only rounding of the means differs.
        assert float(through) == pytest.approx(float(chamfer_distance(a.nonzero(), b.nonzero())), abs=1e-9)

    def test_refusals(self):
        with pytest.raises(ValueError, match="occupancy: expected at least one voxel"):
            distance_transform(torch.zeros(3, 3, 3, dtype=torch.bool))
        with pytest.raises(TypeError, match="occupancy: expected a boolean tensor, got torch.float32"):
            distance_transform(torch.ones(3, 3, 3))
        with pytest.raises(ValueError, match="occupancy: expected shape"):
            distance_transform(torch.ones(3, 3, dtype=torch.bool))


def centres(side, low=-0.5, high=0.5):
    axis = low + (torch.arange(side, dtype=FLOAT64) + 0.5) * (high - low) / side
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)


def ball(radius=0.3, middle=(0.0, 0.0, 0.0), side=24):
    pytest.importorskip("skimage", reason="needs scikit-image (extra data)")
    return marching_cubes(radius - (centres(side) - torch.tensor(middle, dtype=FLOAT64)).norm(dim=-1))


class TestMarchingCubes:
    def test_a_ball_is_closed_turned_outwards_and_of_its_size(self):
        mesh = ball(0.4, side=32)
        assert float(mesh.volume()) == pytest.approx(4 / 3 * math.pi * 0.4**3, rel=0.01)
        # The error of a linear run over a cell of 1/32 of a curve of radius 0.4: h² / (8 r) = 0.0003.
        torch.testing.assert_close(mesh.vertices.norm(dim=-1), torch.full((len(mesh.vertices),), 0.4, dtype=FLOAT64), atol=5e-4, rtol=0)
        edges = torch.stack([mesh.faces, mesh.faces.roll(-1, 1)], -1).flatten(0, 1)
        assert torch.equal(torch.unique(edges, dim=0), torch.unique(edges.flip(1), dim=0))

    def test_axes_bounds_and_level(self):
        x = centres(16, -1, 3)[..., 0] + 0 * centres(16, -1, 3)[..., 1]
        mesh = marching_cubes(-x, level=-1.3, bounds=(-1, 3), closed=False)
        torch.testing.assert_close(mesh.vertices[:, 0], torch.full((len(mesh.vertices),), 1.3, dtype=FLOAT64))
        assert bool((mesh.face_normals()[:, 0] > 0.999).all())
        inner = (-1 + 2 / 16, 3 - 2 / 16)
        assert (float(mesh.vertices[:, 1].min()), float(mesh.vertices[:, 1].max())) == pytest.approx(inner)

    def test_closed_at_the_border_of_the_box(self):
        full = marching_cubes(torch.ones(5, 5, 5))
        assert full.vertices.dtype == torch.float32 and float(full.vertices.abs().max()) == 0.5
        # Everything but the corners and edges that linear runs cut off.
        assert 0.9 < float(full.volume()) < 1

    @pytest.mark.parametrize(
        ("volume", "options", "error", "words"),
        [
            (-torch.ones(4, 4, 4), {}, ValueError, "volume: expected numbers on both sides of the level 0"),
            (torch.ones(4, 4, 4), {"closed": False}, ValueError, "volume: expected numbers on both sides"),
            (torch.ones(4, 4, 5), {}, ValueError, "volume: expected"),
            (torch.ones(1, 1, 1), {}, ValueError, "volume side"),
            (torch.ones(4, 4, 4, dtype=torch.bool), {}, TypeError, "volume: expected a floating tensor"),
            (torch.full((4, 4, 4), math.inf), {}, ValueError, "volume: expected finite"),
            (torch.ones(4, 4, 4), {"bounds": (1, 1)}, ValueError, "bounds: expected low below high"),
            (torch.ones(4, 4, 4), {"bounds": 3}, ValueError, "bounds: expected two numbers"),
        ],
    )
    def test_refusals(self, volume, options, error, words):
        pytest.importorskip("skimage", reason="needs scikit-image (extra data)")
        with pytest.raises(error, match=words):
            marching_cubes(volume, **options)

    def test_without_scikit_image_the_extra_is_named(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "skimage.measure", None)
        monkeypatch.setitem(sys.modules, "skimage", None)
        with pytest.raises(ImportError, match=r"papers10\[data\]"):
            marching_cubes(torch.ones(4, 4, 4))


QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]


def box(low, high):
    corners = torch.tensor([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=FLOAT64)
    corners = torch.tensor(low, dtype=FLOAT64) + corners * (torch.tensor(high, dtype=FLOAT64) - torch.tensor(low, dtype=FLOAT64))
    return Mesh(corners, torch.tensor([face for a, b, c, d in QUADS for face in ((a, b, c), (a, c, d))]))


def soup(n, seed):
    corners = 0.4 * torch.rand(n, 1, 3, generator=generator(seed, "soup"), dtype=FLOAT64) - 0.2
    corners = corners + 0.15 * torch.randn(n, 3, 3, generator=generator(seed, "corners"), dtype=FLOAT64)
    return Mesh(corners.reshape(-1, 3), torch.arange(3 * n).reshape(n, 3))


def distance_to_triangles(where, triangles):
    """Smallest distance to points sampled densely on the triangles: an upper bound that is close."""
    steps = torch.linspace(0, 1, 60, dtype=FLOAT64)
    u, v = torch.meshgrid(steps, steps, indexing="ij")
    weights = torch.stack([1 - u, u * (1 - v), u * v], -1).reshape(-1, 3)
    return torch.cdist(where, (weights @ triangles).flatten(0, 1)).amin(1)


class TestVoxelize:
    @pytest.mark.parametrize("half", [0.25, 0.25 + 1e-5, 0.25 - 1e-5])
    def test_a_cube_along_the_grid(self, half):
        """On the border between voxels, a little beyond it, a little before it."""
        mesh, side = box([-half] * 3, [half] * 3), 8 if half <= 0.25 else 10
        assert int(voxelize(mesh, 16).sum()) == side**3
        assert int(voxelize(mesh, 16, solid=False).sum()) == side**3 - (side - 2) ** 3

    def test_axes_and_bounds(self):
        grid = voxelize(box([0.1, 1.1, 2.1], [0.9, 1.9, 3.9]), 8, bounds=(0, 8))
        assert grid.nonzero().tolist() == [[0, 1, 2], [0, 1, 3]]

    def test_parts_outside_the_bounds_are_left_out(self):
        grid = voxelize(box([-2.0, -0.1, -0.1], [0.1, 0.1, 0.1]), 10)
        assert torch.equal(grid.nonzero().amin(0), torch.tensor([0, 4, 4])) and int(grid[0].sum()) == int(grid[3].sum()) == 4
        assert not voxelize(box([2.0] * 3, [3.0] * 3), 10).any()

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 99))
    def test_surface_against_points_on_it(self, seed):
        """Every voxel that holds a point of the surface is there; every voxel that is there has surface within half its diagonal of its centre."""
        mesh, side = soup(5, seed), 10
        grid = voxelize(mesh, side, solid=False)
        found = geometry.sample_surface(mesh, 4000, seed).points
        cells = ((found + 0.5) * side).floor().long()
        inside = ((cells >= 0) & (cells < side)).all(-1) & (((found + 0.5) * side - cells - 0.5).abs().amax(-1) < 0.49)
        assert bool(grid[tuple(cells[inside].T)].all())
        near = geometry._squared_distance(centres(side)[grid][:, None].expand(-1, 5, -1).flatten(0, 1), mesh.triangles().repeat(int(grid.sum()), 1, 1))
        assert float(near.reshape(-1, 5).amin(1).sqrt().max()) <= math.sqrt(3) / 2 / side + 1e-6

    def test_the_inside_of_a_ball(self):
        mesh, far = ball(0.37, (0.03, -0.02, 0.01)), (centres(30) - torch.tensor([0.03, -0.02, 0.01])).norm(dim=-1)
        solid = voxelize(mesh, 30)
        assert bool(solid[far < 0.36].all()) and not solid[far > 0.37 + math.sqrt(3) / 60].any()

    def test_a_cavity_is_filled_and_a_surface_alone_is_not(self):
        outer, inner = box([-0.4] * 3, [0.4] * 3), box([-0.2] * 3, [0.2] * 3)
        hollow = join_meshes([outer, inner._replace(faces=inner.faces.flip(1))])
        assert torch.equal(voxelize(hollow, 20), voxelize(outer, 20))
        assert not voxelize(outer, 20, solid=False)[10, 10, 10]

    def test_parts_that_overlap_are_united_however_they_are_turned(self):
        one, two = ball(0.2, (-0.1, 0, 0)), ball(0.2, (0.1, 0, 0))
        wanted = voxelize(one, 20) | voxelize(two, 20)
        for a in (one, one._replace(faces=one.faces.flip(1))):
            for b in (two, two._replace(faces=two.faces.flip(1))):
                assert torch.equal(voxelize(join_meshes([a, b]), 20), wanted)

    def test_sides_that_are_there_twice(self):
        mesh = ball(0.3)
        doubled = join_meshes([mesh, mesh._replace(faces=mesh.faces.flip(1))])
        assert torch.equal(voxelize(doubled, 20), voxelize(mesh, 20))

    def test_triangles_that_are_not_turned_alike(self):
        pytest.importorskip("trimesh", reason="needs trimesh (extra splat)")
        mesh = ball(0.3, side=16)
        wrong = torch.rand(len(mesh.faces), generator=generator(0, "wrong")) < 0.4
        mixed = mesh._replace(faces=torch.where(wrong[:, None], mesh.faces.flip(1), mesh.faces))
        torch.testing.assert_close(tsdf_grid(mixed, 20, 0.1), tsdf_grid(mesh, 20, 0.1), atol=1e-12, rtol=0)

    def test_an_open_side_is_filled_by_its_winding_number(self):
        """A box without its top: five of six rays leave it through a side."""
        mesh = box([-0.3] * 3, [0.3] * 3)
        top = (mesh.triangles()[..., 2] > 0.2).all(-1)
        assert int(top.sum()) == 2
        assert torch.equal(voxelize(mesh._replace(faces=mesh.faces[~top]), 20)[..., :16], voxelize(mesh, 20)[..., :16])

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"mesh": "a.ply"}, TypeError, "mesh: expected Mesh, got str; load_mesh makes one"),
            ({"mesh": Mesh(torch.zeros(3, 3), torch.zeros(0, 3, dtype=torch.int64))}, ValueError, "mesh: expected triangles, got none"),
            ({"mesh": Mesh(torch.full((3, 3), math.nan), torch.tensor([[0, 1, 2]]))}, ValueError, "vertices: expected finite"),
            ({"resolution": 0}, ValueError, "resolution"),
            ({"resolution": 2.5}, ValueError, "resolution: expected a whole number, got 2.5"),
            ({"bounds": (0.5, -0.5)}, ValueError, "bounds: expected low below high"),
        ],
    )
    def test_refusals(self, change, error, words):
        with pytest.raises(error, match=words):
            voxelize(**{"mesh": box([-0.1] * 3, [0.1] * 3), "resolution": 4, **change})


class TestTsdf:
    def test_a_box_exactly(self):
        mesh, half = box([-0.31] * 3, [0.31] * 3), 0.31
        where = centres(17)
        outside = (where.abs() - half).clamp_min(0).norm(dim=-1)
        wanted = torch.where(outside > 0, -outside, half - where.abs().amax(-1)).clamp(-0.12, 0.12)
        torch.testing.assert_close(tsdf_grid(mesh, 17, 0.12), wanted, atol=1e-12, rtol=0)

    @settings(max_examples=5, deadline=None)
    @given(seed=st.integers(0, 99))
    def test_distance_against_points_on_the_triangles(self, seed):
        mesh = soup(3, seed)
        found = tsdf_grid(mesh, 8, 0.3).abs().flatten()
        sampled = distance_to_triangles(centres(8).reshape(-1, 3), mesh.triangles()).clamp_max(0.3)
        # Points on the triangles are at most half a step of 1/59 of their longest side, about 0.5, from the nearest one.
        assert bool((found <= sampled + 1e-12).all()) and float((sampled - found).max()) < 0.006

    def test_there_and_back(self):
        mesh = ball(0.35, (0.05, 0, -0.05), side=32)
        again = marching_cubes(tsdf_grid(mesh, 32, 0.1))
        assert float(again.volume()) == pytest.approx(float(mesh.volume()), rel=0.01)
        assert float(chamfer_distance(again.vertices, mesh.vertices, squared=False)) < 0.02

    def test_thickness_keeps_a_sheet(self):
        sheet = Mesh(torch.tensor([[-0.4, -0.4, 0.01], [0.4, -0.4, 0.01], [0.4, 0.4, 0.01], [-0.4, 0.4, 0.01]], dtype=FLOAT64), torch.tensor([[0, 1, 2], [0, 2, 3]]))
        assert not (tsdf_grid(sheet, 16, 0.1) > 0).any()
        thick = tsdf_grid(sheet, 16, 0.1, thickness=0.1)
        assert float(marching_cubes(thick).volume()) == pytest.approx(0.8 * 0.8 * 0.1, rel=0.25)
        middle = centres(16)[8, 8]
        torch.testing.assert_close(thick[8, 8], (0.05 - (middle[:, 2] - 0.01).abs()).clamp(-0.1, 0.1))

    def test_dtype_and_refusals(self):
        mesh = box([-0.1] * 3, [0.1] * 3)
        assert tsdf_grid(mesh.to(torch.float32), 4, 0.1).dtype == torch.float32
        for change, words in (({"truncation": 0}, "truncation"), ({"thickness": 0.3}, "thickness"), ({"thickness": -1}, "thickness")):
            with pytest.raises(ValueError, match=words):
                tsdf_grid(**{"mesh": mesh, "resolution": 4, "truncation": 0.1, **change})


@pytest.mark.skipif(not available("mesh/airplane"), reason="NO MESHES: airplane.ply and ant.ply are NOT tested (install pyvista)")
@pytest.mark.parametrize(("name", "watertight"), [("mesh/airplane", False), ("mesh/ant", True)])
def test_meshes_from_elsewhere(name, watertight):
    """Eight open parts through each other; fifteen closed ones. Their volume, found by counting voxels inside, is near what their triangles say."""
    mesh = normalize_mesh(load_mesh(locate(name)), margin=0.05)
    assert mesh.to_trimesh().is_watertight == watertight
    signed = tsdf_grid(mesh, 48, 2 / 48)
    share = float((signed > 0).double().mean())
    # Overlaps count twice in the triangles' volume, holes and thin parts cost some: a tenth.
    assert share == pytest.approx(float(mesh.volume()), rel=0.1)
    solid = voxelize(mesh, 48)
    assert bool(solid[signed > 0].all()) and np.isfinite(signed.numpy()).all()
