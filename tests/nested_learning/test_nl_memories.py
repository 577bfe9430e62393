import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.checks import NonFiniteError
from papers10.kernels.attention import MaskSpec, attention
from papers10.kernels.gated_delta import gated_delta_reference
from papers10.nested_learning.memories import (
    MODES,
    RULES,
    adagrad_memory,
    adam_memory,
    assoc_update,
    attention_memory,
    chunk_write,
    dgd_step,
    ema_share,
    ema_terms,
    ggd_step,
    repeated_write,
)

EXACT = dict(atol=1e-12, rtol=1e-12)  # float64, sizes of order one


def drawer(seed=0):
    noise = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=noise, dtype=torch.float64)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    o=st.integers(1, 5),
    i=st.integers(1, 6),
    size=st.floats(0.1, 10),
    lr=st.floats(1e-3, 30),
)
def test_dgd_is_the_proximal_solution_for_any_length_of_the_input(seed, o, i, size, lr):
    randn = drawer(seed)
    W, x, slope = randn(o, i), size * randn(i), randn(o)
    left = torch.eye(i, dtype=torch.float64) + lr * x[:, None] * x
    expected = torch.linalg.solve(left, (W - lr * slope[:, None] * x).T).T
    new = dgd_step(W, x, slope, lr)
    # The condition number of the left side, times rounding.
    close = dict(atol=1e-14 * float(torch.linalg.cond(left)) + 1e-12, rtol=1e-10)
    torch.testing.assert_close(new, expected, **close)
    stationary = (new @ x + slope)[:, None] * x + (new - W) / lr
    assert float(stationary.abs().max()) < 1e-9 * (1 + size**2) * (1 + 1 / lr)
    for mode in MODES:
        torch.testing.assert_close(dgd_step(W, x[None], slope[None], lr, mode), expected, **close)


def test_dgd_by_hand():
    W, x = torch.zeros(1, 2, dtype=torch.float64), vector(1, 0)
    for expected in (1.0, 1.5, 1.75):
        W = dgd_step(W, x, vector(-2), 1.0)
        torch.testing.assert_close(W, vector(expected, 0)[None], **EXACT)
    for _ in range(60):
        W = dgd_step(W, x, vector(-2), 1.0)
    torch.testing.assert_close(W, vector(2, 0)[None], **EXACT)
    quarter = dgd_step(torch.zeros(1, 3, dtype=torch.float64), vector(1, 1, 1), vector(-1), 1.0)
    torch.testing.assert_close(quarter, vector(0.25, 0.25, 0.25)[None], **EXACT)


def test_dgd_batch_modes():
    randn = drawer(1)
    W, x, slope, lr = randn(3, 4), randn(6, 4), randn(6, 3), 0.7
    one_by_one = W
    for sample, gradient in zip(x, slope):
        one_by_one = dgd_step(one_by_one, sample, gradient, lr)
    torch.testing.assert_close(dgd_step(W, x, slope, lr, "sequential"), one_by_one, **EXACT)
    rate = lr / (1 + lr * x.square().sum(1).mean())
    eye = torch.eye(4, dtype=torch.float64)
    expected = W @ (eye - rate * x.T @ x / 6) - rate * slope.T @ x / 6
    torch.testing.assert_close(dgd_step(W, x, slope, lr, "mean"), expected, **EXACT)
    expected = torch.linalg.solve(eye + lr / 6 * x.T @ x, (W - lr / 6 * slope.T @ x).T).T
    torch.testing.assert_close(dgd_step(W, x, slope, lr, "exact"), expected, **EXACT)
    for mode in MODES:
        assert torch.equal(dgd_step(W, x[:0], slope[:0], lr, mode), W) and torch.equal(
            dgd_step(W, x, slope, 0.0, mode), W
        )
        leaves = [part.clone().requires_grad_() for part in (W, x, slope)]
        assert torch.autograd.gradcheck(lambda a, b, c, mode=mode: dgd_step(a, b, c, lr, mode), leaves)


