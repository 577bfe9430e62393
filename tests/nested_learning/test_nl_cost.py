"""What the chapter costs: formulas against counted operations and real states, specifications against their references, the command."""

import json

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from papers10.core import bench
from papers10.kernels.common import KERNELS, CaseNotSupported, Hardware
from papers10.kernels.gated_delta import self_modifying_scan
from papers10.kernels.harness import TOLERANCES, check_parity, evaluate, make_operands, parity_cases, relative_error
from papers10.lm.cache import Cache
from papers10.lm.layers import GatedDeltaNet, LinearMemory
from papers10.nested_learning import benchmarks
from papers10.nested_learning.continuum import ContinuumMemory
from papers10.nested_learning.hope import variant
from papers10.nested_learning.m3 import M3
from papers10.nested_learning.titans import SelfModifyingTitans

SPECS = {spec.name: spec for spec in benchmarks.bench_specs()}
PARITY = [
    pytest.param(SPECS[name], comparison, dtype, id=f"{comparison.label} {dtype}")
    for name in SPECS
    for comparison in parity_cases(SPECS[name], ("torch",))
    for dtype in ("float64", "float32", "bfloat16")
    if comparison.case.get("model") != "titans"
]


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def per_token(layer, d: int, length: int) -> float:
    one, two = (counted(lambda batch=batch: layer(torch.randn(batch, length, d))) for batch in (1, 2))
    return (two - one) / length


# -- the specifications


def test_specs_are_complete_and_not_in_the_registry():
    assert list(SPECS) == ["nl_self_modifying", "nl_optimizer_step", "nl_train_step"]
    assert not set(SPECS) & set(KERNELS)
    for spec in SPECS.values():
        assert {case["device"] for case in spec.bench_cases} == {"cpu", "cuda"}
        assert spec.make_inputs and spec.peers and spec.cases
        for case in spec.bench_cases:
            hardware = Hardware("card", 1e12, {"float32": 1e13, "bfloat16": 1e14, "tfloat32": 5e13})
            seconds = [
                spec.limit({**case, "dtype": "float32", "direction": way}, hardware) for way in ("forward", "backward")
            ]
            assert seconds[0] > 0 and seconds[1] >= 0
    found = [spec.name for spec in bench.find_specs(["nested-learning"])]
    assert "gated_delta" in found and found[-3:] == list(SPECS)


@pytest.mark.parametrize("spec, comparison, dtype", PARITY)
def test_paths_agree_with_the_reference(spec, comparison, dtype):
    error = check_parity(spec, comparison._replace(case={**comparison.case, "dtype": dtype}))
    assert error <= TOLERANCES[dtype]


@pytest.mark.parametrize("name", SPECS)
def test_peers_take_the_same_inputs_and_are_other_functions(name):
    spec = SPECS[name]
    for case in spec.cases:
        operands = make_operands(spec, {**case, "dtype": "float64"})
        expected, _, upstream = evaluate(next(iter(spec.references.values())), operands)
        for peer in (load() for load in spec.peers.values()):
            assert peer.is_another_function
            results, _, _ = evaluate(peer, operands, upstream)
            assert [value.shape for value in results] == [value.shape for value in expected]
            assert all(torch.isfinite(value).all() for value in results)


# -- the scan


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_fixed_projections_are_the_scan_with_one_adaptive_memory(chunk):
    spec = SPECS["nl_self_modifying"]
    case = {"B": 2, "T": 11, "H": 2, "K": 6, "C": chunk, "eta_bias": 0.0, "dtype": "float64"}
    operands = {
        name: value.detach() if isinstance(value, torch.Tensor) else value
        for name, value in make_operands(spec, case).items()
    }
    out, state = spec.peers["fixed projections"]()(**operands)
    projections = {name: operands[f"{name}_memory"] for name in ("k", "v", "eta", "alpha")}
    twin, after = self_modifying_scan(
        operands["z"],
        operands["q"],
        projections,
        operands["memory"],
        chunk_size=chunk,
        adaptive=("memory",),
        self_values=False,
        backend="reference",
    )
    assert_close(out, twin, atol=1e-11, rtol=0)
    assert_close(state, after.running, atol=1e-11, rtol=0)


