"""Clips with depth, poses and motion become batches, the reconstructor trains on them, and the paper's protocols judge it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from papers10.core.checkpoint import load_tensors, save_tensors
from papers10.core.random import generator
from papers10.lm.pretraining import launch
from papers10.neoverse import reconstructor_training as rt
from papers10.neoverse.checkpoints import official_names
from papers10.neoverse.datasets import from_clip
from papers10.neoverse.losses import ReconstructionBatch
from papers10.neoverse.pipeline import OracleReconstructor
from papers10.neoverse.reconstructor import NeoVerseReconstructor, ReconstructorConfig
from papers10.neoverse.world import SceneSpec, scene_clip, scene_flow
from papers10.splat.cameras import invert_poses

FLOAT64 = {"dtype": torch.float64}


def room(motion="linear", frames=7, width=32, height=24):
    spec = SceneSpec.random(1, motion=motion)
    return spec, scene_clip(spec, torch.linspace(0, 1, frames).tolist(), width, height)


def moved(spec, clip, row, other):
    """What things of a frame move by until another one, in the frame's own camera axes."""
    there = scene_flow(spec, clip.world[row], clip.ids[row], float(clip.times[row]), float(clip.times[other]))
    return ((there - clip.world[row]) @ clip.camtoworlds[row, :3, :3]).float()


def neighbours(spec, clip):
    """Forward and backward flow between neighbouring frames, NaN at the ends."""
    blank, last = torch.full_like(clip.world[0], torch.nan).float(), len(clip.times) - 1
    return tuple(torch.stack([moved(spec, clip, row, row + step) if 0 <= row + step <= last else blank for row in range(last + 1)]) for step in (1, -1))


def tracks_of(spec, clip):
    tracks = torch.stack([scene_flow(spec, clip.world[0], clip.ids[0], float(clip.times[0]), float(time)).reshape(-1, 3) for time in clip.times])
    return tracks, torch.ones(tracks.shape[:2], dtype=torch.bool)


def clip_of(spec, clip, motion="tracks", **changes):
    own = tracks_of(spec, clip)
    sides = neighbours(spec, clip)
    known = {"tracks": {"tracks": lambda: own}, "flow": {"flow": lambda row, step: sides[0 if step == 1 else 1][row]}}.get(motion, {})
    size = clip.rgb.shape[2], clip.rgb.shape[1]
    return rt.DepthClip("room", lambda row: (clip.rgb[row], clip.depth[row]), size, clip.camtoworlds.double(), clip.Ks.double(), motion, **{**known, **changes}).check()


def write_npz(folder, spec, clip, **motion):
    rt.save_npz_clip(folder / "room.npz", from_clip(clip), clip.depth, **motion)
    return folder


def mini(folder, **changes):
    return rt.ReconstructorTraining(**{**dict(reconstructor="random-tiny", sets=(f"npz={folder}",), longest=32, keys=(2, 3), iterations=2, lr=1e-3, warmup=1, precision="float32", gradient_checkpointing=False,
                                              devices=1, strategy="single", device="cpu", save_every=1, log_every=1), **changes})


# one clip

@pytest.mark.parametrize("size, wanted", [((1242, 375), (168, 560)), ((960, 540), (308, 560)), ((480, 640), (560, 420)), ((560, 560), (560, 560)), ((4000, 3), (14, 560))])
def test_sides_are_multiples_of_the_patch(size, wanted):
    assert rt.fitted_size(*size) == wanted


@pytest.mark.parametrize("motion, least", [("tracks", 0.9), ("flow", 0.6)])
def test_displacements_are_the_scene_flow_in_the_own_camera(motion, least):
    spec, clip = room()
    batch = rt.training_batch(clip_of(spec, clip, motion), [0, 1, 2, 3, 4], 24, 32)
    for found, row, other in ((batch.flow_forward[0, 0], 0, 2), (batch.flow_backward[0, 1], 2, 0), (batch.flow_forward[0, 1], 2, 4)):
        known = found.isfinite().all(-1)
        error = (found - moved(spec, clip, row, other))[known].norm(dim=-1)
        assert error.quantile(0.95) < (1e-4 if motion == "tracks" and row == 0 else 0.02)
        assert known.float().mean() > (least if row == 0 else 0.2)
    assert batch.flow_backward[0, 0].abs().sum() == 0 and batch.flow_forward[0, -1].abs().sum() == 0
    assert torch.allclose(batch.camtoworlds[0, 0], torch.eye(4), atol=1e-6) and torch.allclose(batch.depth[0], clip.depth[:5].float())
    far = moved(spec, clip, 0, 2).norm(dim=-1) > 0.011 * clip.depth[0]
    known = batch.flow_forward[0, 0].isfinite().all(-1)
    assert batch.moving[0, 0][far & known].all() and far.any()


