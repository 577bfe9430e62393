"""Transformer blocks: identity at the start, positions, masks, gradients, refusals."""

from itertools import pairwise

import pytest
import torch

from papers10.flow.blocks import (
    Attention,
    DiTBlock,
    FinalLayer,
    HeadNorm,
    Modulation,
    TimestepEmbedding,
    grid_positions,
    rope_axes,
    sinusoid,
)
from papers10.kernels.attention import MaskSpec


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def opened(module):
    """float64, with every parameter away from its start."""
    module = module.double()
    for i, parameter in enumerate(module.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    return module


@pytest.mark.parametrize("cross", [None, "plain", "modulated"])
@pytest.mark.parametrize("rope", [None, "1d", "3d"])
@pytest.mark.parametrize("per_token_time", [False, True])
def test_fresh_block_is_the_identity(cross, rope, per_token_time):
    block = DiTBlock(
        24, 2, cross=cross, context_dim=10 if cross else None, qk_norm=True, rope=rope, per_token_time=per_token_time
    )
    x = normal(2, 12, 24, dtype=torch.float32)
    time = normal(*([2, 12] if per_token_time else [2]), 24, dtype=torch.float32)
    positions = {None: None, "1d": torch.arange(12), "3d": grid_positions(3, 2, 2)}[rope]
    context = normal(2, 5, 10, dtype=torch.float32) if cross else None
    assert torch.equal(block(x, time, positions=positions, context=context), x)
    assert FinalLayer(24, 7, per_token_time=per_token_time)(x, time).abs().max() == 0


def test_shared_modulation_equals_own():
    own, shared = opened(DiTBlock(16, 2)), DiTBlock(16, 2, modulation="shared").double()
    shared.load_state_dict({k: v for k, v in own.state_dict().items() if not k.startswith("modulation.")})
    x, time = normal(2, 5, 16), normal(2, 16, seed=1)
    torch.testing.assert_close(shared(x, own.modulation(time)), own(x, time))
    assert sum(p.numel() for p in own.parameters()) - sum(p.numel() for p in shared.parameters()) == 6 * 16 * 17
    assert Modulation(16)(time.float()).abs().max() == 0


def test_time_per_token_equals_time_per_sample_when_equal():
    block = opened(DiTBlock(16, 2, rope="1d"))
    each = DiTBlock(16, 2, rope="1d", per_token_time=True).double()
    each.load_state_dict(block.state_dict())
    x, time = normal(2, 5, 16), normal(2, 16, seed=1)
    torch.testing.assert_close(
        each(x, time[:, None].expand(-1, 5, -1), positions=torch.arange(5)), block(x, time, positions=torch.arange(5))
    )


@pytest.mark.parametrize("qk_norm", [False, True])
def test_only_differences_of_positions_count(qk_norm):
    block = opened(DiTBlock(24, 2, rope="3d", qk_norm=qk_norm))
    x, time, places = normal(2, 12, 24), normal(2, 24, seed=1), grid_positions(3, 2, 2).double()
    shift = torch.tensor([5.0, -3.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(block(x, time, positions=places + shift), block(x, time, positions=places))
    assert (block(x, time, positions=2 * places) - block(x, time, positions=places)).abs().max() > 1e-4
    each = torch.stack([places, places + shift])
    torch.testing.assert_close(block(x, time, positions=each), block(x, time, positions=places))


def test_self_attention_without_positions_ignores_order():
    block = opened(DiTBlock(16, 2))
    x, time, order = normal(1, 6, 16), normal(1, 16, seed=1), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(block(x[:, order], time), block(x, time)[:, order])


def test_lookahead_mask_and_band():
    block = opened(DiTBlock(16, 2, cross="plain", cross_affine=False, rope="1d", rope_on_cross=True))
    x, context, time = normal(1, 12, 16), normal(1, 12, 16, seed=2), normal(1, 16, seed=1)
    given = dict(
        positions=torch.arange(12),
        context_positions=torch.arange(12),
        mask=MaskSpec("frame_lookahead", lookahead=2),
        cross_mask=MaskSpec("band", lookahead=1),
    )
    later, other = x.clone(), context.clone()
    later[:, 8:], other[:, 8:] = 0, 0
    first, second = block(x, time, context=context, **given), block(later, time, context=other, **given)
    assert torch.equal(first[:, :6], second[:, :6]) and not torch.equal(first[:, 6], second[:, 6])


def test_attention_is_the_formula():
    layer = opened(Attention(12, 3, context_dim=5))
    x, context = normal(2, 4, 12), normal(2, 7, 5, seed=1)
    q, k, v = layer.project(x, context)
    weights = (q @ k.transpose(2, 3) / 2).softmax(-1)
    torch.testing.assert_close(layer(x, context), layer.to_out((weights @ v).transpose(1, 2).flatten(2)))
    norm = HeadNorm(3, 4).double()
    torch.testing.assert_close(norm(q).square().mean(-1), torch.ones(2, 3, 4, dtype=torch.float64))


def test_gradients():
    block = opened(DiTBlock(6, 1, cross="plain", qk_norm=True, rope="3d"))
    inputs = (
        normal(1, 3, 6).requires_grad_(),
        normal(1, 6, seed=1).requires_grad_(),
        normal(1, 2, 6, seed=2).requires_grad_(),
    )
    places = grid_positions(3, 1, 1).double()
    assert torch.autograd.gradcheck(lambda x, time, context: block(x, time, context=context, positions=places), inputs)


def test_time_embedding_and_axes():
    features = sinusoid(torch.tensor([0.0, 2.0], dtype=torch.float64), 6)
    assert features[0].tolist() == [1, 1, 1, 0, 0, 0] and features.dtype == torch.float64
    assert torch.equal(sinusoid(torch.tensor(2.0), 6, order="sin_cos"), sinusoid(torch.tensor(2.0), 6).roll(3))
    embed = TimestepEmbedding(8)
    torch.testing.assert_close(embed(0.5), embed.mlp(sinusoid(torch.tensor(500.0), 256)))
    assert rope_axes(128) == (44, 42, 42) and rope_axes(24) == (8, 8, 8)
    assert grid_positions(2, 2, 3).tolist()[-1] == [1, 1, 2] and grid_positions(2, 2, 3).tolist()[1] == [0, 0, 1]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: DiTBlock(10, 3), "dim"),
        (lambda: DiTBlock(8, 2, cross="gated"), "cross"),
        (lambda: DiTBlock(8, 2, rope="2d"), "rope"),
        (lambda: DiTBlock(8, 2, modulation="none"), "modulation"),
        (lambda: DiTBlock(8, 2, rope="3d"), "head_dim"),
        (lambda: DiTBlock(8, 2)(torch.ones(1, 3, 8), torch.ones(1, 8), context=torch.ones(1, 2, 8)), "context"),
        (lambda: DiTBlock(8, 2, cross="plain")(torch.ones(1, 3, 8), torch.ones(1, 8)), "context"),
        (lambda: DiTBlock(8, 2)(torch.ones(1, 3, 8), torch.ones(1, 3, 8)), "time"),
        (lambda: DiTBlock(8, 2, modulation="shared")(torch.ones(1, 3, 8), torch.ones(1, 8)), "time"),
        (lambda: sinusoid(torch.ones(1), 5), "width"),
        (lambda: Attention(8, 2)(torch.ones(1, 3, 8), torch.ones(1, 2, 8)), "context"),
    ],
)
def test_refusals_name_the_argument(call, word):
    with pytest.raises(ValueError, match=word):
        call()


