"""The reconstructor: motion branch, heads, cameras, Gaussians and what it refuses."""

import math
import warnings

import pytest
import torch
from torch import nn

from papers10.core.config import ConfigError
from papers10.core.random import generator, seeded
from papers10.neoverse import reconstructor as module
from papers10.neoverse.reconstructor import (
    Block,
    CameraHead,
    DPTHead,
    GaussianHead,
    MotionBranch,
    NeoVerseReconstructor,
    ReconstructorConfig,
    bounded_rotation,
    camera_to_vector,
    normalized_depth,
    normalized_positions,
    patch_positions,
    signed_expm1,
    vector_to_camera,
)
from papers10.neoverse.world import SceneSpec, scene_clip
from papers10.splat.rotations import quat_to_matrix

SMALL = {"patch_size": 4, "dim": 32, "num_heads": 2, "head_channels": (8, 8, 8, 8), "head_features": 16, "head_hidden": 8, "camera_heads": 2, "gaussian_hidden": 8}


def small(**changes):
    return seeded(0, "model", lambda: NeoVerseReconstructor(ReconstructorConfig.tiny(**{**SMALL, **changes}))).eval()


def inputs(clips=1, frames=3, height=12, width=16, dtype=torch.float32):
    images = torch.rand(clips, frames, 3, height, width, generator=generator(0, "images")).to(dtype)
    return images, torch.arange(frames, dtype=torch.float64).expand(clips, frames)


def stirred(model, size=0.3):
    noise = generator(1, "noise")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=noise) / math.sqrt(max(1, parameter[0].numel())))
    return model


def test_shapes_and_fields():
    model = small(points=True, normals=True)
    images, times = inputs(2)
    with torch.no_grad():
        out = model(images, times)
    assert out.camtoworlds.shape == (2, 3, 4, 4) and out.Ks.shape == (2, 3, 3, 3) and len(out.cam_seq) == 2
    for name in ("depth", "depth_conf", "gs_depth", "gs_depth_conf", "velocity_forward_conf", "points_conf"):
        assert getattr(out, name).shape == (2, 3, 12, 16)
    for name in ("velocity_forward", "velocity_backward", "angular_forward", "angular_backward", "points", "normals"):
        assert getattr(out, name).shape == (2, 3, 12, 16, 3)
    assert bool((out.depth > 0).all()) and bool((out.depth_conf > 1).all())
    torch.testing.assert_close(out.normals.norm(dim=-1), torch.ones(2, 3, 12, 16), atol=1e-5, rtol=0)
    assert out.speeds().shape == (2, 3, 12, 16) and out.cameras(1).count == 3
    for scene in out.gaussians:
        scene.check()
        assert scene.key.tolist() == [frame for frame in range(3) for _ in range(192)]


def test_velocities_reach_the_world_by_the_camera_and_angular_ones_stay():
    model = stirred(small())
    images, times = inputs()
    with torch.no_grad():
        out = model(images, times)
    turned = torch.einsum("sij,shwj->shwi", out.camtoworlds[0, :, :3, :3], out.velocity_forward[0]).reshape(-1, 3)
    torch.testing.assert_close(out.gaussians[0].velocity_forward, turned)
    torch.testing.assert_close(out.gaussians[0].angular_backward, out.angular_backward[0].reshape(-1, 3))
    assert float(turned.norm(dim=-1).max()) > 0


def test_given_cameras_place_the_gaussians():
    model = small()
    images, times = inputs()
    clip = scene_clip(SceneSpec.random(0), [0.0, 0.5, 1.0], 16, 12)
    cameras = (clip.camtoworlds[None], clip.Ks[None])
    with torch.no_grad():
        out = model(images, times, cameras=cameras)
    local = out.gaussians[0].gaussians.means.unflatten(0, (3, 192)) @ clip.cameras.viewmats[:, :3, :3].mT + clip.cameras.viewmats[:, None, :3, 3]
    torch.testing.assert_close(local[..., 2], out.gs_depth[0].flatten(1), atol=1e-5, rtol=1e-5)


