"""The reconstructor's losses, batches of rooms, and the experiment on opacity."""

import math
from dataclasses import fields

import pytest
import torch
from torch.autograd import gradcheck

from papers10.core.random import generator, seeded
from papers10.neoverse.gaussians4d import oracle_gaussians, render_4d
from papers10.neoverse.losses import (
    OPACITY_ARMS,
    ReconstructionLoss,
    camera_loss,
    depth_loss,
    displacements,
    gradient_loss,
    motion_loss,
    opacity_loss,
    opacity_trial,
    room_batch,
    seen_by_keys,
)
from papers10.neoverse.reconstructor import NeoVerseReconstructor, ReconstructorConfig
from papers10.neoverse.world import SceneSpec, scene_clip, scene_flow
from papers10.splat.cameras import unproject

SMALL = {"patch_size": 4, "dim": 32, "num_heads": 2, "head_channels": (8, 8, 8, 8), "head_features": 16, "head_hidden": 8, "camera_heads": 2, "gaussian_hidden": 8}


def rooms(seeds=(0,), keys=2, **options):
    return room_batch(list(seeds), keys, 16, 12, **options)


def noise(*shape, dtype=torch.float64):
    return torch.rand(*shape, generator=generator(0, "noise"), dtype=dtype)


def test_camera_loss_by_hand():
    target = torch.zeros(1, 2, 9)
    first, second = target.clone(), target.clone()
    first[..., 0], second[..., 3], second[..., 8] = 3.0, 0.4, 0.6
    expected = (0.6 * (3.0 / 3) + (0.4 / 4 + 0.5 * 0.6 / 2)) / 2
    assert float(camera_loss([first, second], target)) == pytest.approx(expected, rel=1e-6)
    assert float(camera_loss([target], target)) == 0
    far = target.clone()
    far[..., 0] = 1e6
    assert float(camera_loss([far], target)) == pytest.approx(100 / 3, rel=1e-6)


def test_depth_loss_by_hand():
    target, mask = torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)
    depth = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    # Plain: 1/4. Slopes at full size: 2 of 4 pixels' worth; at every 2nd, 4th, 8th pixel a single pixel has none.
    assert float(depth_loss(depth, target, mask)) == pytest.approx(0.25 + 0.5 / 4, rel=1e-6)
    sure = torch.full_like(depth, 2.0)
    assert float(depth_loss(depth, target, mask, sure)) == pytest.approx(0.25 + 0.125 + 0.5 - 0.2 * math.log(2), rel=1e-6)
    assert float(depth_loss(target, target, mask, sure)) == pytest.approx(-0.2 * math.log(2), rel=1e-6)


def test_best_confidence_is_alpha_over_error():
    depth, target, mask = torch.full((1, 4, 4), 0.05), torch.zeros(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    at = lambda value: float(depth_loss(depth, target, mask, torch.full((1, 4, 4), value)))
    assert at(4.0) < at(3.9) and at(4.0) < at(4.1)


def test_masked_pixels_do_not_matter():
    depth, target, mask = noise(1, 6, 8), noise(1, 6, 8) + 1, noise(1, 6, 8) > 0.5
    spoiled = torch.where(mask, depth, torch.nan)
    for values in (depth, spoiled):
        values.requires_grad_()
    a, b = depth_loss(depth, target, mask), depth_loss(spoiled, target, mask)
    assert float(a.detach()) == pytest.approx(float(b.detach()))
    b.backward()
    assert bool((spoiled.grad[~mask] == 0).all())
    assert float(depth_loss(depth.detach(), target, torch.zeros_like(mask))) == 0


def test_gradient_loss_ignores_a_constant():
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    assert float(gradient_loss(torch.full((2, 8, 8), 5.0), mask)) == 0
    ramp = torch.arange(8.0).expand(2, 8, 8)
    assert float(gradient_loss(ramp, mask, scales=1)) == pytest.approx(7 / 8)


def test_motion_loss_by_hand():
    velocity, target, mask = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 2, dtype=torch.bool)
    velocity[0, 0, 0] = torch.tensor([3.0, 4.0, 0.0])
    assert float(motion_loss(velocity, target, mask)) == pytest.approx(2.5)
    assert float(motion_loss(velocity, target, mask, kind="squared", typical=5.0)) == pytest.approx(0.5)
    assert float(motion_loss(velocity, target, mask, weights=torch.tensor([[[3.0, 1.0]]]))) == pytest.approx(15 / 4)
    assert float(motion_loss(velocity, target, mask, weights=torch.tensor([[[3e-3, 1e-3]]]))) == pytest.approx(15 / 4)
    assert float(motion_loss(velocity, target, mask, weights=torch.zeros(1, 1, 2))) == 0
    still = torch.zeros(1, 1, 2, 3, requires_grad=True)
    for counts in (mask, ~mask):
        still.grad = None
        motion_loss(still, target, counts).backward()
        assert bool(torch.isfinite(still.grad).all())


