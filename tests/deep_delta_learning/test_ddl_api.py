import subprocess
import sys

import pytest


def test_import_loads_no_torch_and_every_name_resolves():
    program = """
import sys
import papers10.deep_delta_learning as chapter
assert "torch" not in sys.modules, "torch was imported"
extra = {"DDLForCausalLM", "DDLHFConfig"}
for name in chapter.__all__:
    if name not in extra:
        getattr(chapter, name)
assert "transformers" not in sys.modules, "transformers was imported"
assert set(chapter.__all__) <= set(dir(chapter))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_unknown_name():
    import papers10.deep_delta_learning as chapter

    with pytest.raises(AttributeError, match="DeltaResidul"):
        getattr(chapter, "DeltaResidul")  # noqa: B009


def test_every_experiment_is_public():
    import papers10.deep_delta_learning as chapter
    from papers10.deep_delta_learning import experiments

    runs = {name for name in experiments.__all__ if name.startswith("run_")}
    assert "run_oscillation" in runs and runs <= set(chapter.__all__)
    assert all(getattr(chapter, name) is getattr(experiments, name) for name in runs)
