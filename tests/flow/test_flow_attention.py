"""Processors in the place of attentions: exact endpoints, identities, packed and foreign modules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from papers10.flow.attention import (
    AttentionCall,
    DefaultProcessor,
    FusionState,
    KeyValueFusedProcessor,
    MultiConditionProcessor,
    TemporalFusedProcessor,
    attention_modules,
    install,
)
from papers10.flow.blocks import DiTBlock
from papers10.flow.cache import CacheMissError, StepKV
from papers10.kernels.attention import multi_attention


def draw(seed: int, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block(**options):
    made = DiTBlock(32, 4, cross="plain", context_dim=24, qk_norm=True, **options).double()
    generator = torch.Generator().manual_seed(7)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return made


X, TIME, SOURCE, TARGET = draw(1, 2, 10, 32), draw(2, 2, 32), draw(3, 2, 7, 24), draw(4, 2, 7, 24)


def blended(network, contexts, weights, processor=MultiConditionProcessor, branch="cond", **options):
    state = FusionState(contexts=contexts, weights=weights, branch=branch)
    with torch.no_grad(), install(network, processor(state, **options)):
        return network(X, TIME, context=contexts[0])


@torch.no_grad()
def test_one_condition_is_the_plain_call_bit_for_bit():
    network = block()
    for processor in (MultiConditionProcessor, KeyValueFusedProcessor):
        assert torch.equal(blended(network, [SOURCE, TARGET], (1.0, 0.0), processor), network(X, TIME, context=SOURCE))
        assert torch.equal(blended(network, [SOURCE, TARGET], (0.0, 1.0), processor), network(X, TIME, context=TARGET))


@settings(max_examples=20, deadline=None)
@given(alpha=st.floats(0.01, 0.99), lengths=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_reversed_ends_reverse_the_weights(alpha, lengths):
    network = block()
    first, second = (draw(10 + n, 2, length, 24) for n, length in enumerate(lengths))
    state = [FusionState(contexts=list(contexts), weights=weights) for contexts, weights in (((first, second), (1 - alpha, alpha)), ((second, first), (alpha, 1 - alpha)))]
    answers = []
    for one in state:
        with torch.no_grad(), install(network, MultiConditionProcessor(one)):
            answers.append(network(X, TIME, context=one.contexts[0]))
    torch.testing.assert_close(*answers, rtol=0, atol=1e-11)  # sums in another order


@torch.no_grad()
def test_equal_conditions_are_one():
    network = block()
    torch.testing.assert_close(blended(network, [SOURCE, SOURCE.clone()], (0.3, 0.7)), network(X, TIME, context=SOURCE), rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_mixed_keys_are_the_mixed_condition(alpha):
    network = block()
    mixed = blended(network, [SOURCE, TARGET], (1 - alpha, alpha), KeyValueFusedProcessor)
    torch.testing.assert_close(mixed, network(X, TIME, context=(1 - alpha) * SOURCE + alpha * TARGET), rtol=0, atol=1e-11)


@torch.no_grad()
def test_with_cross_norm_the_identity_needs_the_norm_after_mixing():
    # The processor mixes projections and norms afterwards, so the identity holds with query-key norm in cross-attention too.
    network = block(qk_norm_cross=True)
    mixed = blended(network, [SOURCE, TARGET], (0.4, 0.6), KeyValueFusedProcessor)
    torch.testing.assert_close(mixed, network(X, TIME, context=0.4 * SOURCE + 0.6 * TARGET), rtol=0, atol=1e-11)


@torch.no_grad()
def test_the_unconditional_branch_is_left_alone():
    network = block()
    plain = network(X, TIME, context=SOURCE)
    assert torch.equal(blended(network, [SOURCE, TARGET], (0.5, 0.5), branch="uncond"), plain)
    state = FusionState(contexts=[SOURCE, TARGET], weights=(0.5, 0.5), branch="uncond", everywhere=True)
    with install(network, MultiConditionProcessor(state)):  # there all conditions are the empty one
        assert torch.equal(network(X, TIME, context=SOURCE), plain)


@torch.no_grad()
def test_each_branch_remembers_its_own():
    network = block()
    state = FusionState(beta=0.4, cache=StepKV(), everywhere=True)
    with install(network, {"self": TemporalFusedProcessor(state)}):
        for frame in range(2):
            answers = {}
            for branch, context in (("cond", SOURCE), ("uncond", torch.zeros_like(SOURCE))):
                state.branch = branch
                answers[branch] = network(X + frame, TIME, context=context)
            state.cache.advance()
    assert len(state.cache) == 2
    for branch, context in (("cond", SOURCE), ("uncond", torch.zeros_like(SOURCE))):
        alone = FusionState(beta=0.4, cache=StepKV())
        with install(network, {"self": TemporalFusedProcessor(alone)}):
            for frame in range(2):
                wanted = network(X + frame, TIME, context=context)
                alone.cache.advance()
        assert torch.equal(answers[branch], wanted)


def test_values_computed_by_hand():
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    column = lambda *numbers: torch.tensor(numbers, dtype=torch.float64).reshape(1, 1, -1, 1)
    source, target = (column(0, math.log(3)), column(0, 1)), (column(0, 0), column(4, 8))
    assert float(multi_attention(one, [source, target], [0.75, 0.25], scale=1.0)) == pytest.approx(2.0625, abs=1e-12)
    mixed = tuple(0.75 * s + 0.25 * t for s, t in zip(source, target))
    assert float(multi_attention(one, [mixed], [1.0], scale=1.0)) == pytest.approx(1 + 1.75 * 3**0.75 / (1 + 3**0.75), abs=1e-12)


@torch.no_grad()
def test_outer_fused_is_a_softmax_over_both_sets():
    network = block()
    attention = network.cross_attn
    state = FusionState(contexts=[SOURCE, TARGET], weights=(0.3, 0.7))
    with install(attention_parent := nn.ModuleDict({"a": attention}), MultiConditionProcessor(state, fused=True)):
        got = attention_parent["a"](X, SOURCE)
    mixed = 0.3 * SOURCE + 0.7 * TARGET
    wanted = 0.3 * attention(X, torch.cat((SOURCE, mixed), 1)) + 0.7 * attention(X, torch.cat((TARGET, mixed), 1))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@torch.no_grad()
def test_temporal_fusion_by_hand():
    network = nn.ModuleDict({"a": block().attn})
    attention, inputs = network["a"], [draw(20 + n, 2, 5 + n, 32) for n in range(3)]
    state = FusionState(beta=0.2, cache=StepKV())
    projected = [attention.project(x) for x in inputs]
    with install(network, TemporalFusedProcessor(state)):
        got = []
        for x in inputs:
            got.append(attention(x))
            state.cache.advance()
    assert torch.equal(got[0], attention(inputs[0]))
    for n in (1, 2):
        before = attention.attend(projected[n][0], *projected[n - 1][1:])
        torch.testing.assert_close(got[n], 0.8 * attention(inputs[n]) + 0.2 * before, rtol=0, atol=1e-11)


@torch.no_grad()
def test_other_number_of_steps_is_refused():
    network = block()
    state = FusionState(beta=0.2, cache=StepKV())
    with install(network, {"self": TemporalFusedProcessor(state)}):
        network(X, TIME, context=SOURCE)
        state.cache.advance()
        state.step = 5
        with pytest.raises(CacheMissError, match="step 5"):
            network(X, TIME, context=SOURCE)


@torch.no_grad()
def test_places_where_memory_works():
    network = block()
    plain = network(X, TIME, context=SOURCE)
    for options, state in (({"sigmas": (0.0, 0.4)}, {"sigma": 0.8}), ({"blocks": ["other"]}, {}), ({}, {"branch": "uncond"}), ({}, {"beta": 0.0})):
        one = FusionState(**{"beta": 0.2, "cache": StepKV(), **state})
        with install(network, {"self": TemporalFusedProcessor(one, **options)}):
            assert torch.equal(network(X, TIME, context=SOURCE), plain)
        assert len(one.cache) == 0


def test_gradients_are_refused_while_keys_are_kept():
    network = block()
    with install(network, {"self": TemporalFusedProcessor(FusionState(beta=0.2, cache=StepKV()))}), pytest.raises(RuntimeError, match="no_grad"):
        network(X, TIME, context=SOURCE)


def test_gradients_reach_two_conditions():
    network = block()
    contexts = [SOURCE.clone().requires_grad_(), TARGET.clone().requires_grad_()]
    with install(network, MultiConditionProcessor(FusionState(contexts=contexts, weights=(0.5, 0.5)))):
        network(X, TIME, context=contexts[0]).square().sum().backward()
    assert all(context.grad.abs().max() > 0 for context in contexts)


@torch.no_grad()
def test_keys_of_contexts_are_computed_once():
    network = block()
    calls = []
    network.cross_attn.to_kv.register_forward_hook(lambda *_: calls.append(1))
    state = FusionState(contexts=[SOURCE, TARGET], weights=(0.5, 0.5))
    with install(network, MultiConditionProcessor(state)):
        for _ in range(3):
            network(X, TIME, context=SOURCE)
        assert len(calls) == 2
        state.contexts = [SOURCE, TARGET.clone()]
        network(X, TIME, context=SOURCE)
    assert len(calls) == 3


@torch.no_grad()
def test_removed_without_a_trace():
    network = block()
    names, before = list(network.state_dict()), network(X, TIME, context=SOURCE)
    handle = install(network, DefaultProcessor())
    assert list(network.state_dict()) == names and torch.equal(network(X, TIME, context=SOURCE), before)
    with pytest.raises(ValueError, match="without processors"):
        install(network, DefaultProcessor())
    handle.remove()
    handle.remove()
    assert "forward" not in network.attn.__dict__ and torch.equal(network(X, TIME, context=SOURCE), before)


def test_names_are_checked():
    with pytest.raises(ValueError, match="attn"):
        install(block(), {"atn": DefaultProcessor()})
    with pytest.raises(ValueError, match="with none"):
        install(nn.Linear(2, 2), DefaultProcessor())
    assert list(attention_modules(block())) == ["attn", "cross_attn"]


@pytest.mark.parametrize("weights", [(0.5,), (0.5, 0.6), (-0.1, 1.1), (float("nan"), 1.0)])
def test_weights_are_checked(weights):
    with pytest.raises(ValueError, match="weights"):
        blended(block(), [SOURCE, TARGET], weights)


def test_unequal_lengths_cannot_be_mixed():
    with pytest.raises(ValueError, match="7 and 4"):
        blended(block(), [SOURCE, draw(9, 2, 4, 24)], (0.5, 0.5), KeyValueFusedProcessor)


@torch.no_grad()
def test_a_call_knows_its_attention():
    network, seen = block(), []

    def look(call: AttentionCall):
        seen.append((call.name, call.kind, tuple(call.features.shape)))
        return call.plain()

    with install(network, look, prefix="blocks.3."):
        network(X, TIME, context=SOURCE)
    assert seen == [("blocks.3.attn", "self", (2, 10, 32)), ("blocks.3.cross_attn", "cross", (2, 10, 32))]
