"""Attention: rules against their written conditions, paths against the reference, padding and bad input."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.kernels import attention as module
from papers10.kernels.attention import (
    MODES,
    MaskSpec,
    RingSpec,
    attention,
    attention_mask,
    attention_reference,
    key_range,
    mask_mod,
    multi_attention,
    multi_attention_reference,
    required_offset,
)
from papers10.kernels.common import BackendUnavailable, installed, interpreting, last_backend


def draw(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed, "attention", *shape), dtype=torch.float64)


def condition(spec, i, j):
    block, look = spec.block_size, spec.lookahead
    bi, bj = i // block, j // block
    allowed = {
        "full": True,
        "band": abs(j - i) <= look,
        "causal": j <= i,
        "frame_causal": j <= i,
        "frame_lookahead": j <= i + look,
        "block_causal": bj <= bi,
        "block_lookahead": j < (bi + 1) * block + look,
        "block_frame_lookahead": bj < bi or (bj == bi and j <= i + look),
        "eq5_literal": bj <= bi + look,
    }[spec.mode]
    return allowed and (spec.window is None or j > bi * block - spec.window)


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    block=st.integers(1, 5),
    look=st.integers(0, 4),
    window=st.one_of(st.none(), st.integers(1, 6)),
    start=st.integers(0, 7),
)
def test_rules_are_their_conditions(mode, block, look, window, start):
    spec = MaskSpec(mode, block, look, window)
    table = attention_mask(spec, 9, 13, q_start=start, k_start=2)
    for row in range(9):
        for column in range(13):
            assert bool(table[row, column]) == bool(condition(spec, row + start, column + 2))
    rule = mask_mod(spec, q_start=start, k_start=2)
    assert torch.equal(rule(0, 0, torch.arange(9)[:, None], torch.arange(13)), table)


def test_rules_nest():
    order = ["frame_causal", "block_frame_lookahead", "block_causal", "block_lookahead", "eq5_literal"]
    tables = [attention_mask(MaskSpec(mode, 4, 2), 19, 19) for mode in order]
    for small, large in itertools.pairwise(tables):
        assert not (small & ~large).any()
    assert torch.equal(attention_mask(MaskSpec("block_causal", 32), 19, 19), torch.ones(19, 19, dtype=torch.bool))


@settings(max_examples=40, deadline=None)
@given(
    mode=st.sampled_from([m for m in MODES]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    queries=st.integers(1, 7),
    more=st.integers(0, 5),
    width=st.integers(1, 6),
    window=st.one_of(st.none(), st.integers(1, 5)),
)
def test_torch_path_equals_reference(mode, heads, queries, more, width, window):
    q, k = draw(2, heads[0], queries, width), draw(2, heads[1], queries + more, width)
    v = draw(2, heads[1], queries + more, width + 1)
    options = {"mask": MaskSpec(mode, 2, 1, window), "q_start": more}
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    others = [t.clone().requires_grad_() for t in (q, k, v)]
    ours = attention(*leaves, **options, backend="torch")
    wanted = attention_reference(*others, **options)
    assert torch.allclose(ours, wanted, atol=1e-12)
    ours.square().sum().backward(), wanted.square().sum().backward()
    for a, b in zip(leaves, others):
        assert torch.allclose(a.grad, b.grad, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    queries=st.integers(129, 290),
    q_start=st.integers(0, 40),
    k_start=st.integers(0, 20),
    more=st.integers(0, 70),
    block=st.sampled_from([1, 3]),
    window=st.integers(1, 90),
    padded=st.booleans(),
)
def test_blocks_of_a_window_equal_the_reference(mode, heads, queries, q_start, k_start, more, block, window, padded):
    spec = MaskSpec(mode, block, 2, window)
    keys = q_start + queries + more - k_start
    low, high = key_range(spec, torch.arange(q_start, q_start + queries))
    if bool((low.clamp(min=k_start) >= high.clamp(max=k_start + keys)).any()):
        k_start, keys = 0, keys + k_start
    q, k, v = draw(2, heads[0], queries, 5), draw(2, heads[1], keys, 5, seed=1), draw(2, heads[1], keys, 3, seed=2)
    end = torch.tensor([q_start + queries, q_start + queries - 100])
    valid = (torch.tensor([0, q_start]), end + 1) if padded and k_start <= q_start else None
    if valid is not None and mode != "full":
        valid = (torch.maximum(valid[0], torch.tensor(k_start)), end)
    options = {"mask": spec, "q_start": q_start, "k_start": k_start, "scale": 0.7, "valid": valid}
    results = []
    for function in (attention, attention_reference):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        try:
            out = function(*leaves, **options)
        except ValueError as error:
            results.append(str(error))
            continue
        out.backward(draw(*out.shape, seed=3))
        results.append([out, *(t.grad for t in leaves)])
    if isinstance(results[1], str):
        assert results[0] == results[1]
    else:
        for ours, wanted in zip(*results):
            assert torch.allclose(ours, wanted, atol=1e-11)


def test_a_long_window_makes_no_table(monkeypatch):
    monkeypatch.setattr(module, "_allowed", None)
    q, k, v = (draw(1, 2, 20000, 2, seed=s).float().requires_grad_() for s in range(3))
    valid = torch.tensor([5]), torch.tensor([19990])
    out = attention(q, k, v, mask=MaskSpec(window=16), valid=valid)
    assert not out[:, :, :5].any() and not out[:, :, 19990:].any()
    out.sum().backward()
    # The weights of each query add to one, so one query's share of the values' gradient is one.
    assert v.grad.sum().item() == pytest.approx(2 * 2 * 19985, rel=1e-4)
    assert not v.grad[:, :, :5].any() and not v.grad[:, :, 19990:].any()
    last = attention(q[:, :, -300:], k, v, mask=MaskSpec(window=16), q_start=19700)
    assert torch.allclose(last, attention(q, k, v, mask=MaskSpec(window=16))[:, :, -300:], atol=1e-6)


def test_visited_pairs_grow_with_the_length():
    def visited(length, spec):
        return sum((b - a) * (last - first) for a, b, first, last in module._blocks(spec, length, length, 0, 0))

    for spec in (MaskSpec(window=16), MaskSpec("band", lookahead=100), MaskSpec("block_lookahead", 10, 20, window=512)):
        assert visited(65536, spec) < 2.1 * visited(32768, spec)
    assert visited(32768, MaskSpec(window=16)) <= 32768 * (16 + 64)
    assert module._blocks(MaskSpec(), 4096, 4096, 0, 0) is not None
    for spec, length in ((MaskSpec("full"), 4096), (MaskSpec(window=16), 100), (MaskSpec(window=200), 300)):
        assert module._blocks(spec, length, length, 0, 0) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_blocks_in_low_precision(dtype):
    q, k, v = (draw(1, 2, 300, 8, seed=s).to(dtype).requires_grad_() for s in range(3))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    upstream = draw(1, 2, 300, 8, seed=3).to(dtype)
    out = attention(q, k, v, mask=MaskSpec(window=20))
    expected = attention_reference(*wide, mask=MaskSpec(window=20))
    assert out.dtype == dtype and torch.allclose(out.double(), expected, atol=8 * torch.finfo(dtype).eps)
    out.backward(upstream), expected.backward(upstream.double())
    # A key collects rounded terms from the 20 queries that see it.
    for ours, other in zip((q, k, v), wide):
        assert ours.grad.dtype == dtype and torch.allclose(
            ours.grad.double(), other.grad, atol=40 * torch.finfo(dtype).eps
        )


def test_blocks_under_autocast_and_for_second_derivatives():
    q, k, v = (draw(1, 1, 200, 4, seed=s).float().requires_grad_() for s in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, mask=MaskSpec(window=8))
    assert out.dtype == torch.bfloat16 and torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = attention(q, k, v, mask=MaskSpec(window=8))
        (slope,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        assert torch.autograd.grad(slope.square().sum(), k)[0].isfinite().all()


def test_none_means_every_key():
    q, k, v = draw(1, 2, 3, 4), draw(1, 2, 6, 4), draw(1, 2, 6, 4)
    plain = ((q @ k.transpose(2, 3)) / 2).softmax(-1) @ v
    assert torch.allclose(attention(q, k, v), plain)
    assert torch.allclose(attention(q, k, v, scale=0.0), v.mean(2, keepdim=True).expand(1, 2, 3, 4))


def test_empty_inputs_give_empty_results():
    for batch, time in ((0, 3), (2, 0)):
        for backend in ("reference", "torch"):
            out = attention(*(torch.zeros(batch, 2, time, 4) for _ in range(3)), mask=MaskSpec(), backend=backend)
            assert out.shape == (batch, 2, time, 4)


def test_strided_inputs():
    q, k, v = (draw(2, 5, 3, 8, seed=s).transpose(1, 2)[..., ::2] for s in range(3))
    assert torch.allclose(
        attention(q, k, v, mask=MaskSpec()), attention(*(t.contiguous() for t in (q, k, v)), mask=MaskSpec())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_dtype(dtype):
    q, k, v = (draw(1, 2, 6, 8, seed=s) for s in range(3))
    out = attention(*(t.to(dtype) for t in (q, k, v)), mask=MaskSpec())
    # The inputs are rounded, and values of order 1 are summed with weights that add to 1.
    assert out.dtype == dtype
    assert torch.allclose(out.double(), attention(q, k, v, mask=MaskSpec()), atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_left_and_right_changes_nothing(backend):
    q, k, v = (draw(1, 2, 5, 4, seed=s) for s in range(3))
    alone = attention(q, k, v, mask=MaskSpec(), backend=backend)
    for left, right in ((2, 0), (0, 3), (1, 1)):
        rows = [torch.nn.functional.pad(t, (0, 0, left, right), value=9.0) for t in (q, k, v)]
        valid = torch.tensor([left]), torch.tensor([left + 5])
        out = attention(*rows, mask=MaskSpec(), valid=valid, backend=backend)
        assert torch.allclose(out[:, :, left : left + 5], alone, atol=1e-12)
        assert not out[:, :, :left].any() and not out[:, :, left + 5 :].any()


def test_a_query_without_a_key_is_refused():
    q = draw(1, 1, 3, 2)
    with pytest.raises(ValueError, match="at least one key"):
        attention(q, q, q, mask=MaskSpec("causal", window=1), k_start=2)
    with pytest.raises(ValueError, match="at least one key"):
        attention(q, q[:, :, :0], q[:, :, :0])


def test_bad_input_is_named():
    q = draw(1, 4, 3, 2)
    with pytest.raises(ValueError, match="^k"):
        attention(q, q[..., :1], q)
    with pytest.raises(ValueError, match="divides 4"):
        attention(q, q[:, :3], q[:, :3])
    with pytest.raises(ValueError, match="v"):
        attention(q, q, q[:, :, :2])
    with pytest.raises(TypeError, match="floating"):
        attention(q.long(), q.long(), q.long())
    with pytest.raises(ValueError, match="backend"):
        attention(q, q, q, backend="tritn")
    with pytest.raises(ValueError, match="mode"):
        MaskSpec("casual")
    for options in ({"block_size": 0}, {"lookahead": -1}, {"window": 0}, {"window": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MaskSpec(**options)


def packed_case(seed=0, dtype=torch.float64):
    """Six packed rows, one without a query, and three sets, the first of which has a row without keys there."""
    rows = torch.tensor([0, 2, 4, 4, 9, 14, 15])
    keys = (
        torch.tensor([0, 3, 6, 6, 7, 8, 12]),
        torch.tensor([0, 1, 2, 7, 9, 12, 13]),
        torch.tensor([0, 2, 4, 5, 10, 15, 17]),
    )
    q = draw(15, 4, 6, seed=seed).to(dtype)
    sets = [tuple(draw(int(bounds[-1]), 2, size, seed=seed + size).to(dtype) for size in (6, 5)) for bounds in keys]
    return q, sets, rows, [bounds.int() for bounds in keys]


def one_by_one(q, k, v, rows, keys, **options):
    return torch.cat(
        [
            attention_reference(
                *(t[a:b].transpose(0, 1)[None] for t, a, b in ((q, i, j), (k, m, n), (v, m, n))), **options
            )[0].transpose(0, 1)
            for (i, j), (m, n) in zip(itertools.pairwise(rows.tolist()), itertools.pairwise(keys.tolist()))
        ]
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("mask", [None, MaskSpec("band", lookahead=9), MaskSpec("causal", window=2)])
def test_packed_rows_are_rows_of_their_own(backend, mask):
    q, sets, rows, keys = packed_case()
    (k, v), bounds = sets[1], keys[1]
    expected = one_by_one(q, k, v, rows, bounds, mask=mask, q_start=0, scale=0.7) if mask is None else None
    options = {"cu_seqlens_q": rows, "backend": backend, "scale": 0.7, "mask": mask}
    if mask is None:
        assert torch.allclose(attention(q, k, v, cu_seqlens_k=bounds, **options), expected, atol=1e-12)
    itself = attention(q, q, q, cu_seqlens_k=rows, **options)
    assert torch.allclose(itself, one_by_one(q, q, q, rows, rows, scale=0.7, mask=mask), atol=1e-12)
    assert itself.shape == q.shape and itself.dtype == q.dtype


def test_packed_rows_of_one_length_are_an_ordinary_batch():
    q, k, v = (draw(12, 2, 4, seed=s) for s in range(3))
    rows = torch.arange(0, 13, 3)
    packed = attention(q, k, v, mask=MaskSpec(), cu_seqlens_q=rows, cu_seqlens_k=rows)
    batch = [t.unflatten(0, (4, 3)).transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(packed, attention(*batch, mask=MaskSpec()).transpose(1, 2).flatten(0, 1))


def test_no_packed_rows_give_no_result():
    empty, rows = torch.zeros(0, 2, 4), torch.zeros(1, dtype=torch.int64)
    assert attention(empty, empty, empty, cu_seqlens_q=rows, cu_seqlens_k=rows).shape == (0, 2, 4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"cu_seqlens_k": None}, ValueError, "cu_seqlens_q, cu_seqlens_k: expected both or neither"),
        ({"cu_seqlens_q": [0, 3]}, TypeError, "cu_seqlens_q: expected an int32 or int64 tensor, got list"),
        ({"cu_seqlens_q": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens_q: expected an int32 or int64 tensor, got torch.float32"),
        ({"cu_seqlens_q": torch.tensor([0, 2])}, ValueError, r"cu_seqlens_q: expected one dimension from 0 to 3 without a decrease, got \[0, 2\]"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 3])}, ValueError, "cu_seqlens_k: expected one dimension from 0 to 3 without a decrease"),
        ({"cu_seqlens_k": torch.tensor([0, 2, 3])}, ValueError, "cu_seqlens_k: expected 1 rows as in cu_seqlens_q, got 2"),
        ({"valid": (torch.tensor([0]), torch.tensor([3]))}, ValueError, "valid: expected None with packed rows"),
        ({"q": torch.zeros(1, 2, 3, 4)}, ValueError, "q: expected shape"),
    ],
)  # fmt: skip
def test_bad_packed_rows_are_named(change, error, message):
    given = {
        **dict.fromkeys("qkv", torch.zeros(3, 2, 4)),
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 3])),
    }
    with pytest.raises(error, match=message):
        attention(**{**given, **change})


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_sets_are_blended(backend):
    q, k, v = (draw(1, 2, 3, 4, seed=s) for s in range(3))
    longer = draw(1, 2, 7, 4), draw(1, 2, 7, 4, seed=9)
    blend = multi_attention(q, [(k, v), longer], [0.3, 0.7], backend=backend)
    assert torch.allclose(blend, 0.3 * attention(q, k, v) + 0.7 * attention(q, *longer))
    q, sets, rows, keys = packed_case()
    bounds = [keys[1], keys[2]]
    blend = multi_attention(
        q, sets[1:], torch.tensor([0.25, -2.0]), cu_seqlens_q=rows, cu_seqlens_k=bounds, backend=backend
    )
    parts = [one_by_one(q, *pair, rows, own) for pair, own in zip(sets[1:], bounds)]
    assert torch.allclose(blend, 0.25 * parts[0] - 2 * parts[1], atol=1e-12)


def test_two_sets_by_hand():
    """One query of one channel: 0.75 from the first set, 6 from the second."""
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    column = lambda *numbers: torch.tensor(numbers, dtype=torch.float64)[None, None, :, None]
    sets = [(column(0, math.log(3)), column(0, 1)), (column(0, 0), column(4, 8))]
    assert multi_attention(q, sets, [0.75, 0.25], scale=1.0).item() == pytest.approx(2.0625, abs=1e-14)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_set_of_weight_zero_is_not_read_and_one_of_weight_one_is_attention(backend):
    q, k, v = (draw(1, 2, 3, 4, seed=s) for s in range(3))
    for nothing in ((k * math.nan, v), (k[:, :, :0], v[:, :, :0]), (None, None)):
        for weights in ([1.0, 0.0], torch.tensor([1.0, 0.0])):
            got = multi_attention(q, [(k, v), nothing], weights, backend=backend)
            assert torch.equal(got, attention(q, k, v, backend=backend))


def test_concatenated_keys_are_a_mixture_with_other_weights():
    q, (k, v), (other_k, other_v) = (
        draw(2, 3, 5, 4),
        *(tuple(draw(2, 3, size, 4, seed=size + s) for s in (0, 1)) for size in (6, 9)),
    )
    mass = torch.stack([(q @ t.transpose(2, 3) / 2).logsumexp(-1) for t in (k, other_k)]).softmax(0)[..., None]
    joined = attention(q, torch.cat((k, other_k), 2), torch.cat((v, other_v), 2))
    assert torch.allclose(joined, mass[0] * attention(q, k, v) + mass[1] * attention(q, other_k, other_v), atol=1e-12)
    assert not torch.allclose(joined, multi_attention(q, [(k, v), (other_k, other_v)], [0.5, 0.5]), atol=1e-2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_the_order_of_keys_and_of_sets_does_not_count(seed, share):
    q, k, v = (draw(1, 2, 6, 4, seed=seed + s) for s in range(3))
    order = torch.randperm(6, generator=generator(seed, "order"))
    once = multi_attention(q, [(k, v), (v, k)], [share, 1 - share])
    assert torch.allclose(
        once, multi_attention(q, [(v[:, :, order], k[:, :, order]), (k, v)], [1 - share, share]), atol=1e-12
    )
    same = multi_attention(q, [(k, v), (k, v)], [share, 1 - share])
    assert torch.allclose(same, attention(q, k, v), atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weights", [[0.3, 0.7], [0.0, 1.5]])
def test_gradients_of_sets(backend, packed, weights):
    if packed:
        q, sets, rows, keys = packed_case()
        sets, options = sets[1:], {"cu_seqlens_q": rows, "cu_seqlens_k": keys[1:]}
        q, sets = q[:, :2, :3], [(k[:, :1, :3], v[:, :1, :2]) for k, v in sets]
    else:
        q, options = draw(1, 2, 3, 3), {"mask": MaskSpec("band", lookahead=2)}
        sets = [(draw(1, 1, size, 3, seed=size), draw(1, 1, size, 2, seed=size + 1)) for size in (4, 3)]
    leaves = [
        t.clone().requires_grad_() for t in (torch.tensor(weights, dtype=torch.float64), q, *itertools.chain(*sets))
    ]

    def blend(weights, q, *rest):
        return multi_attention(q, list(zip(rest[::2], rest[1::2])), weights, backend=backend, **options)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradcheck(blend, leaves)


def test_weights_without_a_gradient_and_in_place_sums_agree():
    q, sets, rows, keys = packed_case()
    options = {"cu_seqlens_q": rows, "cu_seqlens_k": keys[1:]}
    plain = multi_attention(q, sets[1:], [0.3, 0.7], **options)
    tracked = multi_attention(q, sets[1:], torch.tensor([0.3, 0.7], dtype=torch.float64).requires_grad_(), **options)
    assert torch.allclose(plain, tracked, atol=1e-14) and tracked.requires_grad and not plain.requires_grad
    own = [(sets[1][0], sets[1][1]), (sets[2][0].clone().requires_grad_(), sets[2][1])]
    mixed = multi_attention(q, own, [0.3, 0.7], **options)
    assert torch.allclose(mixed, plain, atol=1e-14) and torch.autograd.grad(mixed.sum(), own[1][0])[0].any()


def test_bad_sets_are_named():
    q, k, v = (draw(1, 2, 3, 4, seed=s) for s in range(3))
    one, empty = (k, v), (k[:, :, :0], v[:, :, :0])
    for sets, weights, message in (
        ([one], [0.0], "weights: expected finite numbers and at least one that is not 0"),
        ([one], [0.5, 0.5], "weights: expected one number a set, got 2 for 1 sets"),
        ([], [], "weights: expected one number a set, got 0 for 0 sets"),
        ([one], [math.nan], "weights: expected finite numbers"),
        ([one, one], torch.ones(2, 1), "weights: expected a floating tensor"),
        ([one, one], torch.ones(2, dtype=torch.int64), "weights: expected a floating tensor"),
        ([one, empty], [0.5, 0.5], "set 1: mask: expected at least one key for every query"),
        ([one, (k, v[..., :2])], [0.5, 0.5], "sets: expected the same heads and channels in the values of every set"),
        ([one, (k[..., :3], v)], [0.5, 0.5], "set 1: k: expected shape"),
    ):
        for backend in ("reference", "torch"):
            with pytest.raises(ValueError, match=message):
                multi_attention(q, sets, weights, backend=backend)
    packed, rows = q[0].transpose(0, 1), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="cu_seqlens_k: expected one tensor, or one for each of 2 sets, got 1"):
        multi_attention(packed, [(packed, packed)] * 2, [0.5, 0.5], cu_seqlens_q=rows, cu_seqlens_k=[rows])
    with pytest.raises(ValueError, match="set 1: packed rows from 1: mask"):
        multi_attention(packed, [(packed, packed)] * 2, [0.5, 0.5], cu_seqlens_q=torch.tensor([0, 1, 3]),
                        cu_seqlens_k=[torch.tensor([0, 1, 3]), torch.tensor([0, 3, 3])], backend="torch")  # fmt: skip


def ring_case(capacity, length, new, heads=(2, 1), width=3, value=4, queries=None):
    """q, k, v with a ring in front, its free slots full of NaN, and the keys and values in order, oldest first."""
    q = draw(2, heads[0], new if queries is None else queries, width)
    k, v = draw(2, heads[1], capacity + new, width, seed=1), draw(2, heads[1], capacity + new, value, seed=2)
    for t in (k, v):
        t[:, :, length:capacity] = math.nan
    rows = [p % capacity for p in range(max(0, length - capacity), length)] + list(range(capacity, capacity + new))
    return q, k, v, k[:, :, rows], v[:, :, rows]


@settings(max_examples=80, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    capacity=st.integers(1, 9),
    length=st.one_of(st.integers(0, 30), st.integers(99990, 100010)),
    new=st.integers(0, 6),
    block=st.sampled_from([1, 3, 4]),
    window=st.one_of(st.none(), st.integers(1, 8)),
    back=st.one_of(st.none(), st.integers(-2, 5)),
)
def test_a_ring_is_its_keys_in_order(mode, capacity, length, new, block, window, back):
    spec, ring = MaskSpec(mode, block, 2, window), RingSpec(capacity, length)
    q, k, v, keys, values = ring_case(capacity, length, new, queries=new if back is None else 3)
    q_start = length if back is None else length + new - back
    plain = {"mask": spec, "scale": 0.8, "q_start": q_start, "k_start": max(0, length - capacity)}
    options = {"mask": spec, "scale": 0.8, "ring": ring} | ({} if back is None else {"q_start": q_start})
    try:
        expected = attention_reference(q, keys, values, **plain)
    except ValueError as problem:
        for backend in ("reference", "torch"):
            with pytest.raises(ValueError, match="at least one key") as found:
                attention(q, k, v, **options, backend=backend)
            assert str(found.value) == str(problem)
        return
    for backend in ("reference", "torch", "auto"):
        assert torch.allclose(attention(q, k, v, **options, backend=backend), expected, atol=1e-12)
    assert ring.first == max(0, length - capacity)
    for slot, place in enumerate(ring.positions().tolist()):
        assert place == -1 if slot >= length else place % capacity == slot and ring.first <= place < length


@pytest.mark.parametrize("length", [0, 3, 5, 17])
def test_gradient_of_a_ring(length):
    q, k, v, *_ = ring_case(5, length, 4)
    k, v = k.nan_to_num(7.0), v.nan_to_num(7.0)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    options = {"mask": MaskSpec("block_lookahead", 3, 1, window=7), "ring": RingSpec(5, length)}
    assert torch.autograd.gradcheck(lambda *t: attention(*t, **options, backend="torch"), leaves)
    grads = torch.autograd.grad(attention(*leaves, **options).square().sum(), leaves)
    wanted = torch.autograd.grad(attention_reference(*leaves, **options).square().sum(), leaves)
    assert all(torch.allclose(a, b) for a, b in zip(grads, wanted))
    assert not grads[1][:, :, length:5].any() and not grads[2][:, :, length:5].any()


def test_a_stream_keeps_few_masks():
    module._ring_table.cache_clear(), module._facts.cache_clear()
    spec = MaskSpec("frame_lookahead", 10, 2)
    q, k, v = draw(1, 1, 12, 4), draw(1, 1, 52, 4), draw(1, 1, 52, 4)
    for step in range(100):
        attention(q, k, v, mask=spec, ring=RingSpec(40, 48 + 10 * step))
    assert module._ring_table.cache_info().misses == 4 and module._facts.cache_info().misses == 1


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"ring": (4, 3)}, TypeError, "ring: expected a RingSpec or None, got tuple"),
        ({"ring": RingSpec(6, 3)}, ValueError, "k: expected at least as many rows as the ring holds, 6, got 5"),
        ({"k_start": 2}, ValueError, "k_start: expected 0 with a ring"),
        ({"valid": (torch.tensor([0]), torch.tensor([5]))}, ValueError, "valid: expected None with a ring"),
        ({"cu_seqlens_q": torch.tensor([0, 2])}, ValueError, "ring: expected None with packed rows"),
        ({"cu_seqlens_k": torch.tensor([0, 2])}, ValueError, "ring: expected None with packed rows"),
        (
            {"q_start": 900},
            ValueError,
            "mask: expected at least one key for every query, got none for query 0 of row 0",
        ),
        ({"v": torch.zeros(1, 2, 4, 3)}, ValueError, "v: expected shape"),
        ({"q": torch.zeros(1, 2, 1, 3).long()}, TypeError, "q, k, v: expected floating tensors"),
        ({"backend": "tritn"}, ValueError, "backend"),
    ],
)
@pytest.mark.parametrize("function", [attention, attention_reference])
def test_a_bad_ring_is_named(function, change, error, message):
    if function is attention_reference and "backend" in change:
        return
    rows = torch.zeros(1, 2, 5, 3)
    given = {"q": rows[:, :, :1], "k": rows, "v": rows, "ring": RingSpec(4, 9), "mask": MaskSpec(window=3)} | change
    with pytest.raises(error, match=message):
        function(**given)


@pytest.mark.parametrize("name, values", [("capacity", (0, -1, 2.0, True, None)), ("length", (-1, 1.5, False, None))])
def test_a_ring_has_whole_sizes(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name}: expected an integer"):
            RingSpec(**{"capacity": 3, "length": 2, name: value})


def test_work_of_a_ring():
    case = dict(
        op="attention_ring",
        batch=3,
        heads=2,
        queries=4,
        keys=4,
        capacity=5,
        length=3,
        width=8,
        value_width=6,
        mode="causal",
    )
    # 3 keys in the ring and 4 new ones: the queries see 4, 5, 6 and 7; 14 products each, and 7 rows of keys to read.
    assert module._flops(case) == 2 * 3 * 2 * (4 + 5 + 6 + 7) * 14
    assert module._bytes(case) == 4 * 3 * 2 * (4 + 7) * 14
    full = {**case, "length": 1000}
    assert module._flops(full) == 2 * 3 * 2 * (6 + 7 + 8 + 9) * 14 and module._bytes(full) == 4 * 3 * 2 * (4 + 9) * 14
    assert module._flops({**case, "direction": "backward"}) == module._bytes({**case, "direction": "backward"}) == 0


def test_required_offset_and_ranges():
    assert required_offset(MaskSpec("frame_causal"), 8) == 0
    assert required_offset(MaskSpec("block_frame_lookahead", 10, 2), 8) == 0
    with pytest.raises(ValueError, match="full"):
        required_offset(MaskSpec("full"), 2)
    low, high = key_range(MaskSpec("causal", window=3), torch.tensor([0, 5]))
    assert low.tolist() == [0, 3] and high.tolist() == [1, 6]


INTERPRETED = """
import torch
from papers10.kernels.attention import MODES, MaskSpec, RingSpec, attention, attention_reference, multi_attention, multi_attention_reference