def test_dgd_agrees_with_the_step_of_the_optimizer():
    optimizers = pytest.importorskip("papers10.nested_learning.optimizers")
    randn = drawer(2)
    W, x, slope = randn(3, 4), randn(5, 4), randn(5, 3)
    for mode in MODES:
        step = optimizers.delta_step(W[None], x[None], (slope.T @ x / 5)[None], 0.3, mode, output_gradient=slope[None])
        torch.testing.assert_close(step[0], dgd_step(W, x, slope, 0.3, mode), **EXACT)


def test_dgd_on_the_dot_objective_is_the_delta_rule_and_on_squared_loss_keeps_half():
    randn = drawer(3)
    W, x, v = randn(3, 4), randn(4), randn(3)
    eta = 0.5 / (1 + 0.5 * float(x @ x))
    torch.testing.assert_close(dgd_step(W, x, -v, 0.5), assoc_update(W, x, v, eta, rule="delta"), **EXACT)
    for _ in range(100):
        W = dgd_step(W, x, W @ x - v, 0.5)
    torch.testing.assert_close(W @ x, v / 2, **EXACT)


OBJECTIVES = {
    "hebbian": lambda M, k, v: -(M @ k) @ v,
    "delta": lambda M, k, v: 0.5 * (M @ k - v).square().sum(),
    "oja": lambda M, k, v: -(M @ k) @ v + 0.5 * (M.T @ v).square().sum(),
    "lp": lambda M, k, v: (M @ k - v).abs().pow(2.5).sum() / 2.5,
}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rule=st.sampled_from(sorted(OBJECTIVES)), V=st.integers(1, 4), K=st.integers(1, 5))
def test_each_rule_is_a_gradient_step_on_its_objective(seed, rule, V, K):
    randn = drawer(seed)
    M, k, v = randn(V, K).requires_grad_(), randn(K), randn(V)
    (gradient,) = torch.autograd.grad(OBJECTIVES[rule](M, k, v), M)
    torch.testing.assert_close(assoc_update(M, k, v, 0.3, 0.8, rule, p=2.5), 0.8 * M - 0.3 * gradient, **EXACT)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), window=st.one_of(st.none(), st.integers(1, 8)))
