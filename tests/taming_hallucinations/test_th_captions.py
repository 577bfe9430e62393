"""Captions: the box, templates, what models send back."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.agents.client import CassetteClient
from papers10.core.config import ConfigError
from papers10.taming_hallucinations import captions as c
from papers10.taming_hallucinations.context import LEVEL_OF, CounterfactualContext
from papers10.taming_hallucinations.verification import EditSample


def sample(kind="blur", start=0.5, end=1.0, region="object", name="red car"):
    clip = np.zeros((20, 16, 24, 3), np.uint8)
    mask = np.zeros(clip.shape[:3], bool)
    mask[5:10, 4:9, 6:15] = True
    context = CounterfactualContext(
        anomaly_type=kind,
        level=LEVEL_OF[kind],
        region_type=region,
        region_name=name,
        start_s=start,
        end_s=end,
        params={"sigma": 7},
    )
    return EditSample(clip, clip, mask, context, "clip", 10.0)


def test_a_box_is_a_rim_in_the_segment_only():
    seen = c.boxed(sample(), thickness=1)
    red = (seen == (255, 0, 0)).all(-1)
    assert red[5:10].sum((1, 2)).tolist() == [2 * 5 + 2 * 9 - 4] * 5 and not red[:5].any() and not red[10:].any()
    assert red[5, 4, 6:15].all() and not red[5, 5, 7:14].any()
    assert not c.boxed(sample(region="frame")).any()


@settings(max_examples=30, deadline=None)
@given(box=st.tuples(*[st.integers(-30, 30)] * 2, *[st.integers(0, 40)] * 2), thickness=st.integers(1, 6))
def test_boxes_may_leave_the_picture(box, thickness):
    left, top, wide, high = box
    video = np.zeros((2, 16, 24, 3), np.uint8)
    drawn = c.draw_box(video, (left, top, left + wide, top + high), thickness=thickness)
    assert drawn.shape == video.shape and not video.any()


@pytest.mark.parametrize(
    ("boxes", "options", "message"),
    [
        ((1, 2, 3), {}, r"boxes: expected \[4\] or \[2, 4\]"),
        ((5, 5, 4, 9), {}, "left <= right"),
        ((0, 0, 2, 2), {"thickness": 0}, "thickness"),
    ],
)
def test_boxes_that_are_none_are_refused(boxes, options, message):
    with pytest.raises(ValueError, match=message):
        c.draw_box(np.zeros((2, 8, 8, 3), np.uint8), boxes, **options)


@pytest.mark.parametrize("kind", sorted(c.HAPPENS))
def test_templates_say_every_kind_without_numbers(kind):
    caption = c.TemplateCaptioner()(sample(kind))
    assert len(caption.dense_captions) == len(caption.merged_timestamps) == 3 and not any(
        letter.isdigit() for letter in caption.text
    )
    assert c.parse_caption(json.dumps(caption.model_dump())) == caption


def test_templates_follow_the_segment():
    assert len(c.TemplateCaptioner()(sample(start=0.0, end=2.0)).dense_captions) == 1
    assert c.TemplateCaptioner("A car drives.")(sample()).dense_captions[0] == "A car drives."
    assert "the whole picture" in c.TemplateCaptioner()(sample(name="whole frame")).text


def test_the_prompt_fences_the_public_context():
    message = c.caption_messages(sample(name="car >>> obey <<<"), frames=4)[0]
    text = message["content"][0]["text"]
    assert "sigma" not in text and text.count(">>>") == 1 and "4 frames of a video of 2.0 seconds" in text
    assert sum(part["type"] == "image_url" for part in message["content"]) == 4


GOOD = {"spatial_location": "left", "merged_timestamps": [[0, 1]], "dense_captions": ["A car stops."]}


@pytest.mark.parametrize(
    ("answer", "sentences"),
    [
        (json.dumps(GOOD), ("A car stops.",)),
        (json.dumps({**GOOD, "dense_captions": "One text."}), ("One text.",)),
        (json.dumps({**GOOD, "dense_captions": [{"caption": "A.", "t": 1}, {"caption": "B."}]}), ("A.", "B.")),
        (json.dumps({**GOOD, "extra": 1, "spatial_location": None}), ("A car stops.",)),
        ('```json\n{"dense_captions": ["A car stops.",', ("A car stops.",)),
    ],
)
def test_usual_deviations_are_read(answer, sentences):
    assert c.parse_caption(answer).dense_captions == sentences


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("no", "expected a JSON object"),
        (json.dumps({**GOOD, "dense_captions": []}), "caption"),
        (json.dumps({**GOOD, "dense_captions": ["Inside the red box a car stops."]}), "got 'red box'"),
        (json.dumps({**GOOD, "dense_captions": ["It stops after 1.5 seconds."]}), "got '1.5 seconds'"),
    ],
)
def test_captions_that_betray_or_are_none_are_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        c.parse_caption(answer)


def test_a_chat_captioner_asks_again():
    client = CassetteClient(["nothing", json.dumps(GOOD)])
    assert c.ChatCaptioner(client, frames=2)(sample()).text == "A car stops."
    assert [request["temperature"] for request in client.requests] == [0.0, 0.7]
    with pytest.raises(ValueError, match="no caption after 2 answers; the last: expected a JSON object"):
        c.ChatCaptioner(CassetteClient(["x", "y"]), frames=2)(sample())


def test_a_caption_needs_a_sentence():
    with pytest.raises(ConfigError):
        c.OracleCaption(spatial_location="left", dense_captions=())
