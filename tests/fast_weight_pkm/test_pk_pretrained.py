"""A memory in a pretrained model: nothing changes until it is trained, state from call to call, refusals."""

import copy
import inspect
import itertools

import pytest
import torch

from papers10.fast_weight_pkm.model import memories, memory_options
from papers10.fast_weight_pkm.pretrained import PRETRAINED_ARMS, Facts, insert_memory, load_memory, run_pretrained

transformers = pytest.importorskip("transformers")

OPTIONS = dict(n_subkeys=8, topk=2, key_dim=8, value_dim=12, chunk_size=5)


def tiny(family="llama", layers=3, seed=0):
    torch.manual_seed(seed)
    common = dict(vocab_size=61, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2)
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=layers, n_head=2, n_positions=64, n_inner=22, **common)
        return transformers.GPT2LMHeadModel(config).eval()
    kind, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[family]
    sizes = dict(hidden_size=16, intermediate_size=22, num_hidden_layers=layers, num_attention_heads=2)
    return model(kind(**sizes, num_key_value_heads=1, **common)).eval()


def tokens(*shape, seed=0):
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def woken(handle, seed=1):
    """Its outputs are no longer zero."""
    torch.manual_seed(seed)
    for branch in handle.branches.values():
        torch.nn.init.normal_(branch.o_proj.weight, std=0.5)
    return handle


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["fwpkm", "fwmlp", "adapter"])
def test_same_function_until_it_is_trained(family, kind):
    network = dict(key_dim=8, value_dim=12, inner_dim=6, chunk_size=5)
    options = {"fwpkm": OPTIONS, "fwmlp": network, "adapter": dict(inner_dim=7)}[kind]
    model, ids = tiny(family), tokens(2, 17)
    names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        wanted = model(ids).logits
        handle = insert_memory(model, [0, 2], kind=kind, **options)
        assert torch.equal(model(ids).logits, wanted)
        assert list(model.state_dict()) == names and not any(p.requires_grad for p in model.parameters())
        woken(handle).reset()
        assert not torch.equal(model(ids).logits, wanted)
        assert handle.remove() is model
        assert torch.equal(model(ids).logits, wanted)
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(RuntimeError, match="removed"):
        assert handle.model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_cut_is_the_whole(family):
    model, ids = tiny(family), tokens(2, 23)
    handle = woken(insert_memory(model, [1], **OPTIONS))
    with torch.no_grad():
        whole, after = model(ids).logits, handle.state[1]
        for cuts in ((0, 23), (0, 1, 2, 9, 23), (0, 12, 17, 18, 23)):
            handle.reset()
            cache, parts = None, []
            keyword = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
            for low, high in itertools.pairwise(cuts):
                out = model(ids[:, low:high], use_cache=True, **{keyword: cache})
                cache = getattr(out, keyword)
                parts.append(out.logits)
            assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
            assert torch.allclose(handle.state[1].values, after.values, atol=1e-5)