def test_omega_sums_the_gradients_of_its_window(seed, n, window):
    randn = drawer(seed)
    M, k, v, weights = randn(3, 4).requires_grad_(), randn(n, 4), randn(n, 3), randn(n).abs()
    last = slice(0 if window is None else max(0, n - window), n)
    losses = 0.5 * (k @ M.T - v).square().sum(1)
    (gradient,) = torch.autograd.grad((weights * losses)[last].sum(), M, retain_graph=True)
    torch.testing.assert_close(assoc_update(M, k, v, weights, 0.9, "omega", window), 0.9 * M - gradient, **EXACT)
    (gradient,) = torch.autograd.grad(losses[last].sum(), M)
    torch.testing.assert_close(assoc_update(M, k, v, 0.2, 0.9, "omega", window), 0.9 * M - 0.2 * gradient, **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_memories_of_a_batch_are_independent_and_steps_may_differ(rule):
    randn = drawer(4)
    M, eta, alpha = randn(2, 3, 4, 5), randn(2, 3).abs(), randn(2, 3).abs()
    pairs = (6,) if rule == "omega" else ()
    k, v = randn(2, 3, *pairs, 5), randn(2, 3, *pairs, 4)
    whole = assoc_update(M, k, v, eta, alpha, rule)
    for b in range(2):
        for h in range(3):
            one = assoc_update(M[b, h], k[b, h], v[b, h], float(eta[b, h]), float(alpha[b, h]), rule)
            torch.testing.assert_close(whole[b, h], one, **EXACT)


def test_p_one_and_two():
    randn = drawer(5)
    M, k, v = randn(3, 4), randn(4), randn(3)
    torch.testing.assert_close(assoc_update(M, k, v, 0.2, rule="lp"), assoc_update(M, k, v, 0.2, rule="delta"), **EXACT)
    signs = (M @ k - v).sign()
    torch.testing.assert_close(assoc_update(M, k, v, 0.2, rule="lp", p=1), M - 0.2 * signs[:, None] * k, **EXACT)


def test_orthonormal_keys_are_recalled_and_a_second_value_replaces_the_first():
    randn = drawer(6)
    keys, values, new = torch.linalg.qr(randn(5, 5)).Q, randn(5, 3), randn(3)
    M = H = torch.zeros(3, 5, dtype=torch.float64)
    for k, v in zip(keys, values):
        M, H = assoc_update(M, k, v, rule="delta"), assoc_update(H, k, v)
    torch.testing.assert_close(M @ keys.T, values.T, **EXACT)
    torch.testing.assert_close(assoc_update(M, keys[2], new, rule="delta") @ keys[2], new, **EXACT)
    torch.testing.assert_close(assoc_update(M, keys[2], new, rule="delta") @ keys[3], values[3], **EXACT)
    torch.testing.assert_close(assoc_update(H, keys[2], new) @ keys[2], values[2] + new, **EXACT)


def test_attention_memory_is_attention():
    randn = drawer(7)
    q, k, v = randn(2, 3, 4, 5), randn(2, 3, 7, 5), randn(2, 3, 7, 6)
    torch.testing.assert_close(attention_memory(q, k, v), attention(q, k, v), **EXACT)
    torch.testing.assert_close(attention_memory(q, k, v, scale=2.0), attention(q, k, v, scale=2.0), **EXACT)
    for window in (1, 3, 9):
        expected = attention(q, k, v, mask=MaskSpec("causal", window=window), q_start=3)
        torch.testing.assert_close(attention_memory(q, k, v, window=window), expected, **EXACT)
    torch.testing.assert_close(attention_memory(1e6 * q, k, v).isfinite().all(), torch.tensor(True))
    mean, weights = attention_memory(q, k, v)[0, 0, 0], (q[0, 0, 0] @ k[0, 0].T / 5**0.5).exp()
    assert float((weights[:, None] * (mean - v[0, 0])).sum(0).abs().max()) < 1e-12  # the derivative vanishes


def test_generalised_gradient_descent_has_its_special_cases():
    randn = drawer(8)
    W, x, y, lr = randn(3, 4), randn(5, 4), randn(5, 3), 0.4

    def error(weights, inputs):
        return y - inputs @ weights.T

    torch.testing.assert_close(ggd_step(W, x, error, lr), W + lr / 5 * error(W, x).T @ x, **EXACT)
    torch.testing.assert_close(ggd_step(W, x, error, lr, "l2"), dgd_step(W, x, -error(W, x), lr, "exact"), **EXACT)
    one = ggd_step(W, x[0], lambda w, v: y[0], lr)
    torch.testing.assert_close(one, W + lr * y[0][:, None] * x[0], **EXACT)

    def near(new, past):
        return (new - past[-1]).square().sum() / (2 * lr)

    close = dict(atol=1e-7, rtol=1e-7)  # what the solver reaches
    for inner in ("dot", "l2"):
        torch.testing.assert_close(ggd_step(W, x, error, lr, inner, near), ggd_step(W, x, error, lr, inner), **close)
    numeric = ggd_step(W, x, error, lr, lambda new, inputs, u: 0.5 * (inputs @ new.T - u).square().sum(1).mean())
    torch.testing.assert_close(numeric, ggd_step(W, x, error, lr, "l2"), **close)
    old = randn(3, 4)
    mixed = ggd_step(W, x, error, lr, "dot", lambda new, past: sum(near(new, (p,)) for p in past), history=[old])
    torch.testing.assert_close(mixed, (W + old) / 2 + lr / 10 * error(W, x).T @ x, **close)
    with pytest.raises(NonFiniteError, match="no finite minimum"):
        ggd_step(W, x, error, lr, "dot", lambda new, past: 0 * new.sum())


def test_momentum_and_adam_of_torch_are_memories():
    randn = drawer(9)
    grads, parameter, lr = randn(7, 4), torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)), 0.01
    optimizer = torch.optim.Adam([parameter], lr=lr, betas=(0.8, 0.95), eps=0.0)
    for step, gradient in enumerate(grads, 1):
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
        scale = (1 - 0.95**step) ** 0.5 / (1 - 0.8**step)
        memory = adam_memory(grads[:step], betas=(0.8, 0.95))
        torch.testing.assert_close(parameter.detach() - before, -lr * scale * memory, **EXACT)
    torch.testing.assert_close(adam_memory(grads, "sq"), grads.sum(0), **EXACT)


