"""Trials of the chapter on a scale that means nothing: what they return, that they repeat, what they refuse."""

import math

import pytest
import torch

from papers10.avatar_forcing import experiments as trials

TINY = trials.Scale(steps=3, train_clips=6, train_frames=90, eval_clips=3, eval_frames=90, batch_size=3, hidden=16, num_steps=2)
FEW = trials.Preference(base_steps=3, steps=2, losers=4)


def test_every_arm_is_a_configuration():
    for arm in trials.ARMS:
        config, options = trials.arm_config(arm, TINY)
        assert config.hidden == 16 and options == {"objective": "diffusion_forcing", "stiff": 0.5}
        # What a stream can see of conditions is what a training window showed.
        assert config.condition_memory <= config.window_frames - config.block_size
    assert trials.arm_config("base+ar+expressive", TINY)[1] == {"objective": "ar", "stiff": 0.0}


def test_a_trial_measures_clip_by_clip_and_repeats():
    first = trials.quality_trial("base", 100, TINY)
    assert set(first) == {"items", "sets", "profile"} and set(first["items"]) == set(trials.MEASURES) and set(first["sets"]) == set(trials.SETS)
    assert set(first["items"]["lip"]) == {"0", "1", "2"} and len(first["profile"]) == 10
    assert all(math.isfinite(value) for values in first["items"].values() for value in values.values())
    for cached in (trials.trained, trials.quality_trial):
        cached.cache_clear()
    again = trials.quality_trial("base", 100, TINY)
    assert again["items"] == first["items"]
    assert trials.quality_trial("base", 101, TINY)["items"] != first["items"]


def test_recorded_avatars_are_the_ceiling():
    found = trials.truth(TINY)
    assert found["sets"]["rpcc_exp"] == 0 and min(found["items"]["lip"].values()) > 0.99


def test_tuning_leaves_its_base_alone():
    base = {name: value.clone() for name, value in trials.trained("base", 100, TINY).state_dict().items()}
    results = {arm: trials.preference_trial(arm, 100, TINY, FEW) for arm in trials.PREFERENCE_ARMS}
    assert all(torch.equal(value, base[name]) for name, value in trials.trained("base", 100, TINY).state_dict().items())
    assert results["dpo"]["items"] != results["control_steps"]["items"] != results["base"]["items"]
    assert {"implicit_accuracy", "margin"} <= set(results["dpo"]["sets"])


def test_long_streams_windows_and_guidance():
    for arm in ("anchored", "ar"):
        found = trials.horizon_trial(arm, 100, TINY, frames=400, clips=2)
        assert set(found["items"]) >= {"drift_first", "drift_last", "lip_last"} and set(found["items"]["drift_last"]) == {"0", "1"}
    for arm in trials.BASELINE_ARMS:
        assert set(trials.baseline_trial(arm, 100, TINY)["items"]) == set(trials.MEASURES)
    assert trials.guidance_trial("independent", 100, TINY)["items"] == trials.quality_trial("base", 100, TINY)["items"]


def test_exactness_and_waiting():
    found = trials.exact_trial("frame_lookahead_3", 100, frames=40)
    assert found["offset"] == 4 and found["exact"] < 1e-12 < found["paper"]
    waits = {arm: trials.latency_trial(arm, 100, blocks=3) for arm in ("blocks_5", "window_75")}
    assert waits["blocks_5"]["accumulate"] == 0.2 and waits["window_75"]["accumulate"] == 3.0
    assert all(abs(one["total"] - one["accumulate"] - one["generate"]) < 1e-12 for one in waits.values())


@pytest.mark.parametrize(
    "attempt, words",
    [
        (lambda: trials.arm_config("bas"), "base"),
        (lambda: trials.arm_config("base+sharp"), "expressive"),
        (lambda: trials.preference_trial("control", 100, TINY, FEW), "control_steps"),
        (lambda: trials.horizon_trial("anchor", 100, TINY), "anchored"),
        (lambda: trials.baseline_trial("infp", 100, TINY), "infp_like"),
        (lambda: trials.guidance_trial("both", 100, TINY), "joint"),
        (lambda: trials.norm_trial("l2", 100, TINY), "l2_mixed"),
        (lambda: trials.latency_trial("blocks_10", 100, blocks=1), "blocks"),
    ],
)
def test_what_does_not_fit_is_refused(attempt, words):
    with pytest.raises(ValueError, match=words):
        attempt()
