"""Bad input gets a clear line on stderr, exit code 2 and leaves nothing behind; help is quick."""

import json
import subprocess
import sys
import types

import pytest

from papers10 import cli


@pytest.fixture
def call(tiny, monkeypatch, capsys):
    """The command line in this process: exit code, stdout, stderr."""
    for name in ("PAPERS10_CHAPTER_DATA", "PAPERS10_NOTEBOOKS", "PAPERS10_RUNS", "COLUMNS", "NO_COLOR"):
        monkeypatch.setenv(name, tiny.environment[name])
    monkeypatch.chdir(tiny.root)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("run", "tinny"), "did you mean 'tiny'"),
        (("run", "tiny", "--preset", "smal"), "small"),
        (("run", "tiny", "-p", "step=3"), "steps"),
        (("run", "tiny", "-p", "steps=many"), "int"),
        (("run", "tiny", "-p", "steps=2.5"), "int"),
        (("run", "tiny", "-p", "steps=0"), "[1, 1000]"),
        (("run", "tiny", "-p", "steps"), "NAME=VALUE"),
        (("run", "tiny", "-p", "drift=nan"), "finite"),
        (("run", "tiny", "-p", "steps=3", "-p", "steps=4"), "twice"),
        (("run", "tiny", "--seeds", "a,b"), "seeds"),
        (("run", "tiny", "--seeds", "1,1"), "seeds"),
        (("run", "tiny", "--seeds", ""), "seeds"),
        (("run", "tiny", "--seeds", "1", "-p", "seeds=2"), "same thing"),
        (("run", "tiny", "--device", "gpu"), "device"),
        (("run", "tiny", "--wandb", "offlin"), "offline"),
        (("run", "tiny", "--resume"), "no unfinished run"),
        (("run", "tiny", "--resume", "20200101-000000-small"), "no run"),
        (("run", "tiny", "nothing"), "nothing"),
        (("run", "tiny", "--resume", "nosuch"), "no run nosuch of tiny in"),
        (("run", "--resume", "nosuch"), "no such chapter"),
        (("run", "youtu-agent"), "planned, not written yet"),
        (("run", "tiny", "-p", "fault=/nonexistent/text"), "fault: expected a file or folder that is there"),
        (("run", "tiny", "-p", "steps=[1"), "unclosed list"),
        (("run", "tiny", "-p", "seeds=[1,2"), "unclosed list"),
        (("run", "tiny", "--timeout", "soon"), "--timeout"),
        (("run", "tiny", "--presett", "small"), "--preset"),
        (("run",), "Missing argument"),
        (("runn", "tiny"), "run"),
        (("frobnicate",), "There are: list, run,"),
        (("results", "tinny"), "tiny"),
        (("results", "tiny", "--run", "20200101-000000-small"), "no such run"),
        (("results", "--compare", "x", "y"), "no such run"),
        (("sweep", "tiny"), "-p NAME=[A,B]"),
        (("sweep", "tiny", "-p", "stepz=[1,2]"), "steps"),
        (("sweep", "tiny", "-p", "steps=[]"), "steps"),
        (("sweep", "tiny", "-p", "drift=[0.1,0.10]"), "each value once"),
        (("sweep", "tiny", "-p", "drift=[0.1"), "unclosed list"),
        (("sweep", "tiny", "-p", "steps=[1]", "--workers", "0"), "--workers"),
        (("app", "tiny", "draw"), "no program"),
        (("data", "get", "nothing-of-the-kind"), "no data source"),
        (("notebooks", "data"), "--force"),
    ],
)
def test_refused_before_anything_starts(call, tiny, arguments, says):
    code, out, err = call(*arguments)
    assert code == 2, (out, err)
    assert says in " ".join(err.split()), err
    assert "Traceback" not in err
    assert not tiny.runs.exists()