def test_hidden_tracks_do_not_count():
    spec, clip = room()
    tracks, visible = tracks_of(spec, clip)
    behind, unseen = tracks.clone(), visible.clone()
    behind[0] += (behind[0] - clip.camtoworlds[0, :3, 3]) * 0.5
    unseen[0] = False
    for change in ((behind, visible), (tracks, unseen)):
        batch = rt.training_batch(clip_of(spec, clip, tracks=lambda change=change: change), [0, 1, 2], 24, 32)
        assert not batch.flow_forward[0, 0].isfinite().any() and not batch.moving[0, 0].any()


def test_points_that_get_hidden_are_lost():
    spec, clip = room()
    whole, wall = clip_of(spec, clip, "flow"), torch.full_like(clip.depth[1], 0.1)
    hidden = replace(whole, read=lambda row: (clip.rgb[row], wall if row == 1 else clip.depth[row]))
    assert rt.training_batch(whole, [0, 2, 3], 24, 32).flow_forward[0, 0].isfinite().any()
    assert not rt.training_batch(hidden, [0, 2, 3], 24, 32).flow_forward[0, 0].isfinite().any()


def test_static_and_unknown_motion():
    spec, clip = room("static")
    still = rt.training_batch(clip_of(spec, clip, "static"), [0, 2, 4], 24, 32)
    assert bool(still.is_static) and not still.moving.any() and still.flow_forward.abs().sum() == 0
    unknown = rt.training_batch(clip_of(spec, clip, "unknown"), [0, 2, 4], 24, 32)
    assert unknown.flow_forward[0, 0].isnan().all() and not bool(unknown.is_static)
    both = rt.collate([unknown, still])
    assert isinstance(both, ReconstructionBatch) and both.flow_forward.shape[0] == 2 and both.is_static.tolist() == [False, True]


def test_crops_keep_points_on_their_pixels():
    spec, clip = room(width=48, height=24)
    for motion in ("tracks", "flow"):
        batch = rt.training_batch(clip_of(spec, clip, motion), [0, 1, 2], 24, 32)
        assert batch.frames.shape == (1, 3, 3, 24, 32) and float(batch.Ks[0, 0, 0, 2]) == pytest.approx(16, abs=1e-4)
        assert torch.equal(batch.depth[0, 0], clip.depth[0, :, 8:40].float())
        known = batch.flow_forward[0, 0].isfinite().all(-1)
        assert known.float().mean() > 0.6 and (batch.flow_forward[0, 0] - moved(spec, clip, 0, 2)[:, 8:40])[known].norm(dim=-1).quantile(0.95) < 0.02


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 2, 3], [2, 1, 0], [0, 1, 9], [0, 0, 1]])
def test_wrong_rows_are_refused(rows):
    spec, clip = room()
    with pytest.raises(ValueError, match="rows: expected an odd number"):
        rt.training_batch(clip_of(spec, clip), rows, 24, 32)


def test_wrong_clips_are_refused():
    spec, clip = room()
    with pytest.raises(ValueError, match="tracks: expected it exactly"):
        clip_of(spec, clip, "static", tracks=lambda: None)
    with pytest.raises(ValueError, match="motion: expected one of"):
        clip_of(spec, clip, "some")
    with pytest.raises(ValueError, match="Ks: expected"):
        replace(clip_of(spec, clip), Ks=clip.Ks[:2].double()).check()
    with pytest.raises(ValueError, match="depth: expected the picture's size"):
        rt.training_batch(replace(clip_of(spec, clip), read=lambda row: (clip.rgb[row], clip.depth[row, :4])), [0, 1, 2], 24, 32)


def test_poses_of_kilometres_keep_their_centimetres():
    spec, clip = room()
    far = clip.camtoworlds.double().clone()
    far[:, :3, 3] += torch.tensor([1e6, -2e6, 5e5], **FLOAT64)
    near = rt.training_batch(clip_of(spec, clip, "unknown"), [0, 1, 2], 24, 32)
    assert torch.allclose(rt.training_batch(replace(clip_of(spec, clip, "unknown"), camtoworlds=far), [0, 1, 2], 24, 32).camtoworlds, near.camtoworlds, atol=1e-6)
    assert torch.allclose(near.camtoworlds[0, 1].double(), invert_poses(clip.camtoworlds[0].double()) @ clip.camtoworlds[1].double(), atol=1e-6)


