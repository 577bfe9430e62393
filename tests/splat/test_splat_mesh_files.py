"""splat.export, meshes: there and back through every kind of file, which axis is up, Gaussians that are turned, and one GLB of many meshes read by the letter of glTF 2.0."""

import json
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.splat.export import (
    load_animated_glb,
    load_mesh,
    load_ply,
    load_points,
    save_animated_glb,
    save_mesh,
    save_ply,
    save_points,
    turn_up,
    up_rotation,
)
from papers10.splat.gaussians import Gaussians
from papers10.splat.meshes import Mesh
from papers10.splat.render import sh_basis
from papers10.splat.rotations import quat_to_matrix

trimesh = pytest.importorskip("trimesh", reason="needs trimesh (extra splat)")
pytest.importorskip("plyfile", reason="needs plyfile (extra splat)")


def soup(n=7, seed=0, colors=True):
    """Loose triangles; the last vertex is used by none."""
    source = generator(seed, "mesh files", n)
    vertices = torch.randn(3 * n + 1, 3, generator=source)
    shades = torch.rand(3 * n + 1, 3, generator=source) if colors else None
    return Mesh(vertices, torch.arange(3 * n).reshape(n, 3), shades)


def parts(path):
    """The JSON and the binary chunk, read as the specification says."""
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    size, kind = struct.unpack_from("<I4s", data, 12)
    blob, end = struct.unpack_from("<I4s", data, 20 + size)
    assert (magic, version, length, kind, end) == (b"glTF", 2, len(data), b"JSON", b"BIN\0")
    assert size % 4 == 0 and blob % 4 == 0 and len(data) == 28 + size + blob
    tree = json.loads(data[20 : 20 + size])
    assert 0 <= blob - tree["buffers"][0]["byteLength"] <= 3
    return tree, data[28 + size :]


def numbers(tree, blob, place):
    accessor = tree["accessors"][place]
    view = tree["bufferViews"][accessor["bufferView"]]
    dtype, size = {5126: ("<f4", 4), 5125: ("<u4", 4), 5121: ("u1", 1)}[accessor["componentType"]]
    width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
    start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    assert start % size == 0 and accessor["count"] * width * size <= view["byteLength"]
    assert view.get("byteOffset", 0) + view["byteLength"] <= tree["buffers"][0]["byteLength"]
    return np.frombuffer(blob, dtype, accessor["count"] * width, start).reshape(-1, width)


