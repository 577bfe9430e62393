"""Full scale on a miniature of the real classes: stages, resume, balance, labels, sight, refusals."""

import json

import numpy as np
import pytest
import torch

from papers10.core.config import ConfigError
from papers10.core.data import DataMissing
from papers10.taming_hallucinations import full_scale as fs
from papers10.taming_hallucinations.dataset import PairDataset, SftRecord
from papers10.taming_hallucinations.forge import DualityForge, SceneEdits, drawn_clips

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    DualityForge([SceneEdits()], store=folder / "pairs").run(drawn_clips(4, seed=0), 4, seed=0)
    fs.save_miniature(folder / "model")
    return folder


def settings(place, **changes):
    options = {name: str(place / "pairs") for name in ("sft_jsonl", "rl_jsonl", "test_jsonl")}
    options |= {
        "model_id": str(place / "model"),
        "n_frames": 4,
        "max_pixels": 4096,
        "pictures": "sheet",
        "sft_batch": 4,
        "sft_lr": 1e-3,
    }
    options |= {
        "rl_pairs_per_step": 1,
        "num_generations": 2,
        "micro_batch": 2,
        "rl_steps": 2,
        "max_completion_length": 4,
        "save_every": 1,
    }
    return fs.FullScale(**options | {"dtype": "float32", "device": "cpu"} | changes)


@pytest.fixture(scope="module")
def model(place):
    return fs.load_model(place / "model", settings(place))


def test_supervised_and_test_stages_run_and_are_not_repeated(place, tmp_path):
    chosen = settings(place, stage="sft")
    first = fs.launch(chosen, tmp_path)
    assert first["stages"]["sft"]["steps"] == 2 and (tmp_path / "sft" / "config.json").is_file()
    stamp = (tmp_path / "sft" / "model.safetensors").stat().st_mtime_ns
    assert fs.launch(chosen, tmp_path) == first and (tmp_path / "sft" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="differs in sft_lr"):
        fs.launch(settings(place, stage="sft", sft_lr=2e-3), tmp_path)