def test_later_frames_are_exchangeable_without_motion():
    model = stirred(small(motion="none"))
    images, times = inputs(frames=4)
    order = [0, 3, 1, 2]
    with torch.no_grad():
        plain, mixed = model(images, times), model(images[:, order], times)
    torch.testing.assert_close(plain.depth[:, order], mixed.depth, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(plain.cam_seq[-1][:, order], mixed.cam_seq[-1], atol=1e-5, rtol=1e-4)


def test_cameras_of_all_frames_have_the_scale_of_the_key_frames():
    model = stirred(small())
    images, times = inputs(2, 5)
    keys = [0, 2, 4]
    with torch.no_grad():
        out = model(images[:, keys], times[:, keys])
        poses, Ks = model.cameras_of_all(images, keys, out)
        same, _ = model.cameras_of_all(images[:, keys], [0, 1, 2], out)
    assert poses.shape == (2, 5, 4, 4) and Ks.shape == (2, 5, 3, 3)
    torch.testing.assert_close(poses[:, keys, :3, 3].norm(dim=-1).mean(1), out.camtoworlds[..., :3, 3].norm(dim=-1).mean(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(same, out.camtoworlds, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="keys"):
        model.cameras_of_all(images, [0, 2], out)


def test_clips_of_a_batch_do_not_mix():
    model = stirred(small())
    images, times = inputs(2)
    with torch.no_grad():
        both, alone = model(images, times), model(images[1:], times[1:])
    torch.testing.assert_close(both.depth[1], alone.depth[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both.gaussians[1].velocity_backward, alone.gaussians[0].velocity_backward, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("motion", ["bidirectional", "unidirectional", "frame", "none"])
def test_motion_kinds(motion):
    model = stirred(small(motion=motion))
    images, times = inputs()
    with torch.no_grad():
        out = model(images, times)
    if motion == "none":
        assert out.velocity_forward is None and out.gaussians[0].velocity_forward is None
        return
    assert not out.velocity_forward[:, -1].any() and not out.velocity_backward[:, 0].any()
    if motion == "unidirectional":
        torch.testing.assert_close(out.velocity_backward[:, 1:], -out.velocity_forward[:, 1:])


def test_motion_branch_equals_its_formula():
    branch = seeded(0, "branch", lambda: MotionBranch(16, 2, 1, layer_scale=1.0))
    tokens, positions = torch.randn(1, 3, 7, 32, generator=generator(0, "tokens")), patch_positions(2, 3, 1)
    with torch.no_grad():
        found = branch([tokens], positions)
        u = branch.embed[0](tokens)
        for s in range(2):
            both = torch.cat([u[:, s] + branch.frame_tokens[:, 0], u[:, s + 1] + branch.frame_tokens[:, 1]], 1)
            a, b = branch.self_blocks[0](both, torch.cat([positions, positions])).split(7, 1)
            torch.testing.assert_close(found.forward[0][:, s], branch.forward_blocks[0](a, positions, b, positions))
            torch.testing.assert_close(found.backward[0][:, s], branch.backward_blocks[0](b, positions, a, positions))


def test_ablations_have_equal_parameters():
    count = lambda kind: sum(p.numel() for p in MotionBranch(32, 2, 2, motion=kind).parameters())
    assert count("bidirectional") == count("frame") > count("unidirectional") > count("none") == 0


def test_single_frame_warns_once_and_does_not_move(monkeypatch):
    monkeypatch.setattr(module, "_NO_MOTION_WARNED", False)
    model = small()
    images, times = inputs(frames=1)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="single frame"):
            out = model(images, times)
        assert out.velocity_forward is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(images, times)


def test_static_clips_are_constant_and_may_be_merged():
    images, times = inputs(2)
    with torch.no_grad():
        out = small()(images, times, torch.tensor([True, False]))
        merged = small(static_voxel=10.0)(images, times, torch.tensor([True, False]))
    assert bool((out.gaussians[0].key == -1).all()) and bool((out.gaussians[1].key >= 0).all())
    assert len(merged.gaussians[0]) < len(out.gaussians[0]) and len(merged.gaussians[1]) == len(out.gaussians[1])


def test_static_and_dynamic_parameters_differ():
    head = seeded(0, "head", lambda: GaussianHead(8, 8, sh_degree=1))
    features, images = torch.randn(2, 8, 3, 4, generator=generator(0, "features")), torch.rand(2, 3, 3, 4, generator=generator(0, "images"))
    mixed, static, dynamic = (head(features, images, torch.tensor(flags)) for flags in ([True, False], [True, True], [False, False]))
    torch.testing.assert_close(mixed.quats[0], static.quats[0])
    torch.testing.assert_close(mixed.quats[1], dynamic.quats[1])
    assert mixed.sh.shape == (2, 3, 4, 4, 3) and not torch.allclose(static.life, dynamic.life)


def test_first_values_of_gaussians():
    head = seeded(0, "head", lambda: GaussianHead(8, 8))
    images = torch.rand(1, 3, 2, 2, generator=generator(0, "images"))
    first = head(torch.zeros(1, 8, 2, 2), images, torch.tensor([False]))
    torch.testing.assert_close(first.scales, torch.full((1, 2, 2, 3), 9.118820e-4), atol=1e-9, rtol=1e-5)
    torch.testing.assert_close(first.opacities, torch.full((1, 2, 2), 0.1192029), atol=1e-6, rtol=0)
    torch.testing.assert_close(0.5 + 0.28209479177387814 * first.sh[..., 0, :], images.movedim(1, -1))


def test_scales_are_limited():
    head = GaussianHead(4, 4, max_scale=0.3)
    nn.init.constant_(head.dynamic[2].bias, 5.0)
    with torch.no_grad():
        assert float(head(torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 2, 2), torch.tensor([False])).scales.max()) == pytest.approx(0.3)


def test_camera_vector_round_trip_and_order():
    clip = scene_clip(SceneSpec.random(1), [0.0, 0.7], 16, 12, dtype=torch.float64)
    vector = camera_to_vector(clip.cameras.viewmats, clip.Ks, 12, 16)
    viewmats, Ks = vector_to_camera(vector, 12, 16)
    torch.testing.assert_close(viewmats, clip.cameras.viewmats, atol=1e-12, rtol=0)
    torch.testing.assert_close(Ks, clip.Ks, atol=1e-12, rtol=1e-12)
    quarter = torch.tensor([0.0, 0, 0, 0, 0, math.sin(math.pi / 4), math.cos(math.pi / 4), 1.0, 1.0], dtype=torch.float64)
    turned, _ = vector_to_camera(quarter, 12, 16)
    torch.testing.assert_close(turned[:3, :3], quat_to_matrix(torch.tensor([math.cos(math.pi / 4), 0, 0, math.sin(math.pi / 4)], dtype=torch.float64)))
    assert vector[0, 7] < vector[0, 8]


def test_field_of_view_of_zero_stays_finite():
    viewmats, Ks = vector_to_camera(torch.zeros(9), 12, 16)
    assert bool(torch.isfinite(Ks).all()) and torch.equal(viewmats, torch.eye(4))


def test_camera_head_refines_and_detaches():
    head = seeded(0, "head", lambda: CameraHead(16, 2, 1, steps=3))
    tokens = torch.randn(1, 2, 16, generator=generator(0, "tokens"), requires_grad=True)
    found = head(tokens)
    assert len(found) == 3 and len(head(tokens, steps=1)) == 1
    assert bool((found[-1][..., 7:] > 0).all())
    torch.testing.assert_close(head(tokens, steps=1)[0], found[0])
    torch.testing.assert_close(found[-1], torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1, 1]).expand(1, 2, 9))
    stirred(head)
    found = head(tokens)
    found[-1].sum().backward()
    assert not head.start.grad.any() if head.start.grad is not None else True
    assert not torch.allclose(found[0], found[2])


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_dense_head_takes_any_number_of_levels(levels):
    head = DPTHead(16, 3, 4, "rotation", confidence=False, channels=(8, 8, 8, 8), features=8, hidden=4, num_levels=levels, image_features=True)
    tokens, images = [torch.randn(1, 2, 3 + 12, 16) for _ in range(levels)], torch.rand(1, 2, 3, 12, 16)
    values, confidence, features = head(tokens, images, 3)
    assert values.shape == (1, 2, 12, 16, 3) and confidence is None and features.shape == (1, 2, 4, 12, 16)
    assert head.levels[-1] == levels - 1


def test_activations():
    x = torch.tensor([-2.0, 0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(signed_expm1(x), torch.tensor([1 - math.e**2, 0, math.sqrt(math.e) - 1], dtype=torch.float64))
    assert float(bounded_rotation(torch.full((3,), 1e9)).norm()) == pytest.approx(math.pi, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model = small().to(dtype)
    images, times = inputs(dtype=dtype)
    with torch.no_grad():
        out = model(images, times)
    assert out.depth.dtype == out.gaussians[0].gaussians.means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool(torch.isfinite(out.gaussians[0].gaussians.means).all())


def test_autocast_keeps_geometry_in_float32():
    model = small()
    images, times = inputs()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images, times)
    with torch.no_grad():
        exact = model(images, times)
    assert out.camtoworlds.dtype == out.depth.dtype == torch.float32
    torch.testing.assert_close(out.depth, exact.depth, atol=0.1, rtol=0.1)


def test_gradient_checkpointing_changes_nothing():
    images, times = inputs()
    grads = []
    for checkpointing in (False, True):
        model = small(gradient_checkpointing=checkpointing).train()
        model(images, times).depth.square().mean().backward()
        grads.append(model.backbone.frame_blocks[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_chunks_change_nothing():
    images, times = inputs(2, 3)
    with torch.no_grad():
        outs = [small(frames_per_chunk=size)(images, times) for size in (1, 4, 8)]
    for other in outs[1:]:
        torch.testing.assert_close(outs[0].gaussians[0].gaussians.means, other.gaussians[0].gaussians.means, atol=1e-5, rtol=1e-5)


def test_positions_need_no_float64():
    attend = seeded(0, "attention", lambda: module.Attention(64, 2))
    x, positions = torch.randn(1, 40 * 24, 64, generator=generator(0, "x")), patch_positions(24, 40)
    with torch.no_grad():
        single = attend(x, positions)
        exact = attend.double()(x.double(), positions)
    torch.testing.assert_close(single.double(), exact, atol=1e-4, rtol=0)


def test_confident_gaussians_are_kept():
    model = stirred(small())
    with torch.no_grad():
        scene = model(*inputs()).gaussians[0]
    kept = module.keep_confident(scene, 0.25)
    assert len(kept) == len(scene) // 4 and float(kept.confidence.min()) >= float(scene.confidence.quantile(0.74))
    assert bool((kept.key.diff() >= 0).all()) and len(module.keep_confident(scene, 1.0, limit=5)) == 5
    with pytest.raises(ValueError, match="confidence"):
        module.keep_confident(scene.replace(confidence=None))
    with pytest.raises(ValueError, match="share"):
        module.keep_confident(scene, 1.5)


def test_priors_are_used_and_normalised():
    model = stirred(small(prior_tokens=True))
    images, times = inputs()
    clip = scene_clip(SceneSpec.random(2), [0.0, 0.5, 1.0], 16, 12)
    priors = {"camtoworlds": clip.camtoworlds[None], "Ks": clip.Ks[None], "depth": clip.depth[None]}
    with torch.no_grad():
        plain = model(images, times)
        for name, value in priors.items():
            assert not torch.allclose(plain.depth, model(images, times, priors={name: value}).depth, atol=1e-6)
        moved = priors["camtoworlds"].clone()
        moved[..., :3, 3] = 5 * moved[..., :3, 3] + 7
        torch.testing.assert_close(model(images, times, priors={"camtoworlds": priors["camtoworlds"]}).depth, model(images, times, priors={"camtoworlds": moved}).depth, atol=1e-4, rtol=1e-4)
    places = normalized_positions(priors["camtoworlds"])
    assert float(places.amax(1).sub(places.amin(1)).max()) == pytest.approx(0.8, abs=1e-4)
    depth = normalized_depth(clip.depth)
    assert float(depth.min()) == 0 and float(depth.max()) == 1
    torch.testing.assert_close(normalized_depth(3 * clip.depth), depth, atol=1e-5, rtol=0)


def test_save_and_load(tmp_path):
    model = stirred(small())
    model.save_pretrained(tmp_path / "model")
    again = NeoVerseReconstructor.from_pretrained(tmp_path / "model")
    images, times = inputs()
    with torch.no_grad():
        assert torch.equal(model(images, times).depth, again(images, times).depth)
    with pytest.raises(FileNotFoundError, match="config.json"):
        NeoVerseReconstructor.from_pretrained(tmp_path)


def test_dino_positions_are_resized():
    config = {**SMALL, "patch_embed": "dinov2", "dino_layers": 1, "dino_heads": 2, "dino_grid": 3}
    model = small(**config)
    with torch.no_grad():
        assert model(*inputs(height=12, width=12)).depth.shape[-2:] == (12, 12)
        assert model(*inputs(height=16, width=24)).depth.shape[-2:] == (16, 24)


def test_backward_reaches_every_parameter_but_the_unused_map():
    model = small(points=True)
    images, times = inputs()
    out = model(images, times)
    scene = out.gaussians[0]
    parts = [out.depth, out.depth_conf, out.points, out.points_conf, out.gs_depth_conf, out.velocity_forward_conf, out.velocity_backward_conf, *out.cam_seq, scene.gaussians.means, scene.gaussians.quats,
             scene.gaussians.scales, scene.gaussians.sh, scene.gaussians.opacities, scene.life, scene.velocity_forward, scene.velocity_backward, scene.angular_forward, scene.angular_backward]
    sum(part.sum() for part in parts).backward()
    missing = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert missing == {"gaussian_head.static.0", "gaussian_head.static.2"}


REFUSED = [
    (lambda i, t: (i[:, :, :, :11], t), ValueError, "images.*multiple of the patch, 4, got 11; the nearest is 12"),
    (lambda i, t: (i[..., :15], t), ValueError, "images.*width"),
    (lambda i, t: (i[:, :, :2], t), ValueError, "images"),
    (lambda i, t: (i[0], t), ValueError, "images"),
    (lambda i, t: (i * 2, t), ValueError, r"images: expected numbers in \[0, 1\]"),
    (lambda i, t: ((i * 255).to(torch.uint8), t), ValueError, r"images: expected floats in \[0, 1\]"),
    (lambda i, t: (i.clone().index_fill_(1, torch.tensor(2), float("nan")), t), ValueError, r"images.*index \(0, 2"),
    (lambda i, t: (i[:, :0], t[:, :0]), ValueError, "images"),
    (lambda i, t: (i, t[:, :2]), ValueError, "times"),
    (lambda i, t: (i, t.flip(1)), ValueError, "times: expected increasing"),
    (lambda i, t: (i, t * 0), ValueError, "times: expected increasing"),
    (lambda i, t: (i, t * float("inf")), ValueError, "times"),
    (lambda i, t: (i, t, torch.tensor([True, False])), ValueError, "is_static"),
    (lambda i, t: (i, t, torch.tensor([1])), TypeError, "is_static"),
    (lambda i, t: (i, t, None, {"Ks": torch.eye(3).expand(1, 3, 3, 3)}), ValueError, "priors.*prior tokens"),
    (lambda i, t: (i, t, None, {"pose": torch.eye(4).expand(1, 3, 4, 4)}), ValueError, "priors"),
]


@pytest.mark.parametrize("change, kind, message", REFUSED)
def test_refusals(change, kind, message):
    with pytest.raises(kind, match=message):
        small()(*change(*inputs()))


def test_refused_cameras_and_sizes():
    images, times = inputs()
    bent = torch.eye(4).expand(1, 3, 4, 4).clone()
    bent[0, 1, 0, 0] = 2.0
    with pytest.raises(ValueError, match=r"cameras\[0\]"):
        small()(images, times, cameras=(bent, torch.eye(3).expand(1, 3, 3, 3)))
    for changes, word in (({"dim": 30}, "dim"), ({"kept": (2, 1)}, "kept"), ({"kept": (5,)}, "kept"), ({"motion": "both"}, "motion"), ({"head_features": 6}, "head_features"), ({"colour": 1}, "colour")):
        with pytest.raises(ConfigError, match=word):
            ReconstructorConfig.tiny(**changes)
    with pytest.raises(ValueError, match="dim"):
        Block(10, 4)
    with pytest.raises(ValueError, match="tokens: expected 2 levels"):
        MotionBranch(16, 2, 2)([torch.zeros(1, 2, 3, 32)], patch_positions(1, 3))
    with pytest.raises(ValueError, match=r"tokens\[0\]"):
        MotionBranch(16, 2, 1)([torch.zeros(1, 2, 3, 16)], patch_positions(1, 3))
