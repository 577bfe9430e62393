"""Clips with depth, poses and tracks become batches, and the reconstructor trains on them."""

import shutil

import numpy as np
import pytest
import torch

from papers10.core.checkpoint import load_tensors
from papers10.core.random import generator
from papers10.neoverse import reconstructor_training as rt
from papers10.neoverse.reconstructor import NeoVerseReconstructor
from papers10.neoverse.world import SceneSpec, scene_clip, scene_flow
from papers10.splat.cameras import invert_poses


def room(motion="linear", frames=7, width=32, height=24):
    spec = SceneSpec.random(1, motion=motion)
    return spec, scene_clip(spec, torch.linspace(0, 1, frames).tolist(), width, height)


def clip_of(spec, clip, motion="tracks", **changes):
    tracks = torch.stack([scene_flow(spec, clip.world[0], clip.ids[0], float(clip.times[0]), float(time)).reshape(-1, 3) for time in clip.times])
    known = {"tracks": tracks, "visible": torch.ones(tracks.shape[:2], dtype=torch.bool)} if motion == "tracks" else {}
    return rt.DepthClip("room", lambda row: (clip.rgb[row], clip.depth[row]), clip.camtoworlds.double(), clip.Ks.double(), motion, **{**known, **changes}).check()


def write_npz(folder, spec, clip, **changes):
    own = clip_of(spec, clip)
    data = dict(frames=(clip.rgb * 255).round().byte().numpy(), depth=clip.depth.numpy(), camtoworlds=clip.camtoworlds.numpy(), Ks=clip.Ks.numpy(), tracks=own.tracks.numpy(), visible=own.visible.numpy())
    folder.mkdir(exist_ok=True)
    np.savez(folder / "room.npz", **{name: value for name, value in {**data, **changes}.items() if value is not None})
    return folder


def mini(folder, **changes):
    return rt.ReconstructorTraining(**{**dict(start="tiny", sets={"npz": str(folder)}, width=32, height=24, keys=(2, 3), iterations=2, lr=1e-3, warmup=1, precision="float32", gradient_checkpointing=False,
                                              devices=1, strategy="single", device="cpu", save_every=1, log_every=1), **changes})


def test_tracks_are_the_scene_flow_in_the_own_camera():
    spec, clip = room()
    batch = rt.training_batch(clip_of(spec, clip), [0, 1, 2, 3, 4], 24, 32)
    exact = (scene_flow(spec, clip.world[0], clip.ids[0], float(clip.times[0]), float(clip.times[2])) - clip.world[0]) @ clip.camtoworlds[0, :3, :3]
    known = batch.moving[0, 0]
    assert known.float().mean() > 0.9 and torch.allclose(batch.flow_forward[0, 0][known], exact[known].float(), atol=1e-4)
    assert batch.flow_backward[0, 0].abs().sum() == 0 and batch.flow_forward[0, -1].abs().sum() == 0
    assert torch.allclose(batch.camtoworlds[0, 0], torch.eye(4), atol=1e-6) and torch.allclose(batch.depth[0], clip.depth[:5].float())


def test_hidden_tracks_do_not_count():
    spec, clip = room()
    own = clip_of(spec, clip)
    behind = own.tracks.clone()
    behind[0] += (behind[0] - clip.camtoworlds[0, :3, 3]) * 0.5
    unseen = own.visible.clone()
    unseen[0] = False
    for change in ({"tracks": behind}, {"visible": unseen}):
        batch = rt.training_batch(clip_of(spec, clip, **change), [0, 1, 2], 24, 32)
        assert not batch.moving[0, 0].any() and batch.flow_forward[0, 0].abs().sum() == 0


def test_static_and_unknown_motion():
    spec, clip = room("static")
    still = rt.training_batch(clip_of(spec, clip, "static"), [0, 2, 4], 24, 32)
    assert bool(still.is_static) and still.moving.all() and still.flow_forward.abs().sum() == 0
    unknown = rt.training_batch(clip_of(spec, clip, "unknown"), [0, 2, 4], 24, 32)
    assert unknown.flow_forward is None and not bool(unknown.is_static)
    both = rt.collate([unknown, still])
    assert both.moving[1].all() and not both.moving[0].any() and both.flow_forward.shape[0] == 2


