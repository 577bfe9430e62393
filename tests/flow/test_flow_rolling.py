"""A stream through a ring of keys and values equals one call over everything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.flow.blocks import Attention, DiTBlock, Modulation
from papers10.flow.cache import RollingKV
from papers10.kernels.attention import MaskSpec, attention
from papers10.lm.rope import rotary


def draws(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    window=st.integers(1, 12),
    rope=st.sampled_from([None, "rebase", "relative"]),
    seed=st.integers(0, 99),
)
def test_any_cut_of_a_stream_is_one_call(pieces, window, rope, seed):
    length = sum(pieces)
    q, k, v = draws(*[(2, 2, length, 6)] * 3, seed=seed)
    rule, places = MaskSpec("causal", window=window), torch.arange(length)
    turned = [x if rope is None else rotary(x, places, layout="interleaved") for x in (q, k)]
    whole = attention(*turned, v, mask=rule)
    stream, start, parts = RollingKV(1, window - 1, rope=rope), 0, []
    for piece in pieces:
        rows = slice(start, start + piece)
        stream.put(0, k[:, :, rows], v[:, :, rows])
        parts.append(stream.attend(0, q[:, :, rows], mask=rule))
        stream.commit(piece)
        start += piece
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_rows_that_are_not_committed_are_replaced():
    q, k, v = draws(*[(1, 1, 8, 4)] * 3)
    stream = RollingKV(1, None)
    stream.put(0, k[:, :, :5] * 100, v[:, :, :5])
    stream.put(0, k[:, :, :5], v[:, :, :5])
    stream.commit(3)
    stream.put(0, k[:, :, 3:], v[:, :, 3:])
    torch.testing.assert_close(stream.attend(0, q[:, :, 6:]), attention(q[:, :, 6:], k, v))
    assert (stream.length, stream.pending) == (3, 5)


def test_an_unbounded_past_grows_and_a_ring_does_not():
    (k,) = draws((1, 1, 10, 4))
    sizes = {}
    for capacity in (None, 20):
        stream = RollingKV(1, capacity, rope="rebase")
        for _ in range(40):
            stream.put(0, k, k)
            stream.commit(10)
        sizes[capacity] = stream.nbytes
        assert stream.length == 400
    assert sizes[None] > 10 * sizes[20] and sizes[20] == 2 * (20 + 10) * 4 * 8


def test_rebased_and_relative_agree_at_a_hundred_thousand():
    outputs = {}
    for rope in ("rebase", "relative"):
        stream = RollingKV(1, 30, rope=rope)
        generator = torch.Generator().manual_seed(0)
        rows = torch.zeros(3, 1, 1, 10, 4)
        for block in range(10_000):
            if block % 1000 < 4:
                rows = torch.randn(3, 1, 1, 10, 4, generator=generator)
            stream.put(0, rows[0], rows[1])
            if block % 1000 == 3:
                outputs.setdefault(rope, []).append(stream.attend(0, rows[2], mask=MaskSpec("block_causal", 10, window=31)))
            stream.commit(10)
        assert stream.length == 100_000 and stream.length - stream.origin <= 4 * 30 + 10
    torch.testing.assert_close(torch.stack(outputs["rebase"]), torch.stack(outputs["relative"]), rtol=1e-4, atol=1e-5)


def test_state_goes_on_bit_for_bit():
    q, k, v = draws(*[(1, 2, 40, 4)] * 3)
    first, second = RollingKV(1, 12, rope="rebase"), RollingKV(1, 12, rope="rebase")
    for start in range(0, 20, 5):
        first.put(0, k[:, :, start : start + 5], v[:, :, start : start + 5])
        first.commit(5)
    second.load_state_dict(first.state_dict())
    for stream in (first, second):
        stream.put(0, k[:, :, 20:25], v[:, :, 20:25])
    assert torch.equal(first.attend(0, q[:, :, 20:25]), second.attend(0, q[:, :, 20:25]))


def test_self_and_cross_attention_read_a_stream():
    x, context = draws((2, 24, 16), (2, 24, 12))
    for module, given_context in ((Attention(16, 2, rope="1d", qk_norm=True), None), (Attention(16, 2, context_dim=12, rope="1d"), context)):
        module, rule, places = module.double(), MaskSpec("block_causal", 6), torch.arange(24)
        cross = given_context is not None
        whole = module(x, given_context, positions=places, key_positions=places, mask=rule)
        stream, parts = RollingKV(1, None, rope="rebase"), []
        for start in range(0, 24, 6):
            rows = slice(start, start + 6)
            out = module(x[:, rows], context[:, rows] if cross else None, past=stream.layer(0), mask=rule)
            if cross:  # the context that was put is read again
                assert torch.equal(out, module(x[:, rows], None, past=stream.layer(0), mask=rule))
            parts.append(out)
            stream.commit(6)
        torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_block_without_its_context_needs_a_stream():
    block = DiTBlock(16, 2, cross="plain", modulation="shared")
    with pytest.raises(ValueError, match="context: expected what cross-attention reads"):
        block(torch.zeros(1, 3, 16), Modulation(16)(torch.zeros(1, 16)))


@pytest.mark.parametrize(
    "attempt, words",
    [
        (lambda s, k: RollingKV(0), "num_layers"),
        (lambda s, k: RollingKV(1, -1), "capacity"),
        (lambda s, k: RollingKV(1, rope="turn"), "rope"),
        (lambda s, k: s.attend(0, k), "put before attend"),
        (lambda s, k: s.put(0, k, k[:, :, :2]), "k, v"),
        (lambda s, k: s.layer(2), "index"),
        (lambda s, k: (s.put(0, k, k), s.commit(1)), "put of the same number of rows"),
        (lambda s, k: (s.put(0, k, k), s.put(1, k, k), s.commit(9)), "count"),
        (lambda s, k: (s.put(0, k, k), s.put(1, k, k), s.commit(3), s.put(0, k[:, :1], k[:, :1])), "of the past"),
        (lambda s, k: s.load_state_dict({"length": 3, "origin": 0, "keys.0": k, "values.0": k}), "2 layers"),
    ],
)
def test_what_does_not_fit_is_refused(attempt, words):
    with pytest.raises(ValueError, match=words):
        attempt(RollingKV(2, 8), torch.zeros(1, 2, 3, 4))
