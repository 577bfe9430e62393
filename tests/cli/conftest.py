"""A chapter of five cells in a temporary folder, and a way to call the command line on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

PRESETS = """
schema: 1
chapter: tiny
requires: {smoke: [], small: [], paper: []}
needs: {paper: "one hour of patience"}
parameters:
  preset:        {type: str, choices: [smoke, small, paper], help: "preset", smoke: smoke, small: small, paper: paper}
  experiments:   {type: "list[str]", choices: [walk], help: "experiments", smoke: [walk], small: [walk], paper: [walk]}
  seeds:         {type: "list[int]", help: "seeds", smoke: [0], small: [0, 1, 2], paper: [0, 1, 2]}
  device:        {type: str, help: "device", smoke: cpu, small: cpu, paper: cpu}
  dtype:         {type: str, help: "dtype", smoke: float32, small: float32, paper: float32}
  backend:       {type: str, help: "backend", smoke: auto, small: auto, paper: auto}
  num_threads:   {type: int, min: 0, help: "threads", smoke: 0, small: 0, paper: 0}
  out_dir:       {type: "str?", help: "folder", smoke: null, small: null, paper: null}
  resume:        {type: bool, help: "resume", smoke: false, small: false, paper: false}
  max_seconds:   {type: "float?", help: "limit", smoke: null, small: null, paper: null}
  wandb:         {type: str, choices: [disabled, offline, online], help: "tracking", smoke: disabled, small: disabled, paper: disabled}
  wandb_project: {type: str, help: "project", smoke: papers10, small: papers10, paper: papers10}
  steps:         {type: int, min: 1, max: 1000, help: "steps of the walk", smoke: 3, small: 6, paper: 9}
  drift:         {type: float, min: 0.0, help: "drift of the walk", smoke: 1.0, small: 1.0, paper: 1.0}
  pause:         {type: float, min: 0.0, help: "seconds a step waits", smoke: 0.0, small: 0.0, paper: 0.0}
  fault:         {type: "str?", help: "what shall go wrong", smoke: null, small: null, paper: null}
"""

CLAIMS = """
schema: 1
chapter: tiny
paper: {arxiv: "0000.00000", title: "A tiny paper"}
claims:
  - id: tiny.up
    kind: quality
    statement: "The walk goes up."
    where: "section 1"
    metric: {name: walk.end, unit: m, better: higher}
    paper: [{setting: long, value: 2.8299, baseline: 2.8543, baseline_name: still}]
    tests:
      smoke: {not_testable: "one seed"}
      small: {expr: "lower(walk.end) > 0", seeds: [0, 1, 2]}
      paper: {expr: "min(walk.end) > 0", seeds: [0, 1, 2]}
  - id: tiny.far
    kind: quality
    statement: "The walk goes a million steps."
    where: "section 2"
    metric: {name: walk.end, unit: m, better: higher}
    tests:
      smoke: {expr: "max(walk.end) > 1000000", seeds: [0]}
      small: {expr: "max(walk.end) > 1000000", seeds: [0, 1, 2]}
      paper: {not_testable: "nobody walks that far"}
"""

START = 'from papers10.core import runs\n\nrun = runs.start("tiny", globals())'
WALK = """
import random, time

if run.parameters.fault == "extra":
    from papers10.core.optional import MissingExtra
    raise MissingExtra("nothing", "gpu")
if run.parameters.fault == "error":
    raise RuntimeError("the walk fell into a hole")

ends = {}
with run.progress(len(run.parameters.seeds) * run.parameters.steps, "walk") as bar:
    for seed in run.parameters.seeds:
        place = 0.0
        for step in range(run.parameters.steps):
            def move(seed=seed, step=step):
                time.sleep(run.parameters.pause)
                if run.parameters.fault == "seed" and seed == 1:
                    raise ValueError("stumbled")
                return random.Random(f"{seed} {step}").gauss(run.parameters.drift, 0.1)
            moved = run.unit(f"walk/{seed}/{step}", move, seed=seed)
            place = None if place is None or moved is None else place + moved
            bar.update(1, place=place or 0.0)
        ends[seed] = place
"""
END = """
for seed, place in ends.items():
    run.metric("walk.end", place, seed=seed, unit="m", better="higher")
run.table("ends", [{"seed": seed, "end": place} for seed, place in ends.items()])
if run.parameters.fault == "disk":
    import errno
    from papers10.core import runs as module
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")
    module.write_atomic = full
run.finish()
"""


class Tiny:
    """The chapter's folder, and `papers10` as a process."""

    def __init__(self, root: Path):
        from papers10.core import presets

        self.root, self.runs = root, root / "runs"
        for name, text in (("presets", PRESETS), ("claims", CLAIMS)):
            (root / "data" / name).mkdir(parents=True)
            (root / "data" / name / "tiny.yaml").write_text(text)
        self.environment = {
            **os.environ,
            "PAPERS10_CHAPTER_DATA": str(root / "data"),
            "PAPERS10_NOTEBOOKS": str(root / "nbs"),
            "PAPERS10_RUNS": str(self.runs),
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            "COLUMNS": "200",
        }
        place = root / "nbs" / "01_tiny"
        place.mkdir(parents=True)
        import yaml

        cell = presets.from_mapping(presets.ChapterPresets, yaml.safe_load(PRESETS)).cell()
        cells = [
            nbformat.v4.new_markdown_cell("# Tiny\n> A walk"),
            nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]}),
        ]
        cells += [nbformat.v4.new_code_cell(source.strip()) for source in (START, WALK, END)]
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbformat.write(notebook, place / "reproduce.ipynb")
        nbformat.write(nbformat.v4.new_notebook(cells=cells[:1]), place / "index.ipynb")

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", "from papers10.cli import main; main()", *arguments]

    def __call__(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*arguments),
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=cwd or self.root,
            env={**self.environment, **environment},
        )

    def popen(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.root,
            env=self.environment,
        )

    def folders(self) -> list[Path]:
        return sorted((self.runs / "tiny").glob("*")) if (self.runs / "tiny").is_dir() else []

    def result(self, folder: Path) -> dict:
        return json.loads((folder / "result.json").read_text())


@pytest.fixture
def tiny(tmp_path):
    return Tiny(tmp_path)
