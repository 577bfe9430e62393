"""Applications of a scene: in-between frames, depth, edits, stereo, tracks, moved cameras, and the program."""

import math

import pytest
import torch

from papers10.adagar import app, apps
from papers10.adagar.interpolation import disc_clip
from papers10.adagar.scene import GaborSplats
from papers10.kernels.common import BackendUnavailable
from papers10.splat.cameras import pinhole_cameras
from papers10.splat.gaussians import Gaussians
from papers10.splat.metrics import psnr

W, H = 40, 32


def scene(frames=5, **options):
    """Four primitives of a foreground that moves to the right by 0.5, four of a background that stands."""
    model = GaborSplats(8, frames, n_waves=1, n_knots=2, attributes={"mask": 1, "feature": 2}, **options)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.means[:, :2] = torch.rand(8, 2, generator=random) * 0.6 - 0.5
        model.means[:, 2] = torch.tensor([1.0] * 4 + [1.5] * 4)
        model.position_knots[:4, 1:, 0] = 0.5
        model.log_scales.fill_(math.log(0.2))
        model.opacities.fill_(1.0)
        model.colors.normal_(generator=random)
        model.waves.normal_(generator=random)
        model.wave_weights.fill_(0.3)
        model.attributes[:, 0] = torch.tensor([2.0] * 4 + [-2.0] * 4)
    return model


FOREGROUND = torch.tensor([True] * 4 + [False] * 4)


def same(a, b, tolerance=1e-6):
    return torch.allclose(a, b, atol=tolerance)


# Frames and depth.


def test_interpolation_keeps_the_frames_of_the_clip():
    model = scene()
    own, more = apps.interpolate(model, W, H), apps.interpolate(model, W, H, factor=4)
    assert own.shape == (5, H, W, 3) and more.shape == (17, H, W, 3)
    assert same(more[::4], own)
    assert same(apps.interpolate(model, W, H, times=[0.125]), more[2:3])
    assert same(apps.interpolate(model, W, H, speed=lambda t: 1 - t), own.flip(0))
    assert apps.frame_times(model, 2).tolist() == [i / 8 for i in range(9)]
    assert apps.interpolate(scene(1), W, H, factor=3).shape[0] == 1
    assert not own.requires_grad


def test_frames_and_depth_do_not_depend_on_how_many_are_drawn_at_once():
    model, times = scene(), torch.linspace(0, 1, 20)
    whole = apps.interpolate(model, W, H, times=times)
    assert same(whole[13], apps.interpolate(model, W, H, times=times[13:14])[0])
    assert apps.depth_video(model, W, H).shape == (5, H, W)


def test_depth_lies_between_the_layers_and_has_fixed_colours():
    depth = apps.depth_video(scene(), W, H, [0.0, 1.0])
    there = depth > 0
    assert float(depth[there].min()) >= 1 - 1e-5 and float(depth.max()) <= 1.5 + 1e-5
    picture = apps.depth_colors(depth)
    assert picture.shape == (2, H, W, 3) and float(picture[~there].sum()) == 0
    flat = torch.tensor([[[1.0, 2.0]], [[1.0, 0.0]]])
    colors = apps.depth_colors(flat)
    assert torch.equal(colors[0, 0, 0], colors[1, 0, 0]) and not torch.equal(colors[0, 0, 0], colors[0, 0, 1])
    assert apps.depth_colors(torch.zeros(1, 2, 2)).sum() == 0


# Selection and edits.


def test_selectors_agree():
    model = scene()
    assert torch.equal(apps.select(model), FOREGROUND)
    assert torch.equal(apps.select(model, FOREGROUND), FOREGROUND)
    everything = [[-9.0, -9], [99, -9], [99, 99], [-9, 99]]
    assert bool(apps.select(model, everything, width=W, height=H).all())
    assert torch.equal(apps.select(model, everything, width=W, height=H, depth=(0.5, 1.2)), FOREGROUND)
    # At the end the foreground lies 0.5 * 16 = 8 pixels further right.
    right = float(model.means.detach()[0, 0]) * H / 2 + W / 2 + 8
    down = float(model.means.detach()[0, 1]) * H / 2 + H / 2
    corner = [[right - 1, down - 1], [right + 1, down - 1], [right, down + 1]]
    assert bool(apps.select(model, corner, time=1.0, width=W, height=H)[0]) and not bool(apps.select(model, corner, width=W, height=H)[0])


