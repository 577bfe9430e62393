"""Costs of NeoVerse: the bench's paths and plain forms against their references, limits by hand, the command, seconds of a reconstruction."""

import json
import math

import pytest
import torch

from papers10.core import bench
from papers10.kernels.common import KERNELS, CaseNotSupported, Hardware, installed
from papers10.kernels.harness import check_parity, evaluate, make_operands, parity_cases, relative_error
from papers10.neoverse import benchmarks
from papers10.neoverse.benchmarks import bench_specs, reconstruction_seconds

SPECS = {spec.name: spec for spec in bench_specs()}
# Numba's and Triton's paths are compared in the tests of the kernels, and numba's on the page.
COMPARISONS = [comparison for spec in SPECS.values() for comparison in parity_cases(spec, ("reference", "torch"))]
PEERS = [(name, peer) for name, spec in SPECS.items() for peer in spec.peers if peer != "gsplat"]


def test_specs_are_complete_and_not_in_the_registry():
    assert list(SPECS) == ["nv_query_render", "nv_average_filter", "nv_voxel_merge", "nv_motion_tracking"]
    assert not set(SPECS) & set(KERNELS)
    for spec in SPECS.values():
        assert set(spec.ops) == set(spec.references) and spec.cost and spec.bench_cases and spec.make_inputs


@pytest.mark.parametrize("comparison", COMPARISONS, ids=[comparison.label for comparison in COMPARISONS])
def test_paths_agree_with_the_reference(comparison):
    check_parity(SPECS[comparison.label.split(".")[0]], comparison)


@pytest.mark.parametrize(("name", "peer"), PEERS)
def test_plain_forms_compute_the_same(name, peer):
    spec = SPECS[name]
    operands = make_operands(spec, {**spec.cases[0], "dtype": "float64"})
    outputs, gradients, upstream = evaluate(next(iter(spec.references.values())), operands)
    got = evaluate(spec.peers[peer](), operands, upstream)
    pairs = [(a, b) for a, b in zip([*got[0], *got[1]], [*outputs, *gradients], strict=True) if b is not None]
    # The same sums in another order.
    assert pairs and all(relative_error(a, b) < 1e-12 for a, b in pairs)


def test_loop_over_pairs_of_frames_gives_the_same_bits():
    spec = SPECS["nv_motion_tracking"]
    operands = make_operands(spec, {"frames": 5, "height": 12, "width": 16})
    expected = spec.references["track"](**operands)
    found = spec.peers["loop over pairs of frames"]()(**operands)
    assert torch.equal(found, expected) and len(expected.unique()) > 50
    assert torch.equal(spec.ops["track"](**operands, backend="torch"), expected)


def test_tiles_are_the_dense_picture():
    spec = SPECS["nv_query_render"]
    operands = make_operands(spec, {"side": 18, "shake": 0, "dtype": "float64"})
    with torch.no_grad():
        for tiles, dense in zip(
            spec.references["query"](**operands), spec.ops["query"](**operands, backend="reference"), strict=True
        ):
            torch.testing.assert_close(tiles, dense, rtol=0, atol=1e-12)
            assert tiles.shape[:2] == (18, 18) and bool(tiles.any())


def test_every_field_of_a_moving_scene_has_a_gradient():
    operands = make_operands(SPECS["nv_query_render"], {"side": 5, "shake": 1, "dtype": "float64"})
    _, gradients, _ = evaluate(SPECS["nv_query_render"].ops["query"], operands, backend="torch")
    assert len(gradients) == 10 and all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_large_inputs_have_no_opacity_near_the_threshold():
    operands = make_operands(SPECS["nv_query_render"], {"side": 24, "dtype": "float64"})
    side = operands.pop("side")
    key = operands.pop("key")
    with torch.no_grad():
        moment = benchmarks._scene(operands, key).at(0.5, backend="reference")
        flat = benchmarks.project_gaussians(moment, benchmarks._camera(side, moment.means))
    offset = flat.means2d[0] - 0.5
    assert float((offset - offset.round()).abs().max()) < 1e-9
    grid = torch.cartesian_prod(torch.arange(-4.0, 5), torch.arange(-4.0, 5)).double()
    a, b, c = flat.conics[0].T
    shape = a[:, None] * grid[:, 0] ** 2 + 2 * b[:, None] * grid[:, 0] * grid[:, 1] + c[:, None] * grid[:, 1] ** 2
    weights = moment.opacities[:, None] * torch.exp(-shape / 2)
    assert float((weights * 255).log().abs().min()) > 0.25
    assert bool(((weights > 1 / 255).sum(1) == benchmarks._REACHED).all())