def test_adam_memory_by_hand_and_as_the_minimiser():
    pair = vector(3, 4)
    for P, lam, expected in (("var", 0, 1.4), ("sq", 0, 7), (vector(5)[0], 25, 0.7)):
        assert abs(float(adam_memory(pair, P, lam)) - expected) < 1e-12
    grads = drawer(10)(6, 3, 2)
    for P, lam in (("var", 0.0), ("sq", 0.3), (torch.ones(3, 2, dtype=torch.float64), 2.0)):
        m = adam_memory(grads, P, lam)
        target = {"var": grads.square().sum(0).sqrt(), "sq": grads.square().sum(0)}[P] if isinstance(P, str) else P
        assert float(((m * grads - target) * grads).sum(0).add(lam * m).abs().max()) < 1e-10
    assert torch.equal(adam_memory(torch.zeros(3, 2)), torch.zeros(2))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 7), d=st.integers(1, 6))
def test_adagrad_memory_is_the_inverse_root_on_the_range_of_the_gradients(seed, n, d):
    grads = drawer(seed)(n, d)
    values, vectors = torch.linalg.eigh(grads.T @ grads)
    kept = values > 1e-12 * values.max()
    root = vectors[:, kept] * values[kept] ** -0.5 @ vectors[:, kept].T
    # An eigenvalue lambda is known to 1e-16 of the largest, its inverse root to half of that relative error.
    error = 1e-14 * float(values.max() / values[kept].min())
    torch.testing.assert_close(adagrad_memory(grads), root @ grads.sum(0), atol=1e-9 + error * 10, rtol=1e-9 + error)


def test_adagrad_memory_special_cases():
    grads = drawer(11)(5, 2, 3)
    torch.testing.assert_close(adagrad_memory(grads).reshape(-1), adagrad_memory(grads.reshape(5, -1)), **EXACT)
    torch.testing.assert_close(adagrad_memory(grads[:, 0, :1]), adam_memory(grads[:, 0, :1]), **EXACT)
    assert torch.equal(adagrad_memory(torch.zeros(3, 2)), torch.zeros(2))
    same = vector(3, 4).expand(4, 2)
    torch.testing.assert_close(adagrad_memory(same), vector(3, 4) * 4 / (5 * 2), **EXACT)  # one direction, four times


def test_shares_of_an_exponential_average():
    assert ema_share(0.9, 7) >= 0.5 > ema_share(0.9, 6) and ema_share(0.9, 44) >= 0.99 > ema_share(0.9, 43)
    assert abs(ema_share(0.9, 7) - 0.5217) < 1e-4 and abs(ema_share(0.9, 43) - 0.98923) < 1e-5
    assert (ema_terms(0.9, 0.5), ema_terms(0.9, 0.99)) == (7, 44)  # the paper prints the indices, 6 and 43
    assert (ema_terms(0.5, 0.5), ema_terms(0.5, 0.75), ema_terms(0.0, 0.9), ema_terms(0.9, 0.0)) == (1, 2, 1, 0)
    weights = [0.1 * 0.9**i for i in range(7)]
    assert abs(sum(weights) - ema_share(0.9, 7)) < 1e-12


@settings(max_examples=60, deadline=None)
@given(beta=st.floats(0.01, 0.999), share=st.floats(0.001, 0.9999))
def test_the_number_of_terms_is_the_smallest(beta, share):
    terms = ema_terms(beta, share)
    assert ema_share(beta, terms) >= share > ema_share(beta, terms - 1)


