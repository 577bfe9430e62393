"""splat.export: cameras, COLMAP, points, GLB, depth and sequences: round trips, other programs' files, refusals."""

import json
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.splat import export as ex
from papers10.splat.cameras import Cameras, make_poses
from papers10.splat.gaussians import Gaussians
from papers10.splat.rotations import quat_to_matrix

FLOAT64 = {"dtype": torch.float64}


def views(n=3, seed=0, same=True):
    source = generator(seed, "views")
    Ks = torch.tensor([[50.0, 0, 31], [0, 55, 24], [0, 0, 1]], **FLOAT64).repeat(n, 1, 1)
    if not same:
        Ks[:, 0, 0] += torch.rand(n, generator=source, **FLOAT64)
    quats = torch.randn(n, 4, generator=source, **FLOAT64)
    return Cameras(make_poses(quat_to_matrix(quats), torch.randn(n, 3, generator=source, **FLOAT64)), Ks, 64, 48)


def cloud(n=20, seed=0):
    source = generator(seed, "cloud")
    return torch.randn(n, 3, generator=source), torch.rand(n, 3, generator=source)


def close(a, b, atol=1e-14):
    torch.testing.assert_close(a.viewmats, b.viewmats, atol=atol, rtol=0)
    assert torch.equal(a.Ks, b.Ks) and a[2:] == b[2:]


class TestCameras:
    @settings(max_examples=15, deadline=None)
    @given(
        n=st.integers(0, 4),
        ending=st.sampled_from(["json", "npz"]),
        timed=st.booleans(),
        named=st.booleans(),
        model=st.sampled_from(["pinhole", "ortho"]),
    )
    def test_what_is_written_comes_back(self, tmp_path_factory, n, ending, timed, named, model):
        before = views(n, same=False)._replace(model=model)
        times = torch.arange(n, **FLOAT64) / 7 if timed else None
        names = [f"é{i}" for i in range(n)] if named else None
        path = tmp_path_factory.mktemp("cams") / "deep" / f"a.{ending}"
        back = ex.load_cameras(ex.save_cameras(path, before, times=times, names=names, metadata={"a": [1, None]}))
        close(back.cameras, before)
        assert back.metadata == {"a": [1, None]} and [item.name for item in path.parent.iterdir()] == [path.name]
        if n:
            assert back.names == names and (torch.equal(back.times, times) if timed else back.times is None)

    def test_the_text_says_what_it_means(self, tmp_path):
        content = json.loads(ex.save_cameras(tmp_path / "a.json", views(1)).read_text())
        assert "camera to world" in content["convention"] and content["width"] == 64

    def test_refusals(self, tmp_path):
        with pytest.raises(ValueError, match="path: expected one of '.json', '.npz'"):
            ex.save_cameras(tmp_path / "a.txt", views())
        with pytest.raises(TypeError, match="cameras: expected Cameras, got Tensor"):
            ex.save_cameras(tmp_path / "a.json", views().viewmats)
        with pytest.raises(ValueError, match="times: expected 3"):
            ex.save_cameras(tmp_path / "a.json", views(), times=[1.0])
        with pytest.raises(ValueError, match="names: expected 3"):
            ex.save_cameras(tmp_path / "a.json", views(), names=["a", "b", ""])
        with pytest.raises(ValueError, match="viewmats: expected a rotation"):
            ex.save_cameras(tmp_path / "a.json", views()._replace(viewmats=2 * views().viewmats))
        assert not list(tmp_path.iterdir())
        (tmp_path / "a.json").write_text("{")
        (tmp_path / "b.json").write_text('{"width": 1, "height": 1}')
        (tmp_path / "c.json").write_text('{"width": 1, "height": 1, "frames": [{"K": 1}]}')
        (tmp_path / "d.npz").write_bytes(b"PK\3\4 cut")
        np.savez(tmp_path / "e.npz", Ks=np.zeros((1, 3, 3)))
        for name, words in (("a.json", "JSON"), ("b.json", "keys frames"), ("c.json", "camtoworld 4 x 4")):
            with pytest.raises(ValueError, match=words):
                ex.load_cameras(tmp_path / name)
        for name in ("d.npz", "e.npz"):
            with pytest.raises(Exception, match="expected the arrays|zip") as caught:
                ex.load_cameras(tmp_path / name)
            assert isinstance(caught.value, ValueError)
        with pytest.raises(FileNotFoundError):
            ex.load_cameras(tmp_path / "none.json")


