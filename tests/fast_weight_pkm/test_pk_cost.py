"""What the chapter costs: the model at the paper's sizes, its refusals, specifications against their references, the dense form."""

import pytest
import torch
from torch.testing import assert_close

from papers10.core import bench
from papers10.fast_weight_pkm import benchmarks
from papers10.fast_weight_pkm.layer import FwPKM
from papers10.fast_weight_pkm.memory import FwPKMState, fwpkm
from papers10.fast_weight_pkm.model import FwPKMConfig, variant
from papers10.kernels.common import KERNELS, CaseNotSupported, Hardware
from papers10.kernels.harness import TOLERANCES, check_parity, evaluate, make_operands, parity_cases

SPECS = {spec.name: spec for spec in benchmarks.bench_specs()}
PARITY = [
    pytest.param(SPECS[name], comparison, dtype, id=f"{comparison.label} {dtype}")
    for name in SPECS
    for comparison in parity_cases(SPECS[name], ("torch",))
    for dtype in ("float64", "float32", "bfloat16")
]


# -- the model


def test_the_sizes_of_the_paper():
    config = variant("gdn+fa", "pkm@6+fwpkm@2,10")
    costs = benchmarks.cost_model(config, length=2**17, batch=8)
    fast = costs["fwpkm"]
    assert fast["flops"]["write"] == 2 * 8 * 512
    assert fast["flops"]["read"] == 2 * 8 * 512 * 513 // 512
    assert fast["flops"]["keys"] == 2 * 512 * 512
    assert fast["bytes"]["read"] == 8 * 512 * 4 + 512 * 512 * 4 // 512
    # At the size of a chunk of the paper, rows are at least eight times less than tables.
    assert fast["bytes"]["dense"] >= 8 * fast["bytes"]["written"]
    assert costs["attention"]["flops"]["scores"] == 4 * 768 * 2**17
    assert costs["window"]["flops"]["scores"] == 4 * 768 * 512
    assert costs["attention"]["state"] == 2**17 * 2 * 4 * 64 * 4


def test_only_attention_grows_with_the_length():
    short, long = (benchmarks.cost_model(variant("gdn+fa", "fwpkm@2"), length=length) for length in (4096, 131072))
    for name in ("fwpkm", "fwmlp", "pkm", "gdn", "window", "mlp"):
        assert short[name] == long[name]
    assert long["attention"]["state"] == 32 * short["attention"]["state"]
    assert long["model"]["flops"]["total"] > short["model"]["flops"]["total"]


def test_one_token_alone_reads_every_key():
    config = FwPKMConfig(fwpkm_layers=(0,))
    chunk, alone = (benchmarks.cost_model(config, together=m)["fwpkm"] for m in (None, 1))
    assert alone["bytes"]["read"] - chunk["bytes"]["read"] == 4 * 512 * 512 * 511 // 512
    assert alone["flops"] == chunk["flops"]


@pytest.mark.parametrize("heads, shared", [(1, True), (3, True), (3, False)])
def test_state_and_parameters_are_those_of_a_layer(heads, shared):
    config = FwPKMConfig(
        hidden_size=12, fwpkm_layers=(0,), fwpkm_k_dim=6, fwpkm_v_dim=5, fwpkm_heads=heads, fwpkm_topk=2,
        fwpkm_n_subkeys=4, fwpkm_update_chunk_size=6, fwpkm_share_values=shared, fwpkm_target_value_lookahead=2,
    )  # fmt: skip
    layer = FwPKM(
        12, key_dim=6, value_dim=5, heads=heads, topk=2, n_subkeys=4, chunk_size=6, share_values=shared, lookahead=2
    )
    cost = benchmarks.cost_model(config)["fwpkm"]
    state = layer(torch.randn(1, 6 + 5, 12), use_cache=True)[1]
    kept = sum(part.nbytes for part in state.state_dict().values() if isinstance(part, torch.Tensor))
    assert cost["state"] == kept
    assert cost["parameters"] == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("name", ["length", "batch", "together", "element_size"])