@pytest.mark.parametrize("chunk", [1, 8, 32])
@pytest.mark.parametrize("width, heads", [(8, 3), (12, 2)])
def test_operations_of_a_self_modifying_layer_are_those_counted(width, heads, chunk):
    d, rows = width * heads, 3 * width + 2
    found = per_token(SelfModifyingTitans(d, heads, chunk_size=chunk, check_finite=False), d, 32)
    parts = benchmarks.memory_flops(width, chunk_size=chunk)
    # The counter sees no triangular system and no single outer product.
    unseen = parts["solve"] + (2 * width * rows if chunk == 1 else 0)
    # Three matrices and four taps outside of the memories.
    assert found == heads * (parts["total"] - unseen) + 6 * d * d + 8 * d


@pytest.mark.parametrize("chunk", [1, 8])
def test_operations_of_titans_memory_are_those_counted(chunk):
    d, heads = 24, 3
    config = variant("transformer", hidden_size=d, num_heads=heads)
    expected = heads * benchmarks.memory_flops(8, chunk_size=chunk, rule="titans")["total"]
    assert per_token(LinearMemory(config, chunk_size=chunk), d, 16) == expected + 8 * d * d + 8 * d + 6 * d * heads


def test_operations_by_hand():
    # K = 4, P = 10, R = 14, C = 2.
    assert benchmarks.memory_flops(4, chunk_size=2) == {
        "signals": 80,
        "targets": 224,
        "update": 224 + 32,
        "chunk": 32 + 16,
        "solve": 28,
        "total": 636,
    }
    assert benchmarks.memory_flops(4, 3, chunk_size=1, rule="delta")["total"] == 72


@pytest.mark.parametrize("length", [1, 9, 40])
def test_state_is_what_a_cache_holds(length):
    d, heads, width = 16, 2, 8
    config = variant("transformer", hidden_size=d, num_heads=heads)
    layers = {
        "self-modifying": SelfModifyingTitans(d, heads),
        "titans": LinearMemory(config),
        "delta": GatedDeltaNet(config),
    }
    for rule, layer in layers.items():
        cache = Cache(1)
        with torch.no_grad():
            layer.eval()(torch.randn(1, length, d), cache=cache)
        held = [
            value.numel()
            for name, value in cache.layers[0].items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and "conv" not in name
        ]
        assert sum(held) == heads * benchmarks.memory_state(width, rule=rule, length=length), rule


# -- continuum memory


@pytest.mark.parametrize(
    "sizes, mult, error", [((4, 16), 1.5, "local"), ((2, 4, 8), 2, "local"), ((4, 16), 3, "schedule")]
)
def test_operations_of_a_continuum_memory_are_those_counted(sizes, mult, error):
    memory = ContinuumMemory(16, sizes, hidden_mult=mult, error=error, check_finite=False)
    expected = benchmarks.continuum_flops(16, mult, levels=len(sizes), writes=error == "local")
    assert per_token(memory, 16, 16) == expected


# -- optimizers


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("rule", benchmarks.OPTIMIZERS)
def test_cost_of_a_step_is_that_counted(rule, every):
    shapes = [(6, 6), (12, 5), (4, 9)]
    build = {"m3": lambda w: M3(w, slow_every=every), "muon": torch.optim.Muon, "adamw": torch.optim.AdamW}[rule]
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = build(weights)
    optimizer.step()
    cost = benchmarks.optimizer_cost(rule, shapes, slow_every=every)
    found = counted(lambda: [optimizer.step() for _ in range(every)])
    assert found == pytest.approx(every * cost["operations"])
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in held if value.dim() == 2) == cost["state"]