class TestColmap:
    @settings(max_examples=12, deadline=None)
    @given(n=st.integers(0, 4), m=st.integers(0, 5), binary=st.booleans(), same=st.booleans())
    def test_what_is_written_comes_back(self, tmp_path_factory, n, m, binary, same):
        folder, before = tmp_path_factory.mktemp("colmap"), views(n, same=same)
        points, colors = cloud(m)
        names = [f"dir/a b {i}.jpg" for i in range(n)]
        ex.save_colmap(folder, before, names=names, points=points, colors=colors, binary=not binary)
        ex.save_colmap(folder, before, names=names, points=points, colors=colors, binary=binary)
        assert {item.suffix for item in folder.iterdir()} == {".bin" if binary else ".txt"}
        after = ex.load_colmap(folder)
        assert after.names == names and torch.equal(after.points.float(), points)
        assert m == 0 or float((after.colors - colors).abs().max()) < 0.5 / 255 + 1e-6
        if n:
            close(after.cameras(), before)

    def test_a_model_with_tracks_and_shared_folder(self, tmp_path):
        folder = tmp_path / "sparse" / "0"
        folder.mkdir(parents=True)
        (folder / "cameras.bin").write_bytes(struct.pack("<Q", 1) + struct.pack("<iiQQ4d", 7, 2, 64, 48, 50, 32, 24, 0))
        image = struct.pack("<i7di", 9, 1, 0, 0, 0, 1, 2, 3, 7) + b"x.png\0" + struct.pack("<Q", 2)
        image += struct.pack("<ddqddq", 1, 2, -1, 3, 4, 5)
        second = struct.pack("<i7di", 3, 0, 1, 0, 0, 0, 0, 0, 7) + b"y.png\0" + struct.pack("<Q", 0)
        (folder / "images.bin").write_bytes(struct.pack("<Q", 2) + image + second)
        point = struct.pack("<Q3d3BdQ", 5, 1, 2, 3, 255, 0, 51, 0.1, 2) + struct.pack("<iiii", 9, 1, 3, 0)
        (folder / "points3D.bin").write_bytes(struct.pack("<Q", 1) + point)
        model = ex.load_colmap(tmp_path)
        assert model.names == ["y.png", "x.png"] and model.viewmats[1, :3, 3].tolist() == [1, 2, 3]
        assert model.Ks[0].tolist() == [[50, 0, 32], [0, 50, 24], [0, 0, 1]]
        assert model.viewmats[0].diagonal().tolist() == [1, -1, -1, 1]
        torch.testing.assert_close(model.colors, torch.tensor([[1, 0, 0.2]], **FLOAT64))

    def test_text_of_colmap(self, tmp_path):
        (tmp_path / "cameras.txt").write_text("# Camera list\n1 SIMPLE_PINHOLE 64 48 50 32 24\n2 OPENCV 32 24 1 2 3 4 0 0 0 0\n")
        images = "# Image list\n2 1 0 0 0 0 0 0 2 b.png\n10 20 -1 11 12 4\n1 1 0 0 0 1 0 0 1 a.png\n\n"
        (tmp_path / "images.txt").write_text(images)
        model = ex.load_colmap(tmp_path)
        assert model.names == ["a.png", "b.png"] and model.sizes.tolist() == [[64, 48], [32, 24]]
        assert len(model.points) == 0
        with pytest.raises(ValueError, match="sizes: expected views of one size"):
            model.cameras()

    def test_refusals(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="images.txt|cameras.txt"):
            ex.load_colmap(tmp_path)
        with pytest.raises(ValueError, match="pinhole"):
            ex.save_colmap(tmp_path, views()._replace(model="ortho"))
        with pytest.raises(ValueError, match="names: expected names without"):
            ex.save_colmap(tmp_path, views(1), names=["a\nb"])
        ex.save_colmap(tmp_path, views(2), binary=False)
        lens = tmp_path / "cameras.txt"
        lens.write_text("1 SIMPLE_RADIAL 64 48 50 32 24 0.1\n")
        with pytest.raises(ValueError, match="SIMPLE_RADIAL with .*undistort the pictures first"):
            ex.load_colmap(tmp_path)
        lens.write_text("1 FOV 64 48 50 50 32 24 0\n")
        with pytest.raises(ValueError, match="FOV"):
            ex.load_colmap(tmp_path)
        assert ex.load_colmap(tmp_path, distortion="ignore").Ks[0].diagonal().tolist() == [50, 50, 1]
        lens.write_text("5 PINHOLE 64 48 50 50 32 24\n")
        with pytest.raises(ValueError, match=r"expected the cameras \[1\]"):
            ex.load_colmap(tmp_path)
        lens.write_text("5 PINHOLE sixty\n")
        with pytest.raises(ValueError, match="COLMAP's text files"):
            ex.load_colmap(tmp_path)
        ex.save_colmap(tmp_path, views(2))
        whole = (tmp_path / "images.bin").read_bytes()
        for cut in (4, 40, len(whole) - 20, len(whole) - 3):
            (tmp_path / "images.bin").write_bytes(whole[:cut])
            with pytest.raises(ValueError, match="ends"):
                ex.load_colmap(tmp_path)


