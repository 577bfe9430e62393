"""`papers10 app avatar-forcing`: films and files out of voices and faces, and refusals in one line."""

import subprocess
import sys
import wave

import numpy as np
import pytest
import torch

from papers10.avatar_forcing import app, demo
from papers10.avatar_forcing.data import DyadicConversation
from papers10.avatar_forcing.model import AvatarForcingConfig, build_model
from papers10.core.checkpoint import load_tensors
from papers10.core.config import ConfigError
from papers10.core.media import read_video


def run(line):
    return app.main(line.split())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(AvatarForcingConfig.small(), seed=0).save_pretrained(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    path = tmp_path_factory.mktemp("voice") / "hers.wav"
    sound = DyadicConversation(1, 30, seed=1).waveform(0).numpy()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16_000)
        file.writeframes((32767 * sound).astype("<i2").tobytes())
    return path


FEW = "--steps 2 --size 32"


def test_actions_are_those_of_the_program():
    assert [command.name for command in app.program.registered_commands] == list(app.ACTIONS)


def test_an_example_with_its_arrays(tmp_path, model, capsys):
    film, arrays = tmp_path / "a.gif", tmp_path / "a.npz"
    assert run(f"generate --example 1 --seconds 1 --out {film} --save {arrays} --checkpoint {model} {FEW}") == 0
    said = capsys.readouterr().out
    assert str(film) in said and "25 frames" in said and "real-time factor" in said
    assert read_video(film).frames.shape == (25, 32, 64, 3)
    saved = np.load(arrays)
    assert saved["motion"].shape == (25, 8) and saved["avatar_audio"].shape == (25, 4) and saved["fps"] == 25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.npz"], "nothing is left beside them"


def test_it_is_the_session_of_the_library(tmp_path, model):
    from papers10.avatar_forcing.model import AvatarForcingModel
    from papers10.avatar_forcing.streaming import generate

    run(f"generate --example 1 --seconds 1 --out {tmp_path / 'a.gif'} --save {tmp_path / 'a.npz'} --checkpoint {model} {FEW} --seed 5 --cfg-user 2")
    item = DyadicConversation(2, 25, seed=999)[1]
    streams = [item[name][None] for name in ("avatar_audio", "user_audio", "user_motion")]
    motion = generate(AvatarForcingModel.from_pretrained(model), torch.zeros(1, 8), *streams, num_steps=2, seed=5, cfg_user=2.0)
    np.testing.assert_allclose(np.load(tmp_path / "a.npz")["motion"], motion[0], atol=1e-5)


def test_a_voice_alone_and_a_film_with_sound(tmp_path, model, voice):
    pytest.importorskip("av")
    film = tmp_path / "a.mp4"
    assert run(f"generate --avatar-audio {voice} --avatar-only --out {film} --save {tmp_path / 'a.npz'} --checkpoint {model} {FEW}") == 0
    assert read_video(film).frames.shape == (30, 32, 32, 3)
    from papers10.avatar_forcing.video import read_sound

    assert read_sound(film).shape[1] >= 30 * 640 and set(np.load(tmp_path / "a.npz")) == {"fps", "motion", "params", "user_params", "avatar_audio"}


def test_a_short_face_is_held(tmp_path, model, voice, capsys):
    np.savez(tmp_path / "me.npz", params=np.linspace(-0.3, 0.3, 160).reshape(20, 8))
    run(f"generate --user-audio {voice} --user-motion {tmp_path / 'me.npz'} --out {tmp_path / 'a.gif'} --save {tmp_path / 'a.npz'} --checkpoint {model} {FEW}")
    user = np.load(tmp_path / "a.npz")["user_params"]
    assert user.shape == (30, 8) and "held for the last 10 frames" in capsys.readouterr().err
    np.testing.assert_allclose(user[20:], np.repeat(user[19:20], 10, 0))


def test_train_and_use(tmp_path, capsys):
    assert run(f"train --steps 2 --clips 4 --batch-size 2 --no-user-motion --norm l2 --out {tmp_path / 'm'}") == 0
    assert "2 steps, loss" in capsys.readouterr().out
    assert run(f"generate --example 0 --seconds 0.4 --out {tmp_path / 'a.gif'} --checkpoint {tmp_path / 'm'} {FEW}") == 0


