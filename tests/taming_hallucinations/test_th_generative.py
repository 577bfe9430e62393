"""Generative editors on a miniature of diffusers' real classes, and on the calls of the image pipelines."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest

from papers10.core.data import LicenceNotAccepted
from papers10.taming_hallucinations import generative as g
from papers10.taming_hallucinations.context import VideoEditor
from papers10.taming_hallucinations.verification import EditSample, MaskLeakage

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipeline():
    return g.miniature_vace()


@pytest.fixture
def clip():
    return np.random.default_rng(0).integers(0, 256, (6, 30, 34, 3), dtype=np.uint8)


@pytest.fixture
def region(clip):
    mask = np.zeros(clip.shape[:3], bool)
    mask[:, 5:20, 8:25] = True
    return mask


def vace(pipeline, **options):
    return g.VaceEditor(pipeline, **{"steps": 1, "guidance": 1.0, "device": "cpu", "dtype": "float32"} | options)


def test_white_means_generate_and_sizes_fit_the_codec(clip, region):
    frames, masks = g.vace_inputs(clip, region)
    assert frames.shape == (9, 32, 48, 3) and masks.shape == (9, 32, 48)
    assert (masks[:6, :30, :34] == 255 * region).all() and (frames[:6, :30, :34][region] == g.GREY).all()
    assert (frames[:6, :30, :34][~region] == clip[~region]).all()
    assert (frames[6:, :30, :34] == frames[5, :30, :34]).all()


@pytest.mark.parametrize(("frames", "padded"), [(1, 1), (2, 5), (5, 5), (6, 9), (81, 81), (82, 85)])
def test_lengths_become_four_k_plus_one(frames, padded):
    assert g.padded_length(frames) == padded


def test_only_the_masked_region_of_the_segment_changes(pipeline, clip, region):
    result = vace(pipeline, t0=2, t1=5).edit(clip, mask=region, instruction="remove the cup", fps=6)
    allowed = np.zeros(clip.shape[:3], bool)
    allowed[2:5] = region[2:5]
    assert (result.mask == allowed).all() and (result.video == clip)[~allowed].all() and (result.video != clip).any()
    assert (result.context.start_s, result.context.end_s, result.context.level) == (2 / 6, 5 / 6, "semantic")
    assert MaskLeakage()(EditSample(clip, result.video, result.mask, result.context, fps=6)).passed


def test_one_seed_is_one_clip(pipeline, clip, region):
    made = [vace(pipeline).edit(clip, mask=region, instruction="turn red", seed=seed).video for seed in (1, 1, 2)]
    assert (made[0] == made[1]).all() and (made[0] != made[2]).any()


def test_reference_masks_stand_at_the_right_end(pipeline, clip, region):
    # diffusers#11779: with reference pictures the mask was padded at the wrong end, so that the first frames were regenerated.
    reference = np.full((30, 34, 3), 200, np.uint8)
    result = vace(pipeline, exact=False).edit(clip, mask=region, instruction="turn red", reference=reference)
    assert result.video.shape == clip.shape
    mask = np.ones((1, 1, 9, 32, 48))
    import torch

    prepared = pipeline.prepare_masks(torch.tensor(mask, dtype=torch.float32), [[torch.zeros(3, 32, 48)]])
    assert prepared.shape[2] == 3 + 1 and not prepared[:, :, 0].any() and prepared[:, :, 1:].all()


def test_both_ends_of_an_interpolation_stay(pipeline, clip):
    made = vace(pipeline).interpolate(clip[0], clip[-1], 6, "let the square float")
    assert (made[0] == clip[0]).all() and (made[-1] == clip[-1]).all() and made.shape == clip.shape


class Image:
    """An image pipeline that records its call and gives a brighter picture."""

    def __init__(self, real):
        self.signature, self.seen = inspect.signature(real.__call__), None

    def __call__(self, **given):
        self.signature.bind(None, **given)
        self.seen = given
        return SimpleNamespace(images=[given["image"].point(lambda v: min(v + 30, 255))])


def test_kontext_is_called_as_it_takes_it_and_vace_fills_the_time(pipeline, clip):
    image = Image(diffusers.FluxKontextPipeline)
    editor = g.KontextVaceEditor(vace(pipeline), kontext_id=image, accept_flux_licence=True)
    result = editor.edit(clip, instruction="let the cup float", seed=4, fps=6)
    assert (
        image.seen["guidance_scale"] == 2.5
        and image.seen["num_inference_steps"] == 28
        and image.seen["prompt"] == "let the cup float"
    )
    assert (result.video[0] == clip[0]).all() and (result.video[-1] == np.minimum(clip[-1].astype(int) + 30, 255)).all()
    assert (
        not result.mask[0].any()
        and result.mask[1:].all()
        and result.context.level == "commonsense"
        and isinstance(editor, VideoEditor)
    )


def test_qwen_is_called_as_it_takes_it(pipeline, clip):
    image = Image(diffusers.QwenImageEditPipeline)
    g.QwenVaceEditor(vace(pipeline), qwen_id=image).edit(clip, instruction="let the cup float")
    assert image.seen["true_cfg_scale"] == 4.0


def test_a_check_may_refuse_the_edited_frame(pipeline, clip):
    editor = g.QwenVaceEditor(
        vace(pipeline), qwen_id=Image(diffusers.QwenImageEditPipeline), check=lambda before, after, said: False
    )
    with pytest.raises(ValueError, match="the check refused"):
        editor.edit(clip, instruction="float")


def test_the_licence_is_asked_for_before_anything_is_loaded():
    with pytest.raises(LicenceNotAccepted, match="accept_flux_licence=True"):
        g.KontextVaceEditor("nowhere")


def test_licences_are_said():
    rows = g.requirements(g.VACE_ID, g.KONTEXT_ID, "mine")
    assert rows[0]["licence"] == "Apache-2.0" and "non-commercial" in rows[1]["licence"] and rows[2]["gpu_gb"] is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, c: e.edit(c), "instruction: expected"),
        (lambda e, c: e.edit(c, instruction="x", mask=np.zeros(c.shape[:3], bool)), "mask: expected something to edit"),
        (lambda e, c: e.interpolate(c[0], c[0, :10], 5, "x"), "last: expected the shape"),
        (lambda e, c: e.interpolate(c[0], c[1], 2, "x"), "frames"),
        (lambda e, c: g.VaceEditor("x", anomaly_type="odd"), "anomaly_type"),
    ],
)
def test_refusals_name_argument_and_value(pipeline, clip, call, message):
    with pytest.raises(ValueError, match=message):
        call(vace(pipeline), clip)
