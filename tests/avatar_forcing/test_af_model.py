"""Conditions, generator, diffusion forcing: shapes, rules, known values, what is refused."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.avatar_forcing.conditions import DualMotionEncoder
from papers10.avatar_forcing.model import STREAMS, AvatarForcingConfig, AvatarForcingModel, build_model
from papers10.avatar_forcing.training import (
    MotionTrainer,
    diffusion_forcing_loss,
    drop_conditions,
    random_windows,
    sample_block_times,
    train_motion,
    velocity_error,
)
from papers10.core.config import ConfigError

SMALL = AvatarForcingConfig.small(hidden=16, audio_dim=8, condition_heads=2)


def streams(n=2, frames=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, frames, width, generator=generator) for name, width in zip(STREAMS, (4, 4, 8))}


def clips(count=6, frames=60):
    return {**streams(count, frames), "avatar_motion": torch.randn(count, frames, 8, generator=torch.Generator().manual_seed(1))}


def opened(config=SMALL):
    model, generator = build_model(config).eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in (model.generator.modulation.linear, model.generator.final.linear, model.generator.final.modulation.linear):
            layer.weight.normal_(std=0.3, generator=generator)
    return model


def test_sizes_of_the_released_model():
    with torch.device("meta"):
        model = AvatarForcingModel(AvatarForcingConfig.paper())
    assert sum(p.numel() for p in model.parameters()) == 153_484_288
    assert sum(p.numel() for p in model.audio_projection.parameters()) == 4_720_128


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"window_frames": 45}, "multiple of block_size"),
        ({"lookahead": 11}, "lookahead"),
        ({"num_heads": 3}, "num_heads"),
        ({"mask": "frame_lokahead"}, "mask"),
        ({"blocksize": 5}, "block_size"),
        ({"norm": "l3"}, "norm"),
        ({"condition_dropout": 1.5}, "condition_dropout"),
    ],
)
def test_configurations_are_checked(changes, words):
    with pytest.raises((ConfigError, ValueError), match=words):
        AvatarForcingConfig.small(**changes)


@pytest.mark.parametrize(
    "mode, layers, offset",
    [
        ("frame_lookahead", 1, 0), ("frame_lookahead", 2, 2), ("frame_lookahead", 8, 14), ("frame_causal", 1, 0), ("frame_causal", 8, 2), ("block_causal", 2, 2), ("block_causal", 3, 10),
        ("block_causal", 8, 10), ("block_frame_lookahead", 3, 4), ("block_frame_lookahead", 8, 10), ("block_lookahead", 3, 20), ("block_lookahead", 8, 70), ("eq5_literal", 3, 40),
    ],
)  # fmt: skip
def test_exact_offsets(mode, layers, offset):
    assert AvatarForcingConfig.small(mask=mode, num_layers=layers).exact_offset() == offset


def test_windows_have_no_exact_offset():
    with pytest.raises(ValueError, match="full"):
        AvatarForcingConfig.small(mask="full").exact_offset()


def test_a_fresh_model_predicts_zero_and_changes_nothing():
    model, given_streams = build_model(SMALL), streams()
    kept = {name: stream.clone() for name, stream in given_streams.items()}
    x, t, ref = torch.randn(2, 30, 8), torch.rand(2, 30), torch.randn(2, 8)
    assert torch.equal(model(x, t, ref, **given_streams, keep={"user_audio": torch.zeros(2)}), torch.zeros(2, 30, 8))
    assert all(torch.equal(kept[name], stream) for name, stream in given_streams.items())


@settings(max_examples=12, deadline=None)
@given(frame=st.integers(0, 29), mode=st.sampled_from(["frame_causal", "block_causal", "frame_lookahead", "block_frame_lookahead"]))
def test_nothing_beyond_the_look_ahead_matters(frame, mode):
    config = SMALL.model_copy(update={"mask": mode, "num_layers": 2})
    model, other = opened(config), torch.randn(1, 30, 8)
    x, t, ref, cond = torch.randn(1, 30, 8), torch.rand(1, 30), torch.randn(1, 8), torch.randn(1, 30, 16)
    changed = x.clone()
    changed[:, frame:] = other[:, frame:]
    reach = {"frame_causal": 0, "frame_lookahead": 4}.get(mode)
    safe = frame // 10 * 10 if reach is None else max(0, frame - reach)
    with torch.no_grad():
        first, second = model.velocity(x, t, cond, ref), model.velocity(changed, t, cond, ref)
    torch.testing.assert_close(first[:, :safe], second[:, :safe], rtol=0, atol=1e-6)
    assert not torch.equal(first[:, frame], second[:, frame])


def test_a_dropped_stream_is_a_missing_one():
    model, given_streams = opened(), streams()
    for name in STREAMS:
        missing = model.conditions(**given_streams | {name: None})
        dropped = model.conditions(**given_streams, keep={name: torch.tensor([0.0, 1.0])})
        torch.testing.assert_close(dropped[0], missing[0])
        torch.testing.assert_close(dropped[1], model.conditions(**given_streams)[1])


def test_conditions_of_a_stream_in_pieces():
    encoder = DualMotionEncoder(8, 8, 16, memory=13).double()
    given_streams = {"user_audio": torch.randn(1, 90, 8).double(), "user_motion": torch.randn(1, 90, 8).double(), "avatar_audio": torch.randn(1, 90, 8).double()}
    whole, cache = encoder(**given_streams), encoder.new_cache()
    parts = []
    for start, length in ((0, 20), (20, 10), (30, 40), (70, 20)):
        rows = slice(start, start + length)
        parts.append(encoder(**{name: stream[:, rows] for name, stream in given_streams.items()}, start=start, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    with pytest.raises(ValueError, match="whole blocks"):
        encoder(**{name: stream[:, :5] for name, stream in given_streams.items()}, start=90, cache=cache)
    with pytest.raises(ValueError, match="block_causal"):
        DualMotionEncoder(8, 8, 16, mask="full").new_cache()


def test_gradients_reach_every_parameter():
    model, data = opened(SMALL), clips()
    loss = diffusion_forcing_loss(model.train(), data["avatar_motion"][:, :50], {name: data[name][:, :50] for name in STREAMS}, data["avatar_motion"][:, 0], generator=torch.Generator().manual_seed(0))
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Adding the same number to every key changes no softmax, and a bias before a LayerNorm over it may cancel.
    assert all("bias" in name for name in silent), silent


def test_known_values_of_the_flow():
    clean, noise = torch.full((1, 10, 8), 2.0), torch.full((1, 10, 8), -1.0)
    model = build_model(SMALL)
    for norm, expected in {"l1": 3.0, "l2": 9.0, "huber": 2.5}.items():
        loss = diffusion_forcing_loss(model, clean, {}, clean[:, 0], norm=norm, drop=False, times=torch.full((1, 10), 0.25), noise=noise)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    error = velocity_error(model, clean, {}, clean[:, 0], torch.full((1, 10), 0.5), noise)
    assert error.shape == (1, 10) and torch.allclose(error, torch.tensor(3.0))


def test_levels():
    times = sample_block_times(500, 4, 5, torch.Generator().manual_seed(0))
    blocks = times.unflatten(1, (4, 5))
    assert torch.equal(blocks, blocks[..., :1].expand_as(blocks)) and 0.45 < float(times.mean()) < 0.55
    assert abs(float(torch.corrcoef(blocks[..., 0].T)[0, 1])) < 0.15
    ar = sample_block_times(7, 4, 5, objective="ar")
    assert torch.equal(ar[:, :15], torch.ones(7, 15)) and not torch.equal(ar[:, 15:], torch.ones(7, 5))
    window = sample_block_times(7, 4, 5, objective="window")
    assert torch.equal(window, window[:, :1].expand_as(window))


def test_shares_of_dropped_conditions():
    for scheme, expected in {"independent": (0.729, 0.009, 0.081, 0.001), "branches": (0.7, 0.1, 0.1, 0.1)}.items():
        kept = drop_conditions(100_000, scheme, 0.1, torch.Generator().manual_seed(0))
        a, ua, um = (kept[name].bool() for name in STREAMS)
        shares = [(a & ua & um), (a & ~ua & ~um), (~a & ua & um), (~a & ~ua & ~um)]
        assert [float(share.float().mean()) for share in shares] == pytest.approx(expected, abs=0.006)


def test_ar_counts_the_last_block_only():
    data, model = clips(), opened()
    window = {name: stream[:, :50] for name, stream in data.items()}
    options = dict(drop=False, objective="ar", reduction="none", generator=torch.Generator().manual_seed(0))
    assert diffusion_forcing_loss(model, window["avatar_motion"], window, window["avatar_motion"][:, 0], **options).shape == (6, 10)


def test_windows_are_cut_alike():
    data = {name: torch.arange(60.0)[None, :, None].expand(3, 60, width) for name, width in (("avatar_motion", 8), ("avatar_audio", 4), ("user_audio", 4), ("user_motion", 8))}
    batch = random_windows(data, 5, 50, torch.Generator().manual_seed(0))
    assert torch.equal(batch["motion"][..., 0], batch["user_audio"][..., 0]) and torch.equal(batch["ref"], batch["motion"][:, 0])
    assert torch.equal(batch["motion"].diff(dim=1), torch.ones(5, 49, 8))


def test_training_goes_on_after_a_stop(tmp_path):
    data = clips(8, 60)
    options = dict(batch_size=4, lr=1e-3, warmup=2, log_every=1)
    whole, history = train_motion(SMALL, data, steps=8, folder=tmp_path / "whole", save_every=2, **options)

    class Stop(Exception):
        pass

    trainer = MotionTrainer(build_model(SMALL), data, steps=8, folder=tmp_path / "cut", save_every=2, **options)
    step, calls = trainer._step, []

    def stopping(state, batch):
        calls.append(1)
        if len(calls) == 6:
            raise Stop
        return step(state, batch)

    trainer._step = stopping
    with pytest.raises(Stop):
        trainer.train()
    again, resumed = train_motion(SMALL, data, steps=8, folder=tmp_path / "cut", save_every=2, **options)
    assert resumed.resumed_from == 4 and len(history.records) == 8
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_averaged_weights_and_mixed_precision():
    data = clips(8, 60)
    plain, _ = train_motion(SMALL, data, steps=4, batch_size=4)
    averaged, history = train_motion(SMALL, data, steps=4, batch_size=4, ema=0.9, amp="bf16", accumulate=2)
    assert history.records[-1]["loss"] > 0 and not torch.equal(plain.generator.embed.weight, averaged.generator.embed.weight)


def test_files(tmp_path):
    model = opened()
    model.save_pretrained(tmp_path / "model")
    again = AvatarForcingModel.from_pretrained(tmp_path / "model")
    assert again.config == model.config and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"hidden": 32}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        AvatarForcingModel.from_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="config.json"):
        AvatarForcingModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "attempt, error, words",
    [
        (lambda m, s: m.conditions(s["avatar_audio"][..., :3]), ValueError, "avatar_audio: expected shape"),
        (lambda m, s: m.conditions(s["avatar_audio"], s["user_audio"][:1]), ValueError, "user_audio: expected 2 clips"),
        (lambda m, s: m.conditions(s["avatar_audio"], user_motion=s["user_motion"][:, :20]), ValueError, "user_motion: expected 2 clips of 30 frames"),
        (lambda m, s: m.conditions(), ValueError, "at least one"),
        (lambda m, s: m.conditions(s["avatar_audio"] / 0), ValueError, "avatar_audio: expected finite numbers, got others from frame 0"),
        (lambda m, s: m.conditions(**s, keep={"motion": torch.ones(2)}), ValueError, "keep"),
        (lambda m, s: m.velocity(torch.zeros(2, 30, 7), torch.ones(2, 30), None, torch.zeros(2, 8)), ValueError, "x, ref"),
        (lambda m, s: m.velocity(torch.zeros(2, 30, 8), torch.ones(2, 29), torch.zeros(2, 30, 16), torch.zeros(2, 8)), ValueError, "t: expected shape"),
        (lambda m, s: m.velocity(torch.zeros(2, 30, 8), torch.full((2, 30), 1.2), torch.zeros(2, 30, 16), torch.zeros(2, 8)), ValueError, r"\[0, 1\]"),
        (lambda m, s: m.velocity(torch.zeros(2, 30, 8), torch.ones(2, 30), torch.zeros(2, 30, 15), torch.zeros(2, 8)), ValueError, "cond: expected shape"),
        (lambda m, s: m.velocity(torch.zeros(2, 30, 8), torch.ones(2, 30), None, torch.zeros(2, 8)), ValueError, "cond: expected conditions"),
        (lambda m, s: diffusion_forcing_loss(m, s["user_motion"][:, :25], s, torch.zeros(2, 8)), ValueError, "multiple of block_size = 10"),
        (lambda m, s: diffusion_forcing_loss(m, s["user_motion"][:, :0], s, torch.zeros(2, 8)), ValueError, "at least one block"),
        (lambda m, s: diffusion_forcing_loss(m, s["user_motion"] * float("nan"), s, torch.zeros(2, 8)), ValueError, "motion: expected finite"),
        (lambda m, s: diffusion_forcing_loss(m, s["user_motion"], s, torch.zeros(2, 8), weight="bel"), ValueError, "weight"),
        (lambda m, s: sample_block_times(0, 5, 10), ValueError, "n: "),
        (lambda m, s: random_windows({"avatar_motion": torch.zeros(2, 40, 8)}, 2, 50), ValueError, "at least 50 frames"),
    ],
)
def test_what_does_not_fit_is_refused(attempt, error, words):
    with pytest.raises(error, match=words):
        attempt(opened(), streams())