def test_a_training_that_was_stopped_goes_on(tmp_path):
    line = f"train --steps 4 --clips 4 --batch-size 2 --out {tmp_path / 'm'} --resume {tmp_path / 'folder'}"
    run(line)
    first = load_tensors(tmp_path / "m" / "model.safetensors")
    run(line)
    second = load_tensors(tmp_path / "m" / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_face_parameters_are_read_back():
    from papers10.avatar_forcing.autoencoder import AutoencoderConfig, build_autoencoder
    from papers10.avatar_forcing.render import FaceRenderer, sample_identity
    from papers10.core.random import generator

    model = build_autoencoder(AutoencoderConfig.small(), seed=0)
    frames = FaceRenderer(model.config.size)(torch.zeros(3, 8), sample_identity(3, generator(0, "x")))
    params, r2 = app.read_parameters(model, ((frames + 1) * 127.5).to(torch.uint8).movedim(1, -1), faces=60)
    assert params.shape == (3, 8) and params.dtype == torch.float32 and len(r2) == 8 and bool(params.isfinite().all())


def test_demo_hands_its_options_on(monkeypatch, model):
    for package in ("fastapi", "uvicorn", "websockets"):
        pytest.importorskip(package)
    seen = {}
    monkeypatch.setattr(demo, "serve", lambda made, **options: seen.update(options, conversations=made))
    assert run(f"demo --port 0 --clients 2 --workers 3 --no-browser --no-watermark --checkpoint {model} --steps 3 --seed 4") == 0
    host = seen.pop("conversations")
    assert seen == {"host": "127.0.0.1", "port": 0, "allow_remote": False, "browser": False}
    assert host.max_clients == 2 and host.seed == 4 and not host.portrait.watermark
    assert host.new_conversation().session.num_steps == 3
    host.close()


def test_a_recording_is_what_the_avatar_speaks(monkeypatch, model, voice):
    seen = {}
    monkeypatch.setattr(demo, "serve", lambda made, **options: seen.update(made=made))
    run(f"demo --no-browser --checkpoint {model} --speech {voice}")
    assert seen["made"].new_conversation().avatar_speech.features.shape == (30, 4)
    seen["made"].close()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("generate --out {o}/a.gif", "expected --avatar-audio, --user-audio, --user-motion, --user-video or --example, got none"),
        ("generate --example 1 --user-audio x.wav --out {o}/a.gif", "--example: expected no other stream, got --user-audio"),
        ("generate --example 1 --out {o}/a.avi", "--out"),
        ("generate --example 1 --out {o}/none/a.gif", "--out: expected a folder that is there"),
        ("generate --example 1 --out {o}/a.gif --save {o}/a.csv", "--save"),
        ("generate --example 1 --out {o}/a.gif --size 33", "--size: expected an even number, got 33"),
        ("generate --example 1 --out {o}/a.gif --portrait oil", "--portrait"),
        ("generate --example 1 --out {o}/a.gif --checkpoint {o}/none", "--checkpoint: expected a folder"),
        ("generate --example 1 --out {o}/a.gif --checkpoint {o}", "config.json"),
        ("generate --avatar-audio {o}/none.wav --out {o}/a.gif", "--avatar-audio: expected a file with sound that is there"),
        ("generate --user-motion {o}/none.npz --out {o}/a.gif", "--user-motion"),
        ("generate --user-motion {o}/x.npz --user-video y.mp4 --out {o}/a.gif", "got both"),
        ("generate --user-motion {o}/wrong.npz --out {o}/a.gif", r"params of shape \[T, 8\], got \(3, 7\)"),
        ("generate --user-motion {o}/other.npz --out {o}/a.gif", "expected params in .*, got motion"),
        ("demo --portrait oil", "--portrait"),
        ("demo --host 0.0.0.0 --no-browser --checkpoint {m}", "allow_remote"),
        ("demo --speech {o}/none.wav", "--speech"),
        ("train --out {o}/none/m", "--out: expected a folder, in one that is there"),
        ("train --out {o}/m --lr 0", "--lr"),
        ("train --out {o}/m --mask frame_lookahaed", "mask"),
        ("train --out {o}/m --objective gan --clips 2 --steps 1", "objective"),
        ("face {o}/none.mp4 --out {o}/a.npz", "FILM: expected a film"),
        ("face {o}/none.mp4 --out {o}/a.csv", "--out"),
    ],
)
def test_refusals(tmp_path, model, line, words):
    np.savez(tmp_path / "wrong.npz", params=np.zeros((3, 7)))
    np.savez(tmp_path / "other.npz", motion=np.zeros((3, 8)))
    with pytest.raises((ConfigError, ValueError), match=words) as refusal:
        run(line.format(o=tmp_path, m=model))
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.npz", "wrong.npz"]


def test_import_is_light():
    code = "import sys, papers10.avatar_forcing.app; print(sorted({'fastapi', 'uvicorn', 'torch', 'av'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
