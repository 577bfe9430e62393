"""splat.metrics: hand values, TAP-Vid against a plain loop, scikit-image's numbers, absent networks, every refusal."""

import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.splat import losses
from papers10.splat import metrics as me
from papers10.splat.cameras import Sim3, make_poses, se3_exp
from papers10.splat.rotations import quat_to_matrix

FLOAT64 = torch.float64
NAN = float("nan")


def draw(*shape, name="metrics", dtype=FLOAT64):
    return torch.rand(*shape, generator=generator(0, name, *shape), dtype=dtype)


def flags(*shape, name="flags", share=0.5):
    return draw(*shape, name=name) < share


def test_psnr_by_hand_and_by_scikit_image():
    a, b = draw(2, 5, 6, 3, name="a"), draw(2, 5, 6, 3, name="b")
    torch.testing.assert_close(me.psnr(a, b), -10 * (a - b).square().mean((1, 2, 3)).log10())
    torch.testing.assert_close(me.psnr(255 * a, 255 * b, data_range=255), me.psnr(a, b))
    assert me.psnr(a + 0.1, a)[0].item() == pytest.approx(20) and me.psnr(a.float(), b.float()).dtype == FLOAT64
    skimage = pytest.importorskip("skimage.metrics")
    wanted = skimage.peak_signal_noise_ratio(a[0].numpy(), b[0].numpy(), data_range=1)
    assert me.psnr(a, b)[0].item() == pytest.approx(wanted)
    assert me.ssim is losses.ssim


def test_psnr_of_masks():
    a, b = draw(2, 5, 6, 3, name="a"), draw(2, 5, 6, 3, name="b")
    mask = flags(5, 6)
    wanted = -10 * (a - b).square()[:, mask].mean((1, 2)).log10()
    torch.testing.assert_close(me.masked_psnr(a, b, mask), wanted)
    torch.testing.assert_close(me.psnr(a, b, mask=mask.float()), wanted)
    a[:, ~mask] = NAN
    torch.testing.assert_close(me.masked_psnr(a, b, mask), wanted)
    assert me.masked_psnr(a, b, torch.zeros(5, 6, dtype=torch.bool)).isnan().all()


def test_equal_pictures_and_means_of_clips():
    a = draw(3, 5, 6, 3)
    assert (me.psnr(a, a) == math.inf).all()
    assert me.finite_mean(torch.tensor([20.0, math.inf, NAN, 40.0])) == 30
    assert me.finite_mean(torch.tensor([math.inf, NAN])) == math.inf
    assert math.isnan(me.finite_mean(torch.tensor([NAN]))) and math.isnan(me.finite_mean(torch.zeros(0)))


def test_detail_psnr_counts_the_edge_only():
    target = torch.zeros(10, 10, 1, dtype=FLOAT64)
    target[:, 5:] = 1
    off = target.clone()
    off[:, :4] += 0.5
    # The two columns beside the edge are the steepest fifth; what is wrong lies elsewhere.
    assert me.detail_psnr(off, target, 0.2) == math.inf
    off[:, 4:6] += 0.1
    assert me.detail_psnr(off, target, 0.2).item() == pytest.approx(20)
    assert me.detail_psnr(off, target, 0.01).item() == pytest.approx(20)  # ties count
    torch.testing.assert_close(me.detail_psnr(off, target, 1.0), me.psnr(off, target))
    flat = torch.full((2, 4, 5, 3), 0.5)
    torch.testing.assert_close(me.detail_psnr(flat + 0.1, flat), me.psnr(flat + 0.1, flat))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 33), (16, 40), (4, 5)])
