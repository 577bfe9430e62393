"""Pictures, films, files and the state of a morph: what is shown, what comes back, which way is up, what is refused."""

import itertools
import json
import math

import pytest
import torch

from papers10.core.media import read_image, read_video
from papers10.morphany3d import latents, sequence
from papers10.morphany3d.pipeline import MorphFrame
from papers10.morphany3d.shapes import Shape
from papers10.splat.cameras import project_points
from papers10.splat.export import load_animated_glb, load_ply, up_rotation
from papers10.splat.gaussians import Gaussians
from papers10.splat.rotations import quat_to_matrix


class Decoder:
    """Decoders of the small model, without its networks."""

    name = "tiny"

    def decode(self, logits, coords, features, formats):
        one = latents.SparseLatent(coords, features["slat"])
        makers = {"mesh": lambda: latents.decode_mesh(logits, one), "gaussian": lambda: latents.decode_gaussians(one, len(logits)), "radiance": lambda: latents.decode_radiance(logits, one)}
        return {name: makers[name]() for name in formats}


def morph(*shapes):
    frames = []
    for index, (category, seed) in enumerate(shapes or (("chair", 1), ("car", 2), ("mug", 3))):
        volume = Shape.random(category, seed, p_rotated=0.0).volume(16)
        coords = latents.active_voxels(volume.tsdf)
        feats = latents.encode_slat(volume.tsdf[None], volume.color[None], coords)
        costs = None if index == 0 else torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
        frames.append(MorphFrame(index, index / 2, index / 2, volume.tsdf, coords, {"slat": feats}, index % 4, costs, {"ss": 0.25, "slat": 0.5}, backbone=Decoder()))
    return frames


FRAMES = morph()


def test_named_views_stand_where_they_should():
    origin = torch.zeros(3)
    front, side = sequence.frame_cameras("front", 64), sequence.frame_cameras("side", 64)
    assert torch.allclose(front.camtoworlds[0, :3, 3] / 2, torch.tensor([math.cos(0.1736), 0, math.sin(0.1736)]), atol=1e-6), "before the face, +x"
    assert torch.allclose(side.camtoworlds[0, :3, 3] / 2, torch.tensor([0, -math.cos(0.1736), math.sin(0.1736)]), atol=1e-6), "the side of the condition picture"
    pixels, depth = project_points(torch.stack([origin, torch.tensor([0.3, 0, 0]), torch.tensor([0, 0, 0.3])]), side)
    assert torch.allclose(depth[0, 0], torch.tensor(2.0), atol=1e-6) and pixels[0, 1, 0] > pixels[0, 0, 0] and pixels[0, 2, 1] < pixels[0, 0, 1], "+x to the right, z up"
    assert sequence.frame_cameras("official6", 32).count == 6 and sequence.frame_cameras(5, 32).count == 5 and sequence.frame_cameras([0.0, 90.0], 32).count == 2
    assert sequence.frame_cameras(front, 32).width == 32
    # A number of views starts from the side; degrees are yaw.
    assert torch.allclose(sequence.frame_cameras(3, 64).viewmats[0], side.viewmats[0], atol=1e-6) and torch.allclose(sequence.frame_cameras([90.0], 64).viewmats, front.viewmats, atol=1e-6)


@pytest.mark.parametrize("what", ["gaussian", "mesh", "normal", "radiance"])
def test_every_kind_shows_the_object_on_the_background(what):
    pictures = sequence.render_sequence(FRAMES[:2], views="side", size=24, what=what, background=(1.0, 0.0, 1.0))
    assert pictures.shape == (2, 1, 24, 24, 3) and pictures.dtype == torch.float32 and 0 <= float(pictures.min()) and float(pictures.max()) <= 1
    corner = torch.tensor([1.0, 0.0, 1.0])
    assert torch.allclose(pictures[:, 0, 0, 0], corner.expand(2, 3), atol=1e-5)
    assert float((pictures - corner).abs().amax(-1).gt(0.1).float().mean()) > 0.05 and not torch.equal(pictures[0], pictures[1])


def test_kinds_agree_about_where_the_object_is():
    shown = {what: (1 - sequence.render_frame(FRAMES[1], sequence.frame_cameras("side", 32), what=what)[0]).amax(-1) > 0.3 for what in ("gaussian", "mesh", "radiance")}
    for first, second in itertools.combinations(shown, 2):
        one, other = shown[first], shown[second]
        # A voxel is a pixel and a half here, and Gaussians are soft.
        assert float((one & other).sum() / (one | other).sum()) > 0.6, (first, second)


def test_normals_have_world_axes():
    picture = sequence.render_frame(FRAMES[0], sequence.frame_cameras([90.0], 48, pitch=1.2), what="normal")[0]
    seen = (picture - 1).abs().amax(-1) > 1e-3
    assert float(picture[seen].mean(0)[2]) > 0.75, "from above most normals point up"


def test_tiles():
    pictures = torch.rand(5, 3, 4, 3)
    sheet = sequence.tile(pictures, 2, gap=1)
    assert sheet.shape == (11, 9, 3) and torch.equal(sheet[4:7, 5:9], pictures[3]) and torch.equal(sheet[8:11, 5:9], torch.ones(3, 4, 3))
    assert sequence.tile(pictures).shape == (3, 20, 3)