def test_crops_keep_points_on_their_pixels():
    spec, clip = room(width=48, height=24)
    batch = rt.training_batch(clip_of(spec, clip), [0, 1, 2], 24, 32)
    assert batch.frames.shape == (1, 3, 3, 24, 32) and float(batch.Ks[0, 0, 0, 2]) == pytest.approx(16, abs=1e-4)
    assert torch.equal(batch.depth[0, 0], clip.depth[0, :, 8:40].float())
    known = batch.moving[0, 0]
    exact = (scene_flow(spec, clip.world[0], clip.ids[0], float(clip.times[0]), float(clip.times[2])) - clip.world[0]) @ clip.camtoworlds[0, :3, :3]
    assert known.float().mean() > 0.9 and torch.allclose(batch.flow_forward[0, 0][known], exact[:, 8:40][known].float(), atol=1e-4)


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 2, 3], [2, 1, 0], [0, 1, 9], [0, 0, 1]])
def test_wrong_rows_are_refused(rows):
    spec, clip = room()
    with pytest.raises(ValueError, match="rows: expected an odd number"):
        rt.training_batch(clip_of(spec, clip), rows, 24, 32)


def test_wrong_clips_are_refused():
    spec, clip = room()
    with pytest.raises(ValueError, match="tracks: expected"):
        clip_of(spec, clip, "static", tracks=torch.zeros(7, 2, 3))
    with pytest.raises(ValueError, match="motion: expected one of"):
        clip_of(spec, clip, "some")
    with pytest.raises(ValueError, match="Ks: expected"):
        rt.DepthClip("room", None, clip.camtoworlds.double(), clip.Ks[:2].double()).check()
    wrong = rt.DepthClip("room", lambda row: (clip.rgb[row], clip.depth[row, :4]), clip.camtoworlds.double(), clip.Ks.double())
    with pytest.raises(ValueError, match="depth: expected the picture's size"):
        rt.training_batch(wrong, [0, 1, 2], 24, 32)


def test_tartanair_axes(tmp_path):
    from PIL import Image

    scene = tmp_path / "office" / "P000"
    for part in ("image_left", "depth_left"):
        (scene / part).mkdir(parents=True)
    for row in range(2):
        Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(scene / "image_left" / f"{row:06d}_left.png")
        np.save(scene / "depth_left" / f"{row:06d}_left_depth.npy", np.ones((24, 32), np.float32))
    # The second camera stands one unit north (ahead), two east (right), three down, turned by 90° about down: it looks east.
    half = np.sqrt(0.5)
    np.savetxt(scene / "pose_left.txt", [[0, 0, 0, 0, 0, 0, 1], [1, 2, 3, 0, 0, half, half]])
    clip = rt.load_tartanair(tmp_path)[0]
    assert torch.allclose(clip.camtoworlds[1, :3, 3], torch.tensor([2.0, 3, 1], dtype=torch.float64))
    assert torch.allclose(clip.camtoworlds[1, :3, 2], torch.tensor([1.0, 0, 0], dtype=torch.float64), atol=1e-9)
    assert clip.motion == "static" and float(clip.Ks[0, 0, 0]) == pytest.approx(16)
    (scene / "depth_left" / "000001_left_depth.npy").unlink()
    with pytest.raises(ValueError, match="as many pictures, depths and poses"):
        rt.load_tartanair(tmp_path)


def test_missing_and_broken_folders_are_named(tmp_path):
    for loader in (rt.load_tartanair, rt.load_vkitti2, rt.load_pointodyssey):
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