def recurrence(eta, C, chunks, objective, dgd, alpha, start):
    full = torch.full((1, C * chunks, 1), eta, dtype=torch.float64)
    key = torch.ones(1, C * chunks, 1, 1, dtype=torch.float64)
    out, _ = gated_delta_reference(
        key,
        key,
        full[..., None],
        full if dgd else None,
        torch.full_like(full, math.log(alpha)),
        torch.full((1, 1, 1, 1), start, dtype=torch.float64),
        chunk_erase=full if objective == "l2" else None,
        read="post",
        chunk_size=C,
    )
    return [start, *out[0, C - 1 :: C, 0, 0].tolist()]


@settings(max_examples=60, deadline=None)
@given(
    eta=st.floats(0, 2),
    C=st.integers(1, 9),
    objective=st.sampled_from(["l2", "dot"]),
    dgd=st.booleans(),
    alpha=st.floats(0.5, 1),
    start=st.floats(-2, 2),
)
def test_closed_form_of_a_chunk_is_the_recurrence(eta, C, objective, dgd, alpha, start):
    got = torch.tensor(recurrence(eta, C, 3, objective, dgd, alpha, start), dtype=torch.float64)
    formula = torch.tensor(repeated_write(eta, C, 3, objective, dgd, alpha, start), dtype=torch.float64)
    torch.testing.assert_close(got, formula, atol=1e-9, rtol=1e-9)


def test_fixed_points_and_stability():
    for eta, C in ((0.1, 1), (0.5, 4), (0.9, 32)):
        assert abs(chunk_write(eta, C).fixed_point - 0.5) < 1e-12
        assert abs(chunk_write(eta, C, "dot").fixed_point - 1) < 1e-12
        assert abs(chunk_write(eta, C, dgd=False).fixed_point - 1) < 1e-12
        assert chunk_write(eta, C).stable and chunk_write(eta, C, "dot").stable
        assert chunk_write(eta, C, dgd=False).stable == (eta * C <= 2)
    drift = chunk_write(0.3, 4, "dot", dgd=False)
    assert drift.fixed_point == math.inf and not drift.stable
    assert repeated_write(0.3, 4, 5, "dot", dgd=False)[-1] == pytest.approx(6.0)  # linear growth
    assert math.isnan(chunk_write(0.0).fixed_point) and chunk_write(0.0).stable
    p = 0.5**32
    closed = [0.5 * (1 - (2 * p - 1) ** n) for n in range(11)]
    assert repeated_write(0.5, 32, 10) == pytest.approx(closed) and closed[1:4] == pytest.approx([1, 0, 1], abs=1e-8)
    assert repeated_write(0.5, 32, 10, dgd=False)[-1] == pytest.approx(1 - 15.0**10)  # −5.8e11
    assert chunk_write(2.0, 1).keep == -3 and not chunk_write(2.0, 3).stable and chunk_write(2.0, 2).keep == 1


def test_eigenvalues_along_the_key():
    for eta in (0.0, 0.3, 1.0):
        assert chunk_write(eta, 1, "l2", True, 0.9).keep == pytest.approx(0.9 - 2 * eta)
        assert chunk_write(eta, 1, "dot", True, 0.9).keep == pytest.approx(0.9 - eta)
        assert chunk_write(eta, 8).keep == pytest.approx(2 * (1 - eta) ** 8 - 1)
    assert chunk_write(torch.tensor([0.0, 1.0]), 3).keep.tolist() == [1, -1]


def test_the_shapes_in_the_annotations_come_and_go():
    beartype = pytest.importorskip("beartype", reason="development extra: pip install 'papers10[dev]'").beartype
    from jaxtyping import jaxtyped

    def checked(function):
        return jaxtyped(typechecker=beartype)(function)

    W, x, y = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5, 3)
    checked(assoc_update)(W.expand(2, 3, 4), x[:2], y[:2], torch.ones(2), rule="delta")
    checked(attention_memory)(x, x, y)
    checked(dgd_step)(W, x, y, 0.1)
    checked(ggd_step)(W, x, lambda w, inputs: y, 0.1)
    checked(adam_memory)(torch.randn(5, 2, 3), betas=(0.9, 0.99))
    checked(adagrad_memory)(torch.randn(5, 2, 3))
    checked(chunk_write)(0.5, 3)
    checked(repeated_write)(0.5, 3, 2)


