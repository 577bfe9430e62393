"""The training at full scale on miniatures in the true layouts: readers, cache, windows, every way to motion, resume, processes, refusals."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "miniatures"))
import avatar

from papers10.avatar_forcing import full_scale
from papers10.avatar_forcing.audio import EnvelopeFeatures
from papers10.avatar_forcing.full_scale import (
    CachedClips,
    FullScale,
    clip_features,
    clips,
    find_clips,
    read_motion,
    write_features,
)
from papers10.core import checkpoint
from papers10.core.config import ConfigError, replace
from papers10.core.data import DataMissing

TINY = dict(
    audio="envelope", detector="none", hidden=16, num_layers=1, num_heads=2, audio_dim=8, train_steps=6, batch_size=4, micro_batch=2, lr=3e-3, warmup=2, ema=0.5, dpo_steps=3, dpo_windows=4, dpo_lr=1e-3,
    loser_mode="drop_condition", num_steps=2, eval_clips=2, eval_frames=50, eval_batch=2, latency_blocks=2, dtype="float32", device="cpu", save_every=2, eval_every=0, talking_steps=2,
)  # fmt: skip


def tiny(**changes):
    return FullScale(**{**TINY, "motion_space": "params", **changes})


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    return avatar.folder(tmp_path_factory.mktemp("mine"))


@pytest.fixture(scope="module")
def plain(mine):
    return tiny(dataset="folder", root=str(mine), expression_dims=3)


@pytest.fixture(scope="module")
def whole(plain, tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    return full_scale.launch(plain, place), place


# Readers


def test_folder_is_resampled_to_25(mine):
    clip = next(clips("folder", mine))
    assert clip["clip_id"] == "clip0" and clip["split"] == "train" and clip["fps"] == 25
    assert clip["avatar_motion"].shape == (60, 5) and clip["user_motion"].shape == (52, 5), "72 and 62 rows at 30 a second"
    assert clip["avatar_audio"].shape == (round(72 / 30 * 16_000),) and clip["avatar_video"] is None
    wanted = torch.from_numpy(avatar.rows(72, 5))
    assert torch.allclose(clip["avatar_motion"][5], wanted[6], atol=1e-5)


def test_missing_sides_are_none_not_zeros(tmp_path):
    clip = next(clips("folder", avatar.folder(tmp_path, user=False)))
    assert clip["user_motion"] is None and clip["user_audio"] is None
    made, numbers = clip_features(clip, EnvelopeFeatures())
    assert set(made) == {"avatar_motion", "avatar_audio", "avatar_voice"} and numbers == {"frames": 60, "held": 0}


def test_seamless_pairs_people_and_repairs_rows(tmp_path):
    pytest.importorskip("av")
    root = avatar.seamless(tmp_path)
    found = find_clips("seamless", root, "train")
    assert [clip.clip_id[-5:] for clip in found] == ["P0011", "P0012", "P0013", "P0014"], "the fifth is alone"
    assert found[0].user.audio.stem == found[1].clip_id and found[1].user.audio.stem == found[0].clip_id
    clip = next(clips("seamless", root))
    assert clip["avatar_motion"].shape == (60, 6) and clip["avatar_motion"].abs().max() < 2
    assert abs(len(clip["avatar_audio"]) - 38_400) < 200, "48 kHz became 16"
    with pytest.raises(ValueError, match="in the split val"):
        find_clips("seamless", root, "val")


def test_vico_listener_is_an_avatar_without_a_voice(tmp_path):
    pytest.importorskip("av")
    clip = next(clips("vico", avatar.vico(tmp_path), films=True))
    assert clip["avatar_video"].name == "train0.listener.mp4" and clip["avatar_audio"] is None
    assert clip["user_video"].name == "train0.speaker.mp4" and len(clip["user_audio"]) == 38_400


def test_hdtf_reads_lists_and_sound(tmp_path):
    pytest.importorskip("av")
    root = avatar.hdtf(tmp_path)
    assert [clip.clip_id for clip in find_clips("hdtf", root, "test")] == ["RD_test0", "RD_test1"]
    clip = next(clips("hdtf", root, films=True))
    assert clip["user_video"] is None and abs(len(clip["avatar_audio"]) - 38_400) < 2100


def test_dualtalk_must_be_told_its_arrays_and_rate(tmp_path):
    root = avatar.dualtalk(tmp_path)
    with pytest.raises(ValueError, match="motion_keys.*it has exp, pose"):
        next(clips("dualtalk", root))
    with pytest.raises(ValueError, match="motion_fps"):
        next(clips("dualtalk", root, motion_keys=("exp", "pose")))
    both = list(clips("dualtalk", root, motion_keys=("exp", "pose"), motion_fps=25.0))
    assert len(both) == 2 and torch.equal(both[0]["avatar_motion"], both[1]["user_motion"])


def test_drawn_conversations_have_all_streams():
    clip = next(clips("drawn", None, "test", count=1, frames=30))
    assert clip["avatar_motion"].shape == (30, 8) and clip["user_audio"].shape == (30 * 640,)


# Cache and windows


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Three clips whose rows are their numbers: two with every stream, one without the user."""
    place = tmp_path_factory.mktemp("cache")
    for number, length in enumerate((40, 30, 20)):
        count = torch.arange(length).float()[:, None]
        made = {"avatar_motion": torch.cat((count, torch.full_like(count, number)), 1), "avatar_audio": count.expand(-1, 3), "avatar_voice": count[:, 0]}
        if number < 2:
            made |= {"user_motion": made["avatar_motion"] + 100, "user_audio": count.expand(-1, 3) + 0.5}
        write_features(place, "train", f"clip {number}", made, {"frames": length, "held": 0})
    return place


