"""The training loop: what it computes, what it refuses, what it records."""

import math
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from papers10.core import checkpoint
from papers10.core.checks import NonFiniteError
from papers10.core.config import ConfigError
from papers10.core.loop import History, LoopConfig, TrainState, float32_modules, train


def regression(seed=0, dtype=torch.float32, lr=0.1, scheduler=False):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(3, 1).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) if scheduler else None
    return model, optimizer, schedule


def mean_square(state, batch):
    x, y = batch
    return {"loss": (state.model(x) - y).square().mean()}


def batches(number, size, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, generator=generator, dtype=dtype), torch.randn(size, 1, generator=generator, dtype=dtype))
        for _ in range(number)
    ]


def build(data, **options):
    model, optimizer, scheduler = regression(**options)
    return TrainState(model, optimizer, scheduler, batches=data)


def test_accumulation_equals_the_large_batch():
    small = batches(12, 5, torch.float64)
    large = [tuple(torch.cat(parts) for parts in zip(*small[i : i + 3])) for i in range(0, 12, 3)]
    config = LoopConfig(steps=8, clip_norm=0.5, log_every=1)
    one, many = build(large, dtype=torch.float64, scheduler=True), build(small, dtype=torch.float64, scheduler=True)
    a = train(one, mean_square, config)
    b = train(many, mean_square, LoopConfig(**{**config.model_dump(), "accumulate": 3}))
    # float64 sums in another order: a few units in the last place over eight steps
    torch.testing.assert_close(one.model.weight, many.model.weight, rtol=1e-13, atol=1e-14)
    assert [r["loss"] for r in a.records] == pytest.approx([r["loss"] for r in b.records], rel=1e-12)
    assert many.drawn == 24 and one.drawn == 8


def test_matches_a_loop_written_by_hand():
    data = batches(6, 4)
    state = build(data, scheduler=True)
    history = train(state, mean_square, LoopConfig(steps=6, clip_norm=1.0, log_every=2))
    model, optimizer, scheduler = regression(scheduler=True)
    losses, norms, rates = [], [], []
    for x, y in data:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    assert torch.equal(model.weight, state.model.weight)
    assert [r["step"] for r in history.records] == [2, 4, 6]
    assert history.column("loss")[1] == [(losses[i] + losses[i + 1]) / 2 for i in (0, 2, 4)]
    assert history.column("grad_norm")[1] == [(norms[i] + norms[i + 1]) / 2 for i in (0, 2, 4)]
    assert history.column("lr")[1] == rates[1::2]


def test_without_clipping_gradients_stay_as_they_are():
    data = batches(1, 4)
    state = build(data, lr=1.0)
    before = state.model.weight.detach().clone()
    train(state, lambda s, b: {"loss": 100 * mean_square(s, b)["loss"]}, LoopConfig(steps=1, clip_norm=None))
    free = (state.model.weight - before).norm()
    state = build(data, lr=1.0)
    train(state, lambda s, b: {"loss": 100 * mean_square(s, b)["loss"]}, LoopConfig(steps=1, clip_norm=0.1))
    assert free > 1 and (state.model.weight - before).norm() * 0.999 <= 0.1


def test_average_of_the_weights():
    data = batches(5, 4)
    state, seen = build(data), []
    start = state.model.weight.detach().clone()
    train(
        state,
        mean_square,
        LoopConfig(steps=5, ema=0.8),
        after_step=[lambda s: seen.append(s.model.weight.detach().clone())],
    )
    expected = start
    for weight in seen:
        expected = expected * 0.8 + weight * 0.2
    trained = state.model.weight.detach().clone()
    with state.averaged() as model:
        torch.testing.assert_close(model.weight, expected)
    assert torch.equal(state.model.weight, trained)
    with pytest.raises(ValueError, match="ema"), build(data).averaged():
        pass


@pytest.mark.parametrize("amp, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_spares_named_modules(amp, dtype):
    class Model(nn.Module):
        fp32_modules = ("gate",)

        def __init__(self):
            super().__init__()
            self.body, self.gate = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            hidden = self.body(x)
            self.seen = hidden.dtype, self.gate(hidden).dtype
            return self.gate(hidden)

    model = Model()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.01), batches=batches(4, 4))
    history = train(state, mean_square, LoopConfig(steps=4, amp=amp))
    assert model.seen == (dtype, torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert math.isfinite(history.last("loss")) and (state.scaler is not None) == (amp == "fp16")
    assert "forward" not in vars(model.gate)


def test_fp32_modules_may_name_a_part_that_a_variant_lacks():
    model = nn.Sequential(nn.Linear(1, 1))
    model.fp32_modules = ("gate",)
    with float32_modules(model):
        assert "forward" not in vars(model[0])


def test_fp32_modules_of_a_part():
    class Part(nn.Module):
        fp32_modules = ("gate",)

        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(2, 2)

        def forward(self, x):
            return self.gate(x)

    part, other = Part(), nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(part), other)
    with torch.autocast("cpu", dtype=torch.bfloat16), float32_modules(model):
        hidden = model[0](torch.ones(1, 2, dtype=torch.bfloat16))
        assert hidden.dtype == torch.float32 and other(hidden).dtype == torch.bfloat16
    part.fp32_modules = ("gaet",)
    with pytest.raises(ValueError, match="Part.fp32_modules.*'gate'"), float32_modules(model):
        pass