def test_generate_uses_the_memory():
    model, ids = tiny(), tokens(1, 12)
    handle = woken(insert_memory(model, [1], **OPTIONS))
    made = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    slow = ids
    with torch.no_grad():
        for _ in range(made.shape[1] - 12):
            handle.reset()
            slow = torch.cat([slow, model(slow).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, slow)


def test_windows_passes_and_writes_off():
    model, ids = tiny(), tokens(2, 20)
    handle = woken(insert_memory(model, [0, 1], **OPTIONS))
    seen = []
    last = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        handle.read(ids, window=8)
        assert not seen
        read = handle.state
        handle.reset()
        # By hand: three windows without a cache, then the open chunk is closed.
        for low in (0, 8, 16):
            model.model(ids[:, low : low + 8])
        handle.flush()
        assert len(seen) == 3
        for layer in (0, 1):
            assert torch.allclose(read[layer].values, handle.state[layer].values, atol=1e-6)
            assert read[layer].queue is None
        handle.reset().read(ids, window=8, passes=2)
        assert not torch.allclose(read[0].values, handle.state[0].values)
        assert handle.state[0].step == 2 * read[0].step
        first = memories(handle)[0]
        with memory_options(handle, update=False):
            handle.reset().read(ids, window=8)
            assert torch.equal(handle.state[0].values, first.values.expand_as(handle.state[0].values))
    last.remove()


def test_one_context_many_questions():
    model, ids, questions = tiny(), tokens(1, 20), tokens(3, 4, seed=5)
    handle = woken(insert_memory(model, [1], **OPTIONS))
    with torch.no_grad():
        context = handle.read(ids, window=10).state
        handle.reorder(torch.zeros(3, dtype=torch.int64))
        together = model(questions).logits
        for row in range(3):
            handle.state = context
            assert torch.allclose(model(questions[row : row + 1]).logits[0], together[row], atol=1e-5)
        assert context[1].step == 4


def test_padding_is_not_read():
    model, ids = tiny(), tokens(1, 9)
    handle = woken(insert_memory(model, [1], **OPTIONS))
    padded, mask = torch.cat([ids.new_zeros(1, 4), ids], 1), torch.tensor([[0] * 4 + [1] * 9])
    with torch.no_grad():
        alone, state = model(ids).logits, handle.state[1]
        handle.reset()
        places = (mask.cumsum(1) - 1).clamp(min=0)
        beside = model(padded, attention_mask=mask, position_ids=places).logits[:, 4:]
    assert torch.allclose(alone, beside, atol=1e-4)
    assert torch.allclose(state.values, handle.state[1].values, atol=1e-5)


def test_only_the_memory_learns_through_the_writes():
    model, ids = tiny(), tokens(2, 20)
    handle = woken(insert_memory(model, [1], **OPTIONS))
    handle.read(ids)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.parameters())
    handle.detach()
    assert not handle.state[1].values.requires_grad


def test_save_and_load(tmp_path):
    model, ids = tiny(), tokens(2, 14)
    handle = woken(insert_memory(model, [0, 2], **OPTIONS), seed=7)
    handle.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"memory.json", "memory.safetensors"}
    with torch.no_grad():
        wanted = model(ids).logits
        fresh = tiny()
        again = load_memory(fresh, tmp_path)
        assert torch.equal(fresh(ids).logits, wanted) and again.layers == (0, 2)
    with pytest.raises(FileNotFoundError, match=r"memory\.json"):
        load_memory(tiny(), tmp_path / "none")
    recipe = tmp_path / "memory.json"
    recipe.write_text(recipe.read_text().replace('"key_dim": 8', '"key_dim": 4'))
    other = tiny()
    with pytest.raises(ValueError, match="weights that fit"):
        load_memory(other, tmp_path)
    insert_memory(other, [0], **OPTIONS)


def test_half_precision_and_copies():
    model, ids = tiny().bfloat16(), tokens(2, 14)
    with torch.no_grad():
        wanted = model(ids).logits
        handle = insert_memory(model, [1], **OPTIONS)
        assert torch.equal(model(ids).logits, wanted) and handle.state[1].values.dtype == torch.float32
    state = handle.state
    state[1].values.zero_()
    assert handle.state[1].values.abs().sum() > 0
    assert "branches" not in " ".join(copy.deepcopy(handle.remove()).state_dict())


def test_calibrated_queries_are_white_and_the_output_stays_zero():
    model, ids = tiny(), tokens(8, 60)
    with torch.no_grad():
        wanted = model(ids).logits
        handle = insert_memory(model, [1], **OPTIONS)
        stream = handle.stream(ids, rows=3)
        assert torch.allclose(stream[1], model.model(ids, output_hidden_states=True).hidden_states[1], atol=1e-5)
        assert handle.reset().stream(ids)[1].shape == (8, 60, 16) and handle.state == {}
        memory = handle.calibrate(stream, query_scale=3.0).branches["1"]
        assert torch.equal(model(ids).logits, wanted)
        queries = memory.q_proj(memory.q_norm(stream[1][:, 1:])).flatten(0, 1)
        assert queries.mean(0).abs().max() < 1e-4
        spread = (3 * memory.keys.std()) ** 2
        assert torch.allclose(queries.T @ queries / len(queries), spread * torch.eye(8), atol=0.02 * spread)
        rms = stream[1][:, 1:].square().mean(-1).sqrt().median()
        assert handle.scale_1 == rms and memory.g_proj.bias.item() == 1.5
    with pytest.raises(ValueError, match="at most the width of the stream 16 in all heads, got 24"):
        insert_memory(model, [0], **{**OPTIONS, "key_dim": 24}).calibrate({0: stream[1]})


