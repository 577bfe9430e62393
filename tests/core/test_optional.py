"""core.optional: missing packages name their extra; nothing heavy is imported by looking."""

import pickle
import subprocess
import sys

import pytest

from papers10.core.optional import MissingExtra, have, lazy_names, need


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


# -- names that are found at first use


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `lazy_package_for_test` with a module and two objects that are built."""
    place = tmp_path / "lazy_package_for_test"
    place.mkdir()
    (place / "__init__.py").write_text(
        "from papers10.core.optional import lazy_names\n"
        "built = []\n"
        "def build():\n"
        "    built.append(1)\n"
        "    return ('one', 'two')\n"
        "sources = {'.part': ('number', 'absent'), build: ('First', 'Second')}\n"
        "__getattr__, __dir__ = lazy_names(__name__, sources)\n"
    )
    (place / "part.py").write_text("number = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    import lazy_package_for_test

    yield lazy_package_for_test
    for name in [name for name in sys.modules if name.startswith("lazy_package_for_test")]:
        del sys.modules[name]


def test_a_name_loads_its_module_when_it_is_used(package):
    assert "lazy_package_for_test.part" not in sys.modules
    assert package.number == 3 and "lazy_package_for_test.part" in sys.modules


def test_built_objects_are_built_once_and_only_when_used(package):
    assert not package.built
    assert (package.Second, package.First, package.Second) == ("two", "one", "two") and package.built == [1]


def test_names_are_listed_before_they_are_loaded(package):
    assert {"number", "First", "Second", "part", "built"} <= set(dir(package)) and not package.built


def test_unknown_names_are_attribute_errors(package):
    with pytest.raises(AttributeError, match="module 'lazy_package_for_test' has no attribute 'numbr'"):
        package.numbr  # noqa: B018
    with pytest.raises(AttributeError, match="absent"):
        package.absent  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'numbr'"):
        from lazy_package_for_test import numbr  # noqa: F401


def test_a_neighbour_is_named_relative_to_the_package():
    find, _ = lazy_names("papers10.core", {"..core.settings": ("__name__",)})
    assert find("__name__") == "papers10.core.settings"


def test_a_name_has_one_source():
    with pytest.raises(ValueError, match="two for 'a'"):
        lazy_names("papers10.core", {".x": ("a", "b"), ".y": ("a",)})
