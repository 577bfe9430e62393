"""Camera trajectories of NeoVerse: operations, files, time, units, stabilisation, refusals."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from papers10.core.random import generator
from papers10.neoverse.trajectories import (
    EXTENSIONS,
    INTERPOLATIONS,
    OPERATIONS,
    CameraTrajectory,
    needed_zoom,
    operation_matrix,
    shake,
    stabilize,
)
from papers10.splat.cameras import Sim3, invert_poses, se3_exp

EYE = torch.eye(4, dtype=torch.float64)
STILL = {0: [{"static": {}}]}


def clip(frames=9, seed=0):
    poses = se3_exp(0.1 * torch.randn(frames, 6, generator=generator(seed, "test clip"), dtype=torch.float64))
    Ks = torch.tensor([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]).expand(frames, 3, 3)
    return poses, torch.linspace(2, 4, frames, dtype=torch.float64), Ks


def by_scipy(indices, matrices, frames):
    """SLERP and straight lines as scipy does them, the official recipe."""
    times, at = np.array(indices) / (frames - 1), np.linspace(0, 1, frames)
    turns = Slerp(times, Rotation.from_matrix([m[:3, :3] for m in matrices]))(at).as_matrix()
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, :3, :3] = turns
    for axis in range(3):
        poses[:, axis, 3] = np.interp(at, times, [m[axis, 3] for m in matrices])
    return poses


def test_hand_values_of_operations():
    c, s = math.cos(math.radians(30)), math.sin(math.radians(30))
    wanted = {
        ("pan_right", "angle"): [[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]],
        ("tilt_up", "angle"): [[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]],
        ("roll_right", "angle"): [[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    }
    for (name, key), rows in wanted.items():
        assert torch.allclose(operation_matrix(name, **{key: 30}), torch.tensor(rows, dtype=torch.float64))
    orbit = operation_matrix("orbit_right", angle=30, orbit_radius=2)
    assert torch.allclose(orbit[:3, 3], torch.tensor([2 * s, 0, 2 * (1 - c)], dtype=torch.float64))
    for name, place in {"move_left": (-0.2, 0, 0), "boom_up": (0, -0.2, 0), "push_in": (0, 0, 0.2)}.items():
        moved = operation_matrix(name, distance=0.2)[:3, 3]
        assert torch.equal(moved, torch.tensor(place, dtype=torch.float64))


@given(st.floats(-170, 170), st.floats(0, 5))
@settings(max_examples=30, deadline=None)
def test_orbit_keeps_its_centre_on_the_axis(angle, radius):
    local = invert_poses(operation_matrix("orbit_left", angle=angle, orbit_radius=radius)[None])[0]
    seen = local @ torch.tensor([0, 0, radius, 1], dtype=torch.float64)
    assert torch.allclose(seen[:3], torch.tensor([0, 0, radius], dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("pair", [("pan_left", "pan_right"), ("tilt_up", "tilt_down"), ("orbit_left", "orbit_right"), ("boom_up", "boom_down"), ("push_in", "pull_out")])
def test_opposites_undo_each_other(pair):
    assert torch.allclose(operation_matrix(pair[0]) @ operation_matrix(pair[1]), EYE, atol=1e-14)


def test_official_key_frames_give_the_official_matrices():
    operations = [("orbit_left", {"angle": 10, "orbit_radius": 1.0}), ("push_in", {"distance": 0.2}), ("tilt_up", {"angle": 5})]
    data = {"name": "tour", "mode": "relative", "num_frames": 81, "zoom_ratio": 1.0, "use_first_frame": False,
            "keyframes": [{"0": [{"static": {}}]}, {"40": [{operations[0][0]: operations[0][1]}]}, {"80": [{name: values} for name, values in operations[1:]]}]}
    first = operation_matrix(operations[0][0], **operations[0][1])
    last = first @ operation_matrix("push_in", distance=0.2) @ operation_matrix("tilt_up", angle=5)
    wanted = by_scipy([0, 40, 80], [np.eye(4), first.numpy(), last.numpy()], 81)
    # 1e-6: the official code works in float32.
    assert np.abs(CameraTrajectory.from_json(data).camtoworlds.numpy() - wanted).max() < 1e-6


def test_defaults_and_legacy_defaults():
    keyframes = [STILL, {4: [{"orbit_left": {}}]}]
    ours = CameraTrajectory.from_keyframes(keyframes, 5).camtoworlds[-1]
    old = CameraTrajectory.from_keyframes(keyframes, 5, legacy_defaults=True).camtoworlds[-1]
    assert torch.allclose(ours, operation_matrix("orbit_left", angle=15, orbit_radius=1))
    assert torch.allclose(old, operation_matrix("orbit_left", angle=30, orbit_radius=0.5))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("name", [*OPERATIONS, "roll_left", "dolly_zoom"])
def test_paths_are_rigid_and_end_where_the_operation_says(name, interpolation):
    path = CameraTrajectory.from_predefined(name, 9, interpolation=interpolation)
    turn = path.camtoworlds[:, :3, :3]
    assert torch.allclose(turn.mT @ turn, EYE[:3, :3].expand(9, 3, 3), atol=1e-12)
    assert torch.equal(path.camtoworlds[0], EYE)
    assert torch.allclose(path.camtoworlds[-1], operation_matrix(name), atol=1e-12)


def test_whole_turn_by_operations():
    path = CameraTrajectory.from_keyframes([STILL, {8: [{"orbit_right": {"angle": 360, "orbit_radius": 1}}]}], 9, interpolation="operations")
    assert torch.allclose(path.camtoworlds[4, :3, 3], torch.tensor([0, 0, 2.0], dtype=torch.float64), atol=1e-12)


def test_look_at_and_looking_at():
    path = CameraTrajectory.from_keyframes([STILL, {4: [{"move_right": {"distance": 0.5}}, {"look_at": {"target": [0, 0, 2]}}]}], 5)
    centre = torch.tensor([0, 0, 2.0, 1], dtype=torch.float64)
    assert torch.allclose((invert_poses(path.camtoworlds)[-1] @ centre)[:2], torch.zeros(2, dtype=torch.float64), atol=1e-12)
    every = invert_poses(path.looking_at([0, 0, 2]).camtoworlds) @ centre
    assert torch.allclose(every[:, :2], torch.zeros(5, 2, dtype=torch.float64), atol=1e-12)


def test_dolly_zoom_keeps_the_size_and_zoom_multiplies():
    path = CameraTrajectory.from_predefined("dolly_zoom", 9, distance=0.6, depth=2.0, interpolation="cubic")
    assert torch.allclose(path.zoom / (2.0 - path.camtoworlds[:, 2, 3]), torch.full((9,), 0.5, dtype=torch.float64))
    both = CameraTrajectory.from_keyframes([STILL, {4: [{"zoom": {"ratio": 2}}]}], 5, zoom_ratio=3)
    assert torch.allclose(both.zoom[[0, -1]], torch.tensor([1, 6.0], dtype=torch.float64))
    poses, times, Ks = clip(5)
    applied = both.apply(poses, times, Ks)
    assert applied.Ks[-1, 0, 0] == 300 and applied.Ks[-1, 0, 2] == 32


def test_relative_global_static():
    poses, times, Ks = clip()
    path = CameraTrajectory.from_predefined("push_in", 9)
    relative = path.apply(poses, times, Ks)
    assert torch.allclose(relative.camtoworlds, poses @ path.camtoworlds) and torch.equal(relative.times, times)
    fixed = CameraTrajectory(path.camtoworlds, "global").apply(poses, times, Ks)
    assert torch.equal(fixed.camtoworlds, path.camtoworlds)
    still = path.apply(poses, times, Ks, static=True)
    assert torch.allclose(still.camtoworlds, poses[0] @ path.camtoworlds) and bool((still.times == times[0]).all())
    one = path.apply(poses[:1].float(), times[:1], Ks[:1])
    assert one.camtoworlds.dtype == torch.float32 and one.times.dtype == torch.float64 and len(one.times) == 9


def test_map_of_time():
    poses, times, Ks = clip()
    frozen = CameraTrajectory.from_keyframes([{0: [{"time": {"at": 0.5}}]}, {20: [{"orbit_left": {}}, {"time": {"at": 0.5}}]}], 21).apply(poses, times, Ks)
    assert bool((frozen.times == 3).all()) and torch.allclose(frozen.camtoworlds[0], poses[4])
    slow = CameraTrajectory(EYE.expand(5, 4, 4), time_map=[0, 0.0625, 0.125, 0.1875, 0.25]).apply(poses, times, Ks)
    assert torch.allclose(slow.times, torch.tensor([2, 2.125, 2.25, 2.375, 2.5], dtype=torch.float64))
    back = CameraTrajectory(EYE.expand(9, 4, 4), time_map=torch.linspace(1, 0, 9)).apply(poses, times, Ks)
    assert torch.allclose(back.times, times.flip(0)) and torch.allclose(back.camtoworlds, poses.flip(0))


def test_units_scale_distances():
    poses, times, Ks = clip()
    for unit, argument in (("median_depth", "median_depth"), ("metric", "metric_scale")):
        path = CameraTrajectory.from_predefined("orbit_left", 9, distance_unit=unit)
        plain = CameraTrajectory.from_predefined("orbit_left", 9, orbit_radius=3.0)
        assert torch.allclose(path.apply(poses, times, Ks, **{argument: 3.0}).camtoworlds, plain.apply(poses, times, Ks).camtoworlds)
        with pytest.raises(ValueError, match=argument):
            path.apply(poses, times, Ks)


def test_another_world_and_back():
    poses = clip()[0]
    similarity = Sim3(torch.tensor(0.3, dtype=torch.float64), operation_matrix("pan_left", angle=80)[:3, :3], torch.tensor([1.0, 2, 3], dtype=torch.float64))
    path = CameraTrajectory(poses @ operation_matrix("boom_up"), "global")
    there = path.transformed(similarity)
    assert torch.allclose(there.aligned(similarity.poses(poses), poses).camtoworlds, path.camtoworlds, atol=1e-9)
    with pytest.raises(ValueError, match="global"):
        CameraTrajectory(poses).aligned(poses, poses)


@pytest.mark.parametrize("form", ["keyframes", "matrices", "npz"])
def test_files_round_trip(tmp_path, form):
    made = CameraTrajectory.from_keyframes([STILL, {3: [{"pan_left": {"angle": 1 / 3}}, {"zoom": {"ratio": 1.5}}, {"time": {"at": 0.2}}]}, {8: [{"roll_left": {}}]}], 9, mode="global",
                                           name="a name", zoom_ratio=1.25, use_first_frame=True, interpolation="cubic", distance_unit="median_depth")
    made.to_json(tmp_path / "path.json", form=form)
    read = CameraTrajectory.from_json(tmp_path / "path.json")
    for name in ("camtoworlds", "zoom", "time_map"):
        assert torch.equal(getattr(read, name), getattr(made, name)), name
    for name in ("mode", "name", "use_first_frame", "distance_unit"):
        assert getattr(read, name) == getattr(made, name)


def test_sparse_matrices_are_stretched(tmp_path):
    keys = [EYE.numpy(), operation_matrix("pan_left", angle=40).numpy(), operation_matrix("push_in", distance=1).numpy()]
    np.savez(tmp_path / "keys.npz", frame_indices=np.array([0, 10, 20]), frame_matrices=np.stack(keys))
    (tmp_path / "path.json").write_text(json.dumps({"num_frames": 41, "trajectory": {"file": "keys.npz"}}))
    read = CameraTrajectory.from_json(tmp_path / "path.json")
    assert np.abs(read.camtoworlds.numpy() - by_scipy([0, 20, 40], keys, 41)).max() < 1e-6
    assert len(CameraTrajectory.from_npz(tmp_path / "keys.npz")) == 21


def test_camera_path_of_nerfstudio():
    flip = np.diag([1.0, -1, -1, 1])
    moved = operation_matrix("push_in", distance=0.5).numpy() @ flip
    data = {"camera_path": [{"camera_to_world": flip.ravel().tolist(), "fov": 90, "render_time": 0.0}, {"camera_to_world": moved.ravel().tolist(), "fov": 2 * math.degrees(math.atan(0.5)), "render_time": 1.0}]}
    read = CameraTrajectory.from_camera_path(data)
    assert torch.allclose(read.camtoworlds[1], operation_matrix("push_in", distance=0.5)) and read.mode == "global"
    assert torch.allclose(read.zoom, torch.tensor([1, 2.0], dtype=torch.float64)) and torch.equal(read.time_map, torch.tensor([0, 1.0], dtype=torch.float64))
    assert len(CameraTrajectory.from_camera_path(data, 11)) == 11


def test_spiral_reversed_resampled():
    spiral = CameraTrajectory.spiral(17, radius=0.2, depth=2.0, returning=True)
    assert torch.allclose(spiral.camtoworlds[[0, -1]], EYE.expand(2, 4, 4), atol=1e-9)
    assert torch.equal(spiral.reversed().camtoworlds, spiral.camtoworlds.flip(0))
    assert torch.allclose(spiral.resampled(33).camtoworlds[::2], spiral.camtoworlds, atol=1e-9)


@pytest.mark.parametrize(("keyframes", "words"), [
    ([STILL, {8: [{"pan_lefft": {}}]}], ["keyframes[1] (frame 8), operation 0", "did you mean 'pan_left'"]),
    ([STILL, {8: [{"pan_left": {"angle": float("nan")}}]}], ["keyframes[1] (frame 8), operation 0 (pan_left)", "angle"]),
    ([STILL, {8: [{"static": {}}, {"move_left": {"distance": "far"}}]}], ["operation 1 (move_left)", "distance"]),
    ([STILL, {8: [{"move_left": {"angle": 3}}]}], ["(move_left)", "'distance'"]),
    ([STILL, {8: [{"pan_left": 5}]}], ["(pan_left)", "object"]),
    ([STILL, {8: []}], ["keyframes[1] (frame 8)", "at least one operation"]),
    ([STILL, {8: [{"time": {"at": 1.5}}]}], ["(time)", "[0, 1]"]),
    ([STILL, {8: [{"time": {}}]}], ["(time)", "'at'"]),
    ([STILL, {8: [{"look_at": {"target": [0, 1]}}]}], ["(look_at)", "three numbers"]),
    ([STILL, {8: [{"zoom": {"ratio": 0}}]}], ["(zoom)", "ratio"]),
    ([STILL, {8: [{"orbit_left": {"angle": 180}}]}], ["(orbit_left)", "operations"]),
    ([STILL, {7: [{"static": {}}]}], ["keyframes[1] (frame 7)", "frame 8"]),
    ([{1: [{"static": {}}]}, {8: [{"static": {}}]}], ["keyframes[0] (frame 1)", "frame 0"]),
    ([STILL, {9: [{"static": {}}]}], ["keyframes[1] (frame 9)", "[0, 8]"]),
    ([STILL, {"x": [{"static": {}}]}], ["keyframes[1]", "frame number"]),
    ([STILL, {4: [{"static": {}}]}, {4: [{"static": {}}]}], ["keyframes[2] (frame 4)", "rise"]),
    ([STILL], ["at least two"]),
])
def test_refusals_name_key_frame_and_operation(keyframes, words):
    with pytest.raises(ValueError) as caught:
        CameraTrajectory.from_keyframes(keyframes, 9)
    for word in words:
        assert word in str(caught.value)


def test_refusals_of_files_and_poses(tmp_path):
    with pytest.raises(FileNotFoundError):
        CameraTrajectory.from_json(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"keyframes": [')
    with pytest.raises(ValueError, match="line 1"):
        CameraTrajectory.from_json(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="did you mean 'keyframes'"):
        CameraTrajectory.from_json({"keyframe": []})
    with pytest.raises(ValueError, match="neither"):
        CameraTrajectory.from_json({"mode": "relative"})
    with pytest.raises(ValueError, match="mode"):
        CameraTrajectory(EYE[None], "absolute")
    bad = EYE.repeat(3, 1, 1)
    bad[1, 0, 3] = float("nan")
    with pytest.raises(ValueError, match=r"index \(1, 0, 3\)"):
        CameraTrajectory(bad)
    with pytest.raises(ValueError, match="reflection"):
        CameraTrajectory(torch.diag(torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64))[None])
    with pytest.raises(ValueError, match=r"time_map\[1\]"):
        CameraTrajectory(EYE.expand(2, 4, 4), time_map=[0, 2])
    poses, times, Ks = clip()
    with pytest.raises(ValueError, match=r"times\[2\]"):
        CameraTrajectory(poses).apply(poses, times[[0, 1, 1, 3, 4, 5, 6, 7, 8]], Ks)
    with pytest.raises(ValueError, match=r"frame_indices\[2\]"):
        CameraTrajectory.from_matrices(EYE.expand(3, 4, 4), [0, 4, 4])


def test_stabilisation_and_shake():
    steady = CameraTrajectory.from_predefined("orbit_left", 33).camtoworlds
    assert shake(steady).rotation < 1e-6
    assert shake(steady[:2]) == (0.0, 0.0)
    wander = torch.randn(33, 6, generator=generator(0, "wander"), dtype=torch.float64) * 0.02
    shaky = steady @ se3_exp(wander)
    for options in ({}, {"method": "gaussian", "sigma": 3.0}):
        calm = stabilize(shaky, **options)
        assert shake(calm).rotation < 0.4 * shake(shaky).rotation and shake(calm).position < 0.5 * shake(shaky).position
    K = torch.tensor([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]])
    bounded = stabilize(shaky, method="gaussian", sigma=3.0, max_zoom=1.05, K=K, width=64, height=48)
    assert float(needed_zoom(shaky, bounded, K, 64, 48).max()) <= 1.05 + 1e-6
    assert torch.equal(stabilize(shaky[:1]), shaky[:1])
    with pytest.raises(ValueError, match="K"):
        stabilize(shaky, max_zoom=1.1)


def test_needed_zoom_by_hand():
    K = torch.tensor([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]])
    turned = operation_matrix("pan_right", angle=math.degrees(math.atan(32 / 50)) / 2)[None]
    assert float(needed_zoom(EYE[None], EYE[None], K, 64, 48)) == 1
    # Half the field's angle is left: tan(a) / tan(a / 2).
    a = math.atan(32 / 50)
    wide = torch.tensor([[50.0, 0, 32], [0, 50, 240], [0, 0, 1]])
    assert float(needed_zoom(EYE[None], turned, wide, 64, 480)) > math.tan(a) / math.tan(a / 2) - 1e-6
    assert float(needed_zoom(EYE[None], operation_matrix("pan_right", angle=90)[None], K, 64, 48)) == math.inf


def test_every_extension_is_known():
    assert set(EXTENSIONS) == {"roll_left", "roll_right", "zoom", "dolly_zoom", "look_at", "time"}
