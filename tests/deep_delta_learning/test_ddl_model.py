import json
import math

import pytest
import torch

from papers10.core.config import ConfigError, from_mapping, replace, to_mapping
from papers10.deep_delta_learning.model import (
    VARIANTS,
    DDLBlock,
    DDLCausalLM,
    DDLConfig,
    DDLModel,
    convert_additive_checkpoint,
    flops_per_token,
    from_additive,
    iso_flop_steps,
    residual_flops,
    variant,
)
from papers10.lm.cache import Cache
from papers10.lm.optim import parameter_groups

SIZE = dict(vocab_size=40, hidden_size=24, num_layers=2, num_heads=2)
OPTIONS = {
    "head_norm": dict(attention_norm=True),
    "output_gate": dict(attention_gate=True),
    "both": dict(attention_norm=True, attention_gate=True),
    "key_shift": dict(key_shift=True),
    "value_shift": dict(value_shift=True),
    "activations": dict(query_activation="silu", key_activation="relu", value_activation="elu+1"),
    "half_rope": dict(rope_fraction=0.5),
    "no_qk_norm": dict(qk_norm="none"),
    "v_map": dict(mapping="v"),
    "two_layer_gate": dict(beta_hidden=5),
    "window": dict(window=3),
}


def ids(batch=2, time=12, seed=0):
    return torch.randint(0, 40, (batch, time), generator=torch.Generator().manual_seed(seed))


def rough(config, seed=0):
    """A model whose every parameter is random, so that no part of a cache can be forgotten without being noticed."""
    model = DDLCausalLM(config, seed=seed).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.15)
    return model


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 5, 6])
def test_cached_decoding_equals_the_full_forward(name, prompt):
    model, tokens = rough(variant(name, **SIZE)), ids()
    with torch.no_grad():
        full = model(tokens).logits
        cache = Cache(2)
        parts = [model(tokens[:, :prompt], cache=cache).logits]
        for place in range(prompt, 12):
            parts.append(model(tokens[:, place : place + 1], cache=cache).logits)
    assert cache.seen_tokens == 12
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ddl-tc", "ddl-cc"])
@pytest.mark.parametrize("options", OPTIONS)
def test_attention_options_stream_too(name, options):
    model, tokens = rough(variant(name, **SIZE, **OPTIONS[options])), ids()
    with torch.no_grad():
        full = model(tokens).logits
        for cuts in ([1, 2, 3], [5], [1, 4, 9]):
            cache, parts, start = Cache(2), [], 0
            for end in [*cuts, 12]:
                parts.append(model(tokens[:, start:end], cache=cache).logits)
                start = end
            torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["add", "ddl", "ddl-tc", "ddl-cc", "hc"])
def test_left_padding_changes_nothing(name):
    model, tokens = rough(variant(name, **SIZE)), ids(1, 7)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), tokens], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 7, dtype=torch.int64)], 1)
    with torch.no_grad():
        plain = model(tokens).logits
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 4:], plain, atol=1e-5, rtol=0)
        cache = Cache(2)
        model(padded[:, :6], attention_mask=mask[:, :6], cache=cache)
        rest = model(padded[:, 6:], attention_mask=mask, cache=cache).logits
        torch.testing.assert_close(rest, plain[:, 2:], atol=1e-5, rtol=0)


def test_the_future_is_not_seen():
    for name in VARIANTS:
        model, tokens = rough(variant(name, **SIZE)), ids()
        changed = tokens.clone()
        changed[:, 8] = (changed[:, 8] + 1) % 40
        with torch.no_grad():
            assert torch.equal(model(tokens).logits[:, :8], model(changed).logits[:, :8])


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name):
    model = rough(variant(name, **SIZE))
    model(ids(), labels=ids()).loss.backward()
    dead = [
        n
        for n, p in model.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.abs().sum()
    ]
    assert not dead


def test_loss_is_shifted_and_ignores_minus_one_hundred():
    model, tokens = rough(variant("ddl", **SIZE)), ids()
    out = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, 40), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(out.loss, expected)
    labels = tokens.clone()
    labels[:, :6] = -100
    expected = torch.nn.functional.cross_entropy(out.logits[:, 5:-1].reshape(-1, 40), tokens[:, 6:].reshape(-1))
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected)
    with pytest.raises(IndexError):
        model(tokens, labels=tokens + 40)


