"""The wheel, installed in a clean environment outside the repository, runs a chapter to its verdicts."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import papers10

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run(command, **options):
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert ran.returncode == 0, f"{command} ended with {ran.returncode}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    return ran.stdout


def can_build_without_isolation() -> bool:
    try:
        import setuptools
    except ImportError:
        return False
    return int(setuptools.__version__.split(".")[0]) >= 77


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(
        ".git",
        ".venv",
        "runs",
        "_proc",
        "_docs*",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        "tests",
        ".*_cache",
        "wandb",
    )
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=unwanted)
    isolation = ["--no-isolation"] if can_build_without_isolation() else []
    run([sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", folder, folder / "source"], timeout=240)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Folder of an environment with the wheel and, beside it, the dependencies that are already installed here."""
    folder = tmp_path_factory.mktemp("clean") / "environment"
    venv.EnvBuilder(with_pip=False).create(folder)
    python = folder / "bin" / "python"
    run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel],
        timeout=120,
    )
    # A path in a .pth file is searched, but the .pth files in it are not read: an editable install stays invisible.
    packages = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(shared)) + "\n")
    return folder


@pytest.fixture
def outside(tmp_path):
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PAPERS10_", "PYTHON", "PYTEST_"))
    }
    environment |= {"PAPERS10_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PAPERS10_OFFLINE": "1"}
    return {"cwd": tmp_path, "env": environment}


def test_wheel_is_small_and_complete(wheel):
    # Notebooks with their outputs are about 4 MB a chapter, the small networks of NeoVerse 6 MB and of Avatar Forcing 2 MB; the package index takes 100 MB.
    assert wheel.stat().st_size < 46_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    for wanted in [
        "papers10/cli.py",
        "papers10/kernels/delta_update.py",
        "papers10/deep_delta_learning/residual.py",
        "papers10/_data/presets/deep-delta-learning.yaml",
        "papers10/_data/claims/deep-delta-learning.yaml",
        "papers10/_notebooks/04_deep_delta_learning/reproduce.ipynb",
        "papers10/_notebooks/index.ipynb",
    ]:
        assert wanted in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if re.search(r"(^|/)(tests|runs|__pycache__|_proc|_docs)/", name)]
    assert "License-Expression: Apache-2.0" in metadata


def test_wheel_carries_every_notebook_and_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    notebooks = {path.relative_to(ROOT / "nbs").as_posix() for path in (ROOT / "nbs").rglob("*.ipynb")}
    notebooks = {name for name in notebooks if not re.search(r"(^|/)[._]", name)}
    assert {f"papers10/_notebooks/{name}" for name in notebooks} <= names
    data = {
        path.relative_to(ROOT / "data").as_posix()
        for path in (ROOT / "data").rglob("*")
        if path.suffix in (".yaml", ".json")
    }
    assert {f"papers10/_data/{name}" for name in data} <= names


def test_installed_package_is_the_wheel_not_the_checkout(installed, outside):
    code = "import papers10; print(papers10.__file__); print(papers10.__version__)"
    place, version = run([installed / "bin" / "python", "-c", code], **outside).split()
    assert Path(place).is_relative_to(installed)
    assert version == papers10.__version__


def test_smoke_run_ends_with_a_verdict_table(installed, outside):
    command = [installed / "bin" / "papers10", "run", "deep-delta-learning", "--preset", "smoke"]
    printed = run(command, timeout=240, **outside)
    assert re.search(r"\bheld\b", printed) and "not tested" in printed
    results = list(outside["cwd"].glob("runs/deep-delta-learning/*-smoke/result.json"))
    assert len(results) == 1
    result = json.loads(results[0].read_text())
    assert result["status"] == "finished" and result["claims"]
    assert {claim["verdict"] for claim in result["claims"]} <= {"held", "not held", "not tested"}


def test_notebooks_can_be_copied_out(installed, outside):
    target = outside["cwd"] / "copied"
    run([installed / "bin" / "papers10", "notebooks", target], timeout=120, **outside)
    assert list(target.rglob("reproduce.ipynb")) and (target / "index.ipynb").is_file()


def test_site_tools_say_that_they_need_a_checkout(installed, outside):
    code = "from papers10.core import site; site.repository()"
    ran = subprocess.run(
        [str(installed / "bin" / "python"), "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **outside,
    )
    assert ran.returncode != 0 and "in a checkout" in ran.stderr