def test_a_polygon_may_be_concave():
    points = torch.tensor([[0.5, 0.5], [2.5, 0.5], [1.5, 2.0], [1.5, 0.2]])
    polygon = torch.tensor([[0.0, 0], [1, 0], [1.5, 1], [2, 0], [3, 0], [3, 3], [0, 3]])
    assert apps._inside(points, polygon).tolist() == [True, True, True, False]


def test_delete_and_duplicate_change_the_number():
    model = scene()
    gone, copies = apps.edit_objects(model, "delete"), apps.edit_objects(model, "duplicate", offset=(0.1, 0, 0))
    assert len(gone) == 4 and len(gone.at(0.3)) == 4 and len(copies) == 12
    rest = GaborSplats(8, 5, n_waves=1, n_knots=2, attributes={"mask": 1, "feature": 2})
    rest.load_state_dict(model.state_dict())
    rest.prune(FOREGROUND)
    assert same(apps.interpolate(gone, W, H), apps.interpolate(rest, W, H))
    now = copies.at(0.5)
    assert same(now.means[8:], now.means[:4] + torch.tensor([0.1, 0, 0])) and same(now.waves[8:], now.waves[:4])
    assert copies.at([0.0, 0.5, 1.0]).means.shape == (3, 12, 3)


def test_motions_move_the_chosen_only():
    model, at = scene(), 0.4
    before = model.at(at)
    moved = apps.edit_objects(model, "translate", offset=(0.2, -0.1, 0.3)).at(at)
    assert same(moved.means[:4], before.means[:4] + torch.tensor([0.2, -0.1, 0.3])) and same(moved.means[4:], before.means[4:])
    grown = apps.edit_objects(model, "scale", factor=2.0).at(at)
    middle = before.means[:4].mean(0)
    assert same(grown.means[:4], middle + 2 * (before.means[:4] - middle)) and same(grown.scales[:4], 2 * before.scales[:4]) and same(grown.scales[4:], before.scales[4:])
    turned = apps.edit_objects(model, "rotate", degrees=90.0, center=(0.0, 0, 1)).at(at)
    assert same(turned.means[:4, 0], -before.means[:4, 1]) and same(turned.means[:4, 1], before.means[:4, 0])
    whole = apps.edit_objects(model, "rotate", degrees=360.0)
    assert same(apps.interpolate(whole, W, H), apps.interpolate(model, W, H), 1e-5)


def test_a_turn_of_everything_turns_the_picture():
    model = scene()
    turned = apps.edit_objects(model, "rotate", torch.ones(8, dtype=torch.bool), degrees=90.0, center=(0.0, 0, 0))
    # Clockwise in the picture, x to y: with rows counted down that is rot90 with k = -1.
    assert same(apps.interpolate(turned, 32, 32), apps.interpolate(model, 32, 32).rot90(-1, (1, 2)), 1e-5)


def test_retime_and_fade():
    model = scene()
    late = apps.edit_objects(model, "retime", shift=0.25)
    assert same(late.at(0.75).means[:4], model.at(0.5).means[:4]) and same(late.at(0.75).means[4:], model.at(0.75).means[4:])
    assert same(late.at(0.1).means, model.at(0.1).means * ~FOREGROUND[:, None] + model.at(0.0).means * FOREGROUND[:, None])
    looped = apps.edit_objects(model, "retime", shift=0.25, outside="loop")
    assert same(looped.at(0.0).means[:4], model.at(0.75).means[:4])
    back = apps.edit_objects(model, "retime", FOREGROUND, shift=lambda t: 1 - t)
    assert same(back.positions([0.25])[0, :4], model.positions([0.75])[0, :4])
    faded = apps.edit_objects(model, "fade", factor=lambda t: 1 - t)
    assert same(faded.at(0.25).opacities, model.at(0.25).opacities * torch.where(FOREGROUND, 0.75, 1.0))
    ends = apps.interpolate(faded, W, H, times=[1.0])
    assert same(ends, apps.interpolate(apps.edit_objects(model, "delete"), W, H, times=[1.0]), 1e-5)
    with pytest.raises(ValueError, match=r"shift: .*outside='error'"):
        apps.edit_objects(model, "retime", shift=0.5, outside="error").at(0.0)
    with pytest.raises(ValueError, match="factor: "):
        apps.edit_objects(model, "fade", factor=lambda t: 2 * t).at(1.0)


