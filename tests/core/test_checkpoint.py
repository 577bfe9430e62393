"""Checkpoints: a run that was killed, wherever, ends like one that was not."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from papers10.core import checkpoint
from papers10.core.checkpoint import CheckpointMismatch
from papers10.core.loop import LoopConfig, TrainState, train

STEPS, EVERY = 24, 5


class Counter:
    def __init__(self):
        self.total = torch.zeros(2, dtype=torch.float64)

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"].clone()


class Batches:
    """Tokens from a numpy generator, with a position that can be saved."""

    def __init__(self):
        self.generator = numpy.random.default_rng(5)

    def __next__(self):
        return torch.from_numpy(self.generator.integers(0, 11, size=(4, 6)))

    def state_dict(self):
        return {"state": json.dumps(self.generator.bit_generator.state)}

    def load_state_dict(self, state):
        self.generator.bit_generator.state = json.loads(state["state"])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.BatchNorm1d(8)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.drop(self.norm(self.embed(ids).flatten(0, 1))))


def build(data=None, **options):
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.pop("lr", 0.01))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, STEPS)
    generators = {
        "torch": torch.Generator().manual_seed(1),
        "numpy": numpy.random.default_rng(2),
        "python": random.Random(3),
    }
    return TrainState(
        model, optimizer, scheduler, Batches() if data is None else data, generators, {"counter": Counter()}, **options
    )


def step(state, ids):
    draws = state.generators
    noise = torch.rand((), generator=draws["torch"]) + draws["numpy"].random() + draws["python"].random()
    # the global generators too: torch's through dropout, the other two here
    noise = noise + numpy.random.rand() + random.random()
    state.extras["counter"].total += noise
    loss = nn.functional.cross_entropy(state.model(ids[:, :-1]), ids[:, 1:].flatten())
    return {"loss": loss * (1 + 0.1 * noise.float()), "noise": noise}


def evaluate(state):
    with state.averaged():
        return {"val_loss": step_free_loss(state.model)}


def step_free_loss(model):
    ids = torch.arange(44).reshape(4, 11) % 11
    return nn.functional.cross_entropy(model(ids[:, :-1]), ids[:, 1:].flatten())


def settings(**changes):
    return LoopConfig(
        **{
            "steps": STEPS,
            "save_every": EVERY,
            "log_every": 4,
            "eval_every": 6,
            "ema": 0.9,
            "accumulate": 2,
            "keep": 2,
            **changes,
        }
    )


def outcome(state, history):
    """Everything that must be equal, as one value."""
    return {
        "weights": {name: tensor.clone() for name, tensor in state.model.state_dict().items()},
        "average": dict(state.average),
        "moments": {f"{i}.{k}": v for i, s in state.optimizer.state_dict()["state"].items() for k, v in s.items()},
        "rate": torch.tensor(state.scheduler.get_last_lr(), dtype=torch.float64),
        "counter": state.extras["counter"].total,
        "next": torch.rand(3, generator=state.generators["torch"]),
        "records": history.records,
        "batches": state.batches.state_dict() if hasattr(state.batches, "state_dict") else state.drawn,
    }


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def run_all(folder, **changes):
    state = build()
    random.seed(7), numpy.random.seed(8)
    return outcome(state, train(state, step, settings(**changes), folder=folder, evaluate=evaluate))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # sums in another order are other bits, and a forked process must not wait for threads it does not have
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(one_thread, tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("whole"))


def killed_child(folder, arrange, **changes):
    """Run the training in a forked process that `arrange` prepares to die; returns the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            arrange()
            run_all(folder, **changes)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def alarm(delay):
    signal.signal(signal.SIGALRM, lambda *_: die())
    signal.setitimer(signal.ITIMER_REAL, delay)


POINTS = ["before", "model", "optimizer", "extras", "state", "rename", "after"]


forks = pytest.mark.skipif(torch.cuda.is_available(), reason="autograd keeps a thread for each card, and forks lose it")


