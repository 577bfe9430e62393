"""The layer around the memory, and the fast-weight network."""

import pytest
import torch
import torch.nn.functional as F

from papers10.core.random import generator, seeded
from papers10.fast_weight_pkm.layer import FwMLP, FwPKM, FwPKMLayer
from papers10.fast_weight_pkm.memory import FwPKMState, fwpkm

SMALL = {"n_subkeys": 6, "topk": 3, "key_dim": 4, "value_dim": 5, "chunk_size": 4}


def _layer(kind=FwPKMLayer, **options):
    return seeded(0, "layer", lambda: kind(8, **{**SMALL, **options})).double()


def _hidden(batch=2, time=14, seed=0):
    return torch.randn(batch, time, 8, generator=generator(seed, "hidden"), dtype=torch.float64)


def test_equals_its_formula():
    layer, x = _layer(heads=2, gate_width=8), _hidden()
    rms = lambda norm, h: F.rms_norm(h, h.shape[-1:], 1 + norm.weight, 1e-5)
    q = layer.q_proj(rms(layer.q_norm, x)).unflatten(-1, (2, 4))
    v = layer.v_proj(rms(layer.v_norm, x))
    v = (v - v.mean(-1, keepdim=True)) / (v.std(-1, keepdim=True) + 1e-6)
    g = layer.g_proj(rms(layer.g_norm, x)).mean(-1).sigmoid()
    read, _, _ = fwpkm(q, v, g, layer.new_state(2), chunk_size=4, topk=3)
    mixed = g[..., None] * read + (1 - g[..., None]) * v
    torch.testing.assert_close(layer(x)[0], x + layer.o_proj(rms(layer.o_norm, mixed)))


def test_ungated_adds_value_and_reading():
    layer, x = _layer(gated=False), _hidden()
    assert layer.g_proj is None
    _, v, g = layer._signals(x)
    read = fwpkm(layer._signals(x)[0].unflatten(-1, (1, -1)), v, g, layer.new_state(2), chunk_size=4, topk=3, gate_loss=False)[0]
    torch.testing.assert_close(layer(x)[0] - x, layer.o_proj(layer.o_norm(read + v)))
    assert torch.equal(g, torch.ones_like(g))


@pytest.mark.parametrize("options", [{}, {"heads": 2, "share_values": False}, {"boundary": "drop"}, {"query_norm": "l2", "value_norm": "none"}, {"samples": "shared"},
                                     {"value_step": "paper", "score": "dot"}, {"value_decay": 0.1}, {"lookahead": 0}, {"keys_follow_values": True}])
def test_pieces_padding_and_gradients(options):
    layer, x = _layer(**options), _hidden()
    whole, _ = layer(x)
    state, pieces = None, []
    for piece in x.split([1, 6, 7], 1):
        out, state = layer(piece, state, use_cache=True)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-10, rtol=0)
    if layer.samples == "own":
        mask = torch.ones(2, 14)
        mask[0, :5] = 0
        torch.testing.assert_close(layer(x, None, mask)[0][0, 5:], layer(x[:1, 5:])[0][0], atol=1e-10, rtol=0)
    whole.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_persistent_state_is_the_modules_own():
    layer, x = _layer(state_mode="persistent"), _hidden()
    before = layer.values.clone()
    with torch.no_grad():
        layer(x)
    assert not torch.equal(layer.values, before)
    kept = layer.values.clone()
    with torch.no_grad():
        layer(x, use_cache=True)
    assert torch.equal(layer.values, kept), "a cache takes a copy"
    layer.train()
    out, _ = layer(x)
    out.sum().backward()
    assert not layer.values.requires_grad and "values" in layer.state_dict()
    frozen = layer.values.clone()
    layer.update = False
    layer(x)
    assert torch.equal(layer.values, frozen)


def test_reset_leaks_nothing_between_samples():
    layer, x = _layer(), _hidden(batch=3)
    torch.testing.assert_close(layer(x)[0][1], layer(x[1:2])[0][0], atol=1e-12, rtol=0)


