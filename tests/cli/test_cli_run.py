"""`papers10 run` on a tiny chapter: verdicts, files, exit codes, killing and resuming, full disks."""

import json
import os
import signal
import time

import pytest


def units(tiny, folder):
    return sorted(path.relative_to(folder) for path in (folder / "units").rglob("*.json"))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_run_writes_everything_and_prints_verdicts(tiny):
    elsewhere = tiny.root / "elsewhere"
    elsewhere.mkdir()
    done = tiny("run", "tiny", "--preset", "small", "-p", "drift=2", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    (folder,) = tiny.folders()
    assert str(folder) in done.stdout and "not held" in done.stdout and "tiny.up" in done.stdout
    result = tiny.result(folder)
    assert list(result)[:6] == ["schema", "chapter", "paper", "run_id", "preset", "status"]
    assert result["parameters"]["drift"] == 2.0 and result["parameters"]["steps"] == 6
    assert [claim["verdict"] for claim in result["claims"]] == ["held", "not held"]
    metric = result["metrics"]["walk.end"]
    assert set(metric["by_seed"]) == {"0", "1", "2"} and metric["ci_method"] == "t-seeds"
    assert metric["ci95"][0] < metric["mean"] < metric["ci95"][1]
    assert (folder / "tables" / "ends.csv").read_text().startswith("seed,end\n0,")
    notebook = json.loads((folder / "reproduce.ipynb").read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert not list(elsewhere.iterdir())


def test_strict_and_failures_have_their_exit_codes(tiny):
    assert tiny("run", "tiny", "--preset", "smoke", "--strict").returncode == 4
    failed = tiny("run", "tiny", "--preset", "smoke", "-p", "fault=error")
    assert failed.returncode == 1
    assert "fell into a hole" in failed.stderr and "--resume" in failed.stderr
    assert "fell into a hole" in (tiny.folders()[-1] / "reproduce.ipynb").read_text()
    missing = tiny("run", "tiny", "--preset", "smoke", "-p", "fault=extra")
    assert missing.returncode == 3 and "papers10[gpu]" in missing.stderr


def test_a_failed_seed_costs_only_its_claims(tiny):
    done = tiny("run", "tiny", "-p", "fault=seed")
    assert done.returncode == 1, done.stderr
    assert "papers10: 6 failed: walk/1/0 (seed 1), " in done.stderr
    lines = done.stdout.splitlines()
    assert sum("seed 1 failed" in line for line in lines) == 1 and "tiny.up, tiny.far" in done.stdout
    result = tiny.result(tiny.folders()[0])
    assert result["metrics"]["walk.end"]["by_seed"]["1"] is None
    assert all(claim["verdict"] == "not tested" and "seed 1 failed" in claim["reason"] for claim in result["claims"])
    assert {error["seed"] for error in result["errors"]} == {1}


def test_killed_and_resumed_ends_with_the_same_bits(tiny):
    whole = tiny("run", "tiny", "--seeds", "0,1,2")
    assert whole.returncode == 0, whole.stderr
    expected = tiny.result(tiny.folders()[0])["metrics"]
    process = tiny.popen("run", "tiny", "-p", "pause=0.15")
    wait_for(lambda: len(tiny.folders()) == 2 and len(units(tiny, tiny.folders()[1])) >= 4)
    folder = tiny.folders()[1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close(), process.stderr.close()
    resumed = tiny("run", "tiny", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert tiny.folders()[1] == folder and len(tiny.folders()) == 2
    result = tiny.result(folder)
    assert result["metrics"] == expected and result["resumed"] == 1
    again = tiny("run", "tiny", "--resume", folder.name)
    assert again.returncode == 2 and "finished" in again.stderr
    assert tiny("run", "tiny", "--resume").returncode == 2


def test_interrupt_prints_the_resume_command_and_a_second_run_is_not_disturbed(tiny):
    process = tiny.popen("run", "tiny", "-p", "pause=1.5")
    wait_for(lambda: tiny.folders() and len(units(tiny, tiny.folders()[0])) >= 1)
    first = tiny.folders()[0]
    beside = tiny("run", "tiny", "--preset", "smoke")
    assert beside.returncode == 0, beside.stderr
    busy = tiny("run", "tiny", "--resume", first.name)
    assert busy.returncode == 2 and "another process" in busy.stderr
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"papers10 run tiny --resume {first.name}" in told
    assert "Traceback" not in told and "Error" not in told and len(told.splitlines()) < 5, told
    assert json.loads((first / "state.json").read_text())["status"] == "interrupted"
    changed = tiny("run", "tiny", "--resume", first.name, "--preset", "smoke")
    assert changed.returncode == 2 and "began with preset small" in changed.stderr
    other = tiny("run", "tiny", "--resume", "-p", "pause=0.0")
    assert other.returncode == 2 and "pause" in other.stderr


def test_timeout_stops_and_keeps(tiny):
    done = tiny("run", "tiny", "-p", "pause=5", "--timeout", "4")
    assert done.returncode == 1 and "time is over" in done.stderr and "--resume" in done.stderr


def test_a_full_disk_loses_nothing(tiny):
    scratch = tiny.root / "scratch"
    scratch.mkdir()
    done = tiny("run", "tiny", "-p", "fault=disk", TMPDIR=str(scratch))
    assert done.returncode == 1
    assert "No space left" in done.stderr or "could not be written" in done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    assert json.loads(line)["metrics"]["walk.end"]["by_seed"]["2"] > 0
    assert list(scratch.glob("papers10-result-*.json"))


def test_record_goes_beside_the_claims_and_results_shows_it(tiny):
    done = tiny("run", "tiny", "--preset", "smoke", "--record", "--out", str(tiny.root / "there"))
    assert done.returncode == 0, done.stderr
    stored = json.loads((tiny.root / "data" / "results" / "tiny.json").read_text())
    assert list(stored["records"]) == ["smoke"] and stored["records"]["smoke"]["parameters"]["out_dir"] is None
    shown = tiny("results", "tiny")
    assert "2.8299" in shown.stdout and "not held" in shown.stdout
    listed = json.loads(tiny("list", "--json").stdout)
    assert listed[0]["slug"] == "tiny" and listed[0]["line"] == "A walk"
    assert listed[0]["verdicts"]["smoke"] == {"not tested": 1, "not held": 1}
    (folder,) = (tiny.root / "there" / "tiny").iterdir()
    both = tiny("results", "--json", "--compare", "tiny", str(folder))
    assert json.loads(both.stdout)[0]["difference"] == 0.0


def test_an_installed_package_keeps_no_records(monkeypatch):
    from papers10.core import results
    from papers10.core.config import ConfigError

    monkeypatch.delenv("PAPERS10_CHAPTER_DATA", raising=False)
    monkeypatch.setattr(results, "checkout_root", lambda: None)
    with pytest.raises(ConfigError, match="checkout"):
        results.record_path("tiny")


def test_sweep_runs_the_grid(tiny):
    done = tiny("sweep", "tiny", "--preset", "smoke", "-p", "drift=[0.5,1.5]", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert sorted(tiny.result(folder)["parameters"]["drift"] for folder in tiny.folders()) == [0.5, 1.5]
    wrong = tiny("sweep", "tiny", "-p", "drift=[0.5,-1]")
    assert wrong.returncode == 2 and len(tiny.folders()) == 2


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_terminate_counts_as_interrupt(tiny):
    process = tiny.popen("run", "tiny", "-p", "pause=0.5")
    wait_for(lambda: tiny.folders() and units(tiny, tiny.folders()[0]))
    process.terminate()
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and "--resume" in told
