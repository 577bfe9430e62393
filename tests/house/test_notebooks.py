"""Every committed notebook: valid, executed, light, titled, and free of this machine's paths."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(
    path
    for path in NBS.rglob("*.ipynb")
    if not any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)
)
LOCAL_PATH = re.compile(r"(?<![\w.:/])/(?:home|Users|root|work|tmp|private|var/folders|mnt|opt)/[\w.-]+")


def read(path: Path):
    return nbformat.read(path, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(output) -> list[str]:
    if output.output_type == "stream":
        return [output.text]
    data = output.get("data", {})
    return [text for mime, text in data.items() if mime.startswith("text/") and isinstance(text, str)]


pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(NBS)))


def test_is_valid(path):
    nbformat.validate(read(path))


def test_has_a_title_and_one_line_that_says_what_it_is(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S.*\n+> \S", first.source), "the first cell must be '# Title' and '> one line'"


def test_headings_start_at_the_second_level(path):
    bodies = [cell.source for cell in read(path).cells[1:] if cell.cell_type == "markdown"]
    prose = re.sub(r"```.*?```", "", "\n".join(bodies), flags=re.DOTALL)
    assert re.findall(r"^# .*$", prose, re.MULTILINE) == []
    assert re.search(r"^## ", prose, re.MULTILINE), "without headings the search index finds only the first block"


def test_was_executed_without_an_error(path):
    notebook = read(path)
    errors = [output.ename for output in outputs(notebook) if output.output_type == "error"]
    assert errors == []
    prints = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code"
        and not cell.source.startswith("#| export")
        and re.search(r"^(print\(|display\(|plt\.show\()", cell.source, re.MULTILINE)
    ]
    assert all(cell.outputs for cell in prints), "committed without the outputs of a run: make notebooks ARGS=this file"


def test_is_light(path):
    assert path.stat().st_size < 1_500_000


def test_shows_no_path_of_the_machine_it_ran_on(path):
    notebook = read(path)
    found = {match for output in outputs(notebook) for text in texts(output) for match in LOCAL_PATH.findall(text)}
    assert found == set()


def test_its_module_was_exported_from_it(path):
    code = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    exported = re.search(r"^#\|\s*default_exp\s+(\S+)", code, re.MULTILINE)
    if exported:
        module = ROOT / "papers10" / (exported[1].replace(".", "/") + ".py")
        assert module.is_file(), f"{exported[1]} was never exported: make export"
        assert str(path.relative_to(ROOT)) in module.read_text().replace("../", ""), (
            "another notebook exports this module"
        )


def test_uses_no_star_import(path):
    code = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    assert re.findall(r"^\s*from \S+ import \*", code, re.MULTILINE) == []