def test_films():
    film = sequence.morph_film(FRAMES, size=16, what="mesh", views="official6", bounce=True)
    assert film.shape == (4, 32, 48, 3) and torch.equal(film[1], film[3])
    turn = sequence.turntable_film(FRAMES[0], count=3, size=16, what="mesh")
    assert turn.shape == (3, 16, 16, 3) and torch.allclose(turn[0], turn[2], atol=1e-5), "both ends of a full turn"
    assert sequence.strip(FRAMES, views=2, size=16, what="mesh", gap=0).shape == (32, 48, 3)


def value(thing, name):
    if name == "quats":
        return torch.nn.functional.normalize(thing.quats, dim=-1)
    return thing.base_colors().clamp(0, 1) if name == "colors" and isinstance(thing, Gaussians) else getattr(thing, name)


@pytest.mark.parametrize(("kind", "up", "tolerances"), [
    # float32 in GLB and PLY, nine digits in OBJ; colours of 8 bits, and quaternions of 8 bits in .splat.
    ("glb", None, {"vertices": 1e-7, "colors": 0.5 / 255 + 1e-6}),
    ("ply", None, {"vertices": 0, "colors": 0.5 / 255 + 1e-6}),
    ("ply", "y", {"vertices": 1e-7, "colors": 0.5 / 255 + 1e-6}),
    ("obj", None, {"vertices": 1e-8, "colors": 1e-6}),
    ("obj", "y", {"vertices": 1e-7, "colors": 1e-6}),
    ("gaussian.ply", None, {"means": 0, "quats": 1e-6, "scales": 1e-7, "colors": 1e-6}),
    ("gaussian.ply", "y", {"means": 1e-7, "quats": 1e-6, "scales": 1e-7, "colors": 1e-6}),
    ("splat", None, {"means": 0, "quats": 1.5 / 128, "scales": 1e-9, "colors": 0.5 / 255 + 1e-6}),
    ("splat", "y", {"means": 1e-7, "quats": 1.5 / 128, "scales": 1e-9, "colors": 0.5 / 255 + 1e-6}),
])
def test_what_is_written_comes_back(tmp_path, kind, up, tolerances):
    read, alphas = sequence.load_frames(sequence.save_frames(tmp_path, FRAMES, kind, up=up))
    assert alphas == [0.0, 0.5, 1.0]
    for frame, own in zip(FRAMES, read, strict=True):
        kept = frame.mesh if "vertices" in tolerances else frame.gaussians
        assert type(own) is type(kept) and ("faces" not in dir(kept) or torch.equal(own.faces, kept.faces))
        for name, tolerance in tolerances.items():
            difference = (value(own, name) - value(kept, name)).abs()
            if name == "quats":
                difference = torch.minimum(difference.amax(-1), (value(own, name) + value(kept, name)).abs().amax(-1))
            assert float(difference.max()) <= tolerance, name


def test_a_file_with_y_up_is_turned_as_a_whole(tmp_path):
    sequence.save_frames(tmp_path, FRAMES[:1], "gaussian.ply", up="y")
    raw, about = load_ply(tmp_path / "frame_000.gaussian.ply")
    before, turn = FRAMES[0].gaussians, up_rotation("z", "y").float()
    x, y, z = before.means.unbind(-1)
    assert about == {"up": "y", "alpha": 0.0} and torch.allclose(raw.means, torch.stack([x, z, -y], -1), atol=1e-7)
    axes = [quat_to_matrix(torch.nn.functional.normalize(own.quats, dim=-1)) * own.scales[:, None] for own in (raw, before)]
    covariances = [own @ own.mT for own in axes]
    assert torch.allclose(covariances[0], turn @ covariances[1] @ turn.T, atol=1e-8)


def test_fewer_frames_leave_no_old_ones(tmp_path):
    (tmp_path / "frame_photo.glb").write_text("mine")
    sequence.save_frames(tmp_path, FRAMES, "glb")
    sequence.save_frames(tmp_path, FRAMES[:1], "glb")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frame_000.glb", "frame_photo.glb", "sequence.json"]


def test_animated_glb(tmp_path):
    read = load_animated_glb(sequence.to_animated_glb(FRAMES, tmp_path / "a.glb", fps=5))
    assert read.fps == 5 and [len(mesh.faces) for mesh in read.meshes] == [len(frame.mesh.faces) for frame in FRAMES]
    assert torch.allclose(read.meshes[2].vertices, FRAMES[2].mesh.vertices, atol=1e-7)


