"""Interpolated noise and noise that belongs to places: known values, edge cases, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.flow.noise import NoiseField, check_coords, lerp, slerp

HALF = math.sqrt(0.5)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    "a, norm, expected",
    [
        (vector(1, 0), "mix", [0.70710678, 0.70710678]),
        (vector(2, 0), "mix", [1.41421356, 0.70710678]),
        (vector(2, 0), "interp", [1.06066017, 1.06066017]),
    ],
)
def test_known_values(a, norm, expected):
    # 8 digits are given
    torch.testing.assert_close(slerp(a, vector(0, 1), 0.5, norm=norm), vector(*expected), atol=1e-8, rtol=0)


@pytest.mark.parametrize("norm", ["mix", "interp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ends_keep_their_bits(norm, dtype):
    a, b = normal(3, 5, dtype=dtype), normal(3, 5, seed=1, dtype=dtype)
    assert torch.equal(slerp(a, b, 0, norm=norm, dims=-1), a) and torch.equal(slerp(a, b, 1.0, norm=norm, dims=-1), b)
    assert torch.equal(lerp(a, b, 0), a) and torch.equal(lerp(a, b, 1), b)
    assert slerp(a, b, 0.3, norm=norm).dtype == dtype and lerp(a, b, 0.3).dtype == dtype


def test_an_end_is_a_copy():
    a, b = normal(4), normal(4, seed=1)
    slerp(a, b, 0).add_(1)
    lerp(a, b, 0).add_(1)
    assert torch.equal(a, normal(4))


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0.01, 0.99), seed=st.integers(0, 99), dims=st.sampled_from([None, -1, (1, 2), (0, 2)]))
def test_formula_with_one_angle_for_each_vector(alpha, seed, dims):
    a, b = normal(2, 3, 6, seed=seed), normal(2, 3, 6, seed=seed + 100)
    axes = {None: (0, 1, 2), -1: (2,)}.get(dims, dims)
    dot = (a * b).sum(axes, keepdim=True) / a.square().sum(axes, keepdim=True).sqrt() / b.square().sum(axes, keepdim=True).sqrt()
    theta = dot.acos()
    expected = ((1 - alpha) * theta).sin() / theta.sin() * a + (alpha * theta).sin() / theta.sin() * b
    torch.testing.assert_close(slerp(a, b, alpha, dims=dims), expected, atol=1e-10, rtol=1e-10)


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 99))
def test_mixed_lengths_are_exact(alpha, seed):
    a, b = normal(4, 8, seed=seed), 3 * normal(4, 8, seed=seed + 100)
    length = slerp(a, b, alpha, dims=-1, norm="interp").norm(dim=-1)
    torch.testing.assert_close(length, (1 - alpha) * a.norm(dim=-1) + alpha * b.norm(dim=-1))


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 99), norm=st.sampled_from(["mix", "interp"]))
def test_the_way_back_is_the_same_way(alpha, seed, norm):
    a, b = normal(7, seed=seed), normal(7, seed=seed + 100)
    torch.testing.assert_close(slerp(a, b, alpha, norm=norm), slerp(b, a, 1 - alpha, norm=norm), atol=1e-12, rtol=1e-12)


def official_slerp(start, end, alpha):
    """The published helper as the specification tells it: unit directions, lengths mixed, |dot| > 0.9999 mixes straight. alpha is the weight of `start`."""
    share = 1 - alpha
    first, second = start.norm(dim=-1, keepdim=True), end.norm(dim=-1, keepdim=True)
    u, w = start / first, end / second
    dot = (u * w).sum(-1, keepdim=True)
    theta = dot.clamp(-1, 1).acos()
    turned = (((1 - share) * theta).sin() * u + (share * theta).sin() * w) / theta.sin()
    mixed = (1 - share) * u + share * w
    direction = torch.where(dot.abs() > 0.9999, mixed / mixed.norm(dim=-1, keepdim=True), turned)
    return direction * ((1 - share) * first + share * second)


def test_parity_with_the_official_helper():
    a, b = normal(40, 8), normal(40, 8, seed=1)
    b[:4] = a[:4] * 1.7 + 1e-4 * b[:4]
    for alpha in (0.2, 0.5, 0.9):
        torch.testing.assert_close(slerp(a, b, alpha, dims=-1, norm="interp"), official_slerp(a, b, 1 - alpha), atol=1e-12, rtol=1e-12)


def test_nearly_parallel_is_the_straight_mix():
    a = normal(6)
    for b in (a, 2 * a, a + 1e-9 * normal(6, seed=1)):
        assert torch.equal(slerp(a, b, 0.3), lerp(a, b, 0.3))
    # just above the threshold the two agree to the curvature of the arc, about angle² / 8
    b = a + 1e-5 * normal(6, seed=1)
    torch.testing.assert_close(slerp(a, b, 0.5), lerp(a, b, 0.5), atol=1e-9, rtol=0)


def test_small_angles_keep_their_digits():
    angle = 3e-6
    a, b = vector(1, 0), vector(math.cos(angle), math.sin(angle))
    expected = vector(math.cos(angle / 3), math.sin(angle / 3))
    assert (slerp(a, b, 1 / 3) - expected).abs().max() < 1e-15


@pytest.mark.parametrize("norm", ["mix", "interp"])
def test_opposite_directions(norm):
    a = normal(5)
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -a, 0.5, norm=norm)
    out = slerp(a, -2 * a, 0.25, norm=norm, antipodal="lerp")
    expected = (0.75 - 0.5) * a if norm == "mix" else 1.25 * a
    torch.testing.assert_close(out, expected)
    assert torch.isfinite(slerp(a, -a, 0.5, norm=norm, antipodal="lerp")).all()
    assert torch.equal(slerp(a, -a, 1, norm=norm), -a)


def test_only_the_opposite_rows_are_mixed_straight():
    a, b = normal(3, 5), normal(3, 5, seed=1)
    b[1] = -a[1]
    out = slerp(a, b, 0.4, dims=-1, antipodal="lerp")
    for row in (0, 2):
        torch.testing.assert_close(out[row], slerp(a[row], b[row], 0.4))
    torch.testing.assert_close(out[1], lerp(a[1], b[1], 0.4))


@pytest.mark.parametrize("norm", ["mix", "interp"])
def test_gradient(norm):
    a, b = normal(2, 3).requires_grad_(), normal(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: slerp(x, y, 0.3, dims=-1, norm=norm), (a, b))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(alpha=1.5), "alpha"),
        (dict(alpha=float("nan")), "alpha"),
        (dict(b=torch.ones(3, dtype=torch.float64)), "shape of a"),
        (dict(b=torch.ones(2)), "dtype"),
        (dict(b=torch.zeros(2, dtype=torch.float64)), "length 0"),
        (dict(a=vector(math.nan, 1)), "a: expected finite"),
        (dict(norm="official"), "norm"),
        (dict(antipodal="skip"), "antipodal"),
        (dict(dims=3), "dims"),
        (dict(dims=(0, -1)), "dims"),
        (dict(dims=()), "dims"),
    ],
)
def test_refusals(arguments, message):
    given_ = dict(a=vector(1, 0), b=vector(0, 1), alpha=0.5) | arguments
    with pytest.raises(ValueError, match=message):
        slerp(given_.pop("a"), given_.pop("b"), given_.pop("alpha"), **given_)


def test_whole_numbers_are_no_noise():
    for way in (slerp, lerp):
        with pytest.raises(TypeError, match="floating"):
            way(torch.tensor([1, 0]), torch.tensor([0, 1]), 0.5)


def test_field_gives_a_place_its_noise_whatever_the_list():
    field = NoiseField(6, 3, seed=5)
    coords = torch.tensor([[0, 1, 2, 3], [0, 5, 5, 5], [1, 1, 2, 3]], dtype=torch.int32)
    noise = field(coords)
    assert noise.shape == (3, 3) and torch.equal(noise[0], noise[2]) and torch.equal(noise[1], field.values[5, 5, 5])
    order = torch.tensor([2, 0, 1])
    assert torch.equal(field(coords[order]), noise[order]) and torch.equal(field(coords[:, 1:]), noise)
    assert field(coords[:0]).shape == (0, 3)


def test_field_has_the_same_values_in_every_dtype_and_again():
    field = NoiseField(5, 2, seed=1)
    assert torch.equal(NoiseField(5, 2, seed=1).values, field.values)
    assert torch.equal(NoiseField(5, 2, seed=1, dtype=torch.float64).values, field.values.double())
    assert torch.equal(NoiseField(5, 2, seed=1, dtype=torch.float16).values, field.values.half())
    assert not torch.equal(NoiseField(5, 2, seed=2).values, field.values)


def test_field_is_standard_normal():
    scipy_stats = pytest.importorskip("scipy.stats")
    values = NoiseField(16, 4, seed=0).values.numpy()
    assert scipy_stats.kstest(values.ravel(), "norm").pvalue > 1e-3
    # neighbours along x: correlation of independent numbers has standard deviation 1/√n
    assert abs(np.corrcoef(values[1:].ravel(), values[:-1].ravel())[0, 1]) < 4 / math.sqrt(values[1:].size)


@pytest.mark.parametrize(
    "coords, unique, error, message",
    [
        (torch.tensor([[0, 0, 0, 4]]), False, ValueError, r"\[0, 4\)"),
        (torch.tensor([[0, 0, -1, 0]]), False, ValueError, "row 0"),
        (torch.tensor([[-1, 0, 0, 0]]), False, ValueError, "batch"),
        (torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1]]), True, ValueError, "each voxel once"),
        (torch.tensor([[0, 1]]), False, ValueError, "shape"),
        (torch.tensor([0, 1, 1, 1]), False, ValueError, "shape"),
        (torch.tensor([[0.0, 1, 1, 1]]), False, TypeError, "integer"),
        ([[0, 1, 1, 1]], False, TypeError, "integer"),
    ],
)
def test_field_refuses(coords, unique, error, message):
    with pytest.raises(error, match=message):
        NoiseField(4, 2, seed=0)(coords, unique=unique)


def test_the_same_voxel_in_two_samples_is_no_duplicate():
    coords = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert check_coords("coords", coords, 4, unique=True) is coords


@pytest.mark.parametrize("arguments, error", [((0, 2, 0), ValueError), ((4, 0, 0), ValueError), ((4.0, 2, 0), TypeError), ((4, 2, -1), ValueError), ((2048, 1, 0), ValueError)])
def test_field_refuses_to_be_made(arguments, error):
    with pytest.raises(error):
        NoiseField(*arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_field_has_the_same_bits_on_a_gpu():
    coords = torch.tensor([[0, 1, 2, 3], [0, 3, 2, 1]])
    assert torch.equal(NoiseField(4, 2, seed=0, device="cuda")(coords).cpu(), NoiseField(4, 2, seed=0)(coords))
