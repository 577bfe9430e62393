"""The continuum memory: when levels are written, what with, and that reading in pieces is reading."""

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.checks import NonFiniteError
from papers10.lm.cache import Cache
from papers10.nested_learning.continuum import (
    ContinuumMemory,
    ContinuumState,
    LevelPlan,
    check_chunk_sizes,
    frequencies,
    update_cost,
    write_from_loss,
)

ONE = torch.ones(1, 1, 1)


def constant(plan, tokens):
    """Weight after each token under a constant error of 1."""
    state, base, seen = ContinuumState(1, [plan]), [{"w": torch.zeros(1, 1)}], []
    for _ in range(tokens):
        state.record(0, {"w": (ONE, ONE)})
        state.advance(base, 1)
        seen.append(state.weights(0, base[0])["w"].item())
    return state, base, seen


def test_constant_gradient():
    assert constant(LevelPlan(4, 0.1), 8)[2] == pytest.approx([0, 0, 0, -0.4, -0.4, -0.4, -0.4, -0.8])
    assert constant(LevelPlan(4, 0.1, "mean"), 8)[2] == pytest.approx([0, 0, 0, -0.1, -0.1, -0.1, -0.1, -0.2])
    state, base, seen = constant(LevelPlan(4, 0.1), 3)
    assert seen == [0, 0, 0]
    state.flush(base)
    assert state.weights(0, base[0])["w"].item() == pytest.approx(-0.3)
    state, base, _ = constant(LevelPlan(4, 0.1, "mean"), 3)
    state.flush(base)
    assert state.weights(0, base[0])["w"].item() == pytest.approx(-0.1)


def test_frequencies():
    assert frequencies((8, 64, 512)) == (64, 8, 1)


@pytest.mark.parametrize("rho, start", [(0.0, 0.0), (1.0, -0.4), (0.25, -0.1)])
def test_nested_reset(rho, start):
    plan = LevelPlan(2, 0.1, reset_every=4, rho=rho)
    _, _, seen = constant(plan, 4)
    assert seen == pytest.approx([0, -0.2, -0.2, start])
    _, _, seen = constant(plan, 8)
    assert seen[5] == pytest.approx(start - 0.2)
    assert seen[7] == pytest.approx(start + rho * -0.4)


def test_order_of_events():
    state = ContinuumState(1, [LevelPlan(2, reset_every=4), LevelPlan(4, reset_every=8), LevelPlan(8)])
    state.events, base = [], [{"w": torch.zeros(1, 1)}] * 3
    for _ in range(8):
        for level in range(3):
            state.record(level, {"w": (ONE, ONE)})
        state.advance(base, 1)
    kinds = [(token, kind, level + 1) for token, kind, level in state.events]
    assert kinds[:4] == [(2, "write", 1), (4, "write", 1), (4, "write", 2), (4, "move", 1)]
    assert kinds[-7:] == [
        (8, "write", 1),
        (8, "write", 2),
        (8, "write", 3),
        (8, "move", 1),
        (8, "reset", 1),
        (8, "move", 2),
        (8, "reset", 2),
    ]


