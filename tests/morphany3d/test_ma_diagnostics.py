"""Attention maps, feature paths and curves: what they are made of, and what they refuse."""

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "miniatures"))
import trellis_miniature as miniature

from papers10.flow.attention import attention_modules
from papers10.flow.blocks import Attention
from papers10.morphany3d import diagnostics as dg
from papers10.morphany3d.metrics import morph_scores
from papers10.morphany3d.morphing import MorphConfig
from papers10.morphany3d.pipeline import MorphPipeline
from papers10.morphany3d.shapes import Shape
from papers10.morphany3d.trellis import TrellisAdapter


@pytest.fixture(scope="module")
def pipeline():
    return MorphPipeline.from_tiny(steps=4)


@pytest.fixture(scope="module")
def shapes():
    return Shape.random("dog", 900), Shape.random("chair", 950)


@pytest.fixture(scope="module")
def maps(pipeline, shapes):
    return dg.attention_maps(pipeline, *shapes, 0.25)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_maps_are_the_softmax_of_queries_and_keys(qk_norm):
    module = Attention(12, 3, context_dim=8, qk_norm=qk_norm).double()
    x, conditions, alpha = normal(5, 12), [normal(7, 8, seed=1), normal(7, 8, seed=2)], 0.3
    with torch.no_grad():
        source, target, fused = dg.maps_of_inputs(module, x, conditions, alpha)
        q, k_source, _ = module.project(x[None], conditions[0][None])
        _, k_target, _ = module.project(x[None], conditions[1][None])
        mixed = (1 - alpha) * k_source + alpha * k_target
        for found, k in ((source, k_source), (target, k_target), (fused, mixed)):
            a, b = (q, k) if not qk_norm else (module.q_rms_norm(q), module.k_rms_norm(k))
            expected = (a @ b.mT / math.sqrt(4)).softmax(-1)[0]
            # Maps are kept in float32.
            assert torch.allclose(found.double(), expected, atol=1e-6)


def test_maps_explain_what_the_attention_puts_out():
    module = Attention(12, 3, context_dim=8).double()
    x, condition = normal(5, 12), normal(7, 8, seed=1)
    with torch.no_grad():
        source, _, _ = dg.maps_of_inputs(module, x, [condition, condition], 0.5)
        _, _, values = module.project(x[None], condition[None])
        out = module.to_out((source.double() @ values[0]).transpose(0, 1).flatten(1))
        assert torch.allclose(out, module(x[None], condition[None])[0], atol=1e-6)


def test_unequal_conditions_have_no_mixed_map():
    module = Attention(12, 3, context_dim=8).double()
    with torch.no_grad():
        source, target, fused = dg.maps_of_inputs(module, normal(5, 12), [normal(7, 8), normal(4, 8)], 0.5)
    assert source.shape == (3, 5, 7) and target.shape == (3, 5, 4) and fused is None


def test_maps_of_the_structure(maps):
    assert maps.source.shape == maps.target.shape == maps.fused.shape == (4, 64, 64)
    for name in ("source", "target", "fused"):
        assert torch.allclose(getattr(maps, name).sum(-1), torch.ones(4, 64), atol=1e-5)
    assert maps.stage == "ss" and maps.alpha == 0.25 and maps.block.endswith("cross_attn")
    # 16 voxels, 4 cells a side: middles at 1.5, 5.5, 9.5, 13.5, the last axis fastest.
    assert maps.places[0].tolist() == [1.5, 1.5, 1.5] and maps.places[1].tolist() == [1.5, 1.5, 5.5]
    assert maps.token((13, 1, 6)) == 3 * 16 + 0 * 4 + 1


def test_maps_of_the_latents_have_one_row_a_voxel(pipeline, shapes):
    found = dg.attention_maps(pipeline, *shapes, 0.5, stage="slat", config=MorphConfig.preset("kv_ca"), step=1)
    assert found.step == 1 and found.source.shape[1] == len(found.frame.coords)
    voxel = found.frame.coords[3, 1:].tolist()
    assert found.token(voxel) == 3
    assert set(found.of(voxel)) == {"source", "target", "fused"}


