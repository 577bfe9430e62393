"""Token log-probability: both forms against log_softmax, in pieces, with masks, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.kernels import token_logp as module
from papers10.kernels.token_logp import linear_token_logp, linear_token_logp_reference, token_logp, token_logp_reference


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
    for rows in (0,):
        assert token_logp(torch.zeros(rows, 7), pick(rows, 7)).shape == (0,)
        assert linear_token_logp(torch.zeros(rows, 3), torch.zeros(7, 3), pick(rows, 7)).shape == (0,)
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
