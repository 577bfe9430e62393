"""Meshes, pictures and turntables as ends of a morph: axes, volumes, silhouettes, and noise that leads back."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "miniatures"))
import trellis_miniature as miniature

from papers10.core.data import available
from papers10.morphany3d.backbone import new_tiny
from papers10.morphany3d.meshes import (
    MeshShape,
    choose_front,
    encode_mesh,
    encode_views,
    encode_volume,
    invert_endpoint,
    load_views,
    meshes_trial,
    prepare_image,
    prepare_mesh,
    turntable_pictures,
    visual_hull,
    voxel_centres,
)
from papers10.morphany3d.morphing import MorphConfig
from papers10.morphany3d.pipeline import MorphPipeline, TinyAdapter
from papers10.morphany3d.shapes import Primitive, Shape, Volume
from papers10.morphany3d.trellis import TrellisAdapter
from papers10.splat.meshes import Mesh

trimesh = pytest.importorskip("trimesh")


def box(sides=(1.0, 0.5, 0.25), move=(0.0, 0.0, 0.0)):
    """A box that is longest along x and flattest along z, with a marker vertex order of its own."""
    made = trimesh.creation.box(sides)
    made.apply_translation(move)
    return made


@pytest.fixture(scope="module")
def backbone():
    """An untrained generator whose networks and decoder answer something: nothing below depends on what they have learned."""
    model = new_tiny(4)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in (model.ss_flow, model.slat_flow):
            for parameter in network.parameters():
                if not parameter.any():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return TinyAdapter(model.double(), steps=4)


# Meshes


def test_a_prepared_mesh_is_centred_and_has_one_size():
    mesh = prepare_mesh(box((30, 10, 20), (100, -7, 3)), extent=0.8)
    low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
    torch.testing.assert_close(high - low, torch.tensor([0.8, 0.8 / 3, 1.6 / 3]))
    torch.testing.assert_close(low + high, torch.zeros(3), rtol=0, atol=1e-6)  # float32 of numbers near 1
    assert mesh.colors.eq(0.7).all()


@pytest.mark.parametrize("up, facing, sides", [("+z", "+x", (3, 2, 1)), ("z", "-y", (2, 3, 1)), ("+y", "+z", (1, 3, 2)), ("-x", "y", (2, 1, 3))])
def test_axes_by_name(up, facing, sides):
    mesh = prepare_mesh(box((3, 2, 1)), up=up, facing=facing, extent=0.9)
    found = mesh.vertices.amax(0) - mesh.vertices.amin(0)
    torch.testing.assert_close(found, torch.tensor(sides) * 0.3)
    assert mesh.volume() > 0  # turned, not mirrored


def test_an_arrow_looks_along_x_after_it_was_turned():
    arrow = trimesh.util.concatenate([box((0.1, 0.1, 1.0)), box((0.3, 0.3, 0.2), (0, 0, 0.5))])  # thick where it points, +z
    mesh = prepare_mesh(arrow, up="+y", facing="+z")
    thick = mesh.vertices[mesh.vertices[:, 1].abs() > 0.1]
    assert (thick[:, 0] > 0).all()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["x", "y", "z"]), st.sampled_from(["+", "-"]), st.floats(0.1, 1), st.floats(-50, 50))
def test_a_prepared_mesh_is_in_the_box_whatever_it_was(axis, sign, extent, move):
    other = {"x": "y", "y": "z", "z": "x"}[axis]
    mesh = prepare_mesh(box(move=(move, 2 * move, 0)), up=sign + axis, facing=other, extent=extent)
    assert mesh.vertices.abs().max() <= extent / 2 + 1e-5
    again = prepare_mesh(mesh, extent=extent)
    torch.testing.assert_close(again.vertices, mesh.vertices, rtol=0, atol=1e-5)  # already prepared


def test_the_volume_of_a_box_is_its_signed_distance():
    shape = MeshShape(prepare_mesh(box(), extent=0.75, color=(0.2, 0.4, 0.6)), thickness=0.03)
    volume = shape.volume(16)
    # A primitive of the same size, grown by hand: outside its faces the distance is that of the box less the thickness.
    exact, _ = Shape("box", (Primitive("box", (0, 0, 0), (0.375, 0.1875, 0.09375), (0.2, 0.4, 0.6)),)).sdf(voxel_centres(16).double())
    torch.testing.assert_close(volume.tsdf, ((0.03 - exact) * 16 / 1.5).clamp(-1, 1).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(volume.color[volume.tsdf > -1], torch.tensor([0.2, 0.4, 0.6]).expand(int((volume.tsdf > -1).sum()), 3))
    volume.check()


def test_a_wall_thinner_than_a_voxel_is_kept():
    sheet = prepare_mesh(box((1, 1, 0.004)), extent=0.8)
    assert not MeshShape(sheet, thickness=0.0).volume().occupancy.any()
    assert MeshShape(sheet, thickness=0.04).volume().occupancy.any(-1).sum() >= 13 * 13


def test_a_quarter_turn_moves_voxels():
    shape = MeshShape(prepare_mesh(trimesh.util.concatenate([box(), box((0.2, 0.2, 0.8), (0.5, 0, 0.3))])))
    torch.testing.assert_close(shape.turned(90).volume().tsdf, shape.volume().turned(1).tsdf, rtol=0, atol=1e-4)  # float32 vertices
    picture = shape.image()
    assert picture.shape == (32, 32, 4) and picture[..., 3].any() and picture.min() >= 0 and picture.max() <= 1
    # The tower stands in front, +x, which is on the right.
    columns = picture[..., 3].sum(0)
    assert columns[16:].sum() > columns[:16].sum()


@pytest.mark.parametrize("call, error, message", [
    (lambda: prepare_mesh(box(), up="up"), ValueError, "up: expected one of"),
    (lambda: prepare_mesh(box(), up="z", facing="-z"), ValueError, "perpendicular"),
    (lambda: prepare_mesh(box(), extent=0), ValueError, "extent"),
    (lambda: prepare_mesh(box(), color=(0, 0, 2)), ValueError, "color"),
    (lambda: prepare_mesh(Mesh(torch.zeros(3, 3), torch.tensor([[0, 1, 2]]))), ValueError, "extent above 0"),
    (lambda: prepare_mesh(Mesh(torch.zeros(3, 3), torch.zeros(0, 3, dtype=torch.int64))), ValueError, "face"),
    (lambda: MeshShape(box()), TypeError, "mesh"),
    (lambda: MeshShape(Mesh.from_trimesh(box((3, 1, 1)))), ValueError, "prepare_mesh"),
    (lambda: MeshShape(prepare_mesh(box()), thickness=-1), ValueError, "thickness"),
])  # fmt: skip
def test_meshes_that_do_not_fit_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Pictures


def disk(height=90, width=140, centre=(30, 100), radius=20, color=(1.0, 0.5, 0.0)):
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
    return torch.cat([torch.tensor(color).expand(height, width, 3) * inside[..., None], inside[..., None].float()], -1)


def test_a_picture_is_cut_centred_and_scaled():
    small = prepare_image(disk(), 32, margin=0.1)
    area = float(small[..., 3].sum())
    assert area == pytest.approx(np.pi * (0.4 * 32) ** 2, rel=0.02)  # a disk of 90 - 10 % of the half width; the rest is pixels of its edge
    torch.testing.assert_close(small[..., 3], small[..., 3].flip(0, 1), rtol=0, atol=0.06)
    torch.testing.assert_close(small[small[..., 3] > 0.01][:, :3], torch.tensor([1.0, 0.5, 0.0]).expand(int((small[..., 3] > 0.01).sum()), 3), rtol=0, atol=1e-4)  # nothing bleeds in
    assert not small[small[..., 3] == 0].any()


@pytest.mark.parametrize("kind", ["pillow", "array", "path"])
def test_pictures_of_any_kind(kind, tmp_path):
    from PIL import Image

    pixels = (disk() * 255).round().byte().numpy()
    image = {"pillow": Image.fromarray(pixels), "array": pixels, "path": tmp_path / "disk.png"}[kind]
    Image.fromarray(pixels).save(tmp_path / "disk.png")
    torch.testing.assert_close(prepare_image(image), prepare_image(disk()), rtol=0, atol=0.01)  # 8 bits


def test_a_plain_background_is_removed_where_it_touches_the_edge():
    picture = disk()
    before_white = picture[..., :3] + (1 - picture[..., 3:])
    before_white[28:32, 98:102] = 1.0  # a white button
    small = prepare_image(before_white, background="plain")
    torch.testing.assert_close(small[..., 3], prepare_image(disk())[..., 3], rtol=0, atol=1e-5)
    assert small[15, 15, :3].min() > 0.5
    whole = prepare_image(before_white, background="keep")[..., 3]
    assert whole[12:20, 2:30].min() == 1 and not whole[:4].any()  # 140 x 90 pixels, all of them


def test_a_picture_without_transparency_needs_rembg(monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(ImportError, match="background='keep'"):
        prepare_image(torch.rand(8, 8, 3))


@pytest.mark.parametrize("call, message", [
    (lambda: prepare_image(torch.zeros(8, 8, 4)), "transparent everywhere"),
    (lambda: prepare_image(torch.zeros(8, 8)), r"\[H, W, 3\]"),
    (lambda: prepare_image(disk(), background="rmbg"), "background"),
    (lambda: prepare_image(disk(), margin=0.5), "margin"),
    (lambda: prepare_image(disk(), 0), "size"),
    (lambda: load_views(torch.rand(8, 20, 4)), "strip of squares"),
    (lambda: load_views([]), "at least one picture"),
    (lambda: load_views([disk(), disk(91)]), "one size"),
    (lambda: load_views([torch.zeros(8, 8, 4)]), "transparent everywhere"),
    (lambda: load_views([disk()], 2), "count"),
    (lambda: choose_front(torch.zeros(0, 8, 8, 4)), "at least one"),
    (lambda: visual_hull(torch.ones(1, 8, 8, 4)), "at least two"),
    (lambda: visual_hull(torch.ones(2, 8, 8, 4), yaws=[0]), "yaws"),
    (lambda: visual_hull(torch.ones(2, 8, 8, 4), front=2), "front"),
    (lambda: visual_hull(torch.zeros(2, 8, 8, 4)), "every picture"),
])  # fmt: skip
def test_pictures_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Turntables


def test_a_hull_holds_the_object_and_has_its_colours():
    shape = Shape.random("mug", 4, p_rotated=0.0)
    true, hull = shape.volume(), visual_hull(turntable_pictures(shape, 6, 48))
    both = true.occupancy & hull.occupancy
    assert both.sum() >= 0.97 * true.occupancy.sum()  # a picture of 48 pixels knows an outline to a sixth of a voxel
    assert both.sum() > 0.7 * (true.occupancy | hull.occupancy).sum()
    assert (hull.color - true.color)[both].abs().mean() < 0.05


def test_the_front_view_says_where_x_is():
    shape = Shape.random("car", 2, p_rotated=0.0)
    views = turntable_pictures(shape, 4, 48)
    torch.testing.assert_close(visual_hull(views, front=1).tsdf, visual_hull(views).turned(1).tsdf, rtol=0, atol=1e-4)


def test_strips_and_folders_are_turntables(tmp_path):
    from PIL import Image

    views = turntable_pictures(Shape.random("lamp", 1, p_rotated=0.0), 4, 32)
    strip = torch.cat(list(views), 1)
    for number, view in enumerate(views):
        Image.fromarray((view * 255).round().byte().numpy()).save(tmp_path / f"{number}.png")
    a, b = load_views(strip, size=32), load_views(tmp_path, size=32)
    assert a.shape == (4, 32, 32, 4)
    torch.testing.assert_close(a, b, rtol=0, atol=0.01)  # 8 bits
    assert load_views(tmp_path, 2).shape == (2, 64, 64, 4)
    # One scale for all of them: heights agree.
    tall = (a[..., 3] > 0.5).any(2).sum(1)
    assert tall.max() - tall.min() <= 1


def test_the_front_shows_most():
    views = torch.zeros(3, 8, 8, 4)
    views[0, :2], views[1, :5], views[2, 3:] = 1, 1, 1
    assert choose_front(views) == 1


# Latents and noise


def sphere(radius=0.3):
    return Shape("ball", (Primitive("ellipsoid", (0, 0, 0), (radius,) * 3, (0.8, 0.3, 0.2)),)).volume()


def test_encoded_features_are_those_of_the_volume(backbone, monkeypatch):
    volume = sphere()
    monkeypatch.setattr(backbone.model.ss_vae, "decode", lambda latent: volume.tsdf[None].double())
    found = encode_volume(backbone, volume, refine=0)
    places = found.coords[:, 1:].long().unbind(1)
    torch.testing.assert_close(found.features[:, 3], 2 * volume.tsdf[places].double() - 1)
    torch.testing.assert_close(found.features[:, :3], 1.5 * (2 * volume.color[places].double() - 1))
    torch.testing.assert_close(found.normalised * backbone.model.slat_std + backbone.model.slat_mean, found.features)


def test_voxels_that_the_decoder_adds_take_the_nearest_colour(backbone, monkeypatch):
    monkeypatch.setattr(backbone.model.ss_vae, "decode", lambda latent: torch.ones(1, 16, 16, 16, dtype=torch.float64))
    found = encode_volume(backbone, sphere(), refine=0)
    expected = (1.5 * (2 * torch.tensor([0.8, 0.3, 0.2]).double() - 1)).expand(len(found.coords), 3)
    torch.testing.assert_close(found.features[:, :3], expected, rtol=0, atol=1e-6)  # colours are float32


def test_refining_brings_the_code_nearer_to_the_volume(backbone):
    volume = sphere()
    guess, better = (encode_volume(backbone, volume, refine=count) for count in (0, 30))
    error = lambda found: float((found.logits - volume.tsdf).square().mean())
    torch.testing.assert_close(guess.structure, backbone.model.ss_vae.encode(volume.tsdf[None].double())[0])
    assert error(better) < error(guess)
    assert not better.structure.requires_grad and not any(parameter.grad is not None for parameter in backbone.model.parameters())


def latents(backbone, seed=0):
    draw = torch.Generator().manual_seed(seed)
    coords = torch.cat([torch.zeros(30, 1), torch.randperm(16**3, generator=draw)[:30].sort().values[:, None] // torch.tensor([256, 16, 1]) % 16], 1).int()
    return torch.randn(backbone.noise_shape("ss"), generator=draw, dtype=torch.float64), coords, torch.randn(30, 7, generator=draw, dtype=torch.float64)


def test_more_rounds_lead_back_more_exactly(backbone):
    condition = backbone.condition(["chair"])[0]
    trips = [invert_endpoint(backbone, condition, *latents(backbone), iterations=count, steps=4)[1] for count in (1, 3, 20)]
    for field in ("structure", "features"):
        errors = [getattr(trip, field) for trip in trips]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 * errors[0]  # float64, contracted 20 times
    assert trips[-1].iou == 1


def test_the_noise_of_an_end_lies_on_its_voxels(backbone):
    condition = backbone.condition(["chair"])[0]
    structure, coords, normalised = latents(backbone)
    end, trip = invert_endpoint(backbone, condition, structure, coords, normalised, name="made", iterations=10, steps=4)
    assert end.error == max(trip.structure, trip.features) and end.name == "made"
    assert end.noise.structure.shape == structure.shape and end.noise.structure.dtype == torch.float32
    for kind in ("field", "nearest"):
        assert torch.equal(end.noise.at(coords[:, 1:], kind), end.noise.tokens)
    other = invert_endpoint(backbone, condition, structure, coords, normalised, name="made", iterations=10, steps=4, seed=1)[0]
    free = torch.ones(16, 16, 16, dtype=torch.bool)
    free[coords[:, 1:].long().unbind(1)] = False
    assert torch.equal(other.noise.tokens, end.noise.tokens) and not torch.equal(other.noise.field[free], end.noise.field[free])


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_a_morph_begins_with_the_object_that_was_inverted(backbone, strength):
    condition = backbone.condition(["chair"])[0]
    structure, coords, normalised = latents(backbone)
    end, _ = invert_endpoint(backbone, condition, structure, coords, normalised, iterations=16, steps=6, cfg_strength=strength)
    frame = next(MorphPipeline(backbone).morph(end, "car", MorphConfig.preset("mca", n_frames=2, steps=6, cfg_strength=strength), formats=()))
    expected = backbone.decode_structure(structure[None])[0]
    torch.testing.assert_close(frame.logits, expected, rtol=0, atol=1e-4)  # the noise is kept in float32


class Doubled:
    """A backbone with a velocity of its own, v = 2 x, of two stages; its decoder says what is above 0."""

    stages, resolution, device, name = ("ss", "slat"), 4, torch.device("cpu"), "doubled"

    def velocity(self, stage, x, sigma, condition, *, coords=None):
        assert (coords is None) == (stage == "ss")
        return 2 * x

    def decode_structure(self, latent):
        return latent[:, 0]


def test_any_backbone_with_a_velocity_can_be_inverted():
    structure, coords, tokens = torch.randn(1, 4, 4, 4, dtype=torch.float64), torch.tensor([[0, 1, 2, 3]]).int(), torch.randn(1, 3, dtype=torch.float64)
    end, trip = invert_endpoint(Doubled(), torch.zeros(2, 5), structure, coords, tokens, iterations=80, steps=4, rescale_t=1.0)
    assert max(trip[:2]) < 1e-9  # contraction by a half each round
    torch.testing.assert_close(end.noise.structure.double(), structure / 0.5**4, rtol=1e-6, atol=1e-6)  # each step halves; float32


def test_a_trellis_pipeline_can_be_inverted(tmp_path):
    miniature.write_trellis(tmp_path / "trellis", steps=3)
    trellis = TrellisAdapter(miniature.TrellisImageTo3DPipeline.from_pretrained(tmp_path / "trellis"))
    condition = trellis.condition([miniature.picture("red")])[0]
    draw = torch.Generator().manual_seed(0)
    structure, tokens = torch.randn(trellis.noise_shape("ss"), generator=draw), torch.randn(2, *trellis.noise_shape("slat"), generator=draw)
    coords = torch.tensor([[0, 1, 2, 3], [0, 2, 0, 1]]).int()
    trips = [invert_endpoint(trellis, condition, structure, coords, tokens, iterations=count, steps=10, cfg_strength=1.0)[1] for count in (1, 12)]
    assert max(trips[1][:2]) < 1e-3 < max(trips[0][:2])  # float32


def test_the_picture_alone_needs_no_latents(backbone):
    end = encode_mesh(backbone, box(), inversion="none", name="a box")
    assert end.noise is None and end.error is None and end.name == "a box" and end.condition.shape == (64, 64)


def test_a_mesh_goes_through_the_pipeline(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(backbone.model.ss_vae, "decode", lambda latent: sphere().tsdf[None].double().expand(len(latent), -1, -1, -1))
    path = tmp_path / "brick.ply"
    box().export(path)
    end = MorphPipeline(backbone).encode(path, iterations=2, steps=2, refine=0)
    assert end.name == "brick" and end.noise.coords is not None and end.error >= 0


@pytest.mark.skipif(not available("mesh"), reason="pyvista, which brings the meshes, is not installed")
def test_meshes_by_name(backbone):
    assert encode_mesh(backbone, "mesh/ant", inversion="none", up="+y", facing="+z").name == "ant"


def test_a_turntable_is_an_end(backbone, monkeypatch):
    monkeypatch.setattr(backbone.model.ss_vae, "decode", lambda latent: sphere().tsdf[None].double().expand(len(latent), -1, -1, -1))
    end = encode_views(backbone, turntable_pictures(Shape.random("tree", 3, p_rotated=0.0), 4), steps=2, iterations=1, refine=0)
    assert end.name == "turntable" and end.noise is not None


@pytest.mark.parametrize("call, error, message", [
    (lambda b: encode_mesh(b, box(), inversion="ddim"), ValueError, "inversion"),
    (lambda b: encode_volume(b, sphere().image()), TypeError, "volume"),
    (lambda b: encode_volume(b, Shape.random("car", 1).volume(8)), ValueError, "resolution of 16"),
    (lambda b: encode_volume(b, sphere(), refine=-1), ValueError, "refine"),
    (lambda b: encode_volume(object(), sphere()), TypeError, "invert_endpoint"),
    (lambda b: invert_endpoint(b, torch.zeros(4, 64), *latents(b), iterations=0), ValueError, "iterations"),
    (lambda b: invert_endpoint(b, torch.zeros(4, 64), *latents(b), cfg_strength=-1), ValueError, "cfg_strength"),
    (lambda b: meshes_trial("euler", 0, backbone=b), ValueError, "arm"),
])  # fmt: skip
def test_ends_that_do_not_fit_are_refused(backbone, call, error, message):
    with pytest.raises(error, match=message):
        call(backbone)


def test_a_backbone_with_three_stages_is_refused():
    three = Doubled()
    three.stages = ("ss", "shape", "texture")
    with pytest.raises(ValueError, match="two stages"):
        invert_endpoint(three, torch.zeros(2, 5), torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 3))


def test_volumes_may_come_from_elsewhere(backbone, monkeypatch):
    occupancy = torch.zeros(16, 16, 16, dtype=torch.bool)
    occupancy[4:12, 5:11, 3:9] = True
    monkeypatch.setattr(backbone.model.ss_vae, "decode", lambda latent: sphere().tsdf[None].double().expand(len(latent), -1, -1, -1))
    assert encode_mesh(backbone, Volume.from_occupancy(occupancy), steps=2, iterations=1, refine=0, name="block").name == "block"
