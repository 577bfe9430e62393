"""The page of claims and verdicts, executed without a record and with many."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from papers10.core import results

ROOT = Path(__file__).resolve().parents[2]

COMMON = """
  preset: {type: str, help: p, smoke: smoke, small: small, paper: paper}
  seeds: {type: "list[int]", help: s, smoke: [0], small: [0, 1], paper: [0]}
"""

CLAIMS = """
schema: 1
chapter: SLUG
paper: {title: "Title of SLUG <3", arxiv: null}
claims:
- id: SLUG.both
  kind: quality
  statement: "Less is better & more is not."
  where: Table 1
  metric: {name: ours.loss, unit: nats, better: lower}
  paper: [{setting: big, value: 2.5, baseline: 3.0, baseline_name: plain, unit: nats}, {setting: words, value: better}]
  caveat: A caveat.
  tests:
    smoke: {not_testable: one seed}
    small: {expr: "max(ours.loss - plain.loss) < 0", seeds: [0, 1]}
    paper: {expr: "max(ours.loss - plain.loss) < 0", seeds: [0]}
- id: SLUG.never
  kind: cost
  statement: It is cheap.
  where: Table 2
  metric: {name: cost}
  tests: {smoke: {not_testable: not now}, small: {not_testable: not at this size}, paper: {not_testable: not now}}
"""


def record(slug, preset, ours, claims):
    metrics = {
        name: {"by_seed": {"0": value}, "mean": value, "ci95": None, "ci_method": None, "unit": "nats"}
        for name, value in (("ours.loss", ours), ("plain.loss", 2.0))
    }
    return {
        "schema": 1, "chapter": slug, "paper": None, "run_id": "r", "preset": preset, "status": "finished", "resumed": 0,
        "started": "2026-01-02T03:04:05Z", "wall_seconds": 1.0, "parameters": {"seeds": [0]}, "metrics": metrics,
        "claims": claims, "tables": {}, "figures": [], "notebook": None, "data": [], "models": [], "environment": {},
        "resources": {}, "errors": [], "notes": [],
    }  # fmt: skip


def verdict(name, verdict, reason=None):
    expr = "max(ours.loss - plain.loss) < 0" if verdict != "not tested" else None
    terms = {"max(ours.loss - plain.loss)": 0.5} if expr else {}
    return {"id": name, "verdict": verdict, "expr": expr, "terms": terms, "reason": reason}


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs the page on chapters that are made here: what it printed, and the HTML of its last table."""
    monkeypatch.setenv("PAPERS10_CHAPTER_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PAPERS10_NOTEBOOKS", str(tmp_path / "nbs"))

    def run(*slugs, records=()):
        for kind, text in (
            ("presets", "schema: 1\nchapter: SLUG\nparameters:" + COMMON),
            ("claims", CLAIMS),
        ):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            for slug in slugs:
                (tmp_path / "data" / kind / f"{slug}.yaml").write_text(text.replace("SLUG", slug))
        for made in records:
            results.record(made)
        notebook = nbformat.read(ROOT / "nbs" / "results.ipynb", as_version=4)
        NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        said = "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
        tables = [html for output in outputs if (html := output.get("data", {}).get("text/html", ""))]
        return said, next((html for html in tables if "filterable" in html), "")

    return run


def test_without_any_chapter_and_without_any_record(execute):
    said, _ = execute()
    assert "0 chapter(s), 0 claims, 0 run(s) of record" in said
    said, html = execute("one")
    assert "1 chapter(s), 2 claims, 0 run(s) of record" in said and "No run is recorded yet" in said
    assert re.findall(r"data-verdict='([^']+)'", html) == ["not run", "not run"]
    assert "Title of one &lt;3" in html and "better &amp; more" in html


def test_many_chapters_and_the_largest_preset_that_tested_counts(execute):
    small = [verdict("one.both", "not held"), verdict("one.never", "not tested", "not at this size")]
    full = [verdict("one.both", "held"), verdict("one.never", "not tested", "not now")]
    other = [verdict("two.both", "not held"), verdict("two.never", "not tested", "not at this size")]
    made = [record("one", "small", 2.5, small), record("one", "paper", 1.5, full), record("two", "small", 2.5, other)]
    said, html = execute("one", "two", "three", records=made)
    assert "3 chapter(s), 6 claims, 3 run(s) of record" in said
    found = re.findall(r"data-verdict='([^']+)'", html)
    assert found == ["held", "not tested", "not run", "not run", "not held", "not tested"]
    assert "not at this size" in html and "big: 2.5 against 3.0 nats (plain)" in html
    assert "one.both" in said and "A caveat." in said
