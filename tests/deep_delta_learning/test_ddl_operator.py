import ddl_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.deep_delta_learning.operator import (
    apply_inverse,
    apply_operator,
    delta_operator,
    delta_spectrum,
    delta_update,
    rotation_from_reflections,
    unit_direction,
)

EXACT = dict(atol=1e-12, rtol=1e-12)  # float64, sizes of order one


def case(seed, d, n, batch=3):
    draw = torch.Generator().manual_seed(seed)
    shape = (batch, d) if n is None else (batch, d, n)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    k = torch.randn(batch, d, generator=draw, dtype=torch.float64) + 0.1
    v = torch.randn((batch,) if n is None else (batch, n), generator=draw, dtype=torch.float64)
    beta = torch.rand(batch, generator=draw, dtype=torch.float64) * 2
    return x, k, v, beta


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 9), n=st.sampled_from([None, 1, 3, 4]))
def test_update_has_the_properties_of_the_paper(seed, d, n):
    x, k, v, beta = case(seed, d, n)
    unit = unit_direction(k, 0.0)
    new = delta_update(x, k, v, beta, eps=0.0)

    def reading(state):
        return (unit * state).sum(-1) if n is None else torch.einsum("bd,bdn->bn", unit, state)

    wide = (lambda t: t) if n is None else (lambda t: t[..., None])
    torch.testing.assert_close(reading(new) - v, (1 - wide(beta)) * (reading(x) - v), **EXACT)
    projector = torch.eye(d, dtype=torch.float64) - unit[:, :, None] * unit[:, None, :]
    flat = new.reshape(3, d, -1), x.reshape(3, d, -1)
    torch.testing.assert_close(projector @ flat[0], projector @ flat[1], **EXACT)
    affine = delta_operator(k, beta) @ flat[1] + beta[:, None, None] * unit[:, :, None] * v.reshape(3, 1, -1)
    torch.testing.assert_close(flat[0], affine, **EXACT)
    for index in range(3):
        expected = ddl_oracle.delta(flat[1][index], k[index], v.reshape(3, -1)[index], beta[index], 0.0)
        torch.testing.assert_close(flat[0][index], expected, **EXACT)


def test_gate_zero_is_the_identity_one_overwrites_two_is_an_involution():
    x, k, v, _ = case(0, 6, 3)
    assert torch.equal(delta_update(x, k, v, torch.zeros(3, dtype=torch.float64)), x)
    ones = torch.ones(3, dtype=torch.float64)
    overwritten = delta_update(x, k, v, ones, eps=0.0)
    torch.testing.assert_close(torch.einsum("bd,bdn->bn", unit_direction(k, 0.0), overwritten), v, **EXACT)
    twice = delta_update(delta_update(x, k, 0 * v, 2 * ones, eps=0.0), k, 0 * v, 2 * ones, eps=0.0)
    torch.testing.assert_close(twice, x, **EXACT)


def test_columns_are_independent_and_rows_permute():
    x, k, v, beta = case(1, 5, 4)
    new = delta_update(x, k, v, beta, eps=0.0)
    for column in range(4):
        torch.testing.assert_close(
            new[..., column],
            delta_update(x[..., column].contiguous(), k, v[:, column].contiguous(), beta, eps=0.0),
            **EXACT,
        )
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(delta_update(x[:, order], k[:, order], v, beta, eps=0.0), new[:, order], **EXACT)


def test_scale_of_the_direction_does_not_matter_and_its_sign_moves_to_the_target():
    x, k, v, beta = case(2, 5, 2)
    new = delta_update(x, k, v, beta, eps=0.0)
    torch.testing.assert_close(delta_update(x, 37.5 * k, v, beta, eps=0.0), new, **EXACT)
    torch.testing.assert_close(delta_update(x, -k, -v, beta, eps=0.0), new, **EXACT)


def test_hand_values_of_the_specification():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    k, v = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([5.0, -1.0], dtype=torch.float64)
    for beta, expected in (
        (0.5, [[1.6, 0.38], [3.8, 1.84]]),
        (1.0, [[2.2, -1.24], [4.6, -0.32]]),
        (2.0, [[3.4, -4.48], [6.2, -4.64]]),
    ):
        torch.testing.assert_close(
            delta_update(x, k, v, torch.tensor(beta, dtype=torch.float64), eps=0.0),
            torch.tensor(expected, dtype=torch.float64),
            **EXACT,
        )
    operator = delta_operator(k, 1.5)
    torch.testing.assert_close(operator, torch.tensor([[0.46, -0.72], [-0.72, 0.04]], dtype=torch.float64), **EXACT)
    torch.testing.assert_close(torch.linalg.eigvalsh(operator), torch.tensor([-0.5, 1.0], dtype=torch.float64), **EXACT)
    assert abs(float(torch.linalg.det(operator)) + 0.5) < 1e-12