def compare(batch, heads, queries, keys, width, value, spec, **options):
    draw = torch.Generator().manual_seed(queries)
    shapes = (batch, heads[0], queries, width), (batch, heads[1], keys, width), (batch, heads[1], keys, value)
    leaves = [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out = attention(*leaves, mask=spec, **options, backend="triton")
    expected = attention_reference(*wide, mask=spec, **options)
    upstream = torch.randn(out.shape, generator=draw)
    found = [out, *torch.autograd.grad(out, leaves, upstream)]
    right = [expected, *torch.autograd.grad(expected, wide, upstream.double())]
    for a, b in zip(found, right):
        assert (a.double() - b).abs().max() <= 2e-5 * b.abs().max().clamp_min(1), (spec, options)
    return found

for mode in MODES:
    compare(1, (2, 1), 40, 52, 8, 5, MaskSpec(mode, 3, 2), q_start=6)
    compare(1, (1, 1), 50, 60, 4, 4, MaskSpec(mode, 4, 1, window=7), q_start=9, k_start=1, scale=-0.3)
compare(1, (1, 1), 66, 66, 4, 4, MaskSpec("band", 7, 40, window=5), q_start=-9, k_start=-9)
# Tiles of keys that no query of a tile sees are not read, neither forward nor backward: NaN beyond them stays out.
for mode in ("block_lookahead", "frame_lookahead", "eq5_literal"):
    spec, draw = MaskSpec(mode, 4, 2, window=20), torch.Generator().manual_seed(2)
    leaves = [torch.randn(1, 1, 104, 4, generator=draw) for _ in range(3)]
    short = [leaves[0][:, :, :64].double().requires_grad_(), *(t[:, :, :96].double().requires_grad_() for t in leaves[1:])]
    for t in leaves[1:]:
        t[:, :, 96:] = float("nan")
    leaves = [t.requires_grad_() for t in leaves]
    out, wanted = attention(*leaves, mask=spec, backend="triton")[:, :, :64], attention_reference(*short, mask=spec)
    found, right = [out, *torch.autograd.grad(out.square().sum(), leaves)], [wanted, *torch.autograd.grad(wanted.square().sum(), short)]
    for a, b, count in zip(found, right, (64, 64, 32, 32)):
        assert torch.allclose(a[:, :, :count].double(), b[:, :, :count], atol=2e-5), mode

with torch.no_grad():
    for capacity, length, new, window in ((50, 7, 17, None), (70, 205, 5, 30)):
        q, k, v = (torch.randn(1, 1, rows, 8) for rows in (new, capacity + new, capacity + new))
        for t in (k, v):
            t[:, :, length:capacity] = float("nan")
        options = dict(mask=MaskSpec("frame_lookahead", 10, 2, window), ring=RingSpec(capacity, length))
        assert torch.allclose(attention(q, k, v, **options, backend="triton"), attention_reference(q, k, v, **options), atol=2e-5)
    assert attention(q[:0], k[:0], v[:0], **options, backend="triton").shape == (0, 1, 5, 8)
    # Rows outside the window are not read either; the torch path, which multiplies them by 0, would give NaN.
    k[:, :, :70][:, :, RingSpec(70, 205).positions() < 140] = float("nan")
    assert attention(q, k, v, **options, backend="triton").isfinite().all()
    torch.library.opcheck(torch.ops.papers10.attention_ring.default, (q, k, v, 70, 205, "frame_lookahead", 10, 2, 30, 205, 0.5), test_utils=("test_schema", "test_faketensor"))
try: attention(q.requires_grad_(), k, v, ring=RingSpec(70, 205), backend="triton")
except RuntimeError as problem: print(problem)
try: attention(q.detach(), k, v, mask=MaskSpec(window=2), q_start=400, ring=RingSpec(70, 205), backend="triton")
except ValueError as problem: print(problem)
valid = torch.tensor([5, 0]), torch.tensor([70, 33])
out, grad_q, grad_k, grad_v = compare(2, (2, 2), 70, 70, 17, 3, MaskSpec(window=9), valid=valid)
for t in (out, grad_q, grad_k, grad_v):
    assert not t[0, :, :5].any() and not t[1, :, 33:].any() and t[0, :, 5:].any() and t[1, :, :33].any()
compare(2, (1, 1), 20, 70, 8, 8, MaskSpec("full"), valid=valid)
first, second = (compare(1, (3, 1), 100, 100, 80, 8, MaskSpec(window=40)) for _ in range(2))
assert all(torch.equal(a, b) for a, b in zip(first, second))

def several(q, sets, weights, dtype=torch.float32, limit=2e-5, **options):
    leaves = [t.to(dtype).requires_grad_() for t in (q, *sum(sets, ()))]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    shares = [torch.tensor(weights, requires_grad=True), torch.tensor(weights).double().requires_grad_()]
    out = multi_attention(leaves[0], list(zip(leaves[1::2], leaves[2::2])), shares[0], backend="triton", **options)
    expected = multi_attention_reference(wide[0], list(zip(wide[1::2], wide[2::2])), shares[1], **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = [out, *torch.autograd.grad(out, [*leaves, shares[0]], upstream)]
    right = [expected, *torch.autograd.grad(expected, [*wide, shares[1]], upstream.double())]
    for a, b in zip(found, right):
        assert a.shape == b.shape and (a.double() - b).abs().max() <= limit * b.abs().max().clamp_min(1), (dtype, weights, options)
    return found

draw = torch.Generator().manual_seed(0)
r = lambda *shape: torch.randn(shape, generator=draw)
three = [(r(1, 1, size, 5), r(1, 1, size, 6)) for size in (40, 7, 33)]
q = r(1, 1, 36, 5)
several(q, three, [0.3, -0.5, 1.2])
several(q, [three[0], three[2]], [0.3, 0.7], torch.float16, 2e-3, mask=MaskSpec("causal", window=4))
rows, other = torch.tensor([0, 20, 20, 36]), torch.tensor([0, 18, 18, 19], dtype=torch.int32)
cut = lambda t: t[0].transpose(0, 1).contiguous()
packed = cut(q), [(r(36, 1, 5), r(36, 1, 4)), (r(19, 1, 5), r(19, 1, 4))]
first, second = (several(*packed, [0.4, 0.0], cu_seqlens_q=rows, cu_seqlens_k=[rows, other]) for _ in range(2))
assert all(torch.equal(a, b) for a, b in zip(first, second))
several(packed[0], packed[1][:1], [0.4], cu_seqlens_q=rows, cu_seqlens_k=rows, mask=MaskSpec("block_lookahead", 4, 2, window=9))
own = attention(*(cut(q)[:, :1],) * 3, cu_seqlens_q=rows, cu_seqlens_k=rows, backend="triton")
dense = [attention(*(q[:, :1, a:b],) * 3, backend="triton")[0].transpose(0, 1) for a, b in ((0, 20), (20, 36))]
assert torch.equal(own, torch.cat(dense))
alone = multi_attention(q, [three[0], (None, None)], [1.0, 0.0], backend="triton")
assert torch.equal(alone, attention(q, *three[0], backend="triton"))
skipped = multi_attention(q, [three[0], (three[1][0] * float("nan"), three[1][1]), three[2]], [0.5, 0.0, 0.5], backend="triton")
assert torch.equal(skipped, multi_attention(q, three[::2], [0.5, 0.5], backend="triton"))
empty = three[1][0][:, :, :0], three[1][1][:, :, :0]
for sets, weights in (([three[0], empty], [0.5, 0.5]), ([three[0]] * 4, [0.25] * 4)):
    try: multi_attention(q, sets, weights, backend="triton")
    except ValueError as problem: print(problem)
slope = torch.autograd.grad(multi_attention(q.requires_grad_(), three[:2], [0.5, 0.5], backend="triton").sum(), q, create_graph=True)[0]
try: slope.sum().backward()
except RuntimeError as problem: print(problem)
torch.library.opcheck(getattr(torch.ops.papers10, "attention").default, (q, [three[0][0]], [three[0][1]], None, None, None, None, [], [36, 40], "full", 1, 0, 0, 0, 0, 0.5, False),
                      test_utils=("test_schema", "test_faketensor"))

z = lambda *shape, dtype=torch.float32: torch.ones(shape, dtype=dtype)
for tensors, options in (
    ([z(1, 1, 3, 4, dtype=torch.float64)] * 3, {}),
    ([z(1, 1, 3, 4), z(1, 1, 3, 4), z(1, 1, 3, 4).half()], {}),
    ([z(1, 1, 3, 257)] * 3, {}),
    ([z(1, 1, 3, 4)] * 3, dict(mask=MaskSpec(window=1), k_start=2)),
    ([z(2, 1, 3, 4)] * 3, dict(valid=(torch.tensor([0, 2]), torch.tensor([3, 2])))),
):
    try: attention(*tensors, **options, backend="triton")
    except (TypeError, ValueError) as problem: print(type(problem).__name__, problem)
for shape in ((0, 2, 3, 4), (2, 2, 0, 4)):
    empty = torch.zeros(shape)
    assert attention(empty, empty, empty, mask=MaskSpec(), backend="triton").shape == shape
strided = torch.randn(1, 20, 3, 16)[..., ::2].transpose(1, 2)
a, b = (attention(t, t, t, mask=MaskSpec(window=5), backend="triton") for t in (strided, strided.contiguous()))
assert torch.equal(a, b)
q = torch.randn(1, 1, 20, 4, requires_grad=True)
with torch.autocast("cpu", torch.bfloat16):
    assert attention(q, q, q, mask=MaskSpec(window=5), backend="triton").dtype == torch.bfloat16
slope = torch.autograd.grad(attention(q, q, q, mask=MaskSpec(window=5), backend="triton").sum(), q, create_graph=True)[0]
try: slope.sum().backward()
except RuntimeError as problem: print(problem)
"""


@pytest.mark.skipif(not installed("triton"), reason="Triton is not installed")
def test_triton_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    starts = (
        "attention: the Triton path has no gradient with a ring",
        "mask: expected at least one key for every query, got none for query 0 of row 0",
        "set 1: mask: expected at least one key for every query, got none for query 0 of row 0",
        "backend: expected at most 3 sets that count for 'triton', got 4",
        "attention: the Triton path has no second derivative",
        "TypeError backend: expected q, k, v all float32",
        "TypeError backend: expected q, k, v all float32",
        "ValueError backend: expected at most 256 channels",
        "ValueError mask: expected at least one key for every query, got none for query 0 of row 0",
        "ValueError mask: expected at least one key for every query, got none for query 0 of row 1",
        "attention: the Triton path has no second derivative",
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(starts) and all(line.startswith(start) for line, start in zip(lines, starts)), lines


@pytest.mark.skipif(
    interpreting() or not installed("triton"), reason="Triton's interpreter is on, or Triton is not installed"
)
def test_triton_on_a_processor_says_what_to_do():
    q = draw(1, 1, 20, 4).float()
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1"):
        attention(q, q, q, mask=MaskSpec(window=3), backend="triton")


def test_auto_leaves_to_pytorch_what_it_has_a_kernel_for(monkeypatch):
    skipped = []

    def resolve(requested, tensor, available, *, kernel, auto_skips):
        skipped.append("triton" in auto_skips)
        return "torch"

    monkeypatch.setattr(module, "resolve_backend", resolve)
    q = draw(1, 1, 20, 4).float()
    valid = torch.tensor([0]), torch.tensor([19])
    for options in (dict(mask=MaskSpec(window=3)), dict(mask=MaskSpec(), valid=valid), dict(mask=MaskSpec("band"))):
        attention(q, q, q, **options)
        attention(q.double(), q.double(), q.double(), **options)
    assert skipped == [False, True] * 3
    attention(q, q, q, mask=MaskSpec()), attention(q, q, q, mask=MaskSpec(window=20))
    attention(q[:, :, -1:], q, q, mask=MaskSpec(window=3), q_start=19)
    assert skipped[6:] == [True] * 3


def test_what_auto_leaves_to_pytorch_of_a_ring(monkeypatch):
    skipped = []

    def resolve(requested, tensor, available, *, kernel, auto_skips):
        skipped.append("triton" in auto_skips)
        return "torch"

    monkeypatch.setattr(module, "resolve_backend", resolve)
    q, k = draw(1, 1, 3, 4).float(), draw(1, 1, 8, 4).float()
    attention(q, k, k, mask=MaskSpec(), ring=RingSpec(5, 20))
    assert skipped == [False]
    attention(q, k, k, ring=RingSpec(5, 20)), attention(q, k, k, mask=MaskSpec("full"), ring=RingSpec(5, 5))
    attention(q.double(), k.double(), k.double(), mask=MaskSpec(), ring=RingSpec(5, 20))
    attention(q.clone().requires_grad_(), k, k, mask=MaskSpec(), ring=RingSpec(5, 20))
    assert skipped[1:] == [True] * 4
    # A ring that is not full would have to be cut first.
    del skipped[:]
    attention(q, k, k, ring=RingSpec(5, 2))
    assert skipped[0] is False


def test_what_auto_leaves_to_pytorch_of_sets_and_packed_rows(monkeypatch):
    skipped = []

    def resolve(requested, tensor, available, *, kernel, auto_skips):
        if requested == "auto":
            skipped.append("triton" in auto_skips)
        return "torch"

    monkeypatch.setattr(module, "resolve_backend", resolve)
    q, rows = draw(1, 1, 20, 4).float(), torch.tensor([0, 3, 20])
    sets, packed = [(q, q), (q, q)], q[0].transpose(0, 1)
    multi_attention(q, sets, [0.5, 0.5]), multi_attention(q, sets, [0.5, 0.5], mask=MaskSpec(window=3))
    assert skipped == [True, False]
    equal = torch.tensor([0, 10, 20])
    multi_attention(packed, [(packed, packed)] * 2, [0.5, 0.5], cu_seqlens_q=equal, cu_seqlens_k=equal)
    attention(packed, packed, packed, cu_seqlens_q=equal, cu_seqlens_k=equal)
    assert skipped[2:] == [True] * 3
    del skipped[2:]
    multi_attention(packed, [(packed, packed)] * 2, [0.5, 0.5], cu_seqlens_q=rows, cu_seqlens_k=rows)
    attention(packed, packed, packed, cu_seqlens_q=rows, cu_seqlens_k=rows)
    multi_attention(q.double(), [(q.double(), q.double())] * 2, [0.5, 0.5], mask=MaskSpec(window=3))
    multi_attention(q, sets * 2, [0.25] * 4, mask=MaskSpec(window=3))
    assert skipped[2:] == [False, False, True, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "heads, queries, keys, width, value, spec, padded",
    [
        ((8, 2), 1000, 1000, 64, 64, MaskSpec(window=100), False),
        ((2, 2), 300, 500, 128, 96, MaskSpec("block_lookahead", 10, 4, 200), False),
        ((4, 4), 257, 257, 20, 256, MaskSpec(), True),
        ((2, 1), 1, 1, 16, 16, MaskSpec(window=1), True),
    ],
)
def test_triton_on_the_card(dtype, heads, queries, keys, width, value, spec, padded):
    shapes = (2, heads[0], queries, width), (2, heads[1], keys, width), (2, heads[1], keys, value)
    leaves = [draw(*shape, seed=s).cuda().to(dtype).requires_grad_() for s, shape in enumerate(shapes)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    valid = (torch.tensor([0, queries // 3]).cuda(), torch.tensor([queries, queries]).cuda()) if padded else None
    options = {"mask": spec, "q_start": keys - queries, "valid": valid}
    out = attention(*leaves, **options, backend="triton" if queries < 16 else "auto")
    assert last_backend("attention") == "triton"
    expected = attention_reference(*wide, **options)
    upstream = draw(*out.shape, seed=9).cuda()
    found = [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]
    right = [expected, *torch.autograd.grad(expected, wide, upstream.to(dtype).double())]
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(found, right):
        assert (a.double() - b).abs().max() <= limit * b.abs().max().clamp_min(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capacity, length, new", [(38, 1000, 12), (50, 13, 12), (4096, 10007, 12), (300, 777, 100)])
def test_a_ring_on_the_card(dtype, capacity, length, new):
    q, k, v = (
        draw(3, 4, rows, 64, seed=s).cuda().to(dtype) for s, rows in enumerate((new, capacity + new, capacity + new))
    )
    k[:, :, length:capacity] = math.nan
    for spec in (MaskSpec("frame_lookahead", 10, 2), MaskSpec("block_lookahead", 10, 2, window=31)):
        options = {"mask": spec, "ring": RingSpec(capacity, length)}
        out = attention(q, k, v, **options)
        assert last_backend("attention") == "triton"
        expected = attention_reference(q.double(), k.double(), v.double(), **options)
        assert (out.double() - expected).abs().max() <= (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sets_on_the_card(dtype, packed, count):
    q = draw(600, 4, 64) if packed else draw(2, 4, 300, 64)
    sizes = (500, 700, 90)[:count]
    sets = [
        tuple(draw(*((size, 2, 64) if packed else (2, 2, size, 64)), seed=size + s) for s in (0, 1)) for size in sizes
    ]
    bounds = [torch.tensor([0, size // 3, size // 2, size]) for size in (600, *sizes)]
    options = {"cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1:]} if packed else {}
    leaves = [t.cuda().to(dtype).requires_grad_() for t in (q, *itertools.chain(*sets))]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    shares = [
        torch.tensor([0.5, -0.2, 0.7][:count], dtype=kind).requires_grad_() for kind in (torch.float32, torch.float64)
    ]
    out = multi_attention(leaves[0], list(zip(leaves[1::2], leaves[2::2])), shares[0], backend="triton", **options)
    expected = multi_attention_reference(wide[0], list(zip(wide[1::2], wide[2::2])), shares[1], **options)
    upstream = draw(*out.shape, seed=9).cuda().to(dtype)
    found = [out, *torch.autograd.grad(out, [*leaves, shares[0]], upstream)]
    right = [expected, *torch.autograd.grad(expected, [*wide, shares[1]], upstream.double())]
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(found, right):
        assert (a.double() - b).abs().max() <= limit * b.abs().max().clamp_min(1)