def test_a_stopped_supervised_stage_ends_as_an_unbroken_one(place, tmp_path):
    from safetensors.torch import load_file

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fs.train_sft(settings(place, sft_epochs=2), whole)
    fs.train_sft(settings(place, sft_epochs=2), parts)
    for newest in sorted((parts / "sft-steps").glob("checkpoint-*"))[-1:]:
        import shutil

        shutil.rmtree(newest)
    fs.train_sft(settings(place, sft_epochs=2), parts)
    one, two = (load_file(folder / "sft" / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_reinforcement_steps_and_logs_signals(place, tmp_path):
    pytest.importorskip("trl")
    found = fs.train_rl(settings(place), tmp_path)
    assert found["steps"] == 2 and found["sight"] > 0 and {"signal_real", "signal_cf"} <= found.keys()


def test_answers_are_asked_once(place, tmp_path):
    chosen = settings(place, stage="test")
    first = fs.evaluate(chosen, tmp_path)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert first["pairs"] == 4 and len(lines) == 8
    (tmp_path / "answers.jsonl").write_text("\n".join(lines[:5]) + "\n")
    assert fs.evaluate(chosen, tmp_path) == first
    assert [json.loads(line)["id"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == [
        json.loads(line)["id"] for line in lines
    ]


def test_every_batch_is_half_edits(place):
    rows = fs._Rows(fs.load_sft(str(place / "pairs"))[0])
    order = list(fs._Balanced(rows, 4, 0))
    for low in range(0, len(order), 4):
        assert sorted(rows[i].branch for i in order[low : low + 4]) == ["cf", "cf", "real", "real"]


def test_labels_are_the_answer_and_nothing_else(place, model):
    records, store = fs.load_sft(str(place / "pairs"))
    batch = fs.SftCollator(model[1], store, settings(place))(records[:3])
    for i, record in enumerate(records[:3]):
        told = model[1].tokenizer.decode(batch["labels"][i][batch["labels"][i] >= 0])
        assert told.split("</s>")[0] == record.answer


def test_a_model_that_sees_nothing_is_refused(place, model, monkeypatch):
    network, processor = model
    video = PairDataset(place / "pairs").frames(0, "real")
    assert fs.check_sight(network, processor, "What?", video, settings(place)) > 0
    real = fs.processed

    def blind(*given, **options):
        inputs = real(*given, **options)
        inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
        return inputs

    monkeypatch.setattr(fs, "processed", blind)
    with pytest.raises(RuntimeError, match="answers a clip and noise alike"):
        fs.check_sight(network, processor, "What?", video, settings(place))


def test_files_of_pairs_are_read_and_not_their_neighbours(place, tmp_path):
    lines = (place / "pairs" / "pairs.jsonl").read_text().splitlines()
    mine = place / "pairs" / "test.jsonl"
    mine.write_text(lines[2] + "\n")
    try:
        found = fs.evaluate(settings(place, stage="test", test_jsonl=str(mine)), tmp_path)
        assert found["pairs"] == 1 and len(fs.load_sft(str(mine))[0]) == 2
    finally:
        mine.unlink()


def test_training_stops_at_its_deadline(place, tmp_path):
    assert fs.train_sft(settings(place, sft_epochs=50, max_seconds=1e-6), tmp_path)["steps"] == 1


def test_pictures_keep_to_the_budget():
    video = np.zeros((10, 40, 60, 3), np.uint8)
    frames = fs.clip_pictures(video, 4, 4 * 20 * 30)
    assert len(frames) == 4 and frames[0].size == (30, 20)
    (sheet,) = fs.clip_pictures(video, 5, 10**9, "sheet")
    assert sheet.size == (180, 80)


def test_rows_for_reinforcement_hold_both_members(place):
    rows = fs.with_pictures(PairDataset(place / "pairs"), settings(place))
    assert len(rows[0]["images"]) == 1 and list(rows["branch"]) == ["real", "cf"] * 4
    assert [row["branch"] for row in rows] == ["real", "cf"] * 4
    for real, cf in zip(list(rows)[::2], list(rows)[1::2]):
        assert real["pair_id"] == cf["pair_id"] and real["prompt"] == cf["prompt"] and real["answer"] != cf["answer"]


@pytest.mark.parametrize("engine", ["verl", "swift"])
def test_other_engines_get_their_files_and_command(place, tmp_path, engine):
    command = fs.engine_command(settings(place, engine=engine), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rl_rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all({"pair_id", "branch", "videos", "solution"} <= row.keys() for row in rows)
    assert (
        any("dna_grpo" in part for part in command) if engine == "verl" else (tmp_path / "papers10_swift.py").is_file()
    )


def test_questions_of_a_file_are_read(place, tmp_path):
    from papers10.core.config import to_mapping

    records, _ = fs.load_sft(str(place / "pairs"))
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(to_mapping(r)) for r in records[:2]) + "\n")
    again, _ = fs.load_sft(str(tmp_path / "mine.jsonl"))
    assert again == records[:2] and isinstance(again[0], SftRecord)


def test_what_it_takes_is_said():
    said = fs.requirements(fs.FullScale(sft_jsonl="a", rl_jsonl="b", test_jsonl="c"))
    assert all(word in said for word in ("Qwen2.5-VL-7B", "GB", "Apache-2.0", "packages", "dynamic sampling"))


def test_parameters_of_the_preset_are_taken():
    from papers10.core import presets

    found = fs.from_parameters({**presets.resolve("taming-hallucinations", "paper"), "seed": 3}, device="cuda")
    assert (found.rl_steps, found.num_generations, found.sft_lr, found.seed, found.devices) == (600, 16, 1e-6, 3, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft_batch": 3}, "sft_batch: expected an even number"),
        ({"devices": 2}, "strategy: expected 'ddp' or 'slurm'"),
        ({"rl_jsonl": None}, "rl_jsonl: expected a folder or JSONL file"),
        ({"micro_batch": 3}, "micro_batch: expected a number that, times 1 devices, divides the 4 answers"),
        ({"advantage": "ppo"}, "advantage"),
    ],
)
def test_settings_that_do_not_fit_are_refused(place, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(place, **changes)


def test_missing_files_are_named_before_anything_is_loaded(place, tmp_path):
    with pytest.raises(DataMissing, match=r"nowhere: expected a folder that .*forge"):
        fs.launch(settings(place, sft_jsonl=str(tmp_path / "nowhere")), tmp_path / "run")