def test_gradients_are_taken_before_anything_moves():
    torch.manual_seed(0)
    memory = ContinuumMemory(6, (2, 4), lr_init=0.3, clamp=False).double()
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        state = memory.new_state(1)
        memory(x, state=state)
        # by hand: level 1 moves after token 2, level 2 only after token 4 with errors at its start
        block1, block2 = memory.blocks
        first = ContinuumMemory(6, (2,), lr_init=0.3, clamp=False).double()
        first.blocks[0].load_state_dict(block1.state_dict())
        middle = first(x)
    base = {k: v.detach().clone().requires_grad_() for k, v in block2.base().items()}
    normed = block2.norm(middle)
    out = torch.nn.functional.gelu(normed @ base["up"].T) @ base["down"].T
    loss = (out - block2.target_proj(normed)).square().sum() / 12
    grads = torch.autograd.grad(loss, list(base.values()))
    for (name, value), grad in zip(base.items(), grads):
        assert torch.allclose(state.levels[1].weights[name][0], value - 0.3 * grad, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_pieces_equal_one_call(data):
    variant = data.draw(st.sampled_from(["sequential", "nested", "independent"]))
    options = dict(
        mlp=data.draw(st.sampled_from(["gelu", "swiglu"])),
        reduction=data.draw(st.sampled_from(["sum", "mean"])),
        meta=data.draw(st.sampled_from(["reptile", "maml"])),
        agg=data.draw(st.sampled_from(["softmax", "sum"])),
    )
    sizes = tuple(sorted(data.draw(st.sets(st.integers(1, 9), min_size=1, max_size=3))))
    time = data.draw(st.integers(1, 24))
    cuts = sorted(data.draw(st.sets(st.integers(0, time), max_size=6)) | {0, time})
    torch.manual_seed(data.draw(st.integers(0, 99)))
    memory = ContinuumMemory(4, sizes, variant, hidden_mult=2, lr_init=0.5, **options).double().eval()
    x = torch.randn(2, time, 4, dtype=torch.float64)
    cache = Cache(1)
    with torch.no_grad():
        parts = [memory(x[:, a:b], cache=cache) for a, b in itertools.pairwise(cuts)]
        assert torch.allclose(torch.cat(parts, 1), memory(x), atol=1e-10)


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_rows_padding_and_causality(variant):
    torch.manual_seed(1)
    memory = ContinuumMemory(5, (3, 6), variant, lr_init=0.5).double()
    x = torch.randn(3, 20, 5, dtype=torch.float64)
    with torch.no_grad():
        whole = memory(x)
        assert torch.allclose(memory(x[[2, 0, 1]]), whole[[2, 0, 1]], atol=1e-12)
        other = x.clone()
        other[1] = torch.randn(20, 5, dtype=torch.float64)
        assert torch.allclose(memory(other)[[0, 2]], whole[[0, 2]], atol=1e-12)
        later = x.clone()
        later[:, 11] += 1
        assert torch.allclose(memory(later)[:, :11], whole[:, :11], atol=1e-12)
        # rows with different padding in one batch, left and right
        rows = torch.randn(3, 27, 5, dtype=torch.float64)
        mask = torch.zeros(3, 27, dtype=torch.bool)
        for row, low in enumerate((0, 4, 7)):
            rows[row, low : low + 20], mask[row, low : low + 20] = x[row], True
        out = memory(rows, mask=mask)
        for row, low in enumerate((0, 4, 7)):
            assert torch.allclose(out[row, low : low + 20], whole[row], atol=1e-12)
        # and in pieces
        state = memory.new_state(3)
        pieces = [memory(rows[:, a:b], state=state, mask=mask[:, a:b]) for a, b in ((0, 2), (2, 3), (3, 16), (16, 27))]
        pieces = torch.cat(pieces, 1)
        for row, low in enumerate((0, 4, 7)):
            assert torch.allclose(pieces[row, low : low + 20], whole[row], atol=1e-12)
        valid = (torch.tensor([0, 4, 7]), torch.tensor([20, 24, 27]))
        assert torch.allclose(memory(rows, valid=valid)[mask], out[mask], atol=1e-12)
        packed = memory(x.reshape(1, 60, 5), cu_seqlens=torch.tensor([0, 20, 40, 60]))
        assert torch.allclose(packed.view(3, 20, 5), whole, atol=1e-12)


def test_short_sequences_and_zero_rate_change_nothing():
    torch.manual_seed(2)
    memory, plain = ContinuumMemory(4, (8, 16)), ContinuumMemory(4, (8, 16), error="schedule")
    plain.load_state_dict(memory.state_dict(), strict=False)
    x = torch.randn(2, 7, 4)
    assert torch.equal(memory(x), plain(x))
    long = torch.randn(2, 40, 4)
    still = ContinuumMemory(4, (8, 16), lr_init=0.0)
    still.load_state_dict(memory.state_dict())
    assert torch.allclose(still(long), plain(long), atol=1e-6) and not torch.allclose(
        memory(long), plain(long), atol=1e-4
    )
    assert memory(torch.zeros(2, 0, 4)).shape == (2, 0, 4)
    state = memory.new_state(2)
    memory(torch.zeros(2, 0, 4), state=state)
    assert state.count.tolist() == [0, 0]


def test_reset_forgets():
    torch.manual_seed(3)
    memory, x = ContinuumMemory(4, (2, 4), "nested", rho=0.5), torch.randn(1, 16, 4)
    state = memory.new_state(1)
    first = memory(x, state=state)
    assert not torch.allclose(memory(x, state=state), first)
    assert torch.equal(memory(x, state=state.reset()), first)


def test_flush_option():
    torch.manual_seed(4)
    memory = ContinuumMemory(4, (8,), flush=True)
    memory(torch.randn(1, 5, 4))
    state = memory.new_state(1)
    memory(torch.randn(1, 5, 4), state=state)
    assert state.levels[0].weights is None and state.levels[0].tokens.tolist() == [5]
    state.flush(memory.bases())
    assert state.levels[0].updates.tolist() == [1] and state.levels[0].tokens.tolist() == [0]


@pytest.mark.parametrize(
    "variant, meta",
    [("sequential", "reptile"), ("nested", "reptile"), ("nested", "maml"), ("independent", "reptile")],
)
def test_gradients_through_the_writes(variant, meta):
    torch.manual_seed(5)
    memory = ContinuumMemory(3, (2, 4), variant, hidden_mult=1, lr_init=0.4, meta=meta, clamp=False).double()
    x = torch.randn(1, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: memory(x), (x,), atol=1e-6)
    names = [name for name, _ in memory.named_parameters()]

    def loss(*values):
        return torch.func.functional_call(memory, dict(zip(names, values)), (x.detach(),)).square().sum()

    assert torch.autograd.gradcheck(loss, tuple(memory.parameters()), atol=1e-5)


def test_maml_is_the_gradient_of_the_period():
    torch.manual_seed(6)
    memory = ContinuumMemory(3, (2, 6), "nested", lr_init=(0.4, 0.1), meta="maml", rho=0.5, clamp=False).double()
    x = torch.randn(1, 6, 3, dtype=torch.float64)
    state = memory.new_state(1)
    with torch.no_grad():
        memory(x, state=state)
    start, base = state.levels[0].start["up"][0].detach(), memory.blocks[0].mlp.up_proj.weight

    def period():
        """Local loss of level 1 over the six tokens, with its two inner writes."""
        with torch.no_grad():
            one = ContinuumMemory(3, (2,), lr_init=0.4, clamp=False).double()
            one.blocks[0].load_state_dict(memory.blocks[0].state_dict())
            inner, total = one.new_state(1), 0.0
            for low in (0, 2, 4):
                piece = x[:, low : low + 2]
                block = one.blocks[0]
                normed = block.norm(piece)
                missed = memory_out(one, inner, piece) - piece - block.target_proj(normed)
                total += missed.square().sum().item() / 6
            return total

    def memory_out(one, inner, piece):
        return one(piece, state=inner)

    for index in ((0, 0), (5, 2)):
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                base[index] += step
                ends.append(period())
                base[index] -= step
        slope = (ends[0] - ends[1]) / 2e-5
        assert (base[index].item() - start[index].item()) / (0.5 * 0.4) == pytest.approx(slope, abs=1e-6)


def test_maml_and_reptile_agree_for_small_steps():
    torch.manual_seed(7)
    x, moved = torch.randn(1, 8, 3, dtype=torch.float64), {}
    for meta in ("reptile", "maml"):
        torch.manual_seed(8)
        memory = ContinuumMemory(3, (2, 8), "nested", lr_init=1e-5, meta=meta, rho=1.0).double()
        state = memory.new_state(1)
        with torch.no_grad():
            memory(x, state=state)
        moved[meta] = (state.levels[0].start["up"].detach() - memory.blocks[0].mlp.up_proj.weight) / 1e-5
    assert torch.allclose(moved["maml"], moved["reptile"], atol=1e-3) and moved["maml"].abs().max() > 1e-2


def test_no_graph_is_kept_without_gradient():
    torch.manual_seed(9)
    memory = ContinuumMemory(3, (2, 4), "nested", meta="maml").eval()
    state = memory.new_state(1)
    with torch.no_grad():
        for _ in range(3):
            memory(torch.randn(1, 4, 3), state=state)
    assert all(not value.requires_grad for value in state.levels[1].weights.values())


def test_loss_errors_match_autograd_per_row_and_touch_no_parameter():
    torch.manual_seed(10)
    for mlp in ("gelu", "swiglu"):
        memory = ContinuumMemory(4, (2,), error="backprop", reduction="sum", lr_init=0.7, mlp=mlp).double()
        state, x = memory.new_state(3), torch.randn(3, 2, 4, dtype=torch.float64)
        loss = memory(x, state=state).square().sum((1, 2))
        write_from_loss([state], [memory.bases()], loss, 2)
        assert all(p.grad is None for p in memory.parameters())
        for row in range(3):
            memory.zero_grad()
            plain = memory(x[row : row + 1])
            plain.square().sum().backward()
            for name, base in memory.blocks[0].base().items():
                assert torch.allclose(state.levels[0].weights[name][row], base - 0.7 * base.grad, atol=1e-12)
            memory.zero_grad(set_to_none=True)


def test_frozen_network_still_writes():
    memory = ContinuumMemory(4, (2,), error="backprop").requires_grad_(False)
    state = memory.new_state(1)
    write_from_loss([state], [memory.bases()], memory(torch.randn(1, 2, 4), state=state).square().sum((1, 2)), 2)
    assert state.levels[0].updates.tolist() == [1]
    with pytest.raises(ValueError, match="at most 2 tokens"):
        memory(torch.randn(1, 3, 4), state=state)


def test_differentiable_loss_writes():
    torch.manual_seed(11)
    memory = ContinuumMemory(3, (2, 4), error="backprop", lr_init=0.3).double()
    x = torch.randn(1, 6, 3, dtype=torch.float64)

    def final():
        state = memory.new_state(1)
        for low in (0, 2):
            loss = memory(x[:, low : low + 2], state=state).square().sum((1, 2))
            write_from_loss([state], [memory.bases()], loss, 2, create_graph=True)
        return memory(x[:, 4:], state=state).square().sum()

    weight = memory.blocks[0].mlp.up_proj.weight
    (grad,) = torch.autograd.grad(final(), weight)
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight[0, 0] += step
        ends.append(final().item())
        with torch.no_grad():
            weight[0, 0] -= step
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(grad[0, 0].item(), abs=1e-6)


def test_non_finite_errors_leave_the_state_alone():
    memory = ContinuumMemory(4, (2,)).eval()
    state, x = memory.new_state(1), torch.randn(1, 2, 4)
    memory(x, state=state)
    before = {k: v.clone() for k, v in state.levels[0].weights.items()}
    with pytest.raises(NonFiniteError, match="level 1") as caught:
        memory(torch.full((1, 2, 4), float("nan")), state=state)
    assert caught.value.token == 4 and all(torch.equal(before[k], v) for k, v in state.levels[0].weights.items())
    waiting = ContinuumMemory(4, (2,), error="backprop")
    state = waiting.new_state(1)
    loss = waiting(x, state=state).sum((1, 2)) * float("inf")
    with pytest.raises(NonFiniteError, match="losses"):
        write_from_loss([state], [waiting.bases()], loss, 2)
    assert state.levels[0].weights is None


def test_cache_entry_copies_saves_and_reorders():
    torch.manual_seed(12)
    memory = ContinuumMemory(4, (2, 5), "nested").double().eval()
    x, cache = torch.randn(3, 16, 4, dtype=torch.float64), Cache(1)
    with torch.no_grad():
        whole = memory(x)
        memory(x[:, :9], cache=cache)
        twin, saved = cache.clone(), cache.state_dict()
        rest = memory(x[:, 9:], cache=cache)
        assert torch.allclose(rest, whole[:, 9:], atol=1e-12)
        assert torch.allclose(memory(x[:, 9:], cache=twin.clone()), rest, atol=1e-12)
        twin.reorder(torch.tensor([2, 0]))
        assert torch.allclose(memory(x[[2, 0], 9:], cache=twin), rest[[2, 0]], atol=1e-12)
        loaded = Cache(1).load_state_dict(saved)
        assert torch.allclose(memory(x[:, 9:], cache=loaded), rest, atol=1e-12)
        assert cache.detach_() is cache and cache.to("cpu") is cache
        cache.reset()
        assert torch.allclose(memory(x, cache=cache), whole, atol=1e-12)


def test_as_a_channel_of_the_trunk():
    from papers10.lm.trunk import CausalLM, TrunkConfig

    torch.manual_seed(13)
    config = TrunkConfig(vocab_size=17, hidden_size=8, num_layers=2, num_heads=2)
    extra = {i: ContinuumMemory(8, (3, 6), output="branch", layer=i, lr_init=0.5) for i in range(2)}
    model = CausalLM(config, extra=extra).double().eval()
    ids, cache = torch.randint(0, 17, (2, 20)), model.new_cache()
    with torch.no_grad():
        whole = model(ids).logits
        parts = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 1), (1, 8), (8, 20))]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for m in extra.values() for p in m.parameters())


