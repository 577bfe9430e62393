"""Masks: truth of drawn clips, run lengths, words through real classes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from papers10.taming_hallucinations import masks as m
from papers10.taming_hallucinations.clips import COLORS, add_noise, draw_scenes, render_clean

pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def drawn():
    scenes = draw_scenes(1, seed=11, frames=12, size=64, questions=("side",))
    clean = render_clean(scenes, "real")[0]
    color = tuple(int(v) for v in COLORS[scenes.color[0]])
    return add_noise(clean[None], 0.05, 0)[0], (clean == COLORS[scenes.color[0]]).all(-1), color


def test_colour_motion_and_tracking_find_the_square(drawn):
    clip, truth, color = drawn
    assert m.overlap(m.color_mask(clip, color, 80), truth) > 0.9
    assert m.overlap(m.motion_mask(clip, threshold=0.2), truth) > 0.9
    assert m.overlap(m.track_mask(clip, truth[5], frame=5), truth) > 0.6
    assert (m.track_mask(clip, truth[5], frame=5)[5] == truth[5]).all()


def test_flow_says_what_moves_otherwise_than_the_rest():
    still = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8).repeat(2, 0).repeat(2, 1)
    video = np.stack([np.roll(still, 0, 1)] * 3)
    for t in range(3):
        video[t, 20:44, 30 + 3 * t : 60 + 3 * t] = still[20:44, 60:90]
    found = m.flow_mask(video, pixels=1.5)
    assert found[0, 25:40, 38:55].mean() > 0.6 and found[0, 55:, :20].mean() < 0.1 and (found[2] == found[1]).all()


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6)))
def test_run_lengths_give_the_mask_back(mask):
    assert (m.rle_to_mask(m.mask_to_rle(mask)) == mask).all()


def test_a_file_gives_the_mask_back(drawn, tmp_path):
    path = m.save_mask(tmp_path / "mask.json", drawn[1])
    assert (m.load_mask(path) == drawn[1]).all() and [p.name for p in tmp_path.iterdir()] == ["mask.json"]


@pytest.mark.parametrize(
    "rle",
    [
        {},
        {"size": [1, 2, 3]},
        {"size": [1, 2], "counts": [2]},
        {"size": [1, 2, 3], "counts": [5]},
        {"size": [1, 2, 3], "counts": [7, -1]},
    ],
)
def test_run_lengths_that_do_not_fit_are_refused(rle):
    with pytest.raises(ValueError, match="rle: expected"):
        m.rle_to_mask(rle)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "mask.json").write_text("{")
    with pytest.raises(ValueError, match=r"mask\.json: expected a mask as JSON"):
        m.load_mask(tmp_path / "mask.json")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: m.color_mask(v, (0, 0, 300)), "rgb: expected three numbers"),
        (lambda v: m.color_mask(v, (0, 0, 0), 256), "tolerance"),
        (lambda v: m.track_mask(v, np.zeros((64, 64), bool)), "seed_mask: expected at least one pixel"),
        (lambda v: m.track_mask(v, np.ones((3, 3), bool)), "seed_mask: expected bool"),
        (lambda v: m.flow_mask(v[:1]), "at least 2 frames"),
        (lambda v: m.mask_to_rle(np.zeros((2, 2), bool)), "mask: expected bool"),
    ],
)
def test_refusals_name_argument_and_value(drawn, call, message):
    with pytest.raises(ValueError, match=message):
        call(drawn[0])


class Detector:
    def __init__(self, boxes_of):
        self.boxes_of, self.asked = boxes_of, []

    def boxes(self, picture, phrase):
        self.asked.append(phrase)
        return self.boxes_of(len(self.asked) - 1), np.ones(1)


class Follower:
    def segment(self, frames, box, frame):
        self.called = (box, frame)
        out = np.zeros(frames.shape[:3], bool)
        out[:, int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
        return out


def test_words_become_masks(drawn):
    nothing, found = np.zeros((0, 4)), np.array([[2.0, 3.0, 90.0, 9.0]])
    follower, detector = Follower(), Detector(lambda i: nothing if i == 0 else found)
    mask = m.GroundedSegmenter(detector, follower)(drawn[0], "The Square")
    assert (
        follower.called == ((2.0, 3.0, 64.0, 9.0), 8)
        and mask.sum() == 12 * 6 * 62
        and detector.asked == ["The Square"] * 2
    )
    with pytest.raises(ValueError, match="was found in no frame"):
        m.GroundedSegmenter(Detector(lambda i: nothing), follower)(drawn[0], "cat")


def test_grounding_dino_boxes_are_pixels_best_first():
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    class Inputs(dict):
        def to(self, device):
            return self

    asked = []

    def processor(images, text, return_tensors):
        asked.append(text)
        return Inputs()

    def model(**inputs):
        logits = torch.logit(torch.tensor([[[0.2, 0.1], [0.4, 0.35], [0.1, 0.9]]]))
        return SimpleNamespace(
            logits=logits, pred_boxes=torch.tensor([[[0.5, 0.5, 1, 1], [0.5, 0.5, 0.5, 0.5], [0.25, 0.5, 0.5, 1.0]]])
        )

    boxes, scores = m.GroundingDino(model, processor).boxes(np.zeros((10, 20, 3), np.uint8), "A Red Car.")
    assert (
        asked == ["a red car."]
        and np.allclose(scores, [0.9, 0.4])
        and np.allclose(boxes, [[0, 0, 10, 10], [5, 2.5, 15, 7.5]])
    )
    with pytest.raises(ValueError, match="phrase: expected a noun phrase"):
        m.GroundingDino(model, processor).boxes(np.zeros((10, 20, 3), np.uint8), " ")
