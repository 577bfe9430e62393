"""Looking into the slots: exact coefficients, logs across calls, bounds, refusals."""

import itertools

import pytest
import torch

import papers10.fast_weight_pkm.layer as layer_module
from papers10.core.random import generator, seeded
from papers10.fast_weight_pkm.inspection import (
    Records,
    SlotInspector,
    gate_histogram,
    nearest,
    similar_slots,
    stream_stats,
)
from papers10.fast_weight_pkm.layer import FwPKM, FwPKMLayer
from papers10.fast_weight_pkm.model import FwPKMCausalLM, iterative_read, memories, memory_options, variant

SIZE = dict(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, window=8, mlp_size=16, fwpkm_k_dim=8, fwpkm_v_dim=12, fwpkm_n_subkeys=6, fwpkm_topk=3, fwpkm_update_chunk_size=7)


def _model(memory="fwpkm@1", **options):
    return FwPKMCausalLM(variant("swa", memory, **SIZE, **options), seed=0).double().eval()


def _layer(**options):
    options = {"n_subkeys": 5, "topk": 3, "key_dim": 6, "value_dim": 7, "chunk_size": 6, **options}
    layer = seeded(0, "inspected", lambda: FwPKM(9, **options)).double()
    for name in ("q_proj", "v_proj", "g_proj"):
        torch.nn.init.normal_(getattr(layer, name).weight, generator=generator(0, name))
    return layer


def _hidden(batch=2, time=25):
    return torch.randn(batch, time, 9, dtype=torch.float64, generator=generator(0, "hidden"))


def _ids(batch=2, time=30, seed=0):
    return torch.randint(40, (batch, time), generator=generator(seed, "ids"))


@pytest.fixture
def reads(monkeypatch):
    """Outputs [B, T, dv] of every call of the memory operation."""
    outputs, original = [], layer_module.fwpkm

    def caught(*arguments, **options):
        result = original(*arguments, **options)
        outputs.append(result[0])
        return result

    monkeypatch.setattr(layer_module, "fwpkm", caught)
    return outputs


@pytest.mark.parametrize("options", [
    {}, {"value_step": "paper"}, {"value_step": "normalized", "fast_lr": 0.5}, {"boundary": "drop"}, {"lookahead": 0}, {"lookahead": 3}, {"heads": 2}, {"heads": 2, "share_values": False},
    {"value_decay": 0.2}, {"addr_weight": 0.0}, {"score": "dot"}, {"normalize": "silu"}, {"gate_loss": False}, {"topk": 5, "fast_lr": 0.3},
], ids=str)
@torch.no_grad()
def test_values_times_contributions_are_what_is_read(options, reads):
    layer, hidden = _layer(**options), _hidden()
    layer.values.zero_()
    with SlotInspector(layer) as inspector:
        layer(hidden)
    values = layer._signals(hidden)[1]
    for sample in range(2):
        coefficients, rest = inspector.contributions(sample=sample)
        torch.testing.assert_close(coefficients @ values[sample], reads[0][sample], atol=1e-10, rtol=0)
        if "value_decay" not in options and "normalize" not in options:
            torch.testing.assert_close(coefficients.sum(1) + rest, torch.ones(25, dtype=torch.float64), atol=1e-10, rtol=0)


@torch.no_grad()
def test_shared_tables_count_pairs_of_other_samples_as_rest(reads):
    layer, hidden = _layer(samples="shared"), _hidden()
    layer.values.zero_()
    with SlotInspector(layer) as inspector:
        layer(hidden)
    values = layer._signals(hidden)[1].flatten(0, 1)
    for sample, place in ((0, 20), (1, 24)):
        writers = inspector.writers(place, sample=sample, top=1000)
        total = sum(record["contribution"] * values[record["sample"] * 25 + record["position"] + 1] for record in writers if record.get("position") is not None)
        torch.testing.assert_close(total, reads[0][sample, place], atol=1e-10, rtol=0)
        assert {record["sample"] for record in writers if record.get("position") is not None} == {0, 1}
        own, rest = inspector.contributions([place], sample=sample)
        assert abs(float(own.sum() + rest) - 1) < 1e-10 and float(own.abs().sum()) > 0


