"""Released weights: names, sizes, reports, and the released code itself where it is installed."""

import importlib
import math

import pytest
import torch

from papers10.core.checkpoint import save_tensors
from papers10.core.random import generator, seeded
from papers10.neoverse.checkpoints import (
    config_of,
    fill,
    layout_of,
    load_reconstructor,
    official_names,
    read_checkpoint,
    translated,
)
from papers10.neoverse.reconstructor import NeoVerseReconstructor, ReconstructorConfig

SMALL = {"patch_size": 7, "dim": 16, "num_heads": 2, "num_pairs": 2, "kept": (0, 1), "dino_layers": 1, "dino_heads": 2, "dino_grid": 3, "head_channels": (8, 8, 8, 8), "head_features": 16, "head_hidden": 4,
         "camera_blocks": 1, "camera_heads": 2, "gaussian_hidden": 8}
UNSEEN = {name: SMALL[name] for name in ("kept", "dino_heads", "camera_heads")}
INPUTS = (torch.rand(1, 2, 3, 14, 21, generator=generator(0, "frames")), torch.tensor([[0.0, 1.0]], dtype=torch.float64))


def miniature(layout, **changes):
    config = ReconstructorConfig.vggt(**{**SMALL, **changes})
    model = seeded(0, layout, lambda: NeoVerseReconstructor(config)).eval()
    noise = generator(0, "noise")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise) / math.sqrt(max(1, parameter[0].numel())))
    own = model.state_dict()
    return model, {name: own[ours].clone() for name, ours in official_names(config, layout).items()}


@pytest.mark.parametrize("layout, changes", [("neoverse", {}), ("neoverse", {"normals": True, "sh_degree": 1}), ("vggt", {"prior_tokens": False, "motion": "none"})])
@pytest.mark.parametrize("ending", ["ckpt", "safetensors", "pt"])
def test_round_trip(tmp_path, layout, changes, ending):
    model, tensors = miniature(layout, **changes)
    path = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        save_tensors(tensors, path)
    else:
        torch.save(tensors if ending == "ckpt" else {"state_dict": {f"module.{name}": value for name, value in tensors.items()}}, path)
    again, report = load_reconstructor(path, verbose=False, **UNSEEN)
    assert report.complete and len(report.loaded) == len(tensors) and report.layout == layout
    with torch.no_grad():
        before, after = model(*INPUTS), again(*INPUTS)
    assert torch.equal(before.depth, after.depth) and torch.equal(before.cam_seq[-1], after.cam_seq[-1])
    if layout == "neoverse":
        assert again.config == model.config
        assert torch.equal(before.gaussians[0].gaussians.means, after.gaussians[0].gaussians.means)


def test_vggt_starts_the_training_of_the_whole(tmp_path):
    _, tensors = miniature("vggt", prior_tokens=False, motion="none")
    tensors["track_head.something.weight"] = torch.zeros(2)
    torch.save(tensors, tmp_path / "model.pt")
    model, report = load_reconstructor(tmp_path / "model.pt", verbose=False, prior_tokens=True, motion="bidirectional", **UNSEEN)
    assert report.complete and report.left_out == ("track_head.something.weight",)
    assert set(report.fresh) | set(report.loaded) == set(model.state_dict())
    assert {name.partition(".")[0] for name in report.fresh} == {"gaussian_depth_head", "gaussian_head", "motion_branch", "velocity_forward_head", "velocity_backward_head", "angular_forward_head",
                                                                "angular_backward_head", "backbone"}
    with torch.no_grad():
        assert model(*INPUTS).velocity_forward is not None


def test_incomplete_files_are_refused_with_the_report(tmp_path):
    _, tensors = miniature("neoverse")
    del tensors["gs_head.norm.bias"]
    tensors["velocity_fwd_head.scratch.output_conv1.bias"] = torch.zeros(3)
    tensors["hand_head.norm.weight"] = torch.zeros(3)
    torch.save(tensors, tmp_path / "broken.ckpt")
    with pytest.raises(ValueError) as error:
        load_reconstructor(tmp_path / "broken.ckpt", verbose=False, **UNSEEN)
    for part in ("missing: 1: gaussian_depth_head.norm.bias", "unexpected: 1: hand_head.norm.weight", "velocity_forward_head.neck.bias: [3] in the file, [8] here"):
        assert part in str(error.value)
    _, report = load_reconstructor(tmp_path / "broken.ckpt", verbose=False, strict=False, **UNSEEN)
    assert not report.complete and len(report.loaded) == len(tensors) - 2


def test_two_tensors_for_one_parameter():
    model, tensors = miniature("neoverse")
    report = fill(model, {**tensors, "visual_geometry_transformer.camera_tokens": tensors["visual_geometry_transformer.cam_token"]})
    assert report.unexpected == ("visual_geometry_transformer.camera_tokens",)


def test_half_precision(tmp_path):
    _, tensors = miniature("neoverse")
    torch.save({name: value.bfloat16() for name, value in tensors.items()}, tmp_path / "half.ckpt")
    single, _ = load_reconstructor(tmp_path / "half.ckpt", verbose=False, **UNSEEN)
    half, _ = load_reconstructor(tmp_path / "half.ckpt", verbose=False, dtype=torch.bfloat16, **UNSEEN)
    assert next(single.parameters()).dtype == torch.float32 and next(half.parameters()).dtype == half.backbone.mean.dtype == torch.bfloat16