# folders

def picture(place, values):
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(place)


def test_tartanair_axes(tmp_path):
    scene = tmp_path / "office" / "P000"
    (scene / "depth_left").mkdir(parents=True)
    for row in range(2):
        picture(scene / "image_left" / f"{row:06d}_left.png", np.zeros((24, 32, 3), np.uint8))
        np.save(scene / "depth_left" / f"{row:06d}_left_depth.npy", np.ones((24, 32), np.float32))
    # The second camera stands one unit north (ahead), two east (right), three down, turned by 90° about down: it looks east.
    half = np.sqrt(0.5)
    np.savetxt(scene / "pose_left.txt", [[0, 0, 0, 0, 0, 0, 1], [1, 2, 3, 0, 0, half, half]])
    clip = rt.load_tartanair(tmp_path)[0]
    assert torch.allclose(clip.camtoworlds[1, :3, 3], torch.tensor([2.0, 3, 1], **FLOAT64))
    assert torch.allclose(clip.camtoworlds[1, :3, 2], torch.tensor([1.0, 0, 0], **FLOAT64), atol=1e-9)
    assert clip.motion == "static" and float(clip.Ks[0, 0, 0]) == pytest.approx(16)
    (scene / "depth_left" / "000001_left_depth.npy").unlink()
    with pytest.raises(ValueError, match="as many pictures, depths, poses, got 2, 1, 2"):
        rt.load_tartanair(tmp_path)


def vkitti2(scene, convention):
    """Three frames of a street at 10 m: the camera drives 1 m ahead a frame; the right half is a car that drives 0.5 m ahead a frame. Frame 2's left column is sky."""
    cv2 = pytest.importorskip("cv2")
    depth = np.full((4, 8), 1000, np.uint16)
    depth[:, 0] = 65535
    for row in range(3):
        picture(scene / f"frames/rgb/Camera_0/rgb_{row:05d}.jpg", np.zeros((4, 8, 3), np.uint8))
        picture(scene / f"frames/depth/Camera_0/depth_{row:05d}.png", depth)
        for step, side, name in ((1, "forwardSceneFlow", "sceneFlow"), (-1, "backwardSceneFlow", "backwardSceneFlow")):
            if 0 <= row + step < 3:
                ahead = np.where(np.arange(8) >= 5, 0.5, 0.0) * step - (step if convention == "cameras" else 0)
                values = np.stack([np.zeros((4, 8)), np.zeros((4, 8)), np.broadcast_to(ahead, (4, 8))], -1)
                place = scene / f"frames/{side}/Camera_0/{name}_{row:05d}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(place), ((values[..., ::-1] + 10) / 20 * 65535).round().astype(np.uint16))
    outer = [[row, camera, 1, 0, 0, -0.5 * camera, 0, 1, 0, 0, 0, 0, 1, -row, 0, 0, 0, 1] for row in range(3) for camera in (0, 1)]
    (scene / "extrinsic.txt").write_text("frame cameraID r1,1 r1,2 r1,3 t1 r2,1 r2,2 r2,3 t2 r3,1 r3,2 r3,3 t3 0 0 0 1\n" + "\n".join(" ".join(map(str, line)) for line in outer) + "\n")
    (scene / "intrinsic.txt").write_text("frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]\n" + "\n".join(f"{row} {camera} 8 8 4 2" for row in range(3) for camera in (0, 1)) + "\n")


@pytest.mark.parametrize("convention", ["cameras", "things"])
def test_vkitti2_in_its_own_layout(tmp_path, convention):
    vkitti2(tmp_path / "Scene01" / "clone", convention)
    clip = rt.load_vkitti2(tmp_path)[0]
    assert clip.name == "Scene01/clone" and clip.size == (8, 4) and clip.motion == "flow" and torch.equal(clip.camtoworlds[2, :3, 3], torch.tensor([0.0, 0, 2], **FLOAT64))
    assert torch.equal(clip.Ks[0], torch.tensor([[8.0, 0, 4], [0, 8, 2], [0, 0, 1]], **FLOAT64))
    _, depth = clip.read(0)
    assert depth[0, 0] == 0 and depth[0, 1] == 10
    for row, step in ((0, 1), (1, -1)):
        flow = clip.flow(row, step)
        assert flow[:, 0].isnan().all() and torch.allclose(flow[:, 1:5], torch.zeros(4, 4, 3), atol=4e-4) and torch.allclose(flow[:, 5:], torch.tensor([0, 0, 0.5 * step]).expand(4, 3, 3), atol=4e-4)
    shutil.rmtree(tmp_path / "Scene01/clone/frames/backwardSceneFlow")
    assert rt.load_vkitti2(tmp_path)[0].motion == "unknown"