def test_gradient_by_hand():
    x = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64, requires_grad=True)
    k = torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    new = delta_update(x, k, v, beta, eps=0.0)
    torch.testing.assert_close(new, torch.tensor([1.0, 1.28, 1.04], dtype=torch.float64), **EXACT)
    new.sum().backward()
    for tensor, expected in ((x, [1.0, -0.26, -0.68]), (k, [-0.66, -0.1728, 0.1296]), (v, 2.1), (beta, -1.12)):
        torch.testing.assert_close(tensor.grad, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_guard_is_the_papers_and_not_that_of_the_fused_kernel():
    k = torch.tensor([1e-5, 0, 0, 0], dtype=torch.float64)
    assert abs(float(unit_direction(k, 1e-5).norm()) - 0.5**0.5) < 1e-12
    x = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    moved = delta_update(x, k, torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64), eps=1e-5)
    assert abs(float(moved[0]) - 0.5) < 1e-9  # 1 - kappa^2 with kappa^2 = 1/2; the fused kernel's guard would give 0.8


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 7), beta=st.floats(0, 2), length=st.floats(0.1, 1.0))
def test_spectrum_agrees_with_linear_algebra(seed, d, beta, length):
    unit = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    k = unit / unit.norm() * length
    matrix = torch.eye(d, dtype=torch.float64) - beta * k[:, None] * k
    closed = delta_spectrum(k, beta, n=2)
    values = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(values.min(), torch.minimum(closed["eigenvalue"], values.max()), atol=1e-10, rtol=0)
    torch.testing.assert_close(closed["det"], torch.linalg.det(matrix) ** 2, atol=1e-10, rtol=0)
    torch.testing.assert_close(closed["spectral_norm"], torch.linalg.matrix_norm(matrix, 2), atol=1e-10, rtol=0)
    error = torch.linalg.matrix_norm(matrix.T @ matrix - torch.eye(d, dtype=torch.float64), 2)
    torch.testing.assert_close(closed["orthogonality_error"], error, atol=1e-10, rtol=0)


def test_orthogonal_only_at_both_ends_idempotent_only_at_zero_and_one():
    k = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for beta in (0.0, 0.4, 1.0, 1.6, 2.0):
        matrix = delta_operator(k, beta)
        assert torch.allclose(matrix.T @ matrix, torch.eye(4, dtype=torch.float64), atol=1e-12) == (beta in (0.0, 2.0))
        assert torch.allclose(matrix @ matrix, matrix, atol=1e-12) == (beta in (0.0, 1.0))


def test_inverse_and_rotation():
    x, k, _, _ = case(4, 6, 3)
    for beta in (0.3, 0.9, 1.4, 2.0):
        torch.testing.assert_close(apply_inverse(apply_operator(x, k, beta), k, beta), x, atol=1e-10, rtol=0)
    for angle in (0.4, 2.0, -1.1):
        first, second = rotation_from_reflections(angle)
        turn = delta_operator(second, 2.0) @ delta_operator(first, 2.0)
        cosine, sine = (
            torch.cos(torch.tensor(angle, dtype=torch.float64)),
            torch.sin(torch.tensor(angle, dtype=torch.float64)),
        )
        torch.testing.assert_close(
            turn, torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])]), **EXACT
        )


def mutant_product(x, k, v, beta, eps):
    unit = k / (k.square().sum(-1, keepdim=True) + eps**2).sqrt()
    return x * (beta[..., None] * (v - (unit * x).sum(-1))[..., None] * unit)


def mutant_taxicab(x, k, v, beta, eps):
    unit = k / k.abs().sum(-1, keepdim=True)
    return x + beta[..., None] * (v - (unit * x).sum(-1))[..., None] * unit


@pytest.mark.parametrize("mutant", [mutant_product, mutant_taxicab])
def test_known_misreadings_of_the_rule_are_told_apart(mutant):
    x, k, v, beta = case(5, 6, None)
    assert not torch.allclose(mutant(x, k, v, beta, 0.0), delta_update(x, k, v, beta, eps=0.0), atol=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: unit_direction(torch.ones(3, dtype=torch.int64)), TypeError, "k: expected a floating tensor"),
        (lambda: unit_direction(torch.ones(3), eps=-1.0), ValueError, "eps"),
        (
            lambda: delta_operator(torch.ones(2, 3), torch.ones(3)),
            ValueError,
            r"beta: expected a number or shape \[2\]",
        ),
        (lambda: delta_spectrum(torch.ones(3), 1.0, n=0), ValueError, "n: expected at least 1"),
        (lambda: apply_operator(torch.ones(2, 4), torch.ones(2, 3), 1.0), ValueError, r"\[2, 3\].*\[2, 4\]"),
        (
            lambda: apply_operator(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3), 1.0),
            TypeError,
            "x: expected a floating",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exact_overwrite_has_no_inverse(dtype):
    draw = torch.Generator().manual_seed(5)
    k, x = torch.randn(4, 7, generator=draw, dtype=dtype), torch.randn(4, 7, generator=draw, dtype=dtype)
    with pytest.raises(ValueError, match="beta: .*exact overwrite for 4 of 4 tokens"):
        apply_inverse(x, k, 1.0)
    gates = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=dtype)
    with pytest.raises(ValueError, match="exact overwrite for 1 of 4 tokens"):
        apply_inverse(x, k, gates)
    close = torch.tensor([0.99, 1.01, 0.0, 2.0], dtype=dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(apply_inverse(apply_operator(x, k, close), k, close), x, atol=tolerance, rtol=0)