def test_edits_stack_and_leave_the_scene_as_it_was():
    model = scene()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    copies = apps.edit_objects(model, "duplicate", offset=(0.0, 0, 0))
    later = apps.edit_objects(copies, "retime", torch.arange(12) >= 8, shift=0.5)
    last = apps.edit_objects(later, "translate", "mask", offset=(0, 0.1, 0))
    now = last.at(0.75)
    assert len(last) == 12 and same(now.means[8:], model.at(0.25).means[:4] + torch.tensor([0, 0.1, 0]))
    assert apps.interpolate(last, W, H, factor=2).shape == (9, H, W, 3) and apps.depth_video(last, W, H).shape == (5, H, W)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_editing_is_differentiable():
    model = scene()
    picture = apps.edit_objects(model, "scale", factor=1.5).render([0.2, 0.7], W, H).color
    picture.sum().backward()
    assert picture.shape == (2, H, W, 3) and float(model.means.grad.abs().sum()) > 0


def test_painting_changes_colours_only():
    model = scene()
    picture = apps.interpolate(model, W, H)[0].flip(-1)
    painted = apps.edit_appearance(model, 0.0, picture, steps=60)
    before, after = (float(psnr(apps.interpolate(which, W, H)[0], picture)) for which in (model, painted))
    assert after > before + 5
    assert all(torch.equal(value, painted.state_dict()[name]) == (name != "colors") for name, value in model.state_dict().items())
    assert all(a.requires_grad == b.requires_grad and b.grad is None for a, b in zip(model.parameters(), painted.parameters()))
    some = apps.edit_appearance(model, 0.0, picture, selector="mask", steps=5)
    assert torch.equal(some.colors[4:], model.colors[4:]) and not torch.equal(some.colors[:4], model.colors[:4])
    untouched = apps.edit_appearance(model, 0.0, apps.interpolate(model, W, H)[0])
    assert torch.equal(untouched.colors, model.colors)


# Stereo.


def test_shear_is_exact():
    places = torch.tensor([[0.0, 0, 0.5], [0.2, 0, 1.0], [0.0, 0, 2.0]])
    one = Gaussians(places, torch.tensor([1.0, 0, 0, 0]).expand(3, 4), torch.full((3, 3), 0.1), torch.ones(3), torch.ones(3, 3))
    moved = apps.shear(one, 0.1, 1.0).means
    assert same(moved[:, 0], torch.tensor([0.1, 0.2, -0.05])) and torch.equal(moved[:, 1:], places[:, 1:])


def test_eyes_see_what_is_near_apart():
    model = scene()
    left, right = apps.stereo(model, 0.25, width=W, height=H, convergence=1.5)
    assert left.shape == right.shape == (5, H, W, 3)
    # 0.25 (1/1 - 1/1.5) units are 4/3 pixels of disparity; the background at 1.5 has none.
    back = apps.edit_objects(model, "delete")
    one, other = apps.stereo(back, 0.25, width=W, height=H, convergence=1.5)
    assert same(one, other)
    front = apps.edit_objects(model, "delete", ~FOREGROUND)
    one, other = apps.stereo(front, 0.25, width=W, height=H, convergence=1.5, times=[0.0])
    columns = torch.arange(W, dtype=torch.float32)
    middle = lambda picture: float((picture.sum((0, 1, 3)) * columns).sum() / picture.sum())
    assert middle(one) - middle(other) == pytest.approx(4 / 3, abs=0.15)
    same_eye, same_other = apps.stereo(model, 0.0, width=W, height=H)
    assert torch.equal(same_eye, same_other)


def test_turning_eyes_meet_at_the_convergence():
    model = scene()
    left, right = apps.stereo(model, 0.2, width=W, height=H, method="rotate", convergence=2.5)
    assert not same(left, right, 1e-3)
    still = apps.stereo(model, 0.0, width=W, height=H, method="rotate")
    assert same(still[0], apps.interpolate(model, W, H), 1e-5)
    point = Gaussians(torch.tensor([[0.0, 0, 2.5]]), torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), 0.1), torch.ones(1), torch.ones(1, 3))
    one, other = apps.stereo(point, 0.5, width=W, height=H, method="rotate", convergence=2.5)
    assert same(one, other, 1e-4) and one.shape == (1, H, W, 3)


