"""Arms of a comparison: equal weights, causality, windows, the INFP-like model."""

import math

import pytest
import torch

from papers10.avatar_forcing import baselines as bl
from papers10.avatar_forcing.data import DyadicConversation
from papers10.avatar_forcing.model import STREAMS, AvatarForcingConfig, AvatarForcingModel
from papers10.avatar_forcing.training import diffusion_forcing_loss
from papers10.core.random import generator

SMALL = AvatarForcingConfig(hidden=32, audio_dim=16, num_layers=1)


@pytest.fixture(scope="module")
def data():
    return DyadicConversation(6, 100, seed=3).tensors()


@pytest.fixture(scope="module")
def arms():
    return bl.baselines(SMALL, windows=(20, 30))


def awake(model, scale=0.2):
    """Random weights everywhere, so that gates and output are open; float64."""
    draw = generator(0, "awake")
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model


def clip(data, count=2, frames=70):
    return {name: data[name][:count, :frames].double() for name in STREAMS}, data["avatar_motion"][:count, 0].double()


def test_weights_agree():
    for config in (AvatarForcingConfig(), AvatarForcingConfig.paper()):
        arms = bl.baselines(config)
        counts = {name: bl.parameter_count(lambda arm=arm: (bl.InfpLike if arm.memory else AvatarForcingModel)(arm.config)) for name, arm in arms.items()}
        assert all(abs(count / counts["avatar_forcing"] - 1) <= 0.02 for count in counts.values())
    assert counts["avatar_forcing"] == 153_484_288


def test_waiting_times():
    arms = bl.baselines()
    assert {name: arm.wait_seconds for name, arm in arms.items()} == {
        "avatar_forcing": 0.4, "no_user_motion": 0.4, "frame_causal": 0.4, "block_causal": 0.4, "ar_diffusion": 0.4, "windows": 2.0, "infp_like": 3.0,
    }  # fmt: skip
    assert bl.BidirectionalWindows(arms["infp_like"].build()).wait_seconds == 3.0


def test_configurations():
    assert set(bl.strict_masks()) == {"frame_causal", "block_causal", "block_frame_lookahead"} and bl.strict_masks(SMALL)["block_causal"].hidden == 32
    assert not bl.without_user_motion(SMALL).use_user_motion and SMALL.use_user_motion
    made = bl.bidirectional_config(SMALL, window=75)
    assert (made.mask, made.condition_mask, made.window_frames, made.block_size) == ("full", "full", 85, 5)
    assert bl.bidirectional_config(SMALL, window=3, context=0).window_frames == 3 and bl.bidirectional_config(SMALL, window=7, context=2).lookahead == 1


@pytest.mark.parametrize("name", ["avatar_forcing", "no_user_motion", "frame_causal", "block_causal", "ar_diffusion", "windows", "infp_like"])
def test_every_arm_trains_and_generates(arms, data, name):
    arm = arms[name]
    model = arm.build(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = {key: value.clone() for key, value in data.items()}
    history = arm.trainer(model, data, steps=3, batch_size=4, log_every=1).train()
    assert all(math.isfinite(record["loss"]) for record in history.records if "loss" in record)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(kept[key], value) for key, value in data.items())
    streams = {stream: data[stream][:2, :45] for stream in STREAMS}
    options = {"num_steps": 2, "cfg_audio": 1.5, "cfg_user": 1.0, "seed": 4}
    motion = arm.generate(model, data["avatar_motion"][:2, 0], **streams, **options)
    assert motion.shape == (2, 45, 8) and bool(motion.isfinite().all())
    assert torch.equal(motion, arm.generate(model, data["avatar_motion"][:2, 0], **streams, **options))


