"""The delta update: hand values, invariants, gradients, bad input, torch.compile, memory."""

import copy
import os
import subprocess
import sys
import threading

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from papers10.kernels.common import BackendUnavailable, installed, interpreting, last_backend
from papers10.kernels.delta_update import delta_update, delta_update_bytes, delta_update_reference

PATHS = ["torch"] + (["numba"] if installed("numba") else [])
ALL = ["reference", *PATHS]
SAVES = ["input", "output"]


def operands(rows=4, d=6, n=3, dtype=torch.float64, seed=0, vector=False):
    generator = torch.Generator().manual_seed(seed)
    x, k, v, beta = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rows, d, n), (rows, d), (rows, n), (rows,)))
    if vector:
        x, v = x[..., 0], v[..., 0]
    return [tensor.to(dtype).requires_grad_() for tensor in (x, k, v, 2 * torch.sigmoid(beta))]


def double(*values):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("beta, expected", [(0.0, [[1, 2], [3, 4]]), (0.5, [[1.6, .38], [3.8, 1.84]]),
                                            (1.0, [[2.2, -1.24], [4.6, -.32]]), (2.0, [[3.4, -4.48], [6.2, -4.64]])])
def test_hand_values_with_two_channels(backend, beta, expected):
    got = delta_update(*double([[1., 2], [3, 4]], [3., 4], [5., -1], beta), eps=0.0, backend=backend)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("save", SAVES)
def test_hand_values_and_gradients_with_one_channel(backend, save):
    inputs = double([1., 2, 2], [0., 3, 4], 2., 1.5)
    out = delta_update(*inputs, eps=0.0, save=save, backend=backend)
    torch.testing.assert_close(out, torch.tensor([1, 1.28, 1.04], dtype=torch.float64), atol=1e-12, rtol=0)
    gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    for got, expected in zip(gradients, ([1, -.26, -.68], [-.66, -.1728, .1296], 2.1, -1.12)):
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ALL)
def test_eps_is_the_one_of_the_paper_and_not_larger_by_the_root_of_the_width(backend):
    x, k, v, beta = double([0., 0, 0], [1e-5, 0, 0], 1., 1.)
    out = delta_update(x, k, v, beta, eps=1e-5, backend=backend)
    assert out[0].item() == pytest.approx(0.5 ** 0.5, abs=1e-9)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("d", [1, 5, 8])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_gradients_against_finite_differences(backend, save, d, n):
    assert torch.autograd.gradcheck(lambda *o: delta_update(*o, save=save, backend=backend), operands(2, d, n))


@pytest.mark.parametrize("backend", PATHS)
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 10**6), lead=st.lists(st.integers(0, 3), max_size=3), d=st.integers(1, 40), n=st.integers(0, 5),
                  save=st.sampled_from(SAVES), eps=st.sampled_from([1e-5, 0.3]))
def test_paths_agree_with_the_reference(backend, seed, lead, d, n, save, eps):
    generator = torch.Generator().manual_seed(seed)
    inner = (n,) if n else ()
    draw = lambda *shape: torch.randn((*lead, *shape), generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = [draw(d, *inner), draw(d), draw(*inner), draw()]
    expected = delta_update_reference(*inputs, eps=eps)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    got = delta_update(*inputs, eps=eps, save=save, backend=backend)
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-11)
    for a, b in zip(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)):
        # A direction of one entry near zero makes the gradient large, so the tolerance is relative.
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 10**6), d=st.integers(2, 20), n=st.integers(1, 4))
def test_invariants(seed, d, n):
    x, k, v, beta = (tensor.detach() for tensor in operands(3, d, n, seed=seed))
    update = lambda *o: delta_update(*o, eps=0.0)
    out, unit = update(x, k, v, beta), k / k.norm(dim=-1, keepdim=True)
    near = dict(atol=1e-10, rtol=0)
    readout = lambda state: torch.einsum("rd,rdn->rn", unit, state)
    apart = lambda state: state - unit[..., None] * readout(state)[:, None, :]
    one, two = torch.ones(3, dtype=x.dtype), torch.full((3,), 2.0, dtype=x.dtype)
    torch.testing.assert_close(update(x, k, v, 0 * one), x, **near)
    torch.testing.assert_close(readout(update(x, k, v, one)), v, **near)
    torch.testing.assert_close(readout(out) - v, (1 - beta)[:, None] * (readout(x) - v), **near)
    torch.testing.assert_close(apart(out), apart(x), **near)
    torch.testing.assert_close(update(update(x, k, 0 * v, two), k, 0 * v, two), x, **near)
    order = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(update(x[:, order], k[:, order], v, beta), out[:, order], **near)
    torch.testing.assert_close(torch.stack([update(x[..., j], k, v[:, j], beta) for j in range(n)], -1), out, **near)
    torch.testing.assert_close(update(x, 7 * k, v, beta), out, **near)
    torch.testing.assert_close(update(x, -k, -v, beta), out, **near)
    matrix = torch.eye(d, dtype=x.dtype) - beta[:, None, None] * unit[:, :, None] * unit[:, None, :]
    torch.testing.assert_close(matrix @ x + beta[:, None, None] * unit[:, :, None] * v[:, None, :], out, **near)


