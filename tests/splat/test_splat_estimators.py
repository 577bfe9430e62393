"""Depth, tracks, masks and flow: known motion, known depth, large models in miniature, refusals."""

import math

import pytest
import torch

from papers10.core.data import DataMissing, LicenceNotAccepted
from papers10.core.optional import MissingExtra, have
from papers10.splat import estimators as est

BACKENDS = [pytest.param("opencv", marks=pytest.mark.skipif(not have("cv2"), reason="OpenCV is not installed")), "torch"]


def texture(high=160, wide=200):
    coarse = torch.rand(3, high // 4, wide // 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse[None], (high, wide), mode="bicubic")[0].permute(1, 2, 0).clamp(0, 1)


def warped(motion, count=4, high=80, wide=96):
    """Frame f shows the picture moved by f times `motion` (x, y)."""
    picture, centres = texture(), est._pixel_centres(high, wide)
    return torch.stack([est._sample(picture, centres + 40 - f * torch.tensor(motion)) for f in range(count)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("motion", [(0.0, 0.0), (1.6, -0.7), (-4.0, 3.0)])
def test_tracks_follow_a_known_motion_from_any_frame(backend, motion):
    frames = warped(motion)
    queries = est.grid_queries(frames, stride=16, times=(0, 2))
    result = est.LucasKanade(backend=backend, window=13).track(frames, queries)
    true = queries[:, None, 1:] + (torch.arange(4) - queries[:, :1])[..., None] * torch.tensor(motion)
    inside = ((true > 10) & (true < torch.tensor([86.0, 70.0]))).all(-1)
    assert (result.tracks - true).norm(dim=-1)[inside & result.visible].median() < 0.1
    assert result.visible[inside].float().mean() > 0.8
    row = torch.arange(len(queries))
    assert result.visible[row, queries[:, 0].long()].all() and (result.confidence[row, queries[:, 0].long()] == 1).all()
    assert ((result.confidence == 0) == ~result.visible).all() and result.confidence.max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_frames_and_lost_points(backend):
    flat = torch.full((3, 40, 48, 3), 0.5)
    queries = torch.tensor([[1.0, 20.0, 20.0]])
    result = est.LucasKanade(backend=backend).track(flat, queries)
    assert result.visible.tolist() == [[False, True, False]] and (result.tracks == queries[0, 1:]).all()
    empty = est.LucasKanade(backend=backend).track(flat, torch.zeros(0, 3))
    assert empty.tracks.shape == (0, 3, 2) and empty.visible.shape == (0, 3)
    one = est.LucasKanade(backend=backend).track(flat[:1], torch.tensor([[0.0, 5.0, 5.0]]))
    assert one.visible.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_of_bytes_and_floats_give_the_same(backend):
    frames, queries = warped((1.0, 0.0)), torch.tensor([[0.0, 40.0, 40.0], [0.0, 60.0, 30.0]])
    tracker = est.LucasKanade(backend=backend)
    a, b = tracker.track(frames, queries), tracker.track((frames * 255).round().to(torch.uint8).numpy(), queries.numpy())
    assert torch.allclose(a.tracks, b.tracks, atol=0.05)


@pytest.mark.parametrize("method", [est.LucasKanade(backend="torch"), pytest.param(est.DISFlow(), marks=BACKENDS[0].marks)])
def test_flow_and_the_tracks_from_it(method):
    frames = warped((1.6, -0.7))
    field = method.flow(frames[0], frames[1])
    assert field.shape == (80, 96, 2)
    assert (field - torch.tensor([1.6, -0.7])).norm(dim=-1)[12:-12, 12:-12].median() < 0.15
    result = est.FlowTracker(method).track(frames, torch.tensor([[0.0, 40.0, 40.0]]))
    assert (result.tracks[0, 3] - torch.tensor([44.8, 37.9])).norm() < 0.4
    assert isinstance(method, est.OpticalFlow) and isinstance(est.FlowTracker(method), est.PointTracker)


def test_affine_fit_ignores_a_minority():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(200, 2, generator=generator, dtype=torch.float64) * 100
    motion = torch.tensor([[1.02, -0.03, 4.0], [0.01, 0.97, -2.0]], dtype=torch.float64)
    moved = points @ motion[:, :2].T + motion[:, 2]
    moved[:60] += torch.tensor([9.0, 7.0])
    assert torch.allclose(est.fit_affine(points, moved), motion, atol=1e-3)
    # Three points determine the motion; the ridge of 1e-9 on a badly placed triangle shifts it by less than 1e-4 px.
    assert torch.allclose(est.fit_affine(points[:3], points[:3]), torch.tensor(est._IDENTITY).double(), atol=1e-4)
    inverse = est._compose(est._invert(motion), motion)
    assert torch.allclose(inverse, torch.tensor(est._IDENTITY).double(), atol=1e-12)
    with pytest.raises(ValueError, match="M >= 3"):
        est.fit_affine(points[:2], moved[:2])


@pytest.mark.parametrize("motion", [(0.0, 0.0), (1.5, 0.5)])
def test_mask_of_a_moving_square(motion):
    frames = warped(motion, 9)
    truth = torch.zeros(frames.shape[:3], dtype=torch.bool)
    for f in range(9):
        truth[f, 24:44, 4 + 8 * f : 24 + 8 * f] = True
    frames = torch.where(truth[..., None], torch.tensor([1.0, 0.0, 1.0]), frames)
    mask = est.MotionMask().segment(frames)
    assert ((mask & truth).sum() / (mask | truth).sum()) > 0.75 and mask.dtype == torch.bool
    assert est.MotionMask().segment(frames[:2]).sum() == 0


def test_guessed_depths():
    frames = torch.zeros(2, 10, 12, 3)
    frames[:, :, 6:] = 1
    luma = est.LumaDepth(radius=0).depth(frames)
    assert luma[0, 0, 0] == 2 and luma[1, 9, 11] == 0.5
    plane = est.PlaneDepth(horizon=0.4).depth(frames)
    assert (plane[:, :4] == 2).all() and (plane[0, :, 0].diff() <= 0).all() and plane.min() >= 0.5
    for cue in (luma, plane):
        assert cue.shape == (2, 10, 12) and torch.equal(cue[0], cue[1])


@pytest.mark.skipif(not have("cv2"), reason="OpenCV is not installed")
def test_stereo_of_a_shifted_texture():
    picture = texture(80, 160)
    left, right = picture[:, :120], picture[:, 12:132]
    method = est.StereoDepth(focal=100, baseline=0.3, max_disparity=32)
    found = method.disparity(left, right)
    assert (found[8:-8, 24:-8] - 12).abs().nanmedian() < 0.2
    depth = method.depth(left[None], right[None])
    assert depth.isfinite().all() and (depth.median() - 100 * 0.3 / 12).abs() < 0.05
    with pytest.raises(ValueError, match="right: expected"):
        method.depth(left[None])
    with pytest.raises(ValueError, match="with matches"):
        method.depth(torch.zeros(1, 40, 40, 3), torch.zeros(1, 40, 40, 3))


def test_holes_take_the_farther_neighbour():
    row = torch.tensor([[math.nan, 4.0, math.nan, 2.0, math.nan]])
    assert est._fill_rows(row).tolist() == [[4.0, 4.0, 2.0, 2.0, 2.0]]


def test_disparities_are_brought_to_one_scale():
    base = torch.rand(8, 9, generator=torch.Generator().manual_seed(0)) + 0.5
    video = torch.stack([base, 2 * base + 1, 0.5 * base - 3])
    assert torch.allclose(est.align_disparity(video), base.expand(3, 8, 9), atol=1e-5)
    places = torch.rand(20, 3, 2, generator=torch.Generator().manual_seed(1))[:, :1].expand(20, 3, 2) * torch.tensor([9.0, 8.0])
    seen = torch.ones(20, 3, dtype=torch.bool)
    assert torch.allclose(est.align_disparity(video, est.Tracks(places, seen, seen.float())), base.expand(3, 8, 9), atol=1e-4)
    flat = torch.stack([torch.ones(4, 4), torch.full((4, 4), 3.0)])
    assert torch.equal(est.align_disparity(flat), torch.ones(2, 4, 4))
    assert est.depth_from_disparity(torch.tensor([0.0, 0.5, 2.0]), far=10).tolist() == [5.0, 2.0, 0.5]
    with pytest.raises(ValueError, match="above 0"):
        est.depth_from_disparity(torch.zeros(3))
    with pytest.raises(ValueError, match=r"\[T, H, W\]"):
        est.align_disparity(base)


def test_depth_anything_in_miniature(tmp_path):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DPTImageProcessorPil"):
        pytest.skip("this transformers has no image processor that works without torchvision")
    backbone = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, head_hidden_size=8
    )
    model = transformers.DepthAnythingForDepthEstimation(config)
    torch.nn.init.constant_(model.head.conv3.bias, 0.5)
    model.save_pretrained(tmp_path)
    transformers.DPTImageProcessorPil(size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(tmp_path)
    method = est.DepthAnything(tmp_path, batch_size=2)
    depth = method.depth(warped((1.0, 0.0), 3, 40, 60))
    assert isinstance(method, est.DepthEstimator) and depth.shape == (3, 40, 60) and depth.min() > 0
    with pytest.raises(DataMissing, match="give the path of a local copy"):
        (tmp_path / "config.json").write_text("{}")
        est.DepthAnything(tmp_path).depth(warped((1.0, 0.0), 1))


def test_sam2_in_miniature():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Sam2VideoModel"):
        pytest.skip("this transformers has no Sam2VideoModel")
    backbone = dict(
        model_type="sam2_hiera_det_model", hidden_size=8, num_attention_heads=1, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 2, 4, 8], window_size_per_stage=[4, 2, 2, 2],
        global_attention_blocks=[3], window_positional_embedding_background_size=[4, 4],
    )
    vision = dict(
        model_type="sam2_vision_model", backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=128,
    )
    width = 128
    config = transformers.Sam2VideoConfig(
        vision_config=vision, prompt_encoder_config=dict(hidden_size=width, image_size=64, mask_input_channels=4),
        mask_decoder_config=dict(hidden_size=width, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32), image_size=64,
        memory_attention_hidden_size=width, memory_attention_num_layers=1, memory_attention_num_attention_heads=1,
        memory_attention_feed_forward_hidden_size=32, memory_attention_rope_feat_sizes=[4, 4], memory_encoder_hidden_size=width,
        mask_downsampler_embed_dim=width, memory_fuser_embed_dim=width, memory_fuser_intermediate_dim=32, memory_fuser_num_layers=1,
    )
    torch.manual_seed(0)
    model = transformers.Sam2VideoModel(config).eval()
    seen, inner = [], model.forward

    def forward(*arguments, **options):
        answer = inner(*arguments, **options)
        seen.append(answer.frame_idx)
        return answer

    model.forward = forward
    method, frames = est.Sam2(model), warped((1.0, 0.0), 4, 40, 60)
    mask = method.segment(frames, points=[[20.0, 10.0]], frame=2)
    assert mask.shape == (4, 40, 60) and mask.dtype == torch.bool and set(seen) == {0, 1, 2, 3}
    assert method.segment(frames, box=(5, 5, 20, 20)).shape == mask.shape and isinstance(method, est.Segmenter)
    for prompt, words in (
        (dict(points=[[70.0, 10.0]]), "in 60 x 40"), (dict(points=[[1.0]]), r"points: expected \[K, 2\]"), (dict(box=(5, 5, 5, 9)), "box"),
        (dict(points=[[1.0, 1.0]], labels=[3]), "labels"), (dict(points=[[1.0, 1.0]], frame=4), "frame"), ({}, "nothing moves"),
    ):
        with pytest.raises(ValueError, match=words):
            method.segment(frames[:1].expand(4, -1, -1, -1) if not prompt else frames, **prompt)


class StandInCoTracker:
    """Stand-in with the published interface of CoTracker's predictor: points stay where they are."""

    def __call__(self, video, queries, backward_tracking):
        assert video.shape[:3] == (1, 4, 3) and video.max() > 2 and backward_tracking
        self.queries = queries
        tracks = queries[:, None, :, 1:].expand(1, 4, -1, 2)
        return tracks, torch.ones(tracks.shape[:3], dtype=torch.bool)


class StandInTapir:
    """Stand-in with the published interface of tapnet's TAPIR: points move right by a tenth of the picture a frame."""

    def __call__(self, video, query_points):
        assert video.shape == (1, 4, 64, 64, 3) and video.min() >= -1 and video.min() < 0
        frame, y, x = query_points[0].T
        moved = x[:, None] + 6.4 * (torch.arange(4) - frame[:, None])
        tracks = torch.stack([moved, y[:, None].expand_as(moved)], -1)[None]
        return dict(tracks=tracks, occlusion=torch.full(tracks.shape[:3], -5.0), expected_dist=torch.full(tracks.shape[:3], -5.0))


def test_coordinates_of_the_large_trackers():
    frames, queries = warped((1.0, 0.0)), torch.tensor([[0.0, 10.5, 20.5], [2.0, 30.0, 8.0]])
    model = StandInCoTracker()
    result = est.CoTracker(model).track(frames, queries)
    assert model.queries[0, 0].tolist() == [0, 10, 20] and torch.equal(result.tracks[:, 1], queries[:, 1:]) and result.visible.all()
    result = est.Tapir(StandInTapir(), resolution=64).track(frames, queries)
    steps = (torch.arange(4) - queries[:, :1]) * 9.6
    assert torch.allclose(result.tracks[..., 0], queries[:, 1:2] + steps, atol=1e-3) and torch.allclose(result.tracks[..., 1], queries[:, 2:].expand(2, 4), atol=1e-4)
    assert result.visible.all() and result.confidence.min() > 0.98
    assert est.CoTracker(model).track(frames, torch.zeros(0, 3)).tracks.shape == (0, 4, 2)


def test_raft_pads_and_cuts():
    def model(a, b, num_flow_updates):
        assert a.shape[2] % 8 == 0 and a.shape[3] % 8 == 0 and min(a.shape[2:]) >= 128 and a.min() < 0
        return [torch.zeros(1, 2, *a.shape[2:]), torch.ones(1, 2, *a.shape[2:])]

    for high, wide in ((50, 70), (128, 136), (130, 201)):
        field = est.Raft(model).flow(torch.rand(high, wide, 3), torch.rand(high, wide, 3))
        assert field.shape == (high, wide, 2) and (field == 1).all()
    if not have("torchvision"):
        with pytest.raises(MissingExtra, match=r"papers10\[metrics\]"):
            est.Raft().flow(torch.rand(20, 20, 3), torch.rand(20, 20, 3))


def test_ground_truth_passes_on_what_it_has():
    frames = torch.zeros(3, 6, 8, 3)
    known = est.GroundTruth(depth=torch.ones(3, 6, 8), tracks=torch.zeros(2, 3, 2), masks=torch.ones(3, 6, 8), flow=torch.zeros(6, 8, 2))
    for protocol in (est.DepthEstimator, est.PointTracker, est.Segmenter, est.OpticalFlow):
        assert isinstance(known, protocol)
    assert known.segment(frames).all() and known.track(frames, torch.zeros(2, 3)).visible.all() and known.flow(frames[0], frames[1]).shape == (6, 8, 2)
    with pytest.raises(ValueError, match="depth: expected shape"):
        known.depth(frames[:2])
    with pytest.raises(ValueError, match="masks: expected to have been given"):
        est.GroundTruth().segment(frames)
    with pytest.raises(ValueError, match="tracks: expected"):
        est.GroundTruth(tracks=torch.zeros(2, 3))


def test_choice_by_name(tmp_path):
    for kind, names in est.ESTIMATORS.items():
        assert est.estimator(kind, "none") is None
        assert isinstance(est.estimator(kind, "truth"), names["truth"])
    assert est.estimator("tracker", "lk", window=9).window == 9
    with pytest.raises(ValueError, match="did you mean 'motion'"):
        est.estimator("masks", "motions")
    with pytest.raises(ValueError, match="kind: expected one of"):
        est.estimator("mask", "motion")
    with pytest.raises(TypeError, match="options: tracker estimator 'lk'"):
        est.estimator("tracker", "lk", windows=9)
    with pytest.raises(LicenceNotAccepted, match="accept_licence=True"):
        est.estimator("tracker", "cotracker")
    with pytest.raises(LicenceNotAccepted, match="CC-BY-NC"):
        est.estimator("depth", "depth-anything", model="depth-anything/Depth-Anything-V2-Base-hf")
    with pytest.raises(DataMissing, match="checkpoint"):
        est.estimator("tracker", "tapir", checkpoint=tmp_path / "absent.pt")
    (tmp_path / "model.pt").write_bytes(b"")
    if not have("tapnet"):
        with pytest.raises(ImportError, match="tapnet is needed"):
            est.Tapir(tmp_path / "model.pt").track(warped((0.0, 0.0)), torch.tensor([[0.0, 1.0, 1.0]]))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: est.LucasKanade(window=8), ValueError, "odd"),
        (lambda: est.LucasKanade(backend="cv2"), ValueError, "backend"),
        (lambda: est.LucasKanade(max_error=0), ValueError, "max_error"),
        (lambda: est.FlowTracker(3), TypeError, "estimator"),
        (lambda: est.MotionMask(camera="homography"), ValueError, "camera"),
        (lambda: est.LumaDepth(near=2, far=1), ValueError, "far"),
        (lambda: est.StereoDepth(block=4), ValueError, "block"),
        (lambda: est.Tapir(None, resolution=100), ValueError, "multiple of 8"),
        (lambda: est.Raft("huge"), ValueError, "model"),
        (lambda: est.LumaDepth().depth(torch.zeros(2, 4, 4)), ValueError, "frames: expected"),
        (lambda: est.LumaDepth().depth(torch.full((1, 4, 4, 3), math.nan)), ValueError, "non-finite"),
        (lambda: est.LumaDepth().depth([1]), TypeError, "frames"),
        (lambda: est.LucasKanade().flow(torch.zeros(4, 4, 3), torch.zeros(5, 4, 3)), ValueError, "b: expected"),
        (lambda: est.grid_queries(torch.zeros(1, 4, 4, 3), times=(1,)), ValueError, "times"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("queries", "words"),
    [([[0, 1]], r"\[M, 3\]"), ([[0.5, 1, 1]], "whole frame"), ([[4, 1, 1]], "frame numbers"), ([[0, 97, 1]], "x in"), ([[0, 1, -1]], "y in"), ([[0, math.nan, 1]], "non-finite")],
)
def test_queries_outside_are_refused(queries, words):
    with pytest.raises(ValueError, match=words):
        est.LucasKanade().track(warped((0.0, 0.0)), queries)
