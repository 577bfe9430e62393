"""The trials: reproducible, with the numbers that the claims name, refusals."""

import pytest

from papers10.core import claims, presets
from papers10.taming_hallucinations import experiments as trials

TINY = trials.Scale(
    train_pairs=120,
    test_pairs=60,
    base_steps=10,
    sft_steps=4,
    start_steps=2,
    rl_steps=2,
    pairs_per_step=4,
    generations=4,
)


@pytest.mark.filterwarnings("ignore:dynamic sampling")
@pytest.mark.parametrize("arm", ["start", "grpo_samples", "dna_halve"])
def test_a_policy_trial_is_a_function_of_its_seed(arm):
    first = trials.policy_trial.__wrapped__(arm, 1, TINY)
    trials.start_of.cache_clear()
    trials.base_of.cache_clear()
    assert trials.policy_trial.__wrapped__(arm, 1, TINY) == first
    assert first != trials.policy_trial.__wrapped__(arm, 2, TINY)


def test_rehearsal_differs_from_paired_and_base_stays():
    numbers = {arm: trials.data_trial(arm, 0, TINY) for arm in trials.DATA_ARMS}
    assert numbers["rehearsed"] != numbers["paired"] != numbers["base"]
    assert all(0 <= value <= 1 for found in numbers.values() for value in found.values())


def test_the_signal_trial_fits_to_rounding():
    found = trials.signal_trial("uniform", 3, pairs=200)
    assert found["curve_error"] < 1e-5 and found["scale_error"] < 1e-9 and found["harmonic_error"] < 1e-9


def test_a_gradient_trial_has_both_branches():
    found = trials.gradient_trial("dna", 0, TINY, pairs=20)
    assert found["real"] > 0 and found["cf"] > 0 and found["ratio"] >= 1


def test_a_filter_trial_counts_shares():
    found = trials.filter_trial("planted", 0, TINY)
    assert all(0 <= value <= 1 for value in found.values())


def test_the_pipeline_keeps_what_it_promises_on_drawn_clips():
    found = trials.forge_trial("drawn", 2, pairs=3)
    assert found["leaked"] == 0 and found["flipped"] == 1 and 1 <= found["kept"] <= found["tried"]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: trials.data_trial("both", 0, TINY), "arm"),
        (lambda: trials.policy_trial("ppo", 0, TINY), "arm"),
        (lambda: trials.forge_trial("films", 0), "arm"),
        (lambda: trials.clips_of(0, TINY, "valid"), "part"),
    ],
)
def test_unknown_arms_are_refused(call, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        call()


def test_the_presets_sizes_are_those_of_the_trials():
    small = presets.resolve("taming-hallucinations", "small")
    scale = trials.Scale()
    pairs = {
        "train_pairs": "train_pairs",
        "test_pairs": "test_pairs",
        "frames": "n_frames",
        "size": "size",
        "noise": "noise",
        "base_steps": "base_steps",
    }
    pairs |= {
        "sft_steps": "sft_steps",
        "sft_lr": "sft_lr",
        "start_steps": "start_steps",
        "rl_steps": "rl_steps",
        "rl_lr": "rl_lr",
    }
    pairs |= {"pairs_per_step": "rl_pairs_per_step", "generations": "num_generations"}
    assert {name: getattr(scale, name) for name in pairs} == {name: small[other] for name, other in pairs.items()}


def test_every_metric_that_a_claim_names_comes_from_a_trial():
    arms = {
        "data": trials.DATA_ARMS,
        "policy": trials.POLICY_ARMS,
        "scopes": trials.POLICY_ARMS,
        "off_policy": trials.POLICY_ARMS,
        "matched": trials.POLICY_ARMS,
        "signal": ("uniform",),
        "gradient": ("pairs", "dna"),
        "filter": ("planted",),
        "forge": ("drawn", "real"),
    }
    for claim in claims.load("taming-hallucinations"):
        for test in claim.tests.values():
            for name in claims.metric_names(test.expr) if test.expr else ():
                experiment, arm, _ = name.split(".")
                assert arm in arms[experiment], name
