"""Perceptual measures: closed forms, the LPIPS formula, batches, names, refusals."""

import json
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.data import DataMissing
from papers10.core.optional import MissingExtra, have
from papers10.flow import perceptual as pe


def pictures(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Flat(pe.FeatureExtractor):
    """Two layers: the image, and its mean over 2 x 2."""

    def __init__(self, chunk=64):
        super().__init__("flat", channels=None, chunk=chunk)

    def maps(self, images):
        return [images, torch.nn.functional.avg_pool2d(images, 2)]


class OnlyDistance:
    name = "mean difference"

    def features(self, images):
        raise TypeError("none")

    pooled = features

    def distance(self, a, b):
        return (a - b).abs().flatten(1).mean(1)


def test_length_and_variance_of_known_steps():
    d = torch.tensor([1.0, 2.0, 3.0])
    assert float(pe.perceptual_path_length(d)) == 6
    assert float(pe.perceptual_path_length(d, "mean")) == 2
    assert float(pe.path_variance(d)) == pytest.approx(2 / 3, abs=1e-15)
    assert float(pe.path_variance([4.0])) == 0


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_mean_is_sum_over_steps_and_variance_follows_from_moments(steps):
    d = torch.tensor(steps, dtype=torch.float64)
    total, mean = float(pe.perceptual_path_length(d)), float(pe.perceptual_path_length(d, "mean"))
    assert total == pytest.approx(mean * len(steps), abs=1e-9)
    # Rounding of a difference of squares up to 100.
    assert float(pe.path_variance(d)) == pytest.approx(float((d * d).mean()) - mean**2, abs=1e-9)


def test_frechet_distance_of_two_normals_by_hand():
    line = torch.tensor([[-1.0], [1.0]], dtype=torch.float64) / math.sqrt(2)
    score = pe.fid_of_features(line, 1 + 2 * line, "by hand")
    assert score == pytest.approx(2.0, abs=1e-12) and score.extractor == "by hand" and score.samples == (2, 2)


def test_pooled_pixels_are_the_mean_over_scales_of_block_averages():
    a, b = pictures(3, 8, 8, 2), pictures(3, 8, 8, 2, seed=1)
    total = 0
    for side in (1, 2, 4):
        blocks = (a - b).reshape(3, 8 // side, side, 8 // side, side, 2).mean((2, 4))
        total = total + blocks.abs().flatten(1).mean(1) / 3
    assert torch.allclose(pe.PooledPixels().distance(a, b), total, atol=1e-6)
    assert pe.PooledPixels().pooled(a).shape == (3, 2 * 2 * 2)


def test_feature_distance_is_lpips_with_weights_of_one():
    a, b = pictures(2, 6, 6, 3, dtype=torch.float64), pictures(2, 6, 6, 3, seed=1, dtype=torch.float64)
    expected = torch.zeros(2, dtype=torch.float64)
    for x, y in zip(Flat().features(a), Flat().features(b)):
        for i in range(2):
            for row in range(x.shape[2]):
                for column in range(x.shape[3]):
                    u, v = x[i, :, row, column], y[i, :, row, column]
                    expected[i] += (u / u.norm() - v / v.norm()).square().sum() / (x.shape[2] * x.shape[3])
    assert torch.allclose(Flat().distance(a, b), expected, atol=1e-9)


def test_chunks_do_not_change_the_numbers():
    images = pictures(7, 8, 8, 3)
    for whole, parts in zip(Flat(64).features(images), Flat(2).features(images)):
        assert torch.equal(whole, parts)
    assert torch.equal(Flat(64).pooled(images), Flat(3).pooled(images))


@pytest.mark.parametrize("measure", ["pooled", Flat(), OnlyDistance()], ids=["pooled", "maps", "distance only"])
def test_batched_sequences_equal_one_by_one(measure):
    frames = pictures(2, 3, 5, 8, 8, 3)
    d = pe.perceptual_distances(frames, measure)
    assert d.shape == (2, 3, 4)
    measure = pe.extractor(measure)
    for i in range(2):
        for j in range(3):
            assert torch.allclose(d[i, j], measure.distance(frames[i, j, :-1], frames[i, j, 1:]), atol=1e-6)


def test_equal_frames_have_no_length_and_reversal_changes_nothing():
    frame = pictures(1, 8, 8, 3).expand(4, -1, -1, -1)
    assert float(pe.perceptual_path_length(pe.perceptual_distances(frame, Flat()))) == 0
    frames = pictures(6, 8, 8, 3)
    assert torch.allclose(
        pe.perceptual_distances(frames, "pooled"), pe.perceptual_distances(frames.flip(0), "pooled").flip(0)
    )


def test_path_scores_average_over_views_and_know_the_ends():
    frames = pictures(2, 5, 8, 8, 3)
    source, target = frames[:, 0], frames[:, -1]
    scores = pe.path_scores(frames, "pooled", source=source, target=target)
    singles = [pe.path_scores(view, "pooled") for view in frames]
    for name in ("ppl_sum", "ppl_mean", "pdv"):
        assert scores[name] == pytest.approx(sum(map(float, (s[name] for s in singles))) / 2, abs=1e-9)
    assert scores["start_error"] == 0 == scores["end_error"]
    # A path is never shorter than the distance of its ends: pooled pixels are a metric.
    assert scores["ppl_relative"] >= 1 - 1e-6
    assert {score.extractor for score in scores.values()} == {"pooled"}


def test_equal_ends_leave_out_the_relative_length():
    frames = pictures(4, 8, 8, 3)
    assert "ppl_relative" not in pe.path_scores(frames, "pooled", source=frames[0], target=frames[0])


def test_score_is_a_float_that_prints_its_extractor():
    score = pe.PerceptualScore(0.25, "tiny", (10, 20), 4)
    assert score + 1 == 1.25 and json.dumps([score]) == "[0.25]" and f"{score:.1f}" == "0.2"
    assert str(score) == "0.25 (tiny, 10 and 20 images)"
    copy = pickle.loads(pickle.dumps(score))
    assert (copy, copy.extractor, copy.samples, copy.dimensions) == (0.25, "tiny", (10, 20), 4)


def test_fid_of_a_set_with_itself_is_zero_and_grows_with_a_shift():
    a = pictures(80, 8, 8, 3) * 0.5
    assert pe.fid(a, a, "pooled") == pytest.approx(0, abs=1e-9)
    near, far = pe.fid(a + 0.1, a, "pooled"), pe.fid(a + 0.2, a, "pooled")
    # Only the mean moved: 12 features by the shift each.
    assert near == pytest.approx(12 * 0.01, rel=1e-4) and far == pytest.approx(12 * 0.04, rel=1e-4)


def test_fid_warns_about_too_few_images_and_projects_on_request():
    a, b = pictures(10, 8, 8, 3), pictures(10, 8, 8, 3, seed=1)
    with pytest.warns(UserWarning, match="10 images for 12 features.*at least 13"):
        pe.fid(a, b, "pooled")
    score = pe.fid(a, b, "pooled", components=3)
    assert score.dimensions == 3 and "3 components" in score.extractor and score > 0


def test_uneven_schedule_is_reported():
    frames = pictures(4, 8, 8, 3)
    with pytest.warns(UserWarning, match="steps of 0.1 to 0.8"):
        pe.perceptual_distances(frames, "pooled", alphas=[0.0, 0.1, 0.9, 1.0])


@pytest.mark.filterwarnings("error")
def test_even_schedule_is_not():
    pe.perceptual_distances(pictures(4, 8, 8, 3), "pooled", alphas=torch.linspace(0, 1, 4))
    assert pe.check_even(torch.linspace(1, 0, 50), 50)


def test_registry_refuses_a_second_meaning():
    pe.register_extractor("flat for a test", Flat)
    try:
        assert pe.extractor("flat for a test").name == "flat"
        assert pe.extractor("flat for a test") is pe.extractor("flat for a test")
        pe.register_extractor("flat for a test", Flat)
        with pytest.raises(ValueError, match="flat for a test"):
            pe.register_extractor("flat for a test", OnlyDistance)
    finally:
        del pe.EXTRACTORS["flat for a test"]
    assert isinstance(OnlyDistance(), pe.Extractor) and isinstance(Flat(), pe.Extractor)


GOOD = pictures(4, 8, 8, 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: pe.perceptual_distances((GOOD * 255).to(torch.uint8), "pooled"), TypeError, "frames.*uint8"),
        (lambda: pe.perceptual_distances(GOOD.numpy(), "pooled"), TypeError, "frames.*ndarray"),
        (lambda: pe.perceptual_distances(GOOD + 1, "pooled"), ValueError, r"frames.*\[0, 1\]"),
        (lambda: pe.perceptual_distances(GOOD * float("nan"), "pooled"), ValueError, "frames.*finite"),
        (lambda: pe.perceptual_distances(GOOD[0], "pooled"), ValueError, "frames"),
        (lambda: pe.perceptual_distances(GOOD[:1], "pooled"), ValueError, "frames.*two"),
        (lambda: pe.perceptual_distances(GOOD[:0], "pooled"), ValueError, "frames"),
        (lambda: pe.perceptual_distances(GOOD[:, :6], "pooled"), ValueError, "multiples of 4"),
        (lambda: pe.perceptual_distances(GOOD, "lpip-alex"), ValueError, "did you mean 'lpips-alex'"),
        (lambda: pe.perceptual_distances(GOOD, 3), TypeError, "extractor"),
        (lambda: pe.perceptual_distances(GOOD, "pooled", alphas=[0, 1]), ValueError, "alphas.*4"),
        (lambda: pe.perceptual_distances(GOOD, "pooled", alphas=[0, 0.5, 1, 1.5]), ValueError, "alphas"),
        (lambda: pe.perceptual_path_length([]), ValueError, "d"),
        (lambda: pe.perceptual_path_length([1.0], "median"), ValueError, "reduction"),
        (lambda: pe.path_variance([float("nan")]), ValueError, "d"),
        (lambda: pe.path_variance([-1.0]), ValueError, ">= 0"),
        (lambda: pe.fid(GOOD[:1], GOOD, "pooled"), ValueError, "a: expected at least two"),
        (lambda: pe.fid(GOOD, GOOD, "pooled", components=9), ValueError, "components"),
        (lambda: pe.fid_of_features(torch.ones(3, 2), torch.ones(3, 1), "x"), ValueError, "b: expected 2"),
        (lambda: pe.path_scores(GOOD, "pooled", source=GOOD[0, :4]), ValueError, "source"),
        (lambda: pe.path_scores(GOOD[None, None], "pooled"), ValueError, "frames"),
        (lambda: pe.PooledPixels(()), ValueError, "scales"),
        (lambda: pe.PooledPixels().distance(GOOD, GOOD[:2]), ValueError, "b: expected shape"),
        (lambda: pe.LPIPS("resnet"), ValueError, "network"),
        (lambda: pe.FLIP(pixels_per_degree=0), ValueError, "pixels_per_degree"),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("name", ["lpips-alex", "inception-v3"])
def test_networks_are_never_fetched_unasked(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises((MissingExtra, DataMissing), match="papers10\\[metrics\\]|download=True"):
        pe.EXTRACTORS[name]()


def test_the_list_says_what_is_missing():
    rows = {row["extractor"]: row["state"] for row in pe.available_extractors()}
    assert rows["pooled"] == "ready" and set(rows) >= {"lpips-alex", "inception-v3", "flip"}


def test_lpips_equals_the_package():
    lpips = pytest.importorskip("lpips")
    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    a, b = pictures(2, 64, 64, 3), pictures(2, 64, 64, 3, seed=1)
    with torch.no_grad():
        expected = model(a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2), normalize=True).flatten()
    # Same operations in the same order, float32.
    assert torch.allclose(pe.LPIPS(size=None, model=model).distance(a, b), expected, atol=1e-6)


@pytest.mark.skipif(not have("flip_evaluator"), reason="flip-evaluator is not installed")
def test_flip_is_zero_for_equal_images_and_grows():
    flip = pe.extractor("flip")
    a = pictures(2, 32, 32, 3) * 0.5
    assert float(flip.distance(a, a).abs().max()) == 0
    assert bool((flip.distance(a, a + 0.3) > flip.distance(a, a + 0.1)).all())
    with pytest.raises(TypeError, match="no features"):
        flip.features(a)
