"""The gated delta memory: hand values, agreement with the token loop, invariants, special cases, gradients, bad input; the self-modifying scan."""

import itertools
import os
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from papers10.kernels.common import BackendUnavailable, installed, interpreting, last_backend
from papers10.kernels.gated_delta import (
    SelfModifyingState,
    gated_delta,
    gated_delta_flops,
    gated_delta_reference,
    self_modifying_scan,
)

READS = ["post", "causal", "chunk"]
PATHS = ["reference", "torch"]
normal = torch.nn.functional.normalize


def operands(tokens=20, batch=2, heads=2, width=4, value=3, dtype=torch.float64, seed=0, sequences=None):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    made = {
        "q": normal(draw(batch, tokens, heads, width), dim=-1),
        "k": normal(draw(batch, tokens, heads, width), dim=-1),
        "write": draw(batch, tokens, heads, value),
        "erase": draw(batch, tokens, heads).sigmoid(),
        "log_decay": torch.nn.functional.logsigmoid(draw(batch, tokens, heads) + 3),
        "initial_state": draw(batch if sequences is None else sequences, heads, value, width),
        "chunk_erase": 0.5 * draw(batch, tokens, heads).sigmoid(),
    }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()}


def scalar_memory(writes, erases, decays):
    """K = V = 1 with the key 1 by hand, state after every token."""
    states, memory = [], 0.0
    for w, a, g in zip(writes, erases, decays):
        memory = g * memory + w - a * memory
        states.append(memory)
    return states


def column(values):
    return torch.tensor(values, dtype=torch.float64)[None, :, None]


@pytest.mark.parametrize("backend", PATHS)
def test_hand_values_of_one_channel(backend):
    # m = 3; then 0.5 * 3 + (1 - 0.5 * 3) = 1; then 1 * 1 + (2 - 2 * 1) = 1; then 0.25 * 1 + (0 - 0) = 0.25.
    writes, erases, decays = [3.0, 1.0, 2.0, 0.0], [0.0, 0.5, 2.0, 0.0], [1.0, 0.5, 1.0, 0.25]
    assert scalar_memory(writes, erases, decays) == [3.0, 1.0, 1.0, 0.25]
    ones = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    given = (2 * ones, ones, column(writes)[..., None], column(erases), column(decays).log())
    for read, expected in (("post", [6, 2, 2, 0.5]), ("causal", [0, 6, 2, 2]), ("chunk", [0, 0, 2, 2])):
        out, state = gated_delta(*given, read=read, chunk_size=2, backend=backend)
        torch.testing.assert_close(out[0, :, 0, 0], torch.tensor(expected, dtype=torch.float64))
        assert state.item() == pytest.approx(0.25)


