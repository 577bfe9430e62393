"""Executing notebooks and comparing files around an export."""

import nbformat
import pytest

from papers10.core import site


def write(folder, name, *sources):
    path = folder / f"{name}.ipynb"
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_every_failing_notebook_is_named_with_its_error(tmp_path, capsys):
    good = write(tmp_path, "good", "x = 1", "assert x == 1")
    bad = write(tmp_path, "bad", "assert 2 + 2 == 5, 'arithmetic'")
    before = bad.read_bytes()
    with pytest.raises(RuntimeError, match=r"(?s)1 of 2 notebooks failed.*bad\.ipynb.*arithmetic") as caught:
        site.execute([good, bad], write=False)
    assert "good.ipynb" not in str(caught.value)
    assert bad.read_bytes() == before
    assert "FAILED" in capsys.readouterr().out


def test_a_notebook_that_hangs_is_stopped(tmp_path):
    hanging = write(tmp_path, "hanging", "import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match="hanging"):
        site.execute([hanging], write=False, timeout=2)


def test_runs_of_a_notebook_land_outside_the_repository(tmp_path):
    code = "import os; assert not os.environ['PAPERS10_RUNS'].startswith(os.getcwd()), os.environ['PAPERS10_RUNS']"
    assert next(iter(site.execute([write(tmp_path, "runs", code)], write=False).values())) < 60


def test_a_chapters_run_notebook_is_left_to_the_command_line():
    from pathlib import Path

    assert site._is_run_notebook(Path("04_deep_delta_learning/reproduce.ipynb"))
    assert not site._is_run_notebook(Path("start/reproduce.ipynb"))
    assert not site._is_run_notebook(Path("04_deep_delta_learning/01_operator.ipynb"))


def test_progress_bars_are_shown_as_their_last_state():
    assert site._terminal(" 10%\r 50%\r100%\nnext") == "100%\nnext"


def test_docstring_sections_keep_code_blocks():
    entry = "*Adds.*\n\nExample:\n    ```python\n    f(1)\n    ```"
    assert "f(1)" in site.docstring_sections(entry)