def test_schedule_levels_and_cost():
    memory = ContinuumMemory(4, (2, 8), error="schedule")
    levels = memory.level_parameters()
    assert [period for _, period in levels.values()] == [2, 8]
    assert sum(p.numel() for params, _ in levels.values() for p in params) == sum(
        p.numel() for p in memory.parameters()
    )
    cost = update_cost(memory)
    assert cost["levels"][0]["parameters"] == 2 * 4 * 16 and cost["per_token"] == 128 / 2 + 128 / 8
    assert cost["single"] == 256 / 2


def test_dtypes():
    memory = ContinuumMemory(4, (2,)).bfloat16()
    state = memory.new_state(1)
    out = memory(torch.randn(1, 4, 4, dtype=torch.bfloat16), state=state)
    assert out.dtype == torch.bfloat16 and state.levels[0].weights["up"].dtype == torch.float32


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(chunk_sizes=(8, 4)), "strictly increasing"),
        (dict(chunk_sizes=(4, 4)), "strictly increasing"),
        (dict(chunk_sizes=()), "at least one level"),
        (dict(chunk_sizes=(0, 4)), ">= 1"),
        (dict(variant="chain"), "variant"),
        (dict(error="loss"), "error"),
        (dict(mlp="relu"), "mlp"),
        (dict(agg="mean"), "agg"),
        (dict(meta="fomaml"), "meta"),
        (dict(reduction="max"), "reduction"),
        (dict(rho=-0.1), "rho"),
        (dict(lr_init=-1.0), "lr_init"),
        (dict(lr_init=(0.1,)), "lr_init: expected one number or 2"),
        (dict(hidden_mult=0), "hidden_mult"),
    ],
)
def test_refused_options(options, words):
    with pytest.raises(ValueError, match=words):
        ContinuumMemory(8, **options)


