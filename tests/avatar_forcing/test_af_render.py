"""The drawn face: geometry, gradients, masks, mark."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.avatar_forcing.data import PARAMETERS
from papers10.avatar_forcing.render import (
    IDENTITY_SIZE,
    FaceRenderer,
    dyad_frames,
    face_strip,
    sample_identity,
    to_pictures,
    watermark,
)
from papers10.core.random import generator


@pytest.fixture(scope="module")
def people():
    return sample_identity(4, generator(0, "people"))


def face(**values):
    params = torch.zeros(1, 8)
    for name, value in values.items():
        params[0, PARAMETERS.index(name)] = value
    return params


def change(people, size=64, **values):
    """Where a parameter changes the picture: rows and columns of pixel centres, weighted."""
    renderer = FaceRenderer(size)
    difference = (renderer(face(**values), people[:1]) - renderer(face(), people[:1])).abs().sum(1)[0]
    centres = (torch.arange(size) * 2 + 1) / size - 1
    weight = difference / difference.sum()
    return float(difference.max()), float((weight.sum(1) * centres).sum()), float((weight.sum(0) * centres).sum())


def test_identities(people):
    assert people.shape == (4, IDENTITY_SIZE) and torch.equal(people, sample_identity(4, generator(0, "people")))
    many = sample_identity(500, generator(1, "many"))
    assert float(many[:, :12].abs().max()) <= 1
    for column, low, high in ((12, 0.48, 0.62), (13, 0.62, 0.78), (14, 0.20, 0.28)):
        assert low <= float(many[:, column].min()) < low + 0.01 and high - 0.01 < float(many[:, column].max()) <= high


@given(st.integers(0, 5), st.sampled_from([8, 17, 32]), st.booleans())
@settings(max_examples=10, deadline=None)
def test_shapes(n, size, double):
    dtype = torch.float64 if double else torch.float32
    params, identity = torch.zeros(n, 8, dtype=dtype), sample_identity(n, generator(0, "n"))
    pictures, masks = FaceRenderer(size)(params, identity), FaceRenderer(size).masks(params, identity)
    assert pictures.shape == (n, 3, size, size) and pictures.dtype == dtype
    assert masks["eyes"].shape == masks["mouth"].shape == (n, 1, size, size)
    if n:
        assert float(pictures.abs().max()) <= 1 and all(0 <= float(m.min()) and float(m.max()) <= 1 for m in masks.values())


def test_a_picture_does_not_depend_on_its_batch(people):
    params = 0.4 * torch.randn(70, 8, generator=generator(0, "params"))
    together = FaceRenderer(32)(params, people[:1])
    assert torch.allclose(together[45:46], FaceRenderer(32)(params[45:46], people[:1]), atol=1e-5)


def test_colours_are_the_identitys(people):
    picture = FaceRenderer(64)(face(), people[:1])[0]
    assert torch.allclose(picture[:, 1, 1], people[0, 6:9], atol=1e-3)  # background in a corner
    assert torch.allclose(picture[:, 36, 22], people[0, :3], atol=0.05)  # a cheek


@pytest.mark.parametrize(
    ("values", "row", "column"),
    [({"jaw": 1.0}, 0.42, 0), ({"smile": 1.0}, 0.38, 0), ({"brow": 1.0}, -0.3, 0), ({"blink": 1.0}, -0.12, 0), ({"gaze": 1.0}, -0.12, 0)],
)
def test_a_parameter_moves_its_own_part(people, values, row, column):
    largest, at_row, at_column = change(people, **values)
    assert largest > 0.1 and at_row == pytest.approx(row, abs=0.08) and at_column == pytest.approx(column, abs=0.05)


@pytest.mark.parametrize("name", ["yaw", "pitch", "roll"])
def test_head_turns_change_much_of_the_picture(people, name):
    renderer = FaceRenderer(64)
    moved = (renderer(face(**{name: 0.7}), people[:1]) - renderer(face(), people[:1])).abs().amax(1) > 0.1
    assert float(moved.float().mean()) > 0.03


def test_yaw_left_and_right_mirror_each_other(people):
    renderer = FaceRenderer(64)
    assert torch.allclose(renderer(face(yaw=0.5, smile=0.4), people[:1]), renderer(face(yaw=-0.5, smile=0.4), people[:1]).flip(-1), atol=1e-5)
    assert torch.allclose(renderer(face(gaze=0.8, roll=0.3), people[:1]), renderer(face(gaze=-0.8, roll=-0.3), people[:1]).flip(-1), atol=1e-5)


def test_the_opened_mouth_is_dark_and_the_closed_eye_stays_in_place(people):
    renderer = FaceRenderer(128)
    opened = renderer(face(jaw=1.0), people[2:3])[0]
    row = int((0.43 + 1) / 2 * 128)
    assert float(opened[:, row, 64].mean()) < -0.7
    closed = renderer(face(blink=1.0), people[:1])[0] - renderer(face(), people[:1])[0]
    at = int((-0.12 + 1) / 2 * 128)
    assert float(closed[:, at, 2:20].abs().max()) < 0.02  # no line over the cheek and the background


def test_masks_follow_the_head(people):
    renderer = FaceRenderer(64)
    still, moved = renderer.masks(face(), people[:1]), renderer.masks(face(yaw=1.0), people[:1])
    centres = (torch.arange(64) * 2 + 1) / 64 - 1
    middle = lambda mask: float((mask[0, 0].sum(0) * centres).sum() / mask.sum())
    for name in ("eyes", "mouth"):
        assert middle(still[name]) == pytest.approx(0, abs=0.01) and middle(moved[name]) == pytest.approx(0.28, abs=0.03)
    change = (renderer(face(jaw=1.0), people[:1]) - renderer(face(), people[:1])).abs().sum(1, keepdim=True)
    assert float((change * still["mouth"]).sum() / change.sum()) > 0.8
    wink = (renderer(face(blink=1.0), people[:1]) - renderer(face(), people[:1])).abs().sum(1, keepdim=True)
    assert float((wink * still["eyes"]).sum() / wink.sum()) > 0.6


def test_gradients():
    renderer, params = FaceRenderer(10, softness=0.1), torch.tensor([[0.4, 0.5, 0.3, 0.2, 0.3, -0.2, 0.4, 0.5]], dtype=torch.float64, requires_grad=True)
    identity = sample_identity(1, generator(0, "g")).double().requires_grad_()
    assert torch.autograd.gradcheck(renderer, (params, identity))


def test_gradients_are_finite_at_rest(people):
    params = torch.zeros(2, 8, requires_grad=True)
    FaceRenderer(32)(params, people[:2]).square().sum().backward()
    assert bool(params.grad.isfinite().all())


def test_inputs_are_not_changed(people):
    params, identity = 0.3 * torch.randn(3, 8), people[:3].clone()
    kept = params.clone()
    watermark(FaceRenderer(32)(params, identity))
    assert torch.equal(params, kept) and torch.equal(identity, people[:3])


@pytest.mark.parametrize("size", [16, 64, 200])
def test_watermark_is_small_and_seen(size):
    frames = torch.zeros(2, 3, size, size, requires_grad=True)
    marked = watermark(frames)
    changed = (marked != frames).any(1)
    assert bool(changed.any()) and torch.equal(marked[0], marked[1])
    assert not bool(changed[:, : size // 2].any()) and float(changed.float().mean()) < 0.5
    assert float(marked.detach().abs().max()) <= 1
    marked.sum().backward()
    assert bool(frames.grad.isfinite().all())
    assert torch.equal(watermark(frames, strength=0.0), frames)


def test_pictures_strip_and_dyad(people):
    frames = torch.tensor([-3.0, -1.0, 0.0, 1.0]).reshape(4, 1, 1, 1).expand(4, 3, 2, 2)
    assert to_pictures(frames)[:, 0, 0, 0].tolist() == [0, 0, 0.5, 1]
    strip = face_strip(FaceRenderer(16), torch.zeros(3, 8), people[:1], gap=2)
    assert strip.shape == (16, 3 * 16 + 4, 3) and bool((strip[:, 16:18] == 1).all())
    clip = dyad_frames(torch.zeros(5, 8), torch.ones(5, 8) * 0.2, people[:2], size=32)
    assert clip.shape == (5, 32, 64, 3) and 0 <= float(clip.min()) and float(clip.max()) <= 1
    plain = dyad_frames(torch.zeros(5, 8), torch.ones(5, 8) * 0.2, people[:2], size=32, mark=False)
    assert torch.equal(clip[:, :, :32], plain[:, :, :32]) and not torch.equal(clip, plain)


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda p: FaceRenderer(4), ValueError, "size"),
        (lambda p: FaceRenderer(64.0), TypeError, "size"),
        (lambda p: FaceRenderer(64, 0.0), ValueError, "softness"),
        (lambda p: FaceRenderer(16)(torch.zeros(2, 7), p[:2]), ValueError, "params"),
        (lambda p: FaceRenderer(16)(torch.zeros(2, 8, dtype=torch.long), p[:2]), TypeError, "params"),
        (lambda p: FaceRenderer(16)(torch.full((1, 8), float("nan")), p[:1]), ValueError, "params"),
        (lambda p: FaceRenderer(16)(torch.zeros(3, 8), p[:2]), ValueError, "identity"),
        (lambda p: FaceRenderer(16)(torch.zeros(1, 8), torch.zeros(1, 15)), ValueError, "half-axes"),
        (lambda p: FaceRenderer(16)(np.zeros((1, 8)), p[:1]), TypeError, "params"),
        (lambda p: sample_identity(2, 0), TypeError, "generator"),
        (lambda p: sample_identity(-1, generator(0, "x")), ValueError, "n"),
        (lambda p: watermark(torch.zeros(3, 8, 8)), ValueError, "frames"),
        (lambda p: watermark(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), TypeError, "frames"),
        (lambda p: watermark(torch.zeros(1, 3, 32, 32), ""), ValueError, "text"),
        (lambda p: watermark(torch.zeros(1, 3, 32, 32), strength=2.0), ValueError, "strength"),
        (lambda p: dyad_frames(torch.zeros(2, 8), torch.zeros(3, 8), p[:2]), ValueError, "avatar"),
    ],
)
def test_bad_input(people, call, error, word):
    with pytest.raises(error, match=word):
        call(people)
