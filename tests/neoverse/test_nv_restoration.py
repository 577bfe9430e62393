"""Experiment C: pairs for learning, views for judging, the network and a trial."""

import pytest
import torch

from papers10.neoverse.restoration import (
    ARMS,
    CAMERA_RANGES,
    LEARNED,
    Restorer,
    depth_edges,
    estimated_depth,
    novel_views,
    painted,
    region_psnr,
    rendered,
    restoration_trial,
    simulation,
    single_frames,
    train_restorer,
    training_pairs,
)


@pytest.fixture(scope="module")
def frames():
    return single_frames(4, 0, "train")


def test_estimate_errs_as_said(frames):
    assert frames.rgb.shape == (4, 24, 32, 3) and len(frames) == len(frames.scenes) == 4
    flat = torch.full((50, 24, 32), 2.0)
    relative = estimated_depth(flat, 0) / flat - 1
    assert 0.01 < float(relative.std()) < 0.025 and abs(float(relative.mean())) < 0.005
    torch.testing.assert_close(estimated_depth(flat, 0, noise=0.0), flat)
    assert torch.equal(estimated_depth(flat, 1), estimated_depth(flat, 1)) and not torch.equal(estimated_depth(flat, 1), estimated_depth(flat, 2))
    step = torch.where(torch.arange(32) < 16, 1.0, 4.0).expand(1, 24, 32)
    assert float(estimated_depth(step, 0, noise=0.0)[0, 5, 15]) == pytest.approx(4 ** (1 / 3), rel=1e-5)  # log-mean of two ones and a four
    with pytest.raises(ValueError, match="depth"):
        estimated_depth(-flat, 0)


def test_edges_by_hand():
    depth = torch.full((1, 5, 7), 2.0)
    depth[..., 4:] = 2.2
    assert not depth_edges(depth).any() and depth_edges(depth, 0.05).any()
    depth[..., 4:] = 3.0
    assert depth_edges(depth)[0, 2].tolist() == [False, False, True, True, True, True, False]


def test_pairs_of_every_arm(frames):
    for arm in LEARNED:
        inputs, targets = training_pairs(frames, arm, 0, variants=2)
        assert inputs.shape == (1 if arm == "none" else 2, 4, 11, 24, 32) and torch.equal(targets, frames.rgb.movedim(-1, 1))
        again, _ = training_pairs(frames, arm, 0, variants=2)
        assert torch.equal(inputs, again)
        assert arm == "none" or not torch.equal(inputs[0], inputs[1])
    trust = {arm: float(training_pairs(frames, arm, 0, variants=2)[0][:, :, 4].mean()) for arm in LEARNED}
    assert trust["none"] > trust["mixed"] >= trust["simulation"] - 0.02 and trust["none"] > trust["cutout"]
    with pytest.raises(ValueError, match="arm"):
        training_pairs(frames, "raw", 0)
    with pytest.raises(ValueError, match="arm"):
        simulation("none")


def test_views_and_regions(frames):
    views = novel_views(frames, CAMERA_RANGES["near"], 0)
    count = views.holes.int() + views.edges.int() + views.flat.int()
    assert (count == 1).all() and (views.inputs[:, 4].bool() == ~views.holes).float().mean() > 0.99
    perfect = region_psnr(views.targets, views)
    assert perfect["whole"] > 150
    off = region_psnr((views.targets + 0.1).clamp(0, 2), views._replace(targets=views.targets * 0.5))
    assert off["whole"] < 20
    grey = painted(rendered(views.inputs), views.inputs, torch.full((3,), 0.5))
    assert (grey.movedim(1, -1)[views.inputs[:, 4] == 0] == 0.5).all()
    nothing = views._replace(holes=torch.zeros_like(views.holes))
    assert "holes" not in region_psnr(views.targets, nothing)
    same = novel_views(frames, (0.0, 0.0), 0)
    assert (same.targets - frames.rgb.movedim(-1, 1)).abs().mean() < 1e-4  # distance 0 is the frame itself


def test_network_starts_as_the_rendering_and_learns(frames):
    inputs, targets = training_pairs(frames, "none", 0)
    torch.testing.assert_close(Restorer()(inputs[0]), rendered(inputs[0]))
    model, losses = train_restorer(inputs, targets, 0, steps=40, batch=4)
    assert losses["last_loss"] < losses["first_loss"] and sum(p.numel() for p in model.parameters()) == 120099
    again, _ = train_restorer(inputs, targets, 0, steps=40, batch=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="multiples of 4"):
        model(inputs[0][..., :30])
    with pytest.raises(ValueError, match="channels"):
        Restorer(channels=12)


def test_trial():
    small = {"scenes": 4, "test_scenes": 3, "variants": 1, "steps": 3}
    found = {arm: restoration_trial(arm, 0, **small) for arm in ("raw", "mixed")}
    assert all(isinstance(value, float) for result in found.values() for value in result.values())
    assert found["raw"]["far_holes_share"] == found["mixed"]["far_holes_share"] > found["raw"]["near_holes_share"]
    assert restoration_trial("mixed", 0, **small) == found["mixed"] and "last_loss" in found["mixed"]
    with pytest.raises(ValueError, match="arm"):
        restoration_trial("none ", 0, **small)
    assert ARMS[0] == "raw"