def test_spectrum_of_one_wave_and_of_noise(height, width):
    count = min(height, width) // 2
    frequency, power = me.radial_spectrum(draw(height, width, 3))
    assert frequency.shape == power.shape == (count,)
    assert frequency[-1] == 0.5 and power.isfinite().all() and (power > 0).all()
    if min(height, width) > 8:
        step = torch.arange(height, dtype=FLOAT64)[:, None, None].expand(height, width, 1)
        _, power = me.radial_spectrum(0.5 + 0.4 * torch.cos(2 * math.pi * 0.25 * step))
        assert abs(float(frequency[power.argmax()]) - 0.25) <= 1 / count


def test_white_noise_has_a_flat_spectrum_of_its_variance():
    noise = torch.randn(128, 128, 1, generator=generator(0, "noise"), dtype=FLOAT64)
    _, power = me.radial_spectrum(noise)
    assert 0.9 < float(power[8:].mean()) < 1.1 and float(power[8:].std()) < 0.15


def test_spectrum_error():
    a = draw(2, 16, 18, 3)
    assert (me.spectrum_error(a, a) == 0).all() and me.spectrum_error(a, a).shape == (2,)
    # Contrast of 1 - e: every amplitude is off by the share e. No detail at all: 1.
    for contrast in (0.0, 0.5, 1.5):
        got = me.spectrum_error(0.3 + contrast * a, a)
        torch.testing.assert_close(got, torch.full((2,), abs(1 - contrast), dtype=FLOAT64))
    frequency, ours = me.radial_spectrum(a**2)
    _, theirs = me.radial_spectrum(a)
    high = frequency > 0.25
    difference = (ours.sqrt() - theirs.sqrt())[:, high].abs().sum(-1)
    torch.testing.assert_close(me.spectrum_error(a**2, a), difference / theirs[:, high].sqrt().sum(-1))


def test_spectrum_error_is_blind_to_place_and_to_smooth_changes():
    flat = torch.full((16, 16, 3), 0.3)
    assert me.spectrum_error(flat, 2 * flat) < 1e-9 and me.spectrum_error(flat, flat, floor=1e-12) == 0
    step = torch.arange(32, dtype=FLOAT64)[None, :, None].expand(32, 32, 1)
    stripes, slow = torch.cos(2.0 * step), torch.cos(2 * math.pi / 32 * step)
    assert me.spectrum_error(0.5 - 0.4 * stripes, 0.5 + 0.4 * stripes) < 1e-9
    assert me.spectrum_error(0.5 + 0.2 * stripes + 0.2 * slow, 0.5 + 0.2 * stripes) < 0.02


def plain_tapvid(query, occluded, tracks, said, predicted, mode, scale):
    """The definition, point by point."""
    right = total = 0
    counts = {x: dict(tp=0, fp=0, seen=0, near=0) for x in (1, 2, 4, 8, 16)}
    for point in range(len(tracks)):
        for frame in range(tracks.shape[1]):
            if frame == int(query[point, 0]) or (mode == "first" and frame < int(query[point, 0])):
                continue
            total += 1
            seen, claimed = not occluded[point, frame], not said[point, frame]
            right += seen == claimed
            distance = np.hypot(*((predicted[point, frame] - tracks[point, frame]).numpy() * scale))
            for x, count in counts.items():
                near = distance < x
                count["seen"] += seen
                count["near"] += seen and near
                count["tp"] += seen and claimed and near
                count["fp"] += claimed and not (seen and near)
    jaccard = {x: c["tp"] / (c["seen"] + c["fp"]) for x, c in counts.items()}
    within = {x: c["near"] / c["seen"] for x, c in counts.items()}
    result = {"occlusion_accuracy": right / total}
    result |= {f"jaccard_{x}": value for x, value in jaccard.items()}
    result |= {f"pts_within_{x}": value for x, value in within.items()}
    result["average_jaccard"] = np.mean(list(jaccard.values()))
    result["average_pts_within_thresh"] = np.mean(list(within.values()))
    return result


