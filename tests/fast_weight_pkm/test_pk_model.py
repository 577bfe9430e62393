"""Language models with product-key memories: configurations, streams, repeated reading, transformers."""

import pytest
import torch

from papers10.core.checks import NonFiniteError
from papers10.core.config import ConfigError
from papers10.core.random import generator
from papers10.fast_weight_pkm import iterative_read, memories, memories_only, memory_options, variant
from papers10.fast_weight_pkm.model import FwPKMCausalLM, FwPKMConfig
from papers10.lm.generate import generate
from papers10.lm.optim import parameter_groups

SMALL = dict(vocab_size=20, hidden_size=16, num_layers=4, num_heads=4, mlp_size=16, fwpkm_k_dim=8, fwpkm_v_dim=12, fwpkm_n_subkeys=6, fwpkm_topk=3, fwpkm_update_chunk_size=5,
             pkm_k_dim=8, pkm_v_dim=12, pkm_n_subkeys=6, pkm_topk=3, pkm_heads=2, fwpkm_inner_dim=8, gdn_heads=2, gdn_head_dim=8)


def _model(backbone="swa", memory="fwpkm@1", **options):
    return FwPKMCausalLM(variant(backbone, memory, **{**SMALL, "window": 6, **options}), seed=0).double().eval()


def _ids(batch=2, time=23, seed=0):
    return torch.randint(20, (batch, time), generator=generator(seed, "ids"))


@pytest.mark.parametrize("backbone", ["swa", "gdn", "gdn+swa", "gdn+fa", "fa"])
@pytest.mark.parametrize("memory", ["fwpkm@1", "pkm@2+fwpkm@1,3", "fwmlp@1"])
def test_every_row_streams_as_it_reads(backbone, memory):
    model, ids = _model(backbone, memory, window=None if "fa" in backbone else 6), _ids()
    with torch.no_grad():
        whole = model(ids).logits
        for sizes in ([1] * 23, [4, 9, 10]):
            cache = model.new_cache()
            torch.testing.assert_close(torch.cat([model(piece, cache=cache).logits for piece in ids.split(sizes, 1)], 1), whole, atol=1e-9, rtol=0)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("placement", ["before_mixer", "after_mixer", "replace_mlp"])
def test_placements(placement):
    model, ids = _model(fwpkm_placement=placement), _ids()
    with torch.no_grad():
        cache = model.new_cache()
        torch.testing.assert_close(torch.cat([model(piece, cache=cache).logits for piece in ids.split([7, 16], 1)], 1), model(ids).logits, atol=1e-9, rtol=0)
    assert FwPKMConfig(fwpkm_before_attn=False).placement == "after_mixer"


def test_padding_on_the_left_changes_nothing():
    model, ids = _model(memory="fwpkm@1,2"), _ids()
    padded, mask = torch.cat([torch.zeros(2, 4, dtype=torch.int64), ids], 1), torch.ones(2, 27)
    mask[0, :4], mask[1, :11] = 0, 0
    with torch.no_grad():
        cache = model.new_cache()
        out = model(padded, cache=cache, attention_mask=mask).logits
        torch.testing.assert_close(out[0, 4:], model(ids[:1]).logits[0], atol=1e-9, rtol=0)
        torch.testing.assert_close(out[1, 11:], model(ids[1:, 7:]).logits[0], atol=1e-9, rtol=0)
        alone = model.new_cache()
        model(ids[1:, 7:], cache=alone)
        for token in _ids(time=9, seed=1).split(1, 1):
            torch.testing.assert_close(model(token, cache=cache).logits[1], model(token[1:], cache=alone).logits[0], atol=1e-9, rtol=0)


def test_caches_copy_reorder_save():
    model, ids = _model(), _ids()
    with torch.no_grad():
        cache = model.new_cache()
        model(ids[:, :12], cache=cache)
        rest = lambda c: model(ids[:, 12:], cache=c).logits
        copy, loaded = cache.clone(), model.new_cache()
        loaded.load_state_dict(cache.state_dict())
        turned = cache.clone().reorder(torch.tensor([1, 0]))
        swapped = model(ids[:, 12:].flip(0), cache=turned).logits.flip(0)
        wanted = rest(cache)
        for other in (rest(copy), rest(loaded), swapped):
            torch.testing.assert_close(other, wanted, atol=1e-10, rtol=0)


