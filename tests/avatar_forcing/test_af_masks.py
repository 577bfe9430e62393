"""The seven masks: counts, nesting, what they become over the depth, the offset that follows, bad input."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.avatar_forcing.masks import MASKS, additive_mask, latency, mask_spec, reach, receptive_field
from papers10.kernels.attention import MODES, attention, attention_mask, required_offset


def table(mode, length, block, look, **options):
    return attention_mask(mask_spec(mode, block_size=block, lookahead=look, **options), length, length)


@pytest.mark.parametrize(
    "length, block, look, counts",
    [
        (6, 2, 1, (21, 24, 26, 28, 32, 24)),
        (8, 4, 1, (36, 48, 43, 52, 64, 42)),
        (50, 10, 2, (1275, 1500, 1372, 1580, 2200, 1360)),
    ],
)
def test_allowed_counts(length, block, look, counts):
    modes = (
        "frame_causal",
        "block_causal",
        "frame_lookahead",
        "block_lookahead",
        "eq5_literal",
        "block_frame_lookahead",
    )
    assert tuple(int(table(mode, length, block, look).sum()) for mode in modes) == counts
    assert table("full", length, block, look).all()


def test_names():
    assert set(MASKS) <= set(MODES) and len(set(MASKS)) == 7


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 30), block=st.integers(1, 8), look=st.integers(0, 8))
def test_masks_nest(length, block, look):
    look = min(look, block)
    masks = {mode: table(mode, length, block, look) for mode in MASKS}
    for chain in (
        ("frame_causal", "block_frame_lookahead", "block_causal", "block_lookahead", "eq5_literal", "full"),
        ("frame_causal", "frame_lookahead", "block_lookahead"),
    ):
        for small, large in itertools.pairwise(chain):
            assert not (masks[small] & ~masks[large]).any(), (small, large)
    none = {mode: table(mode, length, block, 0) for mode in MASKS}
    assert torch.equal(none["frame_lookahead"], none["frame_causal"])
    assert torch.equal(none["block_lookahead"], none["block_causal"])
    assert torch.equal(table("block_causal", length, 1, 1), none["frame_causal"])
    assert torch.equal(table("block_lookahead", length, 1, 1), table("frame_lookahead", length, 1, 1))
    assert table("block_causal", length, length, 0).all()


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MASKS[1:]),
    block=st.integers(1, 6),
    look=st.integers(0, 6),
    depth=st.integers(1, 5),
    extra=st.one_of(st.none(), st.integers(0, 9)),
)
def test_reach_is_the_end_of_the_receptive_field(mode, block, look, depth, extra):
    spec = mask_spec(
        mode, block_size=block, lookahead=min(look, block), window=None if extra is None else block + extra
    )
    frame = 2 * block + 1
    length = reach(spec, depth, frame) + 3
    field = receptive_field(spec, depth, length)
    assert int(field[frame].nonzero().max()) == reach(spec, depth, frame)
    assert torch.equal(receptive_field(spec, 1, length), attention_mask(spec, length, length))
    assert reach(spec, 0, frame) == frame
    # More layers see more, and two halves see what the whole sees.
    first, second = receptive_field(spec, depth, length), receptive_field(spec, depth + 1, length)
    assert not (first & ~second).any()
    assert torch.equal(second, (first.float() @ attention_mask(spec, length, length).float()) > 0)


@settings(max_examples=60, deadline=None)
@given(mode=st.sampled_from(MASKS[1:]), block=st.integers(1, 7), look=st.integers(0, 7), depth=st.integers(1, 5))
def test_offset_follows_from_the_reach(mode, block, look, depth):
    spec = mask_spec(mode, block_size=block, lookahead=min(look, block))
    end = (depth * max(look, 1) + 2) * block
    changing = [frame for frame in range(end) if reach(spec, depth - 1, frame) >= end]
    assert required_offset(spec, depth) == (end - min(changing) if changing else 0)


def test_offsets_of_the_paper():
    assert required_offset(mask_spec("frame_lookahead", block_size=10, lookahead=2), 8) == 14
    assert required_offset(mask_spec("block_lookahead", block_size=10, lookahead=2), 8) == 70
    assert required_offset(mask_spec("block_causal", block_size=10, lookahead=2), 8) == 0
    assert reach(mask_spec("frame_lookahead", block_size=10, lookahead=2), 8, 9) == 25
    assert reach(mask_spec("eq5_literal", block_size=10, lookahead=2), 3, 9) == 69


def test_receptive_field_is_where_derivatives_are():
    weights = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(14, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mode in MASKS:
        spec = mask_spec(mode, block_size=4, lookahead=1, window=None if mode == "full" else 5)

        def stack(x, spec=spec):
            for layer in weights:
                x = x + attention(*((x @ w)[None, None] for w in layer), mask=spec, backend="reference")[0, 0]
            return x

        slope = torch.autograd.functional.jacobian(stack, x).abs().amax((1, 3))
        assert torch.equal(slope > 0, receptive_field(spec, 2, 14)), mode


def test_hand_values_of_attention():
    q = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)[None, None]
    v = torch.tensor([[1.0], [2], [4]], dtype=torch.float64)[None, None]
    for mode, expected in (
        ("frame_causal", (1, 1.669762, 2.758725)),
        ("frame_lookahead", (1.330238, 2.604448, 2.758725)),
        ("block_lookahead", (2.401112, 2.604448, 2.758725)),
    ):
        spec = mask_spec(mode, block_size=2, lookahead=1)
        added = additive_mask(spec, 3, 3, dtype=torch.float64)
        dense = ((q @ q.mT) / math.sqrt(2) + added).softmax(-1) @ v
        expected = torch.tensor(expected, dtype=torch.float64)
        for out in (dense, attention(q, q, v, mask=spec), attention(q, q, v, mask=spec, backend="reference")):
            assert torch.allclose(out[0, 0, :, 0], expected, atol=5e-7)


def test_additive_mask_is_the_rule():
    spec = mask_spec("block_lookahead", block_size=3, lookahead=1, window=4)
    options = {"q_start": 7, "k_start": 2}
    added, allowed = additive_mask(spec, 5, 11, **options, dtype=torch.bfloat16), attention_mask(spec, 5, 11, **options)
    assert added.dtype == torch.bfloat16 and torch.equal(added == 0, allowed) and added[~allowed].isneginf().all()
    with pytest.raises(TypeError, match="dtype"):
        additive_mask(spec, 2, 2, dtype=torch.int64)


def test_latency():
    assert latency(10, 2) == 0.4 and latency(10, 2, offset=False) == 0.48 and latency(5, 2, 50) == 0.1
    assert latency(5, 0) + 0.1 == pytest.approx(0.3) and latency(75, 0) == 3.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mask_spec("casual", block_size=2, lookahead=1), "mode: expected one of"),
        (lambda: mask_spec("frame_causal", block_size=0, lookahead=0), "block_size"),
        (lambda: mask_spec("frame_causal", block_size=2, lookahead=-1), "lookahead: expected an integer >= 0"),
        (lambda: mask_spec("frame_lookahead", block_size=2, lookahead=3), "lookahead: expected at most one block"),
        (lambda: mask_spec("frame_lookahead", block_size=5, lookahead=2, window=4), "window: expected at least one"),
        (lambda: receptive_field(mask_spec("full", block_size=2, lookahead=1), 0, 4), "num_layers"),
        (lambda: receptive_field(mask_spec("full", block_size=2, lookahead=1), 2, 0), "length"),
        (lambda: reach(mask_spec("full", block_size=2, lookahead=1), 2, 0), "mode: expected a rule with bounded"),
        (lambda: reach(mask_spec("block_causal", block_size=2, lookahead=1), -1, 0), "num_layers"),
        (lambda: reach(mask_spec("block_causal", block_size=2, lookahead=1), 1, -1), "frame"),
        (lambda: latency(0, 2), "block_size"),
        (lambda: latency(10, -2), "lookahead"),
        (lambda: latency(10, 2, 0), "fps"),
        (lambda: latency(10, 2, math.nan), "fps"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
