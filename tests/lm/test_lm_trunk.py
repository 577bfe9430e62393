"""Layers and trunk: pieces equal the whole, padding changes nothing, labels, plug-ins, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from papers10.core.config import from_mapping, to_mapping
from papers10.core.random import generator
from papers10.lm.layers import Attention, RMSNorm, SwiGLU, float32_linear
from papers10.lm.trunk import AdditiveResidual, CausalLM, TrunkConfig, set_rope_scaling, width_scaled_init

FULL = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "qk_norm": "after_rope",
    "attention_gate": True,
    "attention_norm": True,
    "key_shift": True,
    "value_shift": True,
    "rope_fraction": 0.5,
    "logit_scale": 0.5,
}
KINDS = {
    "plain": {},
    "everything": FULL,
    "sigmoid gate": {"attention_gate": "sigmoid"},
    "yarn": {"rope_factor": 4.0, "rope_original_length": 6, "qk_norm": "after_rope"},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "untied gelu": {"tie_embeddings": False, "mlp": "gelu", "qk_norm": "before_rope"},
}


def build(seed=0, **options):
    config = TrunkConfig(
        **{"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "init_std": 0.3, **options}
    )
    model = CausalLM(config).double()
    model.initialise(generator(seed, "init"))
    return model


def ids(batch=2, time=9, seed=0):
    return torch.randint(19, (batch, time), generator=generator(seed, "ids"))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_pieces_equal_the_whole(kind, lengths):
    model, tokens = build(**KINDS[kind]), ids(time=sum(lengths))
    cache = model.new_cache()
    pieces = [model(piece, cache=cache).logits for piece in tokens.split(lengths, 1)]
    assert torch.allclose(torch.cat(pieces, 1), model(tokens).logits, atol=1e-11)
    assert cache.seen_tokens == sum(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    model, tokens = build(**KINDS[kind]), ids()
    wanted = model(tokens).logits
    for left, right in ((3, 0), (0, 2)):
        padded, mask = F.pad(tokens, (left, right), value=7), F.pad(torch.ones_like(tokens), (left, right))
        out = model(padded, attention_mask=mask).logits[:, left : left + 9]
        assert torch.allclose(out, wanted, atol=1e-11)
    # Left padding with a cache, the mask given once, for all tokens so far, or for the new ones.
    padded, mask = F.pad(tokens, (3, 0)), F.pad(torch.ones_like(tokens), (3, 0))
    for later in (None, mask, mask[:, 6:]):
        cache = model.new_cache()
        model(padded[:, :6], cache=cache, attention_mask=mask[:, :6])
        out = model(padded[:, 6:], cache=cache, attention_mask=later).logits
        assert torch.allclose(out, wanted[:, 3:], atol=1e-11)


def test_future_is_not_seen():
    model, tokens = build(), ids()
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 19
    assert torch.equal(model(tokens).logits[:, :5], model(changed).logits[:, :5])


def test_window_override_is_the_configs_window():
    wide, narrow = build(), build(window=3)
    assert torch.allclose(wide(ids(), window=3).logits, narrow(ids()).logits, atol=1e-12)
    with pytest.raises(ValueError, match="window"):
        narrow(ids(), window=4, cache=narrow.new_cache())


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_loss_is_shifted_cross_entropy(scale):
    model, tokens = build(logit_scale=scale), ids()
    labels = tokens.clone()
    labels[0, 3:5] = -100
    out = model(tokens, labels=labels)
    wanted = F.cross_entropy(out.logits[:, :-1].reshape(-1, 19), labels[:, 1:].reshape(-1))
    assert torch.allclose(out.loss, wanted)
    assert torch.allclose(model(tokens, labels=labels, return_logits=False).loss, wanted)
    nothing = model(tokens, labels=torch.full_like(labels, -100)).loss
    nothing.backward()
    assert nothing == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_gradients_of_both_losses_agree():
    model, tokens = build(), ids()
    grads = []
    for keep in (True, False):
        model.zero_grad()
        model(tokens, labels=tokens, return_logits=keep).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads))


def test_empty_sequences():
    model = build()
    assert model(ids(time=0)).logits.shape == (2, 0, 19) and model(ids(batch=0)).logits.shape == (0, 9, 19)
    assert model(ids(time=0), labels=ids(time=0)).loss == 0
    assert model(ids(time=1), labels=ids(time=1)).loss == 0


def test_bad_input_is_named():
    model, tokens = build(), ids()
    with pytest.raises(IndexError, match="ids"):
        model(torch.full_like(tokens, 19))
    with pytest.raises(IndexError, match=r"\[0, 19\)"):
        model(tokens, labels=torch.full_like(tokens, 19))
    with pytest.raises(IndexError):
        model(tokens, labels=torch.full_like(tokens, -1))
    with pytest.raises(ValueError, match="labels"):
        model(tokens, labels=tokens[:, 1:])
    with pytest.raises(ValueError, match="ids"):
        model(tokens.float())
    with pytest.raises(ValueError, match="holes"):
        model(tokens, attention_mask=torch.tensor([[1, 0, 1] * 3] * 2))
    with pytest.raises(ValueError, match="left"):
        model(tokens, attention_mask=F.pad(torch.ones(2, 7), (0, 2)), cache=model.new_cache())
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="cache"):
        model(tokens, cache=build(num_layers=1).new_cache())
    for options, name in (
        ({"num_heads": 3}, "num_heads"),
        ({"num_kv_heads": 3, "num_heads": 4}, "num_kv_heads"),
        ({"head_dim": 3}, "head_dim"),
    ):
        with pytest.raises(ValueError, match=name):
            build(**options)
    with pytest.raises(ValueError, match="did you mean 'rope_base'"):
        build(rope_bas=1.0)


class Recorder(AdditiveResidual):
    def __init__(self):
        super().__init__()
        self.calls = []

    def write(self, state, branch, context, layer, x_in):
        self.calls.append(layer)
        return super().write(state, branch, context, layer, x_in)


class Extra(nn.Module):
    def __init__(self, placement):
        super().__init__()
        self.placement, self.scale = placement, nn.Parameter(torch.ones(()))
        self.fp32_modules = ("inner",)
        self.inner = nn.Linear(2, 2)

    def forward(self, x, *, cache=None):
        return x * self.scale, {"size": x.abs().mean()}


def test_plug_ins_are_called_in_order():
    config = TrunkConfig(vocab_size=19, hidden_size=16, num_layers=3, num_heads=2)
    extra = {0: Extra("before_mixer"), 1: Extra("replace_mlp"), 2: Extra("after_mixer")}
    residual = Recorder()
    seen = []
    model = CausalLM(
        config,
        residual=residual,
        extra=extra,
        mixer=lambda config, block: seen.append(block) or Attention(config, block),
        channel=lambda config, block: SwiGLU(config, block),
    )
    out = model(ids())
    assert seen == [0, 1, 2] and residual.calls == [6, 0, 1, 2, 3, 4, 7, 5]
    assert set(out.aux) == {"blocks.0.size", "blocks.1.size", "blocks.2.size"}
    assert model.fp32_modules == ("extra.0.inner", "extra.1.inner", "extra.2.inner")
    with pytest.raises(ValueError, match="placement"):
        CausalLM(config, extra={0: Extra("somewhere")})
    with pytest.raises(ValueError, match="extra"):
        CausalLM(config, extra={3: Extra("after_mixer")})


class OwnNorm(nn.Module):
    own_norm = True

    def __init__(self, placement):
        super().__init__()
        self.placement, self.seen = placement, None

    def forward(self, x, *, cache=None):
        self.seen = x
        return torch.zeros_like(x)


@pytest.mark.parametrize("placement", ["before_mixer", "after_mixer", "replace_mlp"])
def test_a_module_with_its_own_norm_sees_the_residual_stream(placement):
    config = TrunkConfig(vocab_size=19, hidden_size=16, num_layers=2, num_heads=2)
    module = OwnNorm(placement)
    model = CausalLM(config, extra={0: module})
    model(ids())
    stream = model.embed(ids())
    if placement != "before_mixer":
        stream = stream + model.blocks[0].mixer(model.blocks[0].mixer_norm(stream))
    assert torch.equal(module.seen, stream) and len(model.extra_norms) == 0
    missing = {"blocks.0.channel_norm.weight"} if placement == "replace_mlp" else set()
    names = {name for name in CausalLM(config).state_dict() if placement != "replace_mlp" or ".0.channel." not in name}
    assert set(model.state_dict()) == names - missing


def test_several_modules_in_one_block_run_in_order():
    config = TrunkConfig(vocab_size=19, hidden_size=16, num_layers=2, num_heads=2)
    residual, parts = Recorder(), [Extra("before_mixer"), OwnNorm("after_mixer"), Extra("before_mixer"), Extra("replace_mlp")]
    model = CausalLM(config, residual=residual, extra={1: parts, 0: Extra("after_mixer")})
    model(ids())
    assert residual.calls == [0, 4, 1, 5, 7, 2, 6, 3] and list(model.extra) == ["0", "1", "1_1", "1_2", "1_3"]
    assert list(model.extra_norms) == ["0", "1", "1_2"]
    with pytest.raises(ValueError, match="at most one"):
        CausalLM(config, extra={1: [OwnNorm("replace_mlp"), OwnNorm("replace_mlp")]})


def test_output_gate_is_silu_or_sigmoid():
    layers = {gate: Attention(TrunkConfig(vocab_size=19, hidden_size=16, num_layers=1, num_heads=2, attention_gate=gate))
              for gate in (True, "silu", "sigmoid", False)}
    x = torch.randn(2, 5, 16, generator=generator(0, "x"))
    for gate in (True, "silu", "sigmoid"):
        layers[gate].load_state_dict(layers[True].state_dict())
    layers[False].load_state_dict(layers[True].state_dict(), strict=False)
    layers[False].o_proj = nn.Identity()
    mixed, logits = layers[False](x), layers[True].g_proj(x)
    for gate, function in ((True, F.silu), ("silu", F.silu), ("sigmoid", torch.sigmoid)):
        wanted = layers[gate].o_proj(mixed * function(logits))
        assert torch.allclose(layers[gate](x), wanted, atol=1e-6)
        config = TrunkConfig(vocab_size=19, hidden_size=16, num_layers=1, num_heads=2, attention_gate=gate)
        assert from_mapping(TrunkConfig, to_mapping(config)) == config and to_mapping(config)["attention_gate"] == gate
    with pytest.raises(ValueError, match="attention_gate"):
        build(attention_gate="tanh")


def test_same_generator_same_weights():
    a, b, c = build(seed=1), build(seed=1), build(seed=2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed.weight, c.embed.weight)
    width_scaled_init(a, hidden_size=16, num_layers=2, generator=generator(3, "w"), skip=("up_proj.weight",))
    assert torch.equal(a.blocks[0].channel.up_proj.weight, b.blocks[0].channel.up_proj.weight)
    assert abs(a.embed.weight.std().item() - 0.02) < 0.004
    assert abs(a.blocks[0].mixer.o_proj.weight.std().item() * math.sqrt(16 * 2) - 0.5) < 0.1


def test_bfloat16_autocast_trains():
    model = build(**FULL).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids(), labels=ids()).loss
        streamed = model(ids(), labels=ids(), return_logits=False).loss
        cache = model.new_cache()
        model(ids(), cache=cache), model(ids(time=1), cache=cache)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - streamed) < 0.05
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_norm_and_gate_helper():
    x = torch.randn(3, 8, generator=generator(0, "x"), dtype=torch.float64)
    assert torch.allclose(RMSNorm(8, 0.1).double()(x), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt())
    layer = nn.Linear(8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert float32_linear(x.float(), layer).dtype == torch.float32
        assert float32_linear(x, layer).dtype == torch.float64


def test_stretched_trunk_is_llama_with_yarn():
    transformers = pytest.importorskip("transformers")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=19, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
        rms_norm_eps=1e-5, max_position_embeddings=64, tie_word_embeddings=True, rope_parameters=yarn,
    )).double().eval()
    random = generator(0, "llama")
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.ndim == 2:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=random))
    config = TrunkConfig(vocab_size=19, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, mlp_size=48)
    model = CausalLM(config).double()
    weights = {"embed.weight": theirs.model.embed_tokens.weight, "final_norm.weight": theirs.model.norm.weight}
    for i, block in enumerate(theirs.model.layers):
        parts = {"mixer": block.self_attn, "channel": block.mlp, "mixer_norm": block.input_layernorm, "channel_norm": block.post_attention_layernorm}
        weights |= {f"blocks.{i}.{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    model.load_state_dict(weights)
    tokens = ids(time=60)
    plain = model(tokens).logits
    assert set_rope_scaling(model, 4.0, 16) is model
    out, wanted = model(tokens).logits, theirs(tokens).logits
    # transformers turns by float32 angles: up to 60 radians times 6e-8.
    assert torch.allclose(out, wanted, atol=1e-5) and not torch.allclose(out, plain, atol=0.1)
    again = CausalLM(model.config).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens).logits, out)
    assert torch.equal(set_rope_scaling(model, 1)(tokens).logits, plain)
    assert torch.equal(set_rope_scaling(model, 4)(tokens).logits, out)


def test_stretching_keeps_the_temperature_after_a_norm():
    x = torch.randn(1, 6, 16, generator=generator(0, "x"), dtype=torch.float64)
    layers = {}
    for factor in (1.0, 4.0):
        config = TrunkConfig(vocab_size=19, hidden_size=16, num_layers=1, num_heads=2, qk_norm="after_rope",
                             rope_factor=factor, rope_original_length=10**9)
        layers[factor] = Attention(config).double()
        layers[factor].load_state_dict(layers[1.0].state_dict())
    # Trained on 10⁹ tokens every pair keeps its speed, so that only the temperature is left.
    with torch.no_grad():
        for norm in (layers[1.0].q_norm, layers[1.0].k_norm):
            norm.weight.mul_(1 + 0.1 * math.log(4))
    assert torch.allclose(layers[4.0](x), layers[1.0](x), atol=1e-12)


def test_stretching_names_what_does_not_fit():
    for factor, length, name in ((4.0, None, "original_length"), (0.5, 16, "yarn")):
        with pytest.raises(ValueError, match=name):
            set_rope_scaling(build(), factor, length)
        with pytest.raises(ValueError, match=name):
            build(rope_factor=factor, rope_original_length=length)
    with pytest.raises(ValueError, match="Attention"):
        set_rope_scaling(nn.Linear(2, 2), 2.0, 16)
