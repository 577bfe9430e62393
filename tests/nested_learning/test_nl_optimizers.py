"""Optimizers as memories: known values, exact solutions, captured inputs, state, shards, refusals."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from papers10.core.checks import NonFiniteError
from papers10.nested_learning.m3 import M3
from papers10.nested_learning.optimizers import (
    BATCH_MODES,
    DGD,
    DeepMomentum,
    DeltaMomentum,
    GeneralizedMomentum,
    MultiFrequencyOptimizer,
    as_matrix,
    delta_step,
    erase,
    newton_schulz,
    squared_norm_bound,
)

EXACT = dict(atol=1e-12, rtol=1e-12)  # float64, sizes of order one
EVERY = {
    "dgd": lambda model: DGD(model, lr=0.1),
    "delta": lambda model: DeltaMomentum(model.parameters(), lr=0.05, preconditioner="adam"),
    "deep": lambda model: DeepMomentum(model.parameters(), lr=0.01),
    "muon": lambda model: GeneralizedMomentum(model.parameters(), lr=0.01, output="newton_schulz"),
    "m3": lambda model: M3(model, lr=0.02, slow_every=3, second_moment=True),
    "m3-sum": lambda model: M3(model, lr=1e-3, slow_every=3, accumulate="sum", ns="cubic", weight_decay=0.1),
    "levels": lambda model: MultiFrequencyOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.01),
        {"slow": (model[0].parameters(), 4), "fast": (model[2].parameters(), 2)},
    ),
}


def double(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def task(model):
    return (model(double(16, 6)) - double(16, 3, seed=1)).square().mean()


def walk(model, optimizer, steps, scheduler=None, set_to_none=True):
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        task(model).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# known values


@pytest.mark.parametrize(
    "memory, gradient, clamp, expected", [(1.0, 0.5, True, 0.6), (1.0, 2.0, False, -3.3), (1.0, 2.0, True, -0.2)]
)
def test_delta_momentum_by_hand(memory, gradient, clamp, expected):
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = DeltaMomentum([weight], lr=0.1, clamp=clamp)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.state[weight]["memory"].fill_(memory)
    weight.grad.fill_(gradient)
    optimizer.step()
    assert optimizer.state[weight]["memory"].item() == pytest.approx(expected, abs=1e-14)
    assert weight.item() == optimizer.state[weight]["memory"].item()


def test_delta_gradient_descent_by_hand():
    layer = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    optimizer = DGD(layer, lr=1.0)
    for expected in ([1.0, 0.0], [1.5, 0.0], [1.75, 0.0]):
        optimizer.zero_grad()
        (layer(torch.tensor([[1.0, 0.0]], dtype=torch.float64)) * -2).sum().backward()
        optimizer.step()
        assert layer.weight.tolist() == [expected]
    # |x|^2 = 3 and lr 1: the step size is 1/4
    x, zero = torch.ones(1, 1, 3, dtype=torch.float64), torch.zeros(1, 1, 3, dtype=torch.float64)
    new = delta_step(zero, x, -x, 1.0)
    assert torch.allclose(new, x / 4, **EXACT)


def test_newton_schulz_by_hand():
    diagonal = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    one = newton_schulz(diagonal, 1, "cubic").diagonal()
    assert torch.allclose(one, torch.tensor([0.792, 0.944], dtype=torch.float64), **EXACT)
    assert torch.allclose(newton_schulz(diagonal, 30, (1.5, -0.5, 0.0)), torch.eye(2, dtype=torch.float64), **EXACT)


# newton_schulz


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.sampled_from(["quintic", "cubic"]))
def test_newton_schulz_keeps_singular_vectors_and_is_batched(rows, columns, batch, coeffs):
    G = double(*((batch,) if batch else ()), rows, columns)
    O = newton_schulz(G, 5, coeffs)
    assert O.shape == G.shape
    if batch:
        assert torch.allclose(O, torch.stack([newton_schulz(g, 5, coeffs) for g in G]), **EXACT)
    assert torch.allclose(newton_schulz(G.mT, 5, coeffs), O.mT, **EXACT)
    # G^T O is symmetric and has no negative eigenvalue when O shares the singular vectors and keeps the signs
    product = G.mT @ O
    assert torch.allclose(product, product.mT, atol=1e-9)
    assert torch.linalg.eigvalsh(product).min() > -1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_newton_schulz_has_no_scale(dtype, scale):
    G = double(3, 5).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    assert torch.allclose(newton_schulz(G * scale), newton_schulz(G), atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_newton_schulz_of_zero_rank_one_and_nothing(dtype):
    assert newton_schulz(torch.zeros(2, 3, 4, dtype=dtype)).eq(0).all()
    assert newton_schulz(torch.zeros(0, 3, dtype=dtype)).shape == (0, 3)
    row = newton_schulz(torch.tensor([[3.0, 4.0]], dtype=dtype), 30, "cubic")
    assert row.dtype == dtype and torch.allclose(row.double(), torch.tensor([[0.6, 0.8]]).double(), atol=1e-2)


def test_newton_schulz_equals_torch_in_bfloat16():
    from torch.optim._muon import _zeropower_via_newtonschulz

    for shape in ((5, 9), (9, 5), (4, 4)):
        G = double(*shape).float()
        theirs = _zeropower_via_newtonschulz(G, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
        # two roundings to 8 bits in another order, five times
        assert torch.allclose(newton_schulz(G, dtype=torch.bfloat16), theirs, atol=0.03)


def test_newton_schulz_refuses():
    with pytest.raises(TypeError, match="G: expected a floating tensor"):
        newton_schulz(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"G: expected \[..., rows, columns\], got shape \(3,\)"):
        newton_schulz(torch.zeros(3))
    with pytest.raises(ValueError, match="did you mean 'quintic'"):
        newton_schulz(torch.zeros(2, 2), coeffs="quintik")
    with pytest.raises(ValueError, match="three coefficients"):
        newton_schulz(torch.zeros(2, 2), coeffs=(1.0, 2.0))
    with pytest.raises(ValueError, match="steps"):
        newton_schulz(torch.zeros(2, 2), steps=-1)
    with pytest.raises(TypeError, match="steps"):
        newton_schulz(torch.zeros(2, 2), steps=1.5)
    for wrong in (float("nan"), float("inf")):
        G = torch.eye(3)
        G[0, 1] = wrong
        with pytest.raises(NonFiniteError, match="G: expected finite values, got 1 of 9 that are not"):
            newton_schulz(G)
        assert newton_schulz(G, check_finite=False).shape == (3, 3)


# the delta memory


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.floats(0, 1), st.floats(0, 50), st.integers(0, 5))
def test_the_clamped_factor_has_eigenvalues_between_zero_and_alpha(rows, columns, alpha, coefficient, seed):
    gradient = 5 * double(rows, columns, seed=seed)
    gram = gradient.mT @ gradient
    bound = squared_norm_bound(gradient).item()
    largest = torch.linalg.eigvalsh(gram).max().item()
    assert largest * (1 - 1e-9) <= bound <= largest * min(rows, columns) ** 0.25 * (1 + 1e-9)
    # a memory with as many rows as columns shows the factor
    memory, wide = torch.eye(columns, dtype=torch.float64), torch.zeros(columns, columns, dtype=torch.float64)
    if rows <= columns:
        wide[:rows] = gradient
        values = torch.linalg.eigvalsh(erase(memory, wide, alpha, coefficient))
        assert values.min() >= -1e-9 and values.max() <= alpha + 1e-9


def test_both_orders_of_multiplication_agree():
    for shape in ((3, 8), (8, 3)):
        m, g = double(*shape), double(*shape, seed=1)
        plain = 0.9 * m - 0.3 * m @ g.mT @ g
        assert torch.allclose(erase(m, g, 0.9, 0.3, clamp=False), plain, **EXACT)
    assert torch.allclose(erase(m, 0 * g, 0.9, 1.0), 0.9 * m, **EXACT)


def test_the_literal_rule_explodes_and_the_clamped_does_not():
    ends = {}
    for clamp in (True, False):
        weight = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
        optimizer = DeltaMomentum([weight], lr=0.1, clamp=clamp)
        for step in range(30):
            weight.grad = 2 * weight.detach() if step % 2 else -2 * torch.eye(3, dtype=torch.float64)
            optimizer.step()
        ends[clamp] = weight.abs().max().item()
    assert ends[True] < 10 and not ends[False] < 1e6


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2, 2)])
def test_hebbian_identity_is_sgd_with_momentum(shape):
    ours, theirs = (nn.Parameter(double(*shape).clone()) for _ in range(2))
    pair = GeneralizedMomentum([ours], lr=0.1), torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for step in range(5):
        for weight, optimizer in zip((ours, theirs), pair):
            weight.grad = double(*shape, seed=step) + weight.detach()
            optimizer.step()
    assert torch.allclose(ours, theirs, **EXACT)


@pytest.mark.parametrize("foreach", [True, False])
def test_hebbian_read_through_newton_schulz_is_muon(foreach):
    models = [network().float() for _ in range(2)]
    matrices = [[p for p in model.parameters() if p.ndim == 2] for model in models]
    ours = GeneralizedMomentum(
        [{"params": [p], "lr": 0.05 * max(1, p.shape[0] / p.shape[1]) ** 0.5} for p in matrices[0]],
        output="newton_schulz",
        foreach=foreach,
    )
    theirs = torch.optim.Muon(matrices[1], lr=0.05, momentum=0.9, nesterov=False, weight_decay=0.0)
    for model, optimizer in zip(models, (ours, theirs)):
        for _ in range(8):
            model.zero_grad()
            (model(double(16, 6).float()) - 1).square().mean().backward()
            optimizer.step()
    # Muon orthogonalises in bfloat16: eight steps of up to 0.06
    assert all(torch.allclose(a, b, atol=0.02) for a, b in zip(*matrices))


def test_preconditioner_feature_map_and_output_are_applied():
    weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    G = double(2, 3)
    weight.grad = G.clone()
    GeneralizedMomentum(
        [weight], lr=0.5, feature_map=torch.tanh, preconditioner=lambda u: 2 * u, output=torch.sin
    ).step()
    assert torch.allclose(weight, torch.sin(-0.5 * 2 * torch.tanh(G)), **EXACT)
    for output, expected in (("sign", -0.5 * G.sign()), ("tanh", torch.tanh(-0.5 * G)), ("identity", -0.5 * G)):
        with torch.no_grad():
            weight.zero_()
        GeneralizedMomentum([weight], lr=0.5, output=output).step()
        assert torch.allclose(weight, expected, **EXACT)
    with torch.no_grad():
        weight.zero_()
    GeneralizedMomentum([weight], lr=0.5, preconditioner="adam").step()
    assert torch.allclose(weight, -0.5 * G.sign(), atol=1e-6), "after one bias-corrected step the mean square is g^2"


def test_deep_momentum_without_preconditioner_is_the_gradient_direction_with_the_size_of_momentum():
    weight, linear = (nn.Parameter(double(4, 3).clone()) for _ in range(2))
    deep, plain = DeepMomentum([weight], lr=0.1, preconditioner=None), GeneralizedMomentum([linear], lr=0.1)
    for step in range(3):
        before, G = weight.detach().clone(), double(4, 3, seed=step)
        weight.grad, linear.grad = G.clone(), G.clone()
        deep.step()
        plain.step()
        change = weight.detach() - before
        assert torch.allclose(change / change.norm(), -G / G.norm(), **EXACT)
        assert change.norm().item() == pytest.approx(plain.state[linear]["memory"].norm().item(), rel=1e-12)
    assert deep.state[weight]["second"].eq(0).all(), "nothing to learn"


def test_deep_momentum_learns_its_target_and_survives_zero_gradients():
    weight = nn.Parameter(torch.zeros(6, 5))
    optimizer = DeepMomentum([weight], lr=0.01, inner_lr=0.5)
    G = double(6, 5).float()
    aligned = []
    for _ in range(60):
        before = weight.detach().clone()
        weight.grad = G.clone()
        optimizer.step()
        aligned.append(F.cosine_similarity((before - weight.detach()).flatten(), G.sign().flatten(), dim=0).item())
    assert aligned[-1] > aligned[0] + 0.04, "the network comes to emit the preconditioned direction, here the sign"
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.isfinite(weight).all()


# delta gradient descent


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.floats(1e-3, 10))
def test_the_exact_mode_solves_the_normal_equations(count, columns, rows, lr):
    W, x, g = double(1, rows, columns), double(1, count, columns, seed=1), double(1, count, rows, seed=2)
    G = g.mT @ x / count
    left = x.mT @ x / count + torch.eye(columns, dtype=torch.float64) / lr
    solved = torch.linalg.solve(left, (W / lr - G).mT).mT
    assert torch.allclose(delta_step(W, x, G, lr, "exact"), solved, rtol=1e-9, atol=1e-10)
    if count == 1:
        for mode in BATCH_MODES:
            assert torch.allclose(delta_step(W, x, G, lr, mode, g), solved, rtol=1e-9, atol=1e-10)


def test_the_exact_step_minimises_the_proximal_loss():
    W, x, g = double(1, 2, 3), double(1, 1, 3, seed=1), double(1, 1, 2, seed=2)
    new = delta_step(W, x, g.mT @ x, 0.7).requires_grad_()
    loss = 0.5 * (x @ new.mT + g).square().sum() + (new - W).square().sum() / 1.4
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("mode", BATCH_MODES)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_optimizer_takes_the_step_of_the_formula(mode, normalize):
    layer = nn.Linear(4, 3).double()
    x, y = double(2, 5, 4), double(2, 5, 3, seed=1)
    optimizer = DGD(layer, lr=0.3, batch_mode=mode, normalize_inputs=normalize)
    W, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    (0.5 * (layer(x) - y).square().sum(-1)).mean().backward()
    bias_gradient = layer.bias.grad.clone()
    rows, errors = x.reshape(1, 10, 4), (x @ W.T + bias - y).reshape(1, 10, 3)
    if normalize:
        rows = rows / rows.norm(dim=-1, keepdim=True)
    expected = delta_step(W[None], rows, errors.mT @ rows / 10, 0.3, mode, errors)
    optimizer.step()
    assert torch.allclose(layer.weight[None], expected, **EXACT)
    assert torch.allclose(layer.bias, bias - 0.3 * bias_gradient, **EXACT), "vectors take plain SGD"


@pytest.mark.parametrize(
    "module, size",
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 6)),
        (nn.Conv2d(4, 6, (3, 2), dilation=2, groups=2, padding="same", padding_mode="reflect"), (2, 4, 7, 6)),
        (nn.Conv1d(4, 4, 3, groups=4, padding=1, padding_mode="circular"), (2, 4, 9)),
        (nn.Conv2d(3, 2, 2), (3, 5, 5)),
    ],
    ids=["strided", "grouped", "depthwise", "unbatched"],
)
def test_captured_patches_reproduce_the_gradient(module, size):
    module = module.double()
    optimizer = DGD(module, lr=0.1)
    out = module(double(*size))
    (out * double(*out.shape, seed=1)).sum().backward()
    ((x, g),) = optimizer._captured[module.weight]
    assert torch.allclose((g.mT @ x).reshape(module.weight.shape), module.weight.grad, atol=1e-10)
    optimizer.step()
    assert torch.isfinite(module.weight).all()


def test_a_layer_used_twice_counts_twice_and_evaluation_counts_nothing():
    layer = nn.Linear(3, 3).double()
    optimizer = DGD(layer, lr=0.1)
    layer(double(4, 3))
    with torch.no_grad():
        layer(double(4, 3))
    layer(layer(double(4, 3))).sum().backward()
    assert sum(x.shape[1] for x, _ in optimizer._captured[layer.weight]) == 8
    optimizer.zero_grad()
    assert not optimizer._captured


def test_no_captured_input_is_an_error_and_hooks_go():
    layer = nn.Linear(3, 2)
    optimizer = DGD(layer, lr=0.1)
    F.linear(torch.ones(1, 3), layer.weight).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"no input was captured since the last step for parameter 0 of its group, shape \(2, 3\)"
    ):
        optimizer.step()
    optimizer.remove_hooks()
    optimizer.step()
    assert not layer._forward_hooks
    other = DGD(layer, lr=0.1)
    del other
    layer(torch.ones(1, 3))
    assert not layer._forward_hooks, "the hook of an optimizer that is gone removes itself"


def test_parameters_without_a_model_take_sgd_and_say_so():
    layer = nn.Linear(3, 2)
    optimizer = DGD(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 3)).sum().backward()
    weight_gradient = layer.weight.grad.clone()
    with pytest.warns(UserWarning, match="pass the module itself"):
        optimizer.step()
    assert torch.allclose(layer.weight, before - 0.1 * weight_gradient)


def test_capture_by_hand_equals_the_hook():
    first, second = network(), network()
    watched, told = DGD(first[0], lr=0.1), DGD(second[0].parameters(), lr=0.1)
    x = double(5, 6)
    for layer in (first[0], second[0]):
        layer(x).square().mean().backward()
    told.capture(second[0].weight, x)
    watched.step()
    told.step()
    assert torch.equal(first[0].weight, second[0].weight)
    with pytest.raises(ValueError, match=r"inputs: expected \[..., 6\]"):
        told.capture(second[0].weight, x[:, :2])


def test_clipping_and_loss_scale_reach_the_sequential_mode():
    steps = []
    for factor in (1.0, 1024.0):
        layer = network()[0]
        optimizer = DGD(layer, lr=0.1, batch_mode="sequential")
        (layer(double(5, 6)).square().mean() * factor).backward()
        layer.weight.grad /= factor
        layer.bias.grad /= factor
        optimizer.step()
        steps.append(layer.weight.detach().clone())
    assert torch.allclose(*steps, **EXACT)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_fixed_point_is_half_of_the_target(scale):
    layer = nn.Linear(2, 1, bias=False).double()
    optimizer = DGD(layer, lr=0.5 / scale, gradient_scale=scale)
    x, y = double(32, 2), double(32, 1, seed=1)
    target = torch.linalg.lstsq(x, y).solution
    for _ in range(600):
        optimizer.zero_grad()
        (0.5 * (layer(x) - y).square().mean()).backward()
        optimizer.step()
    assert torch.allclose(layer.weight.T, target * scale / (1 + scale), atol=1e-9)


def test_the_fallback_rate_forms_a_group_of_its_own():
    model = network()
    optimizer = DGD(model, lr=0.1, fallback_lr=0.01)
    assert [(len(g["params"]), g["lr"]) for g in optimizer.param_groups] == [(2, 0.1), (2, 0.01)]
    chosen = DGD(
        [{"params": [model[0].weight], "lr": 0.5, "batch_mode": "exact"}, {"params": [model[0].bias]}], model=model
    )
    assert [g["lr"] for g in chosen.param_groups] == [0.5, 1e-2]


# what every optimizer of torch can do


@pytest.mark.parametrize("name", EVERY)
def test_state_dict_round_trip_in_the_middle(name):
    model, other = network(), network()
    optimizer = EVERY[name](model)
    walk(model, optimizer, 7)
    other.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh = EVERY[name](other)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(walk(model, optimizer, 6), walk(other, fresh, 6))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_like_the_original(name, how):
    model = network()
    optimizer = EVERY[name](model)
    walk(model, optimizer, 5)
    if how == "pickle" and name == "dgd":
        with pytest.raises(TypeError, match="cannot be pickled while it watches .* state_dict"):
            pickle.dumps((model, optimizer))
        return
    both = (model, optimizer)
    other, copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    # First the copy, then the original: neither moves the other.
    ended, before = walk(other, copied, 6), walk(model, optimizer, 0)
    assert not torch.equal(ended, before) and torch.equal(walk(model, optimizer, 6), ended)
    assert torch.equal(walk(model, optimizer, 2), walk(other, copied, 2))


def test_callables_and_options_of_a_copy():
    model = network()
    optimizer = GeneralizedMomentum(
        model.parameters(), feature_map=torch.tanh, preconditioner=torch.neg, output=torch.sin
    )
    other, copied = copy.deepcopy((model, optimizer))
    assert torch.equal(walk(model, optimizer, 4), walk(other, copied, 4))
    m3 = copy.deepcopy(M3(network(), ns_dtype=torch.float64, share_work=True, fallback_lr=0.25))
    m3.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert m3.ns_dtype == torch.float64 and m3.share_work and m3.param_groups[-1]["lr"] == 0.25


def test_a_copied_dgd_watches_the_copied_model_or_is_refused():
    model = network()
    optimizer = DGD(model, lr=0.1, fallback_lr=0.01)
    for alone in (optimizer, {"optimizer": optimizer, "model": model}):
        with pytest.raises(TypeError, match=r"model, optimizer = copy.deepcopy\(\(model, optimizer\)\)"):
            copy.deepcopy(alone)
    other, copied = copy.deepcopy((model, optimizer))
    task(other).backward()
    assert not optimizer._captured and set(copied._captured) == {other[0].weight, other[2].weight}
    assert len(copied.param_groups) == 2 and all(len(layer._forward_hooks) == 1 for layer in (other[0], other[2]))
    copied.remove_hooks()
    assert not other[0]._forward_hooks and model[0]._forward_hooks
    unwatched = copy.deepcopy(DGD(network().parameters(), lr=0.1))
    unwatched.capture(unwatched.param_groups[0]["params"][0], double(4, 6))


def test_a_model_copied_or_pickled_without_its_dgd_is_watched_by_nobody():
    model = network()
    optimizer = DGD(model, lr=0.1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        task(other).backward()
        assert not optimizer._captured and not other[0]._forward_hooks
    assert len(model[0]._forward_hooks) == 1


@pytest.mark.parametrize("name", EVERY)
def test_loss_falls_closure_scheduler_and_missing_gradients(name):
    model = network()
    optimizer = EVERY[name](model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.01 * step))
    rates = [group["lr"] for group in optimizer.param_groups]
    before = task(model).item()

    def closure():
        optimizer.zero_grad()
        loss = task(model)
        loss.backward()
        return loss

    for _ in range(40):
        loss = optimizer.step(closure)
        scheduler.step()
    assert loss.item() < 0.9 * before
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 1.4 for rate in rates])
    optimizer.zero_grad()
    frozen = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(frozen, model.parameters()))


@pytest.mark.parametrize("name", ["dgd", "delta", "deep", "muon", "m3"])
def test_maximize_is_the_step_on_the_negative_loss(name):
    ends = []
    for maximize in (False, True):
        model = network()
        optimizer = EVERY[name](model)
        for group in optimizer.param_groups:
            group["maximize"] = maximize
        for _ in range(3):
            optimizer.zero_grad()
            (task(model) * (-1 if maximize else 1)).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, **EXACT)


@pytest.mark.parametrize("name", ["delta", "deep", "muon", "m3"])
def test_together_and_one_by_one_agree(name):
    ends = []
    for foreach in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        optimizer = EVERY[name](model)
        for group in optimizer.param_groups:
            group["foreach"] = foreach
        ends.append(walk(model, optimizer, 8))
    assert torch.allclose(*ends, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": "delta", "weight_decay": 0.1},
        {"rule": "delta", "clamp": False, "maximize": True},
        {"rule": "deep", "preconditioner": "adam"},
        {"preconditioner": "adam", "output": "tanh"},
        {"output": "newton_schulz"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "hebbian",
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_groups_put_together_move_like_groups_alone(options, dtype):
    values = [(0.1, 0.9), (0.03, 0.5), (0.3, 0.0)]
    shapes = [(4, 3), (4, 3), (5,)]
    ends = []
    for together in (True, False):
        groups = [
            {
                "params": [nn.Parameter(double(*shape, seed=i).to(dtype)) for shape in shapes],
                "lr": lr,
                "momentum": momentum,
            }
            for i, (lr, momentum) in enumerate(values)
        ]
        optimizers = [
            GeneralizedMomentum(part, **options) for part in ([groups] if together else [[group] for group in groups])
        ]
        weights = [weight for group in groups for weight in group["params"]]
        for step in range(4):
            for i, weight in enumerate(weights):
                weight.grad = double(*weight.shape, seed=10 * step + i).to(dtype)
            for optimizer in optimizers:
                optimizer.step()
        ends.append(torch.cat([weight.detach().flatten() for weight in weights]))
    assert torch.allclose(*ends, **EXACT)


@pytest.mark.parametrize("name", ["delta", "deep", "muon", "m3"])
def test_groups_have_their_own_values_and_vectors_and_kernels_work(name):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)).to(memory_format=torch.channels_last)
    optimizer = EVERY[name](model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.tensor(1.0))], "lr": 0.5})
    assert optimizer.param_groups[-1]["lr"] in (0.5, 1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(2, 2, 4, 4)).square().sum().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda p: GeneralizedMomentum([p], lr=0.1, differentiable=True),
        lambda p: DeltaMomentum([p], lr=0.1, differentiable=True),
        lambda p: DeepMomentum([p], lr=0.1, differentiable=True),
        lambda p: GeneralizedMomentum([p], lr=0.1, output="newton_schulz", differentiable=True),
        lambda p: M3([p], lr=0.1, slow_every=1, second_moment=True, differentiable=True),
    ],
    ids=["hebbian", "delta", "deep", "muon", "m3"],
)
def test_differentiable_steps(build):
    start, first, second = double(3, 2), double(3, 2, seed=1), double(3, 2, seed=2)

    def end(a, b):
        weight = start.clone().requires_grad_().clone()
        optimizer = build(weight)
        for gradient in (a, b, a * b):
            weight.grad = gradient
            optimizer.step()
        return weight

    assert torch.autograd.gradcheck(end, (first.requires_grad_(), second.requires_grad_()), atol=1e-5)


def test_refusals():
    weight = nn.Parameter(torch.zeros(2, 2))
    for build in (GeneralizedMomentum, DeltaMomentum, DeepMomentum, DGD, M3):
        with pytest.raises(ValueError, match="lr: expected a number >= 0"):
            build([weight], lr=-1.0)
        with pytest.raises(ValueError, match="weight_decay"):
            build([weight], weight_decay=-1.0)
        optimizer = build([weight], check_finite=True)
        weight.grad = torch.full((2, 2), float("nan"))
        with pytest.raises(FloatingPointError, match=r"gradient of parameter 0 of its group, shape \(2, 2\)"):
            optimizer.step()
        weight.grad = torch.zeros(2, 2).to_sparse()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
        weight.grad = None
        flat = nn.Parameter(torch.zeros(4))
        flat._fsdp_flattened = True
        with pytest.raises(ValueError, match="flat shard"):
            build([flat])
    with pytest.raises(ValueError, match="rule: expected one of 'hebbian'"):
        GeneralizedMomentum([weight], rule="hebian")
    with pytest.raises(ValueError, match="output"):
        GeneralizedMomentum([weight], output="relu")
    with pytest.raises(ValueError, match="preconditioner"):
        DeltaMomentum([weight], preconditioner="adagrad")
    with pytest.raises(TypeError, match="feature_map"):
        GeneralizedMomentum([weight], feature_map="tanh")
    with pytest.raises(ValueError, match="momentum"):
        DeltaMomentum([weight], momentum=1.5)
    with pytest.raises(ValueError, match="inner_objective"):
        DeepMomentum([weight], inner_objective="l3")
    with pytest.raises(ValueError, match="argument: expected one of 'weight_decay'"):
        DeltaMomentum([weight], weight_decy=0.1)
    with pytest.raises(ValueError, match="batch_mode"):
        DGD([weight], batch_mode="median")
    weight.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="feature_map: expected the shape"):
        GeneralizedMomentum([weight], feature_map=lambda u: u[..., :1]).step()


# levels


@pytest.mark.parametrize("reduction, moves", [("sum", [-0.4, -0.8]), ("mean", [-0.1, -0.2])])
def test_a_constant_gradient_gathered_over_four_steps(reduction, moves):
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = MultiFrequencyOptimizer(torch.optim.SGD([weight], lr=0.1), {"slow": ([weight], 4)}, reduction)
    values = []
    for _ in range(8):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        values.append(weight.item())
    assert values == pytest.approx([0, 0, 0, *moves[:1] * 4, moves[1]])
    for _ in range(3):
        optimizer.step()
    optimizer.flush()
    assert weight.item() == pytest.approx(moves[1] + (-0.3 if reduction == "sum" else -0.1))
    optimizer.flush()
    assert weight.item() == pytest.approx(moves[1] + (-0.3 if reduction == "sum" else -0.1)), "nothing left"


def test_levels_leave_gradients_and_momentum_of_others_alone():
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    base = torch.optim.SGD([a, b], lr=0.1, momentum=0.9)
    optimizer = MultiFrequencyOptimizer(base, {"slow": ([b], 3)})
    for step in range(3):
        a.grad, b.grad = torch.ones(2), torch.full((2,), float(step))
        optimizer.step()
        assert b.grad.tolist() == [step, step] and ("momentum_buffer" in base.state[b]) == (step == 2)
    assert b.tolist() == pytest.approx([-0.3, -0.3]) and a.tolist() == pytest.approx([-0.561, -0.561])


def test_level_refusals():
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    base = torch.optim.SGD([a], lr=0.1)
    with pytest.raises(ValueError, match="levels: expected at least one"):
        MultiFrequencyOptimizer(base, {})
    with pytest.raises(ValueError, match="period of level 'x'"):
        MultiFrequencyOptimizer(base, {"x": ([a], 0)})
    with pytest.raises(ValueError, match="parameters of the base optimizer"):
        MultiFrequencyOptimizer(base, {"x": ([b], 1)})
    with pytest.raises(ValueError, match="already in level 'x'"):
        MultiFrequencyOptimizer(base, {"x": ([a], 1), "y": ([a], 2)})
    with pytest.raises(TypeError, match="base_optimizer"):
        MultiFrequencyOptimizer([a], {"x": ([a], 1)})
    with pytest.raises(ValueError, match="reduction"):
        MultiFrequencyOptimizer(base, {"x": ([a], 1)}, "max")
    with pytest.raises(ValueError, match="levels of sizes"):
        state = MultiFrequencyOptimizer(base, {"x": ([a], 1)}).state_dict()
        MultiFrequencyOptimizer(base, {"y": ([a], 1)}).load_state_dict(state)


# several processes

PROGRAM = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from papers10.nested_learning.m3 import M3
from papers10.nested_learning.optimizers import DGD, DeepMomentum, DeltaMomentum

torch.set_num_threads(1)
dist.init_process_group("gloo")
me, ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,))


def double(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BUILD = {
    "m3": lambda weights: M3(weights, lr=0.1, slow_every=2, second_moment=True),
    "m3-sum": lambda weights: M3(weights, lr=0.1, slow_every=2, accumulate="sum"),
    "delta": lambda weights: DeltaMomentum(weights, lr=0.1, preconditioner="adam"),
    "deep": lambda weights: DeepMomentum(weights, lr=0.1),
}
SHAPES = [(5, 3), (3, 5), (4, 4), (4, 4), (2, 3, 2, 2), (6,)]
result = {}
for name, build in BUILD.items():
    ends = []
    for placement in (None, Shard(0), Shard(1), Replicate()):
        weights = []
        for index, shape in enumerate(SHAPES):
            full = double(*shape, seed=index)
            if placement is None or (placement == Shard(1) and len(shape) < 2):
                weights.append(nn.Parameter(full))
            else:
                weights.append(nn.Parameter(distribute_tensor(full, mesh, [placement])))
        optimizer = build(weights)
        for step in range(5):
            for index, weight in enumerate(weights):
                gradient = double(*weight.shape, seed=100 * step + index)
                sharded = hasattr(weight, "full_tensor")
                weight.grad = distribute_tensor(gradient, mesh, weight.placements) if sharded else gradient
            optimizer.step()
            if step == 2:
                saved = optimizer.state_dict()
                optimizer = build(weights)
                optimizer.load_state_dict(saved)
        whole = [weight.full_tensor() if hasattr(weight, "full_tensor") else weight for weight in weights]
        ends.append(torch.cat([weight.detach().flatten() for weight in whole]))
    result[name] = [(end - ends[0]).abs().max().item() for end in ends]

# whole, equal parameters: the work is divided
weights, alone = ([nn.Parameter(double(*shape, seed=i)) for i, shape in enumerate(SHAPES)] for _ in range(2))
shared, single = M3(weights, slow_every=2, share_work=True), M3(alone, slow_every=2)
for step in range(4):
    for index, pair in enumerate(zip(weights, alone)):
        for weight in pair:
            weight.grad = double(*weight.shape, seed=100 * step + index)
    shared.step()
    single.step()
result["share_work"] = max((a - b).abs().max().item() for a, b in zip(weights, alone))

# each process has its own rows of the batch, gradients are averaged
x, y = double(7, 4, seed=1), double(7, 3, seed=2)
rows = slice(0, 5) if me == 0 else slice(5, 7)
ends = []
for mode in ("mean", "exact", "sequential"):
    for normalize in (False, True):
        layer = nn.Linear(4, 3).double()
        with torch.no_grad():
            layer.weight.copy_(double(3, 4, seed=3))
            layer.bias.zero_()
        optimizer = DGD(layer, lr=0.3, batch_mode=mode, normalize_inputs=normalize)
        ((layer(x[rows]) - y[rows]).square().sum() / 7).backward()
        for parameter in layer.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        ends.append(layer.weight.detach().flatten())
result["dgd"] = torch.cat(ends).tolist()
everyone = [None] * ranks
dist.all_gather_object(everyone, result["dgd"])
if me == 0:
    json.dump({**result, "same": everyone[0] == everyone[1]}, open(sys.argv[1], "w"))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "program.py").write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(folder / "program.py"), str(folder / "result.json")],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", ["m3", "m3-sum", "delta", "deep"])
def test_sharded_parameters_move_as_whole_ones(two_processes, name):
    # float64; only the order of sums differs
    assert max(two_processes[name]) < 1e-9


def test_divided_work_gives_the_same(two_processes):
    assert two_processes["share_work"] < 1e-12


def test_delta_gradient_descent_on_two_processes_equals_one(two_processes):
    assert two_processes["same"]
    x, y = double(7, 4, seed=1), double(7, 3, seed=2)
    ends = []
    for mode in BATCH_MODES:
        for normalize in (False, True):
            layer = nn.Linear(4, 3).double()
            with torch.no_grad():
                layer.weight.copy_(double(3, 4, seed=3))
                layer.bias.zero_()
            optimizer = DGD(layer, lr=0.3, batch_mode=mode, normalize_inputs=normalize)
            ((layer(x) - y).square().sum() / 7).backward()
            optimizer.step()
            ends += layer.weight.flatten().tolist()
    assert two_processes["dgd"] == pytest.approx(ends, abs=1e-11)


def test_matrix_view():
    assert as_matrix(torch.zeros(2, 3, 4)).shape == (2, 12) and as_matrix(torch.zeros(3)).shape == (3, 1)