def wrong_norm(x, k, v, beta, **options):
    unit = k / k.abs().sum(-1, keepdim=True)
    return x + beta[:, None, None] * unit[..., None] * (v - (unit[..., None] * x).sum(-2))[:, None, :]


def wrong_product(x, k, v, beta, **options):
    return x * (delta_update_reference(x, k, v, beta) - x)


@pytest.mark.parametrize("mutant", [wrong_norm, wrong_product])
def test_two_published_mistakes_are_caught(mutant):
    x, k, v, beta = (tensor.detach() for tensor in operands())
    unit, one = k / k.norm(dim=-1, keepdim=True), torch.ones(4, dtype=x.dtype)
    readout = lambda update: torch.einsum("rd,rdn->rn", unit, update(x, k, v, one, eps=0.0))
    torch.testing.assert_close(readout(delta_update), v)
    assert (readout(mutant) - v).abs().max() > 0.1
    assert (mutant(x, k, v, beta) - delta_update(x, k, v, beta)).abs().max() > 0.1


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_in_float32(backend, save, dtype):
    inputs = operands(3, 1024, 2, dtype)
    out = delta_update(*inputs, save=save, backend=backend)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = delta_update_reference(*wide)
    ulp = torch.finfo(dtype).eps
    assert out.dtype == dtype
    # One rounding of the result; the float32 sums of 1024 products add a few float32 roundings.
    torch.testing.assert_close(out.double(), expected, atol=max(ulp, 1e-5), rtol=ulp)
    upstream = torch.ones_like(out)
    for a, b in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, wide, upstream.double())):
        assert (a.double() - b).abs().max() <= max(4 * ulp, 4e-5) * b.abs().max().clamp_min(1)


@pytest.mark.parametrize("backend", ALL)
def test_half_precision_norm_does_not_overflow(backend):
    x, v, beta = torch.zeros(1, 1024, dtype=torch.float16), torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.float16)
    out = delta_update(x, torch.full((1, 1024), 300.0, dtype=torch.float16), v, beta, backend=backend)
    torch.testing.assert_close(out, torch.full_like(x, 1 / 32), atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", PATHS)
def test_operands_of_different_dtypes_keep_their_own(backend):
    x, k, v, beta = operands(dtype=torch.float32)
    k = k.detach().bfloat16().requires_grad_()
    out = delta_update(x, k, v, beta, backend=backend)
    out.sum().backward()
    assert (out.dtype, x.grad.dtype, k.grad.dtype, v.grad.dtype) == (torch.float32, torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, delta_update_reference(x, k, v, beta), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("save", SAVES)
def test_zero_direction_leaves_the_state_and_has_finite_gradients(backend, save):
    x, k, v, beta = operands(dtype=torch.float32)
    k = torch.zeros_like(k).requires_grad_()
    out = delta_update(x, k, v, beta, save=save, backend=backend)
    assert torch.equal(out, x)
    out.sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (x, k, v, beta))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("which, value", [(3, float("nan")), (1, float("inf"))])
def test_a_bad_token_stays_alone(backend, which, value):
    inputs = [tensor.detach() for tensor in operands(5, 64, 4, torch.float32)]
    clean = delta_update(*inputs, backend=backend)
    inputs[which][2] = value
    inputs = [tensor.requires_grad_() for tensor in inputs]
    out = delta_update(*inputs, backend=backend)
    others = [0, 1, 3, 4]
    assert torch.isnan(out[2]).all() and torch.equal(out[others], clean[others])
    out.sum().backward()
    assert all(torch.isfinite(tensor.grad[others]).all() for tensor in inputs)


@pytest.mark.parametrize("backend", ALL)
def test_width_one_is_scalar_relaxation(backend):
    out = delta_update(*double([[3.0]], [[-2.0]], [1.0], [0.5]), eps=0.0, backend=backend)
    assert out.item() == pytest.approx(3 + 0.5 * (-1) * (1 - (-3)))


@pytest.mark.parametrize("backend", ALL)
def test_empty_batch(backend):
    inputs = operands(0, 6, 3)
    out = delta_update(*inputs, backend=backend)
    assert out.shape == (0, 6, 3)
    out.sum().backward()
    assert inputs[1].grad.shape == (0, 6)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("save", SAVES)
def test_strides_do_not_matter(backend, save):
    x, k, v, beta = (tensor.detach() for tensor in operands(6, 10, 4))
    tangled = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0), k.T.contiguous().T, v.T.contiguous().T, beta.repeat_interleave(2)[::2]]
    tangled = [tensor.requires_grad_() for tensor in tangled]
    assert not any(tensor.is_contiguous() for tensor in tangled)
    plain = [tensor.clone(memory_format=torch.contiguous_format).requires_grad_() for tensor in (x, k, v, beta)]
    got, expected = (delta_update(*inputs, save=save, backend=backend) for inputs in (tangled, plain))
    assert torch.equal(got, expected)
    upstream = torch.randn(4, 10, 6, dtype=x.dtype).permute(2, 1, 0)
    for a, b in zip(torch.autograd.grad(got, tangled, upstream), torch.autograd.grad(expected, plain, upstream.contiguous())):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", PATHS)
