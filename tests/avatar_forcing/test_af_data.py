"""Conversations made by rule: draws, reactions, features, sound."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from papers10.avatar_forcing import data as af
from papers10.avatar_forcing.data import DyadicConversation, synthesize, to_motion, to_params


@pytest.fixture(scope="module")
def clips():
    return DyadicConversation(24, 200, seed=999)


def test_shapes_and_types(clips):
    tensors = clips.tensors()
    assert len(clips) == 24 and set(tensors) == {"avatar_motion", "user_motion", "avatar_audio", "user_audio"}
    for name, values in tensors.items():
        assert values.shape == (24, 200, 8 if "motion" in name else 4) and values.dtype == torch.float32 and bool(values.isfinite().all())
    item = clips[-1]
    assert torch.equal(item["avatar_motion"], tensors["avatar_motion"][23]) and item["clip_id"] == "dyad-999-23"


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_first_clips_do_not_depend_on_how_many_are_made(count, frames, seed):
    few, more = DyadicConversation(count, frames, seed), DyadicConversation(count + 2, frames, seed)
    assert all(torch.equal(values, more.tensors()[name][:count]) for name, values in few.tensors().items())


def test_another_seed_is_another_conversation():
    assert not torch.equal(DyadicConversation(1, 50, 0).tensors()["user_motion"], DyadicConversation(1, 50, 1).tensors()["user_motion"])


def test_share_of_stiff_listeners_changes_answers_only():
    mixed, none = DyadicConversation(12, 150, 5), DyadicConversation(12, 150, 5, stiff=0.0)
    for name in ("user_motion", "user_audio", "avatar_audio"):
        assert torch.equal(mixed.tensors()[name], none.tensors()[name])
    other = [k for k in range(8) if k not in (1, 5)]
    assert torch.equal(mixed.tensors()["avatar_motion"][..., other], none.tensors()["avatar_motion"][..., other])
    assert not any(none.meta(i)["stiff"] for i in range(12)) and all(DyadicConversation(12, 10, 5, stiff=1.0).meta(i)["stiff"] for i in range(12))


def test_the_avatar_answers_after_its_delay(clips):
    tensors = {name: to_params(values) if "motion" in name else values for name, values in clips.tensors().items()}
    for i in range(24):
        meta = clips.meta(i)
        delay, gain = meta["delay"], meta["gain"]
        assert delay in (7, 8, 9) and (0 <= gain <= 0.25 if meta["stiff"] else 0.8 <= gain <= 1.1)
        assert torch.allclose(tensors["avatar_motion"][i, delay:, 1], gain * tensors["user_motion"][i, :-delay, 1], atol=1e-5)


def test_truth_of_the_test_set(clips):
    user, avatar = clips.tensors()["user_motion"][:, :-8, 1].double(), clips.tensors()["avatar_motion"][:, 8:, 1].double()
    user, avatar = user - user.mean(1, keepdim=True), avatar - avatar.mean(1, keepdim=True)
    correlation = (user * avatar).sum(1) / (user.norm(dim=1) * avatar.norm(dim=1))
    assert float(correlation.mean()) == pytest.approx(0.99, abs=0.01)
    assert 0.5 < float((user * avatar).sum() / user.square().sum()) < 0.8


def test_lips_follow_the_own_voice(clips):
    for side in ("avatar", "user"):
        jaw = to_params(clips.tensors()[f"{side}_motion"])[..., 0]
        assert torch.allclose(jaw, 0.9 * clips.tensors()[f"{side}_audio"][..., 0], atol=1e-6)


def test_audio_features(clips):
    audio = clips.tensors()["avatar_audio"]
    assert float(audio[..., 0].min()) >= 0 and float(audio[..., 0].max()) <= 1
    assert torch.allclose(audio[:, 1:, 1], audio[..., 0].diff(dim=1), atol=1e-6)
    assert bool((audio[..., 2][audio[..., 0] <= 0.05] == 0).all())
    assert float(audio[..., 3].std()) == pytest.approx(0.05, rel=0.1)


def test_turns_and_events(clips):
    for i in range(24):
        meta = clips.meta(i)
        for side, name in enumerate(("avatar", "user")):
            assert bool((clips[i][f"{name}_audio"][meta["who"] != side, 0] == 0).all())
        for speaker, start, length in meta["turns"]:
            assert 25 <= length <= 74 and start + length > 0
            assert bool((meta["who"][max(start, 0) : start + length] == speaker).all())
        assert all(25 <= length <= 59 and 0.5 <= amplitude <= 1 for _, length, amplitude in meta["smiles"])
        assert all(length == 25 and 2 <= hertz <= 3 for _, length, _, hertz in meta["nods"])
        speakers = [speaker for speaker, _, _ in meta["turns"]]
        assert all(a != b for a, b in itertools.pairwise(speakers))


def test_smile_has_its_amplitude_in_the_middle(clips):
    found = 0
    for i in range(24):
        smile = to_params(clips[i]["user_motion"])[:, 1]
        for start, length, amplitude in clips.meta(i)["smiles"]:
            middle = start + length // 2
            if 0 <= middle < 200:
                assert float(smile[middle]) == pytest.approx(amplitude, abs=1e-5)
                found += 1
    assert found > 20


def test_scales_fit_what_does_not_depend_on_the_listener():
    motion = DyadicConversation(64, 150, 0).tensors()["avatar_motion"]
    deviations = motion.std((0, 1))
    for k in (0, 2, 3, 4, 6, 7):
        assert float(deviations[k]) == pytest.approx(1.0, abs=0.2)


def test_loader(clips):
    batch = next(iter(DataLoader(clips, batch_size=4, collate_fn=DyadicConversation.collate)))
    assert batch["avatar_motion"].shape == (4, 200, 8) and len(batch["meta"]) == 4 and batch["clip_id"][1] == "dyad-999-1"


def test_waveform_has_the_envelope(clips):
    talker = next(i for i in range(24) if float(clips[i]["avatar_audio"][:, 0].mean()) > 0.15)
    wave = clips.waveform(talker)
    assert wave.shape == (200 * 640,) and wave.dtype == torch.float32 and torch.equal(wave, clips.waveform(talker)) and not torch.equal(wave, clips.waveform(talker, "user"))
    loud = wave.reshape(200, 640).square().mean(1).sqrt()
    envelope = clips[talker]["avatar_audio"][:, 0]
    assert float(torch.corrcoef(torch.stack([loud, envelope]))[0, 1]) > 0.9
    assert float(loud[envelope == 0].median()) < 0.01 and float(wave.abs().max()) < 1


def test_pitch_and_harmonics():
    wave = synthesize(np.ones(25), np.zeros(25), base=125.0)
    spectrum = np.abs(np.fft.rfft(wave[640:-640] * np.hanning(len(wave) - 1280)))
    frequency = np.fft.rfftfreq(len(wave) - 1280, 1 / 16_000)
    at = lambda hertz: spectrum[np.abs(frequency - hertz) < 10].max()
    assert at(500) > 20 * at(562.5) and at(500) > at(1000) and at(1500) > at(1000)
    assert spectrum[frequency > 7700].max() < 0.01 * spectrum.max()


def test_motion_and_parameters_are_inverse():
    params = torch.randn(3, 5, 8, dtype=torch.float64)
    kept = params.clone()
    assert torch.allclose(to_params(to_motion(params)), params) and torch.equal(params, kept)
    assert torch.allclose(to_motion(params)[..., 2], params[..., 2] / af.SCALES[2].double()) and af.PARAMETERS[2] == "brow"


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda c: DyadicConversation(0, 10), ValueError, "num_clips"),
        (lambda c: DyadicConversation(1, 0), ValueError, "num_frames"),
        (lambda c: DyadicConversation(1.5, 10), TypeError, "num_clips"),
        (lambda c: DyadicConversation(1, True), TypeError, "num_frames"),
        (lambda c: DyadicConversation(1, 10, -1), ValueError, "seed"),
        (lambda c: DyadicConversation(1, 10, stiff=1.5), ValueError, "stiff"),
        (lambda c: c[24], IndexError, "24"),
        (lambda c: c["0"], TypeError, "i:"),
        (lambda c: c.meta(99), IndexError, "99"),
        (lambda c: c.waveform(0, "avatr"), ValueError, "avatar"),
        (lambda c: to_params(torch.zeros(3, 7)), ValueError, "motion"),
        (lambda c: to_motion(np.zeros((3, 8))), TypeError, "params"),
        (lambda c: to_motion(torch.zeros(8, dtype=torch.long)), TypeError, "params"),
        (lambda c: synthesize(np.ones(3), np.ones(4)), ValueError, "length"),
        (lambda c: synthesize(-np.ones(3), np.ones(3)), ValueError, "envelope"),
        (lambda c: synthesize(np.full(3, np.nan), np.ones(3)), ValueError, "finite"),
        (lambda c: synthesize(np.ones(3), np.ones(3), base=5.0), ValueError, "base"),
    ],
)
def test_bad_input(clips, call, error, word):
    with pytest.raises(error, match=word):
        call(clips)
