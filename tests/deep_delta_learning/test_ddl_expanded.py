import ddl_oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.deep_delta_learning.expanded import ChannelCompressor, EmbedExpand, HyperConnection, TokenCompressor


def random_parameters(module, seed=0):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=draw)
    return module.double()


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6), causal=st.booleans(), data=st.data())
def test_channel_fold_equals_the_convolution(n, causal, data):
    taps = data.draw(st.integers(1, n))
    module = random_parameters(ChannelCompressor(3, n, taps, causal))
    x = randn(2, 4, 3, n)
    left = taps - 1 if causal else (taps - 1) // 2
    outputs = F.conv1d(F.pad(x.reshape(8, 3, n), (left, taps - 1 - left)), module.weight[:, None], groups=3)
    expected = (outputs * module.read).sum(-1).reshape(2, 4, 3)
    got, state = module(x)
    assert state is None
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        got[1, 2],
        ddl_oracle.compress_channels(x[1, 2], module.weight.detach(), module.read.detach(), causal),
        atol=1e-12,
        rtol=1e-12,
    )


@settings(max_examples=15, deadline=None)
@given(taps=st.integers(1, 5), n=st.integers(1, 4), time=st.integers(0, 6))
def test_token_compressor_equals_convolution_then_readout(taps, n, time):
    module = random_parameters(TokenCompressor(3, n, taps))
    x = randn(2, time, 3, n)
    got, state = module(x)
    assert got.shape == (2, time, 3) and state.shape == (2, taps - 1, 3, n)
    torch.testing.assert_close(
        got[1], ddl_oracle.compress_tokens(x[1], module.weight.detach(), module.read.detach()), atol=1e-12, rtol=1e-12
    )


@settings(max_examples=15, deadline=None)
@given(taps=st.integers(1, 5), n=st.integers(1, 4), time=st.integers(0, 6))
def test_expansion_equals_the_grouped_convolution(taps, n, time):
    module = random_parameters(EmbedExpand(3, n, taps))
    x = randn(2, time, 3)
    got, state = module(x)
    assert got.shape == (2, time, 3, n) and state.shape == (2, taps - 1, 3)
    torch.testing.assert_close(got[0], ddl_oracle.expand(x[0], module.weight.detach()), atol=1e-12, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(cuts=st.sets(st.integers(0, 9)), kind=st.sampled_from(["expand", "token"]))
def test_any_cut_of_the_text_gives_the_same(cuts, kind):
    module = random_parameters(EmbedExpand(3, 2) if kind == "expand" else TokenCompressor(3, 2))
    x = randn(2, 9, 3) if kind == "expand" else randn(2, 9, 3, 2)
    pieces, state, start = [], None, 0
    for end in [*sorted(cuts), 9]:
        piece, state = module(x[:, start:end], state)
        pieces.append(piece)
        start = end
    torch.testing.assert_close(torch.cat(pieces, 1), module(x)[0], atol=1e-12, rtol=1e-12)


def test_starting_points():
    x = randn(2, 5, 3)
    assert torch.equal(EmbedExpand(3, 4).double()(x)[0], x[..., None].expand(2, 5, 3, 4))
    assert ChannelCompressor(3, 4).read.tolist() == [0.25] * 4
    assert TokenCompressor(3, 4, read_init=1.0).read.tolist() == [1.0] * 4
    assert ChannelCompressor(3, 4).no_decay_parameters()[0].shape == (4,)


def test_gradients():
    for module, x in (
        (EmbedExpand(2, 3), randn(1, 5, 2)),
        (ChannelCompressor(2, 3, 2, True), randn(1, 5, 2, 3)),
        (TokenCompressor(2, 3), randn(1, 5, 2, 3)),
    ):
        module = random_parameters(module)
        names = [name for name, _ in module.named_parameters()]

        def run(x, *values, module=module, names=names):
            return torch.func.functional_call(module, dict(zip(names, values)), (x,))[0]

        assert torch.autograd.gradcheck(run, (x.requires_grad_(), *module.parameters()))


def test_hyper_connection_starts_as_the_additive_network():
    x, h = randn(2, 5, 3)[..., None].expand(2, 5, 3, 4), randn(2, 5, 3, seed=2)
    module = HyperConnection(4, layer=6).double()
    assert torch.equal(module.read(x), x[..., 0])
    torch.testing.assert_close(module.write(x, h), x + h[..., None])
    assert module.reading.tolist() == [0, 0, 1, 0]
    random_parameters(module)
    streams = randn(2, 5, 3, 4, seed=3)
    expected = torch.einsum("ij,btdj->btdi", module.mixing, streams) + h[..., None] * module.writing
    torch.testing.assert_close(module.write(streams, h), expected)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: ChannelCompressor(3, 4, 5),
            ValueError,
            "kernel_size: expected at most the number of value channels n = 4, got 5",
        ),
        (lambda: ChannelCompressor(3, 0), ValueError, "n: expected"),
        (lambda: TokenCompressor(3, 4, 0), ValueError, "kernel_size: expected"),
        (lambda: EmbedExpand(3, 4, 2.0), TypeError, "kernel_size: expected an int"),
        (lambda: EmbedExpand(3, 4)(torch.ones(2, 5, 4)), ValueError, r"x: expected shape .*d=3.*\[2, 5, 4\]"),
        (lambda: TokenCompressor(3, 4)(torch.ones(2, 5, 3, 2)), ValueError, "n=4"),
        (
            lambda: TokenCompressor(3, 4)(torch.ones(2, 5, 3, 4), torch.ones(2, 2, 3, 4)),
            ValueError,
            r"state: expected shape \[2, 3, 3, 4\]",
        ),
        (lambda: EmbedExpand(3, 4)(torch.ones(2, 5, 3, dtype=torch.int64)), TypeError, "floating"),
        (lambda: HyperConnection(0, 0), ValueError, "n: expected"),
        (lambda: HyperConnection(2, 0).write(torch.ones(2, 3, 2), torch.ones(2, 4)), ValueError, "h: expected shape"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
