"""Tracking: off by default, offline writes a record, a failure never stops a run."""

import subprocess
import sys
import time

import pytest

from papers10.core import tracking
from papers10.core.optional import MissingExtra


def test_disabled_needs_nothing(tmp_path):
    code = "import sys; from papers10.core import tracking; tracking.start().log(1, {'a': 1}); assert 'wandb' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_offline_record_holds_what_was_logged(tmp_path):
    pytest.importorskip("wandb")
    tracker = tracking.start("offline", folder=tmp_path, identity="test-run", config={"steps": 7, "seeds": [0, 1]})
    tracker.log(1, {"loss": 0.25}, name="arm")
    tracker.log(1, {"loss": 0.75}, name="other")
    tracker.log(2, {"loss": 0.125}, name="arm")
    tracker.summary({"verdict": "held"})
    tracker.finish()
    tracker.finish()
    expected = (b"arm/loss", b"arm/step", b"0.125", b"other/loss", b"verdict", b"seeds")
    path = next(tmp_path.rglob("run-test-run.wandb"))
    end = time.monotonic() + 60  # another process writes the file, and may still be at it
    while not all(part in path.read_bytes() for part in expected) and time.monotonic() < end:
        time.sleep(0.2)
    assert [part for part in expected if part not in path.read_bytes()] == []
    assert all("wandb" in path.parts for path in tmp_path.rglob("*") if path.is_file())


def test_second_run_in_one_process_and_none_for_other_ranks(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("one", "two"):
        tracking.start("offline", folder=tmp_path / name, identity=name).finish()
        assert len(list((tmp_path / name).rglob("*.wandb"))) == 1
    monkeypatch.setenv("RANK", "1")
    assert type(tracking.start("offline", folder=tmp_path / "three")) is tracking.Tracker


def test_a_failure_while_logging_is_a_warning(caplog):
    class Broken:
        def define_metric(self, *_, **__):
            raise ConnectionError("gone")

    tracker = tracking.WandbTracker(Broken())
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 1.0})
    tracker.finish()
    assert caplog.text.count("ConnectionError: gone") == 1


def test_bad_modes(monkeypatch):
    with pytest.raises(ValueError, match="wandb: expected one of.*did you mean 'online'"):
        tracking.start("on-line")
    monkeypatch.setenv("PAPERS10_OFFLINE", "1")
    with pytest.raises(ValueError, match="PAPERS10_OFFLINE"):
        tracking.start("online")


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"papers10\[wandb\]"):
        tracking.start("offline")
