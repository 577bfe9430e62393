"""Several processes: the merge of moments, and a training on two gloo processes that equals one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from papers10.core import distributed
from papers10.core.distributed import merge_moments, owner_of, owners


def moments(values):
    values = torch.tensor(values, dtype=torch.float64)
    mean = values.mean() if len(values) else torch.zeros((), dtype=torch.float64)
    return mean, (values - mean).square().sum(), len(values)


numbers = some.lists(some.floats(-1e3, 1e3), max_size=20)


@settings(max_examples=100, deadline=None)
@given(numbers, numbers, some.sampled_from([0.0, 1e6]))
def test_merged_moments_are_those_of_the_whole(a, b, offset):
    a, b = [x + offset for x in a], [x + offset for x in b]
    mean, m2, n = merge_moments(*moments(a), *moments(b))
    expected_mean, expected_m2, expected_n = moments(a + b)
    assert n == expected_n
    # float64 at size 1e6: the mean is good to 1e-9; squared deviations inherit that times their own size
    assert torch.isclose(mean, expected_mean, rtol=1e-12, atol=1e-9)
    assert torch.isclose(m2, expected_m2, rtol=1e-9, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(numbers, numbers, numbers)
def test_the_merge_is_associative_and_commutative(a, b, c):
    a, b, c = moments(a), moments(b), moments(c)
    left, right, turned = (
        merge_moments(*merge_moments(*a, *b), *c),
        merge_moments(*a, *merge_moments(*b, *c)),
        merge_moments(*c, *merge_moments(*b, *a)),
    )
    for other in (right, turned):
        assert all(torch.isclose(x, y, rtol=1e-9, atol=1e-6) for x, y in zip(left, other))


def test_merge_works_on_vectors():
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [(p.mean(0), (p - p.mean(0)).square().sum(0), len(p)) for p in (x[:3], x[3:])]
    mean, m2, n = merge_moments(*parts[0], *parts[1])
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(m2 / (n - 1), x.var(0))


@settings(max_examples=60, deadline=None)
@given(some.lists(some.integers(1, 1000), min_size=1, max_size=30), some.integers(1, 8))
def test_owners_share_the_work(sizes, ranks):
    result = owners(sizes, ranks)
    loads = [sum(size for size, owner in zip(sizes, result) if owner == rank) for rank in range(ranks)]
    # Graham's bound for the largest-first rule
    assert max(loads) <= max(max(sizes), (4 / 3) * sum(sizes) / ranks + max(sizes) / 3)
    assert set(result) <= set(range(ranks)) and result == owners(sizes, ranks)


def test_owner_of_unknown_parameter():
    with pytest.raises(ValueError, match="parameter: expected one of the 1 given"):
        owner_of(torch.ones(2), [torch.ones(2)])


def test_gather_rows_refuses_scalars():
    with pytest.raises(ValueError, match="rows"):
        distributed.gather_rows(torch.tensor(1.0))


def test_rank_before_the_group_exists(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (distributed.rank(), distributed.world_size()) == (3, 4)


PROGRAM = '''
import json, os, signal, sys
from pathlib import Path
import torch
from torch import nn
from papers10.core import distributed
from papers10.core.loop import LoopConfig, TrainState, train

folder, stop = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
rank, ranks = distributed.rank(), distributed.world_size()


class Rows:
    """Every process draws the same large batch and keeps its own rows of it."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def __next__(self):
        x = torch.randn(8, 3, generator=self.generator, dtype=torch.float64)
        return x.chunk(ranks)[rank]

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
own = torch.Generator().manual_seed(10 + rank)
state = TrainState(model, optimizer, scheduler, Rows(), {"own": own})
kept = []


def step(state, x):
    torch.rand((), generator=own)
    loss = (state.model(x) - x.sum(1, keepdim=True)).square().mean()
    if state.step == 5 and rank == ranks - 1 and "broken" in sys.argv:
        loss = loss * float("nan")
    return {"loss": loss}


def evaluate(state):
    x = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    # one process calls the model more often than the other
    return {"val": [state.model(x).mean() for _ in range(1 + rank)][0]}


def hook(state):
    if state.step == stop:
        os.kill(os.getpid(), signal.SIGKILL)


config = LoopConfig(steps=12, accumulate=2, clip_norm=0.5, save_every=4, log_every=3, eval_every=6, ema=0.9)
history = train(state, step, config, folder=folder / "checkpoints", evaluate=evaluate, after_step=[hook])
rows = distributed.gather_rows(torch.arange(rank + 1))
values = torch.arange(4.0 * ranks, dtype=torch.float64)
part = values[4 * rank : 4 * rank + 4]
mean, m2, n = distributed.reduce_moments(part.mean(), (part - part.mean()).square().sum(), 4)
everyone = distributed.gather_objects({"own": own.get_state().tolist()[:64], "w": model[0].weight.flatten().tolist(), "resumed": history.resumed_from})
if rank == 0:
    result = dict(records=history.records, skipped=history.skipped, rows=rows.tolist(), moments=[float(mean), float(m2), float(n)],
                  weights=[p.flatten().tolist() for p in model.parameters()], average=[a.flatten().tolist() for a in state.average.values()],
                  everyone=everyone, wrapped=type(state.model).__name__)
    (folder / "result.json").write_text(json.dumps(result))
distributed.finish()
'''

# accelerate starts several CPU processes by itself only under MPI; --multi_gpu with ACCELERATE_USE_CPU starts them as on GPUs.
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ],
    "one": [],
}


def launch(folder, launcher, *arguments, stop=0):
    folder.mkdir(exist_ok=True, parents=True)
    program = folder / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], str(program), str(folder), str(stop), *arguments],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    if stop:
        assert done.returncode != 0 and not (folder / "result.json").exists()
        return None
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def flat(nested):
    return [value for part in nested for value in part]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("single"), "one")


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    pytest.importorskip("accelerate")
    return launch(tmp_path_factory.mktemp("double"), "torchrun")


def equal(double, single):
    # float64; only the order of sums over the batch differs
    assert flat(double["weights"]) == pytest.approx(flat(single["weights"]), rel=1e-10, abs=1e-12)
    assert flat(double["average"]) == pytest.approx(flat(single["average"]), rel=1e-10, abs=1e-12)
    for a, b in zip(double["records"], single["records"], strict=True):
        assert a.keys() == b.keys() and list(a.values()) == pytest.approx(list(b.values()), rel=1e-9)


def test_two_processes_equal_one_with_the_doubled_batch(double, single):
    equal(double, single)
    first, second = double["everyone"]
    assert first["w"] == second["w"] and first["own"] != second["own"] and double["wrapped"] == "Sequential"
    assert double["rows"] == [0, 0, 1]
    assert double["moments"] == pytest.approx([3.5, 42.0, 8.0])


@pytest.mark.slow
def test_two_processes_killed_and_resumed(tmp_path, double):
    launch(tmp_path, "torchrun", stop=7)
    resumed = launch(tmp_path, "torchrun")
    assert [process["resumed"] for process in resumed["everyone"]] == [4, 4]
    for part in ("weights", "average", "records"):
        assert resumed[part] == double[part]
    assert [p["own"] for p in resumed["everyone"]] == [p["own"] for p in double["everyone"]]


@pytest.mark.slow
def test_accelerate_launch_and_a_step_that_breaks_in_one_process(tmp_path):
    pytest.importorskip("accelerate")
    broken = launch(tmp_path / "two", "accelerate", "broken")
    assert broken["skipped"] == 1 and broken["everyone"][0]["w"] == broken["everyone"][1]["w"]
    equal(broken, launch(tmp_path / "one", "one", "broken"))
