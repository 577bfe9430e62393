"""core.settings: the six variables, their defaults and what a wrong value gets."""

from pathlib import Path

import pytest

from papers10.core.settings import Settings, settings

NAMES = ("HOME", "RUNS", "DATA", "OFFLINE", "DEVICE", "THREADS")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(f"PAPERS10_{name}", raising=False)


def test_defaults():
    found = settings()
    assert found.home.name == "papers10" and found.runs == Path("runs")
    assert (found.data, found.offline, found.device, found.threads) == (None, False, None, None)


def test_environment(monkeypatch, tmp_path):
    values = {
        "HOME": tmp_path / "h",
        "RUNS": "~/r",
        "DATA": tmp_path,
        "OFFLINE": "1",
        "DEVICE": "cuda:1",
        "THREADS": "2",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"PAPERS10_{name}", str(value))
    expected = Settings.model_construct(
        home=tmp_path / "h", runs=Path.home() / "r", data=tmp_path, offline=True, device="cuda:1", threads=2
    )
    assert settings() == expected


def test_empty_variable_counts_as_not_set(monkeypatch):
    monkeypatch.setenv("PAPERS10_DATA", "")
    monkeypatch.setenv("PAPERS10_THREADS", "")
    assert settings().data is None and settings().threads is None


@pytest.mark.parametrize(("name", "value"), [("THREADS", "0"), ("THREADS", "two"), ("OFFLINE", "perhaps")])
def test_wrong_value_names_the_variable(monkeypatch, name, value):
    monkeypatch.setenv(f"PAPERS10_{name}", value)
    with pytest.raises(ValueError, match=rf"^PAPERS10_{name}: .*got '{value}'$"):
        settings()


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        settings().offline = True
