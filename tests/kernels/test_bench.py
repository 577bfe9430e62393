"""The bench: which kernels, records, exit codes, memory."""

import json

import pytest
import torch

from papers10.core import bench
from papers10.kernels.common import KERNELS, CaseNotSupported, KernelSpec, load_all, register


def scaled(name="scaled", wrong=False, peers=None):
    def op(x, backend="auto"):
        return x * (3.0 if wrong and backend == "torch" else 2.0)

    return KernelSpec(
        name,
        {name: op},
        {name: lambda x: 2.0 * x},
        ("reference", "torch"),
        peers or {},
        [],
        lambda case, hardware: 16 * case["rows"] / hardware.bytes_per_s,
        make_inputs=lambda case, dtype, device, generator: {
            "x": torch.randn(case["rows"], generator=generator).to(device, dtype)
        },
        bench_cases=[{"rows": 100}, {"rows": 1000}],
        cost=lambda case: case["rows"],
        bytes_moved=lambda case: 8 * case["rows"],
    )


@pytest.fixture
def registry():
    before = dict(load_all())
    yield KERNELS
    KERNELS.clear()
    KERNELS.update(before)


def test_records_and_json(registry, capsys):
    def absent():
        raise ImportError("pip install something")

    def picky():
        def call(x):
            raise CaseNotSupported("only on Sundays")

        return call

    def broken():
        def call(x):
            raise RuntimeError("no compiler\nmore")

        return call

    register(scaled(peers={"absent": absent, "picky": picky, "broken": broken, "doubling": lambda: lambda x: x + x}))
    assert bench.main(["scaled"], device="cpu", json=True) == 0
    records = json.loads(capsys.readouterr().out)
    by_path = {record["path"]: record for record in records if record["case"].startswith("rows=1000 ")}
    assert (
        by_path["absent"]["note"] == "not installed (pip install something)" and by_path["absent"]["total_ms"] is None
    )
    assert by_path["picky"]["note"] == "skips this case (only on Sundays)"
    assert by_path["broken"]["note"] == "failed (RuntimeError: no compiler)"
    assert by_path["torch"]["agrees"] and by_path["doubling"]["agrees"] and by_path["torch"]["share_of_limit"] > 0
    assert {record["path"] for record in records} == {
        "reference",
        "torch",
        "absent",
        "picky",
        "broken",
        "doubling",
        "copy",
    }


def test_a_path_that_disagrees_is_exit_code_one(registry, capsys):
    register(scaled(wrong=True))
    assert bench.main(["scaled"], device="cpu", quick=True) == 1
    assert "disagrees with the reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"names": ["delta_updat"]}, "nearest: 'delta_update'"),
        ({"names": ["delta_update"], "device": "tpu"}, "device: expected cpu, cuda"),
        ({"names": ["delta_update"], "dtype": "int8"}, "dtype: expected one of float32"),
        ({"names": ["delta_update"], "case": "n=77"}, "case: expected a part of one of"),
    ],
)
def test_bad_requests_are_exit_code_two(options, message, capsys):
    assert bench.main(**options) == 2
    assert message in capsys.readouterr().err


def test_a_chapter_stands_for_the_kernels_that_it_imports():
    assert "delta_update" in [spec.name for spec in bench.find_specs(["deep-delta-learning"])]


def test_a_case_for_one_kind_of_device_stays_there():
    spec = scaled()._replace(
        bench_cases=[{"rows": 100}, {"rows": 10**6, "device": "cuda"}, {"rows": 7, "device": "cpu"}]
    )
    assert bench._cases_on(spec, "cpu") == [{"rows": 100}, {"rows": 7}]
    assert bench._cases_on(spec, "cuda") == [{"rows": 100}, {"rows": 10**6}]


def test_extra_memory_counts_what_is_not_returned():
    source = torch.ones(2**18)
    assert bench.extra_memory(lambda: source + 1) < 64
    kept = bench.extra_memory(lambda: (source + 1, (source + 2).sum()))
    assert source.nbytes <= kept <= source.nbytes + 64


def test_slope_of_a_square_law():
    records = [{"kernel": "k", "path": "p", "cost": cost, "total_ms": 0.1 * cost**2} for cost in (1, 4, 16)]
    assert bench.slopes(records)["k", "p"] == pytest.approx(2.0)
