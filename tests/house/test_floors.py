"""Who may import whom, read from the imports themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "papers10"
FAMILIES = ["lm", "splat", "flow", "rl", "agents"]
CHAPTERS = sorted(
    path.name
    for path in PACKAGE.iterdir()
    if path.is_dir()
    and path.name not in {"core", "kernels", "__pycache__", *FAMILIES}
    and not path.name.startswith("_")
)
MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if not any(part.startswith(("_data", "_notebooks", "__pycache__")) for part in path.relative_to(PACKAGE).parts)
) + [path for path in sorted((ROOT / "kernels").glob("*.py")) if not (PACKAGE / "kernels" / path.name).exists()]


def floor_of(module: str) -> str:
    """The floor of a dotted name below papers10: kernels, core, a family, a chapter, or the package's own modules."""
    return module.split(".")[1] if "." in module else ""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("papers10", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str, *, is_package: bool) -> list[tuple[str, bool]]:
    """Every papers10 module that `source` imports, and whether it does so when it is itself imported."""
    found = []

    def visit(node: ast.AST, at_import: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                inside = True
            if isinstance(child, ast.Import):
                found.extend((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = module.split(".") if is_package else module.split(".")[:-1]
                    above = above[: len(above) - child.level + 1]
                    base = ".".join([*above, base]).rstrip(".")
                found.append((base, at_import))
                found.extend((f"{base}.{alias.name}", at_import) for alias in child.names if base == "papers10")
            visit(child, at_import and not inside)

    visit(ast.parse(source), True)
    return [(name, lazy) for name, lazy in found if name == "papers10" or name.startswith("papers10.")]


def allowed(floor: str) -> set[str]:
    if floor == "kernels":
        return {"kernels"}
    if floor == "core":
        return {"kernels", "core"}
    if floor in FAMILIES:
        return {"kernels", "core", *FAMILIES[: FAMILIES.index(floor) + 1]}
    if floor in CHAPTERS:
        return {"kernels", "core", *FAMILIES, floor}
    return {"kernels", "core", *FAMILIES, *CHAPTERS, "cli"}


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    floor = floor_of(module)
    problems = []
    for name, at_import in imports_of(source, module, is_package=is_package):
        target = floor_of(name)
        if target == "" or target.startswith("_"):
            continue
        if target not in allowed(floor):
            problems.append(f"{module} ({floor}) imports {name}")
        if floor == "cli" and at_import and target in {*FAMILIES, *CHAPTERS, "kernels"}:
            problems.append(f"{module} imports {name} when it is imported; it must do so inside a command")
    return problems


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_imports_only_from_its_own_floor_and_below(path):
    assert violations(path.read_text(), name_of(path), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("papers10.kernels.x", "from papers10.core.checks import check_range"),
        ("papers10.kernels.x", "def f():\n    import papers10.core.settings"),
        ("papers10.kernels.x", "from ..core import stats"),
        ("papers10.core.x", "from papers10.lm.trunk import CausalLM"),
        ("papers10.core.x", "from papers10 import lm"),
        ("papers10.lm.x", "import papers10.rl.losses"),
        ("papers10.deep_delta_learning.x", "from papers10.cli import main"),
        ("papers10.cli", "from papers10.lm.trunk import CausalLM"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("papers10.kernels.x", "from papers10.kernels.common import register"),
        ("papers10.core.x", "from papers10.kernels.common import check_shape"),
        ("papers10.rl.x", "from papers10.lm.trunk import CausalLM"),
        ("papers10.deep_delta_learning.x", "from papers10.deep_delta_learning.operator import delta_operator"),
        ("papers10.cli", "def run():\n    from papers10.lm.trunk import CausalLM"),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert violations(source, module) == []


def test_chapters_do_not_import_each_other():
    assert allowed("deep_delta_learning") & set(CHAPTERS) == {"deep_delta_learning"}
    assert "deep_delta_learning" in CHAPTERS
