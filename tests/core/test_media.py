"""Clips and pictures: round trips, time, sizes, refusals, files that appear whole or not at all."""

import math
import os

import numpy as np
import pytest
import torch

from papers10.core import media
from papers10.core.data import DataMissing, available
from papers10.core.media import (
    Video,
    read_image,
    read_video,
    resize,
    show_video,
    to_float,
    to_uint8,
    write_image,
    write_video,
)
from papers10.core.optional import MissingExtra


def needs_av():
    pytest.importorskip("av", reason="PyAV is not installed: pip install 'papers10[data]'")


def numbered(frames=10, height=32, width=48):
    """Frame i has the grey level 20 i."""
    levels = (20 * torch.arange(frames)).to(torch.uint8)
    return levels[:, None, None, None].expand(frames, height, width, 3).contiguous()


def levels(video):
    return [round(float(frame.float().mean()) / 20) for frame in video.frames]


def test_bytes_and_floats_map_one_to_one():
    values = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(to_uint8(to_float(values, dtype)), values)
    assert to_uint8(np.array([0.0, 1.0, -0.2, 1.2])).tolist() == [0, 255, 0, 255]
    assert to_uint8(torch.tensor([True, False])).tolist() == [255, 0]
    assert to_float(torch.tensor([0.25]), torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (torch.tensor([1, 2]), TypeError, "expected uint8"),
        ([0.0, 1.0], TypeError, "tensor or a numpy array, got list"),
        (torch.tensor([0.0, math.nan]), ValueError, "non-finite"),
        (torch.tensor([0.0, 255.0]), ValueError, r"in \[0, 1\]"),
    ],
)
def test_other_ranges_are_refused(values, error, words):
    with pytest.raises(error, match=words):
        to_uint8(values, "frames")


@pytest.mark.parametrize("mode", ["cover", "contain", "stretch"])
@pytest.mark.parametrize("size", [(20, 30), (31, 17), (64, 90), 9])
def test_resize_keeps_constants_and_gives_the_size(mode, size):
    frames = torch.full((2, 24, 40, 3), 0.5, dtype=torch.float64)
    result = resize(frames, size, mode)
    assert result.shape[1:3] == (size if isinstance(size, tuple) else (9, 15)) and result.dtype == torch.float64
    filled = result[result > 0] if mode == "contain" else result
    assert torch.allclose(filled, torch.full_like(filled, 0.5), atol=1e-12)


def test_resize_of_one_picture_of_bytes():
    picture = torch.randint(0, 256, (30, 30, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert resize(picture.numpy(), (10, 20)).shape == (10, 20, 1) and resize(picture, 15).dtype == torch.uint8
    assert torch.equal(resize(picture, 30), picture)


def test_resize_keeps_the_middle_in_the_middle():
    picture = torch.zeros(60, 100, 3)
    picture[28:32, 48:52] = 1
    for mode in ("cover", "contain", "stretch"):
        small = resize(picture, (30, 30), mode)[..., 0]
        rows, columns = torch.meshgrid(torch.arange(30) + 0.5, torch.arange(30) + 0.5, indexing="ij")
        assert abs(float((small * rows).sum() / small.sum()) - 15) < 1e-3
        assert abs(float((small * columns).sum() / small.sum()) - 15) < 1e-3


@pytest.mark.parametrize(
    ("frames", "size", "mode", "error", "words"),
    [
        (torch.zeros(3, 3), 2, "cover", ValueError, "frames: expected"),
        (torch.zeros(0, 4, 4, 3), 2, "cover", ValueError, "at least one frame"),
        (torch.zeros(4, 4, 3), (1, 2, 3), "cover", ValueError, "size: expected"),
        (torch.zeros(4, 4, 3), 0, "cover", ValueError, "size"),
        (torch.zeros(4, 4, 3), 2.5, "cover", ValueError, "whole number"),
        (torch.zeros(4, 4, 3), 2, "covers", ValueError, "did you mean 'cover'"),
    ],
)
def test_resize_refuses(frames, size, mode, error, words):
    with pytest.raises(error, match=words):
        resize(frames, size, mode)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".jpg"])
def test_pictures_round_trip(tmp_path, suffix):
    ramp = torch.linspace(0, 1, 48)[None, :, None].expand(32, 48, 3)
    again = read_image(write_image(tmp_path / f"ramp{suffix}", ramp))
    limit = {".jpg": 6, ".webp": 8}.get(suffix, 0)
    assert (again.int() - to_uint8(ramp).int()).abs().max() <= limit
    assert read_image(tmp_path / f"ramp{suffix}", size=(16, 16)).shape == (16, 16, 3)