@pytest.mark.parametrize("names", [("anno.npz", "visibs"), ("annotations.npz", "visibilities")])
def test_pointodyssey_in_its_own_layout(tmp_path, names):
    spec, clip = room(frames=3)
    scene = tmp_path / "train" / "dancing"
    for row in range(3):
        picture(scene / f"rgbs/rgb_{row:05d}.jpg", (clip.rgb[row] * 255).round().byte().numpy())
        picture(scene / f"depths/depth_{row:05d}.png", (clip.depth[row] * 65.535).round().numpy().astype(np.uint16))
    tracks, visible = tracks_of(spec, clip)
    np.savez(scene / names[0], trajs_2d=tracks[..., :2], trajs_3d=tracks, intrinsics=clip.Ks, extrinsics=invert_poses(clip.camtoworlds), **{names[1]: visible})
    found = rt.load_pointodyssey(tmp_path)[0]
    assert torch.allclose(found.camtoworlds, clip.camtoworlds.double(), atol=1e-5) and found.motion == "tracks"
    flow = rt.training_batch(found, [0, 1, 2], 24, 32).flow_forward[0, 0]
    known = flow.isfinite().all(-1)
    assert known.float().mean() > 0.9 and torch.allclose(flow[known], moved(spec, clip, 0, 2)[known], atol=1e-4)
    np.savez(scene / names[0], trajs_3d=tracks)
    with pytest.raises(ValueError, match="intrinsics, extrinsics"):
        rt.load_pointodyssey(tmp_path)


def test_static_scenes_of_other_loaders(tmp_path):
    _, clip = room("static", frames=3)
    scene = tmp_path / "garden"
    flip = torch.tensor([1.0, -1, -1, 1], **FLOAT64)
    for row in range(3):
        picture(scene / f"images/frame_{row}.png", (clip.rgb[row] * 255).round().byte().numpy())
        picture(scene / f"depth/frame_{row}.png", (clip.depth[row] * 1000).round().numpy().astype(np.uint16))
    about = {"fl_x": 2 * float(clip.Ks[0, 0, 0]), "fl_y": 2 * float(clip.Ks[0, 1, 1]), "cx": 32, "cy": 24, "w": 64, "h": 48,
             "frames": [{"file_path": f"images/frame_{row}.png", "transform_matrix": (clip.camtoworlds[row].double() * flip).tolist()} for row in range(3)]}
    (scene / "transforms.json").write_text(json.dumps(about))
    found = rt.DEPTH_SETS["nerfstudio"](tmp_path)[0]
    batch = rt.training_batch(found, [0, 1, 2], 24, 32)
    # The file's intrinsics are for twice the stored size.
    assert torch.allclose(batch.Ks[0], clip.Ks.float(), atol=1e-3) and torch.allclose(batch.depth[0], clip.depth.float(), atol=6e-4) and bool(batch.is_static)
    (scene / "depth/frame_1.png").unlink()
    with pytest.raises(FileNotFoundError, match="frame_1.png or frame_1.npz"):
        found.read(1)
    (scene / "transforms.json").write_text(json.dumps({**about, "k1": 0.1}))
    with pytest.raises(ValueError, match="frames: expected pinhole lenses"):
        rt.load_static("nerfstudio", tmp_path)


def test_own_form_keeps_what_is_known(tmp_path):
    spec, clip = room()
    for name, motion, kind in (("a", {"static": True}, "static"), ("b", {"flow": neighbours(spec, clip)}, "flow"), ("c", {"tracks": tracks_of(spec, clip)}, "tracks"), ("d", {}, "unknown")):
        found = rt.load_npz_clips(write_npz(tmp_path / name, spec, clip, **motion))[0]
        wanted = rt.training_batch(clip_of(spec, clip, kind), [0, 1, 2], 24, 32)
        assert found.motion == kind and found.size == (32, 24)
        torch.testing.assert_close(rt.training_batch(found, [0, 1, 2], 24, 32).flow_forward, wanted.flow_forward, equal_nan=True)
    with pytest.raises(ValueError, match="flow_forward: expected"):
        rt.save_npz_clip(tmp_path / "e.npz", from_clip(clip), clip.depth, flow=(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)))
    with pytest.raises(ValueError, match="got depth"):
        rt.save_npz_clip(tmp_path / "e.npz", from_clip(clip), clip.depth[:2])


