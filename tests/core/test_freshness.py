"""Which notebooks must run again: fingerprints of pages and of the modules that they reach."""

import json
import re

import pytest

from papers10.core import freshness, site


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    files = {
        "papers10/__init__.py": "",
        "papers10/first.py": "from .part import helper\n",
        "papers10/part/__init__.py": "_HOME = {'.helper': ('f',)}\n",
        "papers10/part/helper.py": "def f():\n    return 1\n",
        "kernels/add.py": "import torch\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "nbs").mkdir()
    freshness._modules.cache_clear()
    yield tmp_path
    freshness._modules.cache_clear()


def page(root, *sources, name="page.ipynb"):
    cells = [{"cell_type": "code", "source": [source]} for source in sources]
    (root / "nbs" / name).write_text(json.dumps({"cells": cells}))
    return root / "nbs" / name


@pytest.mark.parametrize("code", ["import papers10.first", "from papers10 import first", "def f():\n    from papers10.first import helper"])
def test_every_way_of_importing_is_seen(checkout, code):
    before = freshness.fingerprint(page(checkout, code), checkout)
    (checkout / "papers10/part/helper.py").write_text("def f():\n    return 22\n")
    assert freshness.fingerprint(checkout / "nbs/page.ipynb", checkout) != before


def test_a_lazy_package_stands_for_all_its_modules(checkout):
    before = freshness.fingerprint(page(checkout, "from papers10.part import f"), checkout)
    (checkout / "papers10/part/helper.py").write_text("def f():\n    return 22\n")
    assert freshness.fingerprint(checkout / "nbs/page.ipynb", checkout) != before


def test_kernels_are_reached_under_their_import_path(checkout):
    before = freshness.fingerprint(page(checkout, "from papers10.kernels.add import x"), checkout)
    (checkout / "kernels/add.py").write_text("import torch\nx = 1\n")
    assert freshness.fingerprint(checkout / "nbs/page.ipynb", checkout) != before


def test_comments_magics_and_outputs_do_not_count(checkout):
    before = freshness.fingerprint(page(checkout, "x = 1"), checkout)
    assert freshness.fingerprint(page(checkout, "%matplotlib inline\nx = 1  # one"), checkout) == before
    assert freshness.fingerprint(page(checkout, "x = 2"), checkout) != before


def test_other_versions_prove_nothing(checkout, monkeypatch):
    page(checkout, "x = 1")
    freshness.remember({"page.ipynb": 9.0}, checkout)
    assert freshness.proven("page.ipynb", checkout) == 9.0
    monkeypatch.setattr(freshness, "versions", lambda: "python 4.0")
    assert freshness.proven("page.ipynb", checkout) is None


def test_pages_that_are_gone_leave_the_record(checkout):
    page(checkout, "x = 1")
    page(checkout, "y = 1", name="other.ipynb")
    freshness.remember({"page.ipynb": 1.0, "other.ipynb": 1.0}, checkout)
    (checkout / "nbs/other.ipynb").unlink()
    freshness.remember({"page.ipynb": 2.0}, checkout)
    assert {name: entry["seconds"] for name, entry in freshness.record(checkout).items()} == {"page.ipynb": 2.0}


def test_slow_pages_that_did_not_change_are_left_out(checkout, monkeypatch, capsys):
    import nbformat

    pages = {}
    for name in ("slow", "quick", "changed"):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"name = '{name}'")])
        pages[name] = checkout / "nbs" / f"{name}.ipynb"
        nbformat.write(notebook, pages[name])
    freshness.remember({"slow.ipynb": 30.0, "quick.ipynb": 1.0, "changed.ipynb": 30.0}, checkout)
    pages["changed"].write_text(pages["changed"].read_text().replace("'changed'", "'other'"))
    monkeypatch.setattr(site, "repository", lambda: checkout)
    done = site.execute(list(pages.values()), write=False, skip_proven_over=8)
    assert sorted(done) == ["nbs/changed.ipynb", "nbs/quick.ipynb"]
    assert re.search(r"1 notebooks are as they were .*30 s.*2 run now", capsys.readouterr().out)


def test_the_record_of_this_book_names_only_pages_that_exist():
    root = site.repository()
    known = {str(path.relative_to(root / "nbs")) for path in site.notebooks()}
    assert freshness.record(root).keys() <= known