@pytest.mark.parametrize("every", [100, 1])
def test_the_timed_optimizer_goes_on_from_step_to_step(every):
    spec = SPECS["nl_optimizer_step"]
    operands = make_operands(spec, {"width": 6, "layers": 1, "slow_every": every, "dtype": "float64"})
    before = {name: value.detach().clone() for name, value in operands.items() if isinstance(value, torch.Tensor)}
    first = [value.clone() for value in spec.ops["step"](**operands)]
    second = [value.clone() for value in spec.ops["step"](**operands)]
    assert all(not torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(operands[name], value) for name, value in before.items()), "inputs stay as they are"
    for value, expected in zip(first, spec.references["step"](**operands)):
        assert relative_error(value, expected) <= TOLERANCES["float64"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_without_its_slow_memory_is_found_out(monkeypatch, dtype):
    spec = SPECS["nl_optimizer_step"]
    options = {"lr": benchmarks._RATE, "rms_scale": benchmarks._RMS, "alpha": 0.0}
    monkeypatch.setattr(benchmarks, "_build_m3", lambda weights, *rest: M3(weights, **options))
    for comparison in parity_cases(spec, ("torch",)):
        with pytest.raises(AssertionError, match="exceeds"):
            check_parity(spec, comparison._replace(case={**comparison.case, "dtype": dtype}))


# -- whole models


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("name", benchmarks.STEP_MODELS)
def test_models_have_matched_parameters(name, heads):
    sizes = (64, 2, heads, 40)
    count = {
        kind: sum(weight.numel() for weight in benchmarks._model(kind, "auto", sizes).parameters())
        for kind in (name, "transformer")
    }
    assert count[name] == pytest.approx(count["transformer"], rel=0.005)


@pytest.mark.parametrize("name", ["hope", "self-modifying-titans", "titans"])
def test_operations_of_a_model_are_those_counted(name):
    sizes, length = (32, 2, 2, 24), 64
    model = benchmarks._model(name, "auto", sizes)
    one, two = (counted(lambda batch=batch: model(torch.zeros(batch, length, dtype=torch.long))) for batch in (1, 2))
    total = benchmarks.model_flops(name, hidden_size=32, num_layers=2, num_heads=2, vocab_size=24, length=length)
    unseen = 0 if name == "titans" else 4 * benchmarks.memory_flops(16)["solve"]
    assert (two - one) / length == total - unseen


def test_a_model_without_a_kernel_has_one_path():
    spec = SPECS["nl_train_step"]
    case = next(case for case in spec.cases if case["model"] == "titans")
    operands = make_operands(spec, case)
    with pytest.raises(CaseNotSupported, match="momentum"):
        spec.ops["step"](**operands, backend="torch")
    assert torch.isfinite(spec.ops["step"](**operands, backend="reference"))


# -- bad input


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: benchmarks.memory_flops(0), "width"),
        (lambda: benchmarks.memory_flops(4, chunk_size=0), "chunk_size"),
        (lambda: benchmarks.memory_flops(4, rule="delt"), "rule"),
        (lambda: benchmarks.memory_state(4, length=-1), "length"),
        (lambda: benchmarks.continuum_flops(4, 0), "hidden_mult"),
        (lambda: benchmarks.continuum_flops(4, levels=0), "levels"),
        (lambda: benchmarks.optimizer_cost("sgd", [(2, 2)]), "rule"),
        (lambda: benchmarks.optimizer_cost("m3", [(2, 2)], slow_every=0), "slow_every"),
        (
            lambda: benchmarks.model_flops("gpt", hidden_size=8, num_layers=1, num_heads=2, vocab_size=9, length=4),
            "name",
        ),
    ],
)
def test_bad_values_are_named(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# -- the command


def test_the_command_times_the_chapter(monkeypatch, capsys):
    tiny = [spec._replace(bench_cases=spec.cases[:1]) for spec in benchmarks.bench_specs()]
    monkeypatch.setattr(benchmarks, "bench_specs", lambda: tiny)
    # These labels leave out the kernels' own cases, which take seconds.
    for label, name in (
        ("T=21", "nl_self_modifying"),
        ("slow_every", "nl_optimizer_step"),
        ("model=", "nl_train_step"),
    ):
        assert bench.main(["nested-learning"], device="cpu", case=label, quick=True, json=True) == 0
        records = json.loads(capsys.readouterr().out)
        assert {record["kernel"] for record in records} == {name}
        timed = [record for record in records if record["kind"] == "backend" and record["total_ms"]]
        assert len(timed) == 2 and all(record["agrees"] and record["share_of_limit"] > 0 for record in timed)
    assert bench.main(["nested-learning"], device="cpu", case="slow_every", quick=True) == 0
    assert "AdamW" in capsys.readouterr().out
