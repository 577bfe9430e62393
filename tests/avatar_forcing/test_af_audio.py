"""Sound to features: reading waves, the running level, causal features against a float64 reference, wav2vec2 by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import get_window

from papers10.avatar_forcing import audio as au
from papers10.avatar_forcing.data import SAMPLES_PER_FRAME, DyadicConversation
from papers10.core.data import DataMissing

HOP = SAMPLES_PER_FRAME


def noise(*shape, seed=0, scale=0.1):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def live(extractor, wave, blocks=(10,), window=60):
    stream, rows, at, turn = extractor.streaming(window), [], 0, 0
    while at < wave.shape[1]:
        step = blocks[turn % len(blocks)] * HOP
        rows.append(stream.push(wave[:, at : at + step]))
        at, turn = at + step, turn + 1
    return torch.cat(rows, 1)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def network(transformers):
    config = transformers.Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, conv_dim=(12,) * 7,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Wav2Vec2Model(config).eval()


# Reading


def test_int16_is_divided_by_full_scale():
    wave = torch.tensor([[-32768, 0, 16384]], dtype=torch.int16)
    assert torch.equal(au.as_wave(wave), torch.tensor([[-1.0, 0.0, 0.5]]))
    assert torch.equal(au.as_wave(wave.numpy()), torch.tensor([[-1.0, 0.0, 0.5]]))
    assert au.as_wave(torch.zeros(1, 4, dtype=torch.float64)).dtype == torch.float64
    assert au.as_wave(torch.zeros(1, 4, dtype=torch.float16)).dtype == torch.float32


@pytest.mark.parametrize("samples, frames", [(0, 0), (1, 1), (640, 1), (641, 2), (16_000, 25), (15_999, 25)])
def test_frames_are_rounded_up(samples, frames):
    assert au.frame_count(samples) == frames


def test_shorter_audio_repeats_its_last_sample():
    wave = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    padded = au.pad_wave(wave, 4)
    assert torch.equal(padded[:, 2:], torch.tensor([[0.2, 0.2], [0.4, 0.4]]))
    assert torch.equal(au.pad_wave(torch.zeros(2, 0), 3), torch.zeros(2, 3))
    assert au.pad_wave(wave, 2) is wave


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_resampling_keeps_a_tone(rate):
    clock = torch.arange(rate, dtype=torch.float64) / rate
    made = au.resample(torch.sin(2 * math.pi * 440 * clock)[None], rate)
    expected = torch.sin(2 * math.pi * 440 * torch.arange(made.shape[1], dtype=torch.float64) / 16_000)
    assert made.shape == (1, 16_000)
    assert (made[0] - expected)[800:-800].abs().max() < 0.01


BAD = [
    (lambda: au.as_wave([0.0]), TypeError, "wave"),
    (lambda: au.as_wave(torch.zeros(1, 4, dtype=torch.int32)), TypeError, "int16"),
    (lambda: au.as_wave(np.zeros((1, 4), dtype=np.uint8)), TypeError, "int16"),
    (lambda: au.as_wave(torch.zeros(4)), ValueError, r"wave\[None\]"),
    (lambda: au.as_wave(torch.tensor([[0.0, math.inf]])), ValueError, "non-finite"),
    (lambda: au.as_wave(np.array([[math.nan]])), ValueError, "non-finite"),
    (lambda: au.resample(torch.zeros(1, 4), 0), ValueError, "sample_rate"),
    (lambda: au.resample(torch.zeros(1, 4), 16_000.5), ValueError, "sample_rate"),
    (lambda: au.EnvelopeFeatures()(torch.zeros(1, 1281), num_frames=2), ValueError, "num_frames"),
    (lambda: au.EnvelopeFeatures(gain="loud"), ValueError, "gain"),
    (lambda: au.EnvelopeFeatures(reference=0), ValueError, "reference"),
    (lambda: au.EnvelopeFeatures(base_hz=10), ValueError, "base_hz"),
    (lambda: au.LogMelFeatures(bands=2), ValueError, "bands"),
    (lambda: au.EnvelopeFeatures().streaming(0), ValueError, "window_frames"),
    (lambda: au.EnvelopeFeatures().streaming().push(torch.zeros(1, 641)), ValueError, "640"),
    (lambda: au.EnvelopeFeatures().streaming().push(torch.zeros(1, 640), lookback=61), ValueError, "lookback"),
    (lambda: au.pair_features(au.EnvelopeFeatures(), None, None), ValueError, "avatar, user"),
    (lambda: au.pair_features(au.EnvelopeFeatures(), torch.zeros(1, 4), torch.zeros(2, 4)), ValueError, "user"),
    (lambda: au.SpeechLevel(floor=0.2), ValueError, "floor"),
    (lambda: au.SpeechLevel(ema=2), ValueError, "ema"),
    (lambda: au.SpeechLevel().update(torch.zeros(1, 100)), ValueError, "640"),
    (lambda: au.Wav2Vec2Features(layers="first"), ValueError, "layers"),
    (lambda: au.Wav2Vec2Features(normalise="yes"), ValueError, "normalise"),
    (lambda: au.Wav2Vec2Features(torch.nn.Linear(1, 1)), TypeError, "model_or_path"),
    (lambda: au.pitch_of(torch.zeros(1, 100), 50, 400), ValueError, "wave"),
    (lambda: au.pitch_of(torch.zeros(1, 1000), 300, 200), ValueError, "low_hz"),
]


@pytest.mark.parametrize("call, kind, message", BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_other_number_of_streams_is_refused():
    for stream in (au.EnvelopeFeatures().streaming(), au.SpeechLevel()):
        push = getattr(stream, "push", None) or stream.update
        push(torch.zeros(2, HOP))
        with pytest.raises(ValueError, match="2 streams"):
            push(torch.zeros(3, HOP))


# Level


def test_silence_stays_silent_and_speech_is_brought_to_one():
    level = au.SpeechLevel()
    level.update(noise(1, 100 * HOP, scale=0.06))
    speech = level.level.item()
    assert 0.057 < speech < 0.063
    level.update(noise(1, 500 * HOP, seed=1, scale=5e-4))
    assert level.level.item() == pytest.approx(speech, rel=1e-9)
    assert level.normalise(noise(1, 100 * HOP, seed=2, scale=5e-4)).std() < 0.02
    assert level.normalise(noise(1, 100 * HOP, seed=2, scale=0.06)).std() == pytest.approx(1, abs=0.1)


def test_a_noisy_room_before_the_first_word_does_not_count():
    level = au.SpeechLevel()
    level.update(noise(1, 200 * HOP, scale=1.5e-3))
    assert level.level.item() == pytest.approx(0.02)


def test_level_is_bounded_and_does_not_depend_on_blocks():
    wave = torch.cat([noise(2, 40 * HOP, scale=0.4), noise(2, 40 * HOP, seed=1, scale=0.01)], 1)
    whole, parts = au.SpeechLevel(), au.SpeechLevel()
    levels = whole.update(wave)
    blocks = torch.cat([parts.update(piece) for piece in wave.split(8 * HOP, 1)], 1)
    assert levels.shape == (2, 80) and torch.equal(levels, blocks)
    assert levels.max() <= 0.15 and levels.min() >= 0.005


# Causal features


@settings(max_examples=8, deadline=None)
@given(
    frames=st.integers(1, 40),
    blocks=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    kind=st.sampled_from(["fixed", "running", "mel"]),
    short=st.integers(0, 639),
)
def test_live_equals_whole_file(frames, blocks, kind, short):
    extractor = au.LogMelFeatures() if kind == "mel" else au.EnvelopeFeatures(kind)
    wave = noise(2, frames * HOP - short, seed=frames)
    whole = extractor(wave)
    assert whole.shape == (2, frames, extractor.dim)
    # All examples but those of the last, padded frame.
    parts = live(extractor, au.pad_wave(wave, frames * HOP), blocks)
    assert torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.parametrize("extractor", [au.EnvelopeFeatures(), au.EnvelopeFeatures("running"), au.LogMelFeatures()])
def test_later_sound_changes_nothing(extractor):
    wave = noise(1, 30 * HOP)
    other = wave.clone()
    other[:, 17 * HOP :] = noise(1, 13 * HOP, seed=5, scale=0.5)
    before, after = extractor(wave), extractor(other)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.equal(before[:, 17:], after[:, 17:])


def reference_mel(wave, bands):
    """40 bands in float64 with numpy and scipy only."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), bands + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(1024, 1 / 16_000)
    triangles = [np.interp(bins, edges[k : k + 3], [0, 1, 0], left=0, right=0) for k in range(bands)]
    for k, triangle in enumerate(triangles):
        if not triangle.any():
            triangle[np.abs(bins - edges[k + 1]).argmin()] = 1
    taper = get_window("hann", 1024)
    wave = np.concatenate([np.zeros(HOP), wave])
    rows = []
    for end in range(2 * HOP, len(wave) + 1, HOP):
        power = np.abs(np.fft.rfft(wave[end - 1024 : end] * taper / taper.sum())) ** 2
        rows.append((np.log10(np.stack(triangles) @ power + 1e-8) + 4) / 4)
    return np.stack(rows)