@pytest.mark.parametrize("mode", ["first", "strided"])
@pytest.mark.parametrize("size", [256, (512, 128)])
def test_tapvid_is_its_definition(mode, size):
    truth = 100 * draw(6, 9, 2, name="truth")
    predicted = truth + 12 * torch.randn(6, 9, 2, generator=generator(0, "off"), dtype=FLOAT64)
    occluded, said = flags(6, 9, name="occluded", share=0.3), flags(6, 9, name="said", share=0.3)
    query = torch.stack([torch.tensor([0.0, 3, 2, 7, 0, 5]), torch.zeros(6), torch.zeros(6)], -1)
    got = me.tapvid_metrics(query, occluded, truth, said, predicted, mode, size=size)
    scale = np.array([1.0, 1.0]) if size == 256 else np.array([0.5, 2.0])
    assert got == pytest.approx(plain_tapvid(query, occluded, truth, said, predicted, mode, scale))
    assert got == me.tapvid_metrics(query[:, 0].long(), occluded, truth, said, predicted, mode, size=size)


def test_tapvid_of_perfect_and_empty_tracks():
    truth, occluded = 100 * draw(4, 5, 2), flags(4, 5)
    query = torch.zeros(4, 3)
    assert set(me.tapvid_metrics(query, occluded, truth, occluded, truth).values()) == {1.0}
    hidden = torch.ones(4, 5, dtype=torch.bool)
    scores = me.tapvid_metrics(query, hidden, NAN * truth, hidden, truth)
    assert math.isnan(scores["average_jaccard"]) and scores["occlusion_accuracy"] == 1
    last = me.tapvid_metrics(query + 4, occluded, truth, occluded, truth, "first")
    assert all(math.isnan(value) for value in last.values())


def test_temporal_coherence_by_hand():
    truth = 10 * draw(3, 7, 2, name="truth")
    ours = truth + draw(3, 7, 2, name="off")
    visible = flags(3, 7, share=0.8)
    terms = []
    for point in range(3):
        for frame in range(1, 6):
            if visible[point, frame - 1 : frame + 2].all():
                off = (ours - truth)[point]
                terms.append(float((off[frame + 1] - 2 * off[frame] + off[frame - 1]).norm()))
    assert me.temporal_coherence(ours, truth, visible) == pytest.approx(np.mean(terms))
    assert me.temporal_coherence(ours, truth, visible, squared=True) == pytest.approx(np.mean(np.square(terms)))
    drift = truth + 3 * torch.arange(7)[None, :, None] + 1
    assert me.temporal_coherence(drift, truth) < 1e-12
    assert math.isnan(me.temporal_coherence(truth[:, :2], truth[:, :2]))
    assert math.isnan(me.temporal_coherence(ours, truth, torch.zeros(3, 7, dtype=torch.bool)))


def test_depth_consistency_by_hand():
    rows = torch.arange(4, dtype=FLOAT64)[:, None].expand(4, 5) + 0.5
    depth = torch.stack([rows, rows + 1, rows + 1])  # the range is 0.5..4.5
    tracks = torch.tensor([[1.0, 2.0], [4.5, 1.25]], dtype=FLOAT64)[:, None].expand(2, 3, 2).clone()
    assert me.depth_consistency(depth, tracks) == pytest.approx(0.5 / 4)
    assert me.depth_consistency(depth, tracks, torch.tensor([[0, 1, 1], [0, 1, 1]]).bool()) == 0
    tracks[0, 1, 1] = 1.0  # one row up in the frame where depth is one more: the first point keeps its depth
    assert me.depth_consistency(depth, tracks) == pytest.approx((0 + 1 + 1 + 0) / 4 / 4)
    tracks[0, 1:] = NAN
    assert me.depth_consistency(depth, tracks) == pytest.approx((1 + 0) / 2 / 4)
    tracks[1, :, 0] = 5.1
    assert math.isnan(me.depth_consistency(depth, tracks))
    assert me.depth_consistency(torch.ones(3, 4, 5), tracks[1:].clamp_max(4)) == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_iou_is_symmetric_and_right(seed):
    a = torch.rand(2, 3, 4, generator=generator(seed, "a")) > 0.5
    b = torch.rand(2, 3, 4, generator=generator(seed, "b")) > 0.5
    for number in range(2):
        ours, theirs = ({tuple(place) for place in mask[number].nonzero().tolist()} for mask in (a, b))
        assert me.iou(a, b)[number].item() == pytest.approx(len(ours & theirs) / max(1, len(ours | theirs)))
    assert torch.equal(me.iou(a, b), me.iou(b.float(), a.float()))


