"""Linear memories of the trunk: the loop over tokens, pieces, padding, chunks on a grid, momentum, what is refused."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.kernels.gated_delta import gated_delta
from papers10.lm.cache import Cache
from papers10.lm.generate import generate
from papers10.lm.layers import ChunkGrid, GatedDeltaNet, LinearMemory, delta_chunk, l2_normalise, plain_memory_scan
from papers10.lm.trunk import CausalLM, TrunkConfig

CONFIG = SimpleNamespace(hidden_size=6, num_heads=2, head_dim=None, norm_eps=1e-5, attention_gate=False)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed, "linear", *shape), dtype=torch.float64)


def delta(mode="gated", seed=0, **options):
    torch.manual_seed(seed)
    return GatedDeltaNet(CONFIG, mode=mode, **options).double()


def memory(seed=0, **options):
    torch.manual_seed(seed)
    layer = LinearMemory(CONFIG, **{"chunk_size": 4, **options}).double()
    with torch.no_grad():
        layer.initial.copy_(draw(2, 3, 3))
        if layer.alpha_bias is not None:
            layer.alpha_bias.copy_(draw(2) + 2)
    return layer


DELTAS = {
    "linear": dict(mode="linear"),
    "delta": dict(mode="delta"),
    "gated": dict(mode="gated"),
    "negative": dict(mode="gated", allow_neg_eigval=True, gate=True, conv_size=2, chunk_size=3),
    "sigmoid gate": dict(mode="gated", gate="sigmoid"),
    "no convolution": dict(mode="delta", conv_size=0, num_heads=3, head_dim=4),
}
MEMORIES = {
    "default": {},
    "no momentum": dict(momentum=False),
    "no momentum, big steps": dict(momentum=False, eta_max=1.0, chunk_size=3),
    "one token": dict(chunk_size=1, momentum=False),
    "one token, momentum": dict(chunk_size=1, eta_max=0.5),
    "no decay": dict(decay=False, read="causal"),
    "chunk": dict(read="chunk", momentum=False),
    "chunk, momentum": dict(read="chunk", conv_size=0),
}
LAYERS = {f"delta: {n}": (delta, o) for n, o in DELTAS.items()} | {
    f"titans: {n}": (memory, o) for n, o in MEMORIES.items()
}


def convolved(x, weight):
    taps = weight.shape[1]
    past = F.pad(x, (0, 0, taps - 1, 0))
    return torch.stack([(weight.T * past[:, t : t + taps]).sum(1) for t in range(x.shape[1])], 1)


def delta_loop(layer, x):
    qkv = layer.qkv_proj(x)
    qkv = qkv if layer.conv is None else convolved(qkv, layer.conv)
    q, k, v = F.silu(qkv).view(*x.shape[:2], 3, layer.heads, layer.head).unbind(2)
    q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
    rows = []
    for b, h in itertools.product(range(x.shape[0]), range(layer.heads)):
        M, answers = torch.zeros(layer.head, layer.head, dtype=x.dtype), []
        for t in range(x.shape[1]):
            beta, alpha = 1.0, 1.0
            if layer.mode == "gated":
                logit = layer.decay_proj.weight[h] @ x[b, t] + layer.decay_bias[h]
                alpha = torch.exp(-layer.log_rate[h].exp() * torch.log1p(logit.exp()))
            if layer.mode != "linear":
                beta = layer.scale * torch.sigmoid(layer.beta_proj.weight[h] @ x[b, t])
            M = alpha * M
            answer = M @ k[b, t, h] if layer.mode != "linear" else 0
            M = M + beta * torch.outer(v[b, t, h] - answer, k[b, t, h])
            answers.append(M @ q[b, t, h])
        rows.append(torch.stack(answers))
    out = (
        layer.out_norm(torch.stack(rows).view(x.shape[0], layer.heads, x.shape[1], layer.head))
        .transpose(1, 2)
        .flatten(2)
    )
    return layer.o_proj(out * (torch.sigmoid if layer.gate == "sigmoid" else F.silu)(layer.g_proj(x)) if layer.g_proj is not None else out)


def memory_loop(layer, x):
    x = x if layer.conv is None else convolved(x, layer.conv)
    split = lambda y: y.view(*x.shape[:2], layer.heads, layer.head)
    q, k, v = split(layer.q_proj(x)), split(layer.k_proj(x)), split(layer.v_proj(x))
    q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
    rows = []
    for b, h in itertools.product(range(x.shape[0]), range(layer.heads)):
        M, S, answers = layer.initial[h], torch.zeros_like(layer.initial[h]), []
        start = M
        for t in range(x.shape[1]):
            start = M if t % layer.chunk_size == 0 else start
            before = M
            eta = layer.eta_max * torch.sigmoid(layer.eta_proj.weight[h] @ x[b, t])
            theta = torch.sigmoid(layer.theta_proj.weight[h] @ x[b, t]) if layer.theta_proj is not None else 0.0
            logit = None if layer.alpha_proj is None else layer.alpha_proj.weight[h] @ x[b, t] + layer.alpha_bias[h]
            S = theta * S + eta * torch.outer(v[b, t, h] - start @ k[b, t, h], k[b, t, h])
            M = (1.0 if logit is None else torch.sigmoid(logit)) * M + S
            answers.append({"post": M, "causal": before, "chunk": start}[layer.read] @ q[b, t, h])
        rows.append(torch.stack(answers))
    return layer.o_proj(
        torch.stack(rows).view(x.shape[0], layer.heads, x.shape[1], layer.head).transpose(1, 2).flatten(2)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_their_loop_over_tokens(name):
    build, options = LAYERS[name]
    layer, x = build(**options), draw(2, 11, 6)
    loop = delta_loop if build is delta else memory_loop
    assert torch.allclose(layer(x), loop(layer, x), atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_pieces_equal_one_call(name, lengths):
    build, options = LAYERS[name]
    layer, x, cache, pieces = build(**options), draw(2, sum(lengths), 6), Cache(1), []
    for piece in x.split(lengths, 1):
        pieces.append(layer(piece, cache=cache))
        cache.seen_tokens += piece.shape[1]
    assert torch.allclose(torch.cat(pieces, 1), layer(x), atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_padding_rows_and_future(name):
    build, options = LAYERS[name]
    layer, x = build(**options), draw(2, 9, 6)
    wanted = layer(x)
    for left, right in ((3, 0), (0, 2)):
        padded, bounds = (
            F.pad(x, (0, 0, left, right), value=5.0),
            (torch.tensor([left] * 2), torch.tensor([left + 9] * 2)),
        )
        assert torch.allclose(layer(padded, valid=bounds)[:, left : left + 9], wanted, atol=1e-10)
    # Left padding of one row, in pieces.
    padded, bounds = F.pad(x, (0, 0, 2, 0), value=5.0), (torch.tensor([2, 2]), torch.tensor([11, 11]))
    cache, pieces = Cache(1), []
    for piece in padded.split([1, 4, 6], 1):
        pieces.append(layer(piece, cache=cache, valid=bounds))
        cache.seen_tokens += piece.shape[1]
    assert torch.allclose(torch.cat(pieces, 1)[:, 2:], wanted, atol=1e-10)
    other = x.clone()
    other[1] += 1
    assert torch.equal(layer(other)[0], wanted[0])
    other = x.clone()
    other[:, 6:] += 1
    assert torch.equal(layer(other)[:, :6], wanted[:, :6])


@pytest.mark.parametrize("name", LAYERS)
def test_layers_train_and_stay_finite(name):
    build, options = LAYERS[name]
    layer, x = build(**options).float(), torch.randn(2, 40, 6, generator=generator(0, "x")).requires_grad_()
    layer(x).square().mean().backward()
    assert torch.isfinite(x.grad).all() and all(
        torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert (half.float() - layer(x)).abs().max() < 0.1 * layer(x).abs().max() + 0.02
    layer.zero_grad()
    layer(torch.zeros(1, 3, 6)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("mixer", [GatedDeltaNet, LinearMemory])
def test_they_are_mixers_of_the_trunk(mixer):
    config = TrunkConfig(vocab_size=19, hidden_size=8, num_layers=2, num_heads=2, init_std=0.3)
    model = CausalLM(config, mixer=mixer).double().eval()
    prompt = torch.randint(19, (2, 6), generator=generator(0, "ids"))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    out = generate(model, prompt, max_new_tokens=6, temperature=0, attention_mask=mask)
    assert torch.equal(out[1, 2:], generate(model, prompt[1:, 2:], max_new_tokens=6, temperature=0)[0])
    kept = model.new_cache()
    for i in range(10):
        model(prompt[:, :1], cache=kept)
    sizes = [v.numel() for v in kept.layers[0].values()]
    model(prompt, cache=kept)
    assert sizes == [v.numel() for v in kept.layers[0].values()]


@pytest.mark.parametrize("read, erased, time", list(itertools.product(["post", "causal"], [True, False], [1, 7])))
def test_one_chunk_is_the_kernel(read, erased, time):
    q, k, u = l2_normalise(draw(2, time, 2, 3)), l2_normalise(draw(2, time, 2, 3, seed=1)), draw(2, time, 2, 4)
    a, g = draw(2, time, 2).sigmoid() if erased else None, -draw(2, time, 2).abs()
    M = draw(2, 2, 4, 3)
    out, new = gated_delta(q, k, u, a, g, M, read=read, backend="reference")
    mine, mine_new, _ = delta_chunk(q, k, u, a, g, M, read=read)
    some, _, _ = delta_chunk(q, k, u, a, g, M, read=read, rows=slice(1, 3))
    assert torch.allclose(mine, out, atol=1e-12) and torch.allclose(mine_new, new, atol=1e-12)
    assert torch.equal(some, mine[..., 1:3]) and delta_chunk(None, k, u, a, g, M)[0] is None


@pytest.mark.parametrize("erased", [True, False])
def test_a_token_that_is_not_there_changes_nothing(erased):
    k, u, M, S = l2_normalise(draw(1, 7, 1, 3)), draw(1, 7, 1, 2), draw(1, 1, 2, 3), draw(1, 1, 2, 3, seed=1)
    a, g, theta = draw(1, 7, 1).sigmoid(), -draw(1, 7, 1).abs(), F.logsigmoid(draw(1, 7, 1, seed=1))
    keep = torch.tensor([[True, False, True, True, False, True, False]])
    few = lambda y: y[:, keep[0]]
    for momentum in (dict(log_momentum=theta, velocity=S), {}):
        out, new, last = delta_chunk(k, k, u, a if erased else None, g, M, mask=keep, **momentum)
        momentum = {n: few(v) if n == "log_momentum" else v for n, v in momentum.items()}
        wanted, wanted_new, wanted_last = delta_chunk(
            few(k), few(k), few(u), few(a) if erased else None, few(g), M, **momentum
        )
        assert torch.allclose(few(out), wanted, atol=1e-12) and torch.allclose(new, wanted_new, atol=1e-12)
        assert last is None or torch.allclose(last, wanted_last, atol=1e-12)


def test_gradients_of_a_chunk_with_momentum():
    inputs = [
        draw(1, 5, 1, 3),
        draw(1, 5, 1, 3, seed=1),
        draw(1, 5, 1, 2),
        draw(1, 5, 1).sigmoid(),
        -draw(1, 5, 1).abs() - 0.1,
    ]
    inputs += [draw(1, 1, 2, 3), -draw(1, 5, 1, seed=2).abs() - 0.1, draw(1, 1, 2, 3, seed=1)]
    call = lambda *x: delta_chunk(*x[:6], log_momentum=x[6], velocity=x[7])
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4),
    sizes=st.sampled_from([(4,), (1,), (2, 4), (6, 3)]),
)
def test_the_grid_loses_no_token(rows, sizes):
    time = 9
    mask = torch.zeros(len(rows), time)
    for row, (_, a, b) in enumerate(rows):
        mask[row, min(a, b) : max(a, b)] = 1
    counts = torch.tensor([n for n, _, _ in rows])
    grid = ChunkGrid(len(rows), time, sizes, counts=counts, attention_mask=mask)
    x = torch.arange(1.0, 1 + len(rows) * time).view(len(rows), time, 1)
    spread = grid.spread(grid.aligned(x))
    assert torch.equal(grid.collect(spread), x * mask[..., None])
    assert torch.equal(grid.counts, counts + mask.sum(1).long())
    period, reached = max(sizes), 0
    for low, high, finished, done in grid.pieces():
        assert low == reached and high > low
        reached = high
        for index, size in enumerate(sizes):
            assert (index in finished) == ((grid.begin + high) % size == 0)
        if done is not None:
            assert torch.equal(done, spread[:, high - 1, 0] != 0)
    assert reached == (0 if not mask.any() else spread.shape[1])
    for row in range(len(rows)):
        places = spread[row, :, 0].nonzero()[:, 0]
        if len(places):
            assert (grid.begin + int(places[0])) % period == int(counts[row]) % period


def test_scan_paths_agree():
    q, k, v = l2_normalise(draw(2, 11, 2, 3)), l2_normalise(draw(2, 11, 2, 3, seed=1)), draw(2, 11, 2, 3)
    eta, decay = draw(2, 11, 2).sigmoid() / 4, -draw(2, 11, 2).abs() / 5
    M = draw(2, 2, 3, 3)
    for objective, erase, read in itertools.product(["l2", "dot"], [True, False], ["post", "causal", "chunk"]):
        options = dict(chunk_size=4, objective=objective, erase=erase, read=read)
        even, ragged = ChunkGrid(2, 11, (4,)), ChunkGrid(2, 11, (4,), attention_mask=torch.ones(2, 11))
        ragged.mask = torch.ones(2, 11, dtype=torch.bool)
        a, first = plain_memory_scan(q, k, v, eta, decay, {"run": M, "start": M}, grid=even, **options)
        b, second = plain_memory_scan(q, k, v, eta, decay, {"run": M, "start": M}, grid=ragged, **options)
        assert torch.allclose(a, b, atol=1e-12) and all(torch.allclose(first[n], second[n], atol=1e-12) for n in first)


def test_known_eigenvalues():
    """A unit key written with the value 0 multiplies the memory along it by 1, 1 − β or α(1 − β)."""
    one = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    one[..., 0] = 1
    M, beta = torch.ones(1, 1, 1, 2, dtype=torch.float64), torch.full((1, 1, 1), 1.6, dtype=torch.float64)
    _, new = gated_delta(
        one, one, torch.zeros(1, 1, 1, 1, dtype=torch.float64), 0.5 * beta, torch.full_like(beta, math.log(0.5)), M
    )
    assert torch.allclose(new[0, 0, 0], torch.tensor([0.5 * (1 - 1.6), 0.5], dtype=torch.float64))
    assert delta("gated", allow_neg_eigval=True).scale == 2.0


def test_weights_that_do_not_decay():
    layer = delta("gated")
    assert {id(p) for p in layer.no_decay_parameters()} == {id(layer.log_rate), id(layer.decay_bias)}
    assert delta("linear").no_decay_parameters() == []


@pytest.mark.parametrize(
    "build, options, text",
    [
        (delta, {"mode": "gate"}, "mode"),
        (delta, {"num_heads": 4}, "num_heads"),
        (delta, {"conv_size": -1}, "conv_size"),
        (delta, {"chunk_size": 0}, "chunk_size"),
        (memory, {"chunk_size": 0}, "chunk_size"),
        (memory, {"read": "before"}, "read"),
        (memory, {"eta_max": 0.0}, "eta_max"),
    ],
)
def test_bad_settings_are_named(build, options, text):
    with pytest.raises(ValueError, match=text):
        build(**options)


def test_bad_rows_are_named():
    with pytest.raises(ValueError, match="holes"):
        ChunkGrid(1, 4, (2,), attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(ValueError, match="at most one"):
        ChunkGrid(1, 4, (2,), attention_mask=torch.ones(1, 4), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        ChunkGrid(1, 4, (2,), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="batch size"):
        ChunkGrid(2, 4, (2,), counts=torch.tensor([0]))