def test_grey_alpha_and_sixteen_bits(tmp_path):
    from PIL import Image

    grey = torch.arange(0, 250, 10, dtype=torch.uint8).reshape(5, 5)
    assert torch.equal(read_image(write_image(tmp_path / "grey.png", grey))[..., 1], grey)
    assert torch.equal(read_image(write_image(tmp_path / "grey.png", grey[..., None]))[..., 2], grey)
    transparent = torch.zeros(4, 4, 4)
    transparent[..., 0], transparent[:2, :, 3] = 1, 1
    red = read_image(write_image(tmp_path / "alpha.png", transparent))
    assert red[:2, :, 0].min() == 255 and red[2:].max() == 0
    with pytest.raises(ValueError, match="at most three channels"):
        write_image(tmp_path / "alpha.jpg", transparent)
    Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize(
    ("name", "image", "words"),
    [
        ("a.xyz", torch.zeros(4, 4), "path: expected one of"),
        ("a.png", torch.zeros(4), "image: expected"),
        ("a.png", torch.zeros(0, 4), "image: expected"),
        ("a.png", torch.zeros(4, 4, 2), "image: expected"),
    ],
)
def test_write_image_refuses(tmp_path, name, image, words):
    with pytest.raises(ValueError, match=words):
        write_image(tmp_path / name, image)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match="expected a picture"):
        read_image(tmp_path / "text.png")
    with pytest.raises(ValueError, match="reads a folder"):
        read_image(tmp_path)
    with pytest.raises(FileNotFoundError, match="which is none"):
        read_video(tmp_path / "absent.gif")
    with pytest.raises(DataMissing, match="did you mean clip/bikes"):
        read_video("clip/bike")
    with pytest.raises(TypeError, match="path: expected a path"):
        read_video(3)
    (tmp_path / "text.gif").write_text("text")
    with pytest.raises(ValueError, match="expected a moving picture"):
        read_video(tmp_path / "text.gif")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected pictures"):
        read_video(tmp_path / "empty")


def test_not_a_video_and_a_cut_video(tmp_path):
    needs_av()
    (tmp_path / "text.mp4").write_text("text")
    with pytest.raises(ValueError, match="expected a video"):
        read_video(tmp_path / "text.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="expected a video"):
        read_video(tmp_path / "empty.mp4")
    whole = write_video(tmp_path / "whole.mp4", numbered(), 10).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="path: expected"):
        read_video(tmp_path / "cut.mp4")


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_clips_round_trip(tmp_path, suffix):
    if suffix == ".mp4":
        needs_av()
    video = read_video(write_video(tmp_path / f"clip{suffix}", numbered(), 10))
    assert isinstance(video, Video) and video.frames.dtype == torch.uint8 and video.frames.shape == (10, 32, 48, 3)
    assert video.fps == pytest.approx(10) and levels(video) == list(range(10))
    assert video.seconds == pytest.approx(1) and video.float(torch.float64).max() <= 1
    assert levels(read_video(tmp_path / f"clip{suffix}", start=3, max_frames=4)) == [3, 4, 5, 6]
    assert read_video(tmp_path / f"clip{suffix}", size=16).frames.shape == (10, 16, 24, 3)


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
@pytest.mark.parametrize(
    ("fps", "expected"),
    [(10, [0, 1, 2, 3, 4, 5, 6]), (5, [0, 2, 4, 6]), (20, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]), (4, [0, 2, 5]), (30, None)],
)
def test_another_rate_holds_frames(tmp_path, suffix, fps, expected):
    if suffix == ".mp4":
        needs_av()
    video = read_video(write_video(tmp_path / f"clip{suffix}", numbered(7), 10), fps=fps)
    assert levels(video) == (expected or [i // 3 for i in range(21)]) and video.fps == fps


def test_rates_of_a_third_of_a_hundredth(tmp_path):
    path = write_video(tmp_path / "clip.gif", numbered(12), 12)
    assert levels(read_video(path, fps=6)) == [0, 2, 4, 6, 8, 10] and levels(read_video(path, fps=12)) == list(range(12))
    assert levels(read_video(path, fps=6, start=2, max_frames=3)) == [2, 4, 6]


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for i, frame in enumerate(numbered(12)):
        write_image(tmp_path / f"frame{i}.png", frame)
    (tmp_path / "notes.txt").write_text("ignored")
    video = read_video(tmp_path)
    assert levels(video) == list(range(12)) and video.fps == 24
    assert read_video(tmp_path, fps=5).fps == 5 and levels(read_video(tmp_path, start=10)) == [10, 11]
    write_image(tmp_path / "frame12.png", torch.zeros(8, 8, 3))
    with pytest.raises(ValueError, match="frames of one size"):
        read_video(tmp_path)
    assert len(read_video(tmp_path, size=(8, 8)).frames) == 13


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"max_frames": 0}, ValueError, "max_frames"),
        ({"fps": 0}, ValueError, "fps"),
        ({"fps": "fast"}, TypeError, "fps"),
        ({"start": -1}, ValueError, "start"),
        ({"start": 10}, ValueError, "expected frames after start = 10"),
        ({"mode": "crop"}, ValueError, "mode"),
        ({"size": (3,)}, ValueError, "size"),
    ],
)
def test_read_video_refuses(tmp_path, arguments, error, words):
    path = write_video(tmp_path / "clip.gif", numbered(), 10)
    with pytest.raises(error, match=words):
        read_video(path, **arguments)