def test_delta_momentum_by_hand():
    optimizers = pytest.importorskip("papers10.nested_learning.optimizers")
    for gradient, clamp, expected in ((0.5, False, 0.6), (2.0, False, -3.3), (2.0, True, -0.2)):
        g, m = vector(gradient)[None], vector(1)[None]
        kept = optimizers.erase(m, g, momentum=0.9, delta_coef=1.0, clamp=clamp)
        assert float(kept - 0.1 * g) == pytest.approx(expected, abs=1e-12)


X = torch.zeros(4)
W = torch.zeros(3, 4)
Y = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: assoc_update(W, X, Y, rule="Delta"), ValueError, "rule: expected one of .*did you mean 'delta'"),
        (lambda: assoc_update(W, Y, Y), ValueError, "k: expected shape"),
        (lambda: assoc_update(W, X, X), ValueError, "v: expected shape"),
        (lambda: assoc_update(W, X.expand(2, 4), Y), ValueError, "k: expected at most 1"),
        (lambda: assoc_update(W, X, Y, window=3), ValueError, "window"),
        (lambda: assoc_update(W, X[None], Y[None], rule="omega", window=0), ValueError, "window"),
        (lambda: assoc_update(W, X[None], Y[None], torch.ones(2), rule="omega"), ValueError, "eta"),
        (lambda: assoc_update(W, X, Y, rule="lp", p=0.5), ValueError, "p: expected"),
        (lambda: assoc_update(W, X, Y, torch.ones(2)), ValueError, "eta"),
        (lambda: assoc_update(W.int(), X, Y), TypeError, "M: expected a floating"),
        (lambda: dgd_step(W, X, Y, -1.0), ValueError, "lr"),
        (lambda: dgd_step(W, X, Y, 0.1, "batch"), ValueError, "mode"),
        (lambda: dgd_step(W, X[None], Y, 0.1), ValueError, "grad_y"),
        (lambda: dgd_step(W, Y, Y, 0.1), ValueError, "x: expected shape"),
        (lambda: dgd_step(W, [1.0], Y, 0.1), TypeError, "x: expected a floating tensor, got list"),
        (lambda: ggd_step(W, X, lambda w, x: x, 0.1), ValueError, "value_fn"),
        (lambda: ggd_step(W, X, lambda w, x: Y, 0.0), ValueError, "lr"),
        (lambda: ggd_step(W, X, lambda w, x: Y, 0.1, "l1"), ValueError, "inner"),
        (lambda: ggd_step(W, X, lambda w, x: Y, 0.1, "l2", "decay"), ValueError, "retention"),
        (lambda: adam_memory(torch.zeros(0, 2)), ValueError, "grads"),
        (lambda: adam_memory(X, "std"), ValueError, "P: expected"),
        (lambda: adam_memory(X, lam=-1), ValueError, "lam"),
        (lambda: adam_memory(X, betas=(0.9, 1.0)), ValueError, "betas"),
        (lambda: adagrad_memory(torch.zeros(2, 2), eps=-1), ValueError, "eps"),
        (lambda: adagrad_memory(torch.tensor(1.0)), ValueError, "grads"),
        (lambda: ema_share(1.0, 3), ValueError, "beta"),
        (lambda: ema_terms(0.9, 1.0), ValueError, "share"),
        (lambda: attention_memory(W, W, W[:2]), ValueError, "v: expected shape"),
        (lambda: attention_memory(W, W[:0], W[:0]), ValueError, "at least one pair"),
        (lambda: attention_memory(W, W, W, window=0), ValueError, "window"),
        (lambda: chunk_write(-0.1), ValueError, "eta"),
        (lambda: chunk_write(0.1, 0), ValueError, "chunk_size"),
        (lambda: chunk_write(0.1, objective="l3"), ValueError, "objective"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
