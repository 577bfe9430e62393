"""Cache, causal convolution and rotary positions: the law of pieces, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.lm.cache import Cache
from papers10.lm.conv import causal_depthwise_conv
from papers10.lm.rope import rebase, rotary, rotary_frequencies, yarn_temperature


def draw(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed, "lm", *shape), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    taps=st.integers(1, 6),
    channels=st.integers(1, 3),
    multiple=st.integers(1, 3),
)
def test_convolution_can_be_cut_anywhere(lengths, taps, channels, multiple):
    x, weight = draw(2, sum(lengths), channels), draw(channels * multiple, taps)
    whole, end = causal_depthwise_conv(x, weight)
    state, pieces = None, []
    for piece in x.split(lengths, 1):
        y, state = causal_depthwise_conv(piece, weight, state)
        pieces.append(y)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-12) and torch.equal(state, end)
    for t in range(sum(lengths)):
        by_hand = sum(
            weight[:, taps - 1 - s].view(channels, multiple) * x[:, t - s, :, None] for s in range(min(taps, t + 1))
        )
        assert torch.allclose(whole[:, t], by_hand.flatten(1), atol=1e-12)


def test_convolution_names_what_does_not_fit():
    x = draw(2, 3, 4)
    for arguments, name in (
        ((x[0], draw(4, 2)), "x"),
        ((x, draw(5, 2)), "weight"),
        ((x, draw(4, 3), draw(2, 1, 4)), "state"),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            causal_depthwise_conv(*arguments)


class Counter:
    """A state that is no tensor, as a memory would be."""

    def __init__(self, values):
        self.values = values

    def clone(self):
        return Counter(list(self.values))

    def reorder(self, index):
        return Counter([self.values[i] for i in index.tolist()])

    def state_dict(self):
        return {"values": list(self.values)}

    def load_state_dict(self, state):
        self.values = state["values"]


def test_cache_treats_objects_as_it_treats_tensors():
    cache = Cache(2)
    cache.layers[1]["memory"], cache.trunk["start"] = Counter([1, 2]), torch.tensor([3, 4])
    copy = cache.clone().reorder(torch.tensor([1, 1, 0]))
    assert copy.layers[1]["memory"].values == [2, 2, 1] and copy.trunk["start"].tolist() == [4, 4, 3]
    assert cache.layers[1]["memory"].values == [1, 2]
    other = cache.clone()
    other.layers[1]["memory"].values = [9, 9]
    other.load_state_dict(cache.state_dict())
    assert other.layers[1]["memory"].values == [1, 2]


def test_restart_keeps_what_is_named():
    cache = Cache(2)
    cache.seen_tokens, cache.trunk["start"] = 5, torch.tensor([1])
    cache.layers[0].update(k=torch.ones(1), memory=torch.ones(2))
    cache.layers[1].update(k=torch.ones(1), count=3)
    assert cache.restart("memory", "count") is cache and cache.seen_tokens == 0 and not cache.trunk
    assert [list(states) for states in cache.layers] == [["memory"], ["count"]]
    assert cache.restart().layers == [{}, {}]


def test_cache_detaches_casts_and_refuses():
    cache = Cache(1)
    cache.layers[0]["k"] = torch.ones(2, 1, requires_grad=True) * 2
    cache.layers[0]["index"] = torch.tensor([1, 2])
    assert not cache.detach_().layers[0]["k"].requires_grad
    cache.to(torch.bfloat16)
    assert cache.layers[0]["k"].dtype == torch.bfloat16 and cache.layers[0]["index"].dtype == torch.int64
    with pytest.raises(ValueError, match="index"):
        cache.reorder(torch.tensor([0.0]))
    with pytest.raises(ValueError, match="num_layers"):
        Cache(-1)
    with pytest.raises(ValueError, match="num_layers"):
        Cache(2).load_state_dict(cache.state_dict())


@settings(max_examples=30, deadline=None)
@given(half=st.integers(1, 6), shift=st.integers(-9, 9), layout=st.sampled_from(["half", "interleaved"]))
def test_rotation_sees_distance_only(half, shift, layout):
    q, k = draw(1, 5, 2 * half), draw(1, 5, 2 * half, seed=1)
    places = torch.arange(5)
    near = rotary(q, places, layout=layout) @ rotary(k, places, layout=layout).transpose(1, 2)
    far = rotary(q, places + shift, layout=layout) @ rebase(
        rotary(k, places, layout=layout), shift, layout=layout
    ).transpose(1, 2)
    assert torch.allclose(near, far, atol=1e-10)


def test_layouts_are_the_same_rotation():
    x, places = draw(1, 4, 6), torch.arange(4)
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    assert torch.allclose(rotary(x, places)[..., order], rotary(x[..., order], places, layout="interleaved"))
    with pytest.raises(ValueError, match="even"):
        rotary(x[..., :5], places)
    with pytest.raises(ValueError, match="axes"):
        rotary(x, torch.zeros(4, 2), axes=(2, 2))


@pytest.mark.parametrize("width, fraction", [(64, 1.0), (64, 0.25), (96, 0.5)])
@pytest.mark.parametrize("factor, length, base", [(4.0, 4096, 1e4), (64.0, 2048, 1e4), (1.5, 512, 1e6), (20.0, 64, 1e4)])
def test_yarn_is_that_of_transformers(width, fraction, factor, length, base):
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, max_position_embeddings=int(length * factor),
        rope_parameters={
            "rope_type": "yarn", "rope_theta": base, "factor": factor, "original_max_position_embeddings": length,
            "partial_rotary_factor": fraction,
        },
    )
    frequencies, temperature = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    turned, options = round(width * fraction), dict(base=base, yarn=factor, original_length=length)
    # transformers computes them in float32.
    torch.testing.assert_close(rotary_frequencies(turned, **options), frequencies.double(), rtol=1e-6, atol=0)
    assert abs(yarn_temperature(factor) - temperature) < 1e-12
    x, places = draw(1, 1, 9, width), torch.arange(9)
    angles = places[:, None] * rotary_frequencies(turned, **options)
    angles = torch.cat([angles, angles], -1)[None]
    wanted, _ = apply_rotary_pos_emb(x[..., :turned], x[..., :turned], angles.cos() * temperature, angles.sin() * temperature)
    out = rotary(x, places, fraction=fraction, **options)
    assert torch.allclose(out[..., :turned], wanted, atol=1e-12) and torch.equal(out[..., turned:], x[..., turned:])


def test_yarn_names_what_does_not_fit():
    x, places = draw(1, 4, 8), torch.arange(4)
    assert torch.equal(rotary(x, places, yarn=1.0, original_length=16), rotary(x, places))
    assert rotary_frequencies(8, yarn=4.0, original_length=1).isfinite().all()
    for options, name in (
        (dict(yarn=4.0), "original_length"),
        (dict(yarn=0.5, original_length=16), "yarn"),
        (dict(yarn=4.0, original_length=0), "original_length"),
        (dict(yarn=4.0, original_length=16, beta_fast=1.0), "beta_fast"),
        (dict(yarn=4.0, original_length=16, axes=(4, 4)), "yarn"),
    ):
        with pytest.raises(ValueError, match=name):
            rotary(x, places, **options)