def test_anaglyphs_by_hand():
    left, right = torch.tensor([[[0.2, 0.4, 0.6]]]), torch.tensor([[[0.9, 0.5, 0.1]]])
    one, other = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6, 0.299 * 0.9 + 0.587 * 0.5 + 0.114 * 0.1
    expected = {"true": (one, 0, other), "mono": (one, other, other), "colour": (0.2, 0.5, 0.1), "half_colour": (one, 0.5, 0.1), "optimised": (0.7 * 0.4 + 0.3 * 0.6, 0.5, 0.1)}
    for kind, color in expected.items():
        assert same(apps.anaglyph(left, right, kind)[0, 0], torch.tensor(color)), kind
    grey = torch.full((1, 1, 3), 0.3)
    assert all(float(apps.anaglyph(grey, grey, kind).max()) == pytest.approx(0.3) for kind in apps.ANAGLYPHS)
    both = apps.side_by_side(left, right)
    assert torch.equal(both[:, :1], left) and torch.equal(apps.side_by_side(left, right, crossed=True)[:, :1], right)


def test_the_right_photograph_from_the_left():
    from papers10.core.data import available

    if not available("photo/motorcycle_left"):
        pytest.skip("scikit-image's pictures are not here")
    scores = apps.stereo_check(64)
    assert scores["gain"] >= 3 and scores["sheared"] > scores["shifted"] and 0.5 < scores["seen"] < 1


# Tracks and views.


def dense_scene():
    """A still grid of small opaque primitives at depth 1.5, and a block of them at depth 1 that moves right by 12 pixels."""
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    grid = torch.stack([(x - W / 2) / (H / 2), (y - H / 2) / (H / 2)], -1).reshape(-1, 2)
    block = grid[(grid[:, 0] < -0.5) & (grid[:, 1].abs() < 0.5)]
    model = GaborSplats(len(grid) + len(block), 4, n_waves=0, n_knots=2)
    with torch.no_grad():
        model.means[:, :2] = torch.cat([grid, block])
        model.means[:, 2] = torch.tensor([1.5] * len(grid) + [1.0] * len(block))
        model.position_knots[len(grid):, 1, 0] = 12 / (H / 2)
        model.log_scales.fill_(math.log(0.6 / (H / 2)))
        model.opacities.fill_(8.0)
    return model


def test_points_follow_what_they_are_on_and_are_hidden_behind_it():
    model = dense_scene()
    # On the block; on the background where the block will be at the end; on the background far away; a query at the last frame on the moved block.
    queries = torch.tensor([[0.0, 5, 16], [0, 18.5, 16], [0, 35, 28], [3, 17, 16]])
    found = apps.track_points(model, queries, W, H)
    assert found.tracks.shape == (4, 4, 2) and found.visible.shape == (4, 4) and found.visible.dtype == torch.bool
    assert same(found.tracks[0], torch.tensor([[5 + 4.0 * f, 16] for f in range(4)]), 0.05)
    assert same(found.tracks[3], found.tracks[0], 0.05)
    assert same(found.tracks[1], torch.tensor([18.5, 16]).expand(4, 2), 0.05)
    assert found.visible.tolist() == [[True] * 4, [True, True, False, False], [True] * 4, [True] * 4]
    assert float(found.confidence.min()) > 0.9
    by_time = apps.track_points(model, torch.tensor([[1.0, 17, 16]]), W, H, [0.0, 0.5], unit="time")
    assert same(by_time.tracks[0], torch.tensor([[5.0, 16], [11, 16]]), 0.05)
    assert apps.track_points(model, torch.zeros(0, 3), W, H).tracks.shape == (0, 4, 2)


def test_views():
    model = scene()
    still = apps.novel_view(model, torch.eye(4).expand(5, 4, 4), W, H)
    assert same(still, apps.interpolate(model, W, H))
    shifted = torch.eye(4)[None].clone()
    shifted[0, 0, 3] = 2 * 2 / H
    assert same(apps.novel_view(model, shifted, W, H, times=0.5)[0, :, 2:], apps.interpolate(model, W, H, times=[0.5])[0, :, :-2], 1e-5)
    path = apps.orbit_path(8, 20.0, pivot=1.5)
    assert same(path[0], torch.eye(4, dtype=torch.float64), 1e-12) and same(path @ torch.tensor([0.0, 0, 1.5, 1]).double(), torch.tensor([0.0, 0, 1.5, 1]).double().expand(8, 4), 1e-9)
    assert float(torch.rad2deg(torch.arcsin(path[2, 0, 2].abs()))) == pytest.approx(10.0)
    assert apps.novel_view(model, path, W, H).shape == (8, H, W, 3)
    assert apps.novel_view(model, pinhole_cameras(W, H)).shape == (1, H, W, 3)
    assert apps.novel_view(apps.edit_objects(model, "delete"), path, W, H, times=[0.5]).shape == (8, H, W, 3)


