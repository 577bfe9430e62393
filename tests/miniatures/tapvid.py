"""Builders of tiny files in the formats of clips: TAP-Vid's pickle, DAVIS masks, and a folder with precomputed cues."""

import pickle
import zipfile
from pathlib import Path

import numpy as np


def square_clip(frames: int = 5, height: int = 24, width: int = 32, points: int = 6, seed: int = 0, shift: int = 0) -> dict:
    """A patterned square that moves four pixels a frame over a smooth background, as TAP-Vid stores a clip, with a point that gets hidden; and its mask."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    ripple = 0.02 * np.sin(0.5 * columns + 0.3 * rows)
    back = np.stack([0.35 + 0.1 * columns / width, 0.45 + 0.1 * rows / height, 0.55 - 0.1 * columns / width], -1) + ripple[..., None]
    side = height // 3
    y, x = np.mgrid[0:side, 0:side]
    block = np.array([0.85, 0.25, 0.25]) + 0.15 * (np.sin(0.9 * x + 0.4 * y) + np.cos(0.8 * y - 0.5 * x))[..., None]
    video, masks = [], []
    top, left, speed = height // 3, 3 + shift, 4
    for frame in range(frames):
        picture, mask = back.copy(), np.zeros((height, width), bool)
        picture[top : top + side, left + speed * frame : left + speed * frame + side] = block
        mask[top : top + side, left + speed * frame : left + speed * frame + side] = True
        video.append(np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8))
        masks.append(mask)
    time = np.arange(frames)
    inside = np.array([left, top]) + side * random.uniform(0.2, 0.8, (points, 2))
    moving = inside[:, None] + np.stack([speed * time, 0 * time], -1)
    still = np.repeat(np.array([[[left + side + 1.5, top + side / 2]]]), frames, 1)
    tracks = np.concatenate([moving, still])
    occluded = np.zeros((points + 1, frames), bool)
    occluded[-1] = (still[0, :, 0] >= left + speed * time) & (still[0, :, 0] < left + speed * time + side)
    return {
        "clip": {"points": (tracks / [width, height]).astype(np.float32), "occluded": occluded, "video": np.stack(video)},
        "masks": np.stack(masks),
    }


def tapvid_davis(folder: Path, clips: int = 2, *, protocol: int = 4, zipped: bool = False, **size) -> Path:
    """FOLDER/tapvid_davis/tapvid_davis.pkl, or the zip that holds it: clip -> points float32 [n, T, 2] in [0, 1], occluded bool [n, T], video uint8 [T, H, W, 3]."""
    names = ["bear", "car-turn", "dog"][:clips]
    content = {name: square_clip(seed=seed, shift=seed, **size)["clip"] for seed, name in enumerate(names)}
    place = folder / "tapvid_davis" / "tapvid_davis.pkl"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(pickle.dumps(content, protocol=protocol))
    if zipped:
        with zipfile.ZipFile(folder / "tapvid_davis.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(place, "tapvid_davis/tapvid_davis.pkl")
            archive.writestr("tapvid_davis/README.md", "A miniature.")
        place.unlink()
        return folder / "tapvid_davis.zip"
    return place


def davis_masks(folder: Path, clips: int = 2, **size) -> Path:
    """FOLDER/Annotations/480p/NAME/00000.png of the clips of `tapvid_davis`: palette pictures, 0 is background."""
    from PIL import Image

    root = folder / "Annotations" / "480p"
    for seed, name in enumerate(["bear", "car-turn", "dog"][:clips]):
        (root / name).mkdir(parents=True, exist_ok=True)
        for frame, mask in enumerate(square_clip(seed=seed, shift=seed, **size)["masks"]):
            picture = Image.fromarray(mask.astype(np.uint8), mode="P")
            picture.putpalette([0, 0, 0, 128, 0, 0])
            picture.save(root / name / f"{frame:05d}.png")
    return root