def test_float16_overflow_lowers_the_scale_before_it_counts():
    data = batches(1, 4)
    state = build(data, lr=1e-4)
    before = state.model.weight.detach().clone()

    def steep(state, batch):
        # the gradient of this loss in float16 overflows until the scale has come down
        return {"loss": (state.model(batch[0].half().float()).half() * 2000).float().mean()}

    history = train(state, steep, LoopConfig(steps=30, amp="fp16", nonfinite_limit=0, log_every=1))
    assert 0 < history.skipped < 30 and state.scaler.get_scale() < 65536
    assert not torch.equal(before, state.model.weight)


def broken(first, last, value=float("nan")):
    def step(state, batch):
        return {"loss": mean_square(state, batch)["loss"] * (value if first <= state.step < last else 1.0)}

    return step


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_steps_that_are_not_finite_are_skipped_and_counted(value):
    data = batches(10, 4)
    state, weights = build(data), []
    history = train(
        state,
        broken(4, 7, value),
        LoopConfig(steps=10, nonfinite_limit=3, log_every=1),
        after_step=[lambda s: weights.append(s.model.weight.detach().clone())],
    )
    assert history.skipped == 3 and history.last("skipped") == 3
    assert torch.equal(weights[3], weights[6]) and not torch.equal(weights[6], weights[7])
    assert all(value is None or math.isfinite(value) for record in history.records for value in record.values())


def test_non_finite_gradient_of_a_finite_loss_is_skipped():
    state = build(batches(4, 4))
    before = [p.detach().clone() for p in state.model.parameters()]

    def step(state, batch):
        # sqrt has an infinite slope at zero: the loss is 0, the gradient inf * 0 = nan
        return {"loss": (state.model.weight * 0).square().sum().sqrt()}

    assert train(state, step, LoopConfig(steps=3)).skipped == 3
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters()))


def test_too_many_in_a_row_stop_the_training():
    with pytest.raises(NonFiniteError, match="4 steps in a row") as caught:
        train(build(batches(20, 4)), broken(2, 20), LoopConfig(steps=20, nonfinite_limit=3))
    assert caught.value.step == 6


def test_evaluation_neither_moves_nor_reseeds_the_training():
    def dropped():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
        return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), batches=batches(9, 4))

    modes = []

    def evaluate(state):
        modes.append((state.model.training, torch.is_grad_enabled()))
        torch.rand(7)
        return {"loss": 2.0, "val_loss": 1.0}

    plain, watched = dropped(), dropped()
    train(plain, mean_square, LoopConfig(steps=9))
    history = train(watched, mean_square, LoopConfig(steps=9, eval_every=4, log_every=9), evaluate=evaluate)
    assert torch.equal(plain.model[1].weight, watched.model[1].weight)
    assert modes == [(False, False)] * 3 and watched.model.training
    assert history.column("val_loss") == ([4, 8, 9], [1.0, 1.0, 1.0])
    assert history.records[-1]["eval_loss"] == 2.0 and history.records[-1]["loss"] != 2.0


def test_time_limit_stops_and_saves(tmp_path):
    import time

    state = build(batches(5, 4))
    config = LoopConfig(steps=10_000, max_seconds=0.2, save_every=5000, log_every=5000)
    history = train(state, mean_square, config, folder=tmp_path, after_step=[lambda s: time.sleep(0.02)])
    assert history.stopped == "max_seconds" and 0 < state.step < 1000
    assert checkpoint.latest(tmp_path).name == f"step-{state.step:08d}"
    again = build(batches(5, 4))
    assert train(again, mean_square, config, folder=tmp_path).stopped == "max_seconds" and again.step == state.step
    longer = LoopConfig(**{**config.model_dump(), "max_seconds": 0.3})
    assert train(build(batches(5, 4)), mean_square, longer, folder=tmp_path).resumed_from == state.step


class Run:
    def __init__(self, folder):
        self.folder, self.logged, self.bar = folder, [], []

    def checkpoints(self, name):
        return self.folder / "checkpoints" / name

    def log(self, step, name=None, **values):
        self.logged.append((step, name, values))

    @contextmanager
    def progress(self, total, description):
        self.bar.append((total, description))
        yield self

    def update(self, n, **values):
        self.bar.append(n)