def test_a_size_below_one_is_refused(name):
    with pytest.raises(ValueError, match=name):
        benchmarks.cost_model(FwPKMConfig(), **{name: 0})


# -- the dense form


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("time, chunk", [(0, 4), (3, 4), (4, 4), (13, 4), (5, 1)])
def test_the_dense_form_is_the_memory(own, time, chunk):
    generator = torch.Generator().manual_seed(time)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    lead = [2] * own
    state = FwPKMState(draw(*lead, 1, 2, 5, 3), draw(*lead, 25, 4))
    q, v, g = draw(2, time, 1, 6), draw(2, time, 4), draw(2, time).sigmoid()
    wanted = fwpkm(q, v, g, state, chunk_size=chunk, topk=2, value_step="paper")[0]
    assert_close(benchmarks.dense_fwpkm(q, v, g, state, chunk_size=chunk, topk=2), wanted, atol=1e-12, rtol=0)


def test_the_dense_form_refuses_an_open_chunk():
    draw = lambda *shape: torch.randn(shape)
    q, v, g = draw(1, 3, 1, 4), draw(1, 3, 2), draw(1, 3).sigmoid()
    state = fwpkm(q, v, g, FwPKMState(draw(1, 2, 4, 2), draw(16, 2)), chunk_size=4, topk=2)[1]
    with pytest.raises(ValueError, match="state"):
        benchmarks.dense_fwpkm(q, v, g, state, chunk_size=4, topk=2)


# -- the specifications


def test_specs_are_complete_and_not_in_the_registry():
    assert list(SPECS) == ["pkm_fast_memory", "pkm_slow_read", "pkm_layer_over_length"]
    assert not set(SPECS) & set(KERNELS)
    hardware = Hardware("card", 1e12, {"float32": 1e13, "bfloat16": 1e14})
    for spec in SPECS.values():
        assert {case["device"] for case in spec.bench_cases} == {"cpu", "cuda"}
        for case in spec.bench_cases:
            ways = [{**case, "dtype": "float32", "direction": way} for way in ("forward", "backward")]
            assert spec.limit(ways[0], hardware) > 0 and spec.limit(ways[1], hardware) >= 0
    found = [spec.name for spec in bench.find_specs(["fast-weight-pkm"])]
    assert "product_key" in found and found[-3:] == list(SPECS)


@pytest.mark.parametrize("spec, comparison, dtype", PARITY)
def test_paths_agree_with_the_reference(spec, comparison, dtype):
    error = check_parity(spec, comparison._replace(case={**comparison.case, "dtype": dtype}))
    assert error <= TOLERANCES[dtype]


def test_a_stream_goes_on_with_the_memory_that_it_wrote():
    spec = SPECS["pkm_fast_memory"]
    operands = make_operands(spec, {**spec.cases[0], "dtype": "float64"})
    before = operands["state"].values.clone()
    first, again = (spec.ops["memory"](**operands, backend="torch") for _ in range(2))
    assert torch.equal(operands["state"].values, before), "the given state is not written"
    assert not torch.allclose(first, again)


@pytest.mark.parametrize("name", SPECS)
def test_peers_that_are_there_take_the_same_inputs(name):
    spec = SPECS[name]
    operands = make_operands(spec, {**spec.cases[0], "dtype": "float32"})
    expected, _, upstream = evaluate(next(iter(spec.references.values())), operands)
    for load in spec.peers.values():
        try:
            peer = load()
        except ImportError as problem:
            assert "pip install" in str(problem)
            continue
        assert peer.is_another_function
        results, _, _ = evaluate(peer, operands, upstream)
        assert [value.shape for value in results] == [value.shape for value in expected]


def test_full_attention_is_not_run_on_a_text_that_takes_minutes():
    peer = SPECS["pkm_layer_over_length"].peers["full attention"]()
    with pytest.raises(CaseNotSupported):
        peer(torch.zeros(1, 2**15, dtype=torch.long), (torch.zeros(1, 8),), ())