@torch.no_grad()
def test_padding_does_not_change_a_sample():
    layer, hidden = _layer(), _hidden()
    mask = torch.ones(2, 25, dtype=torch.bool)
    mask[1, :9] = False
    with SlotInspector(layer) as padded:
        layer(hidden, None, mask)
    with SlotInspector(layer) as alone:
        layer(hidden[1:, 9:])
    a, b = padded.contributions(sample=1), alone.contributions()
    assert a[0].shape == (16, 16)
    for left, right in zip(a, b):
        torch.testing.assert_close(left, right, atol=1e-10, rtol=0)
    torch.testing.assert_close(padded.gates(sample=1), alone.gates())


@torch.no_grad()
def test_nothing_is_read_from_the_own_chunk_or_later_and_nothing_written_means_all_rest():
    layer, hidden = _layer(), _hidden()
    with SlotInspector(layer) as inspector:
        layer(hidden)
    chunk = torch.arange(25) // 6
    assert torch.equal(inspector.contributions()[0][chunk[:, None] <= chunk], torch.zeros(int((chunk[:, None] <= chunk).sum()), dtype=torch.float64))
    with memory_options(layer, update=False), SlotInspector(layer) as frozen:
        layer(hidden)
    coefficients, rest = frozen.contributions()
    assert not coefficients.any() and torch.allclose(rest, torch.ones_like(rest))
    assert frozen.writers()[-1]["context"] == "(first tables)" and frozen.reads()[0]["position"] is None and not frozen.chunks()


@torch.no_grad()
def test_slots_and_writers_agree_with_the_log():
    model, ids = _model(), _ids()
    with SlotInspector(model, decode=lambda tokens: "".join(chr(60 + token) for token in tokens), context=2) as inspector:
        model(ids)
    reads = inspector.reads(-1, sample=1)
    assert [record["weight"] for record in reads] == sorted((record["weight"] for record in reads), reverse=True)
    for record in reads:
        writes = [write for write in inspector.writes(record["slot"], sample=1) if write["share"] != 0 and write["position"] + 1 < 28]
        assert len(writes) == record["writes"]
        for write in writes:
            at = write["position"]
            assert write["token"] == chr(60 + int(ids[1, at])) and write["target"] == chr(60 + int(ids[1, at + 1])) and len(write["context"]) == min(2, at)
    writers = inspector.writers(-1, sample=1, top=3)
    assert abs(sum(record["contribution"] for record in writers) - 1) < 1e-10
    slots = {record["slot"] for record in reads}
    assert all(set(record["slots"]) <= slots for record in writers if "slots" in record)


@torch.no_grad()
def test_pieces_give_the_log_of_one_call():
    model, ids = _model(), _ids()
    results = []
    for sizes in ([30], [1] * 30, [5, 1, 24]):
        with SlotInspector(model) as inspector:
            cache = model.new_cache()
            for part in ids.split(sizes, 1):
                model(part, cache=cache)
        assert inspector.documents() == 1
        results.append((*inspector.contributions(sample=1), inspector.writes(3)))
    for coefficients, rest, writes in results[1:]:
        torch.testing.assert_close(coefficients, results[0][0], atol=1e-9, rtol=0)
        torch.testing.assert_close(rest, results[0][1], atol=1e-9, rtol=0)
        assert [write["position"] for write in writes] == [write["position"] for write in results[0][2]]


