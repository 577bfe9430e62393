"""The record of an edit and the checks at every editor's door."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from papers10.core.config import ConfigError, to_mapping
from papers10.taming_hallucinations import context as c

KINDS = st.sampled_from(sorted(c.LEVELS_OF)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.sampled_from(c.LEVELS_OF[kind]))
)


@given(kind=KINDS, start=st.floats(0, 1e3), length=st.floats(0.01, 1e3), name=st.text(min_size=1, max_size=20))
def test_a_context_survives_json(kind, start, length, name):
    made = c.CounterfactualContext(
        anomaly_type=kind[0],
        level=kind[1],
        region_name=name,
        start_s=start,
        end_s=start + length,
        params={"delta": 3},
        editor=c.Editor(name="e"),
        verdicts=(c.Verdict(judge="j", passed=True),),
    )
    assert c.CounterfactualContext.from_json(made.to_json()) == made
    assert not {"params", "editor", "verdicts", "mask"} & made.public().keys()


GOOD = {"anomaly_type": "blur", "level": "visual", "start_s": 0.5, "end_s": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anomaly_type": "blurr"}, "did you mean 'blur'"),
        ({"level": "semantic"}, "level: expected visual for blur"),
        ({"end_s": 0.5}, "end_s: expected a moment after"),
        ({"start_s": -0.1}, "start_s"),
        ({"end_s": float("inf")}, "end_s"),
        ({"start_s": "0"}, "start_s"),
        ({"region_name": ""}, "region_name"),
        ({"colour": 1}, "colour: unknown key"),
        ({"verdicts": ({"judge": "j"},)}, "passed"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        c.CounterfactualContext(**GOOD | changes)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_what_is_no_context_is_refused(text):
    with pytest.raises(ConfigError):
        c.CounterfactualContext.from_json(text)


def test_seconds_become_frames():
    made = c.CounterfactualContext(**GOOD)
    assert made.frames(10, 20) == (5, 10) and made.frames(10, 8) == (5, 8)
    with pytest.raises(ValueError, match=r"expected a segment inside the clip of 0\.4 s"):
        made.frames(10, 4)


def test_the_published_schema_accepts_and_refuses():
    jsonschema = pytest.importorskip("jsonschema")
    data = to_mapping(c.CounterfactualContext(**GOOD))
    jsonschema.validate({**data, "verdicts": list(data["verdicts"])}, c.context_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "colour": 1}, c.context_schema())


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        ([[0]], TypeError, "expected a numpy array"),
        (np.zeros((2, 4, 4, 3)), TypeError, "expected uint8"),
        (np.zeros((2, 4, 4), np.uint8), ValueError, "repeat a grey channel"),
        (np.zeros((2, 4, 4, 1), np.uint8), ValueError, "repeat a grey channel"),
        (np.zeros((2, 3, 4, 4), np.uint8), ValueError, r"expected \[F, H, W, 3\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), ValueError, "no empty side"),
    ],
)
def test_what_is_no_clip_is_refused_with_a_hint(video, error, message):
    with pytest.raises(error, match=message):
        c.check_clip(video)


def test_a_flat_mask_holds_for_all_frames_and_others_are_refused():
    video = np.zeros((3, 4, 5, 3), np.uint8)
    assert c.check_mask(np.ones((4, 5), bool), video).shape == (3, 4, 5) and c.check_mask(None, video) is None
    with pytest.raises(TypeError, match="mask: expected a numpy array of bool"):
        c.check_mask(np.ones((4, 5)), video)
    with pytest.raises(ValueError, match="mask: expected"):
        c.check_mask(np.ones((5, 4), bool), video)


@pytest.mark.parametrize("segment", [(0, 0), (3, 2), (-1, 2), (0, 9), (8, None)])
def test_segments_outside_are_refused(segment):
    with pytest.raises(ValueError, match="t0, t1: expected"):
        c.check_segment(*segment, 8)
