"""Runs and results: folders, the journal, metrics, atomic files, capabilities."""

import json

import pytest

from papers10.core import results, runs
from papers10.core.config import ConfigError

PRESETS = """
schema: 1
chapter: little
parameters:
  preset:  {type: str, choices: [smoke, small, paper], help: "p", smoke: smoke, small: small, paper: paper}
  seeds:   {type: "list[int]", help: "s", smoke: [0], small: [0, 1], paper: [0, 1]}
  out_dir: {type: "str?", help: "o", smoke: null, small: null, paper: null}
  resume:  {type: bool, help: "r", smoke: false, small: false, paper: false}
"""
CLAIMS = """
schema: 1
chapter: little
paper: {title: "A little paper"}
claims:
  - {id: little.one, kind: cost, statement: "s", where: "w", metric: {name: m}, tests: {smoke: {not_testable: "n"},
     small: {expr: "lower(m) > 0", seeds: [0, 1]}, paper: {not_testable: "n"}}}
"""


@pytest.fixture
def begin(tmp_path, monkeypatch):
    for name, text in (("presets", PRESETS), ("claims", CLAIMS)):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "little.yaml").write_text(text)
    monkeypatch.setenv("PAPERS10_CHAPTER_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PAPERS10_NOTEBOOKS", str(tmp_path / "nbs"))
    monkeypatch.delenv("PAPERS10_RUN_FOLDER", raising=False)

    def start(**values):
        return runs.start(
            "little", {"preset": "small", "seeds": [0, 1], "out_dir": str(tmp_path / "runs"), "resume": False, **values}
        )

    return start


def test_units_are_computed_once_and_keep_their_bits(begin):
    run = begin()
    first = run.unit("a/b", lambda: {"x": (0.1 + 0.2, 1e-320), "n": None})
    assert first == {"x": [0.30000000000000004, 1e-320], "n": None}
    run._lock.close()
    again = begin(resume=True)
    assert again.folder == run.folder and again.resumed == 1
    assert again.unit("a/b", lambda: 1 / 0) == first
    for key in ("../x", "", "/x", "a b", "x/../../y"):
        with pytest.raises(ValueError, match="unit key"):
            again.unit(key, lambda: 1)
    with pytest.raises(TypeError):
        again.unit("object", object)
    (run.folder / "units" / "a" / "b.json").write_text("{half")
    assert again.unit("a/b", lambda: 5) == 5


def test_each_arm_and_seed_is_a_unit_and_a_failed_seed_is_left_out(begin):
    run = begin()

    def compute(arm, seed):
        if (arm, seed) == ("b", 1):
            raise RuntimeError("no luck")
        return f"{arm}{seed}"

    assert run.each("try", ("a", "b"), compute, seeds=(0, 1)) == {"a": {0: "a0", 1: "a1"}, "b": {0: "b0"}}
    assert (run.folder / "units" / "try-a-1.json").exists() and run.errors[0]["where"] == "try-b-1"
    run.metrics("trial.value", {seed: 0.5 for seed in run.parameters["seeds"][:1]}, unit="share")
    assert list(run._metrics["trial.value"]["by_seed"]) == run.parameters["seeds"]
    assert [value for value in run._metrics["trial.value"]["by_seed"].values() if value is not None] == [0.5]


def test_two_runs_never_share_a_folder(begin):
    one, two = begin(), begin(resume=True)
    assert one.folder != two.folder


def test_resume_wants_the_same_parameters(begin):
    begin()._lock.close()
    with pytest.raises(ConfigError, match="seeds"):
        begin(resume=True, seeds=[0, 2])


def test_metrics(begin):
    run = begin()
    for seed in (0, 1):
        run.metric("m", 1.0 + seed / 10, seed=seed, unit="s")
        run.metric("many", None, seed=seed, items={"p": 1.0, "q": 0.0, "r": None})
    run.metric("bad", float("nan"), seed=0)
    for wrong in (
        {"name": "a b", "value": 1.0, "seed": 0},
        {"name": "lambda.x", "value": 1.0, "seed": 0},
        {"name": "m", "value": 1.0, "seed": 0, "unit": "kg"},
        {"name": "x", "value": 1.0, "seed": 0, "better": "up"},
    ):
        with pytest.raises(ValueError):
            run.metric(**wrong)
    with pytest.raises(TypeError):
        run.metric("m", 1.0, seed=True)
    run.backend("delta_update", "torch")
    run.data("digits", "0" * 64, "CC-BY-4.0")
    run.log(1, "loss", value=2.0)
    run.log(2, "loss", value=1.0)
    run.log(1, "loss", value=3.0)
    assert [line["value"] for line in run.read_log("loss")] == [3.0, 1.0]
    result = run.finish()
    assert result["metrics"]["bad"]["by_seed"] == {"0": None} and result["errors"][0]["where"] == "bad"
    assert result["metrics"]["many"]["mean"] == 0.5 and result["metrics"]["many"]["n_items"] == 2
    assert result["environment"]["backend"] == {"delta_update": "torch"} and result["resources"]["peak_rss_mb"] > 0
    loaded = results.load(run.folder)
    assert loaded == result and loaded.items_by_metric["many"][(1, "p")] == 1.0
    assert json.loads((run.folder / "result.json").read_text())["data"][0]["licence"] == "CC-BY-4.0"
    assert not [path for path in run.folder.rglob(".*") if path.name not in (".lock",)]