@forks
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("which", [1, 3, 5])
def test_killed_at_every_point_of_every_save(tmp_path, whole, point, which):
    def arrange():
        count = {"saves": 0}
        original = checkpoint._write

        def counted(*arguments):
            count["saves"] += 1
            if count["saves"] == which and point == "before":
                die()
            original(*arguments)
            if count["saves"] == which and point == "after":
                die()

        checkpoint._write = counted

        def at(owner, name, matches, late=False):
            inner = getattr(owner, name)

            def call(*arguments, **options):
                hit = count["saves"] == which and matches(*map(str, arguments))
                if hit and late:
                    # cut the file off as a kill in the middle of writing would
                    Path(arguments[-1]).write_bytes(b"\x00" * 10)
                if hit:
                    die()
                return inner(*arguments, **options)

            setattr(owner, name, call)

        if point == "model":
            at(checkpoint, "save_file", lambda tensors, path: path.endswith("model.safetensors"), late=True)
        elif point in ("optimizer", "extras"):
            at(torch, "save", lambda value, path: path.endswith(f"{point}.pt"), late=True)
        elif point == "state":
            at(checkpoint, "_flush", lambda path: path.endswith("state.json"))
        elif point == "rename":
            at(os, "replace", lambda source, target: True)

    # Saves happen at 5, 10, 15, 20 and, the last, at 24.
    assert killed_child(tmp_path, arrange) == signal.SIGKILL
    done = which if point == "after" else which - 1
    found = checkpoint.latest(tmp_path)
    assert found == (tmp_path / f"step-{min(done * EVERY, STEPS):08d}" if done else None)
    assert same(run_all(tmp_path), whole)
    assert not list(tmp_path.glob(".writing-*")) or done == 5


@forks
def test_killed_at_random_moments(tmp_path, whole):
    moments = random.Random(0)
    for attempt in range(12):
        folder = tmp_path / str(attempt)
        for _ in range(moments.randint(1, 3)):
            assert killed_child(folder, functools.partial(alarm, moments.uniform(0.002, 0.12))) in (signal.SIGKILL, 0)
        assert same(run_all(folder), whole)


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_checkpoint as t
torch.set_num_threads(1)
pause = float(sys.argv[3])
inner = t.step
if pause:
    import time
    def slow(state, ids):
        time.sleep(pause)
        return inner(state, ids)
    t.step = slow
