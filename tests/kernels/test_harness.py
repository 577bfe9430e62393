"""Every registered kernel goes through the harness: parity, interpreter, ahead-of-time compile."""

import pytest
import torch

from papers10.kernels.common import installed, load_all
from papers10.kernels.harness import aot_report, check_parity, interpreter_report, parity_cases, relative_error

KERNELS = load_all()
COMPARISONS = [(spec, comparison) for spec in KERNELS.values() for comparison in parity_cases(spec)]
needs_triton = pytest.mark.skipif(not installed("triton"), reason="Triton is not installed")
WITH_ENTRIES = [name for name, spec in KERNELS.items() if spec.entries]


@pytest.mark.parametrize("spec, comparison", COMPARISONS, ids=[comparison.label for _, comparison in COMPARISONS])
def test_path_agrees_with_its_reference(spec, comparison):
    check_parity(spec, comparison)


@needs_triton
@pytest.mark.parametrize("name", WITH_ENTRIES)
def test_triton_kernels_in_the_interpreter(name):
    report = interpreter_report(name)
    assert report and [record for record in report if record["problem"]] == []


@needs_triton
@pytest.mark.parametrize("name", WITH_ENTRIES)
def test_triton_kernels_compile_for_sm_80_and_sm_90_without_spills(name):
    report = aot_report(name)
    assert {record["target"] for record in report} == {"sm_80", "sm_90"}
    assert [record for record in report if record["spills"] > record["spills_allowed"]] == []
    assert all(0 < record["registers"] <= 255 for record in report)


@needs_triton
def test_delta_update_is_compiled_at_the_sizes_that_matter():
    labels = {entry.label for entry in KERNELS["delta_update"].entries if entry.spills_allowed == 0}
    for n in (1, 4):
        for dtype in ("float32", "bfloat16"):
            assert f"forward d=1024 n={n} {dtype}" in labels
            assert {f"backward d=1024 n={n} {dtype} save={save}" for save in ("input", "output")} <= labels


def test_nan_in_one_tensor_only_is_a_difference():
    a = torch.zeros(3)
    a[1] = float("nan")
    assert relative_error(a, torch.zeros(3)) == float("inf") and relative_error(a, a.clone()) == 0.0
