"""What moves at any time: symmetries of global motion tracking, thresholds, aggregation, the experiment, refusals."""

import pytest
import torch

from papers10.kernels.motion_peak import motion_peak
from papers10.neoverse.gaussians4d import oracle_gaussians
from papers10.neoverse.separation import (
    aggregate,
    automatic_threshold,
    noisy_room,
    separate,
    separation_trial,
    speed_maps,
)
from papers10.neoverse.world import SceneSpec, scene_clip


@pytest.fixture(scope="module")
def room():
    spec = SceneSpec.random(4, "arrive")
    clip = scene_clip(spec, torch.linspace(0, 1, 5), 24, 18)
    scene = oracle_gaussians(spec, clip)
    return clip, scene, speed_maps(scene.velocity_forward, scene.velocity_backward).reshape(clip.depth.shape)


def test_what_arrives_is_found_in_later_frames(room):
    clip, scene, speeds = room
    later = (scene.key == 4) & (clip.ids.reshape(-1) >= 0)
    tracked, _ = separate(scene, clip.cameras, clip.depth, speeds, 0.05)
    instant, _ = separate(scene, clip.cameras, clip.depth, speeds, 0.05, mode="instant")
    assert float(tracked[later].float().mean()) < 0.2 and bool(instant[later].all())


def test_the_automatic_threshold_follows_the_scene(room):
    clip, scene, speeds = room
    assert automatic_threshold(clip.depth) == pytest.approx(0.02 * float(clip.depth.median()))
    near, _ = separate(scene, clip.cameras, clip.depth, speeds)
    far = scene.replace(gaussians=scene.gaussians.replace(means=10 * scene.gaussians.means))
    views = clip.cameras.viewmats.clone()
    views[:, :3, 3] *= 10
    scaled, _ = separate(far, clip.cameras._replace(viewmats=views), 10 * clip.depth, 10 * speeds, occlusion_tol=0.5)
    assert float((near == scaled).float().mean()) > 0.999


def test_more_frames_never_lower_the_peak_and_tolerance_is_monotone(room):
    clip, scene, speeds = room
    means, key, cameras = scene.gaussians.means, scene.key, clip.cameras
    peak = lambda frames, tol: motion_peak(means, torch.where(key < frames, key, -1), cameras.viewmats[:frames], cameras.Ks[:frames], clip.depth[:frames], speeds[:frames], tol)
    assert bool((peak(5, 0.05) >= peak(3, 0.05)).all()) and bool((peak(5, 0.2) >= peak(5, 0.05)).all())


def test_a_still_room_under_a_still_camera_has_no_motion():
    spec = SceneSpec.random(1, "static")
    clip = scene_clip(spec, [0.0, 0.5], 16, 12)
    scene = oracle_gaussians(spec, clip)
    static, peak = separate(scene, clip.cameras, clip.depth, speed_maps(scene.velocity_forward, None).reshape(clip.depth.shape))
    assert bool(static.all()) and float(peak.max()) < 1e-6


def test_aggregation_keeps_everything_and_merging_keeps_the_background(room):
    clip, scene, speeds = room
    static, _ = separate(scene, clip.cameras, clip.depth, speeds, 0.05)
    whole = aggregate(scene, static)
    assert len(whole) == len(scene) and len(whole.constant()) == int(static.sum())
    assert len(whole.at(0.3, extrapolate="empty")) > len(whole.constant())
    merged = aggregate(scene, static, voxel=0.2)
    assert len(merged.constant()) < len(whole.constant()) and len(merged.index(merged.key >= 0)) == int((~static).sum())
    merged.check()
    trusted = scene.replace(confidence=torch.full_like(scene.life, 3.0))
    assert torch.allclose(aggregate(trusted, static, voxel=0.2).confidence, torch.tensor(3.0))
    again, _ = separate(whole, clip.cameras, clip.depth, speeds, 0.05)
    assert bool(again[whole.key < 0].all())


def test_methods_are_the_functions(room):
    clip, scene, speeds = room
    static, peak = scene.separate(clip.cameras, clip.depth, speeds, speed_threshold=0.05)
    other, same = separate(scene, clip.cameras, clip.depth, speeds, 0.05)
    assert torch.equal(static, other) and torch.equal(peak, same) and len(scene.aggregate(static)) == len(scene)


def test_noise_is_seeded_and_leaves_the_ends_alone():
    spec = SceneSpec.random(2)
    clip = scene_clip(spec, [0.0, 0.5, 1.0], 12, 8)
    one, depth = noisy_room(spec, clip, 3, depth_noise=0.01, velocity_noise=0.01)
    two, _ = noisy_room(spec, clip, 3, depth_noise=0.01, velocity_noise=0.01)
    assert torch.equal(one.velocity_forward, two.velocity_forward) and not torch.equal(depth, clip.depth)
    assert float(one.velocity_forward[one.key == 2].abs().max()) == 0 and float(one.velocity_backward[one.key == 0].abs().max()) == 0


def test_the_experiment_is_reproducible():
    first = separation_trial("arrive", 100, scenes=1, frames=5, width=24, height=18)
    assert first == separation_trial("arrive", 100, scenes=1, frames=5, width=24, height=18)
    assert first["gmt.iou"] > first["instant.iou"] and first["gmt.ghost"] < first["instant.ghost"]


@pytest.mark.parametrize(("change", "word"), [({"mode": "never"}, "mode"), ({"speed_threshold": "high"}, "speed_threshold"), ({"speed_threshold": -1.0}, "speed_threshold"), ({"occlusion_tol": -1.0}, "occlusion_tol")])
def test_refusals(room, change, word):
    clip, scene, speeds = room
    with pytest.raises(ValueError, match=word):
        separate(scene, clip.cameras, clip.depth, speeds, **change)


def test_more_refusals(room):
    clip, scene, speeds = room
    with pytest.raises(ValueError, match="cameras"):
        separate(scene, clip.cameras.index([0]), clip.depth, speeds)
    for name in ("depths", "speeds"):
        maps = {"depths": clip.depth.clone(), "speeds": speeds.clone()}
        maps[name][1, 0, 0] = float("nan")
        with pytest.raises(ValueError, match=name):
            separate(scene, clip.cameras, **maps)
    with pytest.raises(ValueError, match="key"):
        motion_peak(scene.gaussians.means, scene.key - 2, clip.cameras.viewmats, clip.cameras.Ks, clip.depth, speeds)
    with pytest.raises(ValueError, match="velocity_forward"):
        speed_maps(None, None)
    with pytest.raises(ValueError, match="depths"):
        automatic_threshold(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="static_mask"):
        aggregate(scene, torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="static_mask"):
        aggregate(scene, torch.ones(len(scene)))
