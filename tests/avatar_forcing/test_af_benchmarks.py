"""Operations by formula against PyTorch's counter, the cached step against the recomputed one, the report of latency."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from papers10.avatar_forcing.benchmarks import (
    FORMS,
    LINEAR,
    Latency,
    bench_specs,
    call_flops,
    condition_flops,
    latency_report,
    step_flops,
)
from papers10.avatar_forcing.model import AvatarForcingConfig, build_model
from papers10.avatar_forcing.streaming import StreamingSession
from papers10.core.bench import find_specs
from papers10.kernels.common import Hardware
from papers10.kernels.harness import case_label, check_parity, parity_cases

SMALL = AvatarForcingConfig.small(
    hidden=16, audio_dim=8, condition_heads=2, condition_memory=10, window_frames=30, num_layers=2
)


def counted(function):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("changes, offset", [({}, "paper"), ({"mask": "block_lookahead"}, "paper"), ({}, "exact")])
def test_a_step_is_counted_to_the_last_operation(changes, offset):
    model = build_model(SMALL.model_copy(update=changes))
    run = StreamingSession(model, torch.zeros(1, 8), num_steps=2, offset=offset)
    block = [torch.zeros(1, 10, width) for width in (4, 4, 8)]
    for step in range(4):
        options = {"num_steps": 2, "offset": run.offset, "history": 10 * step}
        assert counted(lambda: run.step(*block)) == sum(step_flops(model.config, **options).values())
    full = step_flops(model.config, num_steps=2, offset=run.offset)
    assert full == step_flops(model.config, num_steps=2, offset=run.offset, history=10_000)


def test_a_call_without_caches_is_counted_to_the_last_operation():
    model, rows = build_model(SMALL), 37
    x, cond = torch.zeros(1, rows, 8), torch.zeros(1, rows, 16)
    number = counted(lambda: model.velocity(x, torch.zeros(1, rows), cond, torch.zeros(1, 8)))
    assert number == sum(call_flops(SMALL, rows=rows, keys=rows, cross_keys=rows, levels=True).values())
    streams = [torch.zeros(1, 20, width) for width in (4, 4, 8)]
    assert counted(lambda: model.conditions(*streams)) == sum(condition_flops(SMALL, rows=20, keys=20).values())


def test_numbers_of_the_paper_size():
    config = AvatarForcingConfig.paper()
    layer = lambda form: sum(step_flops(config, form=form)[name] for name in LINEAR) / 1e9
    once = 3 * 12 * 2 * 2 * 1024**2 * 8 / 1e9
    assert layer("cached") - once == pytest.approx(76.1, abs=0.05)
    assert layer("released") == pytest.approx(96.6, abs=0.05)
    # A window of 50 rows instead of 12: 4.2 times as many a call, in eight calls instead of nine.
    per_call = {
        form: sum(step_flops(config, form=form)[name] for name in LINEAR if name != "cross keys") for form in FORMS
    }
    assert per_call["window"] / 8 / (per_call["cached"] / 9) == pytest.approx(50 / 12)
    assert per_call["history"] < per_call["window"]


def test_parts_add_up_and_grow_as_they_should():
    growing = [sum(step_flops(SMALL, form="history", history=history).values()) for history in (100, 200, 400)]
    assert growing[2] - growing[1] > growing[1] - growing[0] > 0
    one, three = (step_flops(SMALL, branches=branches) for branches in (1, 3))
    assert all(three[name] == 3 * value for name, value in one.items())
    assert step_flops(SMALL, num_steps=8)["mlp"] == 9 * step_flops(SMALL, num_steps=1)["mlp"] / 2


def test_cached_step_is_the_recomputed_one():
    specs = bench_specs()
    assert [spec.name for spec in specs] == ["af_stream_step"]
    for comparison in parity_cases(specs[0]):
        check_parity(specs[0], comparison)


def test_the_bench_finds_it_and_knows_its_limit():
    names = [spec.name for spec in find_specs(["avatar-forcing"])]
    assert "af_stream_step" in names and "attention" in names
    spec = bench_specs()[0]
    card = Hardware("card", 1e12, {"float32": 1e12})
    for case in spec.bench_cases:
        assert case_label(case) and spec.cost(case) == case["history"] + 10
        assert spec.limit({**case, "direction": "backward"}, card) == 0 and spec.limit(case, Hardware("none", 1e9)) == 0
    assert spec.limit({"history": 800}, card) == pytest.approx(
        sum(step_flops(AvatarForcingConfig.small()).values()) / 1e12
    )


class Counting:
    """A drawn extractor that says how often it was asked."""

    dim, pushes = 4, 0

    def streaming(self, window_frames=60):
        return self

    def push(self, wave, *, lookback=0):
        assert wave.shape == (1, 6400)
        self.pushes += 1
        return torch.zeros(1, 10, 4)


def test_report_of_latency():
    features = Counting()
    report = latency_report(
        build_model(SMALL), blocks=4, warm_up=1, features=features, decoder=lambda motion: motion, num_steps=1
    )
    assert features.pushes == 10 and report.blocks == 4 and report.waiting == 0.4
    assert set(report.parts) == {"features", "conditions", "sampling", "commit", "decoding"}
    assert all(0 <= median <= high for median, high in report.parts.values())
    assert report.user == report.waiting + report.work and report.rtf == report.work / 0.4
    assert next(row["part"] for row in report.rows()) == "waiting for the block"
    plain = latency_report(build_model(SMALL), blocks=2, num_steps=1)
    assert set(plain.parts) == {"conditions", "sampling", "commit"}


def test_rate_of_frames():
    report = Latency({"sampling": (0.1, 0.2), "commit": (0.1, 0.1)}, 0.4, 0.15, 10, 50)
    assert report.fps == pytest.approx(50) and report.rtf == pytest.approx(0.5) and report.user == pytest.approx(0.6)
    assert Latency({}, 0.4, 0.0, 10, 2).fps == math.inf


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: step_flops(SMALL, form="cashed"), "form: expected one of"),
        (lambda: step_flops(SMALL, num_steps=0), "num_steps"),
        (lambda: step_flops(SMALL, branches=0), "branches"),
        (lambda: step_flops(SMALL, offset=-1), "offset"),
        (lambda: step_flops(SMALL, form="history", history=-10), "history"),
        (lambda: call_flops(SMALL, rows=0, keys=1, cross_keys=1), "rows"),
        (lambda: call_flops(SMALL, rows=1, keys=0, cross_keys=1), "keys"),
        (lambda: latency_report(build_model(SMALL), blocks=1), "blocks"),
        (lambda: latency_report(build_model(SMALL), warm_up=-1), "warm_up"),
        (
            lambda: latency_report(build_model(SMALL.model_copy(update={"audio_features": 40})), features=Counting()),
            "features",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