def test_opacity_loss():
    assert float(opacity_loss(torch.tensor([0.25, 1.0]))) == pytest.approx(0.375)


def test_gradients():
    target, mask = noise(1, 3, 4) + 2, noise(1, 3, 4) > 0.2
    assert gradcheck(lambda d, c: depth_loss(d, target, mask, c + 1), (noise(1, 3, 4).requires_grad_(), noise(1, 3, 4).requires_grad_()))
    goal = noise(1, 3, 4, 3) + 2
    assert gradcheck(lambda v: motion_loss(v, goal, mask), (noise(1, 3, 4, 3).requires_grad_(),))
    assert gradcheck(lambda v: motion_loss(v, goal, mask, kind="squared"), (noise(1, 3, 4, 3).requires_grad_(),))
    assert gradcheck(lambda v: camera_loss([v, v * 2], noise(1, 2, 9) + 3), (noise(1, 2, 9).requires_grad_(),))


def test_displacements_follow_the_scene():
    spec = SceneSpec.random(1, motion="linear")
    clip = scene_clip(spec, [0.0, 0.5], 16, 12, dtype=torch.float64)
    there = displacements(spec, clip, 1)
    world = clip.world[0] + there[0] @ clip.camtoworlds[0, :3, :3].T
    torch.testing.assert_close(world, scene_flow(spec, clip.world[0], clip.ids[0], 0.0, 0.5), atol=1e-12, rtol=0)
    assert not there[1].any() and not displacements(spec, clip, -1)[0].any()
    assert not there[0][clip.ids[0] < 0].any() and there[0][clip.ids[0] >= 0].norm(dim=-1).min() > 0


def test_every_key_frame_sees_itself_and_only_what_is_there():
    spec = SceneSpec.random(2, motion="static")
    clip = scene_clip(spec, [0.0, 1.0], 16, 12)
    depth, poses, Ks = clip.depth[None], clip.camtoworlds[None], clip.Ks[None]
    seen = seen_by_keys(depth, poses, Ks, depth, poses, Ks)
    assert bool(seen.all())
    one = (depth[:, :1] + 1.0, poses[:, :1], Ks[:, :1], depth[:, :1], poses[:, :1], Ks[:, :1])
    assert not bool(seen_by_keys(*one).any())
    away = poses.clone()
    away[..., :3, :3] = away[..., :3, :3] @ torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    assert not bool(seen_by_keys(depth, poses, Ks, depth, away, Ks).any())


def test_both_conditions_hold_in_one_frame():
    """A point inside the picture of one key frame and of the right depth only in another does not count."""
    eye = torch.eye(4).expand(1, 2, 4, 4).clone()
    eye[0, 1, 0, 3] = 100.0
    K = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(1, 2, 3, 3)
    view = torch.full((1, 1, 8, 8), 2.0)
    keys = torch.stack([torch.full((8, 8), 5.0), torch.full((8, 8), 2.0)])[None]
    assert not bool(seen_by_keys(view, eye[:, :1], K[:, :1], keys, eye, K).any())


def test_batches():
    batch = rooms((0, 1), keys=3)
    assert batch.frames.shape == (2, 5, 3, 12, 16) and batch.images.shape == (2, 3, 3, 12, 16) and batch.flow_forward.shape == (2, 3, 12, 16, 3)
    assert bool((batch.times.diff(dim=1) > 0).all()) and batch.times.dtype == torch.float64
    torch.testing.assert_close(batch.camtoworlds[:, 0], torch.eye(4).expand(2, 4, 4), atol=1e-6, rtol=0)
    points = unproject(batch.depth[:, ::2], *batch.key_cameras).norm(dim=-1)
    torch.testing.assert_close(points.mean((1, 2, 3)), torch.ones(2), atol=1e-4, rtol=0)
    again = rooms((0, 1), keys=3)
    assert all(torch.equal(getattr(batch, item.name), getattr(again, item.name)) for item in fields(batch))
    assert not bool(batch.is_static.any()) and bool(rooms(motion="static").is_static.all())
    wide = batch.to(torch.float64)
    assert wide.depth.dtype == torch.float64 and wide.valid.dtype == torch.bool
    half = batch.to(torch.float16)
    assert half.frames.dtype == torch.float16
    assert all(torch.equal(getattr(half, item.name), getattr(batch, item.name)) for item in fields(batch) if item.name != "frames")


