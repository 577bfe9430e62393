"""Gaussians in space and time: known values, edges of time, symmetries, gradients, files, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.neoverse.gaussians4d import (
    Gaussians4D,
    between_frames,
    life_span_opacity,
    motion_errors,
    oracle_gaussians,
    pixel_gaussians,
    render_4d,
    transition,
    with_motion,
)
from papers10.neoverse.world import SceneSpec, scene_clip
from papers10.splat.gaussians import Gaussians


def made(per_key=4, keys=3, seed=0, motion=True, life=True):
    draw = torch.Generator().manual_seed(seed)
    n = per_key * keys
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=draw)
    own = Gaussians(normal(n, 3), normal(n, 4), 0.1 + normal(n, 3).abs(), normal(n).sigmoid(), colors=normal(n, 3).sigmoid())
    moves = {name: 0.3 * normal(n, 3) for name in ("velocity_forward", "velocity_backward", "angular_forward", "angular_backward")} if motion else {}
    return Gaussians4D(own, torch.arange(keys).repeat_interleave(per_key), torch.tensor([0.0, 1.0, 3.0][:keys], dtype=torch.float64), **moves,
                       life=normal(n).sigmoid() if life else None).check()


@pytest.mark.parametrize(("life", "expected"), [(0.0, (0.0821, 0.00674, 0.000553)), (0.5, (0.535, 0.0821, 0.00361)), (0.9, (0.99999, 0.99028, 0.569)), (0.119, (0.126, 0.0105, 0.00074))])
def test_life_spans_of_the_specification(life, expected):
    left = life_span_opacity(torch.ones(3, dtype=torch.float64), torch.full((3,), life, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert torch.allclose(left, torch.tensor(expected, dtype=torch.float64), rtol=6e-3)


def test_a_life_span_of_one_never_fades_and_none_has_passed_at_zero():
    one = torch.ones(1, dtype=torch.float64)
    assert float(life_span_opacity(one, one, 0.999)) == 1 and float(life_span_opacity(0.3 * one, 0 * one, 0.0)) == 0.3


def test_at_a_key_frame_it_is_drawn_unchanged_and_alone():
    scene = made()
    for number, t in enumerate(scene.key_times.tolist()):
        there = scene.at(t)
        for name, value in there.tensors().items():
            assert torch.equal(value, scene.gaussians.tensors()[name][scene.key == number])


def test_between_key_frames_by_hand():
    scene = made()
    there = scene.at(2.5)
    early, late = scene.key == 1, scene.key == 2
    assert torch.allclose(there.means, torch.cat([scene.gaussians.means[early] + 0.75 * scene.velocity_forward[early], scene.gaussians.means[late] + 0.25 * scene.velocity_backward[late]]))
    faded = torch.cat([life_span_opacity(scene.gaussians.opacities[early], scene.life[early], 0.75), life_span_opacity(scene.gaussians.opacities[late], scene.life[late], 0.25)])
    assert torch.allclose(there.opacities, faded) and torch.equal(there.scales, scene.gaussians.scales[early | late])


def test_a_turn_by_hand():
    own = Gaussians(torch.zeros(1, 3), torch.tensor([[1.0, 0, 0, 0]]), torch.ones(1, 3), torch.ones(1), colors=torch.ones(1, 3))
    scene = Gaussians4D(own, torch.tensor([0]), torch.tensor([0.0, 2.0], dtype=torch.float64), angular_forward=torch.tensor([[0.0, 0, math.pi / 2]]))
    assert torch.allclose(scene.at(1.0).quats, torch.tensor([[0.92388, 0, 0, 0.38268]]), atol=1e-5)


def test_nearest_takes_the_earlier_of_equals_at_full_opacity():
    scene = made()
    assert torch.equal(scene.at(0.5, "nearest").opacities, scene.gaussians.opacities[scene.key == 0])
    assert torch.equal(scene.at(0.51, "nearest").opacities, scene.gaussians.opacities[scene.key == 1])
    assert not torch.equal(scene.at(0.5, "nearest", decay_single=True).opacities, scene.gaussians.opacities[scene.key == 0])


def test_outside_the_key_frames():
    scene = made()
    for t, number, side in ((-0.5, 0, -1), (4.0, 2, 1)):
        rows = scene.key == number
        assert torch.equal(scene.at(t).means, scene.gaussians.means[rows])
        assert len(scene.at(t, extrapolate="empty")) == 0
        inward = scene.velocity_forward if side < 0 else scene.velocity_backward
        assert torch.allclose(scene.at(t, extrapolate="linear").means, scene.gaussians.means[rows] - 0.5 * inward[rows])
        assert torch.equal(scene.at(t, extrapolate="linear").opacities, scene.gaussians.opacities[rows])


def test_a_single_key_frame_is_held_and_constant_ones_are_always_there():
    scene = made(keys=1)
    assert torch.equal(scene.at(17.0).means, scene.gaussians.means)
    mixed = made().replace(key=torch.where(torch.arange(12) % 2 == 0, -1, made().key))
    assert all(bool((mixed.at(t, extrapolate="empty").means[:6] == mixed.gaussians.means[::2]).all()) for t in (-9.0, 0.0, 0.3, 9.0))
    assert len(mixed.constant()) == 6


def test_without_velocities_nothing_moves_and_opacity_is_held():
    scene = made(motion=False)
    there = scene.at(0.4)
    assert torch.equal(there.means, scene.gaussians.means[scene.key < 2]) and torch.equal(there.opacities, scene.gaussians.opacities[scene.key < 2])
    assert bool((scene.at(0.4, hold_opacity=False).opacities < there.opacities).all())


def test_a_window_of_one_is_both_and_a_wider_one_chains():
    scene = made(keys=3)
    assert all(torch.equal(a, b) for a, b in zip(scene.at(0.4, "window").tensors().values(), scene.at(0.4).tensors().values()))
    wide = scene.at(0.4, "window", window=2)
    assert len(wide) == 12
    still = scene.replace(velocity_forward=torch.zeros_like(scene.velocity_forward), velocity_backward=torch.zeros_like(scene.velocity_backward))
    assert torch.equal(still.at(0.4, "window", window=2).means, scene.gaussians.means)
    # The life span is spread over the window.
    assert bool((wide.opacities[:4] >= scene.at(0.4).opacities[:4]).all())


@given(scale=st.floats(0.01, 100), shift=st.floats(-50, 50), part=st.floats(0.01, 0.99), number=st.integers(0, 1))
@settings(max_examples=30, deadline=None)
def test_the_unit_and_the_origin_of_time_do_not_matter(scale, shift, part, number):
    scene = made()
    t = float(scene.key_times[number] + part * (scene.key_times[number + 1] - scene.key_times[number]))
    there = scene.replace(key_times=scale * scene.key_times + shift).at(scale * t + shift)
    assert torch.allclose(there.means, scene.at(t).means, atol=1e-7) and torch.allclose(there.opacities, scene.at(t).opacities, atol=1e-6)


def test_time_backwards_draws_the_same_pictures():
    spec = SceneSpec.random(2)
    clip = scene_clip(spec, [0.0, 0.5, 1.0], 16, 12, dtype=torch.float64)
    scene = oracle_gaussians(spec, clip)
    for t in (0.1, 0.5, 0.8):
        assert torch.allclose(render_4d(scene, clip.cameras.index([0]), [t]).color, render_4d(scene.reversed(), clip.cameras.index([0]), [-t]).color, atol=1e-9)


def test_exact_linear_motion_meets_from_both_sides():
    spec = SceneSpec.random(1, "linear")
    spec = spec.__class__(**{**spec.__dict__, "yaws": spec.yaws * 0})
    clip = scene_clip(spec, [0.0, 0.5], 24, 18, dtype=torch.float64)
    scene = oracle_gaussians(spec, clip)
    from papers10.neoverse.world import scene_flow

    for part in (0.2, 0.7):
        there = scene.at(0.5 * part, decay=False).means
        true = torch.cat([scene_flow(spec, clip.world[number], clip.ids[number], 0.5 * number, 0.5 * part).reshape(-1, 3) for number in range(2)])
        assert torch.allclose(there, true, atol=1e-9)


def test_gradients_reach_everything():
    scene = made(per_key=2, keys=2)
    leaves = [scene.gaussians.means, scene.gaussians.quats, scene.gaussians.opacities, scene.velocity_forward, scene.velocity_backward, scene.angular_forward, scene.life, torch.tensor(0.4, dtype=torch.float64)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]

    def there(means, quats, opacities, forward, backward, angular, life, t):
        moved = scene.replace(gaussians=scene.gaussians.replace(means=means, quats=quats, opacities=opacities), velocity_forward=forward, velocity_backward=backward, angular_forward=angular, life=life)
        found = moved.at(t)
        return found.means, found.quats, found.opacities

    assert torch.autograd.gradcheck(there, leaves)


def test_files_give_back_every_bit(tmp_path):
    scene = made()
    again = Gaussians4D.load(scene.save(tmp_path / "scene"))
    assert all(torch.equal(a, b) for a, b in zip(scene._own().values(), again._own().values()))
    assert all(torch.equal(a, b) for a, b in zip(scene.gaussians.tensors().values(), again.gaussians.tensors().values()))
    assert again.gamma == scene.gamma and torch.equal(again.key_times, scene.key_times)


def test_rows_devices_and_joining():
    scene = made()
    mask = scene.key == 1
    assert len(scene.cull(mask)) == 4 and scene.to(torch.float32).key_times.dtype == torch.float64
    joined = Gaussians4D.cat([scene.index(mask), scene.index(~mask)])
    assert torch.equal(joined.at(2.5).means.sort(0).values, scene.at(2.5).means.sort(0).values)
    assert scene.num_bytes() > scene.gaussians.num_bytes() and scene.detach().check()


def test_an_empty_scene_is_background():
    scene = made().index(slice(0, 0))
    clip = scene_clip(SceneSpec.random(0), [0.0], 6, 4, dtype=torch.float64)
    drawn = render_4d(scene, clip.cameras, [0.2], backgrounds=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    assert torch.allclose(drawn.color[0, 0, 0], torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)) and float(drawn.alpha.max()) == 0 and float(drawn.depth.max()) == 0


def test_a_time_for_each_view():
    spec = SceneSpec.random(2)
    clip = scene_clip(spec, [0.0, 1.0], 12, 8)
    scene = oracle_gaussians(spec, clip)
    cameras = clip.cameras.index([0, 1, 0])
    whole = render_4d(scene, cameras, [0.2, 0.6, 0.2])
    for view, t in enumerate((0.2, 0.6, 0.2)):
        assert torch.allclose(whole.color[view], render_4d(scene, cameras.index([view]), [t]).color[0], atol=1e-6)
    assert whole.meta["counts"] == [len(scene)] * 3


def test_an_identity_render_hits_its_own_pixels_only_with_half_integer_centres():
    clip = scene_clip(SceneSpec.random(6), [0.0], 32, 24)
    error = {}
    for centre in (0.5, 0.0):
        scene = pixel_gaussians(clip.rgb, clip.depth, clip.camtoworlds, clip.Ks, [0.0], scale=0.2, opacity=0.99, pixel_center=centre)
        error[centre] = float((render_4d(scene, clip.cameras, [0.0]).color - clip.rgb).abs().mean())
    assert error[0.5] < 0.6 * error[0.0]


def test_models_of_motion():
    scene = made()
    inner = scene.key == 1
    assert torch.equal(with_motion(scene, "reflected").velocity_backward[inner], -scene.velocity_forward[inner])
    assert torch.equal(with_motion(scene, "reflected").velocity_forward[scene.key == 2], -scene.velocity_backward[scene.key == 2])
    assert torch.allclose(with_motion(scene, "average").velocity_forward[inner], (scene.velocity_forward - scene.velocity_backward)[inner] / 2)
    assert float(with_motion(scene, "none").velocity_forward.abs().max()) == 0 and with_motion(scene, "bidirectional") is scene
    assert transition(scene, 0.3).means.equal(scene.at(0.3).means)


def test_trials_are_reproducible_and_ordered():
    errors = motion_errors("arrive", 100, scenes=2, width=24, height=18)
    assert errors == motion_errors("arrive", 100, scenes=2, width=24, height=18)
    assert errors["bidirectional.backward"] < 0.5 * errors["reflected.backward"] and errors["bidirectional.forward"] == errors["reflected.forward"]
    frames = between_frames("bidirectional", 100, scenes=1, keys=3, between=1, width=24, height=18)
    assert frames == between_frames("bidirectional", 100, scenes=1, keys=3, between=1, width=24, height=18) and frames["whole"] > 10


BAD = {
    "key:": lambda s: s.replace(key=s.key + 5),
    "life": lambda s: s.replace(life=s.life + 1),
    "gamma": lambda s: s.replace(gamma=-1.0),
    "velocity_forward": lambda s: s.replace(velocity_forward=s.velocity_forward[:, :2]),
    "velocity_backward": lambda s: s.replace(velocity_backward=s.velocity_backward * math.nan),
}


@pytest.mark.parametrize("word", BAD)
def test_check_refuses(word):
    with pytest.raises(ValueError, match=word):
        BAD[word](made()).check()


@pytest.mark.parametrize("times", [[0.0, 0.0, 1.0], [1.0, 0.0, 0.5], [0.0, math.nan, 1.0]])
def test_times_that_do_not_increase_are_refused_at_once(times):
    with pytest.raises(ValueError, match="key_times"):
        made().replace(key_times=torch.tensor(times, dtype=torch.float64))
    with pytest.raises(TypeError, match="key_times"):
        made().replace(key_times=torch.arange(3.0))


def test_poses_that_are_not_rigid_are_refused():
    clip = scene_clip(SceneSpec.random(0), [0.0], 4, 4)
    with pytest.raises(ValueError, match="camtoworlds"):
        pixel_gaussians(clip.rgb, clip.depth, clip.camtoworlds * torch.tensor([1.5, 1.5, 1.5, 1.0])[:, None], clip.Ks, [0.0])
    with pytest.raises(ValueError, match="viewmats"):
        render_4d(made().to(torch.float32), clip.cameras._replace(viewmats=clip.cameras.viewmats * torch.tensor([-1.0, 1, 1, 1])[:, None]), [0.0])


def test_the_time_has_a_gradient_outside_the_key_frames_too():
    scene = made(per_key=2, keys=2)
    for t in (-1.7, 2.9):
        assert torch.autograd.gradcheck(lambda t: scene.at(t, extrapolate="linear").means, (torch.tensor(t, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize(("change", "word"), [({"key": torch.zeros(12)}, "key"), ({"life": torch.zeros(12)}, "life")])
def test_check_refuses_dtypes(change, word):
    with pytest.raises(TypeError, match=word):
        made().replace(**change).check()


@pytest.mark.parametrize(("call", "word"), [
    (lambda s: s.at(math.nan), "t"),
    (lambda s: s.at(torch.zeros(2)), "t"),
    (lambda s: s.at(0.5, "all"), "blend"),
    (lambda s: s.at(0.5, extrapolate="wrap"), "extrapolate"),
    (lambda s: s.at(0.5, "window", window=0), "window"),
    (lambda s: Gaussians4D.cat([]), "scenes"),
    (lambda s: Gaussians4D.cat([s, s.replace(gamma=1.0)]), "scenes"),
    (lambda s: Gaussians4D.cat([s, s.replace(life=None)]), "scenes"),
    (lambda s: s.cull(torch.ones(3, dtype=torch.bool)), "mask"),
    (lambda s: with_motion(s, "magic"), "model"),
    (lambda s: render_4d(s, scene_clip(SceneSpec.random(0), [0.0], 4, 4).cameras, [0.0, 1.0]), "times"),
    (lambda s: pixel_gaussians(torch.full((1, 2, 2, 3), 7.0), torch.ones(1, 2, 2), torch.eye(4)[None], torch.eye(3)[None], [0.0]), "rgb"),
    (lambda s: pixel_gaussians(torch.ones(1, 2, 2, 3, dtype=torch.uint8), torch.ones(1, 2, 2), torch.eye(4)[None], torch.eye(3)[None], [0.0]), "rgb"),
])
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call(made())


def test_a_file_of_another_kind_is_refused(tmp_path):
    from papers10.splat.export import save_scene

    save_scene(tmp_path / "other", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="path"):
        Gaussians4D.load(tmp_path / "other")