@pytest.mark.parametrize("bands", [4, 40, 80])
def test_log_mel_equals_a_float64_reference(bands):
    wave = noise(2, 12 * HOP).double()
    made = au.LogMelFeatures(bands)(wave)
    assert made.dtype == torch.float64
    for i in range(2):
        assert np.abs(made[i].numpy() - reference_mel(wave[i].numpy(), bands)).max() < 1e-10
    assert (au.LogMelFeatures(bands)(wave.float()).double() - made).abs().max() < 1e-4


def test_log_mel_range():
    mel = au.LogMelFeatures()
    assert torch.allclose(mel(torch.zeros(1, HOP)), torch.tensor(-1.0))
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(10 * HOP) / 16_000)[None]
    assert 0.6 < mel(tone).max() < 1.0
    assert (mel.triangles.sum(-1) > 0).all()


@pytest.mark.parametrize("hertz", [60.0, 110.0, 187.5, 300.0])
def test_pitch_of_a_buzz(hertz):
    clock = torch.arange(1280, dtype=torch.float64) / 16_000
    buzz = sum(torch.sin(2 * math.pi * hertz * k * clock + k) for k in range(1, 9))[None]
    found, periodic = au.pitch_of(buzz, 40, 320)
    assert periodic.item() and found.item() == pytest.approx(hertz, rel=0.01)
    assert not au.pitch_of(noise(1, 1280).double(), 40, 320)[1].item()
    assert au.pitch_of(torch.zeros(1, 1280).double(), 40, 320)[0].isfinite().all()


