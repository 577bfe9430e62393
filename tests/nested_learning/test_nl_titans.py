"""Self-modifying Titans: the loop over tokens, pieces, rows, padding, packing, gradients, guards, what is refused."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.checks import NonFiniteError
from papers10.core.random import generator
from papers10.lm.cache import Cache
from papers10.lm.layers import LinearMemory, l2_normalise
from papers10.nested_learning.titans import AssociativeMemory, SelfModifyingTitans, selfmod_chunk


def draw(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed, "titans", *shape), dtype=torch.float64)


def build(seed=0, hidden=6, heads=2, head_dim=3, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        layer = SelfModifyingTitans(hidden, heads, head_dim, **{"chunk_size": (4, 2), **options}).double()
    layer.reset_parameters(generator(seed, "layer"))
    with torch.no_grad():
        layer.eta_bias.copy_(draw(heads))
        if layer.alpha_bias is not None:
            layer.alpha_bias.copy_(draw(heads, seed=1) + 2)
    return layer


def unit(x):
    return x / (x.square().sum() + 1e-12).sqrt()


def gelu_slope(x):
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(F.gelu(x).sum(), x)[0]


def token_loop(layer, x):
    """The definition, one row, one head and one token at a time; none of the layer's own arithmetic is used."""
    rows = []
    for row in x:
        taps = 0 if layer.conv is None else layer.conv.shape[1]
        past = F.pad(row, (0, 0, max(0, taps - 1), 0))
        inputs = [
            row[t] if layer.conv is None else (layer.conv.T * past[t : t + taps]).sum(0) for t in range(row.shape[0])
        ]
        heads = [one_head(layer, inputs, h) for h in range(layer.heads)]
        rows.append(torch.stack([torch.cat([head[t] for head in heads]) for t in range(row.shape[0])]))
    return torch.stack(rows) @ layer.out_proj.weight.T


def one_head(layer, inputs, h):
    K, deep = layer.head, layer.memory == "mlp"
    part = slice(h * K, h * K + K)
    names = list(layer.memories)
    run = {n: [w[h].clone() for w in layer.memories[n].weights()] for n in names}
    start = {n: list(ws) for n, ws in run.items()}
    before = {n: list(ws) for n, ws in run.items()}
    velocity = {n: [torch.zeros_like(w) for w in ws] for n, ws in run.items()}
    written = {*layer.adaptive, "memory"}
    gates, decays = {0: [], 1: []}, {0: [], 1: []}
    outs = []

    def answer(n, weights, a):
        if not deep:
            return weights[0] @ a
        y = weights[1] @ F.gelu(weights[0] @ a)
        return a + y if layer.memories[n].residual else y

    def normed(n, a):
        if not layer.value_norm:
            return a
        return 8 * torch.tanh(a / 8) if n in ("eta", "alpha") else a / (a.square().mean() + 1e-6).sqrt()

    for t, x in enumerate(inputs):
        z = layer.in_proj.weight[part] @ x
        source = {n: start[n] for n in names}
        k = answer("k", source["k"], z)
        k = unit(k) if layer.qk_norm else k
        v = normed("v", answer("v", source["v"], z))
        q = answer("q", source["q"], z) if "q" in layer.adaptive else layer.q_proj.weight[part] @ x
        q = unit(q) if layer.qk_norm else q
        eta = layer.eta_max * torch.sigmoid(answer("eta", source["eta"], z)[0] + layer.eta_bias[h])
        alpha = torch.ones(())
        if layer.use_decay:
            alpha = torch.sigmoid(answer("alpha", source["alpha"], z)[0] + layer.alpha_bias[h])
        eta = eta * (1 + alpha) / 2 if layer.dgd else eta
        theta = None if layer.theta_proj is None else torch.sigmoid(layer.theta_proj.weight[h] @ x)
        if layer.read == "causal":
            outs.append(answer("memory", run["memory"], q))
        elif layer.read == "chunk":
            outs.append(answer("memory", start["memory"], q))
        for n in written:
            own = layer.self_values or n in ("eta", "alpha")
            target = normed(n, answer(n, start[n], v)) if own else v
            error = answer(n, start[n], k) - target if layer.objective == "l2" else -target
            if deep:
                hidden = start[n][0] @ k
                act = F.gelu(hidden)
                slope = gelu_slope(hidden)
                scale = act.square().sum().clamp(min=1) if layer.precond == "layer" else 1.0
                grads = [torch.outer((start[n][1].T @ error) * slope, k), torch.outer(error, act) / scale]
                erased = [k, act / (act.square().sum() + 1e-12).sqrt() if layer.precond == "layer" else None]
            else:
                grads, erased = [torch.outer(error, k)], [k]
            for i, (g, e) in enumerate(zip(grads, erased)):
                M = run[n][i]
                new = alpha * M
                if layer.dgd and e is not None:
                    new = new - eta * torch.outer(M @ e, e)
                if layer.momentum == "token":
                    velocity[n][i] = theta * velocity[n][i] - eta * g
                    new = new + velocity[n][i]
                else:
                    new = new - eta * g
                run[n][i] = new
        if layer.read == "post":
            outs.append(answer("memory", run["memory"], q))
        for group, size in enumerate(layer.chunk_size):
            gates[group].append(theta)
            decays[group].append(alpha)
            if (t + 1) % size == 0:
                for n in [n for n in written if (n == "memory") == bool(group)]:
                    if layer.momentum == "chunk":
                        mean = torch.stack(gates[group]).mean()
                        kept = torch.stack(decays[group]).prod()
                        for i, M in enumerate(run[n]):
                            change = M - kept * before[n][i]
                            run[n][i] = M + mean * velocity[n][i]
                            velocity[n][i] = mean * velocity[n][i] + change
                    start[n], before[n] = list(run[n]), list(run[n])
                gates[group], decays[group] = [], []
    return outs