class TestPoints:
    @pytest.mark.parametrize("ending", ["ply", "obj", "glb"])
    @pytest.mark.parametrize("colored", [False, True])
    @pytest.mark.parametrize("faced", [False, True])
    def test_what_is_written_comes_back(self, tmp_path, ending, colored, faced):
        pytest.importorskip({"ply": "plyfile", "obj": "torch", "glb": "trimesh"}[ending])
        points, colors = cloud()
        faces = torch.arange(18).reshape(6, 3) if faced else None
        path = ex.save_points(tmp_path / f"a.{ending}", points, colors if colored else None, faces)
        back = ex.load_points(path)
        assert torch.equal(back.points, points)
        if colored:
            assert float((back.colors - colors).abs().max()) < 0.5 / 255 + 1e-6
        elif ending != "glb":
            assert back.colors is None
        assert torch.equal(back.faces, faces) if faced else back.faces is None

    def test_nothing_at_all(self, tmp_path):
        pytest.importorskip("trimesh")
        for ending in ("ply", "obj", "glb"):
            assert ex.load_points(ex.save_points(tmp_path / f"a.{ending}", torch.zeros(0, 3))).points.shape == (0, 3)

    def test_obj_of_other_programs(self, tmp_path):
        text = "mtllib a.mtl\nv 0 0 0\nv 1 0 0 1.0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvn 0 0 1\nf 1/1/1 2//1 3 -1 # quad\n"
        (tmp_path / "a.obj").write_text(text)
        assert ex.load_points(tmp_path / "a.obj").faces.tolist() == [[0, 1, 2], [0, 2, 3]]
        for bad in ("v 1 2\n", "v 1 2 x\n", "v 0 0 0\nf 1 2 3\n", "v 0 0 0\nv 1 1 1 1 1 1\n"):
            (tmp_path / "b.obj").write_text(bad)
            with pytest.raises(ValueError, match="path: expected"):
                ex.load_points(tmp_path / "b.obj")

    def test_refusals(self, tmp_path):
        points, colors = cloud()
        for change, error, words in (
            ({"path": "a.stl"}, ValueError, "path: expected one of"),
            ({"points": points[:, :2]}, ValueError, "points: expected shape"),
            ({"points": points * math.nan}, ValueError, "points: expected finite"),
            ({"colors": colors[:3]}, ValueError, "colors: expected shape"),
            ({"colors": (255 * colors).to(torch.uint8)}, TypeError, "colors: expected numbers in"),
            ({"faces": torch.tensor([[0, 1, 20]])}, ValueError, r"faces: expected numbers in 0..19, got 0..20"),
            ({"faces": torch.zeros(1, 3)}, TypeError, "faces: expected whole numbers"),
        ):
            options = {"path": "a.obj", "points": points, "colors": colors, **change}
            with pytest.raises(error, match=words):
                ex.save_points(tmp_path / options.pop("path"), **options)
        assert not list(tmp_path.iterdir())


