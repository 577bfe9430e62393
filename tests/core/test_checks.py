"""core.checks: what is let through, what is refused and how the refusal reads."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papers10.core import checks
from papers10.core.checks import (
    NonFiniteError,
    check_choice,
    check_finite,
    check_probability,
    check_range,
    check_rotation,
    check_same,
    check_shape,
    nearest,
)


@given(st.lists(st.text(min_size=1), min_size=1, unique=True), st.data())
def test_nearest_of_a_choice_is_a_choice(choices, data):
    wanted = data.draw(st.sampled_from(choices))
    found = nearest(wanted, choices)
    assert found in choices and found.lower() == wanted.lower()


def test_nearest_of_nothing_alike():
    assert nearest("steps", ["residual", "lr"]) is None and nearest("x", []) is None


def test_choice():
    assert check_choice("n", 1, [1, 2]) == 1
    with pytest.raises(ValueError, match="n: expected one of 1, 2, got True"):
        check_choice("n", True, [1, 2])
    with pytest.raises(ValueError, match=r"kind: expected one of 'add', 'ddl', got 'dll' \(did you mean 'ddl'\?\)"):
        check_choice("kind", "dll", ["add", "ddl"])


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(-10, 10))
def test_range_agrees_with_comparison(low, value, high):
    if low <= value <= high:
        assert check_range("x", value, low, high) == value
    else:
        with pytest.raises(ValueError, match="x: expected a number in"):
            check_range("x", value, low, high)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_open_range_excludes_ends(value):
    with pytest.raises(ValueError, match=r"p: expected a number in \(0, 1\), got"):
        check_range("p", value, 0, 1, open=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_range_refuses_non_finite(value):
    with pytest.raises(ValueError, match="x: expected a finite number"):
        check_range("x", value)


@pytest.mark.parametrize("value", [True, "1", None, np.bool_(True), [1, 2]])
def test_range_refuses_what_is_no_number(value):
    with pytest.raises(TypeError, match="x: expected a number >= 0, got"):
        check_range("x", value, 0)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_finite_counts_and_points(make):
    values = [[0.0, 1.0], [float("nan"), float("inf")]]
    with pytest.raises(ValueError, match=r"x: expected finite values, got 2 non-finite, first nan at index \(1, 0\)"):
        check_finite("x", make(values))


@pytest.mark.parametrize(
    "value", [torch.tensor([1, 2]), torch.zeros(0), np.zeros((0, 3)), [True], torch.ones(2, dtype=torch.bfloat16)]
)
def test_finite_lets_through(value):
    assert check_finite("x", value) is value


def test_finite_scalar():
    with pytest.raises(ValueError, match=r"at index \(\)"):
        check_finite("x", torch.tensor(float("nan")))


def test_probability():
    share = torch.softmax(torch.randn(4, 7, generator=torch.Generator().manual_seed(0)), -1)
    assert check_probability("p", share, dim=-1) is share
    assert check_probability("p", np.zeros(0)).size == 0
    with pytest.raises(ValueError, match=r"p: expected probabilities in \[0, 1\], got 1.5"):
        check_probability("p", 1.5)
    with pytest.raises(ValueError, match="p: expected sums of 1 along dimension -1, got 0.5"):
        check_probability("p", share * 0.5, dim=-1)


@given(st.floats(-7, 7))
def test_rotations_pass_and_reflections_do_not(angle):
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    assert check_rotation("R", matrix) is matrix
    with pytest.raises(ValueError, match="reflection"):
        check_rotation("R", matrix @ np.diag([1, -1]))
    with pytest.raises(ValueError, match="expected a rotation"):
        check_rotation("R", 1.01 * matrix)


def test_same():
    check_same(torch.zeros(2, 1), None, torch.zeros(2, 3), what="batch")
    with pytest.raises(ValueError, match="gate: expected batch 2 as x, got 3"):
        check_same(torch.zeros(2), torch.zeros(3), what="batch", names=["x", "gate"])
    with pytest.raises(TypeError, match="argument 1: expected dtype torch.float32 as argument 0, got torch.float64"):
        check_same(torch.zeros(1), torch.zeros(1).double(), what="dtype")
    with pytest.raises(ValueError, match="argument 1: expected device cpu"):
        check_same(torch.zeros(1), torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="scalar"):
        check_same(torch.tensor(1.0), what="batch")


def test_shape_is_the_kernels_own():
    from papers10.kernels import common

    assert check_shape is common.check_shape and "check_shape" in checks.__all__


def test_non_finite_error_says_where():
    error = NonFiniteError("write is not finite", layer=0, token=5)
    assert str(error) == "write is not finite (layer 0, token 5)" and isinstance(error, FloatingPointError)
    assert error.frame is None
