"""Costs of MorphAny3D: operations and bytes by hand, the bench's paths against their plain forms, the command, seconds of a morph."""

import math

import pytest
import torch

from papers10.core import bench
from papers10.flow.guidance import Guidance
from papers10.kernels.common import KERNELS, CaseNotSupported, Hardware
from papers10.kernels.harness import check_parity, make_operands, parity_cases, relative_error
from papers10.morphany3d import benchmarks
from papers10.morphany3d.benchmarks import bench_specs, block_flops, cache_bytes, frame_flops, morph_seconds

SPECS = {spec.name: spec for spec in bench_specs()}
COMPARISONS = [comparison for spec in SPECS.values() for comparison in parity_cases(spec, ("reference", "torch"))]
PEERS = [(name, peer) for name, spec in SPECS.items() for peer in spec.peers]


def test_a_block_of_trellis_by_hand():
    # 4096 tokens, width 1024, 1374 tokens of the condition; GFLOP of the table in the specification.
    parts = {name: round(value / 1e9, 1) for name, value in block_flops(4096).items()}
    assert parts == {"self projections": 25.8, "self attention": 68.7, "self output": 8.6, "cross queries": 8.6, "condition keys": 5.8, "cross attention": 23.1, "cross output": 8.6, "mlp": 68.7}
    sums = {form: sum(block_flops(4096, form=form).values()) for form in benchmarks.FORMS}
    assert [round(value / 1e9) for value in sums.values()] == [218, 367, 304] and round(1 - sums["shared"] / sums["official"], 2) == 0.17


def test_a_frame_of_trellis_by_hand():
    plain, official, shared = (frame_flops(4096, form=form) for form in benchmarks.FORMS)
    assert plain.guided == 19 and plain.call == 24 * plain.block and plain.frame == 44 * plain.call
    assert official.frame == 25 * official.call + 19 * plain.call and shared.frame == 25 * shared.call + 19 * plain.call
    assert [round(cost.frame / 1e12) for cost in (plain, official)] == [230, 319] and abs(shared.frame / 1e12 - 281.6) < 0.1
    assert frame_flops(4096, guidance=Guidance(1.0)).guided == 0


def test_bytes_by_hand():
    assert cache_bytes(4096) == 25 * 24 * 4096 * 1024 * 2 * 2 == 10_066_329_600 and round(cache_bytes(5000) / 1e9, 1) == 12.3
    assert cache_bytes(4096, what="inputs") * 2 == cache_bytes(4096) == 2 * cache_bytes(4096, number_bytes=1)


def test_forms_meet_where_nothing_is_shared():
    one = block_flops(100, form="official", conditions=1, previous=False)
    assert one == block_flops(100)
    three = block_flops(100, form="shared", conditions=3)
    assert three["cross attention"] == 3 * one["cross attention"] and three["cross queries"] == one["cross queries"] and three["condition keys"] == 0


def test_operations_are_those_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    spec = SPECS["ma_shared_attention"]
    case = {"tokens": 48, "width": 32, "heads": 2, "context": 20}
    operands = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in make_operands(spec, case).items()}
    counted = {}
    for form, run in (("official", spec.references["attentions"]), ("shared", lambda **values: spec.ops["attentions"](**values, backend="torch"))):
        run(**operands)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run(**operands)
        parts = block_flops(48, width=32, context=20, form=form)
        counted[form] = counter.get_total_flops(), sum(value for name, value in parts.items() if name != "mlp")
    assert all(found == expected for found, expected in counted.values()), counted


def test_specs_are_complete_and_not_in_the_registry():
    assert list(SPECS) == ["ma_shared_attention", "ma_kept_keys", "ma_turn_costs"] and not set(SPECS) & set(KERNELS)
    for spec in SPECS.values():
        assert set(spec.ops) == set(spec.references) and spec.cost and spec.bench_cases and spec.make_inputs


@pytest.mark.parametrize("comparison", COMPARISONS, ids=[comparison.label for comparison in COMPARISONS])
def test_paths_agree_with_the_reference(comparison):
    check_parity(SPECS[comparison.label.split(".")[0]], comparison)


@pytest.mark.parametrize(("name", "peer"), PEERS)
def test_plain_forms_compute_the_same(name, peer):
    spec = SPECS[name]
    for case in spec.cases:
        operands = {key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in make_operands(spec, case).items()}
        outputs = [found if isinstance(found, tuple) else (found,) for found in (spec.peers[peer]()(**operands), next(iter(spec.references.values()))(**operands))]
        for got, expected in zip(*outputs, strict=True):
            assert relative_error(got, expected) < 1e-12


def test_a_table_that_is_too_large_is_refused():
    rows = torch.zeros(8000, 4, dtype=torch.int32)
    with pytest.raises(CaseNotSupported, match="GB a turn"):
        SPECS["ma_turn_costs"].peers["all pairs, one table"]()(rows, rows, 64)


def test_keys_of_conditions_follow_their_condition():
    spec = SPECS["ma_shared_attention"]
    operands = make_operands(spec, spec.cases[0])
    first = spec.ops["attentions"](**operands, backend="torch")[1]
    other = {**operands, "target": operands["target"].detach() + 1}
    assert not torch.allclose(first, spec.ops["attentions"](**other, backend="torch")[1])
    assert torch.equal(first, spec.ops["attentions"](**operands, backend="torch")[1])


def test_limits_by_hand():
    machine = Hardware("test", 1e9, {"float32": 1e12})
    kept = {"places": 2, "tokens": 10, "width": 8, "heads": 2, "dtype": "float32"}
    # Keys and values, written twice and read once, each a read and a write of 4 bytes.
    assert SPECS["ma_kept_keys"].limit({**kept, "direction": "forward"}, machine) == pytest.approx(2 * 3 * 2 * 2 * 10 * 8 * 4 / 1e9)
    assert SPECS["ma_kept_keys"].limit({**kept, "direction": "backward"}, machine) == 0
    block = {"tokens": 4096, "width": 1024, "heads": 16, "context": 1374, "dtype": "float32", "direction": "forward"}
    assert SPECS["ma_shared_attention"].limit(block, machine) == pytest.approx((304 - 68.7) / 1e3, rel=2e-3)


def test_bench_of_the_chapter(capsys):
    assert {"ma_shared_attention", "ma_kept_keys", "ma_turn_costs", "attention"} <= {spec.name for spec in bench.find_specs(["morphany3d"])}
    spec = SPECS["ma_turn_costs"]
    records = bench.measure_case(spec, {"resolution": 8}, device="cpu", dtype="float32", limits=Hardware("test", 1e10), repeats=1, warm_up=0)
    assert [record["path"] for record in records] == ["reference", "torch", "all pairs, one table", "copy"] and all(record["agrees"] for record in records if record["kind"] == "backend")
    bench.print_table(records)
    assert "ma_turn_costs" in capsys.readouterr().out


@pytest.mark.parametrize(("call", "word"), [
    (lambda: block_flops(0), "tokens"), (lambda: block_flops(10, form="shard"), "'shared'"), (lambda: cache_bytes(1, what="input"), "'inputs'"), (lambda: morph_seconds(clock="cpu"), "clock"),
    (lambda: morph_seconds(frames=2), "frames"), (lambda: morph_seconds(pairs=0), "pairs"),
])
def test_refuses(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_seconds_of_a_morph():
    found = morph_seconds("paper", frames=3, steps=1)
    assert 0 < found.frame <= found.whole and {"ss", "slat", "orientation"} <= set(found.parts) and found.kept > 0
    assert math.isfinite(found.whole) and morph_seconds("mca", frames=3, steps=1, clock="processor").kept == 0