@pytest.mark.parametrize("backend", PATHS)
def test_repeated_key_reaches_half_the_value_under_l2_and_dgd(backend):
    # One unit key C times: a_n = (v/2) (1 - (2p - 1)^n) with p = (1 - eta)^C after n chunks.
    eta, chunk, chunks = 0.5, 4, 6
    ones = torch.ones(1, chunk * chunks, 1, dtype=torch.float64)
    out, _ = gated_delta(
        ones[..., None],
        ones[..., None],
        eta * ones[..., None],
        eta * ones,
        None,
        chunk_erase=eta * ones,
        chunk_size=chunk,
        backend=backend,
    )
    p = (1 - eta) ** chunk
    expected = [0.5 * (1 - (2 * p - 1) ** n) for n in range(1, chunks + 1)]
    torch.testing.assert_close(out[0, chunk - 1 :: chunk, 0, 0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("backend", PATHS)
def test_rewriting_an_orthonormal_key_replaces_its_value(backend):
    keys = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 0]][None, :, None]
    values = torch.tensor([[1.0], [2.0], [3.0], [9.0]], dtype=torch.float64)[None, :, None]
    ones = torch.ones(1, 4, 1, dtype=torch.float64)
    _, state = gated_delta(keys, keys, values, ones, None, backend=backend)
    torch.testing.assert_close(state[0, 0], torch.tensor([[9.0, 2.0, 3.0, 0.0]], dtype=torch.float64))
    _, hebbian = gated_delta(keys, keys, values, None, None, backend=backend)
    assert hebbian[0, 0, 0, 0] == 10


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64])
def test_blocks_agree_with_the_token_loop(read, chunk_size):
    inputs = operands(150)
    out, state = gated_delta(**inputs, read=read, chunk_size=chunk_size, backend="torch")
    expected, expected_state = gated_delta_reference(**inputs, read=read, chunk_size=chunk_size)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(state, expected_state, atol=1e-10, rtol=0)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 10**6), tokens=st.integers(0, 150), batch=st.integers(1, 3), heads=st.integers(1, 3), width=st.integers(1, 9), value=st.integers(1, 9),
    chunk_size=st.integers(1, 160), read=st.sampled_from(READS), missing=st.sets(st.sampled_from(["erase", "log_decay", "initial_state", "chunk_erase"])),
)  # fmt: skip
def test_forward_and_backward_agree_for_any_sizes(seed, tokens, batch, heads, width, value, chunk_size, read, missing):
    inputs = operands(tokens, batch, heads, width, value, seed=seed)
    inputs = {name: None if name in missing else tensor for name, tensor in inputs.items()}
    leaves = [tensor for tensor in inputs.values() if tensor is not None]
    results = [gated_delta(**inputs, read=read, chunk_size=chunk_size, backend=backend) for backend in PATHS]
    upstream = [
        torch.randn(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(seed))
        for tensor in results[0]
    ]
    found = [
        [*result, *torch.autograd.grad(result, leaves, upstream, allow_unused=True, materialize_grads=True)]
        if result[1].requires_grad
        else result
        for result in results
    ]
    for expected, got in zip(*found):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("chunk_size", [1, 3, 50])
@pytest.mark.parametrize("erases", [True, False])
def test_gradients_against_finite_differences(read, chunk_size, erases):
    inputs = operands(7, 1, 1, 3, 2)
    if not erases:
        inputs.pop("chunk_erase")
    function = lambda *values: gated_delta(
        **dict(zip(inputs, values)), read=read, chunk_size=chunk_size, backend="torch"
    )
    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_gradient_of_one_result_only():
    inputs = operands(70)
    for index in (0, 1):
        got, expected = (
            gated_delta(**inputs, backend=backend)[index].square().sum() for backend in ("torch", "reference")
        )
        for a, b in zip(torch.autograd.grad(got, list(inputs.values()), allow_unused=True, materialize_grads=True),
                        torch.autograd.grad(expected, list(inputs.values()), allow_unused=True, materialize_grads=True)):  # fmt: skip
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("chunk_size", [3, 16, 64, 100])
def test_packed_sequences_equal_each_alone(read, chunk_size):
    bounds = [0, 0, 33, 33, 34, 200, 263]
    inputs = operands(263, 1, sequences=len(bounds) - 1)
    out, state = gated_delta(
        **inputs, read=read, chunk_size=chunk_size, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), backend="torch"
    )
    alone = []
    for row, (low, high) in enumerate(itertools.pairwise(bounds)):
        part = {
            name: tensor[row : row + 1] if name == "initial_state" else tensor[:, low:high]
            for name, tensor in inputs.items()
        }
        alone.append(gated_delta(**part, read=read, chunk_size=chunk_size, backend="torch"))
    torch.testing.assert_close(out, torch.cat([piece for piece, _ in alone], 1), atol=1e-12, rtol=0)
    torch.testing.assert_close(state, torch.cat([piece for _, piece in alone]), atol=1e-12, rtol=0)
    got = torch.autograd.grad(out.square().sum() + state.square().sum(), list(inputs.values()))
    expected = torch.autograd.grad(sum(o.square().sum() + s.square().sum() for o, s in alone), list(inputs.values()))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("backend", PATHS)
