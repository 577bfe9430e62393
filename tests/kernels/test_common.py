"""Shapes, backends and the registry."""

import subprocess
import sys

import pytest
import torch

from papers10.kernels import common


def test_kernel_list_needs_no_torch():
    program = "import sys, papers10.kernels.common; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("shape, pattern, message", [
    ((2, 3), "a b c", "expected shape [a b c], got 2 dimensions [2, 3]"),
    ((2, 3), "a 4", "4=4"),
    ((), "a", "got 0 dimensions"),
    ((2,), "* a b", "got 1 dimensions"),
    ((2, 3), "a a", "expected shape [a a] with a=2, got [2, 3]"),
])
def test_wrong_shapes_name_argument_and_sizes(shape, pattern, message):
    with pytest.raises(ValueError) as caught:
        common.check_shape("argument", torch.zeros(shape), pattern)
    assert str(caught.value).startswith("argument: expected") and message in str(caught.value)


def test_bound_letters_are_returned_and_the_argument_is_not_changed():
    before = {"a": 2}
    assert common.check_shape("x", torch.zeros(2, 5), "a b", before) == {"a": 2, "b": 5}
    assert before == {"a": 2}


def test_missing_numba_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(common._FOUND, "numba", False)
    x = torch.zeros(1)
    assert common.resolve_backend("auto", x, ("torch", "numba")) == "torch"
    with pytest.raises(common.BackendUnavailable, match=r"pip install 'papers10\[fast\]'"):
        common.resolve_backend("numba", x, ("torch", "numba"))


def test_cuda_tensor_gets_triton_and_refuses_numba(monkeypatch):
    class OnCard:
        is_cuda, device = True, "cuda:0"

    monkeypatch.setitem(common._FOUND, "triton", True)
    monkeypatch.setitem(common._FOUND, "numba", True)
    offered = ("reference", "torch", "numba", "triton")
    assert common.resolve_backend("auto", OnCard, offered) == "triton"
    assert common.resolve_backend("auto", OnCard, offered, auto_skips=("triton",)) == "torch"
    with pytest.raises(common.BackendUnavailable, match="on the processor"):
        common.resolve_backend("numba", OnCard, offered)


def test_unknown_backend_names_the_nearest():
    with pytest.raises(ValueError, match="nearest: 'torch'"):
        common.resolve_backend("tourch", torch.zeros(1), ("torch",))


def test_every_kernel_module_registers_what_the_registry_promises():
    for name, spec in common.load_all().items():
        assert spec.name == name and spec.ops and set(spec.ops) <= set(spec.references)
        assert set(spec.backends) <= set(common.BACKENDS)