@torch.no_grad()
def test_readings_are_documents_of_one_log_and_a_new_sequence_begins_another():
    model, ids = _model(), _ids()
    with SlotInspector(model) as inspector:
        iterative_read(model, ids, 3)
        assert inspector.documents() == 3
        documents = {record["document"] for record in inspector.writers(0, top=1000) if record.get("position") is not None}
        assert documents == {0, 1} and inspector.contributions([0])[0].abs().sum() == 0
        model(ids)
        assert inspector.documents() == 1


@torch.no_grad()
def test_a_memory_that_lasts_keeps_its_log_and_others_start_before_it():
    model = _model(fwpkm_state_mode="persistent")
    with SlotInspector(model) as inspector:
        model(_ids(2, 20))
        model(_ids(2, 20, seed=1))
    assert inspector.documents() == 2
    assert {record["document"] for record in inspector.writers(0, top=1000) if record.get("position") is not None} == {0}
    own, ids = _model(), _ids()
    cache = own.new_cache()
    own(ids[:, :15], cache=cache)
    with SlotInspector(own) as late:
        own(ids[:, 15:], cache=cache)
    assert late.writers(-1)[-1]["context"] == "(before the log)" and late.writers(-1)[-1]["contribution"] != 0
    assert late.reads(15)[0]["slot"] >= 0
    with pytest.raises(ValueError, match="position"):
        late.reads(3)


@torch.no_grad()
def test_the_log_is_bounded_and_what_left_counts_as_before():
    model, ids = _model(), _ids(1, 70)
    with SlotInspector(model, limit=15) as inspector:
        cache = model.new_cache()
        for part in ids.split(7, 1):
            model(part, cache=cache)
    assert sum(len(chunk.sample) for chunk in inspector.chunks()) <= 15
    coefficients, rest = inspector.contributions([-1])
    assert abs(float(coefficients.sum() + rest) - 1) < 1e-10 and inspector.writers()[-1]["context"] == "(before the log)"
    with pytest.raises(ValueError, match="last 15 tokens"):
        inspector.reads(3)
    assert torch.isnan(inspector.gates()[:50]).all() and not torch.isnan(inspector.gates()[-7:]).any()


def test_the_model_computes_the_same_and_is_left_as_it_was():
    model, ids = _model("fwpkm@0,1"), _ids()
    heard = []
    memories(model)[0].observer = heard.append
    plain = model(ids, labels=ids)
    before = len(heard)
    with SlotInspector(model) as inspector:
        watched = model(ids, labels=ids)
    watched.loss.backward()
    assert torch.equal(plain.logits, watched.logits) and len(heard) == 2 * before > 0
    assert memories(model)[1].observer is None and not {"branch", "flush"} & set(vars(memories(model)[0]))
    assert len(inspector.names) == 2 and all(inspector.reads(memory=name) for name in inspector.names)
    with pytest.raises(RuntimeError, match="stop"), SlotInspector(model):
        raise RuntimeError("stop")
    assert "branch" not in vars(memories(model)[0])


@torch.no_grad()
def test_a_layer_without_token_ids():
    layer = seeded(0, "layer", lambda: FwPKMLayer(9, n_subkeys=5, topk=3, key_dim=6, value_dim=7, chunk_size=6))
    with SlotInspector(layer, queries=True) as inspector:
        layer(_hidden().float())
    assert inspector.writers(-1)[0]["token"] is None and inspector.writers(-1)[0]["position"] >= 0
    found = inspector.similar_positions(4, 3)
    assert len(found) == 3 and 4 not in [record["position"] for record in found]