def test_iou_of_empty_masks():
    empty = torch.zeros(3, 3, dtype=torch.bool)
    assert me.iou(empty, empty) == 1 and me.iou(empty, ~empty) == 0


def test_lpips_says_why_it_is_absent(monkeypatch):
    monkeypatch.setattr(me, "have", lambda module: False)
    found = me.lpips_distance(torch.zeros(8, 8, 3), torch.zeros(8, 8, 3), network="vgg")
    assert found.value is None and str(found) == "n/a" and "vgg" in found.network
    assert "papers10[metrics]" in found.reason


def test_lpips_never_downloads_by_itself_and_scores_in_chunks(monkeypatch, tmp_path):
    calls = []

    class Model(torch.nn.Module):
        def forward(self, a, b, normalize=False):
            assert normalize and a.shape[1] == 3 and not self.training
            calls.append(len(a))
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    def build(net, version, verbose):
        assert (net, version, verbose) == ("alex", "0.1", False)
        return Model()

    weights = types.SimpleNamespace(url="https://host/models/alexnet-0.pth")
    models = types.SimpleNamespace(get_weight=lambda name: weights if name.startswith("AlexNet") else None)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=build))
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(me, "have", lambda module: True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    a, b = draw(5, 6, 7, 3, name="a"), draw(5, 6, 7, 3, name="b")
    absent = me.lpips_distance(a, b)
    assert absent.value is None and "alexnet-0.pth" in absent.reason and not calls
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-0.pth").touch()
    found = me.lpips_distance(a, b, chunk=2)
    assert calls == [2, 2, 1] and found.reason == ""
    torch.testing.assert_close(found.value, (a - b).abs().mean((1, 2, 3)).float())
    assert str(found) == f"{float(found.value.mean()):.4f}"
    assert me.lpips_distance(a[0], b[0]).value.shape == ()


PICTURE, TRACKS = torch.zeros(8, 8, 3), torch.zeros(2, 4, 2)
SEEN, QUERY = torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 3)
REFUSED = [
    (TypeError, "prediction: expected a floating", lambda: me.psnr(PICTURE.byte(), PICTURE)),
    (ValueError, "target: expected the shape", lambda: me.psnr(PICTURE, PICTURE[:4])),
    (ValueError, "data_range", lambda: me.psnr(PICTURE, PICTURE, data_range=0)),
    (ValueError, "mask: expected a shape", lambda: me.psnr(PICTURE, PICTURE, mask=torch.ones(3))),
    (TypeError, "mask: expected a tensor", lambda: me.masked_psnr(PICTURE, PICTURE, True)),
    (TypeError, "values", lambda: me.finite_mean([1.0])),
    (ValueError, "top", lambda: me.detail_psnr(PICTURE, PICTURE, 0)),
    (ValueError, "at least 2 x 2", lambda: me.detail_psnr(PICTURE[:1], PICTURE[:1])),
    (ValueError, "at least 4 x 4", lambda: me.radial_spectrum(PICTURE[:3])),
    (ValueError, "floor", lambda: me.spectrum_error(PICTURE, PICTURE, floor=0)),
    (ValueError, "prediction: expected shape", lambda: me.lpips_distance(PICTURE[..., :1], PICTURE[..., :1])),
    (ValueError, "network", lambda: me.lpips_distance(PICTURE, PICTURE, network="alexnet")),
    (ValueError, "query_points: expected shape", lambda: me.tapvid_metrics(QUERY[:1], SEEN, TRACKS, SEEN, TRACKS)),
    (ValueError, "query_points: expected shape", lambda: me.tapvid_metrics(QUERY[:1, 0], SEEN, TRACKS, SEEN, TRACKS)),
    (ValueError, "frames in 0..3, got 9..9", lambda: me.tapvid_metrics(QUERY + 9, SEEN, TRACKS, SEEN, TRACKS)),
    (ValueError, "query_mode", lambda: me.tapvid_metrics(QUERY, SEEN, TRACKS, SEEN, TRACKS, "last")),
    (TypeError, "pred_occluded", lambda: me.tapvid_metrics(QUERY, SEEN, TRACKS, SEEN.float(), TRACKS)),
    (ValueError, "pred_tracks", lambda: me.tapvid_metrics(QUERY, SEEN, TRACKS, SEEN, TRACKS[:, :3])),
    (ValueError, "size", lambda: me.tapvid_metrics(QUERY, SEEN, TRACKS, SEEN, TRACKS, size=(1, 2, 3))),
    (ValueError, "gt_tracks", lambda: me.temporal_coherence(TRACKS, TRACKS[:1])),
    (TypeError, "visible", lambda: me.temporal_coherence(TRACKS, TRACKS, SEEN.float())),
    (ValueError, "tracks: expected shape", lambda: me.depth_consistency(torch.zeros(5, 4, 4), TRACKS)),
    (ValueError, "target: expected the shape", lambda: me.iou(SEEN, SEEN[:1])),
    (TypeError, "prediction", lambda: me.iou([[1]], SEEN)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSED, ids=[message[:24] for _, message, _ in REFUSED])
def test_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


def rigid(n, seed=0):
    quats = torch.randn(n, 4, generator=generator(seed, "poses"), dtype=FLOAT64)
    places = torch.randn(n, 3, generator=generator(seed, "places"), dtype=FLOAT64)
    return make_poses(quat_to_matrix(quats), places)


class TestPoses:
    @pytest.mark.parametrize("align", ["positions", "orientations", "first"])
    def test_a_similarity_of_the_world_costs_nothing(self, align):
        truth = rigid(6)
        world = Sim3(torch.tensor(0.3, dtype=FLOAT64), rigid(1, 5)[0, :3, :3], torch.ones(3, dtype=FLOAT64))
        found = me.pose_errors(world.poses(truth), truth, align=align)
        assert found["ate"] < 1e-9 and found["rotation"] < 1e-6 and found["rpe_translation"] < 1e-9
        assert found["scale"] == pytest.approx(1 / 0.3) and found["auc_5"] == found["rra_5"] == found["rta_5"] == 1

    def test_auc_is_vggts_histogram(self):
        truth = rigid(9)
        guess = se3_exp(0.08 * torch.randn(9, 6, generator=generator(1, "noise"), dtype=FLOAT64)) @ truth
        found = me.pose_errors(guess, truth, align="none", ambiguity=True)
        errors = []
        for i in range(9):
            for j in range(i + 1, 9):
                (a, b) = (np.linalg.inv(p[j]) @ p[i] for p in (guess.numpy(), truth.numpy()))
                turn = np.degrees(np.arccos(np.clip((np.trace(b[:3, :3].T @ a[:3, :3]) - 1) / 2, -1, 1)))
                cosine = a[:3, 3] @ b[:3, 3] / np.linalg.norm(a[:3, 3]) / np.linalg.norm(b[:3, 3])
                errors.append(max(turn, np.degrees(np.arccos(min(1, abs(cosine))))))
        for limit in (5, 15, 30):
            histogram, _ = np.histogram(errors, bins=np.arange(limit + 1))
            assert found[f"auc_{limit}"] == pytest.approx(np.mean(np.cumsum(histogram / len(errors))))
        assert found["auc_5"] < found["auc_15"] < found["auc_30"] < 1

    def test_where_nothing_moves_only_rotations_count(self):
        still = torch.eye(4, dtype=FLOAT64).repeat(4, 1, 1)
        found = me.pose_errors(still, still)
        assert found["auc_30"] == 1 and math.isnan(found["rta_30"]) and found["ate"] == 0
        moving = still.clone()
        moving[:, 0, 3] = torch.arange(4, dtype=FLOAT64)
        assert me.pose_errors(still, moving)["auc_30"] == 0
        back = moving.clone()
        back[:, 0, 3] *= -1
        assert me.pose_errors(back, moving, align="none")["auc_5"] == 1
        assert me.pose_errors(back, moving, align="none", ambiguity=False)["auc_30"] == 0

    def test_steps_and_single_poses(self):
        truth = rigid(1).repeat(5, 1, 1)
        truth[:, 0, 3] += torch.arange(5, dtype=FLOAT64)
        drift = truth.clone()
        drift[:, 0, 3] *= 1.1
        base = float(truth[0, 0, 3])
        for delta in (1, 2):
            found = me.pose_errors(drift, truth, align="none", delta=delta)
            assert found["rpe_translation"] == pytest.approx(0.1 * delta, rel=1e-6), base
        one = me.pose_errors(truth[:1], drift[:1])
        assert one["ate"] < 1e-12 and math.isnan(one["rpe_rotation"]) and math.isnan(one["auc_30"])

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"target": rigid(2)}, "target: expected shape"),
            ({"prediction": 2 * rigid(3)}, "prediction: expected a rotation"),
            ({"prediction": rigid(3) * NAN}, "prediction: expected finite"),
            ({"align": "icp"}, "align: expected one of"),
            ({"delta": 0}, "delta"),
            ({"thresholds": (0.5,)}, "thresholds"),
            ({"thresholds": (1.5,)}, "whole degrees"),
            ({"prediction": rigid(0), "target": rigid(0)}, "at least one pose"),
        ],
    )
    def test_refusals(self, change, words):
        with pytest.raises(ValueError, match=words):
            me.pose_errors(**{"prediction": rigid(3), "target": rigid(3), **change})