torch.save(t.run_all(sys.argv[2]), sys.argv[2] + "/outcome.pt")
"""


def test_a_separate_program_killed_from_outside(tmp_path, whole):
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path)]
    program = subprocess.Popen([*command, "0.02"])
    deadline = time.monotonic() + 120
    while checkpoint.latest(tmp_path) is None and time.monotonic() < deadline:
        time.sleep(0.005)
    program.send_signal(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
    assert checkpoint.latest(tmp_path) is not None and not (tmp_path / "outcome.pt").exists()
    subprocess.run([*command, "0"], check=True, timeout=120)
    assert same(torch.load(tmp_path / "outcome.pt", weights_only=True), whole)


def test_batches_without_a_position_are_drawn_again(tmp_path):
    data = [torch.from_numpy(numpy.random.default_rng(i).integers(0, 11, size=(4, 6))) for i in range(7)]

    def go(folder, stop=None):
        random.seed(7), numpy.random.seed(8)
        state = build(data)

        def halt(state):
            if state.step == stop:
                raise InterruptedError

        return outcome(state, train(state, step, settings(), folder=folder, evaluate=evaluate, after_step=[halt]))

    expected = go(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        go(tmp_path / "cut", stop=13)
    assert same(go(tmp_path / "cut"), expected)


def test_float16_scale_is_restored(tmp_path):
    def go(folder, stop=None):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        state = TrainState(model, torch.optim.SGD(model.parameters(), lr=1e-4), batches=[torch.ones(2, 3)])

        def halt(state):
            if state.step == stop:
                raise InterruptedError

        history = train(
            state,
            lambda s, x: {"loss": (s.model(x).half() * 2000).float().square().mean() * 1e-4},
            LoopConfig(steps=12, save_every=4, amp="fp16", log_every=3, nonfinite_limit=20),
            folder=folder,
            after_step=[halt],
        )
        return state.scaler.get_scale(), history.records, model.weight.tolist()

    expected = go(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        go(tmp_path / "cut", stop=6)
    assert go(tmp_path / "cut") == expected and expected[0] < 65536


def test_resized_parameters_come_back_with_their_size(tmp_path):
    def go(folder, stop=None):
        torch.manual_seed(0)
        points = nn.ParameterDict({"p": nn.Parameter(torch.arange(3.0))})
        state = TrainState(points, torch.optim.Adam(points.parameters(), lr=0.1))

        def grow(state):
            if state.step == stop:
                raise InterruptedError
            if state.step == 4:
                rows = torch.tensor([0, 1, 2, 2])
                old = points["p"]
                state.replace_parameters({old: nn.Parameter(old.detach()[rows] + 0.1)}, rows)

        train(
            state,
            lambda s, b: {"loss": (points["p"] - 1).square().sum()},
            LoopConfig(steps=12, save_every=3, ema=0.5),
            folder=folder,
            after_step=[grow],
        )
        return points["p"].detach(), state.average["p"]

    expected = go(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        go(tmp_path / "cut", stop=8)
    assert all(torch.equal(a, b) for a, b in zip(go(tmp_path / "cut"), expected)) and expected[0].shape == (4,)


@pytest.mark.parametrize(
    "change, key",
    [
        ({"settings": {"steps": 48}}, "config.loop.steps"),
        ({"settings": {"clip_norm": None}}, "config.loop.clip_norm"),
        ({"build": {"lr": 0.5, "config": {"data": "abc"}}}, "config.data"),
        ({"build": {"config": {"data": "abc"}}}, "config.data"),
    ],
)
def test_another_configuration_is_refused_by_name(tmp_path, change, key):
    train(build(), step, settings(), folder=tmp_path)
    state = build(**change.get("build", {}))
    with pytest.raises(CheckpointMismatch, match=key) as caught:
        train(state, step, settings(**change.get("settings", {})), folder=tmp_path)
    assert key in caught.value.keys
    checkpoint.load(tmp_path, state, strict=False)
    assert state.step == STEPS


def test_settings_that_do_not_decide_numbers_may_change(tmp_path):
    train(build(), step, settings(), folder=tmp_path)
    assert train(build(), step, settings(keep=5, save_every=3, max_seconds=60.0), folder=tmp_path).resumed_from == STEPS


def test_another_model_is_refused(tmp_path):
    train(build(), step, settings(), folder=tmp_path)
    state = build()
    state.model = nn.Linear(2, 2)
    state.optimizer = torch.optim.AdamW(state.model.parameters(), lr=0.01)
    with pytest.raises(CheckpointMismatch, match="model.class: saved Tied, now Linear"):
        checkpoint.load(tmp_path, state)


def saved_small(folder, **options):
    model = nn.Linear(2, 2)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    checkpoint.save(folder, state)
    return state


def test_keep_and_leftovers(tmp_path):
    state = saved_small(tmp_path)
    (tmp_path / ".writing-step-00000009").mkdir()
    for state.step in range(1, 5):
        checkpoint.save(tmp_path, state, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{i:08d}" for i in (2, 3, 4)]
    state.step = 5
    checkpoint.save(tmp_path, state, keep=None)
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(ValueError, match="keep"):
        checkpoint.save(tmp_path, state, keep=0)


@pytest.mark.parametrize("damage", ["model.safetensors", "optimizer.pt", "extras.pt", "state.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_incomplete_checkpoints_are_passed_over(tmp_path, damage, how):
    state = saved_small(tmp_path)
    state.step = 7
    file = checkpoint.save(tmp_path, state) / damage
    file.unlink() if how == "missing" else file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert checkpoint.latest(tmp_path).name == "step-00000000"
    assert checkpoint.load(tmp_path, state)["step"] == 0


def test_nothing_to_load(tmp_path):
    state = saved_small(tmp_path / "other")
    assert checkpoint.latest(tmp_path / "absent") is None
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
            checkpoint.load(folder, state)


def test_state_that_would_need_code_to_load_is_refused(tmp_path):
    class Odd:
        def state_dict(self):
            return {"a": [1, {"b": object()}]}

    with pytest.raises(TypeError, match=r"extras\['odd'\]\['a'\]\[1\]\['b'\].*object"):
        saved_small(tmp_path, extras={"odd": Odd()})
    assert not list(tmp_path.glob("*"))


def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match="cannot write checkpoint"):
        saved_small(blocked / "run")


def test_failed_writing_leaves_nothing_half(tmp_path, monkeypatch):
    state = saved_small(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    state.step = 1
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint.save(tmp_path, state)
    assert caught.value.errno == 28 and [p.name for p in tmp_path.iterdir()] == ["step-00000000"]


def test_tensors_of_every_kind(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "slice": base[1:3],
        "column": base[:, 2],
        "same": base,
        "again": base,
        "empty": torch.empty(0, 3),
        "empty2": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "half": base.half(),
        "bf16": base.bfloat16(),
        "bool": base > 3,
        "double": base.double(),
    }
    checkpoint.save_tensors(tensors, tmp_path / "x.safetensors")
    loaded = checkpoint.load_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys() and loaded["again"] is loaded["same"]
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    from safetensors import safe_open

    state = build()
    checkpoint.save(tmp_path, state)
    with safe_open(tmp_path / "step-00000000" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "embed.weight" in names and "head.weight" not in names
    other = build()
    with torch.no_grad():
        other.model.embed.weight.zero_()
    checkpoint.load(tmp_path, other)
    assert other.model.head.weight is other.model.embed.weight and torch.equal(
        other.model.embed.weight, state.model.embed.weight
    )


def test_float32_moments_of_bfloat16_parameters_stay_exact(tmp_path):
    def make():
        model = nn.Linear(2, 2).to(torch.bfloat16)
        return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    state = make()
    exact = torch.tensor([[1.0001, 2.0002], [3.0003, 4.0004]])
    state.optimizer.state[state.model.weight]["momentum_buffer"] = exact
    checkpoint.save(tmp_path, state)
    other = make()
    checkpoint.load(tmp_path, other)
    assert torch.equal(other.optimizer.state[other.model.weight]["momentum_buffer"], exact)


def test_generators_of_the_wrong_kind():
    with pytest.raises(TypeError, match="generator: expected"):
        checkpoint.generator_state(object())
    with pytest.raises(ValueError, match="kind torch"):
        checkpoint.restore_generator(random.Random(), checkpoint.generator_state(torch.Generator()))
    mt = numpy.random.Generator(numpy.random.MT19937(3))
    state = json.loads(json.dumps(checkpoint.generator_state(mt)))
    first = mt.random(4)
    checkpoint.restore_generator(mt, state)
    assert numpy.array_equal(mt.random(4), first)


def test_nested_configurations_are_compared_in_full(tmp_path):
    nested = {
        "layers": [{"kind": "a", "width": 4}, {"kind": "b", "width": 8}],
        "dims": (1, 2),
        "limit": float("inf"),
        "none": None,
    }
    state = saved_small(tmp_path, config=nested)
    checkpoint.load(tmp_path, state)
    state.config = {**nested, "layers": [{"kind": "a", "width": 4}, {"kind": "b", "width": 9}]}
    with pytest.raises(CheckpointMismatch) as caught:
        checkpoint.load(tmp_path, state)
    assert caught.value.keys == ["config.layers.1.width"]
