"""Loss, trainer, the drawn clip and its comparisons."""

import math

import pytest
import torch

from papers10.adagar.clips import clip_arms, clip_run, disc_init_run, parameters_a_primitive
from papers10.adagar.initialisation import VideoScene
from papers10.adagar.interpolation import MotionArm, disc_clip, disc_model, interpolation_run, motion_arms
from papers10.adagar.scene import GaborSplats
from papers10.adagar.training import AdaGaRConfig, AdaGaRTrainer, FrameSampler, evaluate_frames, objective
from papers10.core.checks import NonFiniteError

SMALL = {"frames": 9, "size": 24, "points": 12}


def test_sampler_is_resumable_and_pairs_are_near():
    first, second = FrameSampler(range(0, 17, 2), 3, seed=1, reach=4), FrameSampler(range(0, 17, 2), 3, seed=1, reach=4)
    drawn = [next(first) for _ in range(5)]
    second.load_state_dict({"drawn": 3})
    assert all(torch.equal(a, b) for a, b in zip(next(second), drawn[3]))
    assert all((a - b).abs().max() <= 4 and set(a.tolist()) <= set(range(0, 17, 2)) for a, b in drawn)


def test_disc_clip_has_its_truth():
    clip = disc_clip(9, 32, points=20, occluder=True)
    scene = clip.scene
    assert scene.frames.shape == (9, 32, 32, 3) and scene.tracks.shape == (40, 9, 2)
    assert float(clip.hidden.max()) > 0.3 and float(clip.hidden.min()) == 0
    rows, columns = scene.tracks[:20, 4, 1].long(), scene.tracks[:20, 4, 0].long()
    # Where a point of the disc is seen, the mask is set, but at its border.
    assert scene.masks[4][rows, columns][scene.visibility[:20, 4]].float().mean() > 0.8
    with pytest.raises(ValueError, match="path"):
        disc_clip(path="line")


@pytest.mark.parametrize("name", motion_arms())
def test_every_motion_trains(name):
    arm = motion_arms(9)[name]
    _, scores, _ = interpolation_run(arm, steps=4, **SMALL)
    assert all(math.isfinite(scores[key]) for key in ("train", "held_out", "disc"))


def test_trials_repeat():
    first, second = (interpolation_run("hermite_curv", steps=10, seed=3, **SMALL)[1] for _ in range(2))
    assert first["train"] == second["train"] and first["held_out"] == second["held_out"]


def test_hidden_frames_decide_nothing():
    clip = disc_clip(9, 24, points=12)
    model = disc_model(clip, MotionArm("hermite", 5), train_frames=range(0, 9, 2))
    other = clip.scene.frames.clone()
    other[1::2] = 0.5
    changed = clip._replace(scene=VideoScene.from_array(other, depth=clip.scene.depth, tracks=clip.scene.tracks, visibility=clip.scene.visibility, masks=clip.scene.masks))
    results = [AdaGaRTrainer(one.scene, AdaGaRConfig(steps=8), disc_model(one, MotionArm("hermite", 5), train_frames=range(0, 9, 2)), train_frames=range(0, 9, 2)).fit() for one in (clip, changed)]
    assert all(torch.equal(a, b) for a, b in zip(results[0].model.parameters(), results[1].model.parameters()))
    assert len(model) == 24


def test_loss_is_the_sum_of_its_terms():
    clip = disc_clip(9, 24, points=12)
    model = disc_model(clip, MotionArm("hermite", 5), train_frames=range(9))
    config = AdaGaRConfig(lambda_track=2.0, lambda_depth=1.0, lambda_mask=1.0, lambda_arap=0.1)
    terms, meta = objective(model, clip.scene, torch.tensor([0, 3]), torch.tensor([2, 3]), config)
    assert set(terms) == {"rgb", "track", "depth", "mask", "curv", "arap", "loss"} and meta["n_cameras"] == 2
    numbers = {name: float(value.detach()) for name, value in terms.items()}
    assert numbers["loss"] == pytest.approx(sum(value for name, value in numbers.items() if name != "loss"))
    terms["loss"].backward()
    assert model.position_knots.grad.abs().sum() > 0


