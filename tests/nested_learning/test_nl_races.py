"""The races: the valley's formula, reproducible runs, equal starts, chosen rates, refusals."""

import pytest
import torch

from papers10.nested_learning import races
from papers10.nested_learning.m3 import M3


def test_the_valley_by_hand():
    psi = races.toy_curvature(10.0, 0.5, 2.0)
    point = torch.tensor([[-3.5, 2.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    r, theta = point.unbind(-1)
    expected = r**2 + 10 * (r - theta + 0.5 * torch.sin(2 * r)) ** 2
    assert torch.equal(psi(point), expected) and psi(point)[1] == 0
    with pytest.raises(ValueError, match="k"):
        races.toy_curvature(-1.0)


def test_walks_arrive_diverge_and_repeat():
    options = dict(rates=(3e-3, 1.7e-2), momenta=(0.9,), steps=200)
    delta = races.run_curvature("delta", **options)
    momentum = races.run_curvature("momentum", **options)
    assert delta["steps"] * 2 <= momentum["steps"] <= 200
    assert delta == races.run_curvature("delta", **options)
    assert delta["path"][0] == [-3.5, 2.0] and len(delta["path"]) == len(delta["values"]) == delta["steps"] + 1
    assert delta["values"][-1] < 1e-3 <= delta["values"][-2]
    literal = races.run_curvature("delta-literal", **options)
    assert literal["steps"] is None and literal["diverged"] == 1.0 and None in literal["final"].values()


def test_a_seed_moves_the_start_only_a_little():
    starts = [
        races.run_curvature("momentum", seed, rates=(1e-3,), momenta=(0.9,), steps=1)["path"][0] for seed in (0, 1)
    ]
    assert starts[0] != starts[1] and all(abs(r + 3.5) < 1.5 and abs(theta - 2) < 1.5 for r, theta in starts)


@pytest.mark.parametrize("arm", list(races.RACE_ARMS))
@pytest.mark.parametrize("setting", races.RACE_SETTINGS)
def test_every_arm_runs_and_repeats(arm, setting):
    first = races.run_race(arm, 3, setting, steps=12, every=6)
    assert first == races.run_race(arm, 3, setting, steps=12, every=6)
    assert first["curve"]["step"] == [6, 12] and first["parameters"] == 13130
    assert first["train_loss"] == first["curve"]["train_loss"][-1]
    assert first["lr"] == races.RACE_RATES["mlp", setting][arm]


def test_the_transformer_runs_and_arms_start_from_the_same_weights():
    starts = []
    for arm in ("adamw", "m3"):
        net, *_ = races.train_race(arm, 1, model="vit", lr=1e-3, steps=0, every=0)
        starts.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*starts)
    assert races.run_race("muon", 1, "alternating", model="vit", lr=1e-3, steps=2, every=0)["parameters"] == 39610


def test_alternating_batches_hold_one_task_at_a_time():
    labels = torch.arange(10).repeat(5)
    rows = races._batches(labels, "alternating", 8, 3, torch.Generator().manual_seed(0))
    tasks = [set((labels[next(rows)] >= 5).tolist()) for _ in range(9)]
    assert tasks == [{False}] * 3 + [{True}] * 3 + [{False}] * 3


def test_alignment_is_recorded_for_every_step():
    result = races.run_race("m3", 0, "alternating", steps=25, every=0, diagnose=True)
    memory = result["alignment"]["memory"]
    assert len(memory) == 25 and memory[:10] == [0.0] * 10 and all(-1 <= value <= 1 for value in memory)
    assert max(map(abs, memory[10:])) > 0
    assert races.memory_alignment(M3([torch.nn.Parameter(torch.zeros(2, 2))], alpha=0.0)) == {
        "memory": 0.0,
        "output": 0.0,
    }


def test_divergence_is_reported_not_raised(monkeypatch):
    def build(model, lr, _):
        return torch.optim.SGD(model.parameters(), lr=float("inf"))

    monkeypatch.setitem(races.RACE_ARMS, "broken", build)
    result = races.run_race("broken", 0, lr=1.0, steps=30)
    assert result["train_loss"] is None and result["val_loss"] is None


def test_a_sweep_has_one_record_for_each_rate():
    records = races.sweep_race("adamw", rates=(1e-3, 1e-2), steps=5)
    assert [record["lr"] for record in records] == [1e-3, 1e-2]
    assert set(records[0]) == {"lr", "train_loss", "val_loss", "accuracy"}


def test_every_arm_has_a_rate_from_the_list():
    for chosen in races.RACE_RATES.values():
        assert set(chosen) <= set(races.RACE_ARMS) and set(chosen.values()) <= set(races.RACE_RATES_TRIED)
    assert set(races.RACE_RATES["mlp", "iid"]) == set(races.RACE_ARMS)


def test_refusals():
    with pytest.raises(ValueError, match="arm: expected one of"):
        races.run_race("adam", 0)
    with pytest.raises(ValueError, match="setting"):
        races.run_race("adamw", 0, "mixed")
    with pytest.raises(ValueError, match="model"):
        races.run_race("adamw", 0, model="cnn", lr=1e-3)
    with pytest.raises(ValueError, match="arm"):
        races.run_curvature("delta-2")
