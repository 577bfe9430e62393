"""Reading and writing the fast memory: known values, cuts, masks, state, gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.checks import NonFiniteError
from papers10.core.random import generator
from papers10.fast_weight_pkm.addressing import addressing_step, pkm_address
from papers10.fast_weight_pkm.memory import FwPKMState, fwpkm, fwpkm_read, fwpkm_write


def _draw(seed, *shape):
    return torch.randn(shape, generator=generator(seed, "memory"), dtype=torch.float64)


def _problem(seed=0, batch=2, time=20, heads=1, n=5, half=2, dv=3, own=True):
    lead = (batch,) if own else ()
    state = FwPKMState(_draw(seed, *lead, heads, 2, n, half), _draw(seed + 1, *lead, n * n, dv))
    return (_draw(seed + 2, batch, time, heads, 2 * half), _draw(seed + 3, batch, time, dv), _draw(seed + 4, batch, time).sigmoid()), state


def _close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, atol=atol, rtol=0, equal_nan=True)


def _naive(q, v, g, state, *, chunk_size, lookahead, topk, lr, value_step, addr_weight, boundary):
    """One sample, pair by pair in plain loops, each chunk written at its end."""
    keys, values, out = state.keys[0].clone(), state.values[0].clone(), []
    for start in range(0, len(q), chunk_size):
        stop = min(start + chunk_size, len(q))

        def read(t, keys=keys, values=values):
            at = pkm_address(q[t], keys, topk)
            return (values[at.slots] * at.weights[:, None]).sum(0)

        out += [read(t) for t in range(start, stop)]
        if stop - start < chunk_size:
            break
        first = start - lookahead if boundary == "carry" else start
        pairs = [(t, t + lookahead) for t in range(max(0, first), stop - lookahead) if t + lookahead >= (start if boundary == "carry" else start + lookahead)]
        found = {t: pkm_address(q[t], keys, topk) for t in {*range(start, stop), *(t for t, _ in pairs)}}
        counted = [t for t, _ in pairs] if value_step != "official" or boundary == "carry" else range(start, stop)
        reads = torch.bincount(torch.cat([found[t].slots for t in counted]), minlength=len(values)) if counted else None
        step = torch.zeros_like(values)
        for t, target in pairs:
            alpha = found[t].weights
            factor = {"paper": 1.0, "official": alpha.numel() * (1 if boundary == "carry" else (stop - start) / len(pairs)), "normalized": 1 / float(alpha.square().sum())}[value_step]
            for slot, weight in zip(found[t].slots, alpha):
                step[slot] += factor * weight * g[t] * (read(t) - v[target]) / reads[slot].clamp_min(1)
        if addr_weight:
            keys = addressing_step(keys, q[start:stop], topk, lr, addr_weight)[0]
        values = values - lr * step
    return torch.stack(out), keys, values


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(0, 3), st.integers(1, 3), st.integers(1, 2), st.sampled_from(["paper", "official", "normalized"]), st.sampled_from(["carry", "drop"]),
       st.sampled_from([0.0, 0.7]))
def test_equals_a_loop_over_pairs(chunk, lookahead, topk, heads, rule, boundary, weight):
    (q, v, g), state = _problem(heads=heads, batch=1, time=17)
    options = dict(chunk_size=chunk, lookahead=lookahead, topk=topk, lr=0.3, value_step=rule, addr_weight=weight, boundary=boundary)
    out, after, _ = fwpkm(q, v, g, state, **options)
    wanted, keys, values = _naive(q[0], v[0], g[0], state, **options)
    _close(out[0], wanted)
    _close(after.keys[0], keys)
    _close(after.values[0], values)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.booleans(), st.sampled_from(["carry", "drop"]), st.integers(0, 4), st.integers(1, 6))
def test_any_cut_gives_the_same(sizes, own, boundary, lookahead, chunk):
    total = sum(sizes)
    (q, v, g), state = _problem(time=total, own=own)
    options = dict(chunk_size=chunk, lookahead=lookahead, topk=2, lr=0.4, boundary=boundary)
    whole, end, _ = fwpkm(q, v, g, state, **options)
    at, pieces, now = 0, [], state
    for size in sizes:
        piece, now, _ = fwpkm(q[:, at : at + size], v[:, at : at + size], g[:, at : at + size], now, **options)
        pieces.append(piece)
        at += size
    _close(torch.cat(pieces, 1), whole)
    _close(now.values, end.values)
    _close(now.keys, end.keys)
    assert now.step == end.step == total // chunk


def test_backends_agree():
    (q, v, g), state = _problem(own=False)
    first, second = (fwpkm(q, v, g, state, chunk_size=4, topk=3, backend=backend) for backend in ("torch", "reference"))
    _close(first[0], second[0])
    _close(first[1].values, second[1].values)


def test_a_token_sees_neither_its_chunk_nor_later_ones():
    (q, v, g), state = _problem()
    out = fwpkm(q, v, g, state, chunk_size=6, topk=2)[0]
    changed = [part.clone() for part in (q, v, g)]
    for part in changed:
        part[:, 12:] = part[:, 12:] + 0.1
    assert torch.equal(fwpkm(*changed, state, chunk_size=6, topk=2)[0][:, :12], out[:, :12])
    changed = v.clone()
    changed[:, 13:] += 1
    assert torch.equal(fwpkm(q, changed, g, state, chunk_size=6, topk=2)[0][:, :18], out[:, :18])


def test_one_normalized_write_then_a_read_returns_the_target():
    (q, v, _), state = _problem(batch=1, time=2)
    _, after, _ = fwpkm(q, v, torch.ones(1, 2, dtype=torch.float64), state, chunk_size=2, topk=3, value_step="normalized", addr_weight=0.0)
    _close(fwpkm(q[:, :1], v[:, :1], v[:, :1, 0], after, chunk_size=2, topk=3, update=False)[0][:, 0], v[:, 1], atol=1e-12)


def test_what_changes_nothing():
    (q, v, g), state = _problem()
    before = state.values.clone(), state.keys.clone()
    for options in ({"lr": 0.0}, {"update": False}):
        after = fwpkm(q, v, g, state, chunk_size=4, topk=2, **options)[1]
        assert torch.equal(after.values, before[0]) and torch.equal(after.keys, before[1])
    after = fwpkm(q, v, 0 * g, state, chunk_size=4, topk=2, addr_weight=0.0)[1]
    assert torch.equal(after.values, before[0])
    fwpkm(q, v, g, state, chunk_size=4, topk=2)
    assert torch.equal(state.values, before[0]) and torch.equal(state.keys, before[1])
    assert fwpkm(q, v, g, state, chunk_size=4, topk=2, update=False)[1] is state


def test_untouched_slots_keep_their_bits():
    (q, v, g), state = _problem(n=8)
    _, after, aux = fwpkm(q, v, g, state, chunk_size=20, topk=1, return_aux=True)
    for sample in range(2):
        read = set(aux.slots[sample].flatten().tolist())
        for slot in set(range(64)) - read:
            assert torch.equal(after.values[sample, slot], state.values[sample, slot])


def test_samples_permute():
    (q, v, g), state = _problem(batch=3)
    order = torch.tensor([2, 0, 1])
    out, after, _ = fwpkm(q, v, g, state, chunk_size=4, topk=2)
    again, moved, _ = fwpkm(q[order], v[order], g[order], state.reorder(order), chunk_size=4, topk=2)
    assert torch.equal(again, out[order]) and torch.equal(moved.values, after.values[order])


def test_shared_memory_pools_its_samples():
    (q, v, g), state = _problem(own=False, batch=2, time=4)
    _, both, _ = fwpkm(q, v, g, state, chunk_size=4, topk=2, value_step="paper", lookahead=0, addr_weight=0.5)
    _, one, _ = fwpkm(*(part.reshape(1, 8, *part.shape[2:]) for part in (q, v, g)), state, chunk_size=8, topk=2, value_step="paper", lookahead=0, addr_weight=0.5)
    _close(both.values, one.values)
    _close(both.keys, one.keys)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 13), min_size=2, max_size=3), st.integers(1, 5), st.integers(0, 2))
def test_left_padding_and_unequal_rows(lengths, chunk, lookahead):
    (q, v, g), state = _problem(batch=len(lengths), time=13)
    options = dict(chunk_size=chunk, lookahead=lookahead, topk=2, lr=0.4)
    mask = torch.stack([torch.arange(13) >= 13 - length for length in lengths])
    together, end, _ = fwpkm(q, v, g, state, mask=mask, **options)
    new = _problem(seed=20, batch=len(lengths), time=7)[0]
    more, last, _ = fwpkm(*new, end, **options)
    for b, length in enumerate(lengths):
        own = FwPKMState(state.keys[b : b + 1], state.values[b : b + 1])
        alone, middle, _ = fwpkm(q[b : b + 1, 13 - length :], v[b : b + 1, 13 - length :], g[b : b + 1, 13 - length :], own, **options)
        after, final, _ = fwpkm(*(part[b : b + 1] for part in new), middle, **options)
        _close(together[b, 13 - length :], alone[0])
        _close(more[b], after[0])
        _close(last.values[b], final.values[0])


def test_all_masked_writes_nothing():
    (q, v, g), state = _problem(own=False)
    _, after, aux = fwpkm(q, v, g, state, chunk_size=4, topk=2, mask=torch.zeros(2, 20, dtype=torch.bool), return_aux=True)
    assert torch.equal(after.values, state.values) and torch.equal(after.keys, state.keys) and math.isfinite(float(aux.mem_loss))


def test_empty_and_short_input():
    (q, v, g), state = _problem(time=0)
    out, after, _ = fwpkm(q, v, g, state, chunk_size=4, topk=2)
    assert out.shape == (2, 0, 3) and torch.equal(after.values, state.values)
    (q, v, g), state = _problem(time=3)
    _, after, _ = fwpkm(q, v, g, state, chunk_size=3, lookahead=5, topk=2, addr_weight=0.0, boundary="drop")
    assert torch.equal(after.values, state.values)


def test_the_chunk_may_change_from_call_to_call():
    (q, v, g), state = _problem(time=9)
    _, five, _ = fwpkm(q, v, g, state, chunk_size=20, topk=2)
    assert five.step == 0 and five.pending.tolist() == [9, 9]
    _, after, _ = fwpkm(q[:, :1], v[:, :1], g[:, :1], five, chunk_size=4, topk=2)
    _, wanted, _ = fwpkm(q, v, g, state, chunk_size=20, topk=2, flush=True)
    assert after.step == 1 and torch.equal(after.values, wanted.values)


def test_a_nan_is_refused_or_left_out():
    (q, v, g), state = _problem()
    v[1, 5] = math.nan
    with pytest.raises(NonFiniteError, match="sample 1"):
        fwpkm(q, v, g, state, chunk_size=4, topk=2)
    out, after, aux = fwpkm(q, v, g, state, chunk_size=4, topk=2, nonfinite="skip", return_aux=True)
    assert aux.nonfinite == 1 and out[1, 5].isnan().all() and after.values.isfinite().all() and int(out.isnan().any(-1).sum()) == 1
    clean = fwpkm(q[:1], v[:1], g[:1], FwPKMState(state.keys[:1], state.values[:1]), chunk_size=4, topk=2)[1]
    _close(after.values[0], clean.values[0])


@pytest.mark.parametrize("change, error", [
    ({"chunk_size": 0}, ValueError), ({"lookahead": -1}, ValueError), ({"topk": 6}, ValueError), ({"topk": 0}, ValueError), ({"lr": -1.0}, ValueError),
    ({"value_step": "officials"}, ValueError), ({"boundary": "keep"}, ValueError), ({"value_decay": 1.5}, ValueError), ({"detach_every": 0}, ValueError),
    ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError), ({"nonfinite": "ignore"}, ValueError),
])
def test_bad_options_are_named(change, error):
    (q, v, g), state = _problem()
    with pytest.raises(error, match=next(iter(change))):
        fwpkm(q, v, g, state, **{"chunk_size": 4, "topk": 2, **change})


def test_bad_shapes_are_named():
    (q, v, g), state = _problem()
    for broken, name in (((q[..., :2], v, g), "q"), ((q, v[..., :2], g), "v"), ((q, v, g[:1]), "g"), ((q[:1], v[:1], g[:1]), "q")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            fwpkm(*broken, state, chunk_size=4, topk=2)
    with pytest.raises(TypeError, match="q: expected a floating"):
        fwpkm(q.long(), v, g, state, chunk_size=4, topk=2)
    with pytest.raises(TypeError, match="state"):
        fwpkm(q, v, g, (state.keys, state.values), chunk_size=4, topk=2)
    with pytest.raises(ValueError, match="values: expected"):
        FwPKMState(state.keys, state.values[0])


def test_the_state_copies_moves_forks_and_comes_back():
    (q, v, g), state = _problem(batch=1)
    _, now, _ = fwpkm(q[:, :7], v[:, :7], g[:, :7], state, chunk_size=4, topk=2)
    loaded = FwPKMState.from_state_dict(now.state_dict())
    rest = lambda s: fwpkm(q[:, 7:], v[:, 7:], g[:, 7:], s, chunk_size=4, topk=2)
    wanted = rest(now)
    for other in (loaded, now.clone(), now.to("cpu"), now.detach()):
        _close(rest(other)[0], wanted[0])
    many = now.fork(3)
    _close(fwpkm(*(part[:, 7:].expand(3, *part[:, 7:].shape[1:]) for part in (q, v, g)), many, chunk_size=4, topk=2)[0][2], wanted[0][0])
    assert torch.equal(now.reset().values, state.values) and now.reset().queue is None
    with pytest.raises(ValueError, match="one sample"):
        many.fork(2)
    with pytest.raises(ValueError, match="keys"):
        FwPKMState.from_state_dict({"values": now.values})


def test_in_place_uses_the_tables_that_were_given():
    (q, v, g), state = _problem()
    wanted = fwpkm(q, v, g, state, chunk_size=4, topk=2)[1]
    with torch.no_grad():
        mine = state.clone()
        after = fwpkm(q, v, g, mine, chunk_size=4, topk=2, inplace=True)[1]
    assert after.values.data_ptr() == mine.values.data_ptr() and torch.equal(after.values, wanted.values)


def test_decay_shrinks_only_what_is_written():
    (q, v, g), state = _problem(own=False, n=8)
    plain = fwpkm(q, v, 0 * g, state, chunk_size=20, topk=1, addr_weight=0.0)[1]
    after = fwpkm(q, v, 0 * g, state, chunk_size=20, topk=1, addr_weight=0.0, value_decay=0.25)[1]
    changed = (after.values != plain.values).any(-1)
    torch.testing.assert_close(after.values[changed], 0.75 * plain.values[changed])
    assert 0 < int(changed.sum()) < 64


def test_clipped_step_is_bounded():
    (q, v, g), state = _problem(own=False)
    after = fwpkm(q, 100 * v, g, state, chunk_size=20, topk=2, addr_weight=0.0, grad_clip=True, lr=0.5)[1]
    assert float((after.values - state.values).abs().max()) <= 0.5 + 1e-12


def test_detached_writes_cut_the_gradient():
    (q, v, g), state = _problem(time=8)
    v.requires_grad_()
    fwpkm(q, v, g, state, chunk_size=4, topk=2, addr_weight=0.0)[0][:, 4:].sum().backward()
    assert float(v.grad.abs().sum()) > 0
    v.grad = None
    q.requires_grad_()
    fwpkm(q, v, g, state, chunk_size=4, topk=2, addr_weight=0.0, detach_every=1)[0][:, 4:].sum().backward()
    assert v.grad is None or float(v.grad.abs().sum()) == 0


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("rule", ["paper", "official", "normalized"])
def test_gradients_through_three_chunks(own, rule):
    (q, v, g), state = _problem(batch=2, time=7, n=4, own=own)
    inputs = [t.clone().requires_grad_() for t in (q, v, g, state.keys, state.values)]
    weight = torch.cos(torch.arange(2 * 7 * 3, dtype=torch.float64)).view(2, 7, 3)

    def loss(q, v, g, keys, values):
        out, after, _ = fwpkm(q, v, g, FwPKMState(keys, values), chunk_size=3, topk=2, lr=0.5, value_step=rule)
        return (out * weight).sum() + after.values.square().sum() + after.keys.square().sum()

    assert torch.autograd.gradcheck(loss, inputs, atol=1e-6)
    fast = torch.autograd.grad(loss(*inputs), inputs)

    def slow(q, v, g, keys, values):
        out, after, _ = fwpkm(q, v, g, FwPKMState(keys, values), chunk_size=3, topk=2, lr=0.5, value_step=rule, backend="reference")
        return (out * weight).sum() + after.values.square().sum() + after.keys.square().sum()

    for a, b in zip(fast, torch.autograd.grad(slow(*inputs), inputs)):
        torch.testing.assert_close(a.to_dense() if a.is_sparse else a, b, atol=1e-8, rtol=1e-8)


def test_observer_sees_who_wrote_what():
    (q, v, g), state = _problem(batch=1, time=9)
    events = []
    fwpkm(q, v, g, state, chunk_size=4, topk=2, observer=events.append)
    assert len(events) == 2
    assert events[0].source.tolist() == [[-1, 0, 1, 2]] or events[0].source.tolist() == [[0, 1, 2]]
    assert events[1].source[0].tolist() == [3, 4, 5, 6] and events[1].target[0].tolist() == [4, 5, 6, 7]
    assert events[1].slots.shape == events[1].share.shape == (1, 4, 2)


def test_read_and_write_by_name():
    values, slots, weights = _draw(1, 6, 2), torch.tensor([[0, 1], [1, 5]]), torch.tensor([[0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)
    _close(fwpkm_read(values, slots, weights)[1], 0.2 * values[1] + 0.8 * values[5])
    error = _draw(2, 2, 2)
    after = fwpkm_write(values, slots, weights, error, lr=2.0)
    _close(after[1], values[1] - 2 * (0.5 * error[0] + 0.2 * error[1]) / 2)
    with pytest.raises(IndexError):
        fwpkm_read(values, slots + 5, weights)