def test_windows_need_their_own_future_and_nothing_after_it(arms, data):
    arm = arms["infp_like"]
    model, (streams, ref) = awake(arm.build(0)), clip(data)
    noise = torch.randn(2, 70, 8, generator=generator(0, "noise")).double()
    run = lambda given: arm.generate(model, ref, **given, noise=noise, num_steps=2)
    plain = run(streams)
    for at, first in ((29, 0), (30, 30), (59, 30)):
        changed = {**streams, "user_audio": streams["user_audio"].clone()}
        changed["user_audio"][:, at] += 1.0
        difference = (run(changed) - plain).abs().amax((0, 2))
        assert float(difference[first : first + 30].max()) > 1e-8
        assert float(difference[:first].max() if first else 0.0) < 1e-12


def test_streams_never_need_a_later_block(arms, data):
    arm = arms["block_causal"]
    model, (streams, ref) = awake(arm.build(0)), clip(data)
    plain = arm.generate(model, ref, **streams, num_steps=2)
    changed = {name: stream.clone() for name, stream in streams.items()}
    for stream in changed.values():
        stream[:, 30:] += 1.0
    assert torch.equal(arm.generate(model, ref, **changed, num_steps=2)[:, :30], plain[:, :30])


def test_infp_like_is_blind_to_silent_smiles(arms, data):
    arm = arms["infp_like"]
    model, (streams, ref) = awake(arm.build(0)), clip(data)
    moved = {**streams, "user_motion": streams["user_motion"] + 1.0}
    heard = {**streams, "user_audio": streams["user_audio"] + 1.0}
    plain = arm.generate(model, ref, **streams, num_steps=2)
    assert torch.equal(arm.generate(model, ref, **moved, num_steps=2), plain)
    assert not torch.equal(arm.generate(model, ref, **heard, num_steps=2), plain)


def test_blind_arms(arms, data):
    streams, ref = clip(data)
    moved = {**streams, "user_motion": streams["user_motion"] + 1.0}
    for name in ("no_user_motion", "windows"):
        model = awake(arms[name].build(0))
        assert torch.equal(arms[name].generate(model, ref, **moved, num_steps=2), arms[name].generate(model, ref, **streams, num_steps=2))
    model = awake(arms["avatar_forcing"].build(0))
    assert not torch.equal(arms["avatar_forcing"].generate(model, ref, **moved, num_steps=2), arms["avatar_forcing"].generate(model, ref, **streams, num_steps=2))


def test_later_windows_continue_from_the_past(arms, data):
    arm = arms["windows"]
    model, (streams, ref) = awake(arm.build(0)), clip(data)
    noise = torch.randn(2, 70, 8, generator=generator(1, "noise")).double()
    other = noise.clone()
    other[:, 15] += 1.0  # within the context of the second window
    windows = bl.BidirectionalWindows(model, context=10, user=False)
    a, b = (windows.generate(ref, **streams, noise=n, num_steps=2) for n in (noise, other))
    assert float((a - b)[:, 20:40].abs().max()) > 1e-8
    alone = bl.BidirectionalWindows(model, window=20, context=0, user=False)
    a, b = (alone.generate(ref, **streams, noise=n, num_steps=2) for n in (noise, other))
    assert torch.equal(a[:, 20:], b[:, 20:])


def test_short_and_empty_clips(arms, data):
    model = arms["infp_like"].build(0)
    ref = data["avatar_motion"][:1, 0]
    assert arms["infp_like"].generate(model, ref, data["avatar_audio"][:1, :7], num_steps=1).shape == (1, 7, 8)
    assert arms["infp_like"].generate(model, ref, frames=0, num_steps=1).shape == (1, 0, 8)


def test_ar_objective_counts_the_last_block(data):
    model = AvatarForcingModel(SMALL)
    motion, streams, ref = data["avatar_motion"][:2, :50], {name: data[name][:2, :50] for name in STREAMS}, data["avatar_motion"][:2, 0]
    noise = torch.randn(motion.shape, generator=generator(0, "n"))
    ours = bl.ar_objective(model, motion, streams, ref, noise=noise, drop=False, generator=generator(0, "t"))
    # A fresh model predicts zero, so the loss is the size of the target in the noisy block.
    assert ours.item() == pytest.approx(float((motion - noise)[:, -10:].abs().mean()), rel=1e-5)
    assert diffusion_forcing_loss(model, motion, streams, ref, noise=noise, drop=False).item() == pytest.approx(float((motion - noise).abs().mean()), rel=1e-5)