@torch.no_grad()
def test_statistics():
    model, ids = _model("fwpkm@0,1"), _ids(3, 30)
    gates = gate_histogram(model, ids)
    assert len(gates) == 2 and all(len(record["shares"]) == 10 and abs(sum(record["shares"]) - 1) < 1e-6 and record["tokens"] == 90 for record in gates)
    stream = stream_stats(model, ids, segment=8)
    assert [record["tokens"] for record in stream] == [8, 8, 16, 16, 24, 24, 30, 30]
    first = [record for record in stream if record["memory"] == stream[0]["memory"]]
    assert all(a["ever"] <= b["ever"] for a, b in itertools.pairwise(first)) and abs(first[0]["ever"] - first[0]["coverage"]) < 1e-12
    lasting = _model(fwpkm_state_mode="persistent")
    before = memories(lasting)[0].values.clone()
    gate_histogram(lasting, ids)
    stream_stats(lasting, ids)
    assert torch.equal(memories(lasting)[0].values, before)


def test_nearest_rows():
    values = torch.randn(30, 6, generator=generator(0, "nearest"))
    values[7] = values[3]
    distance, index = nearest(values, 3, 4)
    wanted = (values.double() - values[3].double()).norm(dim=1)
    wanted[3] = float("inf")
    torch.testing.assert_close(distance, wanted.sort().values[:4], atol=1e-6, rtol=0)
    assert int(index[0]) == 7 and 3 not in index
    record = similar_slots(values, 3, 2)[0]
    assert record["slot"] == 7 and abs(record["cosine"] - 1) < 1e-6 and record["distance"] < 1e-6


def test_records_show_themselves():
    records = Records([{"text": "\n", "number": 0.25, "list": [0.5, 1.0]}, {"text": " ", "number": None, "list": []}])
    assert "⏎" in repr(records) and "␣" in records._repr_html_() and "0.50 1.00" in repr(records) and records[0]["text"] == "\n"
    assert repr(Records()) == "no records" and "no records" in Records()._repr_html_()


@pytest.mark.parametrize("call, words", [
    (lambda i: SlotInspector(torch.nn.Linear(2, 2)), "model: expected fast-weight product-key memories"),
    (lambda i: SlotInspector(i.model, limit=0), "limit"),
    (lambda i: SlotInspector(i.model, context=-1), "context"),
    (lambda i: i.reads(30), "position: expected a whole number from -30 to 29, got 30"),
    (lambda i: i.reads(1.0), "position"),
    (lambda i: i.reads(0, sample=2), "sample"),
    (lambda i: i.writers(0, memory=1), "memory"),
    (lambda i: i.writers(0, memory="other"), "memory: expected one of"),
    (lambda i: i.writers(0, document=1), "document"),
    (lambda i: i.writers(0, top=0), "top"),
    (lambda i: i.writes(36), "slot"),
    (lambda i: i.similar_positions(), "queries"),
    (lambda i: SlotInspector(i.model).reads(), "without a call"),
    (lambda i: gate_histogram(i.model, torch.zeros(1, 0, dtype=torch.int64)), "ids"),
    (lambda i: gate_histogram(i.model, _ids(), bins=0), "bins"),
    (lambda i: stream_stats(i.model, _ids(), segment=0), "segment"),
    (lambda i: similar_slots(torch.zeros(4, 2), 4, 1), "row"),
    (lambda i: similar_slots(torch.zeros(4, 2), 0, 4), "k"),
    (lambda i: similar_slots(torch.zeros(4, 2, dtype=torch.int64), 0, 1), "vectors"),
])
def test_refusals(call, words):
    model = _model()
    with torch.no_grad(), SlotInspector(model) as inspector:
        model(_ids())
    with pytest.raises(ValueError, match=words):
        call(inspector)


def test_clamped_steps_and_nested_blocks_are_refused():
    layer = _layer(grad_clip=True)
    with torch.no_grad(), SlotInspector(layer) as inspector:
        layer(_hidden())
        with pytest.raises(RuntimeError, match="one block at a time"):
            inspector.__enter__()
    with pytest.raises(ValueError, match="grad_clip"):
        inspector.writers()
    assert inspector.writes(int(inspector.chunks()[0].slots[0, 0]))
    with pytest.raises(TypeError, match="new_cache"):
        stream_stats(layer, torch.zeros(1, 3, dtype=torch.int64))
