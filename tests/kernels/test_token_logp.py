"""Token log-probability: both forms against log_softmax, in pieces, with masks, by every path, and bad input."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.kernels import token_logp as module
from papers10.kernels.common import HARDWARE, BackendUnavailable, installed, interpreting, last_backend
from papers10.kernels.token_logp import linear_token_logp, linear_token_logp_reference, token_logp, token_logp_reference

BOTH = ["reference", "torch"]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed, "token_logp", *shape), dtype=torch.float64)


def pick(rows, vocabulary, seed=0):
    return torch.randint(vocabulary, (rows,), generator=generator(seed, "ids"))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocabulary=st.integers(1, 12),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    entropy=st.booleans(),
    piece=st.sampled_from([1, 7, 40, 2**20]),
    masked=st.booleans(),
)
def test_values_and_gradients_equal_the_reference(rows, vocabulary, temperature, entropy, piece, masked):
    before = module._CHUNK_ELEMENTS
    module._CHUNK_ELEMENTS = piece
    try:
        ids = pick(rows, vocabulary)
        mask = torch.arange(rows) % 2 == 0 if masked else None
        a, b = (draw(rows, vocabulary).requires_grad_() for _ in range(2))
        h, g = (draw(rows, 3).requires_grad_() for _ in range(2))
        w, u = (draw(vocabulary, 3, seed=1).requires_grad_() for _ in range(2))
        c, e = (draw(vocabulary, seed=2).requires_grad_() for _ in range(2))
        options = {"temperature": temperature, "entropy": entropy, "mask": mask}
        pairs = [
            (token_logp(a, ids, **options), token_logp_reference(b, ids, **options)),
            (linear_token_logp(h, w, ids, bias=c, **options), linear_token_logp_reference(g, u, ids, bias=e, **options)),
        ]
        for ours, wanted in pairs:
            ours, wanted = (torch.stack(x) if entropy else x for x in (ours, wanted))
            assert torch.allclose(ours, wanted, atol=1e-12)
            weights = draw(*ours.shape, seed=5)
            (ours * weights).sum().backward()
            (wanted * weights).sum().backward()
        for x, y in ((a, b), (h, g), (w, u), (c, e)):
            assert torch.allclose(x.grad, y.grad, atol=1e-11)
    finally:
        module._CHUNK_ELEMENTS = before


def test_mean_is_cross_entropy():
    logits, ids = draw(2, 5, 11), pick(10, 11).view(2, 5)
    assert torch.allclose(-token_logp(logits, ids).mean(), F.cross_entropy(logits.view(-1, 11), ids.view(-1)))


def test_masked_rows_may_hold_anything():
    logits = draw(3, 4).clone()
    logits[1] = float("nan")
    logits.requires_grad_()
    mask = torch.tensor([1, 0, 1])
    for options in ({}, {"entropy": True}):
        out = token_logp(logits, torch.tensor([0, -100, 3]), mask=mask, **options)
        out = out[0] if options else out
        assert out[1] == 0 and out.isfinite().all()
        (gradient,) = torch.autograd.grad(out.sum(), logits)
        assert gradient[1].eq(0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    logits, ids = (20 * draw(4, 1000)).to(dtype), pick(4, 1000)
    out = token_logp(logits, ids)
    assert out.dtype == torch.float32
    assert torch.allclose(out, logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0], atol=1e-4)
    wide = logits.clone().requires_grad_()
    token_logp(wide, ids, entropy=True)[0].sum().backward()
    assert wide.grad.dtype == dtype and wide.grad.isfinite().all()


def test_autocast_narrows_the_linear_form():
    hidden, weight, ids = draw(6, 8).float().requires_grad_(), draw(5, 8, seed=1).float().requires_grad_(), pick(6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_token_logp(hidden, weight, ids)
    assert out.dtype == torch.float32
    assert torch.allclose(out, linear_token_logp(hidden, weight, ids), atol=0.1)
    out.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_empty():
    assert token_logp(torch.zeros(0, 7), pick(0, 7)).shape == (0,)
    assert linear_token_logp(torch.zeros(0, 3), torch.zeros(7, 3), pick(0, 7)).shape == (0,)
    everything_masked = token_logp(torch.zeros(2, 3), torch.tensor([-100, -100]), mask=torch.zeros(2))
    assert everything_masked.tolist() == [0, 0]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_bad_input(backend):
    logits = draw(2, 3)
    with pytest.raises(IndexError, match=r"ids: expected values in \[0, 3\), got 3 at \(1,\)"):
        token_logp(logits, torch.tensor([0, 3]), backend=backend)
    with pytest.raises(IndexError):
        token_logp(logits, torch.tensor([-1, 0]), backend=backend)
    with pytest.raises(ValueError, match="ids"):
        token_logp(logits, torch.tensor([0]), backend=backend)
    with pytest.raises(TypeError, match="ids"):
        token_logp(logits, torch.tensor([0.0, 1.0]), backend=backend)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            token_logp(logits, torch.tensor([0, 1]), temperature=temperature, backend=backend)
    with pytest.raises(ValueError, match="mask"):
        token_logp(logits, torch.tensor([0, 1]), mask=torch.ones(3), backend=backend)
    with pytest.raises(ValueError, match="weight"):
        linear_token_logp(draw(2, 3), draw(4, 2), torch.tensor([0, 1]), backend=backend)


INTERPRETED = """
import torch
from papers10.kernels import token_logp as module
from papers10.kernels.token_logp import *
from papers10.kernels.harness import evaluate

draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))
known = torch.tensor([[1000.0, 0, -1000], [0, 0, 0]])
logp, spread = token_logp(known, torch.tensor([0, 2]), entropy=True, backend="triton")
torch.testing.assert_close(logp, torch.tensor([0, -1.0986123]))
torch.testing.assert_close(spread, torch.tensor([0, 1.0986123]))

logits, ids = draw(4, 9), torch.tensor([0, 4, 8, 2])
logits[1, 3:] = -torch.inf
mask = torch.tensor([1, 1, 1, 0])
logits[3] = torch.nan
options = dict(temperature=0.5, entropy=True, mask=mask)
wanted = evaluate(token_logp_reference, dict(logits=logits.double().requires_grad_(), ids=ids), **options)
for block in (1, 2, 4096):
    module._BLOCK = block
    got = evaluate(token_logp, dict(logits=logits.clone().requires_grad_(), ids=ids), [value.float() for value in wanted[2]], backend="triton", **options)
    assert got[0][0][1] == -torch.inf and got[1][0].isfinite().all() and got[1][0][3].eq(0).all()
    for a, b in zip([*got[0], got[1][0][:3]], [*wanted[0], wanted[1][0][:3]]):
        torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=1e-6)
module._BLOCK = 4096

h, w, b, ids = draw(5, 7), draw(2100, 7), draw(2100), torch.tensor([0, -100, 1031, 2099, 5])
options = dict(temperature=2.0, entropy=True, mask=torch.tensor([1, 0, 1, 1, 1]))
leaves = lambda dtype: {name: value.to(dtype, copy=True).requires_grad_() for name, value in (("hidden", h), ("weight", w), ("bias", b))} | {"ids": ids}
wanted = evaluate(linear_token_logp_reference, leaves(torch.float64), **options)
module._GRADIENT_ELEMENTS = 4096
got = evaluate(linear_token_logp, leaves(torch.float32), [value.float() for value in wanted[2]], backend="triton", **options)
for a, b in zip([*got[0], *got[1]], [*wanted[0], *wanted[1]]):
    torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)

for ids, logits in ((torch.tensor([0, 3]), known), (torch.tensor([0, 1]), known.double())):
    try: token_logp(logits, ids, backend="triton")
    except (ValueError, TypeError) as problem: print(type(problem).__name__, problem)
