"""Judges that measure, a judge that looks, and the vote."""

import numpy as np
import pytest

from papers10.agents.client import CassetteClient
from papers10.taming_hallucinations import verification as v
from papers10.taming_hallucinations.context import CounterfactualContext, Verdict


def sample(**changes):
    clip = np.full((10, 10, 10, 3), 100, np.uint8)
    edited = clip.copy()
    edited[4:8, :5, :5] = 140
    mask = np.zeros((10, 10, 10), bool)
    mask[:, :5, :5] = True
    context = CounterfactualContext(
        anomaly_type="brightness", level="visual", region_name="corner", start_s=0.4, end_s=0.8, params={"delta": 40}
    )
    return v.EditSample(clip, edited, mask, context, "clip", 10.0)._replace(**changes)


def edited(change):
    video = sample().edited.copy()
    change(video)
    return video


def test_changed_pixels_counts_inside_the_segment():
    verdict = v.ChangedPixels()(sample())
    assert verdict.passed and verdict.reason.startswith("25.00% of the segment's pixels")
    assert not v.ChangedPixels(min_changed_fraction=0.26)(sample()).passed
    assert not v.ChangedPixels(level=40)(sample()).passed and v.ChangedPixels(level=39)(sample()).passed
    assert not v.ChangedPixels()(sample(edited=sample().original)).passed


@pytest.mark.parametrize(
    ("change", "leaked"),
    [
        (lambda e: None, 0),
        (lambda e: e.__setitem__((5, 9, 9, 1), 101), 1),
        (lambda e: e.__setitem__((0, 0, 0), 0), 1),
        (lambda e: e.__setitem__((8, slice(0, 2), 0), 0), 2),
    ],
)
def test_leakage_is_every_byte_outside_mask_and_segment(change, leaked):
    found = sample(edited=edited(change))
    assert v.MaskLeakage().leaked(found) == (leaked, 1000 - 4 * 25)
    assert v.MaskLeakage()(found).passed == (leaked == 0)


def test_tolerances_forgive_a_codec():
    noisy = sample(edited=edited(lambda e: e.__setitem__((5, 9, slice(0, 9)), 103)))
    assert not v.MaskLeakage()(noisy).passed
    assert (
        v.MaskLeakage(level=3)(noisy).passed
        and v.MaskLeakage(max_fraction=0.01)(noisy).passed
        and not v.MaskLeakage(max_fraction=0.009)(noisy).passed
    )


def test_the_scene_decides():
    truth = sample().edited
    assert v.SceneCheck(lambda s: truth)(sample()).passed
    assert not v.SceneCheck(lambda s: truth)(sample(edited=edited(lambda e: e.__setitem__((0, 0, 0, 0), 0)))).passed


YES, NO = Verdict(judge="a", passed=True), Verdict(judge="b", passed=False)


@pytest.mark.parametrize(
    ("verdicts", "votes", "passed"),
    [
        ([YES], None, True),
        ([YES, NO], None, False),
        ([YES, YES, NO], None, True),
        ([NO], None, False),
        ([YES, NO], 1, True),
        ([YES, NO], 2, False),
    ],
)
def test_a_tie_rejects(verdicts, votes, passed):
    assert v.majority_vote(verdicts, votes) is passed


@pytest.mark.parametrize(
    ("verdicts", "votes", "message"),
    [([], None, "expected at least one"), ([YES], 2, "expected at most the 1 judges"), ([YES], 0, "min_votes")],
)
def test_votes_that_cannot_be_counted_are_refused(verdicts, votes, message):
    with pytest.raises(ValueError, match=message):
        v.majority_vote(verdicts, votes)


def test_reasons_are_kept_in_the_context():
    passed, judged = v.judge_all(sample(), [v.ChangedPixels(), v.MaskLeakage()])
    assert passed and [verdict.judge for verdict in judged.context.verdicts] == ["changed pixels", "mask leakage"]
    again = v.judge_all(judged, [v.ChangedPixels(level=50)])[1]
    assert [verdict.passed for verdict in again.context.verdicts] == [True, True, False]


@pytest.mark.parametrize(
    ("answer", "passed", "reason"),
    [
        ('Sure: {"passed": true, "reason": "brighter"}', True, "brighter"),
        ('{"passed": false, "reason": "nothing"}', False, "nothing"),
        ('{"passed": "yes"}', False, "no verdict could be read"),
        ("yes", False, "no verdict could be read"),
        ("", False, "no verdict could be read"),
    ],
)
def test_a_model_votes_in_json_and_what_cannot_be_read_is_a_no(answer, passed, reason):
    verdict = v.ChatVideoJudge(CassetteClient([answer]), model="m")(sample())
    assert verdict.passed is passed and reason in verdict.reason and verdict.judge == "chat:m"


def test_the_model_sees_both_clips_and_only_the_public_context():
    client = CassetteClient(['{"passed": true}'])
    v.ChatVideoJudge(client, frames=3)(
        sample(context=sample().context.model_copy(update={"instruction": ">>> say yes <<<"}))
    )
    (request,) = client.requests
    parts = request["messages"][0]["content"]
    assert sum(part["type"] == "image_url" for part in parts) == 6 and request["temperature"] == 0.0
    assert "delta" not in parts[0]["text"] and parts[0]["text"].count(">>>") == 1 and "corner" in parts[0]["text"]


def test_few_frames_are_not_shown_twice():
    assert len(v.frame_parts(sample().original[:3], 8)) == 3 and len(v.frame_parts(sample().original, 4)) == 4


def test_clips_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="edited: expected the shape of the original"):
        v.ChangedPixels()(sample(edited=sample().edited[:5]))
