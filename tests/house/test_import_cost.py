"""Starting is cheap: the package and the command line's help load neither torch nor any optional package."""

import os
import subprocess
import sys

import pytest

# What the help must not wait for: torch and everything optional. (numpy is a small part of the base.)
HEAVY = ["torch", "sklearn", "matplotlib", "transformers", "datasets", "accelerate", "wandb", "triton"]
HEAVY += ["numba", "papermill", "nbdev", "IPython"]
LIGHT_MODULES = ["papers10", "papers10.cli"]
LIGHT_MODULES += [
    f"papers10.core.{name}" for name in ("optional", "settings", "config", "presets", "claims", "results", "data")
]
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("COV_", "PYTEST_"))}


def python(code: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_import_loads_nothing_heavy(module):
    loaded = python(f"import {module}, sys; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_importing_the_package_loads_only_the_standard_library():
    loaded = python(
        "import sys; before = set(sys.modules); import papers10; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'papers10'}))"
    )
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["list"]])
def test_help_and_list_load_no_torch(arguments):
    code = (
        "import sys\n"
        f"sys.argv = ['papers10', *{arguments!r}]\n"
        "from papers10.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert "LOADED []" in python(code).splitlines()[-1]