def test_time_reversal():
    batch = rooms(keys=3, reverse=0.0, normalize=False)
    back = batch.reversed()
    torch.testing.assert_close(back.flow_forward[:, 0], batch.flow_backward[:, 2])
    torch.testing.assert_close(back.frames[:, 0], batch.frames[:, 4])
    assert not bool(back.flow_forward[:, -1].any()) and not bool(back.flow_backward[:, 0].any())
    always = rooms(keys=3, reverse=1.0, normalize=False)
    torch.testing.assert_close(always.frames, back.frames)
    torch.testing.assert_close(rooms(keys=3, reverse=1.0).depth, back.normalized().depth)


def test_still_camera():
    batch = rooms(keys=2, still_camera=True)
    torch.testing.assert_close(batch.camtoworlds, torch.eye(4).expand(1, 3, 4, 4), atol=1e-6, rtol=0)


def test_oracle_beats_an_untrained_model():
    batch = rooms(motion="linear", reverse=0.0)
    model = seeded(0, "model", lambda: NeoVerseReconstructor(ReconstructorConfig.tiny(**SMALL)))
    out = model(batch.images, batch.key_times, batch.is_static, cameras=batch.key_cameras)
    total, terms = ReconstructionLoss()(out, batch)
    assert set(terms) == {"camera", "depth", "gs_depth", "motion", "photometric", "opacity", "rendered_depth"}
    weights = {"camera": 5.0, "opacity": 0.1}
    assert float(total.detach()) == pytest.approx(sum(weights.get(name, 1.0) * float(value.detach()) for name, value in terms.items()), rel=1e-5)
    total.backward()
    assert model.velocity_backward_head.last[2].weight.grad.abs().sum() > 0
    spec = SceneSpec.random(0, motion="linear")
    clip = scene_clip(spec, [0.0, 0.5, 1.0], 16, 12)
    view = render_4d(oracle_gaussians(spec, clip.index(slice(None, None, 2))), clip.cameras, clip.times)
    assert float((view.color - clip.rgb).square().mean()) < float(terms["photometric"].detach())


def test_parts_can_be_left_out():
    batch = rooms()
    model = seeded(0, "model", lambda: NeoVerseReconstructor(ReconstructorConfig.tiny(**SMALL)))
    out = model(batch.images, batch.key_times, motion=False)
    _, terms = ReconstructionLoss(rendering=False)(out, batch)
    assert set(terms) == {"camera", "depth", "gs_depth"}
    marks = []
    ReconstructionLoss(compare=lambda a, b: marks.append(a.shape) or (a - b).abs().mean())(out, batch)
    assert marks == [torch.Size([3, 12, 16, 3])]


def test_opacity_experiment_at_small_size():
    results = {arm: opacity_trial(arm, 100, steps=120, width=32, height=16) for arm in OPACITY_ARMS}
    assert results["none"]["alpha_dark"] < 0.6
    assert results["regularised"]["alpha_dark"] > 0.9
    assert results["regularised"]["psnr_white"] > results["none"]["psnr_white"] + 5
    assert all(math.isfinite(value) for result in results.values() for value in result.values())
    assert opacity_trial("none", 100, steps=2, width=8, height=8) == opacity_trial("none", 100, steps=2, width=8, height=8)


def test_refusals():
    depth, mask = torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)
    cases = [
        (lambda: camera_loss([], torch.zeros(1, 2, 9)), ValueError, "cam_seq"),
        (lambda: camera_loss([torch.zeros(1, 3, 9)], torch.zeros(1, 2, 9)), ValueError, r"cam_seq\[0\]"),
        (lambda: depth_loss(depth, torch.zeros(1, 2, 3), mask), ValueError, "target"),
        (lambda: depth_loss(depth, depth, depth), TypeError, "mask"),
        (lambda: motion_loss(torch.zeros(2, 3), torch.zeros(3, 3), torch.ones(2, dtype=torch.bool)), ValueError, "target"),
        (lambda: motion_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, dtype=torch.bool), kind="l3"), ValueError, "kind"),
        (lambda: room_batch([], 2), ValueError, "seeds"),
        (lambda: room_batch([0], 1), ValueError, "keys"),
        (lambda: room_batch([0], 2, span=0.0), ValueError, "span"),
        (lambda: ReconstructionLoss(camera=-1.0), ValueError, "camera"),
        (lambda: opacity_trial("some", 0), ValueError, "arm"),
        (lambda: rooms().__class__(**{**{item.name: getattr(rooms(), item.name) for item in fields(rooms())}, "valid": torch.zeros(1, 3, 12, 16, dtype=torch.bool)}).normalized(), ValueError, "valid"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    batch = rooms()
    model = seeded(0, "model", lambda: NeoVerseReconstructor(ReconstructorConfig.tiny(**SMALL)))
    with torch.no_grad():
        out = model(batch.frames, batch.times)
    with pytest.raises(ValueError, match="key frames"):
        ReconstructionLoss()(out, batch)