SETTINGS = {
    "default": {},
    "dot": {"objective": "dot"},
    "gd": {"inner_optimizer": "gd", "eta_max": 0.4},
    "dot gd": {"objective": "dot", "inner_optimizer": "gd"},
    "post": {"read": "post"},
    "chunk": {"read": "chunk"},
    "token by token": {"chunk_size": 1, "allow_neg_eigval": True},
    "main slower": {"chunk_size": (2, 4)},
    "equal": {"chunk_size": 3},
    "q": {"adaptive_q": True},
    "static": {"adaptive": ()},
    "only k": {"adaptive": ("k",)},
    "plain values": {"self_values": False},
    "titans": {"adaptive": (), "self_values": False, "inner_optimizer": "gd", "read": "post", "eta_max": 0.4},
    "no decay": {"use_decay": False},
    "no norms": {"value_norm": "none", "qk_norm": "none", "eta_max": 0.1},
    "no convolution": {"conv_size": 0},
    "momentum": {"momentum": True},
    "momentum of tokens": {"momentum": "token", "eta_max": 0.3},
    "momentum of tokens, gd": {"momentum": "token", "inner_optimizer": "gd", "eta_max": 0.3, "read": "post"},
    "deep": {"memory": "mlp", "expansion": (2, 3)},
    "deep causal": {"memory": "mlp", "read": "causal"},
    "deep post, input": {"memory": "mlp", "read": "post", "precond": "input", "objective": "dot"},
    "deep gd": {"memory": "mlp", "inner_optimizer": "gd", "eta_max": 0.3, "adaptive_q": True},
    "deep momentum": {"memory": "mlp", "momentum": True, "chunk_size": (2, 4), "eta_max": 0.3},
    "deep momentum of tokens": {"memory": "mlp", "momentum": "token", "eta_max": 0.3, "read": "causal"},
    "deep static": {"memory": "mlp", "adaptive": (), "self_values": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_chunks_equal_the_loop_over_tokens(name):
    layer, x = build(**SETTINGS[name]), draw(2, 11, 6)
    assert torch.allclose(layer(x), token_loop(layer, x), atol=1e-10, rtol=1e-9)
    assert torch.allclose(layer(x[:, :1]), token_loop(layer, x[:, :1]), atol=1e-10)


PIECES = [
    "default",
    "chunk",
    "titans",
    "momentum",
    "momentum of tokens",
    "main slower",
    "deep",
    "deep momentum",
    "no convolution",
]


def in_pieces(layer, x, lengths, cache=None):
    cache, out = Cache(1) if cache is None else cache, []
    for piece in x.split(lengths, 1):
        out.append(layer(piece, cache=cache))
        cache.seen_tokens += piece.shape[1]
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("name", PIECES)
@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_pieces_equal_one_call(name, lengths):
    layer, x = build(**SETTINGS[name]), draw(2, sum(lengths), 6)
    out, cache = in_pieces(layer, x, lengths)
    assert torch.allclose(out, layer(x), atol=1e-11)
    assert cache.layers[0]["titans.count"].tolist() == [sum(lengths)] * 2


def test_the_state_has_a_constant_size_and_float32():
    layer = build(chunk_size=(8, 4)).float()
    cache, sizes = Cache(1), set()
    for _ in range(20):
        layer(torch.randn(2, 1, 6), cache=cache)
        cache.seen_tokens += 1
        sizes.add(sum(t.numel() for t in cache.layers[0].values()))
    assert len(sizes) == 1 and cache.layers[0]["titans.run"].dtype == torch.float32


@pytest.mark.parametrize("name", PIECES)
def test_rows_do_not_see_each_other(name):
    layer, x = build(**SETTINGS[name]), draw(3, 9, 6)
    out = layer(x)
    assert torch.allclose(layer(x[[2, 0, 1]]), out[[2, 0, 1]], atol=1e-12)
    other = x.clone()
    other[1] = 100 * draw(9, 6, seed=5)
    assert torch.equal(layer(other)[[0, 2]], out[[0, 2]])


@pytest.mark.parametrize("name", PIECES)
def test_the_future_is_not_seen(name):
    layer, x = build(**SETTINGS[name]), draw(1, 10, 6)
    for t in (0, 3, 7):
        other = x.clone()
        other[:, t:] += 1
        assert torch.equal(layer(other)[:, :t], layer(x)[:, :t])
        assert not torch.equal(layer(other)[:, t:], layer(x)[:, t:])


def test_a_chunk_read_does_not_see_its_own_chunk():
    layer, x = build(read="chunk", conv_size=0, chunk_size=4), draw(1, 10, 6)
    other = x.clone()
    other[:, 5] += 1
    changed = (layer(other) - layer(x)).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False] * 5 + [True] + [False] * 2 + [True] * 2


@pytest.mark.parametrize("name", PIECES)
def test_padding_changes_nothing(name):
    layer, x = build(**SETTINGS[name]), draw(3, 9, 6)
    wanted = layer(x)
    for left, right in ((3, 0), (0, 2), (1, 4)):
        padded, mask = F.pad(x, (0, 0, left, right), value=9.0), F.pad(torch.ones(3, 9), (left, right))
        out = layer(padded, attention_mask=mask)
        assert torch.allclose(out[:, left : left + 9], wanted, atol=1e-11)
        assert not out[:, :left].any() and not out[:, left + 9 :].any()
    # Rows of their own lengths, then cut into pieces with a cache.
    lengths = [9, 4, 6]
    for side in ("left", "right"):
        mask = torch.tensor([[0] * (9 - n) + [1] * n if side == "left" else [1] * n + [0] * (9 - n) for n in lengths])
        ragged = torch.full_like(x, 7.0)
        for row, n in enumerate(lengths):
            ragged[row, mask[row].bool()] = x[row, :n]
        cache, pieces, later = Cache(1), [], draw(3, 3, 6, seed=3)
        for a, b in itertools.pairwise((0, 2, 5, 9)):
            pieces.append(layer(ragged[:, a:b], cache=cache, attention_mask=mask[:, a:b]))
            cache.seen_tokens += b - a
        pieces.append(layer(later, cache=cache))
        out, whole = torch.cat(pieces, 1), layer(ragged, attention_mask=mask)
        for row, n in enumerate(lengths):
            alone = layer(torch.cat([x[row : row + 1, :n], later[row : row + 1]], 1))[0]
            assert torch.allclose(whole[row, mask[row].bool()], alone[:n], atol=1e-11)
            assert torch.allclose(out[row, :9][mask[row].bool()], alone[:n], atol=1e-11)
            assert torch.allclose(out[row, 9:], alone[n:], atol=1e-11)


@pytest.mark.parametrize("name", ["default", "titans", "deep momentum"])
def test_packed_sequences_start_anew(name):
    layer, x = build(**SETTINGS[name]), draw(1, 12, 6)
    out = layer(x, cu_seqlens=torch.tensor([0, 5, 5, 6, 12]))
    for a, b in ((0, 5), (5, 6), (6, 12)):
        assert torch.allclose(out[:, a:b], layer(x[:, a:b]), atol=1e-11)


def test_reset_clone_reorder_and_saved_states():
    layer, x = build(momentum=True), draw(2, 7, 6)
    _, cache = in_pieces(layer, x, [5, 2])
    copy, saved = cache.clone(), cache.state_dict()
    more = draw(2, 4, 6, seed=2)
    after = layer(more, cache=cache)
    assert torch.allclose(layer(more, cache=copy), after, atol=1e-12)
    restored = Cache(1).load_state_dict(saved)
    assert torch.allclose(layer(more, cache=restored), after, atol=1e-12)
    swapped = Cache(1).load_state_dict(saved).reorder(torch.tensor([1, 1, 0]))
    assert torch.allclose(layer(more[[1, 1, 0]], cache=swapped), after[[1, 1, 0]], atol=1e-12)
    cache.reset()
    assert torch.allclose(layer(x, cache=cache), layer(x), atol=1e-12)
    with pytest.raises(ValueError, match="batch size"):
        layer(x[:1], cache=copy)


def test_flush_writes_the_unfinished_chunk():
    layer, x = build(chunk_size=8, read="chunk"), draw(1, 3, 6)
    _, cache = in_pieces(layer, x, [3])
    assert torch.equal(cache.layers[0]["titans.start.memory"][0], layer.memories["memory"].weight)
    layer.flush(cache)
    assert torch.equal(cache.layers[0]["titans.start.memory"], cache.layers[0]["titans.run"][:, :, -3:])
    assert cache.layers[0]["titans.count"].tolist() == [8]
    layer.flush(Cache(1))


def test_short_sequences_are_read_but_projections_do_not_move():
    layer, x = build(chunk_size=(8, 4)), draw(1, 3, 6)
    _, cache = in_pieces(layer, x, [3])
    assert torch.equal(cache.layers[0]["titans.start.projection"][0, :, :3], layer.memories["k"].weight)
    assert layer(draw(1, 0, 6)).shape == (1, 0, 6) and layer(draw(0, 3, 6)).shape == (0, 3, 6)
    before = cache.clone()
    layer(x[:, :0], cache=cache)
    assert all(torch.equal(a, b) for a, b in zip(before.layers[0].values(), cache.layers[0].values()))


def test_without_steps_the_memory_stands_still():
    layer, x = build(use_decay=False), draw(1, 9, 6)
    with torch.no_grad():
        layer.eta_bias.fill_(-1e4)
    _, cache = in_pieces(layer, x, [9])
    wanted = torch.cat([layer.memories[n].weight for n in (*layer.adaptive, "memory")], 1)
    assert torch.allclose(cache.layers[0]["titans.run"][0], wanted, atol=1e-12)


@pytest.mark.parametrize("name", ["default", "gd", "deep", "momentum", "momentum of tokens", "deep static"])
def test_gradient_reaches_the_initial_memories(name):
    layer, x, weight = build(**SETTINGS[name]), draw(1, 9, 6), draw(1, 9, 6, seed=4)
    loss = lambda: (layer(x) * weight).sum()
    loss().backward()
    for memory in [m for n, m in layer.memories.items() if n != "alpha"]:
        for parameter in memory.parameters():
            assert parameter.grad.abs().max() > 1e-6
            place = tuple(int(i) for i in (parameter.grad.abs() == parameter.grad.abs().max()).nonzero()[0])
            with torch.no_grad():
                kept, values = parameter[place].clone(), []
                for step in (1e-6, -1e-6):
                    parameter[place] = kept + step
                    values.append(loss())
                parameter[place] = kept
            measured = (values[0] - values[1]) / 2e-6
            assert torch.allclose(measured, parameter.grad[place], rtol=1e-5, atol=1e-8)


def test_the_gradient_comes_through_the_writes():
    """The key memory only matters for what is written: its gradient would vanish if writes were detached."""
    layer, x = build(conv_size=0), draw(1, 9, 6)
    layer(x)[:, -1].sum().backward()
    through = layer.memories["k"].weight.grad.clone()
    assert through.abs().max() > 1e-3
    truncated = build(conv_size=0, tbptt_chunks=1)
    truncated(x)[:, -1].sum().backward()
    # Token 9 is alone in its chunk: with the states cut at its start, no write lies between key memory and output.
    assert truncated.memories["k"].weight.grad is None or not truncated.memories["k"].weight.grad.any()


def test_truncation_counts_chunks_of_the_whole_text():
    layer, x = build(tbptt_chunks=2, chunk_size=2), draw(1, 7, 6)

    def reach(pieces):
        inputs = x.clone().requires_grad_()
        in_pieces(layer, inputs, pieces)[0][:, -1].sum().backward()
        return inputs.grad.abs().amax((0, 2)) > 0

    # Boundaries at 4 cut the states; tokens 2 and 3 still reach it through the convolution of token 5.
    assert torch.equal(reach([7]), reach([3, 4])) and torch.equal(reach([7]), reach([1] * 7))
    assert reach([7]).tolist() == [False, True, True, True, True, True, True]


@pytest.mark.parametrize("objective, read", list(itertools.product(["l2", "dot"], ["chunk", "causal", "post"])))
def test_selfmod_chunk_gradients(objective, read):
    shapes = [(1, 7, 1, 3), (1, 7, 1, 3), (1, 7, 1, 2)]
    q, k, v = (draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    eta = draw(1, 7, 1).sigmoid().requires_grad_()
    alpha = draw(1, 7, 1, seed=1).sigmoid().requires_grad_()
    memory = draw(1, 1, 2, 3).requires_grad_()
    call = lambda *a: selfmod_chunk(*a, chunk_size=3, objective=objective, read=read, output_final_state=True)
    assert torch.autograd.gradcheck(call, (q, k, v, eta, alpha, memory))


def test_selfmod_chunk_refuses_what_it_cannot_use():
    q, k, v = (draw(1, 6, 2, 3, seed=i) for i in range(3))
    good = dict(q=q, k=k, v_hat=v, eta=draw(1, 6, 2).sigmoid(), alpha=draw(1, 6, 2, seed=1).sigmoid(), chunk_size=4)
    good["initial_state"] = draw(1, 2, 3, 3, seed=4)

    def changed(name, value):
        tensor = good[name].clone()
        tensor[0, 1] = value
        return {**good, name: tensor}

    for name in ("q", "k", "v_hat", "eta", "alpha", "initial_state"):
        for value in (float("nan"), float("inf")):
            with pytest.raises(NonFiniteError, match=f"{name}: expected finite values") as error:
                selfmod_chunk(**changed(name, value))
            assert error.value.token == (None if name == "initial_state" else 1)
    assert not torch.isfinite(selfmod_chunk(**changed("v_hat", float("nan")), check_finite=False)[0]).all()
    for name, value, text in (
        ("alpha", 1.5, r"\(0, 1\].*got 1.5"),
        ("alpha", -0.5, r"\(0, 1\]"),
        ("eta", -0.5, "steps >= 0"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected .*{text}"):
            selfmod_chunk(**changed(name, value), check_finite=False)
    for name in ("q", "v_hat"):
        with pytest.raises(TypeError, match=f"{name}: expected the dtype of k, torch.float64, got torch.float32"):
            selfmod_chunk(**{**good, name: good[name].float()})


def test_selfmod_chunk_answers_in_the_dtype_of_its_signals():
    q, k, v = (F.normalize(draw(1, 6, 2, 4, seed=i), dim=-1).bfloat16() for i in range(3))
    eta, alpha = draw(1, 6, 2).sigmoid().float(), draw(1, 6, 2, seed=1).sigmoid().float()
    out, state = selfmod_chunk(q, k, v, eta, alpha, chunk_size=4, output_final_state=True)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32


@pytest.mark.parametrize("dgd", [True, False])
def test_with_dot_and_given_signals_the_chunk_does_not_matter(dgd):
    q, k, v = (F.normalize(draw(2, 9, 2, 4, seed=i), dim=-1) for i in range(3))
    eta, alpha = draw(2, 9, 2).sigmoid(), draw(2, 9, 2, seed=1).sigmoid()
    outs = {
        (objective, size): selfmod_chunk(q, k, v, eta, alpha, chunk_size=size, objective=objective, dgd=dgd)[0]
        for objective in ("dot", "l2")
        for size in (1, 4, 9)
    }
    assert torch.allclose(outs["dot", 1], outs["dot", 4], atol=1e-12) and torch.allclose(outs["dot", 1], outs["dot", 9])
    assert not torch.allclose(outs["l2", 1], outs["l2", 4])
    with pytest.raises(ValueError, match="alpha"):
        selfmod_chunk(q, k, v, eta, 0 * alpha, chunk_size=4)
    for name, wrong in (("v_hat", v[:, :3]), ("eta", eta[..., None]), ("alpha", alpha[:, :3])):
        with pytest.raises(ValueError, match=name):
            selfmod_chunk(**dict(q=q, k=k, v_hat=v, eta=eta, alpha=alpha, chunk_size=4) | {name: wrong})
    with pytest.raises(TypeError, match="eta"):
        selfmod_chunk(q, k, v, eta.long(), alpha, chunk_size=4)


def test_known_answers_of_one_key():
    one = torch.zeros(1, 8, 1, 2, dtype=torch.float64)
    one[..., 0] = 1
    value, eta, keep = torch.ones(1, 8, 1, 1, dtype=torch.float64), torch.full((1, 8, 1), 0.5), torch.ones(1, 8, 1)
    state = selfmod_chunk(one, one, value, eta.double(), keep.double(), chunk_size=1, output_final_state=True)[1]
    assert torch.allclose(state[0, 0, 0, 0], torch.tensor(0.5, dtype=torch.float64), atol=1e-9)
    # Written once with η = 1, a value is recalled exactly; written again with another one, it is replaced.
    keys, values = torch.eye(3, dtype=torch.float64)[None, [0, 1, 2, 0], None], draw(1, 4, 1, 2)
    full = torch.ones(1, 4, 1, dtype=torch.float64)
    state = selfmod_chunk(keys, keys, values, full, full, chunk_size=4, objective="dot", output_final_state=True)[1]
    assert torch.allclose(state[0, 0].T, values[0, [3, 1, 2], 0], atol=1e-12)
    summed = selfmod_chunk(
        keys, keys, values, full, full, chunk_size=4, objective="dot", dgd=False, output_final_state=True
    )
    assert torch.allclose(summed[1][0, 0, :, 0], values[0, 0, 0] + values[0, 3, 0], atol=1e-12)


def test_static_dot_with_dgd_is_gated_deltanet():
    """A naive gated delta rule: decay, then a step of β = η/α towards α/η times the target."""
    q, k, v = (F.normalize(draw(1, 9, 2, 4, seed=i), dim=-1) for i in range(3))
    eta, alpha = draw(1, 9, 2).sigmoid(), draw(1, 9, 2, seed=1).sigmoid()
    out, _ = selfmod_chunk(q, k, v, eta, alpha, chunk_size=4, objective="dot", read="post")
    beta, values = eta / alpha, v * alpha[..., None]
    for h in range(2):
        memory = torch.zeros(4, 4, dtype=torch.float64)
        for t in range(9):
            memory = alpha[0, t, h] * memory
            step = beta[0, t, h] * (values[0, t, h] - memory @ k[0, t, h])
            memory = memory + torch.outer(step, k[0, t, h])
            assert torch.allclose(out[0, t, h], memory @ q[0, t, h], atol=1e-12)


@pytest.mark.parametrize("momentum", [False, "token"])
def test_static_titans_is_the_linear_memory_of_lm(momentum):
    from types import SimpleNamespace

    config = SimpleNamespace(hidden_size=6, num_heads=2, head_dim=3)
    layer = build(
        adaptive=(),
        self_values=False,
        inner_optimizer="gd",
        read="post",
        value_norm="none",
        eta_max=0.4,
        chunk_size=4,
        momentum=momentum,
    )
    titans = LinearMemory(config, chunk_size=4, eta_max=0.4, momentum=bool(momentum)).double()
    weights = layer.in_proj.weight.view(2, 3, 6)
    compose = lambda name: layer.memories[name].weight @ weights
    with torch.no_grad():
        titans.q_proj.weight.copy_(layer.q_proj.weight)
        titans.k_proj.weight.copy_(compose("k").reshape(6, 6))
        titans.v_proj.weight.copy_(compose("v").reshape(6, 6))
        titans.eta_proj.weight.copy_(compose("eta")[:, 0])
        titans.alpha_proj.weight.copy_(compose("alpha")[:, 0])
        titans.alpha_bias.copy_(layer.alpha_bias)
        titans.initial.copy_(layer.memories["memory"].weight)
        titans.conv.copy_(layer.conv)
        titans.o_proj.weight.copy_(layer.out_proj.weight)
        layer.eta_bias.zero_()
        if momentum:
            titans.theta_proj.weight.copy_(layer.theta_proj.weight)
    x = draw(2, 11, 6)
    assert torch.allclose(titans(x), layer(x), atol=1e-11)


@pytest.mark.parametrize("name", ["default", "main slower", "deep causal", "chunk"])
def test_every_backend_agrees(name):
    x = draw(2, 9, 6)
    fast, slow = build(**SETTINGS[name]), build(**SETTINGS[name], backend="reference")
    for a, b in ((fast, slow),):
        out, wanted = a(x), b(x)
        assert torch.allclose(out, wanted, atol=1e-11)
        gradients = [
            torch.autograd.grad(y.square().sum(), layer.memories["v"].parameters())
            for y, layer in ((out, a), (wanted, b))
        ]
        assert all(torch.allclose(g, h, atol=1e-9) for g, h in zip(*gradients))


@pytest.mark.parametrize(
    "name", ["default", "equal", "main slower", "dot", "chunk", "q", "only k", "plain values", "no decay"]
)
def test_the_kernels_scan_is_the_same(name):
    from papers10.kernels.gated_delta import self_modifying_scan

    layer = build(**{**SETTINGS[name], "conv_size": 0})
    x = draw(2, 11, 6)
    heads = lambda y: y.view(2, 11, 2, 3)
    q = None if layer.q_proj is None else l2_normalise(heads(layer.q_proj(x)))
    out, state = self_modifying_scan(
        heads(layer.in_proj(x)),
        q,
        {n: m.weight for n, m in layer.memories.items() if n != "memory"},
        layer.memories["memory"].weight,
        eta_bias=layer.eta_bias,
        alpha_bias=0.0 if layer.alpha_bias is None else layer.alpha_bias,
        adaptive=(*layer.adaptive, "memory"),
        chunk_size=layer.chunk_size,
        objective=layer.objective,
        self_values=layer.self_values,
        read=layer.read,
    )
    assert torch.allclose(layer.out_proj(out.flatten(2)), layer(x), atol=1e-10)
    _, cache = in_pieces(layer, x, [11])
    moving = torch.cat(
        [torch.ones(m.weight.shape[1]) * (n in (*layer.adaptive, "memory")) for n, m in layer.memories.items()]
    )
    order = sorted(layer.memories, key=["k", "v", "q", "eta", "alpha", "memory"].index)
    assert list(layer.memories) == order
    assert torch.allclose(state.running[:, :, moving.bool()], cache.layers[0]["titans.run"], atol=1e-10)


def test_second_derivatives_exist():
    layer, x = build(), draw(1, 6, 6)
    parameter = layer.memories["memory"].weight
    (first,) = torch.autograd.grad(layer(x).square().sum(), parameter, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), parameter)
    assert torch.isfinite(second).all() and second.any()


def test_gates_and_memories_stay_in_float32_under_autocast():
    layer, x = build().float(), torch.randn(2, 9, 6)
    seen = []
    memory_chunk = layer._chunk
    layer._chunk = lambda *a: (seen.append({t.dtype for t in a[:7] if isinstance(t, torch.Tensor)}), memory_chunk(*a))[
        1
    ]
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert all(dtypes == {torch.float32} for dtypes in seen) and seen
    assert (out.float() - layer(x)).abs().max() < 0.1 * layer(x).abs().max()
    out.float().sum().backward()
    assert torch.isfinite(layer.memories["k"].weight.grad).all()


def test_long_texts_stay_finite():
    for name in ("default", "equal", "dot", "deep", "momentum"):
        layer = build(**SETTINGS[name]).float().eval()
        with torch.no_grad():
            out = layer(3 * torch.randn(2, 1024, 6, generator=generator(0, "long")))
        assert torch.isfinite(out).all()


def test_gradient_at_zero_inputs_is_finite():
    layer = build()
    x = torch.zeros(1, 5, 6, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.isfinite(x.grad).all() and all(
        torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None
    )


def test_a_memory_that_is_not_finite_is_refused_and_the_cache_kept():
    layer, x = build().eval(), draw(1, 6, 6)
    _, cache = in_pieces(layer, x, [6])
    before = cache.layers[0]["titans.run"].clone()
    bad = draw(1, 4, 6)
    bad[0, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="finite") as error:
        layer(bad, cache=cache)
    assert error.value.layer == 0 and error.value.token == 2
    assert torch.equal(cache.layers[0]["titans.run"], before)
    assert not torch.isfinite(layer.train()(bad)).all()
    with pytest.raises(NonFiniteError):
        build(check_finite=True).train()(bad)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"inner_optimizer": "gd", "chunk_size": 16}, "diverges"),
        ({"value_norm": None, "chunk_size": 16}, "double"),
        ({"allow_neg_eigval": True, "chunk_size": 16}, "−3"),
    ],
)
def test_unstable_settings_are_named(options, text):
    with pytest.warns(UserWarning, match=text):
        SelfModifyingTitans(8, 2, **options)