# What is refused.


def test_refusals():
    model, eye = scene(), torch.eye(4)[None]
    for call, kind, words in (
        (lambda: apps.interpolate(object(), W, H), TypeError, "model: "), (lambda: apps.interpolate(model, W, H, factor=2, times=[0.0]), ValueError, "times: "),
        (lambda: apps.interpolate(model, W, H, factor=0), ValueError, "factor: "), (lambda: apps.interpolate(model, W, H, factor=1.5), ValueError, "factor: "),
        (lambda: apps.interpolate(model, W, H, times=[1.1]), ValueError, "times: "), (lambda: apps.interpolate(model, W, H, times=[]), ValueError, "times: "),
        (lambda: apps.interpolate(model, W, H, times=[math.nan]), ValueError, "times: "), (lambda: apps.interpolate(model, W, H, speed=lambda t: 2 * t), ValueError, "speed: "),
        (lambda: apps.interpolate(model, W, H, speed=lambda t: t[:2]), ValueError, "speed: "), (lambda: apps.interpolate(model, 0, H), ValueError, "width: "),
        (lambda: apps.depth_video(model, W, H, [-0.1]), ValueError, "times: "), (lambda: apps.depth_colors(torch.zeros(2, 2)), ValueError, "depth: "),
        (lambda: apps.depth_colors(torch.zeros(1, 2, 2), cmap="viridi"), ValueError, "viridis"), (lambda: apps.select(model, "msk"), ValueError, "did you mean 'mask'"),
        (lambda: apps.select(model, "feature"), ValueError, "one channel"), (lambda: apps.select(model, torch.ones(3, dtype=torch.bool)), ValueError, "selector: "),
        (lambda: apps.select(model, [[0.0, 0], [1, 1]], width=W, height=H), ValueError, "polygon"), (lambda: apps.select(model, [[0.0, 0], [1, 1], [1, 0]]), ValueError, "width: "),
        (lambda: apps.select(model, depth=(2, 1)), ValueError, "depth: "), (lambda: apps.edit_objects(model, "move"), ValueError, "op: "),
        (lambda: apps.edit_objects(model, "delete", torch.zeros(8, dtype=torch.bool)), ValueError, "at least one"), (lambda: apps.edit_objects(model, "scale"), ValueError, "factor: "),
        (lambda: apps.edit_objects(model, "scale", factor=0.0), ValueError, "factor: "), (lambda: apps.edit_objects(model, "fade", factor=1.5), ValueError, "factor: "),
        (lambda: apps.edit_objects(model, "translate", ofset=(0, 0, 1)), TypeError, "did you mean offset"), (lambda: apps.edit_objects(model, "delete", factor=1), TypeError, "no options"),
        (lambda: apps.edit_objects(model, "translate", offset=(0, 1)), ValueError, "offset: "), (lambda: apps.edit_objects(model, "rotate", degrees=1.0, axis=(0, 0, 0)), ValueError, "axis: "),
        (lambda: apps.edit_objects(model, "retime", shift=2.0), ValueError, "shift: "), (lambda: apps.edit_objects(model, "retime", shift=0.1, outside="wrap"), ValueError, "outside: "),
        (lambda: apps.edit_appearance(apps.edit_objects(model, "delete"), 0.0, torch.zeros(H, W, 3)), TypeError, "model: "),
        (lambda: apps.edit_appearance(model, 0.0, torch.zeros(H, W)), ValueError, "image: "), (lambda: apps.edit_appearance(model, 0.0, torch.full((H, W, 3), 255.0)), ValueError, "image: "),
        (lambda: apps.edit_appearance(model, 1.5, torch.zeros(H, W, 3)), ValueError, "frame_time: "), (lambda: apps.edit_appearance(model, 0.0, torch.zeros(H, W, 3), steps=0), ValueError, "steps: "),
        (lambda: apps.stereo(model, width=W, height=H, method="turn"), ValueError, "method: "), (lambda: apps.stereo(model, width=W, height=H, convergence=0.0), ValueError, "convergence: "),
        (lambda: apps.stereo(model.at(0.0), width=W, height=H, times=[0.0]), ValueError, "times: "), (lambda: apps.anaglyph(torch.zeros(2, 2, 3), torch.zeros(2, 3, 3)), ValueError, "right: "),
        (lambda: apps.anaglyph(torch.zeros(2, 2, 3), torch.zeros(2, 2, 3), "color"), ValueError, "did you mean 'colour'"),
        (lambda: apps.side_by_side(torch.zeros(2, 2, 3).byte(), torch.zeros(2, 2, 3).byte()), TypeError, "left: "),
        (lambda: apps.track_points(model, torch.tensor([[5.0, 1, 1]]), W, H), ValueError, "frame"), (lambda: apps.track_points(model, torch.tensor([[0.0, 99, 1]]), W, H), ValueError, "x in"),
        (lambda: apps.track_points(model, torch.zeros(1, 2), W, H), ValueError, "queries: "), (lambda: apps.novel_view(model, eye), ValueError, "width: "),
        (lambda: apps.novel_view(model, 2 * eye, W, H), ValueError, "rigid"), (lambda: apps.novel_view(model, -eye, W, H), ValueError, "rigid"),
        (lambda: apps.novel_view(model, eye, W, H, times=[0, 1]), ValueError, "times: "), (lambda: apps.orbit_path(0), ValueError, "views: "), (lambda: apps.stereo_check(8), ValueError, "height: "),
        (lambda: apps.recolour(torch.zeros(1, 2, 2, 3), torch.zeros(1, 3, 2, dtype=torch.bool)), ValueError, "masks: "),
    ):
        with pytest.raises(kind, match=words):
            call()


