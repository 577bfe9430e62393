"""The experiments in a few steps: sizes, repeatability, what they return."""

import pytest
import torch

from papers10.core import presets
from papers10.fast_weight_pkm import full_scale, needles, texts
from papers10.fast_weight_pkm.model import memories


def test_arms_have_the_same_number_of_parameters():
    counts = {arm: needles._parameters(needles.needle_config(arm)) for arm in needles.NEEDLE_ARMS}
    assert max(counts.values()) / min(counts.values()) < 1.01
    counts = {arm: needles._parameters(texts.text_config(arm)) for arm in texts.TEXT_ARMS}
    assert max(counts.values()) / min(counts.values()) < 1.01


def test_needles_in_three_steps_repeat():
    options = dict(steps=3, batch=4, length=48, test_lengths=(48, 64), samples=4)
    first = needles.run_needles("fwpkm", 0, **options)
    needles._trained.cache_clear()
    assert needles.run_needles("fwpkm", 0, **options) == first
    assert set(first["accuracy"]) == set(first["off"]) == {"48", "64"} and first["gate"] is not None
    other = needles.run_needles("full-attention", 0, **options)
    assert other["off"] == {} and other["gate"] is None
    with pytest.raises(ValueError, match="did you mean"):
        needles.run_needles("fwpk", 0)


@pytest.mark.parametrize("arm", [arm for arm in needles.NEEDLE_ARMS if arm not in ("fwpkm", "none", "full-attention")])
def test_every_arm_trains(arm):
    result = needles.run_needles(arm, 0, steps=2, batch=2, length=48, test_lengths=(48,), samples=2, writes_off=False)
    assert result["loss"] is not None and 0 <= result["accuracy"]["48"] <= 1


def test_reading_counts_passes_and_depths():
    result = needles.run_reading(0, steps=2, length=48, reads=(1, 2), test_lengths=(64,), samples=6, depths=3)
    assert set(result["reads"]["64"]) == {"1", "2"} and len(result["depth"]["64"]["1"]) == 3


def test_text_and_domains_in_two_steps():
    result = texts.run_text("fwpkm", 0, steps=2, batch=2, length=64, rows=2, test_length=256, segment=64)
    assert result["off"] is not None and len(result["by_place"]) == 8 and set(result["gates"]) == {"1", "2"}
    assert texts.run_text("none", 0, steps=2, batch=2, length=64, rows=2, test_length=256, segment=64)["off"] is None
    history = texts.run_domains(0, steps=2, batch=2, window=64, length=256, test_length=64, rows=1)
    assert all(len(row) == 3 for row in history.values())


def test_measuring_domains_leaves_the_model_alone():
    model = texts.text_model("fwpkm", 0, steps=2, batch=2, length=64)
    before = [memory.values.clone() for memory in memories(model)]
    texts.run_domains(0, steps=2, batch=2, window=64, length=256, test_length=64, rows=1)
    assert all(torch.equal(a, memory.values) for a, memory in zip(before, memories(model)))


def test_the_paper_preset_is_the_papers_training():
    p = presets.resolve("fast-weight-pkm", "paper")
    settings = full_scale.with_arm(full_scale.from_parameters(p, device="cuda"), "gdn+swa/fwpkm@2,6,10", 1)
    default = full_scale.FullScale(device="cuda", seed=1)
    same = ("backbone", "memory", "size", "steps", "lr", "warmup", "weight_decay", "seq_len", "global_batch", "micro_batch", "dataset", "mix", "tokenizer", "val_tokens", "value_step",
            "state_mode", "niah_lengths", "niah_iters", "niah_samples", "stream_tokens", "pile_domains")
    assert {name: getattr(settings, name) for name in same} == {name: getattr(default, name) for name in same}
    assert set(p["arms"]) <= {*full_scale.PAPER_ARMS, *full_scale.ABLATION_ARMS}