def test_missing_packages_stop_the_run_even_with_a_seed(begin):
    from papers10.core.optional import MissingExtra

    def needs():
        raise MissingExtra("x", "lm")

    with pytest.raises(MissingExtra):
        begin().unit("k", needs, seed=0)


def test_a_lacking_parameter_is_named(begin):
    with pytest.raises(ConfigError, match="lacks preset, seeds"):
        runs.start("little", {"out_dir": None, "resume": False})


def test_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    results.write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(OSError):
        results.write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_capabilities_lead_somewhere(begin, tmp_path):
    place = tmp_path / "nbs" / "01_little"
    place.mkdir(parents=True)
    (place / "01_one.ipynb").write_text(
        json.dumps({"cells": [{"cell_type": "markdown", "source": ["# One\n", "## The spectrum"]}]})
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("def test_y():\n    pass\n")
    folder = tmp_path / "data" / "capabilities"
    folder.mkdir()
    entry = 'schema: 1\nchapter: little\ncapabilities:\n  - {{id: a, text: "does it", where: ["{}", "tests/test_x.py::test_y"]}}\n'
    (folder / "little.yaml").write_text(entry.format("01_one#The spectrum"))
    assert "does it" in str(results.capabilities("little"))
    for wrong in ("01_one#The spektrum", "02_two#X", "tests/test_x.py::test_z", "tests/test_q.py::test_y"):
        (folder / "little.yaml").write_text(entry.format(wrong))
        with pytest.raises(ConfigError, match="a: "):
            results.capabilities("little")


def test_index_means_the_chapters_own_page_before_the_home_page(begin, tmp_path):
    place = tmp_path / "nbs" / "01_little"
    place.mkdir(parents=True)
    for path, heading in ((place / "index.ipynb", "Use it"), (tmp_path / "nbs" / "index.ipynb", "Installing")):
        path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": [f"## {heading}"]}]}))
    (tmp_path / "data" / "capabilities").mkdir()
    (tmp_path / "data" / "capabilities" / "little.yaml").write_text(
        'schema: 1\nchapter: little\ncapabilities:\n  - {id: a, text: "is used", where: ["index#Use it"]}\n'
    )
    assert "is used" in str(results.capabilities("little"))


def test_claims_table_without_and_with_a_result(begin):
    assert next(iter(results.claims_table("little")))["verdict"] == "not run"
    run = begin()
    for seed in (0, 1):
        run.metric("m", 1.0 + seed / 100, seed=seed)
    row = next(iter(results.claims_table("little", run.finish())))
    assert row["verdict"] == "held" and "[" in row["ours"]


def test_the_unit_of_the_papers_number_stands_before_the_bracket(begin, tmp_path):
    path = tmp_path / "data" / "claims" / "little.yaml"
    entry = 'paper: [{setting: "S", value: 49.29, baseline: 48.56, baseline_name: additive, unit: "%"}], tests:'
    path.write_text(path.read_text().replace("tests:", entry))
    assert results.claims_table("little").records[0]["paper"] == "S: 49.29 against 48.56 % (additive)"


def test_metrics_side_by_side():
    metrics = {"race.two_memories.loss": {"by_seed": {"0": 0.5, "1": None}, "mean": 0.5}, "race.one.loss": {"by_seed": {"0": 2.0, "1": 4.0}, "mean": 3.0}}
    columns = {"loss": "race.{}.loss", "steps": "race.{}.steps"}
    result = {"metrics": metrics}
    table = results.metrics_table(result, ["two-memories", "one"], columns)
    assert list(table) == [{"arm": "two-memories", "loss": 0.5, "steps": None}, {"arm": "one", "loss": 3.0, "steps": None}]
    assert [row["loss"] for row in results.metrics_table(result, ["two-memories", "one"], columns, seeds=True)] == ["0.5  –", "2  4"]
    with pytest.raises(ValueError, match="race.on.loss.*nearest is race.one.loss"):
        results.metrics_table(result, ["on"], {"loss": "race.{}.loss"})