def test_pictures_and_words_as_conditions(pipeline, shapes):
    found = dg.attention_maps(pipeline, shapes[0], "chair", 0.5)
    assert found.source.shape[-1] == 64 and found.target.shape[-1] == 4 and found.fused is None
    share = dg.background_share(found, torch.ones(64, dtype=torch.bool), torch.ones(4, dtype=torch.bool))
    assert set(share) == {"mca"} and torch.allclose(share["mca"], torch.ones(64), atol=1e-5)


def test_probe_changes_nothing_and_leaves_no_hook(pipeline, shapes):
    ends = [pipeline.encode(shape) for shape in shapes]
    model = pipeline.backbone.models()["ss"]
    plain = pipeline.blend(ends, (0.5, 0.5), formats=())
    with dg.AttentionProbe(model, steps=[0, 3]) as probe:
        watched = pipeline.blend(ends, (0.5, 0.5), formats=())
    assert torch.equal(plain.logits, watched.logits)
    blocks = [name for name in attention_modules(model) if name.endswith("cross_attn")]
    # Guided steps also call without a condition; those calls are not kept.
    assert set(probe.inputs) == {(name, step) for name in blocks for step in (0, 3)}
    assert not any(module._forward_pre_hooks for module in attention_modules(model).values())


@pytest.mark.parametrize("kind", ["TrellisImageTo3DPipeline", "TrellisTextTo3DPipeline"])
def test_maps_of_a_network_that_joins_voxels_and_has_tokens_for_no_words(tmp_path, kind):
    pipe = getattr(miniature, kind).from_pretrained(miniature.write_trellis(tmp_path, steps=3, kind=kind))
    foreign = MorphPipeline(TrellisAdapter(pipe))
    ends = ["a chair", "two dogs"] if "Text" in kind else [miniature.picture("red"), miniature.picture("blue")]
    model = foreign.backbone.models()["slat"]
    with dg.AttentionProbe(model) as probe:
        foreign.blend([foreign.encode(end) for end in ends], (0.5, 0.5), formats=())
    assert {step for _, step in probe.inputs} == {0, 1, 2}, "one call a step: those without a condition are left out"
    found = dg.attention_maps(foreign, *ends, 0.5, stage="slat")
    assert found.source.shape[1] == len(found.places) == len(found.frame.coords[:, 1:].div(2, rounding_mode="floor").unique(dim=0))
    # The middle of a cell of 2 x 2 x 2 voxels lies half a voxel from each of them.
    nearest = (found.frame.coords[:, None, 1:].float() - found.places).abs().amax(-1).amin(1)
    assert torch.equal(nearest, torch.full_like(nearest, 0.5))
    assert dg.attention_maps(foreign, *ends, 0.5, stage="ss").source.shape[1] == len(dg.attention_maps(foreign, *ends, 0.5, stage="ss").places)


def test_background_shares_by_hand(maps):
    nothing, everything = torch.zeros(64, dtype=torch.bool), torch.ones(64, dtype=torch.bool)
    share = dg.background_share(maps, nothing, everything)
    assert torch.allclose(share["mca"], torch.full((64,), 0.25), atol=1e-5)
    assert torch.allclose(share["fused"], torch.full((64,), 0.25), atol=1e-5)


def test_background_patches_are_those_without_the_object():
    image = torch.zeros(4, 8, 8)
    image[3, 0, 5] = 1.0
    assert dg.background_patches(image, 4).tolist() == [True, False, True, True]


def test_trial_is_deterministic_and_in_range(pipeline):
    first, second = (dg.attention_trial("kv_ca", 100, pairs=1, steps=4, pipeline=pipeline) for _ in range(2))
    assert first == second and set(first) == {"ss", "slat"} and all(0 < value < 1 for value in first.values())


# Paths


def test_straight_and_broken_paths():
    weights = torch.linspace(0, 1, 9, dtype=torch.float64)
    end = normal(6)
    line = weights[:, None] * end
    jump = (weights > 0.5).double()[:, None] * end
    detour = line + torch.sin(math.pi * weights)[:, None] * normal(6, seed=1)
    path = dg.feature_path({"line": line, "jump": jump, "detour": detour})
    assert path.straightness["line"] == pytest.approx(1, abs=1e-9) and path.straightness["detour"] < 0.95
    assert path.largest_step["line"] == pytest.approx(1, abs=1e-9) and path.largest_step["jump"] == pytest.approx(8)
    # Two directions span everything here, so the plane keeps all distances.
    assert path.explained == pytest.approx(1, abs=1e-9)
    assert torch.cdist(path.points["detour"], path.points["detour"]).allclose(torch.cdist(detour, detour), atol=1e-6)