@pytest.mark.parametrize("rope", [None, "3d"])
def test_packed_samples_are_samples(rope):
    block = opened(DiTBlock(24, 2, cross="plain", context_dim=10, qk_norm=True, rope=rope, per_token_time=True))
    sizes, ends = [4, 1, 6], torch.tensor([0, 4, 5, 11])
    tokens, time, context = normal(1, 11, 24, seed=1), normal(1, 11, 24, seed=2), [normal(1, count, 10, seed=3 + count) for count in (3, 5, 2)]
    places = torch.arange(33).reshape(11, 3) if rope else None
    row = block(tokens, time, context=torch.cat(context, 1), positions=places, cu_seqlens=ends, context_cu_seqlens=torch.tensor([0, 3, 8, 10]))
    for sample, (first, last) in enumerate(pairwise(ends)):
        own = block(tokens[:, first:last], time[:, first:last], context=context[sample], positions=places[first:last] if rope else None)
        torch.testing.assert_close(row[:, first:last], own)
    assert sum(sizes) == row.shape[1]


def test_packed_samples_take_no_padding():
    attention = Attention(8, 2).double()
    with pytest.raises(ValueError, match="cu_seqlens"):
        attention(normal(1, 4, 8), cu_seqlens=torch.tensor([0, 4]), valid=(torch.tensor([0]), torch.tensor([4])))
    with pytest.raises(ValueError, match="cu_seqlens"):
        attention(normal(2, 4, 8), cu_seqlens=torch.tensor([0, 4]))
