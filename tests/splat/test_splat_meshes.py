"""splat.meshes: normals, joins, sampling, and a rasterizer against rays, planes and the formula of perspective."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.splat.cameras import look_at, ortho_cameras, pinhole_cameras, rays, turntable
from papers10.splat.meshes import GREY, Mesh, join_meshes, normalize_mesh, render_mesh, sample_surface

FLOAT64 = torch.float64
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]


def box(half=0.5, dtype=FLOAT64):
    ends = (-half, half)
    corners = torch.tensor([[x, y, z] for x in ends for y in ends for z in ends], dtype=dtype)
    return Mesh(corners, torch.tensor([face for a, b, c, d in QUADS for face in ((a, b, c), (a, c, d))]))


def soup(n=12, seed=0, spread=1.0):
    source = generator(seed, "soup")
    middle = spread * torch.randn(n, 1, 3, generator=source, dtype=FLOAT64)
    corners = middle + 0.7 * torch.randn(n, 3, 3, generator=source, dtype=FLOAT64)
    colors = torch.rand(3 * n, 3, generator=source, dtype=FLOAT64)
    return Mesh(corners.reshape(-1, 3), torch.arange(3 * n).reshape(n, 3), colors)


def views(size=24, model="pinhole"):
    eyes = torch.tensor([[3.0, -2, 2], [0.3, 0.2, 0.1]], dtype=FLOAT64)
    viewmats = look_at(eyes, torch.zeros(3, dtype=FLOAT64), torch.tensor([0.0, 0, 1], dtype=FLOAT64))
    if model == "ortho":
        flat = ortho_cameras(size, size + 4, dtype=FLOAT64)
        return flat._replace(viewmats=viewmats, Ks=flat.Ks.expand(2, 3, 3) * torch.tensor([0.5, 0.5, 1])[:, None])
    return pinhole_cameras(size, size + 4, math.radians(70), viewmats=viewmats)


def cast(mesh, cameras, near):
    """The nearest triangle along every ray and its camera z, by Moeller and Trumbore, one matrix of all pairs."""
    origins, directions = rays(
        cameras.camtoworlds, cameras.Ks, cameras.width, cameras.height, model=cameras.model
    )
    forward = cameras.viewmats[:, None, None, 2, :3]
    a, b, c = mesh.triangles().unbind(1)
    p = torch.linalg.cross(directions[..., None, :], (c - a).expand(*directions.shape[:-1], -1, 3))
    determinant = (p * (b - a)).sum(-1)
    s = origins[..., None, :] - a
    u = (p * s).sum(-1) / determinant
    q = torch.linalg.cross(s, (b - a).expand_as(s))
    v = (q * directions[..., None, :]).sum(-1) / determinant
    t = (q * (c - a)).sum(-1) / determinant
    start = (s * forward[..., None, :]).sum(-1) + (
        (a - cameras.camtoworlds[:, None, None, None, :3, 3]) * forward[..., None, :]
    ).sum(-1)
    depth = start + t * (directions * forward).sum(-1)[..., None]
    hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (depth >= near)
    depth = torch.where(hit, depth, torch.inf)
    nearest, face = depth.min(-1)
    weights = torch.stack([1 - u - v, u, v], -1)
    weights = torch.take_along_dim(weights, face[..., None, None], -2).squeeze(-2)
    color = (weights[..., None] * mesh.colors[mesh.faces[face]]).sum(-2)
    return torch.where(nearest.isinf(), -1, face), torch.where(nearest.isinf(), 0.0, nearest), color


class TestMesh:
    def test_a_box(self):
        mesh = box()
        assert float(mesh.volume()) == pytest.approx(1) and float(mesh.areas().sum()) == pytest.approx(6)
        # Angles, not areas: three sides count alike at a corner, however each is cut in two.
        torch.testing.assert_close(mesh.vertex_normals(), mesh.vertices * 2 / math.sqrt(3))
        torch.testing.assert_close((mesh.face_normals() * mesh.triangles().mean(1)).sum(-1), torch.full((12,), 0.5).double())

    def test_nothing_is_a_mesh_and_draws_nothing(self):
        empty = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)).check()
        drawn = render_mesh(empty, pinhole_cameras(4, 4), backgrounds=torch.tensor([0.1, 0.2, 0.3]))
        assert not drawn.alpha.any() and not drawn.depth.any() and bool((drawn.meta["faces"] == -1).all())
        torch.testing.assert_close(drawn.color, torch.tensor([0.1, 0.2, 0.3]).expand(1, 4, 4, 3))

    def test_a_vertex_without_triangle_and_a_triangle_without_area_have_no_normal(self):
        mesh = Mesh(torch.eye(3).repeat(2, 1), torch.tensor([[0, 1, 2], [3, 3, 4]]))
        assert mesh.vertex_normals()[3:].tolist() == [[0, 0, 0]] * 3 and mesh.face_normals()[1].tolist() == [0, 0, 0]

    def test_join_shifts_faces_and_fills_colours(self):
        coloured = box()._replace(colors=torch.zeros(8, 3, dtype=FLOAT64))
        both = join_meshes([box(), coloured])
        assert both.faces[12:].tolist() == (box().faces + 8).tolist() and both.colors[:8].unique().tolist() == [GREY]
        assert join_meshes([box(), box()]).colors is None
        with pytest.raises(ValueError, match="meshes: expected at least one"):
            join_meshes([])

    @given(margin=st.floats(0, 0.49), seed=st.integers(0, 20))
    @settings(max_examples=20, deadline=None)
    def test_normalize(self, margin, seed):
        mesh = soup(5, seed)
        after = normalize_mesh(mesh, margin=margin).vertices
        low, high = after.amin(0), after.amax(0)
        assert float((high - low).max()) == pytest.approx(1 - 2 * margin) and float((low + high).abs().max()) < 1e-12
        before = mesh.vertices
        ratio = (after[1:] - after[0]).norm(dim=-1) / (before[1:] - before[0]).norm(dim=-1)
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))

    def test_to_another_dtype_and_device(self):
        moved = soup().to(torch.float32)
        assert moved.vertices.dtype == moved.colors.dtype == torch.float32 and moved.faces.dtype == torch.int64
        assert soup().to("meta").faces.device.type == "meta"

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"vertices": [[0.0, 0, 0]]}, TypeError, "vertices: expected a tensor, got list"),
            ({"vertices": torch.zeros(8, 2)}, ValueError, "vertices: expected shape"),
            ({"vertices": torch.zeros(8, 3, dtype=torch.int64)}, TypeError, "vertices: expected a floating tensor"),
            ({"vertices": torch.full((8, 3), math.nan)}, ValueError, "vertices: expected finite"),
            ({"faces": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "faces: expected shape"),
            ({"faces": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "faces: expected int64, got torch.int32"),
            ({"faces": torch.full((1, 3), 8)}, ValueError, r"faces: expected numbers in 0\.\.7, got 8\.\.8"),
            ({"faces": torch.full((1, 3), -1)}, ValueError, r"faces: expected numbers in 0\.\.7, got -1"),
            ({"colors": torch.zeros(7, 3)}, ValueError, "colors: expected shape"),
            ({"colors": torch.zeros(8, 3, dtype=torch.uint8)}, TypeError, "colors: expected a floating tensor"),
        ],
    )
    def test_refusals(self, change, error, words):
        with pytest.raises(error, match=words):
            box()._replace(**change).check()


class TestTrimesh:
    @pytest.fixture
    def trimesh(self):
        return pytest.importorskip("trimesh", reason="needs trimesh (extra splat)")

    def test_there_and_back(self, trimesh):
        mesh = soup()
        back = Mesh.from_trimesh(mesh.to_trimesh(), dtype=FLOAT64)
        assert torch.equal(back.vertices, mesh.vertices) and torch.equal(back.faces, mesh.faces)
        assert float((back.colors - mesh.colors).abs().max()) <= 0.5 / 255 + 1e-12
        assert Mesh.from_trimesh(box().to_trimesh()).colors is None

    def test_a_scene_with_a_mirror_stays_turned_outwards(self, trimesh):
        scene = trimesh.Scene()
        matrix = torch.diag(torch.tensor([1.0, 1, -2, 1])).numpy()
        matrix[0, 3] = 5
        scene.add_geometry(box().to_trimesh(), transform=matrix)
        scene.add_geometry(trimesh.PointCloud([[0, 0, 0]]))
        found = Mesh.from_trimesh(scene)
        assert float(found.volume()) == pytest.approx(2) and float(found.vertices[:, 0].mean()) == pytest.approx(5)

    def test_a_texture_becomes_colours(self, trimesh):
        import numpy as np
        from PIL import Image

        picture = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8))
        uv = np.array([[0, 0], [1, 0], [0, 1]])
        textured = trimesh.Trimesh(np.eye(3), [[0, 1, 2]], process=False)
        textured.visual = trimesh.visual.TextureVisuals(uv=uv, image=picture)
        assert Mesh.from_trimesh(textured).colors.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]

    @pytest.mark.parametrize(
        ("thing", "error", "words"),
        [("box", TypeError, "mesh: expected trimesh.Trimesh"), ("points", ValueError, "expected triangles in the scene, got PointCloud")],
    )
    def test_refusals(self, trimesh, thing, error, words):
        scene = trimesh.Scene([trimesh.PointCloud([[0, 0, 0]])])
        with pytest.raises(error, match=words):
            Mesh.from_trimesh(scene if thing == "points" else thing)


class TestSampling:
    def test_points_lie_on_their_triangles_with_their_normals_and_colours(self):
        mesh = soup(6)
        found = sample_surface(mesh, 500, seed=3)
        corners = mesh.triangles()[found.faces]
        torch.testing.assert_close(found.normals, mesh.face_normals()[found.faces])
        assert float(((found.points - corners[:, 0]) * found.normals).sum(-1).abs().max()) < 1e-12
        weights = torch.linalg.lstsq(
            torch.cat([corners.mT, torch.ones(500, 1, 3, dtype=FLOAT64)], 1),
            torch.cat([found.points, torch.ones(500, 1, dtype=FLOAT64)], 1)[..., None],
        ).solution[..., 0]
        assert float(weights.min()) > -1e-9
        torch.testing.assert_close(found.colors, (weights[..., None] * mesh.colors[mesh.faces[found.faces]]).sum(1))

    def test_share_is_area_and_seed_decides(self):
        mesh = join_meshes([box(0.5), box(1.0)])
        found = sample_surface(mesh, 20_000)
        # Standard deviation of the share: sqrt(0.2 * 0.8 / 20000) = 0.0028.
        assert float((found.faces < 12).double().mean()) == pytest.approx(0.2, abs=0.012)
        assert torch.equal(found.points, sample_surface(mesh, 20_000).points)
        assert not torch.equal(found.points, sample_surface(mesh, 20_000, seed=1).points)

    def test_uniform_on_a_triangle(self):
        mesh = Mesh(torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], dtype=FLOAT64), torch.tensor([[0, 1, 2]]))
        points = sample_surface(mesh, 40_000).points
        assert points.mean(0).tolist() == pytest.approx([1 / 3, 1 / 3, 0], abs=0.006)
        # The quarter of the triangle at the first corner: sqrt(0.25 * 0.75 / 40000) = 0.0022.
        assert float((points.sum(-1) < 0.5).double().mean()) == pytest.approx(0.25, abs=0.01)

    def test_refusals(self):
        with pytest.raises(ValueError, match="n: expected"):
            sample_surface(box(), 0)
        with pytest.raises(ValueError, match="mesh: expected triangles with an area"):
            sample_surface(Mesh(torch.zeros(3, 3), torch.tensor([[0, 1, 2]])), 5)


class TestRender:
    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 999), model=st.sampled_from(["pinhole", "ortho"]))
    def test_against_rays(self, seed, model):
        """The second camera stands amid the triangles, so that many reach behind it."""
        mesh, cameras = soup(seed=seed), views(model=model)
        drawn = render_mesh(mesh, cameras, near=0.05)
        face, depth, color = cast(mesh, cameras, 0.05)
        same = drawn.meta["faces"] == face
        # A pixel's centre on an edge, to the last digit, may fall to either side.
        assert float(same.double().mean()) > 0.999
        torch.testing.assert_close(drawn.depth[..., 0][same], depth[same], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(drawn.color[same], torch.where(face[..., None] >= 0, color, 0.0)[same], atol=1e-9, rtol=0)
        assert torch.equal(drawn.alpha[..., 0], (drawn.meta["faces"] >= 0).double())

    def test_no_gap_between_neighbours(self):
        side = 23
        row, column = torch.meshgrid(torch.arange(side + 1), torch.arange(side + 1), indexing="ij")
        shake = 0.3 * torch.rand(side + 1, side + 1, 2, generator=generator(0, "shake"), dtype=FLOAT64)
        vertices = torch.cat([torch.stack([column, row], -1) + shake - 11.5, torch.full((side + 1, side + 1, 1), 10.0)], -1)
        at = row[:-1, :-1] * (side + 1) + column[:-1, :-1]
        faces = torch.cat([torch.stack([at, at + 1, at + side + 2], -1), torch.stack([at, at + side + 2, at + side + 1], -1)])
        mesh = Mesh(vertices.reshape(-1, 3), faces.reshape(-1, 3))
        drawn = render_mesh(mesh, pinhole_cameras(96, 96, math.radians(80), dtype=FLOAT64))
        assert bool((drawn.alpha == 1).all())

    def test_the_nearer_wins_and_of_equals_the_first(self):
        flat = torch.tensor([[-1.0, -1, 2], [1, -1, 2], [0, 1, 2]], dtype=FLOAT64)
        far = flat + torch.tensor([0.0, 0, 1])
        mesh = Mesh(torch.cat([far, flat, flat]), torch.arange(9).reshape(3, 3))
        seen = render_mesh(mesh, pinhole_cameras(16, 16, dtype=FLOAT64)).meta["faces"]
        assert set(seen.unique().tolist()) <= {-1, 0, 1} and int(seen[0, 8, 8]) == 1

    def test_normals_and_light(self):
        cameras = turntable([0.3], 0.4, 3.0, width=32, height=32, up="z")
        mesh = box()._replace(colors=torch.full((8, 3), 0.8, dtype=FLOAT64))
        flat = render_mesh(mesh, cameras, shading="flat", light="camera", ambient=0.25)
        seen = flat.alpha[0, ..., 0] > 0
        normal = flat.extra["normal"][0][seen]
        torch.testing.assert_close(normal, mesh.face_normals()[flat.meta["faces"][0][seen]])
        towards = -cameras.viewmats[0, 2, :3]
        wanted = 0.8 * (0.25 + 0.75 * (normal @ towards).abs())
        torch.testing.assert_close(flat.color[0][seen], wanted[:, None].expand(-1, 3))
        smooth = render_mesh(mesh, cameras).extra["normal"][0][seen]
        torch.testing.assert_close(smooth.norm(dim=-1), torch.ones(len(smooth), dtype=FLOAT64))
        assert float((smooth - normal).abs().max()) > 0.1

    def test_supersampling_is_the_mean(self):
        cameras = views(12)
        large = render_mesh(soup(), cameras.resized(36, 48), near=0.05)
        small = render_mesh(soup(), cameras, supersample=3, backgrounds=torch.ones(3), near=0.05)
        alpha = large.alpha.unflatten(2, (12, 3)).unflatten(1, (16, 3)).mean((2, 4))
        color = large.color.unflatten(2, (12, 3)).unflatten(1, (16, 3)).mean((2, 4))
        torch.testing.assert_close(small.alpha, alpha)
        torch.testing.assert_close(small.color, color + 1 - alpha)
        depth = large.depth.unflatten(2, (12, 3)).unflatten(1, (16, 3)).sum((2, 4)) / (9 * alpha).clamp_min(1)
        torch.testing.assert_close(small.depth, depth)

    def test_only_what_is_asked_for(self):
        drawn = render_mesh(soup(), views(8), channels=("depth",))
        assert drawn.color is None and drawn.extra == {} and drawn.depth.shape == (2, 12, 8, 1) and drawn.alpha.any()

    def test_float32_stays_float32(self):
        drawn = render_mesh(soup().to(torch.float32), views(8), backgrounds=torch.ones(2, 3))
        assert {value.dtype for value in (drawn.color, drawn.depth, drawn.alpha, drawn.extra["normal"])} == {torch.float32}

    def test_gradients(self):
        mesh, cameras = soup(3), views(6).index(0)

        def run(vertices, colors):
            drawn = render_mesh(mesh._replace(vertices=vertices, colors=colors), cameras, light=(0.3, -1, 2), shading="smooth")
            return drawn.color, drawn.depth

        inputs = [value.clone().requires_grad_() for value in (mesh.vertices, mesh.colors)]
        assert torch.autograd.gradcheck(run, inputs)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"channels": ("colour",)}, ValueError, "channels: expected one of 'color', 'depth'"),
            ({"shading": "phong"}, ValueError, "shading"),
            ({"light": "sun"}, ValueError, "light"),
            ({"light": (0, 0, 0)}, ValueError, "light: expected a direction of length above 0"),
            ({"light": (0, 1)}, ValueError, "light: expected shape"),
            ({"ambient": 1.5}, ValueError, "ambient"),
            ({"supersample": 0}, ValueError, "supersample"),
            ({"near": 0.0}, ValueError, "near"),
            ({"near": 2.0, "far": 1.0}, ValueError, "far: expected a number above near"),
            ({"backgrounds": torch.ones(4)}, ValueError, r"backgrounds: expected \[3\] or \[2, 3\], got \[4\]"),
            ({"backgrounds": torch.ones(3, 3)}, ValueError, "backgrounds"),
        ],
    )
    def test_refusals(self, change, error, words):
        with pytest.raises(error, match=words):
            render_mesh(soup(), views(8), **change)
