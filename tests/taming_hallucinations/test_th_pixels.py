"""Twelve edits: exact outside mask and segment, neutral strengths, seeds, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.taming_hallucinations import pixels
from papers10.taming_hallucinations.context import VideoEditor

pytest.importorskip("cv2")
STRENGTHS = {
    "brightness": {"delta": 70},
    "contrast": {"gain": 2.5},
    "saturation": {"gain": 0.0},
    "hue_shift": {"degrees": 120},
    "noise": {"sigma": 50},
    "gaussian_blur": {"sigma": 6},
    "pixelate": {"block": 4},
    "local_swirl": {"strength": 5.0},
    "channel_swap": {},
    "freeze": {},
    "reverse": {},
    "speed": {"factor": 3.0},
}


def clip(frames=8, height=11, width=13, seed=0):
    video = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    video.flags.writeable = False
    return video


@settings(max_examples=40, deadline=None)
@given(
    operation=st.sampled_from(sorted(STRENGTHS)),
    height=st.integers(2, 17),
    width=st.integers(2, 17),
    segment=st.sampled_from([(0, 8), (2, 5), (6, 8)]),
    ramp=st.integers(0, 2),
    seed=st.integers(0, 3),
)
def test_nothing_changes_outside_mask_and_segment(operation, height, width, segment, ramp, seed):
    video = clip(8, height, width, seed)
    mask = np.random.default_rng(seed).random(video.shape[:3]) < 0.4
    given = {"mask": mask, "t0": segment[0], "t1": segment[1], "ramp": ramp, "seed": seed}
    one, two = (pixels.edit_pixels(video, operation, **given, **STRENGTHS[operation]) for _ in range(2))
    outside = np.ones(video.shape[:3], bool)
    outside[segment[0] : segment[1]] = ~mask[segment[0] : segment[1]]
    assert (one.video == video)[outside].all() and (one.mask == ~outside).all() and (one.video == two.video).all()


@pytest.mark.parametrize("operation", sorted(name for name, known in pixels.OPERATIONS.items() if known.strength))
def test_the_neutral_strength_changes_nothing(operation):
    known = pixels.OPERATIONS[operation]
    assert (pixels.edit_pixels(clip(), operation, **{known.strength: known.neutral}).video == clip()).all()


def test_known_values():
    video = np.full((2, 3, 3, 3), 100, np.uint8)
    assert (pixels.edit_pixels(video, "brightness", delta=120, t1=1).video[0] == 220).all()
    assert (pixels.edit_pixels(np.full((1, 2, 2, 3), 200, np.uint8), "brightness", delta=90).video == 255).all()
    two = np.stack([np.full((2, 2, 3), 50, np.uint8), np.full((2, 2, 3), 150, np.uint8)])
    assert pixels.edit_pixels(two, "contrast", gain=2.0).video[:, 0, 0, 0].tolist() == [0, 200]
    assert pixels.edit_pixels(clip(), "channel_swap").video[0, 0, 0].tolist() == clip()[0, 0, 0, ::-1].tolist()
    frames = [
        int(v)
        for v in pixels.edit_pixels(
            np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(3, 3), "speed", factor=2.0
        ).video[:, 0, 0, 0]
    ]
    assert frames == [0, 2, 4, 5, 5, 5]


def test_an_edit_in_place_is_the_same_edit():
    video = clip().copy()
    expected = pixels.edit_pixels(clip(), "reverse", t0=2, t1=7).video
    result = pixels.edit_pixels(video, "reverse", t0=2, t1=7, inplace=True)
    assert result.video is video and (video == expected).all()
    with pytest.raises(ValueError, match="inplace: expected a clip that can be written"):
        pixels.edit_pixels(clip(), "reverse", inplace=True)


def test_the_context_says_what_was_done():
    context = pixels.edit_pixels(
        clip(), "hue_shift", degrees=90, t0=2, t1=6, fps=4, mask=np.ones((11, 13), bool), region_name="sky"
    ).context
    assert (context.anomaly_type, context.region_type, context.region_name, context.start_s, context.end_s) == (
        "color",
        "region",
        "sky",
        0.5,
        1.5,
    )
    assert context.params["degrees"] == 90 and context.editor.name == "pixels"


def test_an_editor_of_the_pipeline_keeps_the_contract():
    editor = pixels.PixelEditor("noise", t0=1, t1=4, sigma=30)
    assert isinstance(editor, VideoEditor)
    assert (editor.edit(clip(), seed=2).video == editor.edit(clip(), seed=2).video).all()
    assert (editor.edit(clip(), seed=2).video != editor.edit(clip(), seed=3).video).any()


@pytest.mark.parametrize(
    ("operation", "options", "message"),
    [
        ("sharpen", {}, "operation: expected"),
        ("brightness", {}, "brightness: expected delta"),
        ("brightness", {"delta": 121}, "delta"),
        ("brightness", {"delta": 10, "gain": 2}, "brightness: expected delta"),
        ("freeze", {"sigma": 1}, "freeze: expected no strength"),
        ("freeze", {"t0": 3, "t1": 4}, "needs at least two"),
        ("noise", {"sigma": 10, "t0": 5, "t1": 5}, "t0, t1: expected"),
        ("noise", {"sigma": 10, "fps": 0}, "fps"),
        ("channel_swap", {"order": (0, 0, 1)}, "order: expected"),
        ("local_swirl", {"strength": 3.0, "radius": float("nan")}, "radius"),
        ("local_swirl", {"strength": 3.0, "radius": -1.0}, "radius"),
        ("pixelate", {"block": 2.5}, "block: expected a whole number"),
    ],
)
def test_refusals_name_argument_and_value(operation, options, message):
    with pytest.raises(ValueError, match=message):
        pixels.edit_pixels(clip(), operation, **options)


def test_one_frame_has_no_order():
    with pytest.raises(ValueError, match="needs at least two"):
        pixels.edit_pixels(clip(1), "reverse")
    assert pixels.edit_pixels(clip(1), "brightness", delta=20).video.shape == (1, 11, 13, 3)


def test_numbers_of_numpy_go_into_the_context():
    context = pixels.edit_pixels(clip(), "brightness", delta=np.int64(30)).context
    assert context.from_json(context.to_json()) == context and context.params["delta"] == 30
