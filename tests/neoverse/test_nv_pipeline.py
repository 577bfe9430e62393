"""The pipeline of NeoVerse: clips, reconstructors, windows, conditions, files, refusals."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from papers10.core.media import Video, write_video
from papers10.core.random import generator
from papers10.neoverse.pipeline import (
    Clip,
    DepthAnything3Reconstructor,
    DepthReconstructor,
    FolderReconstructor,
    Generator,
    NeoVersePipeline,
    NetworkReconstructor,
    OracleReconstructor,
    PopUpDepth,
    Reconstructor,
    fill_holes,
    fitting_size,
    flow_motion,
    generate_long,
    load_clip,
    moved_scene,
    reconstruct_long,
    render_conditions,
    track_cameras,
)
from papers10.neoverse.trajectories import CameraTrajectory, operation_matrix
from papers10.neoverse.world import SceneSpec, scene_clip, scene_flow
from papers10.splat.cameras import Sim3, align_poses, invert_poses
from papers10.splat.estimators import PlaneDepth
from papers10.splat.rotations import quat_to_matrix

ROOM = SceneSpec.random(3, motion="mixed")


def clip(frames=5, width=32, height=24, spec=ROOM):
    return scene_clip(spec, torch.linspace(0, 1, frames), width, height)


def still(frames):
    return CameraTrajectory(torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1))


class Known:
    """A depth or flow estimator that is told the answer."""

    def __init__(self, depth=None, flow=None):
        self._depth, self._flow = depth, flow

    def depth(self, frames):
        return self._depth

    def flow(self, a, b):
        return self._flow(a, b)


def test_clip_frames_evenly_spaced(tmp_path):
    frames = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 8, 10, 3) * 10
    taken = load_clip(Video(frames, 8.0), 3)
    assert torch.equal((taken.frames[:, 0, 0, 0] * 255).round(), torch.tensor([0.0, 40, 80])) and taken.times.tolist() == [0, 0.5, 1]
    first = load_clip(frames, 3, sampling="first", start=2, fps=4)
    assert torch.equal((first.frames[:, 0, 0, 0] * 255).round(), torch.tensor([20.0, 30, 40])) and first.fps == 4
    pytest.importorskip("av")
    path = write_video(tmp_path / "clip.mp4", frames, 8)
    assert load_clip(path, None, size=(4, 4)).frames.shape == (9, 4, 4, 3)
    with pytest.raises(ValueError, match="start"):
        load_clip(frames, 3, start=9)


def test_oracle_returns_its_frames():
    seen = clip()
    rebuilt = OracleReconstructor(ROOM)(seen.rgb, seen.times).check()
    assert isinstance(OracleReconstructor(ROOM), Reconstructor) and rebuilt.consistency() < 0.01
    conditions, alpha, times = render_conditions(rebuilt, still(5))
    # Gaussians of half a pixel and the pixel filter blur a texture of a few pixels.
    assert torch.equal(times, seen.times) and float((conditions.rgb[0] - seen.rgb).abs().mean()) < 0.08 and float(alpha.mean()) > 0.95
    assert float((conditions.depth[0, ..., 0] - seen.depth).abs().median()) < 0.06
    conditions.check()


def test_consistency_sees_foreign_intrinsics():
    seen = clip()
    rebuilt = OracleReconstructor(ROOM)(seen.rgb, seen.times)
    wrong = type(rebuilt)(rebuilt.scene, rebuilt.camtoworlds, rebuilt.Ks * torch.tensor([1.3, 1.3, 1.0])[:, None], rebuilt.depths, rebuilt.frames, rebuilt.times)
    assert wrong.consistency() > 1


def test_mask_first_frame_and_size():
    seen = clip()
    rebuilt = OracleReconstructor(ROOM)(seen.rgb, seen.times)
    nothing, alpha, _ = render_conditions(rebuilt, still(5))
    assert float(nothing.mask.sum()) == 0
    some, _, _ = render_conditions(rebuilt, still(5), alpha_threshold=0.5, first_frame=seen.rgb[2])
    assert torch.equal(some.mask[0, 1:], (alpha[1:] > 0.5).float()) and float(some.mask[0, 0].mean()) == 1 and torch.equal(some.rgb[0, 0], seen.rgb[2])
    double, _, _ = render_conditions(rebuilt, still(5), width=64, height=48)
    assert double.size == (5, 48, 64) and torch.allclose(double.Ks[0, :, 0, 0], 2 * rebuilt.Ks[:, 0, 0])
    with pytest.raises(ValueError, match="alpha_threshold"):
        render_conditions(rebuilt, still(5), alpha_threshold=1.5)


def test_true_flow_gives_true_motion():
    seen = scene_clip(ROOM, torch.tensor([0.4, 0.5]), 48, 36)
    Ks, poses = seen.Ks.float(), seen.camtoworlds.float()

    def flow(a, b):
        start = 0 if torch.equal(a, seen.rgb[0]) else 1
        moved = scene_flow(ROOM, seen.world[start], seen.ids[start], float(seen.times[start]), float(seen.times[1 - start]))
        local = moved.double() @ invert_poses(seen.camtoworlds[1 - start].double())[:3, :3].T + invert_poses(seen.camtoworlds[1 - start].double())[:3, 3]
        pixels = local @ Ks[0].double().T
        rows, columns = torch.meshgrid(torch.arange(36) + 0.5, torch.arange(48) + 0.5, indexing="ij")
        return (pixels[..., :2] / pixels[..., 2:]).float() - torch.stack([columns, rows], -1)

    forward, backward = flow_motion(seen.depth, poses, Ks, seen.rgb, Known(flow=flow))
    truth = scene_flow(ROOM, seen.world[0], seen.ids[0], 0.4, 0.5).float() - seen.world[0].float()
    found = forward[0].norm(dim=-1) > 0
    assert float(found[seen.ids[0] >= 0].float().mean()) > 0.2 and float(found[seen.ids[0] < 0].float().mean()) < 0.05
    # Half a pixel at this size is 0.05 of the depth's unit.
    assert float((forward[0] - truth)[found].norm(dim=-1).median()) < 0.05
    assert float(forward[1].abs().max()) == 0 and float(backward[0].abs().max()) == 0


def test_tracked_camera_follows_the_true_one():
    spec = SceneSpec.random(5, motion="static")
    seen = scene_clip(spec, torch.linspace(0, 0.3, 4), 96, 72)
    found = track_cameras(seen.rgb, seen.depth, seen.Ks[0])
    truth = invert_poses(seen.camtoworlds[:1].double()) @ seen.camtoworlds.double()
    # The path is 0.14 long; half a pixel at depth 3 is 0.02.
    assert float((found[:, :3, 3] - truth[:, :3, 3]).norm(dim=-1).max()) < 0.03
    assert torch.equal(track_cameras(torch.zeros(3, 24, 32, 3), torch.ones(3, 24, 32), seen.Ks[0]), torch.eye(4, dtype=torch.float64).expand(3, 4, 4))


def test_depth_by_eye_stands_on_the_floor():
    mask = torch.zeros(2, 20, 16, dtype=torch.bool)
    mask[:, 8:16, 4:9] = True
    depth = PopUpDepth(1.0, 3.0, 0.3, masks=SimpleNamespace(segment=lambda frames: mask), join=0.0).depth(torch.zeros(2, 20, 16, 3))
    floor = PlaneDepth(near=1.0, far=3.0, horizon=0.3).depth(torch.zeros(2, 20, 16, 3))
    assert torch.allclose(depth[0][mask[0]], floor[0, 15, 0]) and torch.equal(depth[0, :, 12], floor[0, :, 12])


def test_without_weights_a_clip_becomes_a_film():
    out = NeoVersePipeline(DepthReconstructor())(Clip(clip(9).rgb, clip(9).times, 8.0), "orbit_right", num_frames=9, num_keyframes=3, seed=1)
    assert out.frames.shape == (9, 24, 32, 3) and out.frames.dtype == torch.uint8 and set(out.seconds) == {"load", "reconstruct", "render", "generate"}
    assert len(out.reconstruction) == 3 and float(out.conditions.mask[0, 0].mean()) == 1


def folders(tmp_path, seen):
    poses, inner, depth = seen.camtoworlds.double().numpy(), seen.Ks.double().numpy(), seen.depth.numpy()
    np.savez(tmp_path / "maps.npz", depths=depth, camtoworlds=poses, Ks=inner)
    monst3r, cut3r = tmp_path / "monst3r", tmp_path / "cut3r"
    for place in (monst3r, cut3r / "depth", cut3r / "camera"):
        place.mkdir(parents=True)
    from scipy.spatial.transform import Rotation

    quats = Rotation.from_matrix(poses[:, :3, :3]).as_quat()[:, [3, 0, 1, 2]]
    np.savetxt(monst3r / "pred_traj.txt", np.concatenate([np.arange(len(poses))[:, None], poses[:, :3, 3], quats], 1))
    np.savetxt(monst3r / "pred_intrinsics.txt", inner.reshape(-1, 9))
    for frame in range(len(poses)):
        np.save(monst3r / f"frame_{frame:04d}.npy", depth[frame])
        np.save(cut3r / "depth" / f"{frame:06d}.npy", depth[frame])
        np.savez(cut3r / "camera" / f"{frame:06d}.npz", pose=poses[frame], intrinsics=inner[frame])
    return tmp_path / "maps.npz", monst3r, cut3r


def test_outputs_of_other_programs(tmp_path):
    seen = clip(3)
    wanted = invert_poses(seen.camtoworlds[:1].double()) @ seen.camtoworlds.double()
    for path in folders(tmp_path, seen):
        found = FolderReconstructor(path)(seen.rgb, seen.times).check()
        assert torch.allclose(found.camtoworlds.double(), wanted, atol=1e-5) and torch.allclose(found.depths, seen.depth.float()) and found.consistency() < 0.01, path
    larger = FolderReconstructor(tmp_path / "maps.npz")(torch.zeros(3, 48, 64, 3), seen.times)
    assert torch.allclose(larger.Ks[:, 0, 0], 2 * seen.Ks[:, 0, 0].float())
    with pytest.raises(ValueError, match="3 and 3"):
        FolderReconstructor(tmp_path / "maps.npz")(seen.rgb[:2], seen.times[:2])
    with pytest.raises(FileNotFoundError):
        FolderReconstructor(tmp_path / "nothing")


def test_depth_anything_3_adapter_by_its_interface():
    seen = clip(3)
    views = invert_poses(seen.camtoworlds.double()).numpy()[:, :3]

    class Model:
        def inference(self, images):
            assert len(images) == 3 and images[0].dtype == np.uint8
            return SimpleNamespace(depth=seen.depth.numpy(), extrinsics=views, intrinsics=seen.Ks.numpy())

    found = DepthAnything3Reconstructor(model=Model(), flow="none")(seen.rgb, seen.times)
    assert found.consistency() < 0.01
    assert torch.allclose(found.camtoworlds[2].double(), (invert_poses(seen.camtoworlds[:1].double()) @ seen.camtoworlds.double())[2], atol=1e-5)


def test_networks_behind_the_protocols():
    from papers10.neoverse.tiny import new_tiny

    network = NetworkReconstructor(new_tiny())
    assert isinstance(network, Reconstructor) and network.size_step == 4
    seen = clip(5)
    rebuilt = network(seen.rgb, seen.times).check()
    assert rebuilt.consistency() < 0.01 and torch.allclose(rebuilt.camtoworlds[0], torch.eye(4), atol=1e-4)
    out = NeoVersePipeline(network)(Clip(torch.rand(5, 30, 42, 3), seen.times, 8.0), "pan_left", num_frames=5, num_keyframes=3, auto_fix=True)
    assert out.frames.shape == (5, 32, 44, 3)


class Lost:
    def __init__(self, seed):
        self.draw = generator(seed, "lost")

    def __call__(self, frames, times, *, static=False, motion=True):
        from dataclasses import replace

        found = OracleReconstructor(ROOM)(frames, times, static=static, motion=motion)
        away = Sim3(torch.tensor(2.5, dtype=torch.float64), quat_to_matrix(torch.randn(4, generator=self.draw, dtype=torch.float64)), torch.randn(3, generator=self.draw, dtype=torch.float64))
        return replace(found, scene=moved_scene(found.scene, away), camtoworlds=away.poses(found.camtoworlds.double()).float(), depths=found.depths * 2.5)


def test_windows_come_together():
    seen = clip(17, 16, 12)
    whole = OracleReconstructor(ROOM)(seen.rgb, seen.times)
    pieces = reconstruct_long(Lost(0), seen.rgb, seen.times, window=7, overlap=3).check()
    fit = align_poses(pieces.camtoworlds, whole.camtoworlds)
    moved = moved_scene(pieces.scene, fit)
    assert torch.equal(moved.key, whole.scene.key) and torch.equal(moved.key_times, whole.scene.key_times)
    # float32 through two similarities.
    for name in ("velocity_forward", "velocity_backward"):
        assert torch.allclose(getattr(moved, name), getattr(whole.scene, name), atol=1e-4)
    assert torch.allclose(moved.gaussians.means, whole.scene.gaussians.means, atol=1e-4)
    with pytest.raises(ValueError, match="overlap"):
        reconstruct_long(Lost(0), seen.rgb, seen.times, window=7, overlap=7)


class Echo:
    """Returns what it is shown, and remembers which pictures it was told to trust."""

    frame_step, size_step = 4, 8

    def __init__(self):
        self.trusted = []

    def __call__(self, conditions, prompts="", *, negative="", steps=4, guidance_scale=1.0, seed=0):
        self.trusted.append(int(conditions.mask[0].flatten(1).all(1).sum()))
        return conditions.rgb


def test_long_generation_goes_on_from_what_was_made():
    seen = clip(5)
    conditions, _, _ = render_conditions(OracleReconstructor(ROOM)(seen.rgb, seen.times), still(21))
    echo = Echo()
    assert isinstance(echo, Generator)
    film = generate_long(echo, conditions, window=9, overlap=3)
    assert film.shape == conditions.rgb.shape and torch.allclose(film, conditions.rgb) and echo.trusted == [0, 3, 3]


def test_sizes():
    assert fitting_size(80, 250, 330, SimpleNamespace(frame_step=4, size_step=16)) == (81, 256, 336)
    assert fitting_size(7, 5, 9, object()) == (7, 5, 9)
    pipeline, source = NeoVersePipeline(OracleReconstructor(ROOM), Echo()), Clip(clip(7).rgb, clip(7).times, 8.0)
    with pytest.raises(ValueError, match=r"nearest \(9, 24, 32\)"):
        pipeline(source, still(7))
    assert pipeline(source, still(7), auto_fix=True).frames.shape == (9, 24, 32, 3)
    rebuilt = SimpleNamespace(size_step=14)
    network = NeoVersePipeline(lambda *a, **k: None)
    network.reconstructor = rebuilt
    with pytest.raises(ValueError, match="multiples of 14"):
        network(source, still(7))
    for wrong, word in (({"num_keyframes": 9}, "num_keyframes"), ({"alpha_threshold": -0.1}, "alpha_threshold"), ({"fps": 0}, "fps")):
        with pytest.raises(ValueError, match=word):
            NeoVersePipeline(OracleReconstructor(ROOM))(source, still(7), **wrong)
    with pytest.raises(FileNotFoundError, match="hf download"):
        NeoVersePipeline.from_pretrained("no/such/folder")


def test_holes_are_filled_from_around():
    color, alpha = torch.full((1, 16, 16, 3), 0.4), torch.ones(1, 16, 16, 1)
    alpha[:, 5:9, 6:10] = 0
    assert torch.allclose(fill_holes(color * alpha, alpha), color, atol=1e-5)
    assert float(fill_holes(torch.zeros(1, 5, 7, 3), torch.zeros(1, 5, 7, 1)).abs().max()) == 0


def test_files_of_everything(tmp_path):
    pytest.importorskip("av")
    pytest.importorskip("trimesh")
    from papers10.neoverse.gaussians4d import Gaussians4D
    from papers10.splat.export import load_cameras, load_colmap, load_depth

    source = Clip(clip(3).rgb, clip(3).times, 8.0)
    out = NeoVersePipeline(OracleReconstructor(ROOM))(source, CameraTrajectory(operation_matrix("move_right")[None].repeat(3, 1, 1)))
    files = out.save_intermediates(tmp_path / "made")
    assert all(path.exists() for path in files)
    assert torch.equal(Gaussians4D.load(tmp_path / "made/scene.safetensors").gaussians.means, out.reconstruction.scene.gaussians.means)
    assert torch.equal(load_depth(tmp_path / "made/depth.npz"), out.reconstruction.depths)
    assert torch.allclose(load_cameras(tmp_path / "made/film_cameras.json").cameras.Ks.float(), out.conditions.Ks[0])
    assert len(load_colmap(tmp_path / "made/colmap").viewmats) == 3


def test_bullet_time_and_static():
    source = Clip(clip(5).rgb, clip(5).times, 8.0)
    frozen = CameraTrajectory.from_keyframes([{0: [{"time": {"at": 0.5}}]}, {6: [{"orbit_left": {}}, {"time": {"at": 0.5}}]}], 7)
    assert bool((NeoVersePipeline(OracleReconstructor(ROOM))(source, frozen, num_keyframes=3).times == 0.5).all())
    out = NeoVersePipeline(OracleReconstructor(ROOM))(source, still(4), static=True)
    assert bool((out.times == 0).all()) and bool((out.reconstruction.scene.key == -1).all())
    assert math.isfinite(out.reconstruction.median_depth)
