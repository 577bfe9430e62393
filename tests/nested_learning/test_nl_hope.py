"""Hope: pieces, rows, padding, gradients, variants, absorbing, saving, generation, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.config import ConfigError, from_mapping, to_mapping
from papers10.core.random import generator
from papers10.lm.cache import Cache
from papers10.lm.generate import generate
from papers10.lm.layers import Attention
from papers10.lm.trunk import CausalLM, TrunkConfig
from papers10.nested_learning.continuum import ContinuumMemory
from papers10.nested_learning.hope import (
    VARIANTS,
    HopeAttentionBlock,
    HopeBlock,
    HopeCausalLM,
    HopeConfig,
    HopeModel,
    variant,
)
from papers10.nested_learning.systems import decompose
from papers10.nested_learning.titans import SelfModifyingTitans

SIZE = dict(
    vocab_size=19,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    chunk_size=(4, 2),
    cms_chunk_sizes=(2, 4),
    cms_hidden_mult=2.0,
)
SOME = ["hope", "hope-attention", "hope-deep", "table6", "titans", "transformer"]


def build(name="hope", seed=0, **options):
    return HopeCausalLM(variant(name, **{**SIZE, **options}), seed=seed).double()


def ids(batch=2, time=9, seed=0):
    return torch.randint(19, (batch, time), generator=generator(seed, "ids"))


@pytest.mark.filterwarnings("ignore:eta_max")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_streams(name):
    model, tokens = build(name), ids(time=11)
    out = model(tokens, labels=tokens)
    out.loss.backward()
    assert torch.isfinite(out.loss) and all(
        torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None
    )
    cache = model.new_cache()
    pieces = [model(piece, cache=cache).logits for piece in tokens.split([1, 1, 3, 2, 4], 1)]
    assert torch.allclose(torch.cat(pieces, 1), out.logits, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"cms_variant": "nested"}, {"cms_variant": "independent"}, {"mlp": "swiglu"}])
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_pieces_equal_the_whole(options, lengths):
    model, tokens = build(**options), ids(time=sum(lengths))
    cache = model.new_cache()
    pieces = [model(piece, cache=cache).logits for piece in tokens.split(lengths, 1)]
    assert torch.allclose(torch.cat(pieces, 1), model(tokens).logits, atol=1e-9)


@pytest.mark.parametrize("name", SOME)
def test_padding_rows_and_future(name):
    model, tokens = build(name), ids()
    wanted = model(tokens).logits
    for left, right in ((3, 0), (0, 2)):
        padded, mask = F.pad(tokens, (left, right), value=7), F.pad(torch.ones_like(tokens), (left, right))
        out = model(padded, attention_mask=mask).logits[:, left : left + 9]
        assert torch.allclose(out, wanted, atol=1e-9)
    other = tokens.clone()
    other[1] = (other[1] + 1) % 19
    assert torch.allclose(model(other).logits[0], wanted[0], atol=1e-12)
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 19
    assert torch.equal(model(other).logits[:, :5], wanted[:, :5])


@pytest.mark.parametrize("name", ["hope", "hope-attention", "hope-deep"])
def test_padded_prompts_decode_as_alone(name):
    model = build(name).eval()
    prompt, mask = ids(2, 6), torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    out = generate(model, prompt, max_new_tokens=7, temperature=0, attention_mask=mask)
    alone = generate(model, prompt[1:, 2:], max_new_tokens=7, temperature=0)
    assert torch.equal(out[1, 2:], alone[0])


def test_gradient_of_a_block_reaches_the_initial_memories():
    block = HopeBlock(variant("hope", **SIZE)).double()
    x, weight = (torch.randn(1, 9, 8, generator=generator(i, "block"), dtype=torch.float64) for i in range(2))
    loss = lambda: (block(x) * weight).sum()
    loss().backward()
    for parameter in (
        block.mixer.memories["memory"].weight,
        block.mixer.memories["k"].weight,
        block.channel.blocks[0].mlp.up_proj.weight,
    ):
        place = tuple(int(i) for i in (parameter.grad.abs() == parameter.grad.abs().max()).nonzero()[0])
        assert parameter.grad[place].abs() > 1e-6
        with torch.no_grad():
            kept, values = parameter[place].clone(), []
            for step in (1e-6, -1e-6):
                parameter[place] = kept + step
                values.append(loss())
            parameter[place] = kept
        assert torch.allclose((values[0] - values[1]) / 2e-6, parameter.grad[place], rtol=1e-5, atol=1e-8)


def test_blocks_are_the_blocks_of_the_model():
    model = build(num_layers=1)
    block = HopeBlock(variant("hope", **{**SIZE, "num_layers": 1})).double()
    names = {
        "mixer_norm": "blocks.0.mixer_norm",
        "mixer": "blocks.0.mixer",
        "channel_norm": "blocks.0.channel_norm",
        "channel": "extra.0",
    }
    state = model.state_dict()
    block.load_state_dict(
        {
            f"{ours}.{k[len(theirs) + 1 :]}": v
            for ours, theirs in names.items()
            for k, v in state.items()
            if k.startswith(theirs + ".")
        }
    )
    x = model.embed(ids())
    assert torch.allclose(F.linear(model.final_norm(block(x)), model.head_weight), model(ids()).logits, atol=1e-12)
    assert isinstance(HopeAttentionBlock(variant("hope-attention", **SIZE)).mixer, Attention)
    with pytest.raises(ValueError, match="mixer"):
        HopeBlock(variant("hope-attention", **SIZE))
    assert isinstance(HopeBlock(variant("self-modifying-titans", **SIZE)).channel, torch.nn.Module)


def test_parts_know_their_block_and_share_the_cache():
    model = build()
    assert [memory.layer for memory in model.continuum()] == [0, 1] == [block.mixer.layer for block in model.blocks]
    cache = model.new_cache()
    model(ids(), cache=cache)
    assert all({"cms", "titans.run", "titans.count"} <= set(states) for states in cache.layers)
    copy = cache.clone().reorder(torch.tensor([1, 0]))
    later = ids(2, 3, seed=1)
    a, b = model(later, cache=cache).logits, model(later[[1, 0]], cache=copy).logits
    assert torch.allclose(a, b[[1, 0]], atol=1e-10)
    cache.reset()
    assert torch.allclose(model(later, cache=cache).logits, model(later).logits, atol=1e-12)


def test_saved_caches_continue():
    model, tokens = build(), ids(time=13)
    cache = model.new_cache()
    model(tokens[:, :7], cache=cache)
    saved = cache.state_dict()
    other = Cache(2).load_state_dict(saved)
    assert torch.allclose(model(tokens[:, 7:], cache=other).logits, model(tokens).logits[:, 7:], atol=1e-10)


def test_flush_writes_everything():
    model = build(chunk_size=8, cms_chunk_sizes=(8, 16)).eval()
    cache = model.new_cache()
    model(ids(time=3), cache=cache)
    model.flush(cache)
    for states in cache.layers:
        assert torch.equal(states["titans.start.memory"], states["titans.run"][:, :, -4:])
        assert [int(level.updates[0]) for level in states["cms"].levels] == [1, 1]
    model.flush(model.new_cache())


def test_training_learns_to_copy():
    model = HopeCausalLM(variant("hope", **{**SIZE, "hidden_size": 16}), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pattern = ids(1, 5).repeat(8, 4)
    first = None
    for _ in range(30):
        loss = model(pattern, labels=pattern).loss
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first


def test_absorbing_lowers_the_loss_and_leaves_the_weights():
    model = HopeCausalLM(
        variant("hope", **{**SIZE, "hidden_size": 16}, cms_error="backprop", cms_lr=1.0), seed=0
    ).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cache, text = model.new_cache(), ids(2, 16)
    losses = torch.stack([model.absorb(text, cache) for _ in range(5)])
    assert losses.shape == (5, 2) and losses[1:].mean() < losses[0].mean() - 0.05
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    alone = HopeCausalLM(model.config, seed=0).eval()
    assert torch.allclose(alone.absorb(text[:1], alone.new_cache()), losses[0, :1], atol=1e-4)
    with pytest.raises(ValueError, match="cms_error"):
        build().absorb(text, build().new_cache())
    with pytest.raises(ValueError, match="cms"):
        build("transformer").absorb(text, build("transformer").new_cache())


def test_scheduled_levels_read_without_writing():
    model = build(cms_error="schedule")
    cache = model.new_cache()
    model(ids(), cache=cache)
    assert all(
        "cms" not in states or all(level.weights is None for level in states["cms"].levels) for states in cache.layers
    )
    assert model.continuum()[0].level_parameters()["level2"][1] == 4


def test_hidden_states_and_seeds():
    config = variant("hope", **SIZE)
    model, hidden = HopeCausalLM(config, seed=3), HopeModel(config, seed=3)
    assert torch.allclose(F.linear(hidden(ids()), hidden.head_weight), model(ids()).logits)
    assert all(torch.equal(a, b) for a, b in zip(HopeCausalLM(config, seed=3).parameters(), model.parameters()))
    assert not torch.equal(HopeCausalLM(config, seed=4).embed.weight, model.embed.weight)
    assert any(name.endswith("mixer.memories") for name in model.fp32_modules)


def test_plug_ins_work_in_the_plain_trunk():
    config = TrunkConfig(vocab_size=19, hidden_size=8, num_layers=1, num_heads=2)
    memory = ContinuumMemory(8, (2, 4), output="branch")
    memory.takes_valid = True
    model = CausalLM(
        config, mixer=lambda c, i: SelfModifyingTitans(8, 2, chunk_size=2, layer=i), extra={0: memory}
    ).double()
    tokens = ids()
    padded, mask = F.pad(tokens, (3, 0)), F.pad(torch.ones_like(tokens), (3, 0))
    assert torch.allclose(model(padded, attention_mask=mask).logits[:, 3:], model(tokens).logits, atol=1e-10)


def test_levels_are_found():
    model = build(num_layers=1)
    system = decompose(model, torch.optim.SGD(model.parameters(), lr=0.1), seq_len=8)
    names = [problem.name for level in system.levels for problem in level.problems]
    assert {"blocks.0.mixer.memory", "blocks.0.mixer.k", "extra.0.level1", "extra.0.level2"} <= set(names)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"hidden_size": 7}, "num_heads"),
        ({"chunk_size": (4, 3)}, "chunk_size"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"cms_chunk_sizes": (4, 2)}, "cms_chunk_sizes"),
        ({"cms_chunk_sizes": ()}, "cms_chunk_sizes"),
        ({"cms_lr": (0.1,)}, "cms_lr"),
        ({"adaptive": ("key",)}, "adaptive"),
        ({"objective": "l1"}, "objective"),
        ({"num_layers": 0}, "num_layers"),
        ({"cms_chunks": (2, 4)}, "cms_chunk_sizes"),
    ],
)
def test_bad_configurations_are_named(options, text):
    with pytest.raises(ConfigError, match=text):
        HopeConfig(**{**SIZE, **options})


def test_configurations_survive_json():
    config = variant("table6-no-inner-k", **SIZE, cms_lr=(0.1, 0.01))
    assert from_mapping(HopeConfig, to_mapping(config)) == config
    with pytest.raises(ValueError, match="variant"):
        variant("hop")


@pytest.mark.parametrize("name", ["hope", "hope-attention"])
def test_saves_loads_and_generates(name, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra lm: pip install 'papers10[lm]'")
    from transformers import AutoModelForCausalLM

    from papers10.nested_learning.hope import HopeForCausalLM, HopeHFConfig

    model = HopeForCausalLM(HopeHFConfig(**to_mapping(variant(name, **SIZE)))).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt, mask = ids(2, 5), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    with torch.no_grad():
        assert torch.equal(again(prompt).logits, model(prompt).logits)
        expected = generate(model.model, prompt, max_new_tokens=6, temperature=0, attention_mask=mask)
        got = again.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
        beams = again.generate(prompt, attention_mask=mask, max_new_tokens=4, num_beams=2, do_sample=False)
    assert torch.equal(got, expected) and beams.shape == (2, 9)
    with pytest.raises(ConfigError, match="cms_chunk_sizes"):
        HopeHFConfig(cms_chunk_size=(2, 4))
