"""State and recall: the eigenvalue, chunk size 1 in large chunks, baselines against their definition, experiments run and repeat."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.kernels.gated_delta import gated_delta
from papers10.lm import tasks
from papers10.lm.cache import Cache
from papers10.lm.layers import GatedDeltaNet, l2_normalise
from papers10.lm.trunk import TrunkConfig
from papers10.nested_learning import recall

CONFIG = TrunkConfig(vocab_size=4, hidden_size=8, num_layers=1, num_heads=2)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed, "noise", *shape), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    rule=st.sampled_from(list(recall.MEMORY_RULES)),
    eta=st.floats(0, 1),
    alpha=st.floats(0.1, 1),
    repeats=st.integers(1, 12),
)
def test_key_eigenvalue_is_the_loop(rule, eta, alpha, repeats):
    options = recall.MEMORY_RULES[rule]
    held = 1.0
    for _ in range(repeats):
        held = alpha * held - options["dgd"] * eta * held - (options["objective"] == "l2") * eta * 1.0
    assert recall.key_eigenvalue(rule, eta, alpha, repeats).item() == pytest.approx(held, rel=1e-9, abs=1e-9)


def test_key_eigenvalue_known_values():
    eta = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    for chunk in (1, 3, 32):
        p = (1 - eta) ** chunk
        assert torch.allclose(recall.key_eigenvalue("dgd-dot", eta, repeats=chunk), p)
        assert torch.allclose(recall.key_eigenvalue("dgd-l2", eta, repeats=chunk), 2 * p - 1)
        assert torch.allclose(recall.key_eigenvalue("gd", eta, repeats=chunk), 1 - chunk * eta)
        assert (recall.key_eigenvalue("hebbian", eta, repeats=chunk) == 1).all()
    # With retention below 1 the factor leaves the unit interval: α − 2η.
    assert recall.key_eigenvalue("dgd-l2", 1.0, 0.9).item() == pytest.approx(-1.1)


@settings(max_examples=8, deadline=None)
@given(rule=st.sampled_from(list(recall.MEMORY_RULES)), time=st.integers(1, 40), block=st.integers(1, 48))
def test_token_rule_in_any_block(rule, time, block):
    options = recall.MEMORY_RULES[rule]
    q, k, v = l2_normalise(noise(2, time, 1, 3)), l2_normalise(noise(2, time, 1, 3, seed=1)), noise(2, time, 1, 4)
    eta, decay, start = noise(2, time, 1).sigmoid(), -noise(2, time, 1, seed=2).abs() / 9, noise(2, 1, 4, 3)
    literal = gated_delta(
        *(q, k, eta[..., None] * v, options["dgd"] * eta, decay, start),
        chunk_erase=(options["objective"] == "l2") * eta,
        chunk_size=1,
        backend="reference",
    )
    fast = gated_delta(q, k, eta[..., None] * v, recall.token_erase(rule, eta), decay, start, chunk_size=block)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(literal, fast, strict=True))


def test_dgd_at_chunk_one_is_deltanet_with_negative_eigenvalues():
    layer = GatedDeltaNet(CONFIG, mode="delta", conv_size=0, allow_neg_eigval=True).double()
    x = noise(2, 21, 8)
    q, k, v = (p.unflatten(-1, (2, 4)) for p in torch.nn.functional.silu(layer.qkv_proj(x)).chunk(3, -1))
    eta = layer.beta_proj(x).sigmoid()
    out, _ = gated_delta(
        *(l2_normalise(q), l2_normalise(k), eta[..., None] * v, recall.token_erase("dgd-l2", eta), None),
        chunk_size=16,
    )
    # The write is half of DeltaNet's, and so is what is read; the norm after the read hides it.
    assert torch.allclose(layer.o_proj(layer.out_norm(2 * out).flatten(2)), layer(x), atol=1e-10)


@pytest.mark.parametrize("rule", recall.MEMORY_RULES)
def test_fixed_layer_with_and_without_cache(rule):
    layer, x = recall.titans_mixer(CONFIG, rule=rule, chunk_size=1).double(), noise(2, 9, 8)
    cache, pieces = Cache(1), []
    for piece in x.split([2, 1, 6], 1):
        pieces.append(layer(piece, cache=cache))
        cache.seen_tokens += piece.shape[1]
    assert torch.allclose(torch.cat(pieces, 1), layer(x), atol=1e-10)


def test_token_eigenvalues():
    x = noise(2, 9, 8)
    for rule, low in (("dgd-l2", -1), ("gd", 0), ("dgd-dot", 0), ("hebbian", 1)):
        layer = recall.titans_mixer(CONFIG, rule=rule, chunk_size=1, use_decay=False).double()
        factors = recall.token_eigenvalues(layer, x)
        assert factors.shape == (2, 2, 9) and (factors >= low).all() and (factors <= 1).all()
        # A step of zero keeps everything, a full step leaves the lowest factor.
        for bias, expected in ((-60.0, 1.0), (60.0, low)):
            torch.nn.init.constant_(layer.eta_bias, bias)
            assert torch.allclose(recall.token_eigenvalues(layer, x), torch.tensor(expected).double(), atol=1e-9)


@pytest.mark.parametrize("retention", [False, True])
@pytest.mark.parametrize("rule", list(recall.MEMORY_RULES))
def test_token_eigenvalues_are_those_of_the_layer(rule, retention):
    layer, x = recall.titans_mixer(CONFIG, rule=rule, chunk_size=1, use_decay=retention).double(), noise(2, 1, 8)
    # The state is affine in the memory it starts from: two starts that differ by the identity end a token later with alpha I - c eta k k^T between them.
    ends = []
    for start in (torch.zeros(4, 4), torch.eye(4)):
        with torch.no_grad():
            layer.memories["memory"].weight.copy_(start.expand(2, 4, 4))
        cache = Cache(2)
        layer(x, cache=cache)
        ends.append(cache.layers[0]["titans.run"])
    lowest = torch.linalg.eigvalsh(ends[1] - ends[0])[..., 0]
    assert torch.allclose(lowest, recall.token_eigenvalues(layer, x)[..., 0], atol=1e-12)
    assert lowest.min() >= -1 - 1e-12


def test_self_referential_matrix_by_definition():
    layer, x = recall.SelfReferentialMatrix(CONFIG).double(), noise(1, 5, 8)
    inputs, heads = layer.in_proj(x).view(5, 2, 4).softmax(-1), []
    for head in range(2):
        w, outs = layer.initial[head], []
        for t in range(5):
            y, k, q, beta = (w @ inputs[t, head]).split([4, 4, 4, 4])
            outs.append(y)
            k, q = k.softmax(0), q.softmax(0)
            step = torch.cat([beta[i].sigmoid().expand(n) for i, n in enumerate((4, 4, 4, 4))])
            w = w + torch.outer(step * (w @ q - w @ k), k)
        heads.append(torch.stack(outs))
    assert torch.allclose(layer.o_proj(torch.stack(heads, 1).flatten(1)), layer(x)[0], atol=1e-12)


@pytest.mark.parametrize("kind", [recall.Recurrent, recall.SelfReferentialMatrix])
def test_baselines_stream_and_refuse_padding(kind):
    layer, x, cache = kind(CONFIG).double(), noise(2, 7, 8), Cache(1)
    pieces = [layer(piece, cache=cache) for piece in x.split([1, 2, 4], 1)]
    assert torch.allclose(torch.cat(pieces, 1), layer(x), atol=1e-12)
    cache.reorder(torch.tensor([1, 0]))
    assert layer(x[:, :1], cache=cache).shape == (2, 1, 8)
    with pytest.raises(ValueError, match="attention_mask: expected no padding"):
        layer(x, valid=(torch.zeros(2), torch.full((2,), 7)))


def test_arms_have_matched_parameters():
    sizes = {
        arm: recall._decoder(0, mixer, vocab=2, hidden=32, layers=1, heads=2, tie=False).num_parameters()
        for arm, mixer in recall.TRACKING_ARMS.items()
    }
    assert sizes["dgd"] == sizes["gd"] and max(sizes.values()) < 1.15 * min(sizes.values()), sizes
    sizes = {arm: recall._recall_model(arm, 0, 32, 32).num_parameters() for arm in recall.REBINDING_ARMS}
    assert len({sizes[arm] for arm in sizes if arm.startswith(("static", "self"))}) == 1
    assert max(sizes.values()) < 1.15 * min(sizes.values()), sizes


@pytest.mark.parametrize("arm", recall.TRACKING_ARMS)
def test_parity_runs_and_repeats(arm):
    small = {"steps": 3, "batch": 8, "train_lengths": (2, 6), "test_lengths": (4, 9), "test_size": 16}
    first, again = (recall.run_parity(arm, 3, **small) for _ in range(2))
    assert first == again and set(first["accuracy"]) == {"4", "9"} and len(first["curve"]) == 9
    assert math.isfinite(first["loss"]) and all(0 <= value <= 1 for value in first["curve"])
    assert (first["lowest_eigenvalue"] is not None) == (arm in ("dgd", "gd", "dgd-retention"))


def test_parity_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    recall._decoder(0, recall.TRACKING_ARMS["dgd"], vocab=2, hidden=8, layers=1, heads=2, tie=False)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("arm", recall.REBINDING_ARMS)
def test_rebinding_runs(arm):
    result = recall.run_rebinding(arm, 3, steps=2, batch=8, test_size=20)
    assert all(0 <= result[name] <= 1 for name in ("accuracy", "kept", "rebound")) and math.isfinite(result["loss"])
    assert result["accuracy"] == pytest.approx((result["kept"] + result["rebound"]) / 2)


@pytest.mark.parametrize("task", recall.RECALL_TASKS)
def test_recall_tasks_fit_their_vocabulary(task):
    options = recall.RECALL_TASKS[task]
    assert int(options["draw"](200, generator=generator(0)).ids.max()) == options["vocab"] - 1
    result = recall.run_recall(task, "static-dgd", 0, steps=2, batch=4, test_size=8)
    assert ("language2" in result) == (task == "dictionaries") and 0 <= result["accuracy"] <= 1


@pytest.mark.parametrize("name", tasks.MAD_TASKS)
def test_probes_run(name):
    assert 0 <= recall.run_mad(name, "static-dgd", 0, steps=2, batch=4, length=12, test_size=8)["accuracy"] <= 1


@pytest.mark.parametrize("name", tasks.FORMAL_LANGUAGES)
def test_formal_runs(name):
    result = recall.run_formal(name, "gd", 0, steps=2, batch=4, test_size=6)
    assert all(0 <= result[f"{kind}{index}"] <= 1 for kind in ("bin", "symbols") for index in (0, 1))


def test_the_erase_term_decides_parity():
    # The smoke size: short strings, few steps, the direction only.
    options = {"steps": 80, "train_lengths": (2, 16), "test_lengths": (16, 48), "batch": 64, "test_size": 256}
    with_it, without = (recall.run_parity(arm, 0, **options)["accuracy"] for arm in ("dgd", "gd"))
    assert with_it["16"] > 0.95 and with_it["48"] > without["48"] + 0.2


def test_best_rate():
    def run(arm, seed, *, lr, scale):
        assert arm == "arm" and seed == recall.SWEEP_SEED
        return {"loss": None if lr > 1 else scale * abs(lr - 0.1)}

    rate, records = recall.best_rate(run, "arm", (0.01, 0.1, 10), scale=2)
    assert rate == 0.1 and [record["lr"] for record in records] == [0.01, 0.1, 10]
    with pytest.raises(ValueError, match=r"^rates: expected one that ends with a finite loss for arm"):
        recall.best_rate(run, "arm", (10,), scale=2)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("arm", lambda: recall.run_parity("delta", 0)),
        ("length", lambda: recall.run_parity("dgd", 0, test_lengths=(0,))),
        ("name", lambda: recall.run_formal("dyck", "dgd", 0)),
        ("arm", lambda: recall.run_rebinding("self", 0)),
        ("task", lambda: recall.run_recall("rebind", "self-dgd", 0)),
        ("name", lambda: recall.run_mad("copy", "self-dgd", 0)),
        ("rule", lambda: recall.key_eigenvalue("dgd", 0.5)),
        ("repeats", lambda: recall.key_eigenvalue("gd", 0.5, repeats=0)),
        ("rule", lambda: recall.titans_mixer(CONFIG, rule="delta")),
        (
            "layer",
            lambda: recall.token_eigenvalues(recall.titans_mixer(CONFIG, self_modifying=True), torch.zeros(1, 2, 8)),
        ),
    ],
)
def test_bad_input_names_the_argument(argument, call):
    with pytest.raises(ValueError, match=rf"^{argument}: expected"):
        call()