def test_refused_input():
    memory = ContinuumMemory(8)
    with pytest.raises(ValueError, match=r"x: expected shape \[batch, time, 8\], got \[2, 3, 7\]"):
        memory(torch.randn(2, 3, 7))
    with pytest.raises(TypeError, match="floating point"):
        memory(torch.zeros(2, 3, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="mask"):
        memory(torch.randn(2, 3, 8), mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="state: expected batch size 2, got 3"):
        memory(torch.randn(2, 3, 8), state=memory.new_state(3))
    with pytest.raises(TypeError, match="integers"):
        check_chunk_sizes((1.5, 2))
    with pytest.raises(ValueError, match="cu_seqlens"):
        memory(torch.randn(1, 3, 8), cu_seqlens=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="levels"):
        memory.new_state(1).load_state_dict({"count": torch.zeros(1), "0.tokens": torch.zeros(1)})


def test_literal_steps_warn_when_they_can_diverge():
    with pytest.warns(UserWarning, match="> 2"):
        ContinuumMemory(8, (8, 64), clamp=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ContinuumMemory(8, (8, 64))
    torch.manual_seed(14)
    x = torch.randn(1, 1, 8).expand(1, 4096, 8)
    with torch.no_grad():
        assert torch.isfinite(ContinuumMemory(8, (8, 512), lr_init=5.0)(x)).all()


def test_levels_are_known_to_decompose():
    systems = pytest.importorskip("papers10.nested_learning.systems")

    nested = ContinuumMemory(8, (2, 8), "nested")
    entries = nested.nested_levels()
    assert [entry["every"] for entry in entries] == [2, 8] and entries[0]["transfers"] == {"level2": "initialization"}
    assert entries[1]["transfers"] == {"level1": "direct_parametric"} and entries[0]["size"] == 2 * 8 * 32
    assert all(nested.get_parameter(name) is not None for entry in entries for name in entry["initial"])
    system = systems.decompose(nested, torch.optim.SGD(nested.parameters(), lr=0.1), seq_len=64)
    assert system.order("level1", "level2") == ">"
    assert ContinuumMemory(8, (2, 8), error="schedule").nested_levels() == []