def test_windows_are_whole_and_of_one_kind(cached):
    split = CachedClips(cached)
    assert split.lengths == [40, 30, 20] and split.motion_dim == 2 and split.names[0] == "clip_0"
    draws, kinds = split.windows(3, 10, seed=1), set()
    for _ in range(20):
        batch = next(draws)
        kinds.add(tuple(sorted(batch)))
        motion = batch["motion"]
        assert (motion[:, :, 0].diff(dim=1) == 1).all() and (motion[:, 1:, 1] == motion[:, :1, 1]).all(), "one clip, in order"
        assert torch.equal(batch["avatar_audio"][..., 0], motion[..., 0]) and (batch["ref"][:, 1] == motion[:, 0, 1]).all()
        if "user_motion" in batch:
            assert torch.equal(batch["user_motion"], motion + 100)
    assert kinds == {("avatar_audio", "motion", "ref"), ("avatar_audio", "motion", "ref", "user_audio", "user_motion")}


def test_every_window_is_equally_likely(cached):
    draws = CachedClips(cached).windows(25, 20, seed=0)
    counts = torch.zeros(3)
    for _ in range(100):
        batch = next(draws)
        counts += torch.bincount(batch["motion"][:, 0, 1].long(), minlength=3)
    share = counts / counts.sum()
    # 21, 11 and 1 windows; 100 draws of a kind, 25 clips each: the standard error of the rare kind is 0.017, of the others 0.02
    assert (share - torch.tensor([21, 11, 1]) / 33).abs().max() < 0.07


def test_reference_is_the_first_or_any_frame(cached):
    split = CachedClips(cached)
    batch = next(split.windows(4, 10, reference="first"))
    assert torch.equal(batch["ref"], batch["motion"][:, 0])
    apart = [bool((batch["ref"] != batch["motion"][:, 0]).any()) for _, batch in zip(range(3), split.windows(4, 10))]
    assert all(apart)


def test_draws_go_on_from_a_state(cached):
    draws = CachedClips(cached).windows(2, 10)
    next(draws)
    state = draws.state_dict()
    later = [next(draws) for _ in range(3)]
    again = CachedClips(cached).windows(2, 10)
    again.load_state_dict(state)
    for batch, other in zip(later, again):
        assert set(batch) == set(other) and all(torch.equal(batch[name], other[name]) for name in batch)