def test_repeated_reading():
    model, ids = _model(memory="fwpkm@1,2"), _ids()
    with torch.no_grad():
        torch.testing.assert_close(iterative_read(model, ids, 1).logits, model(ids).logits, atol=1e-12, rtol=0)
        out = iterative_read(model, ids, 3, "whole")
        state = out.cache.layers[1]["fwpkm"]
        assert state.step == 3, "each pass is one write"
        twice = model.new_cache()
        model(ids, cache=twice)
        again = model(ids, cache=memories_only(model, twice)).logits
        torch.testing.assert_close(iterative_read(model, ids, 2).logits, again, atol=1e-12, rtol=0)
    assert [memory.chunk_size for memory in memories(model)] == [5, 5]
    for wrong in ({"n": 0}, {"n": 1, "chunk_size": "all"}):
        with pytest.raises(ValueError, match="expected"):
            iterative_read(model, ids, **wrong)
    with pytest.raises(ValueError, match="fast-weight memories"):
        iterative_read(_model(memory="none"), ids, 1)


def test_options_hold_inside_the_block_only():
    model, ids = _model(), _ids()
    with torch.no_grad():
        plain = model(ids).logits
        with memory_options(model, update=False):
            off = model(ids).logits
        assert not torch.allclose(off, plain) and torch.equal(model(ids).logits, plain)
        with pytest.raises(RuntimeError), memory_options(model, fast_lr=0.0):
            raise RuntimeError
    assert memories(model)[0].fast_lr == 1.0
    with pytest.raises(ValueError, match="did you mean 'chunk_size'"), memory_options(model, chunksize=3):
        pass


def test_limited_attention_in_training_only():
    model, ids = _model("fa", window=None, pswa_prob=1.0, pswa_window=3), _ids()
    narrow = model(ids, window=3).logits
    assert torch.equal(model.train()(ids).logits, narrow)
    assert not torch.allclose(model.eval()(ids).logits, narrow)


def test_optimizer_never_sees_fast_weights():
    model = _model(memory="pkm@2+fwpkm@1")
    named = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    memory = memories(model)[0]
    assert id(memory.values) not in named and id(memory.keys) not in named
    assert {"extra.1.memory.keys", "extra.1.memory.values"} <= set(model.state_dict())


def test_a_nan_does_not_reach_the_memory():
    model, ids = _model(), _ids()
    with torch.no_grad():
        model.embed.weight[3] = float("nan")
    ids[0, 4] = 3
    with pytest.raises(NonFiniteError):
        model(ids)


@pytest.mark.parametrize("options, message", [
    ({"fwpkm_target_lookahead": 0}, "fwpkm_target_value_lookahead"), ({"fwpkm_query_src": "key"}, "fwpkm_query_src"), ({"fwpkm_k_dim": 7}, "fwpkm_k_dim"),
    ({"fwpkm_layers": (9,)}, "fwpkm_layers"), ({"fwpkm_topk": 9, "fwpkm_layers": (1,)}, "fwpkm_topk"), ({"pswa_prob": 2.0}, "pswa_prob"), ({"fwpkm_fp32_fw": False}, "fwpkm_fp32_fw"),
    ({"fwpkm_optimizer_weight_decay": 0.1}, "fwpkm_value_decay"), ({"fwpkm_placement": "replace_mlp", "fwpkm_layers": (1,), "pkm_layers": (1,)}, "pkm_layers"),
])
def test_configurations_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        FwPKMConfig(**{**SMALL, **options})


def test_variants_of_the_paper():
    both = variant("gdn+swa", "pkm@6+fwpkm@2,10")
    assert (both.pkm_layers, both.fwpkm_layers, both.attention_layers, both.window, both.hidden_size) == ((6,), (2, 10), (3, 7, 11), 512, 768)
    assert variant("fa", "none").pswa_prob == 0.9 and variant("gdn", "fwmlp@2,6,10").fwpkm_optimizer_lr == 0.1
    for wrong in (("gdn", "fwpkm@"), ("gdn", "fwpkm@1+fwmlp@2"), ("rnn", "none")):
        with pytest.raises(ValueError, match="expected"):
            variant(*wrong)


def test_generation_of_ours_and_theirs(tmp_path):
    pytest.importorskip("transformers")
    from papers10.fast_weight_pkm import FwPKMForCausalLM, FwPKMHFConfig

    model = _model(memory="pkm@2+fwpkm@1").float()
    theirs = FwPKMForCausalLM(FwPKMHFConfig(**model.config.model_dump())).eval()
    theirs.model.load_state_dict(model.state_dict())
    theirs.save_pretrained(tmp_path)
    again, ids = FwPKMForCausalLM.from_pretrained(tmp_path).eval(), _ids()
    made = again.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(made, generate(model, ids, max_new_tokens=6, temperature=0.0))