class TestGlb:
    @pytest.fixture(autouse=True)
    def _needs_trimesh(self):
        self.trimesh = pytest.importorskip("trimesh", reason="needs trimesh (extra splat)")

    def test_cameras_and_points(self, tmp_path):
        points, colors = cloud()
        before = views(4, same=False)
        back = ex.load_glb(ex.save_glb(tmp_path / "a.glb", points=points, colors=colors, cameras=before))
        close(back.cameras, before)
        assert torch.equal(back.points, points)
        only = ex.load_glb(ex.save_glb(tmp_path / "b.glb", cameras=before))
        close(only.cameras, before)
        assert len(only.points) == 0 and only.colors is None

    def test_another_program_sees_the_scene_upright_and_the_cameras_look_right(self, tmp_path):
        before = views(1)
        ahead = (before.camtoworlds[0] @ torch.tensor([0.0, 0, 2, 1], **FLOAT64))[:3]
        path = ex.save_glb(tmp_path / "a.glb", points=ahead[None], cameras=before)
        scene = self.trimesh.load_scene(path)
        matrix, name = scene.graph["points"]
        seen = (matrix @ [*scene.geometry[name].vertices[0], 1])[:3]
        np.testing.assert_allclose(seen, ahead.numpy() * [1, -1, -1], rtol=1e-6)
        data = path.read_bytes()
        tree = json.loads(data[20 : 20 + struct.unpack_from("<I", data, 12)[0]])
        node = next(node for node in tree["nodes"] if "camera" in node)
        pose = np.diag([1.0, -1, -1, 1]) @ np.reshape(node["matrix"], (4, 4)).T
        # glTF cameras look along their own -z, so that the point lies there.
        np.testing.assert_allclose((np.linalg.inv(pose) @ [*seen, 1])[:3], [0, 0, -2], atol=1e-6)
        lens = tree["cameras"][0]["perspective"]
        assert lens["yfov"] == pytest.approx(2 * math.atan(24 / 55))
        assert lens["aspectRatio"] == pytest.approx((64 / 50) / (48 / 55))

    def test_frusta_end_at_the_corners(self):
        before = views(2)
        lines = ex.frustum_lines(before, 0.5)
        corners = lines[:, :4, 1]
        local = torch.einsum("vij,vkj->vki", before.viewmats[:, :3, :3], corners) + before.viewmats[:, None, :3, 3]
        pixels = local[..., :2] / 0.5 * torch.tensor([50.0, 55]) + torch.tensor([31.0, 24])
        torch.testing.assert_close(pixels[0], torch.tensor([[0.0, 0], [64, 0], [64, 48], [0, 48]], **FLOAT64))
        assert ex.frustum_lines(before._replace(model="ortho"), 0.5).shape == (2, 8, 2, 3)

    def test_a_mesh_of_trimesh(self, tmp_path):
        self.trimesh.creation.box().export(tmp_path / "a.glb")
        back = ex.load_points(tmp_path / "a.glb")
        assert back.faces.shape == (12, 3) and back.cameras is None and float(back.points.abs().max()) == 0.5

    def test_refusals(self, tmp_path):
        with pytest.raises(ValueError, match="points or cameras, got neither"):
            ex.save_glb(tmp_path / "a.glb")
        with pytest.raises(ValueError, match="pinhole"):
            ex.save_glb(tmp_path / "a.glb", cameras=views()._replace(model="ortho"))
        path = ex.save_glb(tmp_path / "a.glb", points=cloud()[0])
        whole = path.read_bytes()
        for bad in (b"", whole[:50], b"x" + whole[1:], whole[:-4]):
            path.write_bytes(bad)
            with pytest.raises(ValueError, match="path: expected a GLB file"):
                ex.load_glb(path)


