"""core.optional: missing packages name their extra; nothing heavy is imported by looking."""

import pickle
import subprocess
import sys

import pytest

from papers10.core.optional import MissingExtra, have, need


def test_need_returns_the_module():
    import json

    assert need("json", "lm") is json


def test_missing_package_names_extra_and_purpose():
    with pytest.raises(MissingExtra) as caught:
        need("no_such_package", "gpu", "backend='gsplat'")
    assert str(caught.value) == "no_such_package is needed for backend='gsplat': pip install 'papers10[gpu]'"
    assert caught.value.module == "no_such_package" and caught.value.extra == "gpu"
    assert isinstance(caught.value, ImportError)


def test_missing_extra_survives_pickling():
    copy = pickle.loads(pickle.dumps(MissingExtra("a.b", "lm", "reading")))
    assert (copy.module, copy.extra, str(copy)) == ("a.b", "lm", "a is needed for reading: pip install 'papers10[lm]'")


def test_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package_for_test.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as caught:
        need("broken_package_for_test", "lm")
    assert not isinstance(caught.value, MissingExtra) and caught.value.name == "no_such_dependency"


def test_have():
    assert have("numpy") and not have("no_such_package") and not have("no_such_package.part")


@pytest.mark.parametrize("module", ["optional", "settings", "checks", "config", "data", "random", "stats"])
def test_import_without_torch(module):
    code = f"import sys, papers10.core.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