def test_state_comes_back_bit_for_bit(tmp_path):
    frames = morph()
    frames[1].mesh, frames[2].gaussians
    path = sequence.save_sequence_state(tmp_path / "state", frames, metadata={"why": "test"})
    back, about = sequence.load_sequence_state(path, Decoder())
    assert about["metadata"] == {"why": "test"} and [sorted(frame.outputs) for frame in back] == [sorted(frame.outputs) for frame in frames]
    for one, other in zip(back, frames, strict=True):
        assert (one.index, one.alpha, one.slat_alpha, one.turns, one.seconds, list(one.latents)) == (other.index, other.alpha, other.slat_alpha, other.turns, other.seconds, list(other.latents))
        assert torch.equal(one.logits, other.logits) and torch.equal(one.coords, other.coords) and one.coords.dtype == torch.int32 and torch.equal(one.features, other.features)
        assert (one.costs is None) == (other.costs is None) and (one.costs is None or torch.equal(one.costs, other.costs))
        assert torch.equal(one.mesh.vertices, other.mesh.vertices) and torch.equal(one.gaussians.means, other.gaussians.means)
    assert json.loads((tmp_path / "state.json").read_text())["metadata"]["frames"][1]["turns"] == 1
    without, _ = sequence.load_sequence_state(path)
    assert torch.equal(without[1].mesh.vertices, frames[1].mesh.vertices)


def test_pages(tmp_path):
    text = sequence.save_page(tmp_path / "m.html", FRAMES, title="Chair & car").read_text()
    scene = json.loads(text.partition("const scene = ")[2].partition(";\n")[0])
    assert scene["times"] == [0.0, 0.5, 1.0] and [frame["n"] for frame in scene["frames"]] == [len(frame.gaussians) for frame in FRAMES] and "Chair &amp; car" in text
    slider = sequence.PictureSlider(torch.rand(3, 4, 5, 3), ["a", '"b"', "<c>"], start=1, alt="x & y")
    shown = slider._repr_html_()
    assert 'max="2"' in shown and 'value="1"' in shown and "<script" not in shown and "&lt;c&gt;" in shown and "-5px 0" in shown
    assert slider.save(tmp_path / "s.html").read_text().startswith("<!doctype html>")


def test_all_formats_at_once(tmp_path):
    found = sequence.export_sequence(FRAMES, tmp_path, ["gif", "strip", "png", "glb", "animated", "html", "state", "gif"], fps=10, size=16, what="mesh")
    assert list(found) == ["gif", "strip", "png", "glb", "animated", "html", "state"] and all(path.exists() for path in found.values())
    assert read_video(found["gif"]).frames.shape == (3, 16, 16, 3) and read_image(found["strip"]).shape == (16, 52, 3)
    assert sorted(path.suffix for path in found["png"].iterdir()) == [".json", ".png", ".png", ".png"]
    assert sequence.decoded_formats(["glb", "state"]) == ("mesh",) and sequence.decoded_formats(["gif", "splat"], "normal") == ("mesh", "gaussian") and sequence.decoded_formats(["state"]) == ("mesh", "gaussian")


def test_films_as_files(tmp_path):
    pytest.importorskip("av")
    assert len(read_video(sequence.to_mp4(FRAMES, tmp_path / "new" / "a.mp4", size=17, what="mesh")).frames) == 3
    assert len(read_video(sequence.to_gif(FRAMES, tmp_path / "a.gif", size=16, what="mesh")).frames) == 4


class Empty:
    alpha, mesh, gaussians, radiance = 0.0, None, None, None


@pytest.mark.parametrize(("call", "word"), [
    (lambda path: sequence.render_sequence([], size=8), "at least one"),
    (lambda path: sequence.render_sequence(FRAMES, size=0), "size"),
    (lambda path: sequence.render_sequence(FRAMES, size=8, views="fron"), "'front'"),
    (lambda path: sequence.render_sequence(FRAMES, size=8, what="meshh"), "'mesh'"),
    (lambda path: sequence.render_sequence([Empty()], size=8), "gaussians"),
    (lambda path: sequence.save_frames(path, FRAMES, "stl"), "kind"),
    (lambda path: sequence.save_frames(path, FRAMES, "ply", up="x"), "up"),
    (lambda path: sequence.save_frames(path, [Empty()], "glb"), r"frames\[0\]: expected mesh"),
    (lambda path: sequence.export_sequence(FRAMES, path, ["glb", "gltf"]), "'glb'"),
    (lambda path: sequence.export_sequence(FRAMES, path, ["gif"], fps=60), "fps"),
    (lambda path: sequence.to_mp4(FRAMES, path / "a.gif"), "path"),
    (lambda path: sequence.to_gif(FRAMES, path / "a.gif", fps=60), "fps"),
    (lambda path: sequence.PictureSlider(torch.rand(2, 4, 4)), "pictures"),
    (lambda path: sequence.PictureSlider(torch.rand(2, 4, 4, 3), ["one"]), "labels"),
    (lambda path: sequence.turntable_film(FRAMES[0], count=0), "count"),
    (lambda path: sequence.load_frames(sequence.save_frames(path, FRAMES, "png", size=8, what="mesh")), "kind"),
])
def test_refuses(tmp_path, call, word):
    with pytest.raises(ValueError, match=word):
        call(tmp_path)


def test_refuses_files_of_others(tmp_path):
    from papers10.splat.export import save_scene

    save_scene(tmp_path / "other", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="saved morph"):
        sequence.load_sequence_state(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        sequence.load_sequence_state(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        sequence.load_frames(tmp_path)