def test_forms_that_would_not_fit_are_refused():
    query, merge = SPECS["nv_query_render"], SPECS["nv_voxel_merge"]
    with pytest.raises(CaseNotSupported, match="GB"):
        query.ops["query"](**make_operands(query, {"side": 64}), backend="reference")
    with pytest.raises(CaseNotSupported, match="cells"):
        merge.peers["loop over cells"]()(**make_operands(merge, {"rows": 20_000}))
    if not (installed("gsplat") and torch.cuda.is_available()):
        with pytest.raises(ImportError, match="gsplat"):
            query.peers["gsplat"]()


def test_limits_follow_the_formulas():
    card = Hardware("card", 1e9, {"float32": 1e9}, special_per_s=1e6)
    query, merge, track, average = (
        SPECS[name] for name in ("nv_query_render", "nv_voxel_merge", "nv_motion_tracking", "nv_average_filter")
    )
    assert query.limit({"side": 10}, card) == pytest.approx(21 * 200 / 1e6)
    assert query.limit({"side": 10, "direction": "backward"}, card) == pytest.approx(2 * 21 * 200 / 1e6)
    assert query.limit({"side": 10}, Hardware("processor", 1e9)) == pytest.approx(
        (4 * (27 * 200 + 4 * 100) + 8 * 200) / 1e9
    )
    assert average.limit({"frames": 2, "height": 3, "width": 5, "kernel": 9}, card) == pytest.approx(8 * 30 / 1e9)
    assert merge.limit({"rows": 8}, card) == pytest.approx(4 * (8 * 15 + 2 * 14) / 1e9)
    case = {"frames": 21, "height": 336, "width": 560}
    assert track.cost(case) == 82_978_560, "the specification says 83 million pairs"
    assert track.limit(case, card) == pytest.approx(30 * 82_978_560 / 1e9)
    assert track.limit({**case, "direction": "backward"}, card) == 0


def test_the_command_times_the_chapter(monkeypatch, capsys):
    tiny = [spec._replace(bench_cases=spec.cases[:1]) for spec in bench_specs()]
    monkeypatch.setattr(benchmarks, "bench_specs", lambda: tiny)
    assert {"gaussian_transition", "motion_peak", *SPECS} <= {spec.name for spec in bench.find_specs(["neoverse"])}
    # Labels that leave out the kernels that the chapter imports.
    for case, name in (("kernel=3", "nv_average_filter"), ("rows=60", "nv_voxel_merge")):
        assert bench.main(["neoverse"], device="cpu", case=case, quick=True, json=True) == 0
        records = json.loads(capsys.readouterr().out)
        assert {record["kernel"] for record in records} == {name}
        timed = [record for record in records if record["kind"] != "limit" and record["total_ms"]]
        assert len(timed) >= 2 and all(record["agrees"] and math.isfinite(record["total_ms"]) for record in timed)


@pytest.mark.parametrize("clock", ["wall", "processor"])
def test_reconstruction_takes_time_and_no_random_numbers(clock):
    before = torch.get_rng_state()
    for keys in (1, 2):
        seconds = reconstruction_seconds(keys, width=24, height=16, repeats=1, clock=clock)
        assert isinstance(seconds, float) and math.isfinite(seconds) and seconds >= 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"keys": 0}, "keys"),
        ({"width": 0}, "width"),
        ({"width": 30}, "width"),
        ({"height": 20}, "height"),
        ({"repeats": 0}, "repeats"),
        ({"clock": "sun"}, "clock"),
    ],
)
def test_bad_numbers_are_named(changes, name):
    with pytest.raises(ValueError, match=name):
        reconstruction_seconds(**{"keys": 2, **changes})