@pytest.mark.parametrize("side, base", [("avatar", 110.0), ("user", 200.0)])
def test_features_of_the_generated_voice(side, base):
    talks = DyadicConversation(4, 120, seed=21)
    made = talks.tensors()[f"{side}_audio"]
    read = au.EnvelopeFeatures(base_hz=base)(torch.stack([talks.waveform(i, side) for i in range(4)]))

    def correlation(k, where=slice(None)):
        return torch.corrcoef(torch.stack([read[..., k][where].flatten(), made[..., k][where].flatten()]))[0, 1]

    assert correlation(0) > 0.95
    assert correlation(1) > 0.85
    assert correlation(2, made[..., 0] > 0.3) > 0.7
    assert 0.7 < (read[..., 0] * made[..., 0]).sum() / made[..., 0].square().sum() < 1.4
    running = au.EnvelopeFeatures("running", base_hz=base)(torch.stack([0.3 * talks.waveform(i, side) for i in range(4)]))
    assert torch.corrcoef(torch.stack([running[..., 0].flatten(), made[..., 0].flatten()]))[0, 1] > 0.85
    assert running[..., 0].max() <= 2


def test_constant_and_zero_length_audio():
    for extractor in (au.EnvelopeFeatures(), au.EnvelopeFeatures("running"), au.LogMelFeatures()):
        assert extractor(torch.zeros(2, 0)).shape == (2, 0, extractor.dim)
        silent = extractor(torch.zeros(2, 0), num_frames=4)
        assert silent.shape == (2, 4, extractor.dim) and silent.isfinite().all()
        assert extractor.streaming().push(torch.zeros(2, 0)).shape == (2, 0, extractor.dim)
    assert torch.equal(au.EnvelopeFeatures()(torch.zeros(1, 3 * HOP)), torch.zeros(1, 3, 4))


