"""Models in the layout of the released code, against a plain restatement of their equations."""

import ddl_oracle
import pytest
import torch

from papers10.deep_delta_learning.model import DDLCausalLM, DDLConfig, convert_released_checkpoint

D, LAYERS, HEADS, WIDTH, VOCABULARY, MLP = 12, 2, 2, 6, 20, 32
FILES = {
    "scalar state": (1, None, False),
    "channel, input convolution": (4, "channel", True),
    "channel": (4, "channel", False),
    "token, input convolution": (4, "token", True),
    "token": (4, "token", False),
}


def released(n, compressor, convolution, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64) * 0.4

    state = {"transformer.wte.weight": randn(VOCABULARY, D), "transformer.ln_f.weight": 1 + randn(D)}
    state["lm_head.weight"] = state["transformer.wte.weight"]

    def compress(place):
        if compressor == "channel":
            state[place + ".weight"] = randn(D, n)
        elif compressor == "token":
            state[place + ".shortconv.weight"] = randn(D * n, 4)
        if compressor:
            state[place + ".read"] = randn(n)

    for layer in range(LAYERS):
        place = f"transformer.h.{layer}."
        for name in ("c_q", "c_k", "c_v"):
            state[f"{place}attn.{name}.weight"] = randn(HEADS * WIDTH, D)
        state[place + "attn.c_proj.weight"] = randn(D, HEADS * WIDTH)
        state[place + "attn.q_rms.weight"], state[place + "attn.k_rms.weight"] = 1 + randn(WIDTH), 1 + randn(WIDTH)
        state[place + "mlp.c_fc1.weight"], state[place + "mlp.c_fc2.weight"] = randn(MLP, D), randn(MLP, D)
        state[place + "mlp.c_proj.weight"] = randn(D, MLP)
        state[place + "ln_1.weight"], state[place + "ln_2.weight"] = 1 + randn(D), 1 + randn(D)
        for part in ("ddl_attn", "ddl_mlp"):
            state[f"{place}{part}.beta.weight"], state[f"{place}{part}.beta.bias"] = randn(1, D), randn(1)
            state[f"{place}{part}.v_proj.weight"], state[f"{place}{part}.v_proj.bias"] = randn(n, D), randn(n)
        compress(place + "compress")
    compress("readout")
    if convolution:
        state["input_embed.conv.weight"] = randn(D * n, 1, 4)
    config = DDLConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        head_dim=WIDTH,
        ddl_value_channels=n,
        compressor=compressor or "channel",
        embed_conv=convolution,
    )
    return state, config


@pytest.mark.parametrize("name", FILES)
def test_whole_model_agrees_with_the_equations(name):
    n, compressor, convolution = FILES[name]
    state, config = released(n, compressor, convolution)
    model = DDLCausalLM(config).double().eval()
    model.load_state_dict(convert_released_checkpoint(state, config))
    ids = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
    for row in range(2):
        expected = ddl_oracle.language_model(state, ids[row], layers=LAYERS, heads=HEADS, n=n, compressor=compressor)
        torch.testing.assert_close(logits[row], expected, atol=1e-10, rtol=1e-10)


def test_wrong_configuration_is_named():
    state, config = released(4, "token", True)
    with pytest.raises(ValueError, match="residual.expand.weight"):
        convert_released_checkpoint(state, DDLConfig(**{**config.model_dump(), "embed_conv": False}))
    with pytest.raises(ValueError, match=r"residual.compress.0.weight: expected \[12, 4\]"):
        convert_released_checkpoint(state, DDLConfig(**{**config.model_dump(), "compressor": "channel"}))
    with pytest.raises(ValueError, match="transformer.h.0.extra"):
        convert_released_checkpoint(state | {"transformer.h.0.extra": torch.zeros(1)}, config)