@pytest.mark.parametrize("strategy", ["default", "mcmc"])
def test_growth_in_training(strategy):
    clip = disc_clip(5, 24, points=10)
    config = AdaGaRConfig(steps=12, strategy=strategy, refine_start=2, refine_every=3, refine_stop=11, reset_every=0, grow_grad2d=1e-6, n_max=26)
    result = AdaGaRTrainer(clip.scene, config, initial={"n": 20, "n_waves": 1}).fit()
    assert 20 < len(result.model) <= 26


def test_growth_by_absolute_gradients_and_the_dense_path():
    clip = disc_clip(5, 24, points=10)
    grown = AdaGaRConfig(steps=8, strategy="default", refine_start=2, refine_every=3, refine_stop=7, reset_every=0, grow_grad2d=1e-6, n_max=26, absgrad=True)
    assert len(AdaGaRTrainer(clip.scene, grown, initial={"n": 20, "n_waves": 1}).fit().model) > 20
    dense = AdaGaRTrainer(clip.scene, AdaGaRConfig(steps=2, backend="reference"), initial={"n": 20, "n_waves": 1}).fit()
    assert math.isfinite(dense.mean("psnr", "train"))


def test_noise_of_mcmc_leaves_primitives_in_the_scene():
    clip = disc_clip(5, 24, points=10)
    config = AdaGaRConfig(steps=10, strategy="mcmc", refine_start=2, refine_every=3, refine_stop=9, n_max=26)
    model = AdaGaRTrainer(clip.scene, config, initial={"n": 20, "n_waves": 1}).fit().model
    assert (model.means[:, 2] >= 0.01).all() and model.means.abs().max() < 10


def test_evaluation_names_its_splits():
    clip = disc_clip(5, 24, points=6)
    model = disc_model(clip, MotionArm("hermite", 3), train_frames=[0, 2, 4])
    rows = evaluate_frames(model, clip.scene, [0, 2, 4])
    assert [row["split"] for row in rows] == ["train", "held-out"] * 2 + ["train"]


def test_a_loss_that_is_not_finite_stops_the_run():
    clip = disc_clip(5, 24, points=6)
    model = disc_model(clip, MotionArm("hermite", 3), train_frames=range(5))
    with torch.no_grad():
        model.colors[0] = math.nan
    with pytest.raises(NonFiniteError):
        AdaGaRTrainer(clip.scene, AdaGaRConfig(steps=20), model).fit()


def test_parameters_of_a_primitive_are_counted_right():
    for waves, knots in ((0, 3), (2, 5)):
        model = GaborSplats(7, 9, n_waves=waves, n_knots=knots)
        assert model.num_parameters() == 7 * parameters_a_primitive(waves, knots)


@pytest.mark.parametrize("arm", clip_arms(5))
def test_clip_arms_train_on_a_scene_with_tracks(arm):
    _, numbers = clip_run(disc_clip(5, 24, points=12).scene, arm, n=24, steps=3)
    assert math.isfinite(numbers["train"]) and math.isfinite(numbers["held_out"])


def test_starts_of_the_disc():
    assert math.isfinite(disc_init_run("adaptive", n=24, steps=10)["early"])


@pytest.mark.parametrize("call, message", [
    (lambda: FrameSampler([], 1), "frames"),
    (lambda: AdaGaRTrainer(disc_clip(5, 24).scene, train_frames=[7]), "train_frames"),
    (lambda: interpolation_run("hermit", steps=1), "arm"),
    (lambda: clip_run(disc_clip(5, 24).scene, "gabr"), "arm"),
    (lambda: clip_run(disc_clip(5, 24).scene, "gabor", holdout="even"), "holdout"),
    (lambda: AdaGaRTrainer(VideoScene.from_array(torch.rand(3, 16, 16, 3)), AdaGaRConfig(steps=1, lambda_track=1.0), initial={"n": 8}).fit(), "lambda_track"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
