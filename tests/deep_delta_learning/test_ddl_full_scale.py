"""The full-scale training on a miniature in the true file formats: one and two processes, resume, benchmarks, images, clear refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "miniatures"))
import fineweb
import training

from papers10.core.config import ConfigError, replace
from papers10.core.data import DataMissing
from papers10.core.optional import MissingExtra
from papers10.deep_delta_learning import full_scale
from papers10.deep_delta_learning.full_scale import FullScale
from papers10.kernels.common import BackendUnavailable

pytest.importorskip("datasets")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return training.text_settings(FullScale, folder, rule="ddl-cc", size="mini")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    return full_scale.launch(text, tmp_path_factory.mktemp("whole"))


def test_it_learns_and_logs(text, whole, tmp_path):
    assert whole["steps"] == 8 and whole["val_loss"] < 5.7
    assert {"mean", "low", "high", "below", "middle", "above", "error_pre", "error_post"} <= set(
        whole["gates"][0]
    ) and len(whole["gates"]) == 4
    assert whole["tokens_per_second"] > 0 and whole["infer_tokens_per_second"] > 0


def test_a_stopped_training_goes_on_to_the_same_numbers(text, whole, tmp_path):
    training.stop_at_first_checkpoint(full_scale.launch, text, tmp_path)
    again = full_scale.launch(text, tmp_path)
    assert (
        again["val_loss"] == whole["val_loss"] and again["curve"] == whole["curve"] and again["gates"] == whole["gates"]
    )
    assert full_scale.launch(text, tmp_path) == again, "what is finished is returned"


def test_two_processes_train_as_one(text, whole, tmp_path):
    pytest.importorskip("accelerate")
    pair = full_scale.launch(replace(text, devices=2, strategy="ddp"), tmp_path)
    # float32 sums in another order: gradients agree to 1e-6, eight updates of AdamW keep that below 1e-3
    assert abs(pair["val_loss"] - whole["val_loss"]) < 1e-3
    assert len((tmp_path / "logs" / "train.jsonl").read_text().splitlines()) == 2, (
        "only rank 0 writes, one line for each evaluation"
    )


def test_a_failing_process_is_reported(text, tmp_path):
    pytest.importorskip("accelerate")
    bad = replace(text, devices=2, strategy="ddp", dataset=str(tmp_path / "rows"))
    fineweb.fineweb_rows(tmp_path / "rows", rows=1)
    with pytest.raises(RuntimeError, match="launcher ended with"):
        full_scale.launch(bad, tmp_path / "run")


def test_benchmarks_run_on_a_local_task(text, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    settings = replace(text, **training.local_benchmark(tmp_path, monkeypatch))
    result = full_scale.launch(settings, tmp_path / "run")
    assert set(result["tasks"]) == {"0shot", "1shot"} and 0 <= result["tasks"]["0shot"]["tiny_choice"] <= 100
    assert result["tasks"]["1shot"]["average"] == result["tasks"]["1shot"]["tiny_choice"]


@pytest.mark.parametrize("rule", ["add", "ddl"])
def test_images(tmp_path, rule):
    model = dict(task="vision", rule=rule, size="mini")
    settings = training.image_settings(FullScale, tmp_path / "rows", **model, save_every=5)
    result = full_scale.launch(settings, tmp_path / "run")
    assert result["accuracy"] > 0.5 and result["steps"] == 10


def test_vision_refuses_a_rule_that_images_do_not_have(tmp_path):
    settings = FullScale(
        task="vision", rule="ddl-cc", size="mini", device="cpu", devices=1, strategy="single", dataset=str(tmp_path)
    )
    with pytest.raises(ValueError, match="rule: expected one of add, ddl, write"):
        full_scale.train_vision(settings, tmp_path / "run")


def test_slurm_uses_submitit(text, tmp_path):
    submitit = pytest.importorskip("submitit")
    executor = submitit.AutoExecutor(folder=str(tmp_path / "jobs"), cluster="debug")
    result = full_scale.launch(replace(text, strategy="slurm", steps=2, warmup=0), tmp_path / "run", executor=executor)
    assert result["steps"] == 2


def test_refusals_before_anything_starts(text, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="global_batch: expected a multiple"):
        full_scale.check(replace(text, global_batch=7))
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="4 GPU"):
            full_scale.check(replace(text, device="cuda", devices=4, strategy="ddp", global_batch=8))
    monkeypatch.setenv("PAPERS10_OFFLINE", "1")
    with pytest.raises(DataMissing, match="dataset: .* on the hub"):
        full_scale.check(replace(text, dataset="HuggingFaceFW/fineweb-edu"))

    real = full_scale.need

    def absent(module, extra):
        return real("no_such_package_here", extra)

    monkeypatch.setattr(full_scale, "need", absent)
    with pytest.raises(MissingExtra, match="papers10"):
        full_scale.check(text)


def test_unknown_settings_are_refused_by_name():
    with pytest.raises((ConfigError, ValueError), match="stepz"):
        full_scale.from_mapping(FullScale, {"stepz": 3})


def test_requirements_name_memory_hours_and_licences():
    said = full_scale.requirements(FullScale(eval_tasks=["piqa"]))
    assert "GB per GPU" in said and "12 h" in said and "ODC-By" in said and "lm,dist,eval" in said


def test_the_module_is_the_worker(text, tmp_path):
    (tmp_path / "settings.json").write_text(replace(text, steps=1, warmup=0).model_dump_json())
    done = subprocess.run(
        full_scale.command(text, tmp_path / "settings.json", tmp_path / "run"),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 1