def test_a_run_gives_folder_log_and_progress(tmp_path):
    run = Run(tmp_path)
    config = LoopConfig(steps=6, log_every=3, save_every=3)
    history = train(build(batches(6, 4)), mean_square, config, run=run, name="arm")
    assert [(step, name) for step, name, _ in run.logged] == [(3, "arm"), (6, "arm")]
    assert run.logged[-1][2]["loss"] == history.last("loss") and run.logged[-1][2]["seconds"] > 0
    assert run.bar == [(6, "arm"), 1, 1, 1, 1, 1, 1]
    again = train(build(batches(6, 4)), mean_square, config, run=run, name="arm")
    assert again.records == history.records and again.resumed_from == 6 and run.bar[-2:] == [(6, "arm"), 6]


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(build(batches(2, 4)), mean_square, LoopConfig(steps=2))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="folder: expected"):
        train(build(batches(2, 4)), mean_square, LoopConfig(steps=2, save_every=1))


@pytest.mark.parametrize(
    "step_fn, message",
    [
        (lambda s, b: mean_square(s, b)["loss"], "expected a mapping with a tensor 'loss'"),
        (lambda s, b: {"loss": 1.0}, "expected a mapping with a tensor 'loss'"),
        (lambda s, b: {**mean_square(s, b), "extra": torch.ones(2)}, r"'extra'.*shape \(2,\)"),
        (lambda s, b: {**mean_square(s, b), "extra": "text"}, "'extra'.*str"),
    ],
)
def test_bad_step_functions(step_fn, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train(build(batches(2, 4)), step_fn, LoopConfig(steps=1))


def test_numbers_of_an_evaluation_are_checked_and_may_be_numpy():
    import numpy

    config = LoopConfig(steps=1)
    history = train(
        build(batches(1, 4)), mean_square, config, evaluate=lambda s: {"a": numpy.float32(0.5), "b": torch.tensor([2])}
    )
    assert history.last("a") == 0.5 and history.last("b") == 2.0
    with pytest.raises(TypeError, match=r"evaluate\['a'\]: expected a number, got NoneType"):
        train(build(batches(1, 4)), mean_square, config, evaluate=lambda s: {"a": None})


@pytest.mark.parametrize("terminal", [True, False])
def test_one_bar_on_a_terminal_and_none_in_a_file(terminal, monkeypatch):
    import io
    import sys

    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    train(build(batches(3, 4)), mean_square, LoopConfig(steps=3), name="arm")
    assert ("arm:" in stream.getvalue()) == terminal and "\n" not in stream.getvalue()


def test_batches_that_end():
    with pytest.raises(ValueError, match="ended after 2 batches"):
        train(build(iter(batches(2, 4))), mean_square, LoopConfig(steps=3))
    with pytest.raises(ValueError, match="ended after 0 batches"):
        train(build([]), mean_square, LoopConfig(steps=3))
    state = TrainState(nn.Linear(1, 1), None)
    assert state.draw() is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -1},
        {"steps": 1, "accumulate": 0},
        {"steps": 1, "amp": "int8"},
        {"steps": 1, "ema": 1.0},
        {"steps": 1, "clip": 1.0},
        {"steps": 1.5},
    ],
)
def test_bad_settings(wrong):
    with pytest.raises(ConfigError):
        LoopConfig(**wrong)


def test_first_step_skipped_gives_no_warning_about_the_schedule():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = build(batches(3, 4), scheduler=True)
        train(state, broken(0, 1), LoopConfig(steps=3))
    assert state.scheduler.last_epoch == 3


def test_history_names():
    history = History()
    history.add(1, loss=1.0)
    with pytest.raises(KeyError, match="'loss'"):
        history.last("los")


def test_replace_parameters_keeps_shared_names_and_moments():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    state = TrainState(
        model,
        torch.optim.Adam(model.parameters(), lr=0.1),
        average={"embed.weight": model.embed.weight.detach().clone()},
    )
    model.head(model.embed(torch.tensor([0, 3]))).sum().backward()
    state.optimizer.step()
    old = model.embed.weight
    moments = state.optimizer.state[old]["exp_avg"].clone()
    rows = torch.tensor([3, -1, 0])
    new = nn.Parameter(torch.ones(3, 2))
    state.replace_parameters({old: new}, rows)
    assert model.head.weight is model.embed.weight is new
    kept = state.optimizer.state[new]["exp_avg"]
    assert (
        torch.equal(kept[0], moments[3])
        and torch.equal(kept[1], torch.zeros(2))
        and state.average["embed.weight"].shape == (3, 2)
    )
    assert torch.equal(state.average["embed.weight"][1], torch.ones(2))
    assert state.resized == {"embed.weight", "head.weight"} and old not in state.optimizer.state
    with pytest.raises(ValueError, match="parameters of the model"):
        state.replace_parameters({old: new})


def test_tail_is_the_mean_of_the_last_values():
    history = History()
    for step in range(30):
        history.add(step, loss=float(step))
    assert history.tail("loss") == 28 and history.tail("loss", 0.01) == 29
    history.add(30, loss=float("nan"))
    assert history.tail("loss") is None and History().tail("loss") is None
