"""The chapter's benchmarks: specifications load, paths agree with references, bytes as derived, the command runs."""

import json

import ddl_oracle as oracle
import pytest
import torch
from torch.testing import assert_close

from papers10.core import bench
from papers10.deep_delta_learning import benchmarks
from papers10.deep_delta_learning.expanded import ChannelCompressor, TokenCompressor
from papers10.deep_delta_learning.model import VARIANTS, variant
from papers10.kernels.common import KERNELS, CaseNotSupported, Hardware
from papers10.kernels.harness import TOLERANCES, evaluate, make_operands, relative_error

SPECS = {spec.name: spec for spec in benchmarks.bench_specs()}
CASES = [
    pytest.param(SPECS[name], case, id=f"{name} {' '.join(map(str, case.values()))}")
    for name in SPECS
    for case in SPECS[name].cases
]
HERE = ("reference", "torch", "numba")
# Half precision is checked where errors of single roundings average out, as at the sizes that are timed.
HALF = {"rows": 256, "batch": 4, "time": 64, "d": 64, "vocabulary": 64}


def test_specs_are_complete_and_not_in_the_registry():
    assert list(SPECS) == ["ddl_residual", "ddl_channel_compressor", "ddl_token_compressor", "ddl_step"]
    assert not set(SPECS) & set(KERNELS)
    for spec in SPECS.values():
        kinds = {case["device"] for case in spec.bench_cases}
        assert kinds == {"cpu", "cuda"} and spec.make_inputs and spec.peers
    found = [spec.name for spec in bench.find_specs(["deep-delta-learning"])]
    assert found == ["delta_update", *SPECS]


