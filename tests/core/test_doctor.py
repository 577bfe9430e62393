"""Doctor: reads extras from the package's metadata, finds what is broken, never fails itself."""

import importlib.metadata
import json
import sys
import types

import pytest

from papers10.core import doctor


def names(group):
    return [requirement.name for requirement in group]


def test_extras_are_those_of_the_metadata():
    wanted = doctor.requirements()
    assert set(wanted) == {"", *importlib.metadata.metadata("papers10").get_all("Provides-Extra")}
    assert {"torch", "pydantic", "typer"} <= set(names(wanted[""])) and "wandb" not in names(wanted[""])
    # extras that include others are written out, without repeats
    assert {"numba", "transformers", "pytest"} <= set(names(wanted["dev"])) and len(set(names(wanted["dev"]))) == len(
        wanted["dev"]
    )


@pytest.fixture
def fake_metadata(monkeypatch):
    """Metadata of an imaginary papers10, with pytest and pluggy as its packages."""

    def install(requires, extras=()):
        real = importlib.metadata.requires

        class Metadata:
            def get_all(self, _):
                return list(extras)

        monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires if name == "papers10" else real(name))
        monkeypatch.setattr(importlib.metadata, "metadata", lambda name: Metadata())

    return install


def test_states_of_packages(fake_metadata, monkeypatch):
    fake_metadata(
        [
            "pytest>=1",
            'pluggy>=1; extra == "good"',
            'no-such-package-x>=1; extra == "absent"',
            'pluggy>=999; extra == "old"',
            'iniconfig; extra == "faulty"',
            'papers10[good,absent]; extra == "both"',
        ],
        ["good", "absent", "old", "faulty", "both"],
    )
    monkeypatch.setattr(doctor, "_import_all", lambda modules: {"iniconfig": "ImportError: half an upgrade"})
    rows = {row["name"]: row for row in doctor.package_rows()}
    assert {name: row["state"] for name, row in rows.items()} == {
        "base": "works",
        "good": "works",
        "absent": "missing",
        "old": "broken",
        "faulty": "broken",
        "both": "missing",
    }
    assert rows["absent"]["type"] == "pip install 'papers10[absent]'" and "no-such-package-x" in rows["absent"]["found"]
    assert "outside >=999" in rows["old"]["found"] and "--upgrade" in rows["old"]["type"]
    assert "half an upgrade" in rows["faulty"]["found"]
    assert "1 listed above" in rows["both"]["found"]


def test_a_required_package_that_is_absent_is_broken(fake_metadata):
    fake_metadata(["no-such-package-x>=1"])
    (row,) = doctor.package_rows()
    assert row["state"] == "broken" and row["type"] == "pip install papers10"


def test_modules_that_fail_crash_or_hang(tmp_path, monkeypatch):
    (tmp_path / "fails_here.py").write_text("raise RuntimeError('no\\nmore')")
    (tmp_path / "crashes_here.py").write_text("import os; os.abort()")
    (tmp_path / "leaves_here.py").write_text("raise SystemExit(0)")
    (tmp_path / "talks_here.py").write_text("print('[1, 2]'); print('hello')")
    (tmp_path / "hangs_here.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    failures = doctor._import_all(
        ["json", "fails_here", "crashes_here", "leaves_here", "talks_here", "hangs_here", "re"], seconds=3
    )
    assert set(failures) == {"fails_here", "crashes_here", "leaves_here", "hangs_here"}
    assert failures["fails_here"] == "RuntimeError: no" and "no answer" in failures["hangs_here"]


def test_folders(tmp_path):
    assert doctor._folder_row("runs", tmp_path / "not" / "yet")["state"] == "works"
    assert not (tmp_path / "not").exists()
    blocked = tmp_path / "file"
    blocked.write_text("")
    row = doctor._folder_row("cache", blocked / "below")
    assert row["state"] == "broken" and "PAPERS10_HOME" in row["type"]


def test_a_bad_variable_is_a_row(monkeypatch):
    monkeypatch.setenv("PAPERS10_THREADS", "none")
    row = doctor._system_rows()[-1]
    assert row["state"] == "broken" and "PAPERS10_THREADS" in row["found"]


def test_hardware_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERS10_HOME", str(tmp_path))
    first = doctor.measured_hardware()
    assert first.bytes_per_s > 1e8 and first.flops["float32"] > 1e8
    assert doctor.measured_hardware() == first
    for damaged in ("", "[]", "{not json"):
        (tmp_path / "hardware.json").write_text(damaged)
        assert doctor.measured_hardware().bytes_per_s > 1e8
        assert isinstance(json.loads((tmp_path / "hardware.json").read_text()), dict)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAPERS10_HOME", str(tmp_path / "file"))
    assert doctor.measured_hardware().bytes_per_s > 1e8


def test_a_check_that_fails_is_a_row(monkeypatch):
    def fails():
        raise RuntimeError("surprise")

    for name in ("_device_rows", "_tool_rows", "_data_rows", "_kernel_rows", "package_rows"):
        monkeypatch.setattr(doctor, name, lambda *_: fails())
    rows = doctor.report()
    assert sum("surprise" in row["found"] for row in rows) == 5


@pytest.mark.parametrize("state, code", [("works", 0), ("missing", 0), ("note", 0), ("broken", 1)])
def test_exit_code_and_outputs(state, code, monkeypatch, capsys):
    row = {
        "area": "packages",
        "name": "x[y]",
        "state": state,
        "found": "papers10[lm] 1.0",
        "type": "pip install 'papers10[lm]'",
    }
    monkeypatch.setattr(doctor, "report", lambda: [row])
    monkeypatch.setenv("COLUMNS", "120")
    assert doctor.main(json=True) == code
    assert json.loads(capsys.readouterr().out) == [row]
    assert doctor.main() == code
    printed = capsys.readouterr().out
    assert "pip install 'papers10[lm]'" in printed and state in printed and "x[y]" in printed


def test_data_states(monkeypatch):
    class Missing(FileNotFoundError):
        pass

    class Wrong(ValueError):
        pass

    def locate(name):
        if name == "lost":
            raise Missing("lost: run papers10 data get lost")
        if name == "changed":
            raise Wrong("changed: sha256 differs")

    module = types.ModuleType("papers10.core.data")
    module.ChecksumMismatch, module.locate = Wrong, locate
    module.sources = lambda: [
        types.SimpleNamespace(name=name, title="Title", licence="MIT", command=f"papers10 data get {name}")
        for name in ("digits", "lost", "changed")
    ]
    monkeypatch.setitem(sys.modules, "papers10.core.data", module)
    monkeypatch.setattr(sys.modules["papers10.core"], "data", module, raising=False)
    assert [(row["name"], row["state"]) for row in doctor._data_rows()] == [
        ("digits", "works"),
        ("lost", "missing"),
        ("changed", "broken"),
    ]


def test_no_card_without_triton(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    (row,) = doctor._kernel_rows()
    assert row["state"] == "missing" and "papers10[gpu]" in row["type"]


@pytest.mark.slow
def test_the_real_report():
    rows = doctor.report()
    assert {"system", "device", "packages", "tools", "data", "kernels"} == {row["area"] for row in rows}
    assert not [row for row in rows if row["name"] == "check"]
    assert all(row["state"] in ("works", "missing", "note", "broken") for row in rows)
    assert all(row["type"] for row in rows if row["state"] in ("missing", "broken"))