def test_inputs_are_not_modified():
    wave = noise(1, 20 * HOP)
    kept = wave.clone()
    for extractor in (au.EnvelopeFeatures(), au.LogMelFeatures()):
        extractor(wave)
        extractor.streaming().push(wave)
    au.SpeechLevel().normalise(wave)
    assert torch.equal(wave, kept)


@pytest.mark.parametrize("extractor", [au.EnvelopeFeatures("running"), au.LogMelFeatures()])
def test_stream_state_and_lookback(extractor):
    wave = noise(2, 30 * HOP)
    whole = extractor(wave)
    stream = extractor.streaming(window_frames=20)
    stream.push(wave[:, : 15 * HOP])
    other = extractor.streaming(window_frames=20)
    other.load_state_dict(stream.state_dict())
    for each in (stream, other):
        rows = each.push(wave[:, 15 * HOP : 25 * HOP], lookback=2)
        assert torch.allclose(rows, whole[:, 13:25], atol=1e-6)
    stream.reset()
    assert torch.equal(stream.push(wave[:, :HOP], lookback=3)[:, :3], torch.zeros(2, 3, extractor.dim))


@pytest.mark.parametrize("block", [10])
def test_a_knock_opens_the_mouth_in_its_own_frame(block):
    knocks = noise(30, 30 * HOP, scale=1e-3)
    for n in range(30):
        knocks[n, n * HOP : (n + 1) * HOP] += noise(HOP, seed=9)
    where = torch.arange(30)
    jaw = 0.9 * live(au.EnvelopeFeatures(), knocks, (block,))[..., 0]
    assert (jaw.argmax(1) - where).abs().max() == 0
    mel = live(au.LogMelFeatures(), knocks, (block,)).sum(-1)
    assert (mel.argmax(1) - where).abs().max() <= 1


def test_pair_on_one_clock():
    avatar, user = pair = au.pair_features(au.EnvelopeFeatures(), noise(1, 1000), noise(1, 5000, seed=1))
    assert avatar.shape == user.shape == (1, 8, 4) and len(pair) == 2
    alone, absent = au.pair_features(au.LogMelFeatures(), noise(1, 3200), None, sample_rate=32_000)
    assert alone.shape == (1, 3, 40) and absent is None


# Wav2vec2


def by_hand(network, wave, frames):
    """The recipe step by step, without the module under test."""
    x = network.feature_extractor(wave)
    place = torch.arange(frames, dtype=torch.float64) * (x.shape[-1] - 1) / max(frames - 1, 1)
    low = place.floor().long().clamp(max=x.shape[-1] - 2)
    share = (place - low).to(x)
    x = (x[..., low] * (1 - share) + x[..., low + 1] * share).transpose(1, 2)
    x, _ = network.feature_projection(x)
    encoder = network.encoder
    x = encoder.layer_norm(x + encoder.pos_conv_embed(x))
    states = []
    for layer in encoder.layers:
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
        states.append(x)
    return states