class TestDepth:
    def test_png_is_within_half_a_step(self, tmp_path):
        depth = 5 * torch.rand(7, 9, generator=generator(0, "depth"))
        depth[0, :3] = torch.tensor([0.0, math.nan, math.inf])
        back = ex.load_depth(ex.save_depth(tmp_path / "a.png", depth, unit=1e-3))
        assert back.dtype == torch.float32 and back[0, :3].tolist() == [0, 0, 0]
        assert float((back - depth)[1:].abs().max()) <= 5.01e-4
        tiny = ex.load_depth(ex.save_depth(tmp_path / "b.png", torch.tensor([[1e-9, 1.0]])))
        assert float(tiny[0, 0]) > 0
        assert ex.load_depth(ex.save_depth(tmp_path / "c.png", torch.zeros(2, 2))).tolist() == [[0, 0], [0, 0]]

    def test_clips(self, tmp_path):
        depth = torch.rand(3, 4, 5, **FLOAT64)
        assert torch.equal(ex.load_depth(ex.save_depth(tmp_path / "a.npz", depth)), depth)
        folder = ex.save_depth(tmp_path / "clip", depth)
        assert sorted(item.name for item in folder.iterdir()) == ["00000.png", "00001.png", "00002.png"]
        assert float((ex.load_depth(folder) - depth).abs().max()) < 1e-5

    def test_pngs_of_other_programs(self, tmp_path):
        from PIL import Image

        Image.fromarray(np.array([[5000, 0]], np.uint16)).save(tmp_path / "tum.png")
        assert ex.load_depth(tmp_path / "tum.png", unit=1 / 5000).tolist() == [[1, 0]]
        with pytest.raises(ValueError, match="unit: expected scene units a step"):
            ex.load_depth(tmp_path / "tum.png")
        Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "rgb.png")
        with pytest.raises(ValueError, match="one channel of 16 bits"):
            ex.load_depth(tmp_path / "rgb.png", unit=1)

    def test_refusals(self, tmp_path):
        with pytest.raises(ValueError, match="unit: expected at least 0.0305"):
            ex.save_depth(tmp_path / "a.png", torch.full((2, 2), 2000.0), unit=1e-3)
        with pytest.raises(TypeError, match="depth: expected a floating tensor"):
            ex.save_depth(tmp_path / "a.png", torch.ones(2, 2, dtype=torch.int32))
        with pytest.raises(ValueError, match="depth: expected shape"):
            ex.save_depth(tmp_path / "a.png", torch.ones(2, 2, 2))
        with pytest.raises(ValueError, match="path: expected one of"):
            ex.save_depth(tmp_path / "a.exr", torch.ones(2, 2))
        path = ex.save_depth(tmp_path / "a.png", torch.ones(2, 2), unit=0.5)
        with pytest.raises(ValueError, match="unit: expected 0.5"):
            ex.load_depth(path, unit=0.25)
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError):
            ex.load_depth(tmp_path / "empty")


class TestSequence:
    def test_there_and_back(self, tmp_path):
        pytest.importorskip("plyfile")
        points, colors = cloud(5)
        one = Gaussians(points, torch.tensor([1.0, 0, 0, 0]).expand(5, 4), torch.full((5, 3), 0.1), torch.full((5,), 0.5), colors)
        for kind in ("ply", "splat"):
            ex.save_sequence(tmp_path, [one] * 4, [0, 1, 2, 3], kind=kind)
            folder = ex.save_sequence(tmp_path, [one, one.index([0])], [0.0, 2.5], kind=kind)
            assert len(list(folder.glob(f"*.{kind}"))) == 2
            sets, times = ex.load_sequence(folder)
            assert [len(own) for own in sets] == [5, 1] and times == [0.0, 2.5]
            assert torch.equal(sets[0].means, points)
        with pytest.raises(ValueError, match="times: expected increasing"):
            ex.save_sequence(tmp_path, [one, one], [1, 1])
        with pytest.raises(ValueError, match="at least one set"):
            ex.save_sequence(tmp_path, [])