@pytest.mark.parametrize("spec, case", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_paths_and_peers_agree_with_the_reference(spec, case, dtype):
    op = next(iter(spec.ops))
    if dtype == "bfloat16":
        case = {key: HALF.get(key, value) for key, value in case.items()}
    operands = make_operands(spec, {**case, "dtype": dtype})
    wide = {
        name: value.detach().double().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in operands.items()
    }
    _, _, upstream = evaluate(spec.references[op], operands)
    outputs, gradients, _ = evaluate(spec.references[op], wide, upstream)
    expected = [*(value.detach() for value in outputs), *gradients]
    calls = {
        backend: lambda backend=backend, **o: spec.ops[op](**o, backend=backend)
        for backend in spec.backends
        if backend in HERE
    }
    for name, loader in spec.peers.items():
        peer = loader()
        if not getattr(peer, "is_another_function", False):
            calls[name] = peer
        else:
            assert torch.isfinite(peer(**operands)).all()
    compared = 0
    for name, call in calls.items():
        try:
            outputs, gradients, _ = evaluate(call, operands, upstream)
        except CaseNotSupported:
            continue
        for got, wanted in zip([*outputs, *gradients], expected, strict=True):
            if wanted is not None:
                assert relative_error(got, wanted) <= TOLERANCES[dtype], name
                compared += 1
    assert compared


@pytest.mark.parametrize("n", [1, 4])
def test_the_sublayers_reference_is_the_oracle(n):
    spec = SPECS["ddl_residual"]
    o = {
        name: value.detach()
        for name, value in make_operands(spec, {"rows": 3, "d": 6, "n": n, "dtype": "float64"}).items()
    }
    got = spec.references["residual"](**o)
    for row in range(3):
        state = o["x"][row] if n > 1 else o["x"][row][:, None]
        expected = oracle.residual(
            state,
            o["h"][row],
            o["context"][row],
            o["x_in"][row] if n > 1 else o["x"][row],
            gate_weight=o["gate_weight"][0],
            gate_bias=o["gate_bias"].item(),
            target_weight=o["target_weight"],
            target_bias=o["target_bias"],
            target_source="state",
            scale=4.0,
            eps=1e-5,
        )
        assert_close(got[row] if n > 1 else got[row][:, None], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind, module", [("channel", ChannelCompressor(5, 3)), ("token", TokenCompressor(5, 3))])
def test_the_compressors_reference_is_the_oracle(kind, module):
    x = torch.randn(1, 7, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, read = module.weight.detach().double(), module.read.detach().double()
    got = SPECS[f"ddl_{kind}_compressor"].references["compress"](x, weight, read)[0]
    expected = (
        torch.stack([oracle.compress_channels(token, weight, read, False) for token in x[0]])
        if kind == "channel"
        else oracle.compress_tokens(x[0], weight, read)
    )
    assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_a_step_of_any_rule_shares_the_weights_of_the_plain_model():
    spec = SPECS["ddl_step"]
    first, *others = [make_operands(spec, {**case, "dtype": "float32"}) for case in spec.cases]
    for other in others:
        assert torch.equal(first["ids"], other["ids"])
        shared = [name for name in first if name in other and not name.startswith(("residual", "rule"))]
        assert "blocks.0.mixer.q_proj.weight" in shared
        assert all(torch.equal(first[name], other[name]) for name in shared if isinstance(first[name], torch.Tensor))


@pytest.mark.parametrize("name", VARIANTS)
def test_traffic_is_that_of_the_formulas(name):
    small, wide, deep = (
        benchmarks.residual_traffic(variant(name, hidden_size=d, num_layers=layers, num_heads=2), element_size=2)
        for d, layers in ((64, 4), (128, 4), (64, 8))
    )
    double = benchmarks.residual_traffic(variant(name, hidden_size=64, num_layers=4, num_heads=2), element_size=4)
    for part in ("forward", "backward", "accumulate", "kept"):
        assert double[part] == 2 * small[part]
        assert small[part] <= wide[part] <= 2 * small[part] and small[part] <= deep[part] <= 2 * small[part]


def test_traffic_by_hand():
    d = 64
    config = variant("ddl", hidden_size=d, num_layers=3, num_heads=2)
    # Six sublayers: state in and out and direction, gate and target; three states, two directions and four gradients back.
    assert benchmarks.residual_traffic(config, element_size=4) == {
        "forward": 6 * 4 * 5 * d,
        "backward": 6 * 4 * 9 * d,
        "accumulate": 6 * 4 * 9 * d,
        "kept": 6 * 4 * (d + 6),
    }
    with pytest.raises(ValueError, match="element_size"):
        benchmarks.residual_traffic(config, element_size=0)


def test_limit_is_arithmetic_where_its_rate_is_known_and_bytes_elsewhere():
    spec = SPECS["ddl_step"]
    case = {**spec.cases[0], "dtype": "bfloat16", "direction": "forward"}
    slow_memory = Hardware("slow memory", 1e3, {"bfloat16": 1e15})
    slow_arithmetic = Hardware("slow arithmetic", 1e15, {"bfloat16": 1e3})
    config = variant("ddl", vocab_size=11, hidden_size=8, num_layers=1, num_heads=2)
    tokens = case["batch"] * case["time"]
    assert spec.limit(case, slow_memory) == pytest.approx(tokens * benchmarks.residual_traffic(config)["forward"] / 1e3)
    expected = tokens * benchmarks.flops_per_token(config, length=case["time"], training=False) / 1e3
    assert spec.limit(case, slow_arithmetic) == pytest.approx(expected)
    assert spec.limit({**case, "direction": "backward"}, slow_arithmetic) == pytest.approx(2 * expected)


def test_the_command_times_the_chapter(monkeypatch, capsys):
    tiny = [spec._replace(bench_cases=spec.cases[-1:]) for spec in benchmarks.bench_specs()]
    monkeypatch.setattr(benchmarks, "bench_specs", lambda: tiny)
    # These labels leave out the kernel's own cases, which take seconds.
    for case in ("rows=7", "batch=2"):
        assert bench.main(["deep-delta-learning"], device="cpu", case=case, quick=True, json=True) == 0
        records = json.loads(capsys.readouterr().out)
        assert {record["kernel"] for record in records} == (
            {"ddl_residual"} if case == "rows=7" else {"ddl_channel_compressor", "ddl_token_compressor", "ddl_step"}
        )
        timed = [record for record in records if record["kind"] == "backend" and record["total_ms"]]
        assert timed and all(record["agrees"] and record["share_of_limit"] > 0 for record in timed)
    assert bench.main(["deep-delta-learning"], device="cpu", case="batch=2", quick=True) == 0
    assert "sum of channels" in capsys.readouterr().out