def test_terms_are_printed(tmp_path, capsys):
    _, tensors = miniature("neoverse")
    torch.save(tensors, tmp_path / "reconstructor.ckpt")
    load_reconstructor(tmp_path / "reconstructor.ckpt", **UNSEEN)
    text = capsys.readouterr().out
    assert "WorldMirror" in text and f"{len(tensors)} tensors loaded" in text


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="path"):
        read_checkpoint(tmp_path / "nothing.ckpt")
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="named tensors"):
        read_checkpoint(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="names"):
        layout_of(["encoder.weight"])
    _, tensors = miniature("neoverse")
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    with pytest.raises(ValueError, match="kept"):
        config_of(shapes)
    del shapes["depth_head.scratch.output_conv1.weight"]
    with pytest.raises(ValueError, match="depth_head.neck.weight"):
        config_of(shapes, **UNSEEN)


def test_full_size():
    full = ReconstructorConfig.vggt()
    with torch.device("meta"):
        state = NeoVerseReconstructor(full).state_dict()
    names = official_names(full)
    assert len(names) == len(state) == 2006 and sum(value.numel() for value in state.values()) == 1_509_649_760
    assert all(translated(name, "neoverse") == ours for name, ours in names.items())
    shapes = {name: tuple(state[ours].shape) for name, ours in names.items()}
    assert config_of(shapes) == full
    known = {"visual_geometry_transformer.patch_embed.blocks.23.mlp.fc1.weight": (4096, 1024), "visual_geometry_transformer.motion_embeds.3.weight": (1024, 2048),
             "visual_geometry_transformer.motion_bwd_blocks.0.cross_attn.projk.weight": (1024, 1024), "visual_geometry_transformer.frame_blocks.5.attn.q_norm.weight": (64,),
             "visual_geometry_transformer.depth_embed.proj.2.fc1.weight": (4096, 196), "cam_head.adapt_norm_gen.1.weight": (6144, 2048), "pts_head.scratch.layer3_rn.weight": (256, 1024, 3, 3),
             "velocity_fwd_head.projects.0.weight": (256, 1024, 1, 1), "gs_head.input_merger.0.weight": (128, 3, 7, 7), "gs_bwd_attr_head.scratch.output_conv2.2.weight": (3, 32, 1, 1),
             "gs_renderer.gs_head.0.weight": (256, 128, 3, 3)}
    assert {name: shapes[name] for name in known} == known


def test_names_of_vggt():
    back = official_names(ReconstructorConfig.vggt(prior_tokens=False, motion="none"), "vggt")
    for name in ("aggregator.camera_token", "aggregator.register_token", "aggregator.patch_embed.patch_embed.proj.weight", "aggregator.patch_embed.pos_embed", "aggregator.frame_blocks.0.ls1.gamma",
                 "camera_head.empty_pose_tokens", "camera_head.poseLN_modulation.1.weight", "camera_head.trunk.3.mlp.fc2.bias", "camera_head.trunk_norm.weight", "camera_head.pose_branch.fc1.weight",
                 "depth_head.scratch.refinenet1.resConfUnit1.conv1.weight", "point_head.resize_layers.3.weight"):
        assert name in back
    assert "depth_head.scratch.refinenet4.resConfUnit1.conv1.weight" not in back and not any(name.startswith("gaussian") for name in back)


def test_against_the_released_code(tmp_path):
    """Names, shapes and outputs of NeoVerse's own modules; runs where its package `diffsynth` is on the path."""
    try:
        released = importlib.import_module("diffsynth.auxiliary_models.worldmirror.models.models.worldmirror")
    except ImportError:
        pytest.skip("the released code (package diffsynth of IamCreateAI/NeoVerse) is not installed")
    theirs = seeded(0, "released", lambda: released.WorldMirror(enable_norm=False, embed_dim=384, patch_embed="dinov2_vits14_reg")).eval()
    noise = generator(1, "noise")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            size = 0.05 if parameter.dim() == 1 else 0.3 if "token" in name or "pos_embed" in name else 0.002
            parameter.add_(size * torch.randn(parameter.shape, generator=noise))
        theirs.cam_head.param_predictor.fc2.weight.mul_(0.1)  # keeps fields of view away from 180°, where ours are cut
        theirs.cam_head.param_predictor.fc2.bias.copy_(torch.tensor([0.1, 0.05, -0.1, 0.02, 0.01, -0.03, 0.25, 0.2, 0.25]))
    torch.save(theirs.state_dict(), tmp_path / "reconstructor.ckpt")
    ours, report = load_reconstructor(tmp_path / "reconstructor.ckpt", dino_heads=6, verbose=False, pixel_center=0.0)
    assert report.complete
    images, times = torch.rand(1, 3, 3, 56, 70, generator=noise), torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)
    with torch.no_grad():
        wanted = theirs({"img": images, "timestamp": times.float(), "is_static": torch.zeros(1, 3, dtype=torch.bool)})
        found = ours(images, times)
    pairs = [(found.depth, wanted["depth"]), (found.gs_depth, wanted["gs_depth"]), (found.points, wanted["pts3d"]), (found.cam_seq[-1], wanted["camera_params"]), (found.camtoworlds, wanted["camera_poses"]),
             (found.velocity_forward[:, :-1], wanted["velocity_fwd"]), (found.velocity_backward[:, 1:], wanted["velocity_bwd"]), (found.angular_forward[:, :-1], wanted["gs_fwd_attr"])]
    scene = found.gaussians[0]
    for frame, part in enumerate(wanted["splats"][0]):
        rows = slice(frame * 3920, (frame + 1) * 3920)
        pairs += [(scene.gaussians.means[rows], part.means), (scene.gaussians.quats[rows], part.rotations), (scene.gaussians.sh[rows], part.harmonics), (scene.life[rows], part.life_span)]
    for mine, other in pairs:
        torch.testing.assert_close(mine, other.reshape(mine.shape), atol=1e-4, rtol=1e-4)
