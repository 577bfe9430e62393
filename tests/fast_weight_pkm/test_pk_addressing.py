"""Product-key addresses, the address step and the slow memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.fast_weight_pkm.addressing import (
    ProductKeyMemory,
    addressing_step,
    marginal_entropy,
    memory_stats,
    pkm_address,
)


def _double(seed, *shape):
    return torch.randn(shape, generator=generator(seed, "test"), dtype=torch.float64)


def test_hand_example_of_both_scores():
    books = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(1, 2, 2)[..., None]
    query = torch.tensor([[[0.8, 0.1]]], dtype=torch.float64)
    near, aligned = (pkm_address(query, books, 2, score=score) for score in ("idw", "dot"))
    assert near.slots.tolist() == [[2, 0]] and aligned.slots.tolist() == [[3, 2]]
    torch.testing.assert_close(near.weights, torch.tensor([[0.939883, 0.060117]], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(aligned.weights, torch.tensor([[0.524979, 0.475021]], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(near.weights.square().sum(), torch.tensor(0.886994, dtype=torch.float64), atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from(["idw", "dot"]), st.data())
def test_equals_enumeration_of_all_slots(n, heads, half, own, joint, score, data):
    k = data.draw(st.integers(1, n))
    q, keys = _double(n, 2, 4, heads, 2 * half), _double(k, *((2,) if own else ()), heads, 2, n, half)
    found = pkm_address(q, keys, k, score=score, joint=joint)
    books = keys if own else keys.expand(2, *keys.shape)
    halves = q.unflatten(-1, (2, half))
    distance = (halves[:, :, :, :, None] - books[:, None]).square().sum(-1)
    side = -(1e-3 + distance).log() if score == "idw" else (halves[:, :, :, :, None] * books[:, None]).sum(-1)
    pairs = (side[..., 0, :, None] + side[..., 1, None, :]).flatten(-2)
    best, slots = pairs.topk(k)
    weights = best.flatten(-2).softmax(-1) if joint else best.softmax(-1).flatten(-2)
    torch.testing.assert_close(found.side_scores, side)
    torch.testing.assert_close(found.weights, weights)
    assert torch.equal(found.slots.unflatten(-1, (heads, k)).sort(-1).values, slots.sort(-1).values)
    assert torch.allclose(found.weights.sum(-1), torch.full((), 1.0 if joint else float(heads), dtype=torch.float64))


def test_ties_go_to_the_lower_slot_and_do_not_change():
    keys = torch.zeros(1, 2, 4, 2)
    first = pkm_address(torch.zeros(3, 1, 4), keys, 3)
    assert first.slots.tolist() == [[0, 1, 2]] * 3


def test_options_of_the_weights():
    q, keys = _double(0, 5, 2, 4), _double(1, 2, 2, 5, 2)
    plain = pkm_address(q, keys, 3)
    hot = pkm_address(q, keys, 3, temperature=1e6)
    torch.testing.assert_close(hot.weights, torch.full_like(hot.weights, 1 / 6), atol=1e-4, rtol=0)
    scores = torch.stack([plain.side_scores[:, h, 0].gather(1, plain.slots[:, 3 * h : 3 * h + 3] // 5) + plain.side_scores[:, h, 1].gather(1, plain.slots[:, 3 * h : 3 * h + 3] % 5)
                          for h in range(2)], 1).flatten(1)
    torch.testing.assert_close(pkm_address(q, keys, 3, normalize="relu").weights, scores.relu())
    torch.testing.assert_close(pkm_address(q, keys, 3, normalize="silu").weights, F.silu(scores))
    assert torch.equal(pkm_address(q, keys, 3, share_values=False).slots[:, 3:], plain.slots[:, 3:] + 25)


@pytest.mark.parametrize("problem", [
    lambda: pkm_address(torch.zeros(2, 1, 3), torch.zeros(1, 2, 4, 1), 2),
    lambda: pkm_address(torch.zeros(2, 1, 4), torch.zeros(1, 2, 4, 3), 2),
    lambda: pkm_address(torch.zeros(2, 3, 4), torch.zeros(1, 2, 4, 2), 2),
    lambda: pkm_address(torch.zeros(2, 1, 4), torch.zeros(1, 2, 4, 2), 5),
    lambda: pkm_address(torch.zeros(2, 1, 4), torch.zeros(1, 2, 4, 2), 0),
    lambda: pkm_address(torch.zeros(2, 1, 4), torch.zeros(1, 2, 4, 2), 2, temperature=0.0),
    lambda: pkm_address(torch.zeros(2, 1, 4), torch.zeros(1, 2, 4, 2), 2, normalize="softmx"),
    lambda: addressing_step(torch.zeros(1, 2, 4, 2), torch.zeros(3, 1, 4), 2, 1.0, mask=torch.ones(2, dtype=torch.bool)),
    lambda: ProductKeyMemory(8, key_dim=3), lambda: ProductKeyMemory(8, n_subkeys=4, topk=5), lambda: ProductKeyMemory(8, query_norm="layer"),
    lambda: memory_stats(torch.tensor([1]), 0),
])
def test_bad_input_is_named(problem):
    with pytest.raises(ValueError, match="expected"):
        problem()


def test_integers_are_no_queries():
    with pytest.raises(TypeError, match="q: expected a floating"):
        pkm_address(torch.zeros(2, 1, 4, dtype=torch.int64), torch.zeros(1, 2, 4, 2), 2)


def test_address_step_follows_the_gradient_and_raises_the_entropy():
    keys, q = _double(2, 1, 2, 6, 3).requires_grad_(), _double(3, 40, 1, 6)
    side = pkm_address(q, keys, 3).side_scores
    loss = -sum(marginal_entropy(side[:, 0, s], 3) for s in range(2))
    moved, before = addressing_step(keys, q, 3, 1e-3)
    torch.testing.assert_close(moved, keys - 1e-3 * torch.autograd.grad(loss, keys)[0])
    after = addressing_step(moved.detach(), q, 3, 1e-3)[1]
    assert float(after.sum()) > float(before.sum())
    assert 0 <= float(before.min()) and float(before.max()) <= math.log(6) + 1e-6


def test_address_step_is_differentiable():
    keys, q = _double(4, 1, 2, 4, 2).requires_grad_(), _double(5, 6, 1, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda keys, q: addressing_step(keys, q, 2, 0.5)[0].square().sum(), (keys, q), atol=1e-6)


def test_absent_tokens_do_not_count_even_when_they_are_not_finite():
    keys, q = _double(6, 2, 1, 2, 4, 2), _double(7, 2, 5, 1, 4)
    keep = torch.tensor([[True, True, False, True, False], [False] * 5])
    wanted = addressing_step(keys[0], q[0][keep[0]], 2, 1.0)[0]
    q[~keep] = math.nan
    moved = addressing_step(keys, q, 2, 1.0, mask=keep)[0]
    torch.testing.assert_close(moved[0], wanted)
    assert torch.equal(moved[1], keys[1])


def test_stats_of_use():
    stats = memory_stats(torch.tensor([[0, 1], [1, 2]]), 4)
    assert stats["coverage"] == 0.75 and stats["collision_ratio"] == 0.5
    assert memory_stats(torch.arange(8), 8)["kl_to_uniform"] == pytest.approx(0)
    assert memory_stats(torch.zeros(5, dtype=torch.int64), 8)["kl_to_uniform"] == pytest.approx(math.log(8))
    assert memory_stats(torch.zeros(0, dtype=torch.int64), 8)["coverage"] == 0
    with pytest.raises(IndexError):
        memory_stats(torch.tensor([8]), 8)


@pytest.mark.parametrize("options", [{}, {"peer": True}, {"out_gate": True}, {"gate": False}, {"query_norm": "batch"}, {"share_values": False}, {"score": "idw"}])
def test_slow_memory_equals_its_formula(options):
    torch.manual_seed(0)
    layer = ProductKeyMemory(6, n_subkeys=5, topk=3, heads=2, key_dim=4, value_dim=7, **options).double()
    x = _double(8, 2, 4, 6)
    q = layer.q_proj(x)
    q = layer.q_norm(q.flatten(0, 1)).view(q.shape) if options.get("query_norm") == "batch" else layer.q_norm(q)
    found = pkm_address(q.unflatten(-1, (2, 4)), layer.keys, 3, score=layer.score, joint=False, share_values=layer.share_values)
    if layer.peer:
        wanted = torch.zeros_like(x)
        for b in range(2):
            for t in range(4):
                for slot, weight in zip(found.slots[b, t], found.weights[b, t]):
                    wanted[b, t] += F.gelu(x[b, t] @ layer.inputs[slot]) * weight * layer.values[slot]
    else:
        out = (layer.values[found.slots] * found.weights[..., None]).sum(-2)
        wanted = layer.o_proj(out * F.silu(layer.s_proj(x)) if layer.s_proj is not None else out)
        if layer.g_proj is not None:
            wanted = wanted * layer.g_proj(x).sigmoid()
    if options.get("query_norm") == "batch":
        layer.eval()
        layer(x)
        layer.train()
    torch.testing.assert_close(layer(x), wanted)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert 0 < layer.usage()["coverage"] <= 1
    again = ProductKeyMemory(6, n_subkeys=5, topk=3, heads=2, key_dim=4, value_dim=7, **options).double()
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again.eval()(x), layer.eval()(x))


def test_usage_before_a_call_is_an_error():
    with pytest.raises(RuntimeError, match="expected a call"):
        ProductKeyMemory(6, n_subkeys=5, topk=3, heads=2, key_dim=4, value_dim=7).usage()