def test_pieces_come_from_every_clip(cached):
    split = CachedClips(cached)
    assert split.tensors(10)["avatar_motion"].shape == (7, 10, 2)
    pieces = split.tensors(10, limit=3)
    assert pieces["avatar_motion"][:, 0].tolist() == [[0, 0], [0, 1], [10, 0]]
    assert len(split.tensors(10, needed=("avatar_audio",))["avatar_motion"]) == 9
    mean, std = full_scale.motion_scale(split)
    scaled = CachedClips(cached, scale=(mean, std))
    rows = torch.cat([scaled.read(number, ["avatar_motion"])["avatar_motion"] for number in range(3)])
    assert rows.mean(0).abs().max() < 1e-5 and (rows.std(0, correction=0) - 1).abs().max() < 1e-4
    assert torch.allclose(scaled.read(0, ["user_motion"])["user_motion"], (split.read(0, ["user_motion"])["user_motion"] - mean) / std)


def test_voice_direction_finds_the_mouth():
    draw = torch.Generator().manual_seed(0)
    voice, other = torch.rand(2, 80, generator=draw), torch.randn(2, 80, 3, generator=draw)
    motion = torch.cat((other, 2 * voice[..., None] + 0.1 * other[..., :1]), -1)
    along = motion @ full_scale.voice_direction(motion, voice)
    assert torch.corrcoef(torch.stack((along.flatten(), voice.flatten())))[0, 1] > 0.99


# The run


def test_stages_scores_and_latency(whole, plain):
    result, place = whole
    assert set(result["stages"]) == {"generator", "preference"} and result["stages"]["generator"]["steps"] == 6
    for stage in ("base", "dpo"):
        names = set(result["metrics"][stage])
        assert {"rpcc_exp", "rpcc_pose", "rpcc_flatten_exp", "sid_exp", "var_pose", "fd_exp", "jitter", "seam_ratio", "lip_corr"} <= names
    assert result["metrics"]["base"]["var_exp"]["value"] > 0 and result["metrics"]["base"]["var_exp"]["paper_value"] is None
    assert result["latency"]["user_latency"]["value"] > 0.4 and result["latency"]["user_latency"]["paper_value"] == 0.5
    assert result["data"] == {"train_clips": 2, "test_clips": 2, "train_hours": 120 / 90_000, "held_rows": 16, "licence": "your own"}
    assert result["paper"] == "2601.00664" and result["seeds"] == [0]
    assert json.loads((place / "result.json").read_text()) == result
    assert full_scale.AvatarForcingModel.from_pretrained(place / "model_dpo").config.motion_dim == 5


def test_a_finished_run_is_returned_and_another_refused(whole, plain):
    result, place = whole
    assert full_scale.launch(plain, place) == result
    with pytest.raises(ValueError, match="differs in lr"):
        full_scale.launch(replace(plain, lr=1e-3), place)


@pytest.mark.parametrize("after", [1, 4])
def test_a_stopped_run_ends_the_same(plain, whole, tmp_path, monkeypatch, after):
    """Stopped after its first checkpoint of the generator, and after the first of the preference stage."""
    save, count = checkpoint.save, []

    def stopping(*given, **options):
        made = save(*given, **options)
        count.append(made)
        if len(count) == after:
            raise KeyboardInterrupt
        return made

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            full_scale.launch(plain, tmp_path)
    again = full_scale.launch(plain, tmp_path)
    assert again["metrics"] == whole[0]["metrics"]
    for name in ("generator", "preference"):
        assert again["stages"][name]["loss"] == whole[0]["stages"][name]["loss"]


