"""Drawn pairs: equal outside the mask, answers that follow from the scene, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.taming_hallucinations import clips


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    frames=st.integers(4, 9),
    size=st.sampled_from([16, 24, 32]),
    n=st.integers(1, 12),
    noise=st.sampled_from([0.0, 0.1]),
)
def test_pairs_are_equal_outside_the_mask_and_before_the_edit(seed, frames, size, n, noise):
    pairs = clips.draw_pairs(n, seed=seed, frames=frames, size=size, noise=noise)
    assert pairs.real.shape == pairs.cf.shape == (n, frames, size, size, 3)
    assert (pairs.real == pairs.cf)[~pairs.mask].all()
    assert not pairs.mask[:, : frames - frames // 3].any()
    assert pairs.mask.any((1, 2, 3)).all()
    assert (pairs.real_answer != pairs.cf_answer).all()


def test_one_seed_is_one_set_of_bytes():
    first, second = clips.draw_pairs(20, seed=5), clips.draw_pairs(20, seed=5)
    assert (first.real == second.real).all() and (first.cf == second.cf).all()
    assert (first.real != clips.draw_pairs(20, seed=6).real).any()


def test_the_answer_to_the_color_question_is_the_color_at_the_end():
    scenes = clips.draw_scenes(60, seed=1, questions=("color",))
    for branch, answer in (("real", scenes.real_answer), ("cf", scenes.cf_answer)):
        last = clips.render_clean(scenes, branch)[:, -1].reshape(60, -1, 3)
        for i in range(60):
            assert (last[i] == clips.COLORS[answer[i]]).all(-1).sum() == scenes.side**2


def test_counting_the_objects_gives_the_answer_to_the_count_question():
    scenes = clips.draw_scenes(40, seed=2, questions=("count",))
    for branch, answer in (("real", scenes.real_answer), ("cf", scenes.cf_answer)):
        last = clips.render_clean(scenes, branch)[:, -1]
        marks = (last == clips.MARK).all(-1).sum((1, 2)) / scenes.side**2
        assert (marks == answer).all()  # option i says i + 1 objects: the square and i marks


def test_the_square_goes_where_the_answer_to_the_direction_question_says():
    scenes = clips.draw_scenes(40, seed=3, questions=("direction",))
    video = clips.render_clean(scenes, "cf")
    for i in range(40):
        places = []
        for frame in (-2, -1):
            rows, columns = np.nonzero((video[i, frame] == clips.COLORS[scenes.color[i]]).all(-1))
            places.append(np.array([columns.min(), rows.min()]))
        step = [(1, 0), (0, 1), (-1, 0), (0, -1)][scenes.cf_answer[i]]
        assert tuple(places[1] - places[0]) == step


def test_an_untouched_question_has_equal_clips_and_answers():
    pairs = clips.draw_pairs(10, seed=4, questions=("side",))
    assert (pairs.real == pairs.cf).all() and (pairs.real_answer == pairs.cf_answer).all()


def test_a_choice_of_rows_keeps_clips_scenes_and_answers_together():
    pairs = clips.draw_pairs(10, seed=7)
    some = pairs[[2, 5]]
    assert len(some) == len(some.scenes) == 2
    assert (some.real == pairs.real[[2, 5]]).all() and (some.cf_answer == pairs.cf_answer[[2, 5]]).all()


def test_captions_say_what_differs():
    scenes = clips.draw_scenes(50, seed=8)
    for i in range(50):
        real, cf = (clips.scene_caption(scenes, i, branch) for branch in ("real", "cf"))
        assert real != cf and real.split(".")[0] == cf.split(".")[0]
        assert clips.category(scenes, i) in {*clips.CATEGORIES.values(), "causal reversal"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n: expected an int >= 1, got 0"),
        ({"frames": 3}, "frames: expected an int >= 4"),
        ({"size": 20}, "size: expected a multiple of 8, got 20"),
        ({"noise": 2.0}, "noise: expected a share"),
        ({"questions": ()}, "questions: expected at least one kind"),
        ({"questions": ("colour",)}, "color"),
    ],
)
def test_refusals_name_argument_and_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        clips.draw_pairs(**{"n": 2, "seed": 0} | arguments)