def test_learned_tables_train_and_get_plain_gradients():
    layer, x = _layer(base="learned"), _hidden()
    assert len(layer.no_decay_parameters()) == 2
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    before = layer.values.detach().clone()
    layer(x)[0].square().sum().backward()
    assert not layer.values.grad.is_sparse
    optimizer.step()
    assert not torch.equal(layer.values, before)


def test_state_of_the_layer_round_trips_and_keeps_its_dtype():
    layer = _layer().float().to(torch.bfloat16)
    assert layer.q_proj.weight.dtype == torch.bfloat16 and layer.values.dtype == torch.float32
    out, state = layer(_hidden().bfloat16())
    assert out.dtype == torch.bfloat16 and state.values.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        plain = _layer().float()
        out, state = plain(_hidden().float())
    assert state.values.dtype == torch.float32
    again = _layer()
    again.load_state_dict(_layer().state_dict())
    assert torch.equal(again(_hidden())[0], _layer()(_hidden())[0])


def test_aux_reports_what_happened():
    layer, x = _layer(), _hidden()
    aux = layer(x, return_aux=True)[2]
    assert aux.writes == 3 and aux.gate.shape == (2, 14) and aux.slots.shape == (2, 14, 3) and float(aux.mem_loss) > 0
    assert 0 < aux.stats["coverage"] <= 1 and aux.max_step > 0 and aux.nonfinite == 0


def test_flush_writes_the_open_chunk():
    layer, x = _layer(), _hidden(time=6)
    _, state = layer(x, use_cache=True)
    flushed = layer.flush(state)
    assert flushed.step == state.step + 1 and not torch.equal(flushed.values, state.values)
    fresh = layer.new_state(2)
    assert layer.flush(fresh) is fresh


@pytest.mark.parametrize("options, name", [
    ({"key_dim": 3}, "key_dim"), ({"topk": 7}, "topk"), ({"n_subkeys": 0}, "n_subkeys"), ({"chunk_size": 0}, "chunk_size"), ({"lookahead": -1}, "lookahead"),
    ({"value_dim": 1}, "value_dim"), ({"state_mode": "persist"}, "state_mode"), ({"state_mode": "persistent", "samples": "own"}, "state_mode"),
    ({"value_step": "other"}, "value_step"), ({"base": "slow"}, "base"), ({"query_norm": "rms"}, "query_norm"),
])
def test_bad_sizes_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        _layer(**options)


def test_bad_input_is_named():
    layer = _layer()
    with pytest.raises(ValueError, match="hidden"):
        layer(torch.zeros(2, 3, 7).double())
    with pytest.raises(ValueError, match="attention_mask"):
        layer(_hidden(), None, torch.ones(2, 3))
    with pytest.raises(ValueError, match="state_limit_gb"):
        _layer(state_limit_gb=1e-9)(_hidden())
    _, state = layer(_hidden(), use_cache=True)
    with pytest.raises(ValueError, match="batch of 2"):
        layer(_hidden(batch=3), state)


@pytest.mark.parametrize("boundary", ["carry", "drop"])
def test_network_in_pieces_and_its_gradient(boundary):
    net = seeded(0, "net", lambda: FwMLP(8, key_dim=4, value_dim=5, inner_dim=6, chunk_size=4, boundary=boundary)).double()
    x = _hidden().requires_grad_()
    whole, _ = net(x)
    state, pieces = None, []
    for piece in x.split([3, 2, 9], 1):
        out, state = net(piece, state)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-11, rtol=0)
    assert torch.autograd.gradcheck(lambda x: net(x)[0][:, 8:].sum(), _hidden(batch=1, time=12).requires_grad_(), atol=1e-6)
    assert torch.equal(state.clone().keys["up"], state.keys["up"]) and state.reorder(torch.tensor([1])).keys["up"].shape[0] == 1


def test_observer_and_plain_state():
    layer, events = _layer(FwPKM), []
    layer.observer = events.append
    _, state = layer(_hidden())
    assert len(events) == 3 and isinstance(state, FwPKMState)