@pytest.mark.parametrize("samples, frames", [(20 * HOP, 20), (19 * HOP + 200, 20), (20 * HOP, 13)])
def test_wav2vec2_equals_a_computation_by_hand(network, samples, frames):
    wave = noise(2, samples)
    with torch.no_grad():
        states = by_hand(network, wave, frames)
    every = au.Wav2Vec2Features(network)
    assert every.dim == 72 and every.receptive_field == 400
    assert torch.allclose(every.encode(wave, frames), torch.cat(states, -1), atol=1e-5)
    assert torch.allclose(au.Wav2Vec2Features(network, "last").encode(wave, frames), states[-1], atol=1e-5)


def test_wav2vec2_without_interpolation_equals_the_library(network):
    wave = noise(1, 20 * HOP)
    with torch.no_grad():
        states = network(wave, output_hidden_states=True).hidden_states
    L = states[0].shape[1]
    assert L == 39
    assert torch.allclose(au.Wav2Vec2Features(network).encode(wave, L), torch.cat(states[1:], -1), atol=1e-5)
    # Interpolating the outputs instead is something else.
    late = torch.nn.functional.interpolate(torch.cat(states[1:], -1).transpose(1, 2), size=20, mode="linear", align_corners=True).transpose(1, 2)
    assert (au.Wav2Vec2Features(network).encode(wave, 20) - late).abs().max() > 0.01


def test_whole_frames_take_every_second_row(network):
    with torch.no_grad():
        x = network.feature_extractor(noise(1, 20 * HOP))
    halved = torch.nn.functional.interpolate(x, size=20, mode="linear", align_corners=True)
    assert torch.allclose(halved, x[..., ::2], atol=1e-6)


def test_wav2vec2_normalises_utterances_and_pads(network):
    features = au.Wav2Vec2Features(network)
    wave = noise(2, 10 * HOP)
    assert torch.allclose(features(wave), features(5 * wave + 0.3), atol=2e-3)
    assert torch.equal(features(wave, num_frames=12), features(au.pad_wave(wave, 12 * HOP)))
    assert features(torch.zeros(1, 0)).shape == (1, 0, 72)
    assert features(noise(1, 50)).shape == (1, 1, 72)
    assert torch.allclose(features((wave * 32768).round().to(torch.int16)), features(wave), atol=2e-3)
    assert not any(p.requires_grad for p in network.parameters()) and not network.training
    assert not network.config.output_attentions


def test_wav2vec2_live_window(network):
    features = au.Wav2Vec2Features(network)
    wave = noise(1, 50 * HOP)
    stream, level = features.streaming(window_frames=20), au.SpeechLevel()
    for start in range(0, 50, 10):
        block = wave[:, start * HOP : (start + 10) * HOP]
        rows = stream.push(block, lookback=2)
        level.update(block)
        window = level.normalise(wave[:, max(start - 10, 0) * HOP : (start + 10) * HOP])
        expected = features.encode(window, window.shape[1] // HOP)
        if start:
            assert torch.allclose(rows, expected[:, -12:], atol=1e-5)
        else:
            assert torch.equal(rows[:, :2], torch.zeros(1, 2, 72))
            assert torch.allclose(rows[:, 2:], expected, atol=1e-5)
        if start == 20:
            other = features.streaming(window_frames=20)
            other.load_state_dict(stream.state_dict())
    stream.load_state_dict(other.state_dict())
    assert torch.equal(stream.push(wave[:, 30 * HOP : 40 * HOP]), other.push(wave[:, 30 * HOP : 40 * HOP]))


def test_wav2vec2_read_from_a_folder(network, transformers, tmp_path, monkeypatch):
    network.save_pretrained(tmp_path / "tiny")
    wave = noise(1, 8 * HOP)
    # A local folder is read without the hub.
    monkeypatch.setenv("PAPERS10_OFFLINE", "1")
    # Another implementation of attention, hence the rounding.
    assert torch.allclose(au.Wav2Vec2Features(tmp_path / "tiny")(wave), au.Wav2Vec2Features(network)(wave), atol=1e-4)
    with pytest.raises(DataMissing, match="wav2vec2-base-960h"):
        assert au.Wav2Vec2Features().dim
