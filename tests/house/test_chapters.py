"""Every chapter is complete: folder, files, names, seeds, capabilities; and the manifest and page titles are in step."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from papers10.core import claims, data, presets, results, site

ROOT = Path(__file__).resolve().parents[2]
every_chapter = pytest.mark.parametrize("slug", presets.chapters())


def package_of(slug: str) -> str:
    return slug.replace("-", "_")


def first_cell(path: Path) -> str:
    return "".join(json.loads(path.read_text())["cells"][0]["source"])


def test_folders_presets_claims_and_packages_are_the_same_chapters():
    folders = {path.name[3:].replace("_", "-") for path in (ROOT / "nbs").glob("[0-9][0-9]_*")}
    named = {kind: {path.stem for path in (ROOT / "data" / kind).glob("*.yaml")} for kind in ("presets", "claims")}
    assert named["presets"] == named["claims"] == folders
    assert {path.stem for path in (ROOT / "data" / "results").glob("*.json")} <= folders
    assert all((ROOT / "papers10" / package_of(slug) / "__init__.py").is_file() for slug in folders)


def test_folder_numbers_are_the_rows_of_the_home_page():
    rows = dict(re.findall(r"^\| *(\d+) *\| *\[?`([a-z0-9-]+)`", (ROOT / "README.md").read_text(), re.MULTILINE))
    for path in (ROOT / "nbs").glob("[0-9][0-9]_*"):
        assert rows[str(int(path.name[:2]))] == path.name[3:].replace("_", "-"), path.name


@every_chapter
def test_notebooks_have_the_shape_of_a_chapter(slug):
    folder = presets.chapter_folder(slug)
    names = [path.name for path in sorted(folder.glob("*.ipynb"))]
    assert {"index.ipynb", "reproduce.ipynb", "api.ipynb"} <= set(names)
    numbered = [name for name in names if re.match(r"\d\d_[a-z0-9_]+\.ipynb$", name)]
    assert [int(name[:2]) for name in numbered] == list(range(1, len(numbered) + 1))
    assert set(names) == {"index.ipynb", "reproduce.ipynb", "api.ipynb", *numbered}
    for name in numbered:
        exported = re.search(r"#\|\s*default_exp\s+(\S+)", (folder / name).read_text())
        assert exported, f"{name} exports no module"
        assert exported[1].partition(".")[0] == package_of(slug), f"{name} exports {exported[1]}"


@every_chapter
def test_first_page_draws_the_claims_and_the_capabilities(slug):
    text = (presets.chapter_folder(slug) / "index.ipynb").read_text()
    assert "results.claims_table(" in text and "results.capabilities(" in text


@every_chapter
def test_every_capability_leads_somewhere(slug):
    assert len(results.capabilities(slug)) > 0


@every_chapter
def test_there_are_tests(slug):
    assert list((ROOT / "tests" / package_of(slug)).glob("test_*.py"))


@every_chapter
def test_importing_the_chapter_loads_no_torch_and_names_are_listed(slug):
    package = f"papers10.{package_of(slug)}"
    code = f"import sys, {package} as chapter; assert 'torch' not in sys.modules; assert set(chapter.__all__) <= set(dir(chapter))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@every_chapter
def test_extras_and_sources_of_the_presets_exist(slug):
    chapter = presets.load(slug)
    for extra in {name for names in chapter.requires.values() for name in names}:
        presets.missing_packages(extra)  # raises for an extra that pyproject.toml does not have
    for name in {name for names in chapter.data.values() for name in names}:
        data.source(name.partition("/")[0])


@every_chapter
def test_claims_ask_for_seeds_that_smoke_and_small_have(slug):
    chapter = presets.load(slug)
    for claim in claims.load(slug):
        for preset in ("smoke", "small"):
            asked = claim.tests[preset].seeds or []
            assert set(asked) <= set(chapter.values(preset)["seeds"]), f"{claim.id} in {preset}"


@every_chapter
def test_claim_ids_share_a_prefix_of_their_own(slug):
    prefixes = {other: {claim.id.partition(".")[0] for claim in claims.load(other)} for other in presets.chapters()}
    assert len(prefixes[slug]) == 1
    assert all(prefixes[slug] != prefixes[other] for other in prefixes if other != slug)


@every_chapter
def test_the_record_of_small_measured_everything_that_its_claims_name(slug):
    record = results.records(slug).get("small")
    for claim in record["claims"] if record else ():
        assert "was not recorded" not in (claim["reason"] or ""), f"{claim['id']}: run every experiment for the record"


@every_chapter
def test_reproduce_starts_and_finishes_the_run(slug):
    cells = json.loads((presets.chapter_folder(slug) / "reproduce.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert f"runs.start('{slug}', globals())" in calls and "run.finish()" in calls


def test_titles_of_pages_are_unique():
    titles = [first_cell(path).splitlines()[0] for path in site.notebooks()]
    assert sorted({title for title in titles if titles.count(title) > 1}) == []


def test_manifest_is_in_step_with_the_data():
    assert data.manifest_problems() == [], "make export refreshes data/MANIFEST.yaml"