class TestMeshFiles:
    @settings(max_examples=25, deadline=None)
    @given(
        ending=st.sampled_from(["ply", "obj", "glb"]),
        up=st.sampled_from(["z", "y", "-y"]),
        colors=st.booleans(),
        n=st.integers(1, 9),
    )
    def test_there_and_back(self, tmp_path_factory, ending, up, colors, n):
        mesh = soup(n, colors=colors)
        path = save_mesh(tmp_path_factory.mktemp("mesh") / "deep" / f"a.{ending}", mesh, up=up)
        back = load_mesh(path, up=up)
        assert torch.equal(back.vertices, mesh.vertices) and torch.equal(back.faces, mesh.faces)
        if colors:
            assert float((back.colors - mesh.colors).abs().max()) <= 0.5 / 255 + 1e-6
        else:
            assert back.colors is None
        assert [item.name for item in path.parent.iterdir()] == [f"a.{ending}"]

    @pytest.mark.parametrize("ending", ["ply", "obj", "glb"])
    def test_every_file_says_what_is_up(self, tmp_path, ending):
        mesh = soup()
        path = save_mesh(tmp_path / f"a.{ending}", mesh, up="-y")
        assert torch.equal(load_mesh(path, up="z").vertices, turn_up(mesh, "-y", "z").vertices)
        assert torch.equal(load_mesh(path, up="z", file_up="z").vertices, (turn_up(mesh, "-y", "y") if ending == "glb" else mesh).vertices)

    def test_glb_has_y_up_and_normals_of_length_one(self, tmp_path):
        mesh = Mesh(torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 6, 7]]), torch.tensor([[0, 1, 2]]))
        tree, blob = parts(save_mesh(tmp_path / "a.glb", mesh, up="z"))
        (primitive,) = tree["meshes"][0]["primitives"]
        where = numbers(tree, blob, primitive["attributes"]["POSITION"])
        assert where.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, -1], [5, 7, -6]]
        normals = numbers(tree, blob, primitive["attributes"]["NORMAL"])
        assert normals[:3].tolist() == [[0, 1, 0]] * 3 and np.linalg.norm(normals, axis=1) == pytest.approx(1)
        material = tree["materials"][primitive["material"]]
        assert material["doubleSided"] and material["pbrMetallicRoughness"]["metallicFactor"] == 0

    def test_other_programs_read_it(self, tmp_path):
        mesh = soup()
        for ending in ("ply", "obj"):
            found = trimesh.load_mesh(save_mesh(tmp_path / f"a.{ending}", mesh), process=False)
            corners = torch.tensor(np.array(found.vertices))[torch.tensor(np.array(found.faces))]
            torch.testing.assert_close(corners.float(), mesh.triangles(), atol=1e-6, rtol=0)
            given = torch.tensor(np.array(found.vertex_normals))[torch.tensor(np.array(found.faces))[:, 0]]
            torch.testing.assert_close(given.float(), mesh.face_normals(), atol=1e-5, rtol=0)
        assert torch.equal(load_points(tmp_path / "a.ply").points, mesh.vertices)

    def test_files_of_other_programs(self, tmp_path):
        box = trimesh.creation.box()
        for ending in ("stl", "off", "gltf", "ply", "obj", "glb"):
            box.export(tmp_path / f"box.{ending}")
            found = load_mesh(tmp_path / f"box.{ending}")
            assert float(found.volume()) == pytest.approx(1) and len(found.vertices) == 8
        assert float(load_mesh(box).volume()) == pytest.approx(1) == float(load_mesh(load_mesh(box)).volume())

    def test_points_of_ours_know_what_is_up(self, tmp_path):
        mesh = soup()
        for ending in ("obj", "glb"):
            path = save_points(tmp_path / f"a.{ending}", mesh.vertices, mesh.colors, mesh.faces)
            torch.testing.assert_close(load_mesh(path, up="z").vertices, turn_up(mesh, "-y", "z").vertices, atol=1e-6, rtol=0)

    def test_colours_of_a_textured_obj(self, tmp_path):
        from PIL import Image

        Image.fromarray(np.array([[[0, 0, 255], [255, 0, 0]]], np.uint8)).save(tmp_path / "t.png")
        (tmp_path / "t.mtl").write_text("newmtl one\nmap_Kd t.png\n")
        text = "mtllib t.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nusemtl one\nf 1/1 2/2 3/1\n"
        (tmp_path / "t.obj").write_text(text)
        assert load_mesh(tmp_path / "t.obj").colors.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]

    @pytest.mark.parametrize(
        ("action", "error", "words"),
        [
            (lambda root: save_mesh(root / "a.stl", soup()), ValueError, "path"),
            (lambda root: save_mesh(root / "a.ply", soup(), up="x"), ValueError, "up"),
            (lambda root: save_mesh(root / "a.ply", 3), TypeError, "mesh: expected Mesh, got int"),
            (lambda root: save_mesh(root / "a.glb", soup()._replace(faces=torch.zeros(0, 3).long())), ValueError, "mesh: expected triangles"),
            (lambda root: save_mesh(root / "a.ply", soup()._replace(vertices=torch.full((22, 3), math.inf))), ValueError, "vertices: expected finite"),
            (lambda root: load_mesh(root / "no.stl"), FileNotFoundError, "no.stl"),
            (lambda root: load_mesh(root / "no.ply"), FileNotFoundError, "no.ply"),
            (lambda root: load_mesh(root / "bad.glb"), ValueError, "expected a GLB file"),
            (lambda root: load_mesh(root / "bad.xyz9"), ValueError, "source: expected a file of triangles"),
            (lambda root: load_mesh(save_points(root / "p.ply", torch.zeros(2, 3))), ValueError, "source: expected triangles in .*, got 2 points"),
            (lambda root: load_mesh(soup(), file_up="down"), ValueError, "file_up"),
            (lambda root: load_mesh(3), TypeError, "mesh: expected trimesh.Trimesh"),
        ],
    )
    def test_refusals(self, tmp_path, action, error, words):
        for name in ("bad.glb", "bad.xyz9"):
            (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(error, match=words):
            action(tmp_path)


class TestTurning:
    def test_rotations(self):
        axes = torch.eye(3, dtype=torch.float64)
        # (x, y, z) -> (x, z, -y)
        assert (up_rotation("z", "y") @ torch.tensor([1.0, 2, 3], dtype=torch.float64)).tolist() == [1, 3, -2]
        for src in ("z", "y", "-y"):
            for dst in ("z", "y", "-y"):
                turned = up_rotation(src, dst)
                assert torch.equal(turned @ turned.T, axes) and float(torch.linalg.det(turned)) == 1
                up = {"z": axes[2], "y": axes[1], "-y": -axes[1]}
                assert torch.equal(turned @ up[src], up[dst])

    @settings(max_examples=15, deadline=None)
    @given(pair=st.sampled_from([("z", "y"), ("-y", "z"), ("y", "-y")]), count=st.sampled_from([0, 1, 4, 9, 16]), seed=st.integers(0, 50))
    def test_gaussians_with_covariances_and_harmonics(self, pair, count, seed):
        source = generator(seed, "turn", count)

        def normal(*shape):
            return torch.randn(*shape, generator=source, dtype=torch.float64)

        color = {"sh": normal(5, count, 3)} if count else {"colors": normal(5, 3).sigmoid()}
        before = Gaussians(normal(5, 3), normal(5, 4), normal(5, 3).exp(), normal(5).sigmoid(), **color, waves=normal(5, 2, 3), wave_weights=normal(5, 2))
        after, rotation = turn_up(before, *pair).check(), up_rotation(*pair)
        torch.testing.assert_close(after.means, before.means @ rotation.T)
        axes = quat_to_matrix(before.quats) * before.scales[:, None]
        torch.testing.assert_close(quat_to_matrix(after.quats) * after.scales[:, None], rotation @ axes)
        assert torch.equal(after.waves, before.waves)
        if count:
            directions = torch.nn.functional.normalize(normal(40, 3), dim=-1)
            seen = torch.einsum("dk,nkc->dnc", sh_basis(directions @ rotation.T, count), after.sh)
            torch.testing.assert_close(seen, torch.einsum("dk,nkc->dnc", sh_basis(directions, count), before.sh))
        back = turn_up(after, *pair[::-1])
        for name in ("means", "scales", "opacities", *color):
            torch.testing.assert_close(getattr(back, name), getattr(before, name))
        torch.testing.assert_close(quat_to_matrix(back.quats), quat_to_matrix(before.quats))

    def test_gaussians_through_a_file_and_back(self, tmp_path):
        source = generator(0, "ply")
        quats = torch.nn.functional.normalize(torch.randn(6, 4, generator=source), dim=-1)
        before = Gaussians(torch.randn(6, 3, generator=source), quats, torch.rand(6, 3, generator=source) + 0.1, torch.rand(6, generator=source), torch.rand(6, 3, generator=source))
        written, _ = load_ply(save_ply(tmp_path / "a.ply", turn_up(before, "z", "y")))
        back = turn_up(written, "y", "z")
        torch.testing.assert_close(back.means, before.means, atol=1e-6, rtol=0)
        # A quaternion and its negative are one rotation.
        torch.testing.assert_close((back.quats * before.quats).sum(-1).abs(), torch.ones(6), atol=1e-6, rtol=0)

    def test_the_same_axis_changes_nothing_and_other_things_are_refused(self):
        mesh = soup()
        assert turn_up(mesh, "z", "z") is mesh and turn_up(torch.tensor([[0, 0, 1.0]]), "z", "y").tolist() == [[0, 1, 0]]
        with pytest.raises(TypeError, match="thing: expected Mesh, Gaussians or a tensor of points, got str"):
            turn_up("mesh", "z", "y")
        with pytest.raises(ValueError, match="thing: expected shape"):
            turn_up(torch.zeros(3, 2), "z", "y")
        with pytest.raises(ValueError, match="dst"):
            turn_up(mesh, "z", "x")


class TestAnimation:
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_there_and_back(self, tmp_path, count):
        meshes = [soup(3 + number, number, colors=number != 1) for number in range(count)]
        found = load_animated_glb(save_animated_glb(tmp_path / "a.glb", meshes, fps=12.5))
        assert found.fps == 12.5 and found.times == pytest.approx([number / 12.5 for number in range(count)], abs=1e-7)
        for before, after in zip(meshes, found.meshes, strict=True):
            assert torch.equal(after.vertices, before.vertices) and torch.equal(after.faces, before.faces)
            assert (after.colors is None) == (before.colors is None)
        other = load_animated_glb(tmp_path / "a.glb", up="-y").meshes[0]
        assert torch.equal(other.vertices, turn_up(meshes[0], "z", "-y").vertices)

    def test_equal_frames_stay_apart(self, tmp_path):
        mesh = soup()
        found = load_animated_glb(save_animated_glb(tmp_path / "a.glb", [mesh, mesh, mesh], fps=1))
        assert len(found.meshes) == 3 and found.times == [0, 1, 2]

    def test_one_node_is_seen_at_every_moment(self, tmp_path):
        count, fps = 5, 8.0
        tree, blob = parts(save_animated_glb(tmp_path / "a.glb", [soup(seed=number) for number in range(count)], fps=fps))
        (animation,) = tree["animations"]
        assert len(animation["channels"]) == len(animation["samplers"]) == count
        tracks = {}
        for channel in animation["channels"]:
            sampler = animation["samplers"][channel["sampler"]]
            assert channel["target"]["path"] == "scale" and sampler["interpolation"] == "STEP"
            accessor = tree["accessors"][sampler["input"]]
            times, scales = numbers(tree, blob, sampler["input"])[:, 0], numbers(tree, blob, sampler["output"])
            # The specification wants strictly increasing times from 0 up, and their ends in the accessor.
            assert times[0] == 0 and bool((np.diff(times) > 0).all()) and len(times) == len(scales)
            assert accessor["min"] == [times.min()] and accessor["max"] == [times.max()] and accessor["type"] == "SCALAR"
            assert tree["accessors"][sampler["output"]]["type"] == "VEC3"
            assert bool((scales == scales[:, :1]).all()) and set(scales.ravel()) <= {0.0, 1.0}
            tracks[channel["target"]["node"]] = (times, scales[:, 0])
        assert len(tracks) == count and max(times[-1] for times, _ in tracks.values()) == count / fps
        for moment in np.linspace(0, count / fps + 0.5, 200):
            seen = [tree["nodes"][node]["name"] for node, (times, scales) in tracks.items() if scales[np.searchsorted(times, np.float32(moment), side="right") - 1]]
            assert seen == [f"frame_{min(int(moment * fps), count - 1):05d}"]
        # Without an animation: the first only. A node whose scale is animated may have no matrix.
        for node in tracks:
            own = tree["nodes"][node]
            assert "matrix" not in own and own["scale"] == [float(own["name"] == "frame_00000")] * 3

    def test_trimesh_reads_all_frames(self, tmp_path):
        meshes = [soup(seed=number) for number in range(3)]
        scene = trimesh.load_scene(save_animated_glb(tmp_path / "a.glb", meshes, fps=24), process=False)
        assert sorted(scene.geometry) == ["frame_00000", "frame_00001", "frame_00002"]
        for number, mesh in enumerate(meshes):
            found = torch.tensor(np.array(scene.geometry[f"frame_{number:05d}"].vertices)).float()
            assert torch.equal(found, turn_up(mesh, "z", "y").vertices)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"meshes": []}, ValueError, "meshes: expected at least one mesh"),
            ({"meshes": [soup(), 3]}, TypeError, r"meshes\[1\]: mesh: expected Mesh, got int"),
            ({"meshes": [soup(), soup()._replace(faces=torch.zeros(0, 3).long())]}, ValueError, r"meshes\[1\]: mesh: expected triangles"),
            ({"fps": 0}, ValueError, "fps"),
            ({"fps": math.nan}, ValueError, "fps"),
            ({"up": "x"}, ValueError, "up"),
            ({"path": "a.gltf"}, ValueError, "path"),
        ],
    )
    def test_refusals(self, tmp_path, change, error, words):
        options = {"path": "a.glb", "meshes": [soup()], "fps": 10, **change}
        with pytest.raises(error, match=words):
            save_animated_glb(tmp_path / options.pop("path"), **options)
        assert not list(tmp_path.iterdir())

    def test_other_files_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="expected a GLB file of save_animated_glb"):
            load_animated_glb(save_mesh(tmp_path / "a.glb", soup()))
        (tmp_path / "b.glb").write_bytes(b"glTF")
        with pytest.raises(ValueError, match="expected a GLB file"):
            load_animated_glb(tmp_path / "b.glb")