def test_results_do_not_depend_on_the_number_of_threads(backend):
    inputs = operands(512, 300, 3, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = delta_update(*inputs, backend=backend)
            results.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("backend", PATHS)
def test_several_python_threads_may_call_at_once(backend):
    inputs = [tensor.detach() for tensor in operands(256, 600, 2, torch.float32)]
    expected, results = delta_update(*inputs, backend=backend), [None] * 4
    work = [threading.Thread(target=lambda i=i: results.__setitem__(i, delta_update(*inputs, backend=backend))) for i in range(4)]
    [thread.start() for thread in work], [thread.join() for thread in work]
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("backend", PATHS)
def test_second_derivative_names_the_remedy(backend):
    inputs = operands()
    (gradient,) = torch.autograd.grad(delta_update(*inputs, backend=backend).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='reference'"):
        gradient.sum().backward()


def test_second_derivative_of_the_reference():
    assert torch.autograd.gradgradcheck(lambda *o: delta_update(*o, backend="reference"), operands(1, 3, 2))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("save", SAVES)
def test_one_node_for_torch_compile(backend, save):
    torch._dynamo.reset()
    inputs = operands(4, 16, 2, torch.float32)
    function = lambda *o: delta_update(2 * o[0], *o[1:], save=save, backend=backend).square()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(a, b)


def test_operator_registration_is_sound():
    from papers10.kernels import delta_update as module

    x, k, v, beta = operands(3, 5, 2, torch.float32)
    torch.library.opcheck(module._forward_op, (x, k, v, beta, 1e-5, "input", "torch"),
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_what_ran_is_remembered():
    delta_update(*operands(), backend="torch")
    assert last_backend("delta_update") == "torch"


def test_modules_that_use_it_can_be_copied():
    class Block(torch.nn.Module):
        update = staticmethod(delta_update)

    assert copy.deepcopy(Block()).update is delta_update


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("n", [1, 4])
def test_extra_memory_is_below_one_state(backend, save, n):
    from papers10.core.bench import extra_memory

    inputs = operands(1024, 512, n, torch.float32)
    upstream = torch.randn(1024, 512, n)

    def both_ways():
        out = delta_update(*inputs, save=save, backend=backend)
        return out, torch.autograd.grad(out, inputs, upstream)

    both_ways()
    assert extra_memory(both_ways) <= inputs[0].nbytes


def test_bytes_per_row():
    assert delta_update_bytes({"rows": 1, "d": 768, "n": 4, "dtype": "bfloat16", "direction": "forward"}) == (2 * 768 * 4 + 768) * 2
    assert delta_update_bytes({"rows": 1, "d": 768, "n": 4, "dtype": "bfloat16", "direction": "backward"}) == (3 * 768 * 4 + 2 * 768) * 2


X, K, V, B = torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2)


@pytest.mark.parametrize("arguments, options, error, message", [
    ((X, K, V[:, :3], B), {}, ValueError, "v: expected shape [2, 4] for x [2, 3, 4], got [2, 3]"),
    ((X, K[:1], V, B), {}, ValueError, "k: expected shape [2, 3] for x [2, 3, 4], got [1, 3]"),
    ((X, K, V, B[:, None]), {}, ValueError, "beta: expected shape [2] for x [2, 3, 4], got [2, 1]"),
    ((X, K[0], V, B), {}, ValueError, "x: expected [..., d] or [..., d, n]"),
    ((X[..., :0], K, V[:, :0], B), {}, ValueError, "n >= 1"),
    ((X[:, :0], K[:, :0], V, B), {}, ValueError, "d >= 1"),
    ((X.long(), K, V, B), {}, TypeError, "x: expected a floating dtype, got torch.int64"),
    ((X, K, V, 1.0), {}, TypeError, "beta: expected a tensor, got float"),
    ((X, K.to("meta"), V, B), {}, ValueError, "k: expected the device of x, cpu, got meta"),
    ((X, K, V, B), {"eps": -1.0}, ValueError, "eps: expected a finite number >= 0, got -1.0"),
    ((X, K, V, B), {"eps": float("nan")}, ValueError, "eps"),
    ((X, K, V, B), {"save": "both"}, ValueError, "save: expected 'input' or 'output', got 'both'"),
    ((X, K, V, B), {"backend": "trition"}, ValueError, "nearest: 'triton'"),
])
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error) as caught:
        delta_update(*arguments, **options)
    assert message in str(caught.value)


@pytest.mark.skipif(interpreting() or not installed("triton"), reason="Triton's interpreter is on, or Triton is not installed")
def test_triton_on_a_processor_says_what_to_do():
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1"):
        delta_update(X, K, V, B, backend="triton")


@pytest.mark.skipif(not installed("triton"), reason="Triton is not installed")
def test_triton_refuses_float64():
    program = ("import torch; from papers10.kernels.delta_update import delta_update\n"
               "z = lambda *s: torch.zeros(*s, dtype=torch.float64)\n"
               "try: delta_update(z(2, 3), z(2, 3), z(2), z(2), backend='triton')\n"
               "except TypeError as problem: print(problem)")
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert "got float64" in done.stdout, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, d, n", [(4096, 1024, 1), (1000, 768, 4), (7, 3000, 5), (3, 5, 5000)])
def test_triton_on_the_card(dtype, rows, d, n):
    inputs = [tensor.detach().cuda().requires_grad_() for tensor in operands(rows, d, n, dtype)]
    upstream = torch.randn(rows, d, n, device="cuda", dtype=dtype)
    for save in SAVES:
        out = delta_update(*inputs, save=save)
        again = delta_update(*inputs, save=save)
        assert last_backend("delta_update") == "triton" and torch.equal(out, again)
        wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
        expected = delta_update_reference(*wide)
        limit = 4 * max(torch.finfo(dtype).eps, 1e-5)
        pairs = zip([out, *torch.autograd.grad(out, inputs, upstream)], [expected, *torch.autograd.grad(expected, wide, upstream.double())])
        for a, b in pairs:
            assert (a.double() - b).abs().max() <= limit * b.abs().max().clamp_min(1)


@pytest.mark.skipif(not installed("numba"), reason="numba is not installed")
def test_numba_works_where_no_cache_can_be_written(monkeypatch):
    import numba

    from papers10.kernels import delta_update as module

    real = numba.njit

    def no_cache(*positional, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*positional, **options)

    monkeypatch.setattr(numba, "njit", no_cache)
    forward, _ = module._numba_loops.__wrapped__(2)
    x, k, v, beta = (tensor.detach() for tensor in operands(2, 3, 2))
    out, error, norm = torch.empty_like(x), torch.empty_like(v), torch.empty_like(beta)
    forward(0, 2, x.flatten(1).numpy(), k.numpy(), v.numpy(), beta.numpy(), 1e-5, out.flatten(1).numpy(), error.numpy(), norm.numpy())
    torch.testing.assert_close(out, delta_update_reference(x, k, v, beta))
