"""The full-scale run on a miniature in the file format of TAP-Vid: reading, cues kept, interruption and resume, shares, refusals."""

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "miniatures"))
import tapvid

from papers10.adagar import full_scale
from papers10.adagar.full_scale import FullScale, clip_cues, open_clips, own_share, reconstruct_clips, tapvid_davis
from papers10.core.config import replace
from papers10.core.data import DataMissing, LicenceNotAccepted
from papers10.kernels.common import BackendUnavailable

TINY = dict(depth_model="luma", tracker="lk", masks="motion", track_stride=4, device="cpu", n_init=60, n_max=120, n_knots=3, steps=16, strategy="default", refine_start=4, refine_stop=12, refine_every=4, rates={}, save_every=4, watch_every=8, lpips="none", deterministic=True)


def settings_for(folder: Path, **changes) -> FullScale:
    return FullScale(**{"data_path": str(tapvid.tapvid_davis(folder)), **TINY, **changes})


def numbers(found: dict) -> dict:
    return {name: {key: value for key, value in clip.items() if key != "seconds"} for name, clip in found["by_clip"].items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    settings = settings_for(folder)
    return settings, folder / "run", reconstruct_clips(settings, folder / "run")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_pickle_is_read_in_every_protocol(tmp_path, protocol):
    clips = list(tapvid_davis(tapvid.tapvid_davis(tmp_path, protocol=protocol)))
    assert [clip.name for clip in clips] == ["bear", "car-turn"]
    clip, truth = clips[0], tapvid.square_clip()["clip"]
    assert clip.frames.dtype == torch.uint8 and np.array_equal(clip.frames.numpy(), truth["video"])
    assert torch.allclose(clip.points, torch.from_numpy(truth["points"]) * torch.tensor([32.0, 24.0]))
    assert np.array_equal(clip.occluded.numpy(), truth["occluded"]) and bool(clip.occluded.any())


def test_zip_folder_and_choice(tmp_path, monkeypatch):
    archive = tapvid.tapvid_davis(tmp_path, zipped=True)
    assert [clip.name for clip in tapvid_davis(archive, clips=["car-turn"])] == ["car-turn"]
    assert len(list(tapvid_davis(tmp_path))) == 2
    monkeypatch.setenv("PAPERS10_DATA", str(tmp_path))
    with pytest.raises(DataMissing, match="tapvid_davis"):
        next(tapvid_davis())
    tapvid.tapvid_davis(tmp_path)
    assert len(list(tapvid_davis())) == 2
    with pytest.raises(ValueError, match="clips: expected names among bear, car-turn, got bears"):
        next(tapvid_davis(archive, clips=["bears"]))


def test_reduced_frames_keep_points_in_place(tmp_path):
    path = tapvid.tapvid_davis(tmp_path)
    full, half = next(tapvid_davis(path)), next(tapvid_davis(path, size=12))
    assert half.frames.shape == (5, 12, 16, 3) and torch.allclose(half.points * 2, full.points)
    assert next(tapvid_davis(path, size=480)).frames.shape == full.frames.shape, "never enlarged"


class Harm:
    def __reduce__(self):
        return (os.system, ("exit 1",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": Harm()}, "no array"),
        ([1], "a mapping"),
        ({"a": {"video": 3}}, "the arrays video, points and occluded"),
        ({"a": {**tapvid.square_clip()["clip"], "occluded": np.zeros((7, 4), bool)}}, r"occluded \[n, 5\]"),
        ({"a": {**tapvid.square_clip()["clip"], "points": 9 * tapvid.square_clip()["clip"]["points"]}}, r"visible points in \[0, 1\]"),
        ({"a": {**tapvid.square_clip()["clip"], "video": np.zeros((5, 24, 32, 3))}}, "uint8"),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    (tmp_path / "clips.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        list(tapvid_davis(tmp_path / "clips.pkl"))


def test_truncated_file_is_refused(tmp_path):
    path = tapvid.tapvid_davis(tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="expected a pickle of numpy arrays"):
        list(tapvid_davis(path))


def test_cues_are_computed_once_and_anew_for_other_settings(tmp_path, monkeypatch):
    settings = settings_for(tmp_path)
    clip = next(open_clips(settings))
    first = clip_cues(clip, settings, tmp_path / "cues")
    assert first.tracks.tracks.shape[1:] == (5, 2) and first.depth.shape == first.masks.shape == (5, 24, 32) and first.masks.any()
    assert sorted(set(first.queried.tolist())) == [0, 1, 2, 3, 4]
    made = []
    real = full_scale.make_estimator
    monkeypatch.setattr(full_scale, "make_estimator", lambda settings, kind, *rest: made.append(kind) or real(settings, kind, *rest))
    again = clip_cues(clip, settings, tmp_path / "cues")
    assert not made and torch.equal(again.depth, first.depth) and torch.equal(again.tracks.tracks, first.tracks.tracks) and torch.equal(again.masks, first.masks)
    clip_cues(clip, replace(settings, depth_model="plane"), tmp_path / "cues")
    assert made == ["depth"]
    (tmp_path / "cues" / "bear" / "masks.safetensors").write_bytes(b"half")
    clip_cues(clip, settings, tmp_path / "cues")
    assert made == ["depth", "depth", "masks"]
    assert not list((tmp_path / "cues").rglob(".*")), "no temporary file is left"


def test_davis_annotations_are_masks(tmp_path):
    settings = settings_for(tmp_path, masks="davis", davis_masks=str(tapvid.davis_masks(tmp_path)))
    cues = clip_cues(next(open_clips(settings)), settings, tmp_path / "cues")
    assert np.array_equal(cues.masks.numpy(), tapvid.square_clip()["masks"])
    with pytest.raises(DataMissing, match="davis_masks"):
        full_scale.davis_masks(settings, "camel", (24, 32))


def test_the_whole_path_learns_and_reports(whole):
    _, folder, found = whole
    assert found["clips"] == 2 and set(found["by_clip"]) == {"bear", "car-turn"}
    clip = found["by_clip"]["bear"]
    assert {"psnr", "ssim", "lpips", "detail_psnr", "depth_consistency", "primitives", "mean_weight"} <= set(clip) and clip["lpips"] is None
    assert 60 < clip["primitives"] <= 120
    assert all(0 <= clip[name] <= 1 for name in ("average_jaccard", "average_pts_within_thresh", "occlusion_accuracy")) and clip["temporal_coherence"] >= 0
    pyarrow = pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.read_table(folder / "results.parquet").to_pylist()
    assert len(rows) == 10 and {row["split"] for row in rows} == {"train"}
    assert json.loads((folder / "summary.json").read_text())["means"]["psnr"] == found["means"]["psnr"]
    log = [json.loads(line) for line in (folder / "clips" / "bear" / "logs" / "bear.jsonl").read_text().splitlines()]
    assert {"rgb", "track", "depth", "mask", "curv", "arap", "primitives"} <= set(log[-1])
    watch = [json.loads(line) for line in (folder / "clips" / "bear" / "logs" / "bear-watch.jsonl").read_text().splitlines()]
    assert [line["step"] for line in watch] == [8, 16] and {"psnr_0", "psnr_4", "curvature", "beyond_nyquist"} <= set(watch[0])
    assert all(watch[1][f"psnr_{frame}"] > watch[0][f"psnr_{frame}"] for frame in (0, 1, 3, 4)) and watch[0]["curvature"] > 0
    assert len(list((folder / "clips" / "bear" / "pictures").glob("*.png"))) == 2


def test_interrupted_and_resumed_gives_the_same_numbers(whole, tmp_path, monkeypatch):
    settings, _, found = whole
    real = full_scale._Watch.__call__

    def stops(self, state):
        real(self, state)
        if state.step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(full_scale._Watch, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            reconstruct_clips(settings, tmp_path)
    assert [path.name for path in (tmp_path / "clips" / "bear" / "checkpoints" / "bear").iterdir()] == ["step-00000004", "step-00000008"]
    again = reconstruct_clips(settings, tmp_path)
    assert numbers(again) == numbers(found)
    monkeypatch.setattr(full_scale, "reconstruct_clip", None)
    assert reconstruct_clips(settings, tmp_path)["by_clip"] == again["by_clip"], "what is finished is returned"
    with pytest.raises(ValueError, match="folder: .*gamma"):
        reconstruct_clips(replace(settings, gamma=0.25), tmp_path)


def test_one_failing_clip_does_not_cost_the_others(whole, tmp_path, monkeypatch):
    settings, _, _ = whole
    real = full_scale.reconstruct_clip

    def fails(scene, settings, **options):
        if options["name"] == "bear":
            raise FloatingPointError("no good")
        return real(scene, settings, **options)

    monkeypatch.setattr(full_scale, "reconstruct_clip", fails)
    with pytest.raises(RuntimeError, match="1 of 2 clips failed: bear: FloatingPointError: no good"):
        reconstruct_clips(replace(settings, steps=2, save_every=0), tmp_path)
    assert (tmp_path / "clips" / "car-turn" / "result.json").exists()


def test_hidden_frames_are_scored_apart(tmp_path):
    found = reconstruct_clips(settings_for(tmp_path, holdout="odd", steps=4, save_every=0, clips=["bear"], masks="none", depth_model="none"), tmp_path / "run")
    clip = found["by_clip"]["bear"]
    assert clip["held_out_psnr"] != clip["psnr"] and found["clips"] == 1


def test_a_perfect_model_of_the_tracks_scores_perfectly(tmp_path, monkeypatch):
    settings = settings_for(tmp_path)
    clip = next(open_clips(settings))
    exact = full_scale.Tracks(clip.points, ~clip.occluded, torch.ones(clip.occluded.shape))
    monkeypatch.setattr(full_scale, "track_points", lambda *arguments, **options: exact)
    scores = full_scale._track_scores(None, clip.points, clip.occluded, (32, 24), settings)
    assert scores == {"average_jaccard": 1.0, "average_pts_within_thresh": 1.0, "occlusion_accuracy": 1.0, "temporal_coherence": 0.0}


def test_a_start_from_tracks_follows_the_points(tmp_path):
    score = {}
    for tracker in ("lk", "none"):
        settings = settings_for(tmp_path, tracker=tracker, n_init=150, steps=1, strategy="none", save_every=0, clips=["bear"])
        score[tracker] = reconstruct_clips(settings, tmp_path / tracker)["by_clip"]["bear"]["average_pts_within_thresh"]
    assert score["lk"] > 2 * score["none"], "the square moves four pixels a frame, which a still start does not know"


def test_lpips_is_a_number_or_nothing(tmp_path, monkeypatch):
    from papers10.splat.metrics import PerceptualDistance

    settings = settings_for(tmp_path, steps=2, save_every=0, clips=["bear"], lpips="alex")
    absent = PerceptualDistance(None, "LPIPS 0.1, alex", "no weights")
    monkeypatch.setattr(full_scale, "lpips_distance", lambda *pictures, **options: absent)
    clip = reconstruct_clips(settings, tmp_path / "absent")["by_clip"]["bear"]
    assert clip["lpips"] is None and "LPIPS 0.1, alex: no weights" in clip["notes"]
    monkeypatch.setattr(full_scale, "lpips_distance", lambda a, b, **options: PerceptualDistance((a - b).abs().mean((1, 2, 3)), "LPIPS 0.1, alex"))
    clip = reconstruct_clips(settings, tmp_path / "there")["by_clip"]["bear"]
    rows = json.loads((tmp_path / "there" / "clips" / "bear" / "result.json").read_text())["rows"]
    assert clip["lpips"] == pytest.approx(sum(row["lpips"] for row in rows) / 5) and all(0 < row["lpips"] < 1 for row in rows)


def test_without_any_cue(tmp_path):
    found = reconstruct_clips(settings_for(tmp_path, steps=2, save_every=0, clips=["bear"], masks="none", depth_model="none", tracker="none", lambda_arap=0.0), tmp_path / "run")
    assert found["by_clip"]["bear"]["psnr"] > 5


def test_a_folder_of_pictures_and_one_with_cues(tmp_path):
    truth = tapvid.square_clip()
    write = full_scale.write_image
    for kind in ("plain", "with/images", "with/masks"):
        (tmp_path / kind).mkdir(parents=True)
    for frame, picture in enumerate(truth["clip"]["video"]):
        for kind in ("plain", "with/images"):
            write(tmp_path / kind / f"{frame:05d}.png", torch.from_numpy(picture))
        write(tmp_path / "with" / "masks" / f"{frame:05d}.png", torch.from_numpy(255 * truth["masks"][frame].astype(np.uint8)))
    settings = replace(settings_for(tmp_path), data_path=str(tmp_path / "plain"))
    assert full_scale.clip_names(settings) == ["plain"]
    clip = next(open_clips(settings))
    assert np.array_equal(clip.frames.numpy(), truth["clip"]["video"]) and clip.points is None
    with_cues = replace(settings, data_path=str(tmp_path / "with"), steps=2, save_every=0)
    clip = next(open_clips(with_cues))
    scene = full_scale.scene_of(clip, with_cues, tmp_path / "cues")
    assert clip.frames is None and np.array_equal(scene.masks.numpy(), truth["masks"]) and scene.depth is None and not (tmp_path / "cues").exists()
    assert reconstruct_clips(with_cues, tmp_path / "run")["by_clip"]["with"]["psnr"] > 5
    with pytest.raises(ValueError, match="clips: expected names among plain"):
        next(open_clips(replace(settings, clips=["other"])))


def test_depth_is_aligned_along_the_tracks_and_stillness_is_background(tmp_path, monkeypatch):
    asked = {}

    class Network:
        def track(self, frames, queries):
            return full_scale.Tracks(queries[:, None, 1:].repeat(1, len(frames), 1), torch.ones(len(queries), len(frames), dtype=torch.bool), torch.ones(len(queries), len(frames)))

        def depth(self, frames, tracks=None):
            asked["tracks"] = tracks
            return torch.ones(frames.shape[:3])

        def segment(self, frames):
            raise ValueError("points: expected a prompt (points or box), got none, and nothing moves by itself in these frames")

    monkeypatch.setattr(full_scale, "make_estimator", lambda *arguments: Network())
    settings = settings_for(tmp_path, depth_model="depth-anything", tracker="tapir", masks="sam2", holdout="odd")
    with pytest.warns(UserWarning, match="nothing moves"):
        cues = clip_cues(next(open_clips(settings)), settings, tmp_path / "cues")
    assert asked["tracks"] is not None and cues.tracks.tracks.shape[1] == len(cues.masks) == 3 and not cues.masks.any()


def test_shares(monkeypatch):
    names = list("abcdefg")
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert own_share(names) == names
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert own_share(names) == list("bdf")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    assert own_share(names) == ["c", "f"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    parts = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        parts += own_share(names)
    assert sorted(parts) == names


def test_a_worker_of_a_launcher_does_its_own_clip_alone(whole, tmp_path, monkeypatch, capsys):
    settings, _, found = whole
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    full_scale.main([str(tmp_path / "settings.json"), str(tmp_path / "run")])
    said = capsys.readouterr().out.splitlines()
    assert "one process a clip" in said[0] and json.loads(said[-1])["clips"] == 1
    mine = json.loads((tmp_path / "run" / "clips" / "car-turn" / "result.json").read_text())
    assert mine["psnr"] == found["by_clip"]["car-turn"]["psnr"], "no gradients are averaged over clips"
    assert os.environ["WORLD_SIZE"] == "2" and not (tmp_path / "run" / "clips" / "bear").exists()
    with pytest.raises(SystemExit, match="usage"):
        full_scale.main([])


def test_the_experiment_of_the_chapter(tmp_path):
    from papers10.core import presets, runs

    changes = dict(experiments=["davis"], device="cpu", backend="auto", data_path=str(tapvid.tapvid_davis(tmp_path)), resolution=24, n_init=40, steps=4, refine_stop=0, out_dir=str(tmp_path / "runs"))
    small = dict(depth_model="luma", tracker="lk", masks="motion", seeds=[0], resume=False, preset="paper", wandb="disabled")
    run = runs.start("adagar", {**presets.load("adagar").values("paper"), **changes, **small})
    found = full_scale.run_davis(run, run.parameters)
    assert set(found[0]) == {"bear", "car-turn"}
    metrics = run._result()["metrics"]
    assert metrics["clips.psnr"]["n_items"] == 2 and "davis.psnr" not in metrics, "two clips say nothing about the claims"
    assert full_scale.run_davis(run, run.parameters) == found, "each clip is a unit"
    run.finish()


def test_needs_name_hours_memory_and_licences():
    said = full_scale.needs(FullScale())
    assert "45 GPU-hours" in said and "24 GB" in said and "CC-BY-4.0" in said and "non-commercial" in said and "papers10[lm,data,splat,metrics]" in said


def test_refusals_before_anything_starts(tmp_path, monkeypatch):
    settings = settings_for(tmp_path)
    full_scale.check(settings)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="device: expected a GPU"):
            full_scale.check(replace(settings, device="cuda"))
    monkeypatch.setenv("PAPERS10_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("PAPERS10_HOME", str(tmp_path / "nothing"))
    with pytest.raises(DataMissing, match="tapvid_davis.pkl"):
        full_scale.check(replace(settings, data_path=None))
    with pytest.raises(FileNotFoundError, match="data_path"):
        full_scale.check(replace(settings, data_path=str(tmp_path / "no.mp4")))
    with pytest.raises(DataMissing, match="papers10 data get bootstapir"):
        full_scale.check(replace(settings, tracker="tapir"))
    with pytest.raises(LicenceNotAccepted, match="CoTracker"):
        full_scale.check(replace(settings, tracker="cotracker"))
    with pytest.raises(LicenceNotAccepted, match="Large"):
        full_scale.check(replace(settings, depth_model="depth-anything", depth_checkpoint="depth-anything/Depth-Anything-V2-Large-hf"))
    with pytest.raises(DataMissing, match="davis2017"):
        full_scale.check(replace(settings, masks="davis"))
    with pytest.raises(ValueError, match="tracker"):
        full_scale.check(replace(settings, tracker="lkk"))


def test_unknown_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="did you mean 'tracker'"):
        FullScale(trackr="lk")


def test_the_table_of_the_paper():
    rows = {row["method"]: row for row in full_scale.PAPER_TABLE}
    assert len(rows) == 7 and round(rows["AdaGaR"]["psnr"] - rows["Splatter a Video"]["psnr"], 2) == 6.86
