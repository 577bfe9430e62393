"""Modes of a morph: what each keeps, the sheet of both weights, several ends, and what is refused."""

import pytest
import torch

from papers10.morphany3d.backbone import TinyConfig, new_tiny
from papers10.morphany3d.modes import (
    MODES,
    barycentric_weights,
    color_distance,
    mode_config,
    modes_trial,
    morph_mode,
    morph_sheet,
    morph_simplex,
    shape_overlap,
)
from papers10.morphany3d.morphing import MorphConfig
from papers10.morphany3d.pipeline import MorphFrame, MorphPipeline, TinyAdapter
from papers10.morphany3d.shapes import Shape

SOURCE, TARGET, OTHER = (Shape.random(name, 3, p_rotated=0.0) for name in ("car", "chair", "tree"))


@pytest.fixture(scope="module")
def pipeline():
    """An untrained generator: what is kept exactly is kept by any weights."""
    model = new_tiny(4, TinyConfig())
    with torch.no_grad():
        # The networks end in zeros before training; without this no condition would matter.
        draw = torch.Generator().manual_seed(0)
        for network in (model.ss_flow, model.slat_flow):
            for parameter in network.parameters():
                if not parameter.any():
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    return MorphPipeline(TinyAdapter(model, steps=2))


def frame(logits, colors):
    feats = torch.cat([1.5 * (2 * torch.as_tensor(colors) - 1), torch.zeros(len(colors), 4)], 1)
    coords = torch.zeros(len(colors), 4, dtype=torch.int32)
    return MorphFrame(0, 0.0, 0.0, logits, coords, {"slat": feats})


@pytest.mark.parametrize("mode", MODES)
def test_a_stage_that_stays_has_weight_zero_and_attends_to_the_source(mode):
    config = mode_config(mode, 5)
    still = {"structure": ["slat"], "detail": ["ss"], "style": ["ss"]}.get(mode, [])
    for stage in ("ss", "slat"):
        assert (set(config.alphas(stage)) == {0.0}) == (stage in still)
        assert (config.ca(stage) == "none") == (stage in still)
        assert (config.sa(stage) == "none") == (stage in still)


def test_the_schedule_is_that_of_what_morphs():
    assert mode_config("detail", 5, schedule="smoothstep").alphas("slat") == MorphConfig(n_frames=5, schedule="smoothstep").alphas("ss")
    both = mode_config("full", 3, slat_schedule=(0.0, 0.1, 1.0))
    assert both.alphas("ss") == [0, 0.5, 1] and both.alphas("slat") == [0, 0.1, 1]


@pytest.mark.parametrize("call, message", [
    (lambda: mode_config("detial"), "did you mean 'detail'"),
    (lambda: mode_config("full", 1), "n_frames"),
    (lambda: mode_config("detail", 3, slat_schedule=(0, 0, 1)), "slat_schedule"),
    (lambda: morph_mode(None, "dual", SOURCE, TARGET), "detail: expected the target"),
    (lambda: morph_mode(None, "style", SOURCE, TARGET, detail=OTHER), "detail: expected none"),
    (lambda: morph_sheet(None, SOURCE, TARGET, alphas=(0,)), "alphas"),
    (lambda: morph_sheet(None, SOURCE, TARGET, slat_alphas=(1.2,)), "alpha"),
    (lambda: barycentric_weights(1, 3), "ends"),
    (lambda: barycentric_weights(3, 0), "divisions"),
    (lambda: morph_simplex(None, [SOURCE, TARGET], torch.ones(2, 3)), "weights"),
    (lambda: modes_trial("fast", 0), "arm"),
])  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_detail_keeps_the_structure_to_the_bit_although_the_noise_is_interpolated(pipeline):
    frames = morph_mode(pipeline, "detail", SOURCE, TARGET, n_frames=3, seed=1).frames
    assert all(torch.equal(other.logits, frames[0].logits) for other in frames[1:])
    assert not torch.equal(frames[0].features, frames[-1].features)


def test_structure_moves_the_structure(pipeline):
    frames = morph_mode(pipeline, "structure", SOURCE, TARGET, n_frames=3, seed=1, oc=False).frames
    full = morph_mode(pipeline, "full", SOURCE, TARGET, n_frames=3, seed=1, oc=False).frames
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(frames, full))
    assert not torch.equal(frames[-1].features, full[-1].features)


