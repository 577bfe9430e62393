"""splat.losses: hand values, invariants, gradients in float64, weights of zero, every refusal."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.splat import losses as lo
from papers10.splat.rotations import quat_to_matrix, so3_exp

FLOAT64 = torch.float64
NAN = float("nan")


def draw(*shape, name="losses", dtype=FLOAT64):
    return torch.rand(*shape, generator=generator(0, name, *shape), dtype=dtype)


def gradients(function, *inputs):
    return torch.autograd.gradcheck(function, tuple(value.clone().requires_grad_() for value in inputs))


@pytest.mark.parametrize(("shape", "data_range"), [((16, 19, 1), 1.0), ((23, 11, 3), 255.0)])
def test_ssim_is_scikit_images(shape, data_range):
    skimage = pytest.importorskip("skimage.metrics")
    a = draw(*shape, name="a") * data_range
    b = (a + 0.3 * data_range * draw(*shape, name="b")).clamp_max(data_range)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    wanted = skimage.structural_similarity(a.numpy(), b.numpy(), data_range=data_range, channel_axis=-1, **options)
    assert float(lo.ssim(a, b, data_range=data_range)) == pytest.approx(wanted, rel=1e-9)


def test_ssim_window_is_a_plain_gaussian_filter():
    a, b = draw(13, 14, 2, name="a"), draw(13, 14, 2, name="b")
    axis = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = torch.from_numpy(np.outer(axis, axis) / axis.sum() ** 2)[..., None]
    low, high = a[1:12, 2:13], b[1:12, 2:13]
    mean_a, mean_b = (window * low).sum((0, 1)), (window * high).sum((0, 1))
    spread_a = (window * (low - mean_a) ** 2).sum((0, 1))
    spread_b = (window * (high - mean_b) ** 2).sum((0, 1))
    cross = (window * (low - mean_a) * (high - mean_b)).sum((0, 1))
    wanted = (2 * mean_a * mean_b + 1e-4) * (2 * cross + 9e-4)
    wanted = wanted / ((mean_a**2 + mean_b**2 + 1e-4) * (spread_a + spread_b + 9e-4))
    torch.testing.assert_close(lo.ssim_map(a, b)[1, 2], wanted)


def test_ssim_batches_symmetry_and_smallest_picture():
    a, b = draw(2, 3, 12, 11, 3, name="a"), draw(2, 3, 12, 11, 3, name="b")
    assert lo.ssim(a, b).shape == (2, 3)
    torch.testing.assert_close(lo.ssim(a, b)[1, 2], lo.ssim(a[1, 2], b[1, 2]))
    torch.testing.assert_close(lo.ssim(a, b), lo.ssim(b, a))
    assert lo.ssim_map(a, b, window=3).shape == (2, 3, 10, 9, 3)
    torch.testing.assert_close(lo.ssim(a[0, 0, :, :, :1], a[0, 0, :, :, :1], window=1), torch.ones((), dtype=FLOAT64))


def test_ssim_in_single_and_half_precision():
    a, b = draw(20, 20, 3, name="a"), draw(20, 20, 3, name="b")
    assert lo.ssim(a.float(), b.float()).item() == pytest.approx(lo.ssim(a, b).item(), abs=1e-5)
    assert lo.ssim(a.half(), b.half()).dtype == torch.float32


def test_gradients_of_picture_losses():
    a, b = draw(2, 6, 7, 2, name="a"), draw(2, 6, 7, 2, name="b")
    assert gradients(lambda x, y: lo.ssim(x, y, window=5), a, b)
    assert torch.autograd.gradgradcheck(lambda x: lo.ssim(x, b[:1], window=5), (a[:1].clone().requires_grad_(),))
    assert gradients(lambda x, y: lo.gradient_l1(x, y, levels=2), a, b)
    wide = draw(1, 11, 12, 1, name="wide")
    weights = draw(11, 12, name="weights")
    assert gradients(lambda x: lo.photometric_loss(x, wide * 0.5, weights=weights), wide)


def test_photometric_loss_by_hand():
    a, b = draw(2, 12, 13, 3, name="a"), draw(2, 12, 13, 3, name="b")
    torch.testing.assert_close(lo.photometric_loss(a, b, ssim_weight=0), (a - b).abs().mean())
    torch.testing.assert_close(lo.photometric_loss(a, b, ssim_weight=1), 1 - lo.ssim(a, b).mean())
    mixed = 0.8 * (a - b).abs().mean() + 0.2 * (1 - lo.ssim(a, b).mean())
    torch.testing.assert_close(lo.photometric_loss(a, b), mixed)
    torch.testing.assert_close(lo.photometric_loss(a, b, weights=torch.full((12, 13), 0.3)), mixed)
    weights = draw(2, 12, 13, name="weights")[..., None]
    wanted = ((a - b).abs() * weights).sum() / (3 * weights.sum())
    torch.testing.assert_close(lo.photometric_loss(a, b, ssim_weight=0, weights=weights[..., 0]), wanted)


@pytest.mark.parametrize("spoil", ["prediction", "target", "both"])
def test_pixels_of_weight_zero_take_no_part(spoil):
    a, b = draw(14, 15, 3, name="a"), draw(14, 15, 3, name="b")
    weights = torch.ones(14, 15)
    weights[:3, :4] = 0
    bad_a, bad_b = a.clone(), b.clone()
    if spoil != "target":
        bad_a[:3, :4] = NAN
    if spoil != "prediction":
        bad_b[:3, :4] = NAN
    bad_a.requires_grad_()
    loss = lo.photometric_loss(bad_a, bad_b, weights=weights)
    loss.backward()
    assert loss.isfinite() and bad_a.grad.isfinite().all()
    assert not bad_a.grad[:3, :4].any() and bad_a.grad[3:].all()


def test_nothing_counts_gives_zero_with_a_graph():
    picture, points = draw(12, 12, 3).requires_grad_(), draw(5, 2).requires_grad_()
    flat = torch.full((2, 4, 4), 3.0, requires_grad=True)
    cases = [
        (picture, lo.photometric_loss(picture, 0 * picture.detach(), weights=torch.zeros(12, 12))),
        (points, lo.track_loss(points, NAN * points.detach(), torch.zeros(5), (8, 8))),
        (flat, lo.ssi_depth_loss(flat, torch.rand(2, 4, 4))),
        (flat, lo.ssi_depth_loss(flat, torch.rand(2, 4, 4), mask=torch.zeros(2, 4, 4, dtype=torch.bool))),
        (flat, lo.mask_loss(flat, torch.zeros(2, 4, 4), weights=torch.zeros(2, 4, 4))),
        (points, lo.arap_loss(points[:, [0, 1, 1]], points[:, [0, 1, 1]], torch.zeros(5, 0, dtype=torch.int64))),
    ]
    for leaf, loss in cases:
        leaf.grad = None
        loss.backward()
        assert loss == 0 and not leaf.grad.any()


def test_a_nan_that_counts_reaches_the_loss():
    picture = draw(12, 12, 3)
    picture[2, 2] = NAN
    assert lo.photometric_loss(picture, draw(12, 12, 3)).isnan()
    assert lo.ssi_depth_loss(picture[..., 0], draw(12, 12)).isnan()
    points = draw(6, 3)
    points[2] = NAN
    assert lo.track_loss(points[:, :2], draw(6, 2), None, (8, 8)).isnan()
    assert lo.arap_loss(draw(6, 3), points, lo.neighbours(draw(6, 3), 2)).isnan()


def test_gradient_l1_levels():
    ramp = 0.1 * torch.arange(8, dtype=FLOAT64)[None, :, None].expand(8, 8, 1)
    for levels, wanted in ((1, 0.1), (2, 0.15), (3, 0.7 / 3), (9, 0.7 / 3)):
        assert lo.gradient_l1(ramp, torch.zeros_like(ramp), levels=levels).item() == pytest.approx(wanted)
        torch.testing.assert_close(
            lo.gradient_l1(ramp.transpose(0, 1), torch.zeros_like(ramp), levels=levels).item(), wanted
        )
    assert lo.gradient_l1(torch.rand(1, 1, 3), torch.zeros(1, 1, 3)) == 0
    assert lo.gradient_l1(torch.rand(1, 5, 3), torch.zeros(1, 5, 3)) > 0


@settings(deadline=None, max_examples=30)
@given(st.floats(0.1, 50), st.floats(-20, 20), st.booleans())
def test_depth_loss_is_blind_to_scale_and_shift(scale, shift, masked):
    depth, other = draw(2, 7, 8, name="depth"), draw(2, 7, 8, name="other")
    mask = draw(2, 7, 8, name="mask") > 0.4 if masked else None
    assert lo.ssi_depth_loss(scale * depth + shift, depth, mask=mask) < 1e-18
    torch.testing.assert_close(
        lo.ssi_depth_loss(scale * depth + shift, other, mask=mask), lo.ssi_depth_loss(depth, other, mask=mask)
    )


def test_depth_loss_by_hand():
    ours, theirs = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[0.0, 1.0, 2.0]])
    # Medians 1, 1; mean absolute deviations 5/3, 2/3.
    wanted = ((-0.6 + 1.5) ** 2 + (2.4 - 1.5) ** 2) / 3
    assert lo.ssi_depth_loss(ours, theirs).item() == pytest.approx(wanted)
    both = lo.ssi_depth_loss(torch.stack([ours, ours]), torch.stack([theirs, torch.ones_like(theirs)]))
    assert both.item() == pytest.approx(wanted)
    masked = torch.tensor([[0.0, 1.0, 5.0, NAN]]), torch.tensor([[0.0, 1.0, 2.0, 7.0]])
    assert lo.ssi_depth_loss(*masked, mask=torch.tensor([[1, 1, 1, 0]])).item() == pytest.approx(wanted)
    assert lo.ssi_depth_loss(-theirs, theirs) > 1
    assert gradients(lambda x, y: lo.ssi_depth_loss(x, y), draw(2, 3, 5, name="a"), draw(2, 3, 5, name="b"))


def test_mask_loss_by_hand():
    rendered = torch.tensor([0.25, 0.5, 1.0])
    assert lo.mask_loss(rendered, torch.tensor([0, 1, 1])).item() == pytest.approx((0.0625 + 0.25) / 3)
    weights = torch.tensor([3.0, 1.0, 0.0])
    got = lo.mask_loss(rendered, torch.tensor([0.0, 1.0, NAN]), weights=weights)
    assert got.item() == pytest.approx((3 * 0.0625 + 0.25) / 4)
    assert gradients(lambda x: lo.mask_loss(x, draw(4, 5, name="t")), draw(4, 5))


def test_track_loss_by_hand():
    ours = torch.tensor([[0.0, 0.0], [10.0, 0.0], [5.0, 5.0]])
    theirs = torch.tensor([[3.0, -4.0], [10.0, 1.0], [NAN, NAN]])
    assert lo.track_loss(ours[:2], theirs[:2], None, (20, 10), quantile=1).item() == pytest.approx((7 + 1) / 2 / 20)
    got = lo.track_loss(ours, theirs, torch.tensor([1.0, 3.0, 0.0]), (10, 20), quantile=1)
    assert got.item() == pytest.approx((7 + 3) / 4 / 20)
    assert lo.track_loss(ours, theirs, torch.tensor([1.0, 3.0, 0.0]), (10, 20), quantile=0.5).item() == pytest.approx(
        1 / 20
    )
    assert lo.track_loss(ours[:2], theirs[:2], None, 20) == lo.track_loss(ours[:2], theirs[:2], None, (10, 20))
    assert gradients(lambda x, y: lo.track_loss(x, y, draw(9, name="w"), (8, 8)), draw(9, 2, name="a"), draw(9, 2))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.floats(-5, 5))
def test_rigid_motion_costs_nothing(turn, shift):
    points = torch.randn(20, 3, generator=generator(0, "cloud"), dtype=FLOAT64)
    moved = points @ quat_to_matrix(so3_exp(torch.tensor(turn, dtype=FLOAT64))).T + shift
    assert lo.arap_loss(points, moved, lo.neighbours(points, 5)) < 1e-22


def test_arap_by_hand_and_best_rotation():
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=FLOAT64)
    star = torch.tensor([[1, 2, 3]] + [[0, 0, 0]] * 3)
    weights = torch.zeros(4, 3, dtype=FLOAT64)
    weights[0] = 1
    # Stretched along x by one: the best rotation is none. A mirror image: one axis stays reversed.
    stretched = points * torch.tensor([2.0, 1, 1])
    assert lo.arap_loss(points, stretched, star, weights).item() == pytest.approx(1 / 3)
    assert lo.arap_loss(points, points * torch.tensor([-1.0, 1, 1]), star, weights).item() == pytest.approx(4 / 3)
    assert lo.arap_loss(points, 3 * points, star, weights).item() == pytest.approx(4)
    before, after = draw(9, 3, name="before"), draw(9, 3, name="after")
    best = float(lo.arap_loss(before, after, lo.neighbours(before, 4)))
    for number in range(20):
        turn = quat_to_matrix(so3_exp(torch.randn(9, 3, generator=generator(number), dtype=FLOAT64)))
        table = lo.neighbours(before, 4)
        edges, moved = before[table] - before[:, None], after[table] - after[:, None]
        assert (moved - edges @ turn.mT).square().sum(-1).mean() > best


def test_arap_gradient_is_exact_with_the_rotation_held_fixed():
    before, after = draw(2, 7, 3, name="before"), draw(2, 7, 3, name="after")
    table = lo.neighbours(before[0], 3)
    assert gradients(lambda x, y: lo.arap_loss(x, y, table), before, after)
    for flat in (torch.zeros(7, 3, dtype=FLOAT64), torch.arange(7.0, dtype=FLOAT64)[:, None].expand(7, 3)):
        start = flat.clone().requires_grad_()
        lo.arap_loss(start, before[0], table).backward()
        assert start.grad.isfinite().all()


def test_neighbours_are_the_nearest_others():
    points = draw(30, 3)
    wanted = (torch.cdist(points, points) + 1e9 * torch.eye(30, dtype=FLOAT64)).topk(4, largest=False).indices
    assert torch.equal(lo.neighbours(points.requires_grad_(), 4), wanted)


PICTURE = torch.zeros(12, 12, 3)
REFUSED = [
    (TypeError, r"a: expected a tensor, got list", lambda: lo.ssim([[0.0]], PICTURE)),
    (TypeError, r"b: expected a floating tensor, got torch.uint8", lambda: lo.ssim(PICTURE, PICTURE.byte())),
    (ValueError, r"a: expected shape", lambda: lo.ssim(torch.zeros(12), torch.zeros(12))),
    (ValueError, r"b: expected the shape of a", lambda: lo.ssim(PICTURE, PICTURE[:11])),
    (ValueError, r"window: expected an odd", lambda: lo.ssim(PICTURE, PICTURE, window=4)),
    (ValueError, r"smaller side of the pictures, 10 pixels, got 11", lambda: lo.ssim(PICTURE[:10], PICTURE[:10])),
    (ValueError, r"sigma", lambda: lo.ssim(PICTURE, PICTURE, sigma=0)),
    (ValueError, r"data_range", lambda: lo.ssim(PICTURE, PICTURE, data_range=-1)),
    (ValueError, r"ssim_weight", lambda: lo.photometric_loss(PICTURE, PICTURE, ssim_weight=1.5)),
    (
        ValueError,
        r"weights: expected a shape that fits",
        lambda: lo.photometric_loss(PICTURE, PICTURE, weights=PICTURE),
    ),
    (TypeError, r"weights: expected a tensor", lambda: lo.photometric_loss(PICTURE, PICTURE, weights=1)),
    (ValueError, r"levels", lambda: lo.gradient_l1(PICTURE, PICTURE, levels=0)),
    (ValueError, r"target: expected the shape", lambda: lo.ssi_depth_loss(PICTURE, PICTURE[:5])),
    (ValueError, r"mask: expected a shape", lambda: lo.ssi_depth_loss(PICTURE, PICTURE, mask=torch.ones(5))),
    (TypeError, r"target: expected a tensor", lambda: lo.mask_loss(PICTURE, 0)),
    (ValueError, r"target: expected the shape", lambda: lo.mask_loss(PICTURE, PICTURE[0])),
    (ValueError, r"predicted: expected shape", lambda: lo.track_loss(PICTURE, PICTURE, None, (8, 8))),
    (ValueError, r"quantile", lambda: lo.track_loss(torch.zeros(3, 2), torch.zeros(3, 2), None, (8, 8), quantile=0)),
    (ValueError, r"size", lambda: lo.track_loss(torch.zeros(3, 2), torch.zeros(3, 2), None, (8,))),
    (ValueError, r"size", lambda: lo.track_loss(torch.zeros(3, 2), torch.zeros(3, 2), None, (0, 8))),
    (TypeError, r"size", lambda: lo.track_loss(torch.zeros(3, 2), torch.zeros(3, 2), None, "8")),
    (
        ValueError,
        r"weight: expected",
        lambda: lo.track_loss(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(4), (8, 8)),
    ),
    (ValueError, r"before: expected shape", lambda: lo.arap_loss(torch.zeros(4, 2), torch.zeros(4, 2), None)),
    (TypeError, r"neighbours", lambda: lo.arap_loss(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 1))),
    (ValueError, r"got 0..4", lambda: lo.arap_loss(*[torch.zeros(4, 3)] * 2, torch.tensor([[0], [1], [2], [4]]))),
    (ValueError, r"k: expected", lambda: lo.neighbours(torch.zeros(3, 3), 3)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED, ids=[message[:24] for _, message, _ in REFUSED])
def test_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()