def test_paths_of_pictures_and_by_neighbours():
    images = torch.rand(6, 2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    path = dg.feature_path({"a": images, "b": images.flip(0)})
    assert path.extractor == "tiny-cnn" and path.points["a"].shape == (6, 2)
    assert torch.allclose(path.points["a"], path.points["b"].flip(0), atol=1e-5)
    neighbours = [dg.feature_path({"a": images, "b": images.flip(0)}, method="tsne", seed=1) for _ in range(2)]
    assert neighbours[0].method == "t-SNE" and neighbours[0].explained is None
    assert torch.equal(neighbours[0].points["a"], neighbours[1].points["a"])


# Pictures


def test_figures_are_drawn(maps, shapes):
    pictures = [shape.image().permute(2, 0, 1) for shape in shapes]
    figure = dg.attention_figure(maps, (8, 8, 12), *pictures)
    assert len(figure.axes) == 7
    scores = morph_scores(torch.rand(2, 5, 1, 16, 16, 3, generator=torch.Generator().manual_seed(0)), "pooled")
    _, axis = plt.subplots()
    dg.plot_steps(axis, scores, 1, label="x", jumps=[0, 1, 0, 0])
    assert [text.get_text() for text in axis.texts] == ["90°"] and "PPL" in axis.get_legend_handles_labels()[1][0]
    records = [{"beta": beta, "pdv": 1 - beta, "ppl_sum": 2.0, "lag": beta, "floater_fraction": 0.0} for beta in (0.0, 0.5, 0.0)]
    swept = dg.plot_beta_sweep(records)
    assert swept.axes[0].lines[0].get_ydata().tolist() == [1.0, 0.5]
    dg.feature_path({"a": torch.eye(4)}).plot(axis)
    plt.close("all")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p, s, m: dg.attention_maps(p, *s, 1.5), "alpha"),
        (lambda p, s, m: dg.attention_maps(p, *s, 0.5, stage="sss"), "stage.*did you mean 'ss'"),
        (lambda p, s, m: dg.attention_maps(p, *s, 0.5, block="blocks.9"), "block"),
        (lambda p, s, m: dg.attention_maps(p, *s, 0.5, step=99), "step"),
        (lambda p, s, m: dg.AttentionProbe(torch.nn.Linear(2, 2)), "model"),
        (lambda p, s, m: dg.AttentionProbe(p.backbone.models()["ss"], blocks=["x"]), "blocks"),
        (lambda p, s, m: m.of((1, 2)), "voxel"),
        (lambda p, s, m: dg.background_share(m, torch.ones(3, dtype=torch.bool), torch.ones(64, dtype=torch.bool)), "source"),
        (lambda p, s, m: dg.background_patches(torch.zeros(3, 8, 8)), "image"),
        (lambda p, s, m: dg.background_patches(torch.zeros(4, 8, 8), 9), "patches"),
        (lambda p, s, m: dg.attention_trial("paper", 0), "arm"),
        (lambda p, s, m: dg.feature_path({}), "morphs"),
        (lambda p, s, m: dg.feature_path({"a": torch.ones(2, 3)}), "three frames"),
        (lambda p, s, m: dg.feature_path({"a": torch.ones(3, 3), "b": torch.ones(3, 4)}), "one size"),
        (lambda p, s, m: dg.feature_path({"a": torch.ones(3, 3)}, method="umap"), "method"),
        (lambda p, s, m: dg.feature_path({"a": torch.full((3, 3), math.nan)}), "finite"),
        (lambda p, s, m: dg.plot_beta_sweep([{"beta": 0.0}]), "pdv"),
        (lambda p, s, m: dg.plot_beta_sweep([{"beta": 0.0, "x": 1.0}], good=["x"], cost=[]), "two values"),
    ],
)
def test_refusals(call, match, pipeline, shapes, maps):
    with pytest.raises(ValueError, match=match):
        call(pipeline, shapes, maps)
