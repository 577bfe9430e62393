"""Speech with phoneme times: the synthesiser where it is installed, stored sentences, visemes, voice activity, spoken conversations."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.avatar_forcing import speech as sp
from papers10.avatar_forcing.audio import EnvelopeFeatures
from papers10.avatar_forcing.data import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, DyadicConversation, to_params
from papers10.avatar_forcing.metrics import lip_corr
from papers10.core.data import DataMissing, available, source

with_espeak = pytest.mark.skipif(not sp.have_espeak(), reason="espeak-ng is not installed")
with_silero = pytest.mark.skipif(not available("silero-vad"), reason="silero-vad is not installed")


@pytest.fixture(scope="module")
def spoken():
    return sp.recorded_speech()


@pytest.fixture(scope="module")
def talk(spoken):
    return sp.conversation_from_speech([("user", spoken["user"]), ("avatar", spoken["avatar"])], seed=3)


# The synthesiser


@with_espeak
def test_phonemes_tile_the_sentence_and_are_where_the_sound_is():
    spoken = sp.espeak("Papa, mama.", voice="en")
    assert spoken.sample_rate == SAMPLE_RATE and spoken.wave.dtype == torch.float32 and spoken.wave.abs().max() <= 1
    symbols = [symbol for symbol, _, _ in spoken.phonemes if symbol]
    assert symbols.count("p") == 2 and symbols.count("m") == 2
    for (_, _, end), (_, start, _) in zip(spoken.phonemes, spoken.phonemes[1:]):
        assert start == pytest.approx(end)
    assert spoken.phonemes[-1][2] == pytest.approx(spoken.seconds, abs=2e-3)

    def level(start, end):
        return float(spoken.wave[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)].std())

    vowels = [level(s, e) for symbol, s, e in spoken.phonemes if symbol and sp.viseme(symbol) == "open vowel"]
    pauses = [level(s, e) for symbol, s, e in spoken.phonemes if not symbol and e - s > 0.1]
    assert min(vowels) > 10 * max(pauses)


@with_espeak
def test_voices_speed_and_repetition():
    slow, fast = sp.espeak("One two three four.", speed=100), sp.espeak("One two three four.", speed=300)
    assert slow.seconds > 1.5 * fast.seconds
    again = sp.espeak("One two three four.", speed=100)
    # The library carries a little of its state from one sentence to the next.
    assert [symbol for symbol, _, _ in slow.phonemes] == [symbol for symbol, _, _ in again.phonemes]
    assert again.seconds == pytest.approx(slow.seconds, abs=0.02)
    assert sp.espeak("Guten Tag.", voice="de").phonemes
    with pytest.raises(ValueError, match="voice"):
        sp.espeak("hello", voice="nobody-speaks-this")


def test_without_the_synthesiser_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sp, "_find_library", lambda: None)
    sp._library.cache_clear()
    try:
        assert not sp.have_espeak()
        with pytest.raises(RuntimeError, match="apt-get install espeak-ng"):
            sp.espeak("hello")
    finally:
        sp._library.cache_clear()


# Stored sentences


def test_mu_law():
    wave = torch.linspace(-1, 1, 2001)
    back = sp.from_mu_law(sp.to_mu_law(wave))
    assert (back - wave).abs().max() < 0.025
    # Relative precision: soft sounds keep their shape.
    soft = wave / 50
    assert (sp.from_mu_law(sp.to_mu_law(soft)) - soft).abs().max() < 1e-3
    assert sp.to_mu_law(torch.tensor([0.0, 1.0, -1.0, 2.0])).tolist() == [0, 127, -127, 127]


def test_sentences_survive_the_file(tmp_path, spoken):
    sp.save_spoken(spoken, tmp_path / "speech.safetensors")
    back = sp.load_spoken(tmp_path / "speech.safetensors")
    assert list(back) == ["avatar", "user"]
    for name, sentence in spoken.items():
        assert torch.equal(back[name].wave, sentence.wave)
        assert back[name].phonemes == sentence.phonemes and back[name].text == sentence.text


def test_stored_speech(spoken):
    for sentence in spoken.values():
        assert 1 < sentence.seconds < 4 and sentence.wave.isfinite().all() and sentence.text
        ends = [end for _, _, end in sentence.phonemes]
        assert ends == sorted(ends) and ends[-1] <= sentence.seconds + 1e-3
        assert all(sp.viseme(symbol) in sp.VISEMES for symbol, _, _ in sentence.phonemes)


# Visemes


def test_every_phoneme_has_one_class():
    letters = [letter for symbols, _ in sp.VISEMES.values() for letter in symbols.split()]
    assert len(letters) == len(set(letters))
    assert sp.viseme("ˈɑː") == "open vowel" and sp.viseme("") == "silence" and sp.viseme("tʃ") == "tongue to ridge"
    assert sp.openings("aɪ") == [0.95, 0.32] and sp.openings("b") == [0.0] and sp.openings("") == [0.0]


def test_jaw_of_known_sounds():
    jaw = sp.viseme_jaw([("", 0.0, 0.4), ("ɑː", 0.4, 1.2), ("", 1.2, 2.0)], 50)
    assert jaw.shape == (50,) and jaw[:8].max() == 0 and jaw[33:].max() == 0
    assert int(jaw.argmax()) in (19, 20) and jaw.max() > 0.9
    diphthong = sp.viseme_jaw([("aɪ", 0.0, 0.8)], 20)
    assert abs(int(diphthong.argmax()) - 4.5) <= 1 and diphthong[14] == pytest.approx(0.33, abs=0.06)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.floats(0.01, 0.3), min_size=1, max_size=12),
    symbols=st.lists(st.sampled_from(["", "m", "b", "ɑː", "iː", "s", "aʊ", "k"]), min_size=12, max_size=12),
    fps=st.sampled_from([25.0, 30.0, 50.0]),
)
def test_lips_close_for_every_bilabial(lengths, symbols, fps):
    edges = np.concatenate([[0.0], np.cumsum(lengths)])
    phonemes = [(symbol, float(a), float(b)) for symbol, a, b in zip(symbols, edges, edges[1:])]
    frames = math.ceil(edges[-1] * fps)
    jaw = sp.viseme_jaw(phonemes, frames, fps=fps)
    assert jaw.shape == (frames,) and 0 <= jaw.min() and jaw.max() <= 1
    for symbol, start, end in phonemes:
        if symbol in ("m", "b"):
            assert jaw[int((start + end) / 2 * fps)] == 0
    assert torch.equal(sp.viseme_jaw(phonemes, frames + 5, fps=fps)[:frames], jaw)


def test_envelope_and_visemes_disagree_where_lips_are_closed(spoken):
    for sentence in spoken.values():
        features = EnvelopeFeatures()(sentence.wave[None])
        frames = features.shape[1]
        both = torch.zeros(2, frames, 8)
        both[0, :, 0], both[1, :, 0] = 0.9 * features[0, :, 0], 0.9 * sp.viseme_jaw(sentence.phonemes, frames)
        assert lip_corr(both[:1], features) > 0.99
        assert 0.1 < lip_corr(both[1:], features) < 0.95


# Voice activity


def scene(spoken, pause=1.0):
    room = 1e-3 * torch.randn(int((3 * pause + 6) * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    first = int(pause * SAMPLE_RATE)
    second = first + len(spoken["avatar"].wave) + int(pause * SAMPLE_RATE)
    wave = room[: second + len(spoken["user"].wave) + int(pause * SAMPLE_RATE)].clone()
    truth = torch.zeros(math.ceil(len(wave) / SAMPLES_PER_FRAME))
    for start, name in ((first, "avatar"), (second, "user")):
        wave[start : start + len(spoken[name].wave)] += spoken[name].wave
        for symbol, begin, end in spoken[name].phonemes:
            if symbol:
                truth[int((start / SAMPLE_RATE + begin) * FPS) : math.ceil((start / SAMPLE_RATE + end) * FPS)] = 1
    return wave, truth


@pytest.mark.parametrize("backend", ["energy", pytest.param("silero", marks=with_silero)])
def test_voice_activity_finds_the_sentences(spoken, backend):
    wave, truth = scene(spoken)
    found = sp.voice_activity(wave, backend=backend)
    assert found.shape == truth.shape and 0 <= found.min() and found.max() <= 1
    assert ((found > 0.5) == (truth > 0.5)).float().mean() > 0.75
    assert found[:15].max() < 0.5
    both = sp.voice_activity(torch.stack([wave, torch.zeros_like(wave)]), backend=backend)
    assert torch.allclose(both[0], found, atol=1e-5) and both[1].max() < 0.5
    assert torch.allclose(sp.voice_activity(wave, backend=backend), found, atol=1e-6)
    assert sp.voice_activity(torch.zeros(0), backend=backend).shape == (0,)


def test_energy_does_not_depend_on_what_follows(spoken):
    wave, _ = scene(spoken)
    cut = wave[: 100 * SAMPLES_PER_FRAME]
    assert torch.allclose(sp.voice_activity(wave, backend="energy")[:100], sp.voice_activity(cut, backend="energy"), atol=1e-5)


def test_auto_says_that_energy_decides(monkeypatch):
    monkeypatch.setattr(sp, "available", lambda name: False)
    with pytest.warns(UserWarning, match="papers10 data get silero-vad"):
        found = sp.voice_activity(torch.zeros(1280))
    assert found.shape == (2,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sp.voice_activity(torch.zeros(1280), backend="energy")


@pytest.mark.skipif(available("silero-vad"), reason="silero-vad is installed")
def test_missing_network_names_the_command():
    with pytest.raises(DataMissing, match="papers10 data get silero-vad"):
        sp.voice_activity(torch.zeros(1280), backend="silero")


def test_source_of_the_network():
    entry = source("silero-vad")
    assert entry.licence == "MIT" and entry.no_deps and entry.kind == "package" and entry.version


# A spoken conversation


def test_spoken_conversation_has_the_form_of_a_made_one(talk):
    made = DyadicConversation(1, len(talk["avatar_motion"]), 3)[0]
    for name in ("avatar_motion", "user_motion", "avatar_audio", "user_audio"):
        assert talk[name].shape == made[name].shape and talk[name].dtype == made[name].dtype and talk[name].isfinite().all()
    assert set(made["meta"]) <= set(talk["meta"])
    frames = len(talk["avatar_motion"])
    assert talk["avatar_wave"].shape == talk["user_wave"].shape == (frames * SAMPLES_PER_FRAME,)
    assert torch.equal(talk["meta"]["who"] == 0, torch.tensor([any(s <= i < s + n for side, s, n in talk["meta"]["turns"] if side == 0) for i in range(frames)]))


def test_mouths_move_only_in_their_own_turn(talk):
    who = talk["meta"]["who"]
    for side, speaker in (("avatar", 0), ("user", 1)):
        jaw = to_params(talk[f"{side}_motion"])[:, 0]
        assert jaw[who != speaker].abs().max() == 0 and jaw[who == speaker].max() > 0.5
        envelope = talk[f"{side}_audio"][:, 0]
        assert envelope[who == speaker].mean() > 5 * envelope[who != speaker].mean()
        assert 0.2 < envelope[who == speaker].mean() < 0.8


def test_spoken_conversation_is_repeatable_and_leaves_its_input_alone(spoken, talk):
    before = spoken["user"].wave.clone()
    again = sp.conversation_from_speech([("user", spoken["user"]), ("avatar", spoken["avatar"])], seed=3)
    assert all(torch.equal(talk[name], again[name]) for name in talk if isinstance(talk[name], torch.Tensor))
    assert torch.equal(before, spoken["user"].wave)


def test_spoken_conversation_can_be_streamed(talk):
    from papers10.avatar_forcing.model import load_small
    from papers10.avatar_forcing.streaming import generate

    streams = {name: talk[name][None, :60] for name in ("avatar_audio", "user_audio", "user_motion")}
    motion = generate(load_small().eval(), talk["avatar_motion"][:1], **streams, num_steps=2)
    assert motion.shape == (1, 60, 8) and motion.isfinite().all()


# Bad input

SENTENCE = sp.Spoken(torch.zeros(1600), SAMPLE_RATE, [("m", 0.0, 0.1)])
BAD = [
    (lambda: sp.espeak(3), TypeError, "text"),
    (lambda: sp.espeak("  "), ValueError, "text"),
    (lambda: sp.espeak("a\0b"), ValueError, "text"),
    (lambda: sp.espeak("a", speed=10), ValueError, "speed"),
    (lambda: sp.espeak("a", pitch=100), ValueError, "pitch"),
    (lambda: sp.from_mu_law(torch.zeros(3)), TypeError, "code"),
    (lambda: sp.viseme("!"), ValueError, "symbol"),
    (lambda: sp.viseme_jaw([("m", 0.2, 0.1)], 5), ValueError, "phonemes"),
    (lambda: sp.viseme_jaw([("m", 0.2, 0.3), ("a", 0.1, 0.4)], 5), ValueError, "phonemes"),
    (lambda: sp.viseme_jaw([("m", math.nan, 0.3)], 5), ValueError, "phonemes"),
    (lambda: sp.viseme_jaw([], -1), ValueError, "num_frames"),
    (lambda: sp.viseme_jaw([], 5, fps=0), ValueError, "fps"),
    (lambda: sp.voice_activity(torch.zeros(640), backend="loud"), ValueError, "backend"),
    (lambda: sp.voice_activity(torch.zeros(640, dtype=torch.int32), backend="energy"), TypeError, "wave"),
    (lambda: sp.voice_activity(torch.full((640,), math.nan), backend="energy"), ValueError, "wave"),
    (lambda: sp.conversation_from_speech([]), ValueError, "turns"),
    (lambda: sp.conversation_from_speech([("nobody", SENTENCE)]), ValueError, "side"),
    (lambda: sp.conversation_from_speech([("user", SENTENCE)], gap=-1), ValueError, "gap"),
]


@pytest.mark.parametrize("call, kind, message", BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