def test_given_signals_without_chunk_terms_do_not_depend_on_the_chunk(backend):
    inputs = {name: tensor for name, tensor in operands(90).items() if name != "chunk_erase"}
    results = [gated_delta(**inputs, chunk_size=chunk_size, backend=backend)[0] for chunk_size in (1, 7, 64, 500)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("read", READS)
def test_streaming_in_pieces_of_whole_chunks_equals_one_call(backend, read):
    inputs = operands(90)
    whole, whole_state = gated_delta(**inputs, read=read, chunk_size=10, backend=backend)
    state, outs = inputs["initial_state"], []
    for low, high in ((0, 10), (10, 70), (70, 90)):
        part = {name: tensor[:, low:high] for name, tensor in inputs.items() if name != "initial_state"}
        out, state = gated_delta(**part, initial_state=state, read=read, chunk_size=10, backend=backend)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(state, whole_state, atol=1e-12, rtol=0)


@pytest.mark.parametrize("read, sees", [("post", 0), ("causal", 1), ("chunk", 8)])
def test_the_past_does_not_know_the_future(read, sees):
    inputs = operands(40)
    changed = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    for name in ("k", "write", "erase", "log_decay", "chunk_erase"):
        changed[name][:, 16] *= 0.5
    a, b = (gated_delta(**given, read=read, chunk_size=8, backend="torch")[0] for given in (inputs, changed))
    difference = (a - b).detach().abs().amax((0, 2, 3))
    assert torch.equal(a[:, : 16 + sees], b[:, : 16 + sees]) and float(difference[16 + sees]) > 0


def test_rows_and_heads_do_not_meet():
    inputs = operands(50, 3, 2)
    out, state = gated_delta(**inputs, chunk_size=16, backend="torch")
    order = torch.tensor([2, 0, 1])
    turned = {name: tensor[order].flip(1 if name == "initial_state" else 2) for name, tensor in inputs.items()}
    other, other_state = gated_delta(**turned, chunk_size=16, backend="torch")
    torch.testing.assert_close(other, out[order].flip(2), atol=1e-13, rtol=0)
    torch.testing.assert_close(other_state, state[order].flip(1), atol=1e-13, rtol=0)
    bad = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    bad["write"][1, 40] = float("nan")
    spoilt, _ = gated_delta(**bad, chunk_size=16, backend="torch")
    # Tokens of one block share matrix products, so only what lies before the block (of 32 here) is certainly untouched.
    assert (
        torch.equal(spoilt[[0, 2]], out[[0, 2]])
        and torch.isnan(spoilt[1, 40:]).all()
        and torch.isfinite(spoilt[1, :32]).all()
    )


@pytest.mark.parametrize("backend", PATHS)
def test_no_write_and_no_decay_leave_the_memory(backend):
    inputs = operands(70)
    zero = torch.zeros_like(inputs["erase"])
    out, state = gated_delta(
        inputs["q"], inputs["k"], 0 * inputs["write"], zero, zero, inputs["initial_state"], backend=backend
    )
    torch.testing.assert_close(state, inputs["initial_state"], atol=1e-14, rtol=0)
    torch.testing.assert_close(out, torch.einsum("bhvk,bthk->bthv", inputs["initial_state"], inputs["q"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strong_decay_neither_overflows_nor_loses_digits(dtype):
    inputs = operands(200, dtype=dtype)
    strong = {**inputs, "log_decay": (inputs["log_decay"].detach() - 15).requires_grad_()}
    wide = {name: tensor.detach().double() for name, tensor in strong.items()}
    for options in ({"chunk_size": 64}, {"chunk_size": 10, "read": "chunk"}):
        out, state = gated_delta(**strong, **options, backend="torch")
        expected, _ = gated_delta_reference(**wide, **options)
        torch.testing.assert_close(out.double(), expected, atol=2e-6 if dtype == torch.float32 else 1e-12, rtol=0)
        gradients = torch.autograd.grad(
            out.sum() + state.sum(), list(strong.values()), allow_unused=True, materialize_grads=True
        )
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("value", [-float("inf"), -1e4])
def test_a_reset_empties_the_memory_and_has_no_slope(value):
    inputs = {
        name: tensor.detach() for name, tensor in operands(60, dtype=torch.float32).items() if name != "chunk_erase"
    }
    inputs["log_decay"][:, 20] = value
    inputs["erase"][:, 20] = 0
    inputs["log_decay"].requires_grad_()
    out, state = gated_delta(**inputs, backend="torch")
    fresh = {name: tensor.detach()[:, 20:] for name, tensor in inputs.items() if name != "initial_state"}
    expected, _ = gated_delta(**fresh, backend="torch")
    torch.testing.assert_close(out[:, 20:], expected, atol=1e-6, rtol=0)
    (slope,) = torch.autograd.grad(out.sum() + state.sum(), inputs["log_decay"])
    assert torch.isfinite(slope).all() and not slope[:, 20].any()


def test_growing_memory_is_allowed():
    inputs = operands(40)
    growing = {**inputs, "log_decay": -inputs["log_decay"]}
    for a, b in zip(*(gated_delta(**growing, chunk_size=16, backend=backend) for backend in PATHS)):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype, ulp", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-23)])
def test_half_precision_is_computed_in_float32(dtype, ulp):
    inputs = operands(130, dtype=dtype)
    out, state = gated_delta(**inputs, chunk_size=16, backend="torch")
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    expected, expected_state = gated_delta_reference(**wide, chunk_size=16)
    assert out.dtype == dtype and state.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=max(2 * ulp, 1e-5), rtol=ulp)
    torch.testing.assert_close(state.double(), expected_state, atol=1e-5, rtol=1e-5)
    out.sum().backward()
    expected.sum().backward()
    for name, tensor in inputs.items():
        assert tensor.grad.dtype == dtype
        assert float((tensor.grad.double() - wide[name].grad).abs().max()) <= max(2 * ulp, 2e-5) * max(
            1.0, float(wide[name].grad.abs().max())
        )


def test_operands_of_different_dtypes_keep_their_own():
    inputs = operands(10, dtype=torch.float32)
    inputs["q"], inputs["k"] = (inputs[name].detach().bfloat16().requires_grad_() for name in "qk")
    out, state = gated_delta(**inputs, backend="torch")
    out.sum().backward()
    assert (out.dtype, state.dtype, inputs["k"].grad.dtype, inputs["write"].grad.dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.float32,
    )


def test_strides_do_not_matter():
    inputs = {name: tensor.detach() for name, tensor in operands(70).items()}
    tangled = {
        name: tensor.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for name, tensor in inputs.items()
    }
    assert not any(tensor.is_contiguous() for tensor in tangled.values())
    plain = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    (got, _), (expected, _) = (gated_delta(**given, chunk_size=20, backend="torch") for given in (tangled, plain))
    assert torch.equal(got, expected)
    upstream = torch.randn(3, 2, 70, 2, dtype=got.dtype).permute(1, 2, 3, 0)
    for a, b in zip(
        torch.autograd.grad(got, list(tangled.values()), upstream),
        torch.autograd.grad(expected, list(plain.values()), upstream.contiguous()),
    ):
        assert torch.equal(a, b)


def test_inputs_are_not_changed():
    inputs = operands(64, 1, 1)
    copies = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    out, state = gated_delta(**inputs, chunk_size=64, backend="torch")
    (out.sum() + state.sum()).backward()
    assert all(torch.equal(tensor, copies[name]) for name, tensor in inputs.items())


@pytest.mark.parametrize("backend", PATHS)
def test_no_tokens_and_no_rows(backend):
    inputs = operands(0)
    out, state = gated_delta(**inputs, backend=backend)
    assert out.shape == (2, 0, 2, 3) and torch.equal(state, inputs["initial_state"])
    (state.sum() + out.sum()).backward()
    assert torch.equal(inputs["initial_state"].grad, torch.ones_like(state))
    out, state = gated_delta(**operands(5, batch=0), backend=backend)
    assert out.shape == (0, 5, 2, 3) and state.shape == (0, 2, 3, 4)
    inputs = {**operands(0, batch=1), "initial_state": torch.zeros(0, 2, 3, 4, dtype=torch.float64)}
    out, state = gated_delta(**inputs, cu_seqlens=torch.tensor([0]), backend=backend)
    assert out.shape == (1, 0, 2, 3) and state.shape == (0, 2, 3, 4)


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = operands(200, 3, 4, 16, 16, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out, state = gated_delta(**inputs, backend="torch")
            results.append(
                [
                    out,
                    state,
                    *torch.autograd.grad(out.sum(), list(inputs.values()), allow_unused=True, materialize_grads=True),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_second_derivative_names_the_remedy():
    inputs = operands(5, 1, 1)
    (gradient,) = torch.autograd.grad(
        gated_delta(**inputs, backend="torch")[0].square().sum(), inputs["q"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="use backend='reference'"):
        gradient.sum().backward()
    small = list(operands(3, 1, 1, 2, 1).values())
    assert torch.autograd.gradgradcheck(
        lambda *values: gated_delta(*values[:-1], chunk_erase=values[-1], backend="reference"), small
    )


@pytest.mark.parametrize("packed", [False, True])
def test_one_node_for_torch_compile(packed):
    torch._dynamo.reset()
    inputs = list(operands(40, 1, dtype=torch.float32, sequences=2 if packed else None).values())
    bounds = torch.tensor([0, 13, 40]) if packed else None
    function = lambda *o: gated_delta(
        2 * o[0], *o[1:6], chunk_erase=o[6], chunk_size=8, cu_seqlens=bounds, backend="torch"
    )[0].square()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bounds", [None, [0, 3, 11]])
def test_operator_registration_is_sound(bounds):
    from papers10.kernels import gated_delta as module

    inputs = list(operands(11, 1, 2, dtype=torch.float32, sequences=None if bounds is None else 2).values())
    cut = module._cut(11, 4, True, 8)
    arguments = (*inputs, None if bounds is None else torch.tensor(bounds), "causal", *cut, True, "torch")
    torch.library.opcheck(
        module._forward_op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_what_ran_is_remembered():
    gated_delta(**operands(3), backend="torch")
    assert last_backend("gated_delta") == "torch"


def test_kept_memory_grows_with_the_blocks_not_with_the_tokens_times_the_state():
    from papers10.core.bench import extra_memory

    inputs = {name: tensor for name, tensor in operands(8192, 1, 2, 64, 64, dtype=torch.float32).items()}
    needed = extra_memory(
        lambda: torch.autograd.grad(gated_delta(**inputs, backend="torch")[0].sum(), list(inputs.values()))
    )
    every_state = 8192 * 2 * 64 * 64 * 4
    assert needed < every_state / 5


def test_operations_per_token():
    assert gated_delta_flops({"B": 1, "T": 1, "H": 1, "K": 64, "V": 64}) == 8 * 4096 + 2 * 32 * 192 + 32 * 128


Q, W, S = torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3, 6), torch.zeros(2, 5, 3)


@pytest.mark.parametrize("changes, error, message", [
    ({"q": Q[:, :4]}, ValueError, "q: expected shape [B T H K] with T=5"),
    ({"k": Q[0]}, ValueError, "k: expected shape [B T H K], got 3 dimensions [5, 3, 4]"),
    ({"write": W[:, :, :2]}, ValueError, "write: expected shape [B T H V] with H=3"),
    ({"erase": S[..., None]}, ValueError, "erase: expected shape [B T H], got 4 dimensions"),
    ({"log_decay": S[:1]}, ValueError, "log_decay: expected shape [B T H] with B=2"),
    ({"chunk_erase": S[:, :, :1]}, ValueError, "chunk_erase: expected shape [B T H] with H=3"),
    ({"initial_state": torch.zeros(2, 3, 4, 6)}, ValueError, "initial_state: expected shape [N H V K] with V=6"),
    ({"write": W.long()}, TypeError, "write: expected a floating dtype, got torch.int64"),
    ({"k": None}, TypeError, "k: expected a tensor, got NoneType"),
    ({"q": Q.to("meta")}, ValueError, "q: expected the device of k, cpu, got meta"),
    ({"q": Q[..., :0], "k": Q[..., :0]}, ValueError, "K and V >= 1"),
    ({"read": "after"}, ValueError, "read: expected one of 'post', 'causal', 'chunk', got 'after'"),
    ({"chunk_size": 0}, ValueError, "chunk_size: expected an integer >= 1, got 0"),
    ({"chunk_size": 8.0}, TypeError, "chunk_size: expected an integer >= 1, got 8.0"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens: expected packed inputs with B = 1, got B = 2"),
    ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens: expected an int32 or int64 tensor"),
    ({"backend": "trition"}, ValueError, "nearest: 'triton'"),
])  # fmt: skip
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error) as caught:
        gated_delta(**{"q": Q, "k": Q, "write": W, "erase": S, "log_decay": S, **changes})
    assert message in str(caught.value)


@pytest.mark.parametrize("bounds", [[1, 5], [0, 4], [0, 4, 3, 5]])
def test_bounds_must_rise_from_zero_to_the_end(bounds):
    with pytest.raises(ValueError, match="cu_seqlens: expected bounds that rise from 0 to T = 5"):
        gated_delta(Q[:1], Q[:1], W[:1], S[:1], S[:1], cu_seqlens=torch.tensor(bounds))


@pytest.mark.skipif(
    interpreting() or not installed("triton"), reason="Triton's interpreter is on, or Triton is not installed"
)
def test_triton_on_a_processor_says_what_to_do():
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1"):
        gated_delta(Q, Q, W, S, S, backend="triton")


@pytest.mark.skipif(not installed("triton"), reason="Triton is not installed")
def test_triton_refuses_float64_and_wide_keys_and_passes_resets():
    program = """
import torch
from papers10.kernels.gated_delta import gated_delta
def call(width, dtype, decay=0.0):
    z = lambda *s: torch.full(s, 0.5, dtype=dtype)
    g = torch.full((1, 3, 1), decay, dtype=dtype, requires_grad=True)
    out, state = gated_delta(z(1, 3, 1, width), z(1, 3, 1, width), z(1, 3, 1, 2), z(1, 3, 1), g, backend='triton')
    return torch.autograd.grad(out.sum() + state.sum(), g)[0]
for arguments in ((4, torch.float64), (129, torch.float32)):
    try: call(*arguments)
    except (TypeError, ValueError) as problem: print(type(problem).__name__, problem)
print(call(4, torch.float32, -float('inf')).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("TypeError backend: expected float32") and lines[1].startswith(
        "ValueError backend: expected keys of at most 128"
    ), done.stderr
    assert lines[2] == "[[[0.0], [0.0], [0.0]]]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, width, value, chunk_size, read",
    [(300, 64, 64, 64, "post"), (130, 128, 96, 16, "causal"), (513, 32, 200, 200, "chunk")],
)
def test_triton_on_the_card(dtype, tokens, width, value, chunk_size, read):
    inputs = {
        name: tensor.detach().cuda().requires_grad_()
        for name, tensor in operands(tokens, 2, 3, width, value, dtype).items()
    }
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    options = {"read": read, "chunk_size": chunk_size}
    results = gated_delta(**inputs, **options)
    assert last_backend("gated_delta") == "triton"
    expected = gated_delta(**wide, **options, backend="torch")
    upstream = [torch.randn(tensor.shape, device="cuda", dtype=torch.float64) for tensor in expected]
    got = [
        *results,
        *torch.autograd.grad(results, list(inputs.values()), [u.to(r.dtype) for u, r in zip(upstream, results)]),
    ]
    right = [*expected, *torch.autograd.grad(expected, list(wide.values()), upstream)]
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(got, right):
        assert (a.double() - b).abs().max() <= limit * b.abs().max().clamp_min(1)


def scan_operands(tokens=30, batch=2, heads=2, width=6, value=6, seed=0, adaptive_q=False):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = {"k": width, "v": width, "eta": 1, "alpha": 1, **({"q": width} if adaptive_q else {})}
    return {
        "z": draw(batch, tokens, heads, width),
        "q": None if adaptive_q else normal(draw(batch, tokens, heads, width), dim=-1),
        "projections": {name: draw(heads, size, width) / width**0.5 for name, size in rows.items()},
        "memory": torch.eye(value, width, dtype=torch.float64) + 0.1 * draw(heads, value, width),
    }


@pytest.mark.parametrize("objective", ["l2", "dot"])
@pytest.mark.parametrize("options", [
    {"chunk_size": (16, 4)}, {"chunk_size": (5, 20), "read": "post"}, {"chunk_size": 8, "read": "chunk", "dgd": False},
    {"chunk_size": (8, 8), "self_values": False}, {"chunk_size": (4, 8), "adaptive": ("k", "eta", "memory")}, {"chunk_size": 6, "adaptive": ("memory",)},
    {"chunk_size": 8, "value_norm": False, "eta_max": 0.2},
])  # fmt: skip
def test_the_scan_equals_its_equations_token_by_token(objective, options):
    for given in (scan_operands(), scan_operands(adaptive_q=True)):
        leaves = [tensor.requires_grad_() for tensor in (given["z"], given["memory"], *given["projections"].values())]
        found = []
        for backend in PATHS:
            out, state = self_modifying_scan(**given, objective=objective, **options, backend=backend)
            found.append([out, *state[:2], *torch.autograd.grad(out.square().sum() + state.running.sum(), leaves)])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("chunk_size", [(8, 4), (4, 8), (16, 16), (1, 1)])
def test_the_scan_in_pieces_equals_one_call_and_keeps_a_constant_state(chunk_size):
    given = scan_operands(24)
    whole, whole_state = self_modifying_scan(**given, chunk_size=chunk_size)
    state, outs, sizes = None, [], set()
    for low, high in ((0, 1), (1, 2), (2, 7), (7, 7), (7, 20), (20, 24)):
        part = {**given, "z": given["z"][:, low:high], "q": given["q"][:, low:high]}
        out, state = self_modifying_scan(**part, state=state, chunk_size=chunk_size)
        outs.append(out)
        sizes.add(state.running.numel() + state.start.numel())
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-9, rtol=0)
    torch.testing.assert_close(state.start, whole_state.start, atol=1e-9, rtol=0)
    assert len(sizes) == 1 and state.tokens == 24


def test_every_initial_memory_has_a_gradient_and_fixed_signals_are_the_plain_operator():
    given = scan_operands(20)
    leaves = [given["memory"].requires_grad_(), *(tensor.requires_grad_() for tensor in given["projections"].values())]
    out, _ = self_modifying_scan(**given, chunk_size=4)
    assert all(float(gradient.abs().max()) > 0 for gradient in torch.autograd.grad(out.square().sum(), leaves))
    out, state = self_modifying_scan(**given, chunk_size=4, adaptive=("memory",), self_values=False, value_norm=False)
    ask = lambda name: torch.einsum("hrk,bthk->bthr", given["projections"][name], given["z"])
    k, v, alpha = ask("k"), ask("v"), torch.sigmoid(ask("alpha")[..., 0] + 4)
    k = k * (k.square().sum(-1, keepdim=True) + 1e-12).rsqrt()
    eta = torch.sigmoid(ask("eta")[..., 0]) * (1 + alpha) / 2
    expected, memory = gated_delta(
        given["q"],
        k,
        eta[..., None] * v,
        eta,
        alpha.log(),
        given["memory"].expand(2, -1, -1, -1),
        chunk_erase=eta,
        read="causal",
        chunk_size=4,
    )
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(state.running[:, :, -6:], memory, atol=1e-10, rtol=0)


def test_flush_ends_the_chunk_and_detach_cuts_history():
    given = scan_operands(10)
    given["memory"].requires_grad_()
    _, state = self_modifying_scan(**given, chunk_size=(8, 4))
    flushed = state.flush((8, 4))
    assert (
        isinstance(flushed, SelfModifyingState) and torch.equal(flushed.start, state.running) and flushed.tokens == 16
    )
    assert state.running.requires_grad and not state.detach().running.requires_grad


@pytest.mark.parametrize("changes, error, message", [
    ({"projections": {}}, ValueError, "projections: expected eta, k, v and optionally alpha, got"),
    ({"chunk_size": (6, 4)}, ValueError, "chunk_size: expected one to divide the other, got (6, 4)"),
    ({"chunk_size": 0}, ValueError, "chunk_size: expected integers >= 1"),
    ({"adaptive": ("k",)}, ValueError, "adaptive: expected names of"),
    ({"objective": "l1"}, ValueError, "objective: expected 'l2' or 'dot', got 'l1'"),
    ({"read": "now"}, ValueError, "read: expected one of"),
    ({"memory": torch.zeros(2, 3, 6), "self_values": False}, ValueError, "self_values: expected True, or a memory with V = K = 6"),
    ({"memory": torch.zeros(2, 3, 5)}, ValueError, "memory: expected shape [H V K] with K=6"),
    ({"z": torch.zeros(1, 2, 2)}, ValueError, "z: expected shape [B T H K]"),
    ({"q": torch.zeros(2, 29, 2, 6)}, ValueError, "q: expected shape [B T H K] with T=30"),
])  # fmt: skip
def test_bad_input_of_the_scan_is_named(changes, error, message):
    with pytest.raises(error) as caught:
        self_modifying_scan(**{**scan_operands(), **changes})
    assert message in str(caught.value)