# Whole.


def test_an_edit_spreads():
    scores = apps.edit_check(steps=30, frames=3, size=24, arm="hermite_curv")
    assert scores["propagated"] > scores["unedited"] and scores["propagated_disc"] > scores["unedited_disc"] + 3


def test_the_program(tmp_path, capsys, monkeypatch):
    from papers10.core.config import ConfigError
    from papers10.core.media import read_video, write_video

    monkeypatch.chdir(tmp_path)
    write_video("clip.gif", disc_clip(5, 24).scene.frames, 10)
    small = ["--frames", "5", "--size", "24", "--steps", "3", "--primitives", "40", "--scene", "kept.safetensors"]
    for line, frames in (("interpolate clip.gif --factor 2 --out a.gif", 9), ("depth clip.gif --out b.gif --height 12", 5), ("stereo clip.gif --out c.gif --fps 5", 5),
                         ("edit clip.gif translate --polygon 0,0|24,0|24,24|0,24 --offset 0.1,0,0 --out d.gif", 5), ("view clip.gif --out e.gif", 5)):
        arguments = [word.replace("|", " ") for word in line.split()]
        assert app.main([*arguments, *small]) == 0
        out = arguments[arguments.index("--out") + 1]
        assert len(read_video(out).frames) == frames and out in capsys.readouterr().out
    assert (tmp_path / "kept.safetensors").exists() and read_video("b.gif").frames.shape[1] == 12
    for line, words in (("depth clip.gif --out x.avi", "--out"), ("depth clip.gif --out nowhere/x.gif", "folder"), ("depth none.gif --out x.gif", "none.gif"), ("depth clip.gif --cmap viridi --out x.gif", "--cmap"),
                        ("stereo clip.gif --show both --out x.gif", "--show"), ("edit clip.gif scale --out x.gif", "--factor"), ("edit clip.gif delete --factor 2 --out x.gif", "--factor"),
                        ("edit clip.gif translate --offset 1,2 --out x.gif", "--offset"), ("depth other.gif --out x.gif --scene kept.safetensors", "scene of clip.gif")):
        with pytest.raises(ConfigError, match=words):
            app.main(line.split())
    with pytest.raises(ConfigError, match="--device"):
        app.main(["depth", "clip.gif", "--out", "x.gif", "--device", "gpu"])
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="0 GPUs"):
            app.main(["depth", "clip.gif", "--out", "x.gif", "--device", "cuda"])
