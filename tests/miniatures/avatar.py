"""Two tiny clips a split in each layout that `avatar_forcing.full_scale` reads, with random content, a tiny wav2vec2 and a tiny release of the official models."""

import wave
from pathlib import Path

import numpy as np
import torch

SPLITS = ("train", "test")


def sound(path: Path, seconds: float, rate: int = 16_000, seed: int = 0) -> Path:
    """A wave file of 16 bits: bursts of a tone, as syllables are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(round(seconds * rate)) / rate
    values = 0.3 * np.sin(2 * np.pi * (120 + 20 * seed) * t) * np.maximum(0, np.sin(2 * np.pi * 3 * t + seed))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((values * 32767).astype("<i2").tobytes())
    return path


def film(path: Path, frames: int, fps: float = 25, side: int = 32, seed: int = 0) -> Path:
    """A small film of one blob that moves, without sound."""
    from papers10.core.media import write_video

    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    u, v = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side))
    colour = rng.uniform(0.4, 1, 3)
    x, y = 0.3 * np.sin(np.arange(frames) / 5 + seed), 0.3 * np.cos(np.arange(frames) / 7)
    blobs = np.exp(-8 * ((u[None] - x[:, None, None]) ** 2 + (v[None] - y[:, None, None]) ** 2))
    return write_video(path, (blobs[..., None] * colour).astype(np.float32), fps)


def talking_film(path: Path, frames: int, seed: int = 0) -> Path:
    """A small film with sound, 25 frames a second."""
    from papers10.avatar_forcing.video import write_avatar_video

    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = torch.rand(frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) - 0.5
    tone = 0.2 * torch.sin(torch.arange(frames * 640) / 9)
    return write_avatar_video(path, pictures, audio=tone, watermark=False)


def rows(frames: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random parameters [frames, width]."""
    rng = np.random.default_rng(seed)
    phase, speed = rng.uniform(0, 6, width), rng.uniform(0.05, 0.4, width)
    return (np.sin(np.arange(frames)[:, None] * speed + phase) + 0.05 * rng.normal(size=(frames, width))).astype(np.float32)


def folder(root: Path, *, frames: int = 72, fps: float = 30.0, width: int = 5, user: bool = True) -> Path:
    """SPLIT/CLIP/{avatar,user}.{npz,wav}; the user's motion is ten rows shorter."""
    for place, split in enumerate(SPLITS):
        for number in range(2):
            clip = root / split / f"clip{number}"
            for side, who in enumerate(("avatar", "user") if user else ("avatar",)):
                seed = 8 * place + 4 * number + side
                sound(clip / f"{who}.wav", frames / fps, seed=seed)
                np.savez(clip / f"{who}.npz", motion=rows(frames - 10 * side, width, seed), fps=fps)
    return root


def vico(root: Path, frames: int = 60) -> Path:
    """videos/UUID.{speaker,listener}.mp4, audios/UUID.wav, SPLIT.csv."""
    for place, split in enumerate(SPLITS):
        names = [f"{split}{number}" for number in range(2)]
        for number, name in enumerate(names):
            for side, who in enumerate(("speaker", "listener")):
                film(root / "videos" / f"{name}.{who}.mp4", frames, seed=8 * place + 2 * number + side)
            sound(root / "audios" / f"{name}.wav", frames / 25)
        (root / f"{split}.csv").write_text("attitude,uuid\n" + "".join(f"neutral,{name}\n" for name in names))
    return root


def hdtf(root: Path, frames: int = 60) -> Path:
    """NAME.mp4 with sound, SPLIT.txt."""
    for place, split in enumerate(SPLITS):
        names = [f"RD_{split}{number}" for number in range(2)]
        for number, name in enumerate(names):
            talking_film(root / f"{name}.mp4", frames, seed=8 * place + number)
        (root / f"{split}.txt").write_text("\n".join(names))
    return root


def seamless(root: Path, frames: int = 72) -> Path:
    """LABEL/SPLIT/0000/0005/V*_S*_I*_P*.{wav,npz,json}: a pair of people in each label, one alone, sound at 48 kHz, a few rows that are not valid."""
    for place, split in enumerate(SPLITS):
        for at, label in enumerate(("improvised", "naturalistic")):
            for person in (11, 12) if at == 0 else (13, 14, 15):
                interaction = 7 if person < 15 else 8
                stem = root / label / split / "0000" / "0005" / f"V0{at}_S0809_I0000000{interaction}_P{person:04d}"
                seed = 16 * place + person
                sound(stem.with_suffix(".wav"), frames / 30, rate=48_000, seed=seed)
                valid = np.ones((frames, 1), bool)
                valid[20:24] = False
                values = rows(frames, 6, seed)
                values[20:24] = 1e6
                np.savez(stem.with_suffix(".npz"), **{"movement:FAUValue": values[:, :3], "movement:head_encodings": values[:, 3:5], "movement:gaze_encodings": values[:, 5:], "movement:is_valid": valid,
                                                      "smplh:is_valid": ~valid})  # fmt: skip
                stem.with_suffix(".json").write_text('{"id": "x", "metadata:vad": []}')
    return root


def dualtalk(root: Path, frames: int = 60) -> Path:
    """SPLIT/NAME_speaker{1,2}.{wav,npz} with exp and pose, no rate."""
    for place, split in enumerate(SPLITS):
        for number in (1, 2):
            stem = root / split / f"talk{place}_speaker{number}"
            sound(stem.with_suffix(".wav"), frames / 25, seed=number)
            values = rows(frames, 7, 4 * place + number)
            np.savez(stem.with_suffix(".npz"), exp=values[:, :4], pose=values[:, 4:])
    return root


LAYOUTS = {"folder": folder, "realtalk": folder, "vico": vico, "hdtf": hdtf, "seamless": seamless, "dualtalk": dualtalk}


def wav2vec2(root: Path) -> Path:
    """A random wav2vec2 of two layers and 16 numbers, written by transformers."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    Wav2Vec2Model(config).save_pretrained(root)
    return root


def release(root: Path, size: int = 16) -> Path:
    """flow_transformer.pth and motion_autoencoder.pth in the released layout, tiny."""
    from papers10.avatar_forcing.model import AvatarForcingConfig, build_model
    from papers10.avatar_forcing.official import OfficialMotionAutoencoder, to_official

    root.mkdir(parents=True, exist_ok=True)
    config = AvatarForcingConfig.paper(motion_dim=32, audio_features=12, audio_dim=16, hidden=32, num_heads=2, num_layers=2)
    torch.save(to_official(build_model(config)), root / "flow_transformer.pth")
    torch.save(to_official(OfficialMotionAutoencoder(size, dim=32, num_directions=4, width=16)), root / "motion_autoencoder.pth")
    return root
