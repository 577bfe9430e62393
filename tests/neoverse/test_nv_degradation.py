"""Novel paths, the box mean, visibility, conditions and the whole simulation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.neoverse.degradation import (
    Degradation,
    RenderConditions,
    average_depth_filter,
    exact_quantile,
    filtered_means,
    normalize_depth,
    novel_trajectory,
    redmean,
    sample_key_frames,
    scene_depth,
    trust_mask,
    visible_mask,
)
from papers10.neoverse.gaussians4d import Gaussians4D, oracle_gaussians, pixel_gaussians
from papers10.neoverse.world import SceneSpec, scene_clip
from papers10.splat.rotations import quat_to_matrix

W, H = 32, 24


@pytest.fixture(scope="module")
def clip():
    return scene_clip(SceneSpec.random(1), torch.linspace(0, 1, 5, dtype=torch.float64), W, H)


@pytest.fixture(scope="module")
def scene(clip):
    return oracle_gaussians(SceneSpec.random(1), clip.index([0, 2, 4]))


def poses(*places, rotation=None):
    out = torch.eye(4, dtype=torch.float64).repeat(len(places), 1, 1)
    out[:, :3, 3] = torch.tensor(places, dtype=torch.float64)
    if rotation is not None:
        out[:, :3, :3] = rotation
    return out


def call(degrade, scene, clip, **changes):
    given_ = {"camtoworlds": clip.camtoworlds, "Ks": clip.Ks, "depths": clip.depth[[0, 2, 4]], "frames": clip.rgb, "key_idx": [0, 2, 4], "times": clip.times, "seed": 0, **changes}
    return degrade(scene, **given_)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0, 2), st.sampled_from([1, -1]), st.floats(-30, 30))
def test_novel_paths_are_poses_beside_the_path(seed, count, distance, side, rotation):
    draw = torch.Generator().manual_seed(seed)
    old = poses(*torch.randn(count, 3, generator=draw, dtype=torch.float64).tolist(), rotation=quat_to_matrix(torch.randn(count, 4, generator=draw, dtype=torch.float64)))
    kept = old.clone()
    new = novel_trajectory(old, torch.full((count,), 3.0), distance, side=side, rotation=rotation, axis=40.0)
    assert torch.equal(old, kept)
    torch.testing.assert_close(new[:, :3, :3].mT @ new[:, :3, :3], torch.eye(3, dtype=torch.float64).expand(count, 3, 3))
    assert torch.linalg.det(new[:, :3, :3]).min() > 0.99
    torch.testing.assert_close((new - old)[:, :3, 3].norm(dim=-1), torch.full((count,), distance, dtype=torch.float64))
    shift = (new - old)[:, :3, 3]
    torch.testing.assert_close(shift, shift[:1].expand(count, 3))  # one side and one distance a clip
    aim = torch.nn.functional.normalize(old[:, :3, 3] + 3 * old[:, :3, 2] - new[:, :3, 3], dim=-1)
    torch.testing.assert_close((aim * new[:, :3, 2]).sum(-1), torch.full((count,), math.cos(math.radians(rotation)), dtype=torch.float64))


def test_novel_path_by_hand():
    forward = novel_trajectory(poses((0, 0, 0), (0, 0, 1)), torch.tensor([4.0, 3.0]), 3.0)
    torch.testing.assert_close(forward[:, :3, 3], torch.tensor([[-3.0, 0, 0], [-3, 0, 1]], dtype=torch.float64))  # (0,-1,0) x (0,0,1) = (-1,0,0)
    torch.testing.assert_close(forward[0, :3, 2], torch.tensor([0.6, 0, 0.8], dtype=torch.float64))
    sideways = novel_trajectory(poses((0, 0, 0), (1, 0, 0)), torch.tensor([4.0, 4.0]), 0.5)
    torch.testing.assert_close(sideways[:, :3, 3], torch.tensor([[0, 0, 0.5], [1, 0, 0.5]], dtype=torch.float64))
    still = novel_trajectory(poses((0, 0, 0), (0, 0, 0)), torch.tensor([4.0, 4.0]), 0.5)
    torch.testing.assert_close(still[0, :3, 3], torch.tensor([0.5, 0, 0], dtype=torch.float64))
    onto = novel_trajectory(poses((0, 0, 0), (1, 0, 0)), torch.tensor([4.0, 4.0]), 4.0)  # onto the point itself: keeps its direction
    torch.testing.assert_close(onto[:, :3, :3], torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    unmoved = novel_trajectory(poses((0.1, 0.2, 0), (0.3, 0, 1)), torch.tensor([4.0, 3.0]), 0.0)
    torch.testing.assert_close(unmoved, poses((0.1, 0.2, 0), (0.3, 0, 1)))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 40), st.integers(0, 10**6))
def test_box_mean_is_a_padded_average(height, width, kernel, seed):
    depth = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    radius = kernel // 2
    padded = torch.nn.functional.pad(depth[:, None], (radius,) * 4, mode="replicate")
    torch.testing.assert_close(average_depth_filter(depth, kernel), torch.nn.functional.avg_pool2d(padded, 2 * radius + 1, 1)[:, 0])


def test_box_mean_precision_gradient_and_holes():
    depth = torch.full((336, 560), 80.0)
    assert (average_depth_filter(depth, 101) - 80).abs().max() == 0  # float32 sums of a row would lose 1e-2
    assert torch.autograd.gradcheck(lambda x: average_depth_filter(x, 5), (torch.rand(4, 6, dtype=torch.float64, requires_grad=True),))
    assert torch.equal(average_depth_filter(depth, 1), depth)
    hole = torch.tensor([[2.0, 0.0, 4.0, 4.0]])
    torch.testing.assert_close(average_depth_filter(hole, 3, weights=(hole > 0).float()), torch.tensor([[2.0, 3.0, 4.0, 4.0]]))
    assert average_depth_filter(torch.zeros(0, 4, 5), 3).shape == (0, 4, 5)
    for bad, error in (((depth, 0), ValueError), ((depth, 2.5), ValueError), ((depth.long(), 3), TypeError), ((depth * math.nan, 3), ValueError)):
        with pytest.raises(error, match="kernel|depth"):
            average_depth_filter(*bad)
    with pytest.raises(ValueError, match="weights"):
        average_depth_filter(depth, 3, weights=-depth)


def test_colour_distance_and_mask():
    black, white = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert float(redmean(black, white)) == pytest.approx(764.83, abs=0.01)
    green = torch.tensor([0.0, 1, 0], dtype=torch.float64)
    assert float(redmean(black, green)) == pytest.approx(510)
    rgb, alpha = torch.zeros(1, 3, 3), torch.tensor([[[0.6], [0.6], [0.4]]])
    truth = torch.tensor([[[0.0, 0, 0], [0, 0.2, 0], [0, 0, 0]]])  # 0.2 green is 102 away
    assert trust_mask(rgb, alpha, truth, color_thresh=100.0)[0, :, 0].tolist() == [1, 0, 0]
    assert trust_mask(rgb, alpha, truth, color_thresh=103.0)[0, :, 0].tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match=r"a: expected float in \[0, 1\], got torch.uint8"):
        redmean(torch.zeros(2, 3, dtype=torch.uint8), truth)
    with pytest.raises(ValueError, match="alpha"):
        trust_mask(rgb, alpha[..., 0], truth)


def test_quantiles():
    values = torch.rand(3, 57, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for q in (0, 0.1, 0.5, 0.98, 1):
        torch.testing.assert_close(exact_quantile(values, q), torch.quantile(values, q, dim=-1))
    depth = torch.arange(1.0, 101).reshape(1, 1, 10, 10, 1)
    scaled = normalize_depth(depth)
    assert scaled.max() == 1 and float(scaled[0, 0, 4, 9, 0]) == pytest.approx(2 * 50 / 98.02 - 1, abs=1e-6)
    assert (normalize_depth(torch.zeros(1, 1, 2, 2, 1)) == -1).all()  # nothing there: no division by 0
    with pytest.raises(ValueError, match="values"):
        exact_quantile(torch.tensor([1.0, math.nan]), 0.5)


def test_conditions(clip):
    camera = torch.tensor([[100.0, 0, 2], [0, 100, 2], [0, 0, 1]], dtype=torch.float64)
    one = RenderConditions(torch.rand(1, 1, 3, 4, 3), torch.rand(1, 1, 3, 4, 1), torch.ones(1, 1, 3, 4, 1), poses((1, 2, 3))[None], camera[None, None]).check()
    ray = one.plucker()[0, 0, :, 0, 0]
    torch.testing.assert_close(ray, torch.tensor([-0.014997, -0.014997, 0.999775, 2.04454, -1.04476, 0.014997], dtype=torch.float64), atol=6e-6, rtol=0)
    assert one.channels().shape == (1, 1, 11, 3, 4)
    many = RenderConditions.cat([one] * 400)
    kept, prompts = many.drop(3, ["a room"] * 400)
    assert abs(prompts.count("") / 400 - 0.1) < 0.06
    gone = kept.rgb.flatten(1).sum(1) == 0
    assert torch.equal(gone, kept.dropped) and abs(float(gone.float().mean()) - 0.05) < 0.04
    assert (kept.plucker()[gone] == 0).all() and (kept.plucker()[~gone][:, 0, 2] > 0.9).all()
    no_mask = kept.mask.flatten(1).sum(1) == 0
    assert (no_mask | ~gone).all() and abs(float(no_mask.float().mean()) - 0.24) < 0.08
    assert torch.equal(many.drop(3)[0].rgb, kept.rgb) and many.drop(3)[1] is None and torch.equal(many.mask, torch.ones_like(many.mask))
    assert len(kept.index([0, 5])) == 2 and kept.to(torch.float64).rgb.dtype == torch.float64 and kept.to(torch.float64).dropped.dtype == torch.bool
    half = kept.to(torch.bfloat16)
    assert half.rgb.dtype == half.mask.dtype == torch.bfloat16 and torch.equal(half.depth, kept.depth) and torch.equal(half.camtoworlds, kept.camtoworlds) and half.Ks.dtype == torch.float64
    half.check()
    for changes, word in (({"mask": one.mask * 2}, "mask"), ({"depth": -one.depth}, "depth"), ({"rgb": one.rgb[:, :, :2]}, "depth"), ({"camtoworlds": one.camtoworlds * 2}, "camtoworlds")):
        with pytest.raises(ValueError, match=word):
            RenderConditions(**{**{name: getattr(one, name) for name in ("rgb", "depth", "mask", "camtoworlds", "Ks")}, **changes}).check()
    with pytest.raises(ValueError, match="prompts"):
        many.drop(0, ["a"])


def test_a_wall_seen_from_its_own_camera_keeps_everything():
    still = scene_clip(SceneSpec.random(0, objects=0), [0.0], W, H, camtoworlds=poses((0, 0, 0)), dtype=torch.float64)
    wall = pixel_gaussians(still.rgb, torch.full_like(still.depth, 2.0), still.camtoworlds, still.Ks, still.times)
    for snap in (False, True):
        done = Degradation(snap_to_pixel=snap).degrade(wall, still.camtoworlds, still.Ks, W, H, novel=still.camtoworlds, kind="filter", kernel=1)
        assert done.kept == 1
        torch.testing.assert_close(done.scene.gaussians.means, wall.gaussians.means)
    seen = visible_mask(wall.gaussians, still.cameras)
    moved, smooth = filtered_means(wall.gaussians.means, still.cameras, seen, 10**6 + 1)
    torch.testing.assert_close(moved[0, :, 2], torch.full((W * H,), 2.0, dtype=torch.float64))
    assert smooth.std() < 1e-9
    # A point behind the wall is hidden, one behind the camera is not in front, one outside touches nothing.
    extra = wall.gaussians.index([0, 0, 0])
    extra = extra.replace(means=torch.tensor([[0.0, 0, 3], [0, 0, -1], [9, 0, 2]], dtype=torch.float64))
    both = type(extra).cat([wall.gaussians, extra])
    assert not visible_mask(both, still.cameras).visible[0, -3:].any()
    assert visible_mask(both, still.cameras, occlusion_tol=1.1).visible[0, -3]
    assert not visible_mask(both, still.cameras, pixel_tol=8.0).visible[0, -3]  # a pixel at depth 3 is 0.108 wide: 0.1 + 0.87 does not reach
    assert visible_mask(both, still.cameras, pixel_tol=8.0, occlusion_tol=0.05).visible[0, :-3].all()


def test_simulation_leaves_its_input_and_repeats(scene, clip):
    before = scene.gaussians.means.clone()
    degrade = Degradation(trans=(0.3, 0.5), cull_prob=0.0)
    first = call(degrade, scene, clip).check()
    assert torch.equal(scene.gaussians.means, before) and len(degrade.last) == 1 and degrade.last[0].kind == "filter"
    assert torch.equal(call(degrade, scene, clip).rgb, first.rgb) and not torch.equal(call(degrade, scene, clip, seed=1).rgb, first.rgb)
    assert (first.mask[:, [1, 3]] == 0).all() and 0.2 < first.mask[:, [0, 2, 4]].mean() < 1
    twice = lambda values: torch.stack([values, values])
    batch = degrade([scene, scene], twice(clip.camtoworlds), twice(clip.Ks), None, twice(clip.rgb), [0, 2, 4], clip.times)
    assert len(batch) == 2 and degrade.last[0].distance != degrade.last[1].distance
    fast = call(degrade, scene, clip, camtoworlds=clip.camtoworlds[[0, 2, 4]], Ks=clip.Ks[[0, 2, 4]])
    torch.testing.assert_close(fast.camtoworlds[:, [0, 2, 4]], first.camtoworlds[:, [0, 2, 4]])
    assert call(degrade, scene.to(torch.float64), clip).rgb.dtype == torch.float64


def test_less_is_kept_from_farther_away(scene, clip):
    keys = clip.index([0, 2, 4])
    kept = []
    for distance in (0.0, 0.3, 0.6, 1.0):
        path = keys.camtoworlds.clone()
        path[:, 0, 3] += distance
        kept.append(Degradation().degrade(scene, keys.camtoworlds, keys.Ks, W, H, novel=path, kind="culling").kept)
    assert kept == sorted(kept, reverse=True)


def test_sets_without_gaussians_and_constant_ones(scene, clip):
    keys, degrade = clip.index([0, 2, 4]), Degradation(trans=(0.3, 0.3))
    arguments = (keys.camtoworlds, keys.Ks, W, H)
    without = degrade.degrade(scene.index(scene.key != 1), *arguments)  # a key frame without any
    assert not (without.scene.key == 1).any() and 0 < without.kept < 1
    empty = scene.index(torch.zeros(len(scene), dtype=torch.bool))
    assert call(degrade, empty, clip, depths=None).rgb.abs().max() == 0
    constant = scene.replace(key=torch.full_like(scene.key, -1))
    done = degrade.degrade(constant, *arguments, kind="filter", kernel=3)
    assert 0.2 < done.kept < 1 and (done.scene.key == -1).all()
    mixed = scene.replace(key=torch.where(torch.arange(len(scene)) % 2 == 0, -1, scene.key))
    assert 0.2 < degrade.degrade(mixed, *arguments).kept < 1
    one = clip.index([0])
    single = pixel_gaussians(one.rgb, one.depth, one.camtoworlds, one.Ks, one.times)
    assert degrade(single, one.camtoworlds, one.Ks, one.depth, one.rgb, [0], one.times).size == (1, H, W)


def test_draws_follow_the_paper():
    degrade = Degradation()
    drawn = [degrade._draw(0, clip, 560) for clip in range(600)]
    kernels = {one["kernel"] for one in drawn if one["kind"] == "filter"}
    assert (min(kernels), max(kernels)) == (11, 51) and all(kernel % 2 for kernel in kernels)
    assert abs(sum(one["kind"] == "culling" for one in drawn) / 600 - 0.3) < 0.06
    assert all(0.01 <= one["distance"] <= 0.1 and 50 <= one["color_thresh"] <= 100 for one in drawn)
    assert degrade.kernel_range(32) == (3, 3)
    mild = [Degradation(trans=(0.1, 0.6), mild_prob=1.0, kernels=(3, 5))._draw(0, clip, 32) for clip in range(50)]
    assert all(one["kind"] == "culling" and one["distance"] <= 0.1 for one in mild)
    chosen = sample_key_frames(81, 0)
    assert chosen[0] == 0 and chosen[-1] == 80 and 11 <= len(chosen) <= 21 and chosen == sorted(set(chosen))
    assert sample_key_frames(1, 0) == [0] and len(sample_key_frames(5, 0)) == 5


def test_refusals(scene, clip):
    degrade = Degradation()
    bad = clip.camtoworlds.clone()
    bad[3, 0, 3] = math.nan
    for changes, word in (({"frames": (255 * clip.rgb).byte()}, r"frames: expected float in \[0, 1\]"), ({"frames": 255 * clip.rgb}, "frames"), ({"camtoworlds": bad}, r"camtoworlds.*\(0, 3"),
                          ({"camtoworlds": clip.camtoworlds[:2]}, "camtoworlds"), ({"key_idx": [0, 2], "depths": None}, "scene"), ({"key_idx": [0, 2, 5]}, "key_idx"), ({"key_idx": [0, 4, 2]}, "key_idx"),
                          ({"times": clip.times + 1}, "scene"), ({"depths": clip.depth}, "depths"), ({"camtoworlds": 2 * clip.camtoworlds}, "camtoworlds")):
        with pytest.raises(ValueError, match=word):
            call(degrade, scene, clip, **changes)
    for options in ({"trans": (0.2, 0.1)}, {"trans": (-1, 1)}, {"cull_prob": 1.5}, {"kernels": ()}, {"kernels": (0,)}, {"distance_unit": "metre"}, {"color_thresh": (1,)}, {"mild_prob": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Degradation(**options)
    for arguments in ((clip.camtoworlds[:, :3], torch.ones(5), 0.1), (clip.camtoworlds, torch.zeros(5), 0.1), (clip.camtoworlds, torch.ones(5), -0.1), (clip.camtoworlds[:0], torch.ones(0), 0.1)):
        with pytest.raises(ValueError):
            novel_trajectory(*arguments)
    assert scene_depth(torch.zeros(2, 3, 4)).tolist() == [1, 1] and scene_depth(torch.tensor([[[0.0, 2.0]], [[0.0, 0.0]]])).tolist() == [2, 2]
    assert isinstance(scene, Gaussians4D)