def test_dual_takes_its_details_from_the_second_target(pipeline):
    dual = morph_mode(pipeline, "dual", SOURCE, TARGET, detail=OTHER, n_frames=2, seed=1, oc=False).frames[-1]
    full = morph_mode(pipeline, "full", SOURCE, TARGET, n_frames=2, seed=1, oc=False).frames[-1]
    assert torch.equal(dual.logits, full.logits) and not torch.equal(dual.features, full.features)


def test_edges_of_the_sheet_are_the_modes(pipeline):
    plain = MorphConfig.preset("mca")
    sheet = morph_sheet(pipeline, SOURCE, TARGET, alphas=(0.0, 0.5, 1.0), slat_alphas=(0.0, 1.0), config=plain, seed=1)
    lower = morph_mode(pipeline, "structure", SOURCE, TARGET, n_frames=3, seed=1, oc=False, ss_sa="none").frames
    for a, b in zip(sheet.frames[0], lower):
        torch.testing.assert_close(a.features, b.features, rtol=0, atol=1e-5)  # MCA of weight 0 against no MCA: the same numbers
    for column in range(3):
        assert torch.equal(sheet.frames[0][column].logits, sheet.frames[1][column].logits)


def test_a_word_and_a_picture_have_unequal_tokens(pipeline):
    frames = pipeline.sequence(SOURCE, "chair", MorphConfig.preset("mca", n_frames=3)).frames
    assert all(torch.isfinite(one.features).all() for one in frames)
    with pytest.raises(ValueError, match="64 and 4"):
        pipeline.sequence(SOURCE, "chair", MorphConfig.preset("kv_ca", n_frames=3))


def test_weights_of_a_simplex():
    weights = barycentric_weights(3, 4)
    assert weights.shape == (15, 3) and weights.min() == 0
    assert torch.equal(weights.sum(1), torch.ones(15, dtype=torch.float64))  # quarters add up exactly
    assert len(weights.unique(dim=0)) == 15
    assert weights[0].tolist() == [1, 0, 0] and weights[-1].tolist() == [0, 0, 1]


def test_a_corner_of_the_simplex_is_that_end_alone(pipeline):
    ends = [SOURCE, TARGET, OTHER]
    corner, between = morph_simplex(pipeline, ends, torch.tensor([[1.0, 0, 0], [0.2, 0.3, 0.5]]), seed=2)
    alone = morph_mode(pipeline, "full", SOURCE, TARGET, n_frames=2, seed=2).frames[0]
    assert torch.equal(corner.logits, alone.logits)
    assert not torch.equal(between.logits, corner.logits)


def test_shape_overlap_by_hand():
    a, b = torch.full((4, 4, 4), -1.0), torch.full((4, 4, 4), -1.0)
    a[:2], b[1:3] = 1, 1
    assert shape_overlap(frame(a, torch.rand(1, 3)), frame(b, torch.rand(1, 3))) == pytest.approx(1 / 3)
    empty = frame(torch.full((4, 4, 4), -1.0), torch.rand(1, 3))
    assert shape_overlap(empty, empty) == 1
    with pytest.raises(ValueError, match="grid"):
        shape_overlap(empty, frame(torch.zeros(2, 2, 2), torch.rand(1, 3)))


def test_color_distance_by_hand():
    box = torch.ones(2, 2, 2)
    black, white, half = (frame(box, torch.tensor(colors)) for colors in ([[0.0] * 3] * 4, [[1.0] * 3] * 7, [[0.0] * 3, [1.0] * 3]))
    assert color_distance(black, white) == pytest.approx(1, abs=1e-6)  # float32 colours
    assert color_distance(black, half) == pytest.approx(0.5, abs=1e-6)
    assert color_distance(black, black) == 0
    with pytest.raises(ValueError, match="tokens"):
        color_distance(black, frame(box, torch.zeros(0, 3)))


def test_the_trial_is_deterministic_and_says_what_is_kept(pipeline):
    kept = modes_trial("detail", 100, pairs=2, n_frames=2, steps=2, pipeline=pipeline)
    assert kept == modes_trial("detail", 100, pairs=2, n_frames=2, steps=2, pipeline=pipeline)
    assert kept["source_iou"] == 1 and kept["shape_step"] == 0
    assert modes_trial("detail_flags", 100, pairs=2, n_frames=2, steps=2, pipeline=pipeline)["source_iou"] < 1