def test_empty_text():
    for name in ("ddl", "ddl-tc", "ddl-cc"):
        assert rough(variant(name, **SIZE))(ids(2, 0)).logits.shape == (2, 0, 40)


def test_initialisation_follows_the_paper():
    config = variant("ddl-tc", vocab_size=512, hidden_size=256, num_layers=4, num_heads=2, beta_init=0.5)
    model = DDLCausalLM(config, seed=0)
    hidden, output = 0.5 / math.sqrt(256), 0.5 / math.sqrt(256 * 4)
    for name, parameter in model.named_parameters():
        if name == "embed.weight":
            expected = 0.02
        elif ".delta." in name and name.endswith("gate.output.bias"):
            assert parameter.item() == pytest.approx(math.log(0.25 / 0.75), abs=1e-6)
            continue
        elif name.endswith("read"):
            assert parameter.tolist() == [0.25] * 4
            continue
        elif name == "residual.expand.weight":
            assert parameter[..., -1].eq(1).all() and parameter[..., :-1].eq(0).all()
            continue
        elif name.endswith("bias"):
            assert parameter.eq(0).all(), name
            continue
        elif parameter.dim() < 2:
            assert parameter.eq(1).all(), name
            continue
        else:
            expected = output if name in model.output_projections() else hidden
        spread = 4 / math.sqrt(2 * parameter.numel())
        assert parameter.std().item() == pytest.approx(expected, rel=spread), name
    assert len(model.output_projections()) == 8


def test_variants_share_the_initial_weights_of_their_twin():
    additive, delta = DDLCausalLM(variant("add", **SIZE), seed=3), DDLCausalLM(variant("ddl-cc", **SIZE), seed=3)
    shared = additive.state_dict()
    assert set(shared) < set(delta.state_dict())
    assert all(torch.equal(value, delta.state_dict()[name]) for name, value in shared.items())
    other = DDLCausalLM(variant("add", **SIZE), seed=4)
    assert not torch.equal(other.state_dict()["embed.weight"], shared["embed.weight"])


def test_mup_scales_the_logits():
    plain, scaled = (
        DDLCausalLM(variant("ddl", **SIZE), seed=0),
        DDLCausalLM(variant("ddl", **SIZE, mup=True, mup_base=48), seed=0),
    )
    torch.testing.assert_close(scaled(ids()).logits, 2 * plain(ids()).logits)