def test_batches_depend_on_seed_and_number_alone():
    spec, clip = room()
    sets = {"own": ([clip_of(spec, clip)], 2.0), "rooms": (None, 1.0)}
    stream = rt.ReconstructionClips(sets, 24, 32, batch=2, keys=(2, 3))
    found = [next(stream) for _ in range(2)]
    later = rt.ReconstructionClips(sets, 24, 32, batch=2, keys=(2, 3))
    later.load_state_dict({"drawn": 1})
    assert torch.equal(next(later).depth, found[1].depth)
    halves = [next(rt.ReconstructionClips(sets, 24, 32, keys=(2, 3), rank=rank, world=2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([half.frames for half in halves]), found[0].frames)
    points = found[0].depth[:, ::2][found[0].valid[:, ::2]]
    assert points.min() > 0 and torch.allclose(found[0].camtoworlds[:, 0], torch.eye(4).expand(2, 4, 4), atol=1e-5)


@pytest.mark.parametrize("sets, options, message", [({}, {}, "sets: expected"), ({"a": ([], 1.0)}, {}, "sets: expected"), ({"rooms": (None, 0.0)}, {}, "sets: expected"), ({"rooms": (None, 1.0)}, {"keys": (1, 2)}, "keys"),
                                                   ({"rooms": (None, 1.0)}, {"reverse": 2}, "reverse")])
def test_wrong_streams_are_refused(sets, options, message):
    with pytest.raises(ValueError, match=message):
        rt.ReconstructionClips(sets, 24, 32, **options)


def test_short_clips_are_refused_when_reached():
    spec, clip = room(frames=3)
    with pytest.raises(ValueError, match="at least 9 frames for 5 key frames, got 3"):
        next(rt.ReconstructionClips({"own": ([clip_of(spec, clip)], 1.0)}, 24, 32, keys=(5, 5)))


def test_motion_counts_only_where_it_is_known(tmp_path):
    spec, clip = room()
    batch = rt.training_batch(clip_of(spec, clip), [0, 1, 2], 24, 32).normalized()
    model = rt.start_model(mini(tmp_path)).eval()
    out = model(batch.images, batch.key_times, batch.is_static, cameras=batch.key_cameras)
    loss = rt.objective(mini(tmp_path, rendering=False))
    first = loss(out, batch)[1]["motion"]
    spoiled = torch.where(batch.moving[..., None], batch.flow_forward, 99.0)
    assert torch.equal(loss(out, rt.replace(batch, flow_forward=spoiled))[1]["motion"], first)


def test_training_goes_on_exactly_and_its_model_reads_back(tmp_path):
    settings = mini(write_npz(tmp_path / "clips", *room()))
    whole = rt.train_reconstructor(settings, tmp_path / "run")
    before = load_tensors(tmp_path / "run/model/model.safetensors")
    shutil.rmtree(tmp_path / "run/checkpoints/reconstructor/step-00000002")
    again = rt.train_reconstructor(settings.model_dump(), tmp_path / "run")
    after = load_tensors(tmp_path / "run/model/model.safetensors")
    assert again["loss"] == whole["loss"] and all(torch.equal(value, after[name]) for name, value in before.items())
    model = NeoVerseReconstructor.from_pretrained(tmp_path / "run/model")
    frames = torch.rand(1, 2, 3, 24, 32, generator=generator(0, "frames"))
    assert len(model(frames, torch.tensor([[0.0, 1.0]])).gaussians) == 1
    with pytest.raises(ValueError, match="lr"):
        rt.train_reconstructor(mini(tmp_path / "clips", lr=1e-2), tmp_path / "run")


def test_what_is_frozen_stays(tmp_path):
    settings = mini(write_npz(tmp_path / "clips", *room()), frozen=["backbone"], iterations=1, warmup=0)
    before = {name: value.clone() for name, value in rt.start_model(settings).state_dict().items()}
    rt.train_reconstructor(settings, tmp_path / "run")
    after = load_tensors(tmp_path / "run/model/model.safetensors")
    changed = {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert "backbone" not in changed and "depth_head" in changed
    with pytest.raises(ValueError, match="frozen: expected beginnings"):
        rt.start_model(mini(tmp_path, frozen=["spine"]))


def test_unknown_sets_and_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'vkitti2'"):
        rt.open_sets(mini(tmp_path, sets={"vkiti2": "."}))
    with pytest.raises(ValueError, match="weights: expected names among rooms"):
        rt.open_sets(mini(tmp_path, sets={"rooms": ""}, weights={"room": 1.0}))


def test_poses_of_kilometres_keep_their_centimetres():
    spec, clip = room()
    far = clip.camtoworlds.double().clone()
    far[:, :3, 3] += torch.tensor([1e6, -2e6, 5e5], dtype=torch.float64)
    moved = rt.DepthClip("far", lambda row: (clip.rgb[row], clip.depth[row]), far, clip.Ks.double(), "unknown")
    near = rt.training_batch(clip_of(spec, clip, "unknown"), [0, 1, 2], 24, 32)
    assert torch.allclose(rt.training_batch(moved, [0, 1, 2], 24, 32).camtoworlds, near.camtoworlds, atol=1e-6)
    assert torch.allclose(near.camtoworlds[0, 1].double(), invert_poses(clip.camtoworlds[0].double()) @ clip.camtoworlds[1].double(), atol=1e-6)
