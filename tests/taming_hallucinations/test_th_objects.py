"""Edits of objects: exact outside hole and thing, what is seen is what is said, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.taming_hallucinations import objects as o
from papers10.taming_hallucinations.context import LEVEL_OF, VideoEditor
from papers10.taming_hallucinations.verification import EditSample, MaskLeakage

pytest.importorskip("cv2")
SPRITE = np.full((3, 3, 4), 255, np.uint8)
OPTIONS = {
    "insert_object": {"reference": SPRITE, "start": (0, 0), "end": (20, 6)},
    "replace_object": {"reference": SPRITE},
    "recolor_object": {"degrees": 90},
    "teleport": {"shift": (6, -4)},
}


def falling(frames=8, height=25, width=31):
    """A bright square that falls one pixel a frame before a still, noisy background."""
    rng = np.random.default_rng(0)
    video = np.repeat(rng.integers(0, 90, (1, height, width, 3), dtype=np.uint8), frames, 0)
    mask = np.zeros(video.shape[:3], bool)
    for t in range(frames):
        mask[t, 5 + t : 9 + t, 10:14] = True
    video[mask] = (250, 40, 40)
    video.flags.writeable = False
    return video, mask


@pytest.mark.parametrize("operation", sorted(o.OBJECT_OPERATIONS))
def test_nothing_changes_outside(operation):
    video, mask = falling()
    result = o.edit_object(video, operation, mask=mask, t0=4, fps=8, **OPTIONS.get(operation, {}))
    assert (result.video == video)[~result.mask].all() and (result.video != video).any() and not result.mask[:4].any()
    assert (
        result.context.level == LEVEL_OF[result.context.anomaly_type]
        and result.context.instruction
        and result.context.start_s == 0.5
    )
    assert MaskLeakage()(EditSample(video, result.video, result.mask, result.context, fps=8)).passed
    again = o.edit_object(video, operation, mask=mask, t0=4, fps=8, **OPTIONS.get(operation, {}))
    assert (again.video == result.video).all()


def bright(video):
    return (video == (250, 40, 40)).all(-1)


def test_what_is_done_is_seen():
    video, mask = falling()
    top = lambda result: [
        int(np.nonzero(frame.any(1))[0][0]) if frame.any() else None for frame in bright(result.video)
    ]
    assert top(o.freeze_object(video, mask, t0=4)) == [5, 6, 7, 8, 9, 9, 9, 9]
    assert top(o.reverse_motion(video, mask, t0=4)) == [5, 6, 7, 8, 12, 11, 10, 9]
    assert top(o.gravity_flip(video, mask, t0=4)) == [5, 6, 7, 8, 9, 8, 7, 6]
    assert top(o.passes_through(video, mask, t0=4)) == [5, 6, 7, 8, 9, 10, 11, 12]
    assert top(o.remove_object(video, mask, t0=4)) == [5, 6, 7, 8, None, None, None, None]
    assert top(o.teleport(video, mask, (0, -3), t0=4)) == [5, 6, 7, 8, 6, 7, 8, 9]


def test_a_still_background_comes_back_exactly():
    video, mask = falling()
    background = np.repeat(np.random.default_rng(0).integers(0, 90, (1, 25, 31, 3), dtype=np.uint8), 8, 0)
    assert (o.remove_object(video, mask, t0=0, radius=0).video == background).all()


def test_where_the_thing_never_leaves_the_hole_is_painted():
    video, mask = falling()
    mask = np.repeat(mask[:1], 8, 0)
    painted = o.fill_hole(video, mask)
    assert (painted != video)[mask].any() and (painted == video)[~mask].all()


@settings(max_examples=15, deadline=None)
@given(x=st.integers(-40, 40), y=st.integers(-40, 40))
def test_things_may_leave_the_picture(x, y):
    video, mask = falling()
    assert o.teleport(video, mask, (x, y)).video.shape == video.shape
    pasted, where = o.paste(video, SPRITE, {0: (x, y)})
    assert (pasted == video)[~where].all()


def test_a_transparent_picture_lets_through():
    video, _ = falling()
    half = np.full((2, 2, 4), (200, 200, 200, 0), np.uint8)
    pasted, where = o.paste(video, half, {0: (1, 1)})
    assert (pasted == video).all() and not where.any()


def test_a_thing_cut_out_and_pasted_back_is_the_clip():
    video, mask = falling()
    pasted, _ = o.paste(video, o.cut_out(video, mask, 3), {3: (10, 8)})
    assert (pasted == video).all()


def test_an_editor_of_the_pipeline_keeps_the_contract():
    video, mask = falling()
    editor = o.ObjectEditor("teleport", shift=(3, 0), region_name="red square")
    result = editor.edit(video, mask=mask, fps=8)
    assert (
        isinstance(editor, VideoEditor)
        and result.context.region_name == "red square"
        and "the red square" in result.context.instruction
    )


@pytest.mark.parametrize(
    ("operation", "options", "message"),
    [
        ("vanish", {}, "operation: expected"),
        ("remove_object", {"mask": None}, "mask: expected the thing somewhere"),
        ("remove_object", {"mask": np.zeros((8, 25, 31), bool)}, "got an empty one"),
        ("teleport", {}, "teleport: expected the options shift"),
        ("freeze_object", {"shift": (1, 1)}, "freeze_object: expected the options none"),
        (
            "replace_object",
            {"reference": np.zeros((3, 3, 3), np.uint8)},
            r"reference: expected a picture uint8 \[h, w, 4\]",
        ),
        ("passes_through", {"t0": 0}, "so that it has a speed"),
        ("remove_object", {"fill": "blur"}, "fill: expected"),
        ("remove_object", {"t0": 8}, "t0, t1: expected"),
        ("remove_object", {"fps": 0}, "fps"),
        ("remove_object", {"region_name": " "}, "region_name: expected a noun phrase"),
        ("teleport", {"shift": (1.5, 0)}, "shift: expected two whole numbers"),
        ("teleport", {"shift": (1, 2, 3)}, "shift: expected two whole numbers"),
    ],
)
def test_refusals_name_argument_and_value(operation, options, message):
    video, mask = falling()
    with pytest.raises(ValueError, match=message):
        o.edit_object(video, operation, **{"mask": mask} | options)


def test_a_single_frame_is_refused():
    video, mask = falling()
    with pytest.raises(ValueError, match="at least 2 frames"):
        o.remove_object(video[:1], mask[:1])


def test_a_placement_from_an_empty_frame_is_refused():
    video, mask = falling()
    mask = mask.copy()
    mask[2] = False
    with pytest.raises(ValueError, match="the mask is empty there"):
        o.recompose(video, mask, {4: o.Placement(2)})


def test_a_fall_is_counted_from_a_frame_with_the_thing():
    video, mask = falling()
    mask = mask.copy()
    mask[4] = False
    with pytest.raises(ValueError, match="t0: expected the thing in frame 4"):
        o.gravity_flip(video, mask, t0=4)


def test_numbers_of_numpy_go_into_the_context():
    video, mask = falling()
    context = o.teleport(video, mask, np.array([3, 0]), t0=4).context
    assert context.from_json(context.to_json()) == context and context.params["shift"] == [3, 0]
