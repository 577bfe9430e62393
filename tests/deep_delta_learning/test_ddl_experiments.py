"""The experiments: same seed same numbers, arms of equal size, known solutions, clear refusals."""

import pytest
import torch

from papers10.deep_delta_learning import experiments


@pytest.mark.parametrize("arm", list(experiments.PARITY_ARMS))
def test_parity_is_reproducible_and_leaves_the_global_state(arm):
    before = torch.get_rng_state()
    first = experiments.run_parity(arm, 5, steps=4, train_depth=4, test_depths=(4, 8), batch=8, test_size=16)
    assert first == experiments.run_parity(arm, 5, steps=4, train_depth=4, test_depths=(4, 8), batch=8, test_size=16)
    assert set(first["accuracy"]) == {"4", "8"}
    fresh = experiments.seeded(0, "x", lambda: torch.nn.Linear(2, 2)).weight
    assert torch.equal(fresh, experiments.seeded(0, "x", lambda: torch.nn.Linear(2, 2)).weight)
    torch.set_rng_state(before)


def test_the_gate_range_decides_parity():
    full = experiments.run_parity("full", 11, steps=200, train_depth=8, test_depths=(8,))
    positive = experiments.run_parity("positive", 11, steps=200, train_depth=8, test_depths=(8,))
    assert full["accuracy"]["8"] > 0.9 and positive["accuracy"]["8"] < 0.65
    assert full["parameters"] == positive["parameters"] and full["largest_gate"] > 1.2 and positive["largest_gate"] < 1


def test_a_positive_gate_cannot_have_a_negative_determinant():
    counter = experiments.seeded(0, "counter", lambda: experiments.DepthCounter("positive"))
    with torch.no_grad():
        counter.target.zero_()
        bits = torch.ones(1, 1, dtype=torch.long)
        columns = []
        for axis in torch.eye(4):
            counter.start.copy_(axis)
            counter.readout = torch.nn.Identity()
            columns.append(counter(bits)[0])
    assert torch.linalg.det(torch.stack(columns)) > 0


def test_the_exact_follower_misses_nothing():
    matrix, projection = experiments.oscillating_system("alternate", 3)
    follower = experiments.Follower("hard", 1, restarts=1)
    with torch.no_grad():
        follower.direction.copy_(projection[projection.diagonal().argmax()].view(1, 1, 1, 4))
        follower.logit.fill_(4 * (1.9 / 2 - 0.5))
        start = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        states = follower(start, 6)[:, 0]
    # float32, and the guard of the direction changes its length by 1e-10
    assert torch.allclose(states[-1], start @ torch.linalg.matrix_power(matrix, 6).T, atol=1e-4)


@pytest.mark.parametrize("mode", experiments.OSCILLATION_MODES)
def test_followers_have_equal_sizes(mode):
    sizes = {
        experiments.run_oscillation(arm, 0, mode=mode, steps=2, depth=4)["parameters"]
        for arm in experiments.OSCILLATION_ARMS
    }
    assert sizes == {6 if mode == "alternate" else 12}


def test_digits_arms_match_in_size_and_share_the_split():
    results = {
        arm: experiments.run_digits(arm, 0, num_layers=12, steps=1) for arm in ("add", "ddl", "ddl-cc", "write-cc")
    }
    assert abs(results["add"]["parameters"] / results["ddl"]["parameters"] - 1) < 1e-3
    assert results["ddl-cc"]["parameters"] == results["write-cc"]["parameters"]
    assert {len(result["correct"]) for result in results.values()} == {597}


def test_depth_profile_of_a_closed_gate_is_flat():
    result = experiments.run_depth("ddl-zero", 16, 0, steps=1)
    assert abs(result["start_growth"] - 1) < 1e-3 and abs(result["start_gradient_ratio"] - 1) < 1e-2
    assert len(result["start"]["state"]) == 17 and result["skipped"] == 0


def test_text_is_reproducible_and_seeds_differ():
    tokens = torch.randint(0, 40, (3000,), generator=torch.Generator().manual_seed(0))
    options = dict(
        tokens=tokens[:2500],
        val_tokens=tokens[2500:],
        vocab_size=64,
        size="mini",
        steps=3,
        warmup=1,
        seq_len=16,
        batch=2,
        eval_every=0,
    )
    first, again, other = (experiments.run_text("ddl", seed, **options) for seed in (0, 0, 1))
    assert first["val_loss"] == again["val_loss"] != other["val_loss"]
    assert len(first["gates"]) == 4 and experiments.run_text("add", 0, **options)["gates"] == []


def test_validation_windows_predict_each_token_once():
    rows = experiments.validation_windows(torch.arange(33), 8)
    assert rows.shape == (4, 9) and torch.equal(rows[:, 1:].flatten(), torch.arange(1, 33))
    with pytest.raises(ValueError, match="tokens: expected at least 9"):
        experiments.validation_windows(torch.arange(8), 8)


def test_refusals():
    with pytest.raises(ValueError, match="arm"):
        experiments.run_parity("fulll", 0)
    with pytest.raises(ValueError, match="depth"):
        experiments.run_parity("full", 0, test_depths=(0,))
    with pytest.raises(ValueError, match="mode"):
        experiments.run_oscillation("full", 0, mode="spin")
    with pytest.raises(ValueError, match="arm"):
        experiments.run_digits("plus", 0)
    with pytest.raises(ValueError, match="size"):
        experiments.build_text_model("ddl", "huge", vocab_size=64)
    with pytest.raises(ValueError, match="finite validation loss for add"):
        experiments.best_settings([{"arm": "add", "lr": 1e-3, "val_loss": None}])