def test_unwritable_places(call, tiny):
    (tiny.root / "file").write_text("")
    code, _, err = call("run", "tiny", "--out", str(tiny.root / "file" / "below"))
    assert code == 2 and "is not a folder" in err
    code, _, err = call("notebooks", str(tiny.root / "file"))
    assert code == 2 and "not a folder" in err


def test_no_space_is_said_before_the_start(call, tiny, monkeypatch):
    from papers10.core import runs

    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**6))
    code, _, err = call("run", "tiny")
    assert code == 2 and "1 MB are free" in err and "choose another with --out" in err and not tiny.runs.exists()


def test_absent_gpu_and_extras(call, tiny, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, _, err = call("run", "tiny", "--device", "cuda")
    assert code == 5 and "cuda" in err
    from papers10.core import presets

    monkeypatch.setattr(presets, "missing_packages", lambda extra: ["nothing"])
    path = tiny.root / "data" / "presets" / "tiny.yaml"
    path.write_text(path.read_text().replace("smoke: [], small: []", "smoke: [gpu], small: []"))
    code, _, err = call("run", "tiny", "--preset", "smoke")
    assert code == 3 and "papers10[gpu]" in err and not tiny.runs.exists()
    code, _, err = call("sweep", "tiny", "-p", "steps=[1,2]", "--ray")
    try:
        import ray  # noqa: F401
    except ImportError:
        assert code == 3 and "papers10[dist]" in err


def test_a_backend_that_cannot_run_here(call, tiny, monkeypatch):
    import torch

    from papers10.core import optional

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = call("run", "tiny", "-p", "backend=triton")
    assert code == 5 and "TRITON_INTERPRET" in err and not tiny.runs.exists()
    code, _, err = call("sweep", "tiny", "-p", "backend=[auto,triton]")
    assert code == 5 and not tiny.runs.exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    code, _, err = call("run", "tiny", "-p", "backend=triton")
    assert code == 5 and "--device cuda" in err and not tiny.runs.exists()
    monkeypatch.setattr(optional, "have", lambda module: False)
    for backend, extra in (("numba", "fast"), ("triton", "gpu")):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        code, _, err = call("run", "tiny", "-p", f"backend={backend}")
        assert code == 3 and f"papers10[{extra}]" in err and not tiny.runs.exists()


def test_an_absent_device_is_told_before_absent_packages(call, tiny, monkeypatch):
    import torch

    from papers10.core import presets

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(presets, "missing_packages", lambda extra: ["nothing"])
    path = tiny.root / "data" / "presets" / "tiny.yaml"
    path.write_text(
        path.read_text()
        .replace("paper: []", "paper: [gpu]")
        .replace("small: cpu, paper: cpu", "small: cpu, paper: cuda")
    )
    code, _, err = call("run", "tiny", "--preset", "paper")
    assert code == 5 and "cuda" in err and not tiny.runs.exists()


def test_docs_looks_at_its_target_first(call, tiny, monkeypatch):
    from papers10.core import site

    monkeypatch.setattr(site, "build", lambda out: pytest.fail("built"))
    (tiny.root / "file").write_text("")
    code, _, err = call("docs", "--out", str(tiny.root))
    assert code == 2 and "not a site" in err
    code, _, err = call("docs", "--out", "/proc/site")
    assert code == 2 and "cannot be written" in err


def test_verify_says_when_nothing_was_compared(call, monkeypatch, tmp_path):
    from papers10.core import data

    monkeypatch.setattr(data, "source", lambda name: None)
    checks = [data.FileCheck(tmp_path / "a", "0123", None)]
    monkeypatch.setattr(data, "verify", lambda name: checks)
    code, out, _ = call("data", "verify", "pydoc")
    assert code == 0 and "nothing was compared" in out and "as they should be" not in out and "None" not in out
    checks.append(data.FileCheck(tmp_path / "b", "4567", "4567"))
    assert "1 of 2 files compared, as they should be" in call("data", "verify", "pydoc")[1]


def test_what_the_bench_refuses_says_who_speaks(capsys):
    from papers10.core import bench

    assert bench.main(["no_such_kernel"]) == 2
    assert capsys.readouterr().err.startswith("papers10: ")


def test_broken_files_are_named(call, tiny):
    path = tiny.root / "data" / "presets" / "tiny.yaml"
    good = path.read_text()
    path.write_text(good.replace("smoke: 3, small: 6", "smoke: 3, small: six"))
    code, _, err = call("run", "tiny")
    assert code == 2 and "parameters.steps.small" in err and "presets/tiny.yaml" in err
    path.write_text(good.replace("smoke: 1.0, small: 1.0, paper: 1.0", "smoke: 1e-3, small: 1.0, paper: 1.0"))
    code, _, err = call("run", "tiny")
    assert code == 2 and "1.0e-3" in err
    path.write_text(good + "\n  : :")
    assert call("run", "tiny")[0] == 2
    path.write_text(good)
    claims = tiny.root / "data" / "claims" / "tiny.yaml"
    claims.write_text(claims.read_text().replace("lower(walk.end) > 0", "walk.end > 0"))
    code, _, err = call("run", "tiny")
    assert code == 2 and "claims/tiny.yaml" in err and "reduce it" in err


def test_parameters_are_shown(call, tiny):
    code, out, _ = call("run", "tiny", "--params", "-p", "steps=42")
    assert code == 0 and "42" in out and "steps of the walk" in out and not tiny.runs.exists()


def test_notebooks_are_copied(call, tiny):
    code, _out, _ = call("notebooks", "copy")
    assert code == 0
    assert (tiny.root / "copy" / "01_tiny" / "reproduce.ipynb").exists()
    assert call("notebooks", "copy")[0] == 2
    assert call("notebooks", "copy", "--force", "--only", "tiny")[0] == 0
    assert call("notebooks", "more", "--only", "tinny")[0] == 2 and not (tiny.root / "more").exists()


def test_list_and_results_without_a_record(call):
    code, out, _ = call("list")
    assert code == 0 and "A tiny paper" in out and "not run" in out
    code, out, _ = call("results")
    assert code == 0 and "not run" in out
    assert json.loads(call("results", "tiny", "--json")[1]) == {}


def test_dispatch_passes_what_was_asked(call, monkeypatch):
    from papers10.core import bench, doctor

    asked = []
    monkeypatch.setattr(bench, "main", lambda *arguments: asked.append(arguments) or 1)
    monkeypatch.setattr(doctor, "main", lambda json: asked.append(json) or 0)
    assert call("bench", "delta_update", "--quick", "--json")[0] == 1
    assert call("doctor", "--json")[0] == 0
    assert asked == [(["delta_update"], None, None, None, True, True), True]
    module = types.ModuleType("papers10.tiny.app")
    module.ACTIONS, module.main = {"draw": "draw it"}, lambda arguments: asked.append(arguments) or 3
    monkeypatch.setattr(cli, "applications", lambda: {"tiny": module.ACTIONS})
    monkeypatch.setitem(sys.modules, "papers10.tiny", types.ModuleType("papers10.tiny"))
    monkeypatch.setitem(sys.modules, "papers10.tiny.app", module)
    assert call("app", "tiny", "drow")[0] == 2
    assert call("app", "tiny", "draw", "--size", "3")[0] == 3 and asked[-1] == ["draw", "--size", "3"]
    # What follows an action is the action's own, --help too; without one the actions are listed.
    assert call("app", "tiny", "draw", "--help")[0] == 3 and asked[-1] == ["draw", "--help"]
    for line in (("app",), ("app", "--help"), ("app", "tiny", "-h")):
        code, out = call(*line)[:2]
        assert code == 0 and "draw it" in out


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from papers10 import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'papermill', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    listed = (
        "import sys; from papers10 import cli\ntry: cli.main(['list'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", listed], check=True, capture_output=True)
