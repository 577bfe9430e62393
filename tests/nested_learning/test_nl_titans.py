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
from papers10.lm.layers import LinearMemory
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
                grads = [torch.outer((start[n][1].T @ error) * slope, k), torch.outer(error, act)]
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