def test_missing_and_broken_folders_are_named(tmp_path):
    for loader in (rt.load_tartanair, rt.load_vkitti2, rt.load_pointodyssey, rt.DEPTH_SETS["dl3dv"]):
        with pytest.raises(FileNotFoundError, match="folder: expected"):
            loader(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"\*.npz"):
        rt.load_npz_clips(tmp_path)
    np.savez(tmp_path / "a.npz", frames=np.zeros(1))
    with pytest.raises(ValueError, match="expected depth, camtoworlds, Ks"):
        rt.load_npz_clips(tmp_path)
    (tmp_path / "extrinsic.txt").write_text("frame camera\n1 2\n")
    for part in ("rgb", "depth"):
        (tmp_path / f"frames/{part}/Camera_0").mkdir(parents=True)
        (tmp_path / f"frames/{part}/Camera_0/{part}_00000.{'jpg' if part == 'rgb' else 'png'}").touch()
    with pytest.raises(ValueError, match="at least 18 columns, got 2"):
        rt.load_vkitti2(tmp_path)


# batches

def test_batches_depend_on_seed_and_number_alone():
    spec, clip = room()
    sets = {"own": ([clip_of(spec, clip)], 2.0), "rooms": (None, 1.0)}
    stream = rt.ReconstructionClips(sets, 32, patch=8, batch=2, keys=(2, 3))
    found = [next(stream) for _ in range(2)]
    later = rt.ReconstructionClips(sets, 32, patch=8, batch=2, keys=(2, 3), workers=2)
    later.load_state_dict({"drawn": 1})
    assert torch.equal(next(later).depth, found[1].depth) and later.state_dict() == stream.state_dict()
    halves = [next(rt.ReconstructionClips(sets, 32, patch=8, keys=(2, 3), rank=rank, world=2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([half.frames for half in halves]), found[0].frames)
    assert found[0].depth[:, ::2][found[0].valid[:, ::2]].min() > 0 and torch.allclose(found[0].camtoworlds[:, 0], torch.eye(4).expand(2, 4, 4), atol=1e-5)


def test_long_clips_are_taken_for_many_key_frames_and_few_when_none_is_long():
    spec, clip = room(frames=9)
    _, short = room(frames=3)
    stream = rt.ReconstructionClips({"long": ([clip_of(spec, clip)], 1.0), "short": ([clip_of(spec, short)], 1.0)}, 32, patch=8, keys=(2, 8))
    assert stream.keys == (2, 5) and {stream.choose(index, 5)[0] for index in range(20)} == {"long"}
    assert {stream.choose(index, 2)[0] for index in range(20)} == {"long", "short"}


def test_time_runs_backwards_with_the_flows_exchanged():
    spec, clip = room()
    ahead, back = (rt.ReconstructionClips({"own": ([clip_of(spec, clip, "flow")], 1.0)}, 32, patch=8, keys=(3, 3), reverse=reverse).batch_at(0) for reverse in (0.0, 1.0))
    assert torch.equal(ahead.frames, back.frames.flip(1))
    known = ahead.flow_forward[0, 0].isfinite().all(-1)
    ratio = back.flow_backward[0, 2][known].norm(dim=-1) / ahead.flow_forward[0, 0][known].norm(dim=-1).clamp_min(1e-9)
    assert known.any() and torch.equal(known, back.flow_backward[0, 2].isfinite().all(-1)) and ratio[ratio > 0.1].std() < 0.01


@pytest.mark.parametrize("sets, options, message", [({}, {}, "sets: expected"), ({"a": ([], 1.0)}, {}, "sets: expected"), ({"rooms": (None, 0.0)}, {}, "sets: expected"), ({"rooms": (None, 1.0)}, {"keys": (1, 2)}, "keys"),
                                                   ({"rooms": (None, 1.0)}, {"reverse": 2}, "reverse")])
def test_wrong_streams_are_refused(sets, options, message):
    with pytest.raises(ValueError, match=message):
        rt.ReconstructionClips(sets, 32, **options)


# training

def test_motion_counts_only_where_it_is_known(tmp_path):
    spec, clip = room()
    batch = rt.training_batch(clip_of(spec, clip), [0, 1, 2], 24, 32).normalized()
    model = rt.start_model(mini(tmp_path)).eval()
    out = model(batch.images, batch.key_times, batch.is_static, cameras=batch.key_cameras)
    loss = rt.objective(mini(tmp_path, rendering=False))
    lost = batch.flow_forward.clone()
    lost[:, 0, :12] = torch.nan
    half = replace(batch, flow_forward=lost)
    known = half.flow_forward[0, 0].isfinite().all(-1) & half.valid[0, 0]
    error = lambda one, side, key, where: (getattr(out, f"velocity_{side}")[0, key] - getattr(one, f"flow_{side}")[0, key])[where].norm(dim=-1).mean()
    back = batch.flow_backward[0, 1].isfinite().all(-1) & batch.valid[0, 2]
    wanted = error(half, "forward", 0, known) + error(half, "backward", 1, back)
    assert torch.allclose(loss(out, half)[1]["motion"], wanted) and not torch.allclose(loss(out, batch)[1]["motion"], wanted)
    numbers = rt.motion_numbers(out, half)
    assert torch.allclose(numbers["epe_forward"], error(half, "forward", 0, known)) and 0 < numbers["known"] < 1


def test_training_goes_on_exactly_and_its_model_reads_back(tmp_path):
    spec, clip = room()
    settings = mini(write_npz(tmp_path / "clips", spec, clip, tracks=tracks_of(spec, clip)), sets=(f"npz={tmp_path / 'clips'}@2", "rooms"), accumulate=2, workers=1)
    whole = rt.train_reconstructor(settings, tmp_path / "run")
    before = load_tensors(tmp_path / "run/model/model.safetensors")
    shutil.rmtree(tmp_path / "run/checkpoints/reconstructor/step-00000002")
    again = rt.train_reconstructor({**settings.model_dump(), "workers": 0}, tmp_path / "run")
    after = load_tensors(tmp_path / "run/model/model.safetensors")
    assert again["loss"] == whole["loss"] and all(torch.equal(value, after[name]) for name, value in before.items())
    logged = json.loads((tmp_path / "run/logs/reconstructor.jsonl").read_text().splitlines()[0])
    assert {"loss", "camera", "depth", "gs_depth", "rendered_depth", "motion", "photometric", "opacity", "alpha", "epe_forward", "epe_backward", "known", "lr", "grad_norm", "seconds"} <= set(logged)
    assert logged["alpha"] == pytest.approx(1 - logged["opacity"], abs=1e-5)
    model = NeoVerseReconstructor.from_pretrained(tmp_path / "run/model")
    frames = torch.rand(1, 2, 3, 24, 32, generator=generator(0, "frames"))
    assert len(model(frames, torch.tensor([[0.0, 1.0]])).gaussians) == 1
    with pytest.raises(ValueError, match="lr"):
        rt.train_reconstructor(settings.model_copy(update={"lr": 1e-2}), tmp_path / "run")


def test_bfloat16_leaves_geometry_in_float32(tmp_path):
    settings = mini(tmp_path, sets=("rooms",), precision="bfloat16", iterations=1, warmup=0, save_every=0)
    assert rt.train_reconstructor(settings, tmp_path / "run")["skipped"] == 0
    model = rt.start_model(settings)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.rand(1, 2, 3, 24, 32), torch.tensor([[0.0, 1.0]]))
    assert {value.dtype for value in (out.depth, out.camtoworlds, out.velocity_forward, out.gaussians[0].gaussians.means)} == {torch.float32}


def test_what_is_frozen_stays_and_is_not_saved(tmp_path):
    settings = mini(tmp_path, sets=("rooms",), frozen=("backbone",), iterations=1, warmup=0)
    before = {name: value.clone() for name, value in rt.start_model(settings).state_dict().items()}
    result = rt.train_reconstructor(settings, tmp_path / "run")
    after = load_tensors(tmp_path / "run/model/model.safetensors")
    changed = {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert "backbone" not in changed and "depth_head" in changed and result["frozen"] > 0
    saved = load_tensors(tmp_path / "run/checkpoints/reconstructor/step-00000001/model.safetensors")
    assert saved and not any(name.startswith("model.backbone") for name in saved)
    again = rt.train_reconstructor(settings, tmp_path / "run")
    assert again["steps"] == 1 and again["loss"] == result["loss"]
    with pytest.raises(ValueError, match="frozen: expected beginnings"):
        rt.start_model(mini(tmp_path, frozen=("spine",)))
    module = rt.TrainedReconstructor(rt.start_model(settings), rt.objective(settings))
    with pytest.raises(RuntimeError, match="expected the trained parts"):
        module.load_state_dict({})


def test_starts_from_vggt_with_fresh_parts(tmp_path):
    config = ReconstructorConfig.tiny(patch_embed="dinov2", dino_layers=1, dino_heads=4, dino_grid=4, registers=1, prior_tokens=False, motion="none")
    tensors = NeoVerseReconstructor(config).state_dict()
    names = official_names(config, "vggt")
    save_tensors({theirs: tensors[ours] for theirs, ours in names.items()}, tmp_path / "model.safetensors")
    architecture = {"kept": (1, 2), "dino_heads": 4, "camera_heads": 4, "camera_steps": 2, "gaussian_hidden": 16}
    first, second = (rt.start_model(mini(tmp_path, reconstructor=str(tmp_path / "model.safetensors"), architecture=architecture)) for _ in range(2))
    assert first.config.motion == "bidirectional" and first.config.prior_tokens and first.training
    assert torch.equal(first.state_dict()["backbone.frame_blocks.0.attn.qkv.weight"], tensors["backbone.frame_blocks.0.attn.qkv.weight"])
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_saved_model_trains_on_as_it_is(tmp_path):
    rt.start_model(mini(tmp_path)).save_pretrained(tmp_path / "model")
    model = rt.start_model(mini(tmp_path, reconstructor=str(tmp_path / "model"), gradient_checkpointing=True, architecture={"dim": 64, "kept": [1, 2]}))
    assert model.config.gradient_checkpointing and model.backbone.config.gradient_checkpointing and model.training
    with pytest.raises(ValueError, match="own dim"):
        rt.start_model(mini(tmp_path, reconstructor=str(tmp_path / "model"), architecture={"dim": 128}))


def test_two_processes_are_one_with_two_clips(tmp_path):
    pytest.importorskip("accelerate")
    settings = mini(tmp_path, sets=("rooms",), rendering=False, iterations=1, warmup=0, save_every=0)
    alone = rt.train_reconstructor(settings.model_copy(update={"batch": 2}), tmp_path / "alone")
    together = launch(settings.model_copy(update={"devices": 2, "strategy": "ddp"}), tmp_path / "together", rt.train_reconstructor)
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert (tmp_path / "together/launch.log").read_text().count("rooms: drawn") == 1


@pytest.mark.parametrize("entries, message", [(("vkiti2=.",), "did you mean 'vkitti2'"), (("vkitti2",), "KIND=FOLDER"), (("rooms=.",), "KIND=FOLDER"), (("npz=a@0",), "above 0"), (("npz=a", "npz=b"), "each kind once")])
def test_wrong_sets_are_refused(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        rt.open_sets(mini(tmp_path, sets=entries))
    assert rt.named_folders("sets", ("npz=a=b@0.5", "rooms@2"), ("npz", "rooms")) == [("npz", Path("a=b"), 0.5), ("rooms", None, 2.0)]


# evaluation and the chapter's run

def llff(scene, seed, frames=24, width=32, height=24):
    clip = scene_clip(SceneSpec.random(seed), torch.linspace(0, 1, frames).tolist(), width, height)
    for row in range(frames):
        picture(scene / f"images/{row:03d}.png", (clip.rgb[row] * 255).round().byte().numpy())
    right, down, back, at = (clip.camtoworlds[:, :3, axis].double() * sign for axis, sign in ((0, 1), (1, 1), (2, -1), (3, 1)))
    size = torch.tensor([height, width, float(clip.Ks[0, 0, 0])], **FLOAT64).expand(frames, 3)
    np.save(scene / "poses_bounds.npy", np.concatenate([torch.stack([down, right, back, at, size], -1).reshape(frames, 15).numpy(), np.tile([0.5, 9.0], (frames, 1))], 1))


class Run:
    """What `run_reconstruction` wants of a run."""

    def __init__(self, folder):
        self.folder, self.device, self.metrics, self.used = folder, "cpu", {}, []

    def metric(self, name, value, **_):
        self.metrics[name] = value

    def data(self, name, **_):
        self.used.append(name)


def test_the_chapters_run_trains_and_judges(tmp_path):
    llff(tmp_path / "nvidia" / "room", 0)
    (tmp_path / "nvidia" / "empty").mkdir()
    shared = {**mini(tmp_path).model_dump(), "seeds": [3], "lr": 5.0, "iterations": 10**6, "lr_recon": 1e-3, "iterations_recon": 1, "warmup": 0, "recon_keyframes": [2, 2], "recon_sets": ["rooms"], "generator": "mini", "weight_decay": 9.0}
    run = Run(tmp_path / "run")
    found = rt.run_reconstruction(run, {**shared, "stage": "train_recon"})
    assert found[3]["steps"] == 1 and run.used == ["rooms"] and {"reconstructor.loss", "reconstructor.epe_forward", "reconstructor.alpha"} <= set(run.metrics)
    judge = {**shared, "stage": "eval", "reconstructor": str(tmp_path / "run/train_recon-3/model"), "eval_sets": [f"nvidia={tmp_path / 'nvidia'}"], "eval_steps": 2}
    rows = rt.run_reconstruction(run, judge)[3]
    assert [row["scenes"] for row in rows["rows"]] == [1] and list(rows["failed"]) == ["nvidia/empty"] and run.metrics["eval.nvidia.psnr"] >= run.metrics["eval.nvidia.psnr_start"]
    scene = tmp_path / "run/eval-3/scenes/nvidia/room.json"
    assert len(json.loads(scene.read_text())["views"]) == 12
    scene.write_text(scene.read_text().replace('"psnr": ', '"psnr": 1', 1))
    assert rt.run_reconstruction(run, judge)[3]["rows"][0]["psnr"] > 100
    with pytest.raises(ValueError, match="eval_steps"):
        rt.run_reconstruction(run, {**judge, "eval_steps": 3})


def test_tracks_of_the_true_room_beat_those_that_stand_still():
    spec = SceneSpec.random(2, motion="linear")
    clip = scene_clip(spec, [0.0, 0.5, 1.0], 64, 48)
    start, ids = clip.world[0, 2::6, 2::6].reshape(-1, 3), clip.ids[0, 2::6, 2::6].reshape(-1)
    world = torch.stack([scene_flow(spec, start, ids, 0.0, float(time)) for time in clip.times])
    inside = torch.einsum("tji,tnj->tni", clip.camtoworlds[:, :3, :3], world - clip.camtoworlds[:, None, :3, 3]).double()
    truth = {"tracks": inside, "visible": torch.ones(inside.shape[:2], dtype=torch.bool)}
    frames = replace(from_clip(clip), camtoworlds=None)
    oracle = OracleReconstructor(spec)
    moving = rt.score_tracks(oracle, frames, truth, width=64, height=48)
    still = rt.score_tracks(lambda pictures, times, **_: oracle(pictures, times, static=False, motion=False), frames, truth, width=64, height=48)
    assert moving["epe"] < 0.7 * still["epe"] and moving["apd"] > still["apd"] and moving["points"] > 50 and moving["scale"] == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="seen at two of the key frames"):
        rt.score_tracks(oracle, frames, {**truth, "visible": ~truth["visible"]}, width=64, height=48)


def test_scenes_are_found_by_name(tmp_path):
    for name in ("apple", "teddy", "other"):
        (tmp_path / "dycheck" / name).mkdir(parents=True)
    assert rt.protocol_scenes("dycheck", tmp_path / "dycheck") == ({"apple": (tmp_path / "dycheck/apple",), "teddy": (tmp_path / "dycheck/teddy",)}, ["block", "paper-windmill", "spin"])
    for name in ("Apartment_release_seq114_M1292", "Apartment_release_seq114_M1293"):
        (tmp_path / "adt" / name).mkdir(parents=True)
    assert rt.protocol_scenes("adt", tmp_path / "adt")[0]["seq114"][0].name.endswith("M1292")
    (tmp_path / "scannetpp/splits").mkdir(parents=True)
    (tmp_path / "scannetpp/splits/nvs_test.txt").write_text("aa\nbb\n")
    for name in ("aa", "cc"):
        (tmp_path / "scannetpp/data" / name).mkdir(parents=True)
    assert rt.protocol_scenes("scannetpp", tmp_path / "scannetpp") == ({"aa": (tmp_path / "scannetpp/data/aa",)}, ["bb"])
    with pytest.raises(FileNotFoundError, match="scenes of vrnerf"):
        rt.protocol_scenes("vrnerf", tmp_path / "dycheck")


@pytest.mark.parametrize("change, error, message", [
    ({"stage": "eval"}, ValueError, "eval_sets: expected"), ({"warmup": 5}, ValueError, "warmup: expected fewer"), ({"sets": ("npz=/nowhere",)}, FileNotFoundError, "sets: expected a folder"), ({"keys": (1, 3)}, ValueError, "keys"),
    ({"optimizer": "zero"}, ValueError, "several devices"),
])
def test_what_would_fail_later_is_refused_at_once(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        rt.check(mini(tmp_path, sets=("rooms",)).model_copy(update=change))
    text = rt.needs(rt.ReconstructorTraining(sets=("pointodyssey=/data@2", "rooms"), reconstructor="/weights/VGGT-1B/model.safetensors"))
    assert "CC-BY-NC-SA-4.0" in text and "non-commercial" in text and "150000 steps" in text