@pytest.mark.timeout(600)
def test_two_processes_learn_one_model(plain, tmp_path):
    pytest.importorskip("accelerate")
    pair = full_scale.launch(replace(plain, devices=2, strategy="ddp"), tmp_path)
    assert pair["hardware"]["processes"] == 2 and set(pair["stages"]) == {"generator", "preference"}
    assert all(math.isfinite(stage["loss"]) for stage in pair["stages"].values())
    steps = [json.loads(line)["step"] for line in (tmp_path / "logs" / "generator.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "only the first process writes"
    record = json.loads((checkpoint.latest(tmp_path / "checkpoints" / "generator") / "state.json").read_text())
    assert len(record["ranks"]) == 2
    assert len(list((tmp_path / "features" / "train").glob("*.safetensors"))) == 2


def test_a_run_out_of_time_is_measured_and_goes_on(plain, whole, tmp_path):
    early = full_scale.launch(replace(plain, max_seconds=1e-6), tmp_path)
    assert early["stopped"] == "max_seconds" and early["stages"]["generator"]["steps"] == 1 and set(early["metrics"]) == {"base"}
    later = full_scale.launch(plain, tmp_path)
    assert "stopped" not in later and later["metrics"] == whole[0]["metrics"]


def test_a_talking_model_can_make_the_losers(plain, tmp_path):
    result = full_scale.launch(replace(plain, loser_mode="talking_model", train_steps=2, save_every=0), tmp_path)
    assert set(result["stages"]) == {"generator", "talking", "preference"}


def test_listeners_from_films_with_the_released_layout(tmp_path):
    pytest.importorskip("av")
    pytest.importorskip("transformers")
    root, release, audio = avatar.vico(tmp_path / "vico"), avatar.release(tmp_path / "release"), avatar.wav2vec2(tmp_path / "wav2vec2")
    settings = tiny(dataset="vico", root=str(root), motion_space="official_ae", weights=str(release), audio="wav2vec2", audio_model=str(audio), dpo_steps=0, train_steps=2)
    result = full_scale.launch(settings, tmp_path / "run")
    split = CachedClips(tmp_path / "run" / "features")
    assert split.motion_dim == 32 and split.streams[0] == {"avatar_motion", "user_motion", "user_audio"}
    assert split.read(0, ["user_audio"])["user_audio"].shape == (60, 32)
    assert set(result["metrics"]) == {"base"} and "lip_corr" not in result["metrics"]["base"], "a listener has no voice"


def test_talking_heads_from_films_with_an_encoder_of_ones_own(tmp_path):
    pytest.importorskip("av")
    settings = tiny(dataset="hdtf", root=str(avatar.hdtf(tmp_path / "hdtf")), motion_space="train_ae", ae_size=32, ae_dim=16, ae_directions=4, ae_steps=2, ae_batch=2, ae_frames=4, dpo_steps=0, train_steps=2)
    result = full_scale.launch(settings, tmp_path / "run")
    assert CachedClips(tmp_path / "run" / "features").motion_dim == 16
    assert result["metrics"]["base"]["rpcc"]["value"] is None, "nobody to react to"
    assert math.isfinite(result["metrics"]["base"]["lip_corr"]["value"])


@pytest.mark.parametrize("dataset", ["seamless", "dualtalk", "drawn"])
def test_parameters_of_the_other_sets(tmp_path, dataset):
    pytest.importorskip("av")
    root = None if dataset == "drawn" else str(avatar.LAYOUTS[dataset](tmp_path / "data"))
    changes = {"dualtalk": {"motion_keys": ["exp", "pose"], "motion_fps": 25.0}, "drawn": {"drawn_clips": 2, "drawn_frames": 60}}.get(dataset, {})
    result = full_scale.launch(tiny(dataset=dataset, root=root, train_steps=2, dpo_steps=1, save_every=0, **changes), tmp_path / "run")
    assert set(result["metrics"]) == {"base", "dpo"} and result["data"]["train_clips"] >= 2


def test_a_clip_without_motion_is_left_out_and_named(mine, tmp_path):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(mine, root)
    (root / "train" / "clip1" / "avatar.npz").unlink()
    settings = tiny(dataset="folder", root=str(root))
    place = full_scale.make_features(settings, tmp_path)
    left = [json.loads(line) for line in (place / "left-out-0.jsonl").read_text().splitlines()]
    assert [entry["clip"] for entry in left] == ["clip1"] and "expected parameters" in left[0]["why"]
    assert len(CachedClips(place)) == 1
    with pytest.raises(ValueError, match="others in audio"):
        full_scale.make_features(replace(settings, audio="logmel"), tmp_path)


# What it needs


def test_full_size_is_the_papers_and_says_its_needs():
    paper = FullScale(root="realtalk")
    assert full_scale.parameter_count(paper) == 153_484_288
    text = full_scale.requirements(paper)
    for part in ("153.5 million", "bfloat16", "CC BY-NC 4.0", "Apache-2.0", "424 GB", "realtalk.cs.columbia.edu"):
        assert part in text
    assert paper.train_steps == 2_000_000 and paper.batch_size == 8 and paper.lr == 1e-4 and paper.dpo_steps == 5000
    several = full_scale.cost(FullScale(root="realtalk", devices=8, strategy="ddp", batch_size=64))
    assert several["hours_training"] == pytest.approx(full_scale.cost(paper)["hours_training"])
    assert "not known" in full_scale.requirements(FullScale(dataset="folder", root="mine"))


def test_parameters_of_a_run_are_taken_and_others_left():
    settings = full_scale.from_parameters({"dataset": "drawn", "motion_space": "params", "preset": "paper", "experiments": ["full_scale"], "seed": 3, "device": "auto"}, device="cpu")
    assert settings.seed == 3 and settings.device == "cpu" and settings.dataset == "drawn"


BAD = {
    "batch": (lambda p: tiny(dataset="drawn", batch_size=3), ConfigError, "multiple of micro_batch"),
    "no root": (lambda p: FullScale(), ConfigError, "root"),
    "films of parameters": (lambda p: tiny(dataset="hdtf", root="x", dpo_steps=0), ConfigError, "films only"),
    "encoder of parameters": (lambda p: tiny(dataset="dualtalk", root="x", motion_space="small_ae"), ConfigError, "no films"),
    "pairs without a user": (lambda p: tiny(dataset="hdtf", root="x", motion_space="small_ae"), ConfigError, "dpo_steps"),
    "devices alone": (lambda p: tiny(dataset="drawn", devices=2), ConfigError, "strategy"),
    "unknown mask": (lambda p: tiny(dataset="drawn", mask="frame_lookahed"), ConfigError, "mask"),
    "unknown name": (lambda p: tiny(dataset="drawn", train_step=3), ConfigError, "train_steps"),
    "unknown set": (lambda p: find_clips("realtalks", p), ValueError, "realtalk"),
    "unknown split": (lambda p: find_clips("folder", p, "dev"), ValueError, "split"),
    "no folder": (lambda p: find_clips("folder", p / "none"), DataMissing, "root"),
    "empty folder": (lambda p: find_clips("folder", p), ValueError, "got none"),
    "no file of a list": (lambda p: (p / "train.txt").write_text("gone") and find_clips("hdtf", p), FileNotFoundError, "gone.mp4"),
    "no column": (lambda p: (p / "train.csv").write_text("id\n3\n") and find_clips("vico", p), ValueError, "uuid"),
    "no cache": (lambda p: CachedClips(p), ValueError, "features of the split train"),
    "one frame": (lambda p: full_scale.frame_pairs([torch.zeros(1, 8, 8, 3, dtype=torch.uint8)]), ValueError, "films"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(tmp_path, case):
    call, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        call(tmp_path)


@pytest.mark.parametrize(
    "arrays,words",
    [
        ({"motion": np.zeros((3, 2))}, "motion_fps"),
        ({"motion": np.full((3, 2), np.nan), "fps": 25.0}, "finite"),
        ({"exp": np.zeros((3, 2)), "fps": 25.0}, "it has exp, fps"),
        ({"motion": np.float32(3), "fps": 25.0}, "one length"),
    ],
)
def test_bad_arrays_are_named(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        read_motion(tmp_path / "a.npz")


def test_windows_longer_than_any_clip(cached):
    with pytest.raises(ValueError, match="at least 50 frames"):
        CachedClips(cached).windows(2, 50)
    with pytest.raises(ValueError, match="expected a clip of 50 frames"):
        CachedClips(cached).tensors(50)
