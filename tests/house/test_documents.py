"""README, settings.ini, metadata and workflows agree with their sources."""

import configparser
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

import papers10
from papers10.core import site

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_readme_and_settings_are_in_step():
    assert site.documents(check=True) == []


def test_readme_begins_with_the_two_commands():
    top = (ROOT / "README.md").read_text()[:700]
    assert top.index("make run") < top.index("make test")


def test_every_link_of_the_readme_leads_somewhere():
    text = (ROOT / "README.md").read_text()
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", target)]
    assert targets
    assert [target for target in targets if not (ROOT / target.partition("#")[0]).exists()] == []


def test_readme_says_plainly_which_chapters_are_not_written():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| *\d+ *\|", line)]
    assert len(rows) == 11
    written = {
        path.name[3:].replace("_", "-")
        for path in (ROOT / "nbs").glob("[0-9][0-9]_*")
        if (path / "index.ipynb").is_file()
    }
    for row in rows:
        slug = re.search(r"`([a-z0-9-]+)`", row)[1]
        assert ("not written yet" in row) == (slug not in written), row


def test_settings_ini_repeats_pyproject():
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.read(ROOT / "settings.ini")
    values = parsed["DEFAULT"]
    assert values["lib_name"] == PROJECT["project"]["name"]
    assert values["version"] == papers10.__version__
    assert values["min_python"] == PROJECT["project"]["requires-python"].removeprefix(">=")
    assert (ROOT / values["nbs_path"]).is_dir() and (ROOT / values["lib_path"]).is_dir()


def test_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == papers10.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert f"## {papers10.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_every_dependency_exactly_and_name_no_host():
    text = (ROOT / "requirements" / "constraints.txt").read_text()
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)$", text, re.MULTILINE))
    canonical = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    wanted = set()
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in PROJECT["project"]["dependencies"] + [
        r for name in ("dev", "docs", "fast", "lm", "notebook", "wandb") for r in extras[name]
    ]:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-").replace(".", "-")
        wanted.add(name)
    assert wanted - {"papers10"} <= canonical
    assert not any("+" in version for version in pins.values())
    assert "://" not in text and "--" not in text


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_is_valid(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["name"] and workflow["jobs"]
    triggers = workflow.get("on", workflow.get(True))  # YAML 1.1 reads the key `on` as true
    assert triggers
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["steps"]
        assert "permissions" in workflow or "permissions" in job
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert "@" in step.get("uses", "@")
            used = re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))
            assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in used)


def test_workflows_cover_tests_documentation_and_wheel():
    text = {path.stem: path.read_text() for path in WORKFLOWS}
    assert ".ci/run" in text["test"]
    assert "quarto-dev/quarto-actions/setup" in text["docs"] and "deploy-pages" in text["docs"]
    assert "python -m build" in text["wheel"] and "upload-artifact" in text["wheel"]


def test_continuous_integration_runs_make_test():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.startswith("#!/usr/bin/env bash") and "set -euo pipefail" in script
    assert script.rstrip().endswith("make test")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_sidebar_lists_every_notebook_once_and_nothing_else():
    sidebar = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    listed = []
    for entry in sidebar:
        listed += (
            [entry] if isinstance(entry, str) else [*([entry["href"]] if "href" in entry else []), *entry["contents"]]
        )
    existing = [path.relative_to(ROOT / "nbs").as_posix() for path in site.notebooks()]
    assert sorted(listed) == sorted(existing)
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_quarto_configuration_needs_no_network_in_the_pages():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert list(config["format"]) == ["html"]
    assert config["format"]["html"]["html-math-method"] == "mathml"
    assert (ROOT / "nbs" / config["format"]["html"]["css"]).is_file()
    assert config["website"]["search"] and {"light", "dark"} <= set(config["format"]["html"]["theme"])
    assert "sidebar.yml" in config["metadata-files"]


def test_committed_notebooks_keep_only_the_metadata_that_nbdev_allows():
    for path in site.notebooks():
        for cell in nbformat.read(path, as_version=4).cells:
            assert set(cell.metadata) <= {"tags"}, path