@pytest.mark.parametrize(
    ("name", "frames", "fps", "words"),
    [
        ("a.avi", numbered(), 10, "path: expected one of"),
        ("a.gif", numbered()[:0], 10, "at least one frame"),
        ("a.gif", torch.zeros(2, 4, 4, 2), 10, "frames: expected"),
        ("a.gif", numbered(), 0, "fps"),
        ("a.gif", numbered(), 60, "fps"),
        ("a.gif", torch.full((2, 4, 4, 3), math.nan), 10, "non-finite"),
    ],
)
def test_write_video_refuses(tmp_path, name, frames, fps, words):
    with pytest.raises(ValueError, match=words):
        write_video(tmp_path / name, frames, fps)
    assert list(tmp_path.iterdir()) == []


def test_odd_sizes(tmp_path):
    needs_av()
    frames = numbered(4, 31, 47)
    with pytest.raises(ValueError, match="even number of rows and columns for .mp4, got 31 x 47; give odd='pad'"):
        write_video(tmp_path / "odd.mp4", frames, 10)
    assert list(tmp_path.iterdir()) == []
    assert read_video(write_video(tmp_path / "odd.mp4", frames, 10, odd="pad")).frames.shape == (4, 32, 48, 3)
    assert read_video(write_video(tmp_path / "odd.mp4", frames, 10, odd="crop")).frames.shape == (4, 30, 46, 3)
    assert read_video(write_video(tmp_path / "odd.gif", frames, 10)).frames.shape == frames.shape


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.gif", numbered(), 10)
    before = path.read_bytes()

    def fail(*arguments, **options):
        arguments[2].write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(media, "_save_moving", fail)
    with pytest.raises(OSError, match="disk full"):
        write_video(path, numbered(4), 10)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["clip.gif"]
    with pytest.raises(FileNotFoundError, match="expected an existing folder"):
        write_video(tmp_path / "absent" / "clip.gif", numbered(4), 10)


def test_without_pyav_gif_works_and_mp4_names_the_extra(tmp_path, monkeypatch):
    def absent(module, extra, purpose=""):
        raise MissingExtra(module, extra, purpose)

    monkeypatch.setattr(media, "need", absent)
    assert len(read_video(write_video(tmp_path / "clip.gif", numbered(), 10)).frames) == 10
    with pytest.raises(MissingExtra, match=r"papers10\[data\]"):
        write_video(tmp_path / "clip.mp4", numbered(), 10)
    (tmp_path / "some.mp4").write_bytes(b"0000")
    with pytest.raises(MissingExtra, match=r"papers10\[data\]"):
        read_video(tmp_path / "some.mp4")


def test_show_video_stays_below_its_cap():
    noise = torch.rand(12, 100, 150, 3, generator=torch.Generator().manual_seed(0))
    shown = show_video(noise, 10, max_bytes=60_000, alt='a "noise"')
    page = shown._repr_html_()
    assert len(shown.content) <= 60_000 and min(shown.shape[1:]) >= 64 and "a &quot;noise&quot;" in page and "image/gif" in page
    assert shown.shape[0] / shown.fps == pytest.approx(1.2, rel=0.35)
    still = show_video(noise[:1])
    assert still.kind == "png" and still.content.startswith(b"\x89PNG")
    assert show_video(Video(to_uint8(noise), 25.0), max_bytes=10_000_000).fps == 25
    with pytest.raises(ValueError, match="max_bytes"):
        show_video(noise, max_bytes=100)


@pytest.mark.parametrize(("name", "shape", "count"), [("bikes", (272, 640), 250), ("carphone", (144, 176), 120), ("bigbuckbunny", (720, 1280), 132)])
def test_real_clips(name, shape, count):
    needs_av()
    if not available(f"clip/{name}"):
        pytest.skip("the clips are not on this machine: papers10 data get clip")
    video = read_video(f"clip/{name}", max_frames=3, start=count - 3)
    assert video.frames.shape == (3, *shape, 3) and video.frames.float().std() > 10
    with pytest.raises(ValueError, match=f"got {count} in"):
        read_video(f"clip/{name}", start=count, size=16)


def test_photographs():
    if not available("photo/astronaut"):
        pytest.skip("scikit-image is not installed: pip install 'papers10[data]'")
    assert read_image("photo/astronaut").shape == (512, 512, 3)
    grey = read_image("photo/camera")
    assert torch.equal(grey[..., 0], grey[..., 2]) and len(read_video("photo/no_time_for_that_tiny").frames) > 1