def test_window_trainer_counts_the_window(data):
    config = bl.bidirectional_config(SMALL, window=20)
    model = AvatarForcingModel(config)
    batch = {"motion": data["avatar_motion"][:4, :30], **{name: data[name][:4, :30] for name in STREAMS}, "ref": data["avatar_motion"][:4, 0]}
    with_past = bl.WindowTrainer(model, iter([batch]), steps=1, first=0.0)
    changed = {**batch, "motion": batch["motion"].clone()}
    changed["motion"][:, :10] += 5.0  # the context has no part in the loss of a model that predicts zero
    losses = [float(bl.WindowTrainer(model, iter([b]), steps=1, first=0.0)._step(with_past.state, b)["loss"]) for b in (batch, changed)]
    assert losses[0] == losses[1]
    losses = [float(bl.WindowTrainer(model, iter([b]), steps=1, first=1.0)._step(with_past.state, b)["loss"]) for b in (batch, changed)]
    assert losses[0] < losses[1]


def test_guider_mixes_memories():
    guider = bl.MotionGuider(8, 16, memories=4)
    with torch.no_grad():
        guider.query_verbal.weight.zero_()
        guider.query_verbal.bias.zero_()  # equal weights: the mean of the values
        guider.verbal[1] = torch.arange(4.0)[:, None]
        guider.nonverbal[1] = 0.0
        guider.to_condition.weight.copy_(torch.eye(16)[:, :8])
        guider.to_condition.bias.zero_()
    voice = torch.linspace(-1, 1, 8).expand(1, 2, 8)
    wanted = torch.nn.functional.silu(torch.nn.functional.layer_norm(voice + 1.5, (8,)))
    assert torch.allclose(guider(voice, torch.zeros(1, 2, 3), voice)[..., :8], wanted, atol=1e-6)


def test_infp_like_round_trip(tmp_path):
    model = bl.InfpLike(bl.bidirectional_config(SMALL, window=30))
    again = bl.InfpLike.from_pretrained(model.save_pretrained(tmp_path))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda a: bl.bidirectional_config(SMALL, window=0), "window"),
        (lambda a: bl.bidirectional_config(SMALL, context=-1), "context"),
        (lambda a: bl.InfpLike(SMALL), "mask"),
        (lambda a: bl.MotionGuider(8, 8, memories=0), "memories"),
        (lambda a: bl.MotionGuider(8, 8)(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8), torch.zeros(1, 2, 8)), "user_audio"),
        (lambda a: bl.MotionGuider(8, 8)(torch.zeros(1, 2, 8), None, torch.zeros(1, 2, 8), cache=object()), "cache"),
        (lambda a: bl.match_parameters(SMALL, 100), "count"),
        (lambda a: bl.BidirectionalWindows(a["windows"].build(), window=0), "window"),
        (lambda a: bl.WindowTrainer(a["windows"].build(), {}, steps=1, context=99), "context"),
        (lambda a: bl.WindowTrainer(a["windows"].build(), {}, steps=1, first=2.0), "first"),
        (lambda a: a["infp_like"].generate(a["infp_like"].build(), torch.zeros(1, 8), frames=5, noise=torch.zeros(1, 4, 8)), "noise"),
        (lambda a: a["infp_like"].generate(a["infp_like"].build(), torch.zeros(1, 8), torch.zeros(1, 5, 3)), "avatar_audio"),
    ],
)
def test_bad_input(arms, call, word):
    with pytest.raises(ValueError, match=word):
        call(arms)
