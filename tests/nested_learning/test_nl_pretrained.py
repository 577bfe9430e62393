"""Levels out of pretrained models: the same function until the first write, prequential logs, gradients a row, clear refusals."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from papers10.core.checks import NonFiniteError
from papers10.lm.trunk import CausalLM, TrunkConfig
from papers10.nested_learning.continuum import ContinuumMemory
from papers10.nested_learning.pretrained import cms_from_pretrained, mlp_layout, run_text_stream, stream

transformers = pytest.importorskip("transformers")

FAMILIES = ("llama", "llama-bias", "qwen2", "gpt2", "own-swiglu", "own-gelu")
SPLITS = ("neurons", "layers", "copy")


def tiny(family, layers=4, seed=0):
    torch.manual_seed(seed)
    common = dict(vocab_size=61, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2)
    if family.startswith("own"):
        config = TrunkConfig(
            vocab_size=61, hidden_size=16, num_layers=layers, num_heads=2, mlp=family[4:], mlp_size=22, init_std=0.2
        )
        return CausalLM(config).eval()
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=layers, n_head=2, n_positions=64, n_inner=22, **common)
        return transformers.GPT2LMHeadModel(config).eval()
    kind = transformers.Qwen2Config if family == "qwen2" else transformers.LlamaConfig
    model = transformers.Qwen2ForCausalLM if family == "qwen2" else transformers.LlamaForCausalLM
    options = {"mlp_bias": True} if family == "llama-bias" else {}
    sizes = dict(hidden_size=16, intermediate_size=22, num_hidden_layers=layers, num_attention_heads=2)
    built = model(kind(**sizes, num_key_value_heads=1, **common, **options)).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "mlp" in name and name.endswith("bias"):
                parameter.normal_()
    return built


def tokens(*shape, seed=0):
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def losses(logs):
    return torch.tensor([log["losses"] for log in logs])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", SPLITS)
def test_the_function_stays_until_something_is_written(family, split):
    model, ids = tiny(family), tokens(2, 20)
    with torch.no_grad():
        wanted = model(ids).logits
    keys, count = list(model.state_dict()), sum(p.numel() for p in model.parameters())
    cms = cms_from_pretrained(model, (2, 4, 8), split, lr=0.0, inplace=False)
    assert not hasattr(model, "continuum") and type(cms) is type(model)
    assert list(cms.state_dict()) == keys and sum(p.numel() for p in cms.parameters()) == count
    with torch.no_grad():
        assert torch.equal(cms(ids).logits, wanted)
        cms.continuum.attach(2)
        assert torch.allclose(cms(ids).logits, wanted, atol=1e-5)
    assert any(any(log["written"]) for log in stream(cms, [ids]))
    with torch.no_grad():
        # step size zero: written many times, still the same
        assert torch.allclose(cms(ids).logits, wanted, atol=1e-5)
        assert torch.equal(cms.eval()(ids).logits, cms(ids).logits)
    assert max(cms.continuum.distance()[0]) == 0


def test_in_place_and_checkpoint(tmp_path):
    model, ids = tiny("llama"), tokens(1, 9)
    with torch.no_grad():
        wanted = model(ids).logits
    assert cms_from_pretrained(model, (2, 4)) is model
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again, "continuum")
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, wanted, atol=1e-6)
    twin = copy.deepcopy(model)
    twin.continuum.attach(1)
    assert model.continuum.states == [] and len(twin.continuum.states) == 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", SPLITS)
def test_a_write_is_a_gradient_step_of_the_row(family, split):
    stock, ids, rate = tiny(family), tokens(2, 5), 0.3
    cms = cms_from_pretrained(stock, (4,), split, lr=rate, inplace=False)
    logs = list(stream(cms, [ids]))
    assert len(logs) == 1 and logs[0]["tokens"] == 8 and logs[0]["written"] == [True]
    assert all(p.grad is None for p in cms.parameters())
    for row in range(2):
        stock.zero_grad()
        logits = stock(ids[row : row + 1, :4]).logits
        loss = F.cross_entropy(logits[0], ids[row, 1:])
        assert logs[0]["losses"][row] == pytest.approx(4 * loss.item(), abs=1e-4)
        loss.backward()
        for mlp, place in zip(cms.continuum.mlps, [m for m in stock.modules() if mlp_layout(m)]):
            weights = mlp.state.levels[0].weights
            layout = mlp_layout(place)
            for key, name in (("gate", layout.gate), ("up", layout.up), ("down", layout.down)):
                if name is None:
                    continue
                linear = getattr(place, name)
                wanted = linear.weight - rate * linear.weight.grad
                assert torch.allclose(weights[key][row], wanted.T if layout.transposed else wanted, atol=1e-5)
                if f"{key}.bias" in weights:
                    assert torch.allclose(weights[f"{key}.bias"][row], linear.bias - rate * linear.bias.grad, atol=1e-5)


def test_prequential_loss_is_measured_before_the_write():
    ids = tokens(1, 17)
    frozen = losses(stream(cms_from_pretrained(tiny("llama"), (4, 8), lr=1.0), [ids], update=False))
    moving = losses(stream(cms_from_pretrained(tiny("llama"), (4, 8), lr=1.0), [ids]))
    assert torch.allclose(frozen[0], moving[0], atol=1e-5) and not torch.allclose(frozen[1:], moving[1:], atol=1e-2)
    stock = tiny("llama")
    with torch.no_grad():
        logits = stock(ids[:, :-1]).logits
    whole = F.cross_entropy(logits[0], ids[0, 1:], reduction="none").view(4, 4).sum(1)
    assert torch.allclose(frozen[:, 0], whole, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_of_different_length_are_read_alone(family):
    ids = tokens(3, 15)
    mask = torch.ones_like(ids)
    mask[1, 9:], mask[2, 2:] = 0, 0
    model = cms_from_pretrained(tiny(family), (3, 6), lr=0.5)
    logs = list(stream(model, [{"input_ids": ids, "attention_mask": mask}]))
    together = losses(logs).sum(0)
    weights = [{k: v.clone() for k, v in mlp.state.levels[0].weights.items()} for mlp in model.continuum.mlps]
    assert model.continuum.states[0].count.tolist() == [14, 8, 1]
    assert model.continuum.states[0].levels[0].updates.tolist() == [4, 2, 0]
    for row, length in enumerate((15, 9, 2)):
        alone = list(stream(model, [ids[row : row + 1, :length]]))
        assert losses(alone).sum() == pytest.approx(together[row].item(), abs=1e-3)
        for mlp, saved in zip(model.continuum.mlps, weights):
            if row < 2:
                for key, value in mlp.state.levels[0].weights.items():
                    assert torch.allclose(value[0], saved[key][row], atol=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_never_reset_reads_one_text_whatever_the_items(split):
    ids, results = tokens(2, 41), []
    for cuts in ((0, 41), (0, 1, 2, 12, 13, 30, 41)):
        model = cms_from_pretrained(tiny("llama"), (4, 8, 16), split, lr=0.5)
        items = [ids[:, a:b] for a, b in itertools.pairwise(cuts)]
        logs = list(stream(model, items, reset="never"))
        assert sum(log["tokens"] for log in logs) == 80
        results.append((losses(logs), [(log["token"], log["written"]) for log in logs]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-3) and results[0][1] == results[1][1]


def test_documents_reset():
    ids = tokens(1, 17)
    model = cms_from_pretrained(tiny("llama"), (4, 8), lr=1.0)
    logs = list(stream(model, [ids, ids]))
    first, second = losses(logs[:4]), losses(logs[4:])
    assert torch.allclose(first, second, atol=1e-5) and logs[4]["document"] == 1
    kept = losses(stream(model, [ids, ids], reset="never"))
    assert kept[4:].sum() < first.sum()
    model.continuum.detach()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, tiny("llama")(ids).logits, atol=1e-6)


@pytest.mark.parametrize("inside", [False, True])
def test_a_new_context_keeps_the_levels(inside):
    if inside:
        torch.manual_seed(0)
        config = TrunkConfig(vocab_size=61, hidden_size=16, num_layers=1, num_heads=2, init_std=0.2)
        memory = ContinuumMemory(16, (4,), output="branch", error="backprop", lr_init=0.5)
        model = CausalLM(config, extra={0: memory}).eval()
    else:
        model = cms_from_pretrained(tiny("llama"), (4,), lr=1.0)
    ids = tokens(1, 9)
    logs = list(stream(model, [ids] * 12, reset="context"))
    assert [log["token"] for log in logs] == list(range(4, 97, 4)) and logs[-1]["loss"] < 0.6 * logs[1]["loss"]
    with pytest.raises(ValueError, match="expected 1 rows"):
        list(stream(model, [ids, tokens(2, 5)], reset="context"))


def test_flush_writes_the_rest():
    model = cms_from_pretrained(tiny("llama"), (8,), lr=1.0)
    assert list(stream(model, [tokens(1, 6)]))[-1]["written"] == [False]
    assert list(stream(model, [tokens(1, 6)], flush=True))[-1]["written"] == [True]
    assert model.continuum.distance()[0][0] > 0


@pytest.mark.parametrize("split", SPLITS)
def test_nested_returns_fast_levels(split):
    model = cms_from_pretrained(tiny("llama"), (2, 4), split, lr=0.5, nested=True, rho=0.0)
    logs = list(stream(model, [tokens(1, 9)]))
    moved = [log["distance"] for log in logs]
    assert moved[0][0] > 0 and moved[1][0] == 0 and moved[1][1] > 0 and moved[2][0] > 0 and moved[3][0] == 0


def test_maml_streams():
    model = tiny("own-swiglu")
    cms = cms_from_pretrained(model, (2, 4), lr=0.3, nested=True, meta="maml", rho=0.5, inplace=False)
    first = cms_from_pretrained(model, (2, 4), lr=0.3, nested=True, meta="reptile", rho=0.5, inplace=False)
    ids = tokens(1, 9)
    a, b = losses(stream(cms, [ids])), losses(stream(first, [ids]))
    assert torch.allclose(a[:2], b[:2], atol=1e-5) and not torch.allclose(a[2:], b[2:], atol=1e-5)
    assert all(p.grad is None for p in cms.parameters())


def test_saved_states_go_on():
    ids = tokens(1, 33)
    model = cms_from_pretrained(tiny("llama"), (4, 16), lr=0.5)
    list(stream(model, [ids[:, :18]]))
    saved = model.continuum.state_dict()
    with torch.no_grad():
        wanted = model(ids).logits
    other = cms_from_pretrained(tiny("llama"), (4, 16), lr=0.5)
    other.continuum.load_state_dict(saved)
    with torch.no_grad():
        assert torch.allclose(other(ids).logits, wanted, atol=1e-5)
    assert torch.allclose(torch.tensor(other.continuum.distance()), torch.tensor(model.continuum.distance()))
    with pytest.raises(ValueError, match="4 layers, got 1"):
        other.continuum.load_state_dict(saved[:1])


def test_transform_is_the_direction():
    model = cms_from_pretrained(tiny("llama"), (4,), "layers", lr=0.01, transform=torch.sign)
    list(stream(model, [tokens(1, 5)]))
    mlp = model.continuum.mlps[0]
    moved = (mlp.state.levels[0].weights["up"][0] - mlp.bases()[0]["up"]).abs()
    assert torch.allclose(moved[moved > 0], torch.full_like(moved[moved > 0], 0.01), atol=1e-6)


def test_context_is_a_window():
    ids, window = tokens(1, 25), 6
    model = cms_from_pretrained(tiny("llama", layers=1), (1,), lr=0.0)
    got = losses(stream(model, [ids], update=False, context=window - 1, sink=0))[:, 0]
    model.continuum.detach()
    wanted = []
    for t in range(24):
        low = max(0, t - window + 1)
        positions = torch.arange(low, t + 1)[None]
        with torch.no_grad():
            logits = model(input_ids=ids[:, low : t + 1], position_ids=positions).logits
        wanted.append(F.cross_entropy(logits[0, -1], ids[0, t + 1]))
    assert torch.allclose(got, torch.stack(wanted), atol=1e-4)


def test_learned_positions_start_over():
    model = cms_from_pretrained(tiny("gpt2"), (8,), lr=0.0)
    assert len(list(stream(model, [tokens(1, 161)]))) == 20


def test_memories_inside_our_own_model():
    config = TrunkConfig(vocab_size=61, hidden_size=16, num_layers=2, num_heads=2, init_std=0.2)
    rows = {}
    for error in ("backprop", "local"):
        torch.manual_seed(0)
        extra = {i: ContinuumMemory(16, (4, 8), output="branch", layer=i, error=error, lr_init=0.5) for i in range(2)}
        model = CausalLM(config, extra=extra).eval()
        ids = tokens(2, 16).repeat(1, 8)
        logs = list(stream(model, [ids], context=4))
        rows[error] = [log["loss"] for log in logs]
        assert all(p.grad is None for p in model.parameters())
    assert sum(rows["backprop"][-8:]) < 0.8 * sum(rows["backprop"][:8])


def test_schedule_and_cost():
    model = cms_from_pretrained(tiny("llama"), (2, 8), "copy", error="schedule")
    levels = model.continuum.level_parameters()
    assert [period for _, period in levels.values()] == [2, 8] and all(len(p) == 6 for p, _ in levels.values())
    cost = model.continuum.update_cost()
    assert cost["parameters"] == 4 * 3 * 16 * 22 and cost["per_token"] == cost["parameters"] / 2 * (1 / 2 + 1 / 8)
    assert cost["single"] == cost["parameters"] / 2
    with pytest.raises(ValueError, match="schedule"):
        next(stream(model, [tokens(1, 5)]))
    assert len(list(stream(model, [tokens(1, 5)], update=False))) == 2
    with pytest.raises(ValueError, match="split"):
        cms_from_pretrained(tiny("llama"), (2, 8), error="schedule").continuum.level_parameters()


def test_nothing_is_written_when_not_finite():
    model = cms_from_pretrained(tiny("llama"), (2,), lr=0.5)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="nothing was written") as caught:
        list(stream(model, [tokens(1, 5)]))
    assert caught.value.token == 2 and all(state.levels[0].weights is None for state in model.continuum.states)


def test_refusals():
    model = tiny("llama")
    for options, words in (
        (dict(chunk_sizes=(4, 2)), "strictly increasing"),
        (dict(chunk_sizes=(2, 4), split="heads"), "split"),
        (dict(chunk_sizes=(2, 4), error="local"), "no view"),
        (dict(chunk_sizes=(1, 2, 3, 4, 5), split="layers"), "at most 4 levels for 4 layers, got 5"),
        (dict(chunk_sizes=tuple(range(1, 24))), "at most 22 levels for 22 neurons"),
        (dict(chunk_sizes=(2, 4), lr=(0.1,)), "lr: expected one number or 2"),
        (dict(chunk_sizes=(2, 4), lr=-1.0), "lr"),
        (dict(chunk_sizes=(2, 4), rho=2), "rho"),
    ):
        with pytest.raises(ValueError, match=words):
            cms_from_pretrained(model, **options)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        cms_from_pretrained("a checkpoint", (2,))
    with pytest.raises(ValueError, match="got none in Linear"):
        cms_from_pretrained(torch.nn.Linear(2, 2), (2,))
    with pytest.raises(ValueError, match="got neither"):
        stream(model, [])
    cms = cms_from_pretrained(model, (2, 4))
    with pytest.raises(ValueError, match="has not been cut"):
        cms_from_pretrained(cms, (2, 4))
    with pytest.raises(ValueError, match="reset"):
        stream(cms, [], reset="always")
    with pytest.raises(ValueError, match="integer tokens"):
        list(stream(cms, [torch.randn(1, 5)]))
    with pytest.raises(ValueError, match="padding on the right"):
        list(stream(cms, [{"input_ids": tokens(1, 4), "attention_mask": torch.tensor([[0, 1, 1, 1]])}]))
    with pytest.raises(ValueError, match="no padding"):
        list(stream(cms, [{"input_ids": tokens(1, 4), "attention_mask": torch.tensor([[1, 1, 1, 0]])}], reset="never"))
    with pytest.raises(ValueError, match="expected 1 rows"):
        list(stream(cms, [tokens(1, 4), tokens(2, 4)], reset="never"))
    assert list(stream(cms, [tokens(1, 1)])) == []


def test_text_stream_reports():
    model, ids = tiny("llama"), tokens(1, 12)[0].repeat(8)
    options = dict(tokens=80, context=8, lr=0.02, model=model, ids=ids)
    frozen = run_text_stream((4, 16), update=False, **options)
    moved = run_text_stream((4, 16), **options)
    assert moved["writes"] == [20, 5] and frozen["writes"] == [0, 0] and not hasattr(model, "continuum")
    assert sum(moved["quarters"]) / 4 == pytest.approx(moved["loss"], abs=1e-4)
    assert moved["quarters"][3] < frozen["quarters"][3] and moved["curve"][-1][0] == 80
    with pytest.raises(ValueError, match="tokens: expected at most 95"):
        run_text_stream((4,), **{**options, "tokens": 96})
    with pytest.raises(ValueError, match="text"):
        run_text_stream((4,), text="wiki")