def test_stable_settings_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SelfModifyingTitans(8, 2)
        SelfModifyingTitans(8, 2, inner_optimizer="gd", eta_max=0.1, chunk_size=16)
        SelfModifyingTitans(8, 2, objective="dot", allow_neg_eigval=True, value_norm=None)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"hidden_size": 9}, ValueError, "num_heads"),
        ({"head_dim": 0}, ValueError, "head_dim"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"chunk_size": (4, 6)}, ValueError, "divide"),
        ({"chunk_size": (4, 2, 1)}, ValueError, "chunk_size"),
        ({"objective": "l1"}, ValueError, "objective"),
        ({"inner_optimizer": "dgdd"}, ValueError, "dgd"),
        ({"memory": "conv"}, ValueError, "memory"),
        ({"momentum": "tokens"}, ValueError, "token"),
        ({"adaptive": ("k", "w")}, ValueError, "adaptive"),
        ({"read": "before"}, ValueError, "read"),
        ({"eta_max": 0.0}, ValueError, "eta_max"),
        ({"tbptt_chunks": 0}, ValueError, "tbptt_chunks"),
        ({"conv_size": -1}, ValueError, "conv_size"),
        ({"backend": "numba"}, ValueError, "backend"),
    ],
)
def test_bad_settings_are_named(options, error, text):
    with pytest.raises(error, match=text):
        SelfModifyingTitans(**{"hidden_size": 8, "num_heads": 2, **options})


def test_bad_input_is_named():
    layer, x = build(), draw(2, 5, 6)
    with pytest.raises(TypeError, match="floating"):
        layer(torch.zeros(2, 5, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="shape"):
        layer(x[..., :4])
    with pytest.raises(ValueError, match="holes"):
        layer(x, attention_mask=torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="attention_mask"):
        layer(x, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="cu_seqlens"):
        layer(x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="cache"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 5]), cache=Cache(1))
    with pytest.raises(ValueError, match="dim_out"):
        AssociativeMemory(3, 2, residual=True)
    with pytest.raises(ValueError, match="kind"):
        AssociativeMemory(3, 2, "deep")


def test_compiles_without_changing_the_result():
    layer, x = build(chunk_size=4), draw(1, 8, 6)
    compiled = torch.compile(layer, backend="eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-11)