class TestPoints:
    def test_shares_and_distances(self):
        truth = draw(4, 5, 3) + 1
        moved = truth + torch.tensor([0.0, 0.03, 0.04], dtype=FLOAT64)
        seen = flags(4, 5)
        assert me.endpoint_error_3d(moved, truth) == pytest.approx(0.05)
        assert me.endpoint_error_3d(torch.where(seen[..., None], moved, NAN), truth, seen) == pytest.approx(0.05)
        found = me.apd_3d(moved, truth, thresholds=(0.04, 0.06))
        assert (found["within_0.04"], found["within_0.06"], found["apd"]) == (0, 1, 0.5)
        assert math.isnan(me.apd_3d(moved, truth, torch.zeros(4, 5, dtype=torch.bool))["apd"])
        behind = truth * torch.tensor([1.0, 1, -1], dtype=FLOAT64)
        assert me.apd_3d(behind, behind, thresholds=(1,), focal=10)["apd"] == 0

    def test_refusals(self):
        points = draw(4, 3)
        with pytest.raises(ValueError, match="thresholds"):
            me.apd_3d(points, points, thresholds=())
        with pytest.raises(ValueError, match="focal"):
            me.apd_3d(points, points, focal=0)
        with pytest.raises(ValueError, match="rescale"):
            me.apd_3d(points, points, rescale="mean")
        with pytest.raises(ValueError, match="prediction: expected shape"):
            me.endpoint_error_3d(points[:, :2], points)
        with pytest.raises(ValueError, match="visible"):
            me.endpoint_error_3d(points, points, torch.ones(3, dtype=torch.bool))