def test_weight_decay_spares_biases_norms_and_readouts():
    model = DDLCausalLM(variant("ddl-cc", **SIZE))
    groups = parameter_groups(model, 0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        spared = name.endswith(("bias", "read")) or parameter.dim() < 2
        assert (id(parameter) not in decayed) == spared, name


def test_autocast_keeps_gates_in_float32():
    model, tokens = DDLCausalLM(variant("ddl-cc", **SIZE), seed=0), ids()
    gates = []
    for layer in model.residual.delta:
        layer.gate.register_forward_hook(lambda module, inputs, output: gates.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    assert len(gates) == 4 and all(gate.dtype == torch.float32 for gate in gates)
    reference = model(tokens, labels=tokens).loss
    assert abs(loss.item() - reference.item()) < 0.05


def test_additive_with_channels_is_the_additive_model():
    """With repetition at the entrance and equal channels, n channels carry the same sum: the models are one function."""
    plain = rough(variant("add", **SIZE))
    wide = from_additive(plain.state_dict(), variant("add-cc", **SIZE))
    with torch.no_grad():
        for compressor in [*wide.residual.compress, wide.residual.readout]:
            compressor.read.fill_(1.0)
            compressor.weight.zero_()
            compressor.weight[:, 1] = 0.25
            torch.testing.assert_close(compressor.fold(), torch.full((24, 4), 0.25))
        torch.testing.assert_close(wide(ids()).logits, plain(ids()).logits, atol=1e-5, rtol=0)


def test_hyper_connections_start_as_the_additive_model_up_to_the_final_scale():
    plain, wide = DDLCausalLM(variant("add", **SIZE), seed=0), DDLCausalLM(variant("hc", **SIZE), seed=0)
    torch.testing.assert_close(wide(ids()).logits, plain(ids()).logits, atol=2e-2, rtol=0)


def nanogpt(state, layers, fused, transposed):
    """The same weights under the names of nanoGPT (fused query-key-value, as GPT-2) or of the released models."""
    result = {
        "transformer.wte.weight": state["embed.weight"],
        "lm_head.weight": state["embed.weight"],
        "transformer.ln_f.weight": state["final_norm.weight"],
    }
    turn = (lambda w: w.T.contiguous()) if transposed else (lambda w: w)  # GPT-2 stores [inputs, outputs]
    for layer in range(layers):
        names = DDLCausalLM.block_names(layer)
        target = f"transformer.h.{layer}."
        q, k, v = (state[names[part]] for part in ("query", "key", "value"))
        if fused:
            result[target + "attn.c_attn.weight"] = turn(torch.cat([q, k, v]))
        else:
            result |= {target + "attn.c_q.weight": q, target + "attn.c_k.weight": k, target + "attn.c_v.weight": v}
        result[target + "attn.c_proj.weight"] = turn(state[names["attention_output"]])
        result[target + "mlp.c_fc1.weight"], result[target + "mlp.c_fc2.weight"] = (
            turn(state[names["mlp_gate"]]),
            turn(state[names["mlp_up"]]),
        )
        result[target + "mlp.c_proj.weight"] = turn(state[names["mlp_output"]])
        result[target + "ln_1.weight"], result[target + "ln_2.weight"] = state[names["norm_1"]], state[names["norm_2"]]
        result[target + "attn.q_rms.weight"], result[target + "attn.k_rms.weight"] = (
            state[names["query_norm"]],
            state[names["key_norm"]],
        )
    return result


@pytest.mark.parametrize(("fused", "transposed"), [(False, False), (True, False), (True, True)])
def test_weights_of_plain_gpts_are_taken_over(fused, transposed):
    plain = rough(variant("add", **SIZE))
    foreign = nanogpt(plain.state_dict(), 2, fused, transposed)
    twin = from_additive(foreign, variant("add", **SIZE))
    with torch.no_grad():
        torch.testing.assert_close(twin(ids()).logits, plain(ids()).logits)
    delta = from_additive(foreign, variant("ddl-cc", **SIZE), seed=1)
    assert all(torch.equal(delta.state_dict()[name], value) for name, value in plain.state_dict().items())
    converted = convert_additive_checkpoint(foreign, variant("ddl", **SIZE))
    assert set(converted) == set(plain.state_dict())


def test_conversion_refuses_what_has_no_place():
    foreign = nanogpt(rough(variant("add", **SIZE)).state_dict(), 2, True, False)
    with pytest.raises(ValueError, match="transformer.wpe.weight"):
        convert_additive_checkpoint(foreign | {"transformer.wpe.weight": torch.zeros(8, 24)}, variant("ddl", **SIZE))
    kept = convert_additive_checkpoint(
        foreign | {"transformer.wpe.weight": torch.zeros(8, 24)}, variant("ddl", **SIZE), ignore=("wpe",)
    )
    assert "embed.weight" in kept
    missing = {name: value for name, value in foreign.items() if "h.1.mlp.c_proj" not in name}
    with pytest.raises(ValueError, match="missing"):
        convert_additive_checkpoint(missing, variant("ddl", **SIZE))
    with pytest.raises(ValueError, match="expected shape"):
        convert_additive_checkpoint(foreign, variant("ddl", **{**SIZE, "hidden_size": 32}))
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    assert set(convert_additive_checkpoint(foreign | mask, variant("ddl", **SIZE))) == set(kept)


def test_block_is_a_sublayer_pair_of_the_model():
    config = variant("ddl-cc", **SIZE)
    torch.manual_seed(0)
    block = DDLBlock(config)
    state = torch.randn(2, 5, 24, 4)
    assert block(state).shape == state.shape
    assert DDLBlock(variant("ddl", **SIZE))(state[..., 0].contiguous()).shape == (2, 5, 24)


def test_headless_model_gives_what_the_head_sees():
    config = variant("ddl", **SIZE)
    model = rough(config)
    body = DDLModel(config)
    body.load_state_dict(model.state_dict())
    hidden = body.eval()(ids())
    torch.testing.assert_close(hidden @ model.state_dict()["embed.weight"].T, model(ids()).logits)


def test_flops_grow_as_the_formulas_say():
    size = dict(vocab_size=50304, hidden_size=768, num_layers=12, num_heads=6)
    assert residual_flops(variant("add", **size)) == 0
    d, n = 768, 4
    per_sublayer = 2 * d * n + 2 * d * n + 3 * d + 2 * d + 2 * d * n
    assert residual_flops(variant("ddl-cc-noec", **size)) == 24 * (per_sublayer + 2 * d * n) + 2 * d * n
    order = [flops_per_token(variant(name, **size), length=1024) for name in ("add", "ddl", "ddl-cc", "ddl-tc")]
    assert order == sorted(order) and order[-1] / order[0] < 1.05
    assert iso_flop_steps(variant("ddl-tc", **size), variant("add", **size), 1000, length=1024) < 1000
    assert iso_flop_steps(variant("add", **size), variant("add", **size), 1000, length=1024) == 1000


def test_configuration_round_trip_and_released_names():
    config = variant("ddl-tc", **SIZE, gate="hard", beta_init=0.5)
    assert from_mapping(DDLConfig, json.loads(json.dumps(to_mapping(config)))) == config
    assert replace(config, d_v=2).d_v == 2
    released = DDLConfig(
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_size=32,
        ddl_value_channels=2,
        ddl_state_shortconv_kernel_size=2,
        ddl_beta_init=0.3,
        ddl_v_sigmoid=False,
        ddl_k_eps=1e-6,
        ddl_state_dv_shortconv_causal=True,
        input_embed_shortconv_kernel_size=3,
        use_qk_rmsnorm=False,
        using_groupnorm=True,
        block_size=64,
        bias=False,
        dropout=0.0,
        embedding_init_std=0.03,
        hidden_init_std_factor=0.4,
        q_activation="silu",
        v_activation="relu",
    )
    assert (released.num_layers, released.d_v, released.compress_kernel, released.beta_init, released.k_eps) == (
        3,
        2,
        2,
        0.3,
        1e-6,
    )
    assert (
        released.compress_causal
        and released.expand_kernel == 3
        and released.qk_norm == "none"
        and released.attention_norm
    )
    assert (released.query_activation, released.value_activation, released.v_activation) == ("silu", "relu", "none")
    constant = DDLConfig(ddl_v_dim1_constant=True, ddl_v_dim1_constant_value=1.5)
    assert constant.v_constant == 1.5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(ddl_beta_inti=1.0), "ddl_beta_inti.*ddl_beta_init"),
        (dict(ddl_unheard_of=1.0), "ddl_unheard_of"),
        (dict(hiden_size=8), "hiden_size.*hidden_size"),
        (dict(hidden_size=10, num_heads=3), "hidden_size"),
        (dict(hidden_size=15, num_heads=3), "head_dim"),
        (dict(head_dim=7), "head_dim.*even"),
        (dict(beta_init=2.5), "beta_init"),
        (dict(beta_max=0.0), "beta_max"),
        (dict(beta_max=1.0, beta_init=1.5), "beta_init"),
        (dict(k_eps=-1.0), "k_eps"),
        (dict(d_v=0), "d_v"),
        (dict(d_v=4, compress_kernel=5), "compress_kernel.*at most d_v = 4"),
        (dict(dropout=0.1), "dropout"),
        (dict(rule="delt"), "rule.*delta"),
        (dict(num_layers=2, num_hidden_layers=2), "both"),
        (dict(d_v="4"), "d_v"),
    ],
)
def test_bad_configurations_are_named(fields, words):
    with pytest.raises(ConfigError, match=words):
        DDLConfig(**fields)


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="variant.*ddl-cc"):
        variant("ddl_cc")