def test_facts_stand_where_they_are_said_to():
    facts = small_facts()
    draw = torch.Generator().manual_seed(0)
    for new in (False, True):
        pairs = facts.pairs(3, new, draw)
        row, places = facts.window(pairs, 40, 0, 90, draw)
        assert len(row) == 40 and [(row[p - 1], row[p]) for p in places] == pairs
        assert all(row[p - 3 : p - 1] == [3, 4] and row[p + 1] == 5 for p in places)
        assert {key for key, _ in pairs} <= set(facts.keys[new]) and len({value for _, value in pairs}) == 3
    with pytest.raises(ValueError, match="at least 15"):
        facts.window(pairs, 14, 0, 90, draw)


def small_facts():
    pool = [tuple(range(low, low + 10)) for low in (20, 30, 40, 50)]
    return Facts((3, 4), (5,), (pool[0], pool[1]), (pool[2], pool[3]), tokens(400) % 14 + 6)


def test_the_measurement():
    size = dict(
        lengths=(1, 3),
        layer=1,
        window=24,
        count=3,
        contexts=2,
        samples=6,
        steps=4,
        batch=3,
        options=OPTIONS,
        facts=small_facts(),
    )
    model = tiny()
    before, flags = {k: v.clone() for k, v in model.state_dict().items()}, [p.requires_grad for p in model.parameters()]
    found = run_pretrained(3, model=model, **size)
    assert tuple(found) == ("whole", "window", "memory", "writes-off", "adapter")
    assert set(found) == set(PRETRAINED_ARMS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and len(model.model.layers) == 3
    assert [p.requires_grad for p in model.parameters()] == flags and model.config.num_hidden_layers == 3
    for arm, numbers in found.items():
        assert all(isinstance(value, float | int) for value in numbers.values())
        assert {f"{name}_x{m}" for name in ("accuracy", "top1_new", "nats") for m in (1, 3)} <= set(numbers), arm
    assert found["window"]["nats_x1"] == found["window"]["nats_x3"]
    assert found["writes-off"]["nats_x1"] == pytest.approx(found["writes-off"]["nats_x3"], abs=1e-5)
    assert found["memory"]["nats_x1"] != found["memory"]["nats_x3"]
    assert abs(found["adapter"]["parameters"] / found["memory"]["parameters"] - 1) < 0.1
    again = run_pretrained(3, ["memory"], model=model, **size)
    assert again["memory"] == found["memory"]
    with pytest.raises(ValueError, match="arm"):
        run_pretrained(0, ["all"], model=model, **size)


def test_refusals():
    model = tiny()
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        insert_memory("smollm2", [1])
    with pytest.raises(ValueError, match="got Linear"):
        insert_memory(torch.nn.Linear(2, 2), [0])
    for layers in ([], [3], [0, 0], [-1], [True]):
        with pytest.raises(ValueError, match="layers: expected different numbers from 0 to 2"):
            insert_memory(model, layers, **OPTIONS)
    with pytest.raises(ValueError, match="kind"):
        insert_memory(model, [0], kind="pkm")
    with pytest.raises(ValueError, match="state_mode"):
        insert_memory(model, [0], state_mode="persistent", **OPTIONS)
    with pytest.raises(TypeError, match="top_k"):
        insert_memory(model, [0], top_k=3)
    handle = insert_memory(model, [0], **OPTIONS)
    with pytest.raises(ValueError, match="layer 0 has one"):
        insert_memory(model, [0, 1], **OPTIONS)
    model(tokens(2, 3))
    with pytest.raises(ValueError, match=r"batch of 2 .* got 1; call reset"):
        model(tokens(1, 3))
    with pytest.raises(ValueError, match=r"layers of \[0\], got 1"):
        handle.state = {1: handle.state[0]}
    with pytest.raises(TypeError, match="got dict"):
        handle.state = {0: {}}
    with pytest.raises(ValueError, match="passes"):
        handle.read(tokens(2, 3), passes=0)
