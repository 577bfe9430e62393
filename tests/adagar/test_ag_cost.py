"""Costs of a moving scene: formulas against real models, the bench's paths against their references, the command."""

import json
import math

import pytest
import torch

from papers10.adagar import benchmarks
from papers10.adagar.benchmarks import bench_specs, cost_model
from papers10.adagar.scene import GaborSplats
from papers10.core import bench
from papers10.kernels.common import HARDWARE, KERNELS, CaseNotSupported, Hardware, installed
from papers10.kernels.harness import check_parity, evaluate, make_operands, parity_cases

SPECS = {spec.name: spec for spec in bench_specs()}
PATHS = ("reference", "torch", *(["numba"] if installed("numba") else []))
COMPARISONS = [
    comparison for spec in SPECS.values() for comparison in parity_cases(spec, tuple(path for path in PATHS if path in spec.backends))
]


def test_specs_are_complete_and_not_in_the_registry():
    assert list(SPECS) == ["ag_train_step", "ag_projection"]
    assert not set(SPECS) & set(KERNELS)
    assert all(set(spec.ops) == set(spec.references) and spec.cost and spec.bench_cases for spec in SPECS.values())


@pytest.mark.parametrize(("frames", "waves", "knots"), [(1, 0, 0), (1, 2, 4), (16, 2, 0), (50, 3, 7), (70, 0, 0)])
def test_numbers_of_a_primitive_are_those_of_a_model(frames, waves, knots):
    cost = cost_model(7, frames, 20, 10, waves, knots)
    model = GaborSplats(7, frames, n_waves=waves, n_knots=knots)
    assert cost["knots"] == model.options["n_knots"]
    assert cost["parameters"] == {"primitive": 6 * cost["knots"] + 14 + 4 * waves, "scene": model.num_parameters()}
    assert cost["bytes"]["file"] == sum(value.nbytes for value in model.state_dict().values())
    assert cost["bytes"]["training"] == 16 * model.num_parameters()


def test_values_by_hand():
    cost = cost_model(1000, 70, 854, 480, 2, coverage=100)
    evaluations = 100 * 854 * 480
    assert cost["special"] == {"forward": 3 * evaluations, "backward": 6 * evaluations, "step": 9 * evaluations}
    assert cost["pairs"] == round(evaluations / 256) and cost["flops"]["motion"] == 12 * 15 * 1000
    seconds = cost["seconds"]["H100"]
    assert seconds["forward"] == pytest.approx(3 * evaluations / HARDWARE["H100"].special_per_s)
    assert 25e-6 < seconds["forward"] < 40e-6, "the specification says about 35 microseconds"
    assert seconds["optimizer"] == pytest.approx(28 * 112 * 1000 / 3.35e12)
    assert seconds["step"] == seconds["shading"] + seconds["optimizer"]


def test_pairs_are_those_of_a_rendering():
    operands = make_operands(SPECS["ag_train_step"], {"N": 40, "width": 48, "height": 32, "F": 2, "frames": 6})
    scene = operands.pop("scene")
    found = []
    benchmarks._called(scene, operands, lambda splats: found.append(splats.render(0.2, 48, 32, backend="torch").meta["num_pairs"]))
    assert cost_model(40, 6, 48, 32, coverage=found[0] * 256 / (48 * 32))["pairs"] == found[0] > 40


def test_own_cards_and_nothing_at_all():
    cards = {"slow": Hardware("slow", 1e9, special_per_s=1e6), "unknown": Hardware("unknown", 1e9)}
    assert list(cost_model(10, 5, 8, 8, hardware=cards)["seconds"]) == ["slow"]
    empty = cost_model(0, 1, 8, 8, coverage=0)
    assert empty["parameters"]["scene"] == empty["pairs"] == empty["special"]["step"] == 0
    assert empty["seconds"]["H100"]["step"] == 0


@pytest.mark.parametrize(
    ("name", "value"), [("n", -1), ("frames", 0), ("width", 0), ("height", -3), ("n_waves", -1), ("n_knots", -2), ("coverage", -0.1)]
)
def test_bad_sizes_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        cost_model(**{"n": 1, "frames": 2, "width": 8, "height": 8, name: value})


@pytest.mark.parametrize("comparison", COMPARISONS, ids=[comparison.label for comparison in COMPARISONS])
def test_paths_agree_with_the_reference(comparison):
    check_parity(SPECS[comparison.label.split(".")[0]], comparison)


def test_every_trained_number_has_a_gradient():
    operands = make_operands(SPECS["ag_train_step"], {"N": 14, "width": 21, "height": 18, "F": 2, "frames": 7, "dtype": "float64"})
    _, gradients, _ = evaluate(SPECS["ag_train_step"].ops["step"], operands, backend="torch")
    assert len(gradients) == len(benchmarks._TRAINED)
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_the_dense_form_refuses_what_would_not_fit():
    operands = make_operands(SPECS["ag_train_step"], {"N": 3000, "width": 256, "height": 256, "F": 0, "frames": 2})
    with pytest.raises(CaseNotSupported, match="GB"):
        SPECS["ag_train_step"].ops["step"](**operands, backend="reference")


def test_limits_follow_the_formulas():
    case = {"N": 100, "width": 64, "height": 64, "F": 2, "frames": 16}
    card = Hardware("card", 1e9, special_per_s=1e6)
    spec = SPECS["ag_train_step"]
    assert spec.limit(case, card) == pytest.approx(4.2 * 100 * 256 * 3 / 1e6)
    assert spec.limit({**case, "direction": "backward"}, card) == pytest.approx(2 * spec.limit(case, card))
    assert spec.limit(case, Hardware("processor", 1e9)) == 0
    assert SPECS["ag_projection"].limit({"N": 10, "F": 2}, card) == pytest.approx(4 * 10 * (16 + 11) / 1e9)


def test_the_command_times_the_chapter(monkeypatch, capsys):
    tiny = [spec._replace(bench_cases=spec.cases[1:2]) for spec in bench_specs()]
    monkeypatch.setattr(benchmarks, "bench_specs", lambda: tiny)
    # These labels leave out the kernels that the chapter imports, which take seconds.
    for case, name in (("N=14 ", "ag_train_step"), ("N=20 F=2 float32", "ag_projection")):
        assert bench.main(["adagar"], device="cpu", case=case, quick=True, json=True) == 0
        records = json.loads(capsys.readouterr().out)
        assert {record["kernel"] for record in records} == {name}
        timed = [record for record in records if record["kind"] == "backend" and record["total_ms"]]
        assert timed and all(record["agrees"] and math.isfinite(record["total_ms"]) for record in timed)


def test_reference_by_strips_is_the_dense_picture():
    operands = make_operands(SPECS["ag_train_step"], {"N": 25, "width": 30, "height": 41, "F": 1, "frames": 4, "dtype": "float64"})
    scene = operands.pop("scene")
    with torch.no_grad():
        splats = []
        benchmarks._called(scene, operands, lambda model: splats.append((model.at(0.5), model.render(0.5, 30, 41, backend="reference").color)))
    gaussians, dense = splats[0]
    torch.testing.assert_close(benchmarks._strips(gaussians, 30, 41), dense, rtol=1e-12, atol=1e-12)