"""


@pytest.mark.skipif(not installed("triton"), reason="Triton is not installed")
def test_triton_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "TokenOutOfRange ids: expected values in [0, 3), got 3 at (1,)",
        "TypeError backend: expected float32, bfloat16 or float16 for 'triton', got float64; use backend='torch'",
    ]


@pytest.mark.skipif(
    interpreting() or not installed("triton"), reason="Triton's interpreter is on, or Triton is not installed"
)
def test_triton_on_a_processor_says_what_to_do():
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1"):
        token_logp(torch.zeros(1, 2), torch.tensor([0]), backend="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no graphics card")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graphics_card_agrees_with_the_processor(dtype):
    logits, ids = draw(33, 5000).to(dtype), pick(33, 5000)
    ours = token_logp(logits.cuda(), ids.cuda(), entropy=True)
    assert last_backend("token_logp") == "triton"
    for got, wanted in zip(ours, token_logp_reference(logits.double(), ids, entropy=True)):
        torch.testing.assert_close(got.cpu().double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BOTH)
def test_known_values(backend):
    logits = torch.tensor([[1000.0, 0, -1000], [0, 0, 0]], dtype=torch.float64, requires_grad=True)
    logp, spread = token_logp(logits, torch.tensor([0, 2]), entropy=True, backend=backend)
    torch.testing.assert_close(logp, torch.tensor([0, -1.098612], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(spread, torch.tensor([0, 1.098612], dtype=torch.float64), atol=1e-6, rtol=0)
    (slope,) = torch.autograd.grad(logp[1], logits)
    wanted = torch.tensor([[0, 0, 0], [-1 / 3, -1 / 3, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(slope, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("entropy", [False, True])
def test_tokens_that_cannot_come(backend, entropy):
    logits = torch.tensor([[0.0, -torch.inf, 0], [0, -torch.inf, 0]], dtype=torch.float64, requires_grad=True)
    out = token_logp(logits, torch.tensor([0, 1]), entropy=entropy, backend=backend)
    logp, spread = out if entropy else (out, torch.full((2,), math.log(2)).double())
    torch.testing.assert_close(logp, torch.tensor([-math.log(2), -math.inf], dtype=torch.float64))
    torch.testing.assert_close(spread, torch.full((2,), math.log(2), dtype=torch.float64))
    total = logp.sum() + (spread.sum() if entropy else 0)
    (slope,) = torch.autograd.grad(total, logits)
    # d log p_v / dz = [v = token] - p, and equal probabilities are where the entropy has its maximum.
    torch.testing.assert_close(slope, torch.tensor([[0.5, 0, -0.5], [-0.5, 1, -0.5]], dtype=torch.float64))


def test_what_is_kept_is_a_fraction_of_a_table():
    from papers10.core.bench import extra_memory

    logits, ids = torch.zeros(64, 32_768, requires_grad=True), pick(64, 32_768)
    ours = extra_memory(lambda: torch.autograd.grad(token_logp(logits, ids).sum(), logits))
    gather = extra_memory(
        lambda: torch.autograd.grad(logits.log_softmax(-1).gather(-1, ids[:, None]).sum(), logits)
    )
    # log_softmax with gather needs two tables beside the gradient; ours keeps three numbers a row.
    assert gather >= 2 * logits.nbytes and ours < logits.nbytes / 100


def test_a_head_that_is_frozen_gets_no_gradient():
    hidden, weight, ids = draw(4, 3).requires_grad_(), draw(5, 3, seed=1), pick(4, 5)
    both = weight.clone().requires_grad_()
    (alone,) = torch.autograd.grad(linear_token_logp(hidden, weight, ids).sum(), hidden)
    together = torch.autograd.grad(linear_token_logp(hidden, both, ids).sum(), (hidden, both))
    assert torch.equal(alone, together[0]) and together[1].abs().sum() > 0


def test_second_derivative_names_the_remedy():
    logits, ids = draw(2, 3).requires_grad_(), pick(2, 3)
    out, _ = token_logp(logits, ids, entropy=True)
    (slope,) = torch.autograd.grad(out.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        slope.sum().backward()


def test_one_node_each_for_torch_compile():
    def both(logits, hidden, weight, ids):
        logp, spread = token_logp(logits, ids, entropy=True, temperature=0.5)
        return logp + spread + linear_token_logp(hidden, weight, ids)

    torch._dynamo.reset()
    inputs = [tensor.requires_grad_() for tensor in (draw(4, 6), draw(4, 3), draw(6, 3, seed=1))]
    got = torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs, pick(4, 6))
    expected = both(*inputs, pick(4, 6))
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(a, b)


def test_operator_registration_is_sound():
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    ids, keep = pick(4, 6), torch.tensor([True, False, True, True])
    torch.library.opcheck(module._forward_op, (draw(4, 6), ids, keep, 1.0, True, "torch"), test_utils=checks)
    operands = (draw(4, 3), draw(6, 3), draw(6), ids, keep, 1.0, True, "torch")
    torch.library.opcheck(module._linear_forward_op, operands, test_utils=checks)


def test_bytes_and_limits_of_the_paper():
    case = {"op": "token_logp", "rows": 16_384, "vocabulary": 152_064, "dtype": "bfloat16"}
    assert module.token_logp_bytes(case) == 16_384 * 152_064 * 2
    # 4.98 GB at 3.35 TB/s.
    seconds = [module._limit({**case, "direction": way}, HARDWARE["H100"]) for way in ("forward", "backward")]
    assert seconds == pytest.approx([1.487e-3, 2.975e-3], rel=1e-3)
    linear = {**case, "op": "linear_token_logp", "width": 3584}
    assert module.token_logp_flops(linear) == 2 * 16_384 * 152_064 * 3584
    assert module.token_logp_flops({**linear, "direction": "backward"}) == 3 * module.token_logp_flops(linear)
