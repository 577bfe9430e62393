"""The small reconstructor: its first weights, its training, its file, its numbers."""

import math

import pytest
import torch

from papers10.neoverse import tiny
from papers10.neoverse.losses import room_batch
from papers10.neoverse.reconstructor import NeoVerseReconstructor


@pytest.fixture(scope="module")
def batch():
    return room_batch([tiny.HELD_OUT], 3, tiny.WIDTH, tiny.HEIGHT)


def test_a_new_model_begins_near_what_is_usual(batch):
    model = tiny.new_tiny(3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tiny.new_tiny(3).state_dict().values()))
    with torch.no_grad():
        out = model(batch.images, batch.key_times)
    assert abs(float(out.depth.mean()) - 1) < 0.2
    assert float(out.velocity_forward.abs().max()) < 0.2
    assert float(out.parameters.opacities.min()) > 0.5


def test_training_is_deterministic_and_resumes_exactly(tmp_path):
    stages = {"depth": (4, 1e-3), "pose": (2, 1e-3)}
    seen = []
    whole = tiny.train_tiny(5, stages=stages, frames=4, eval_every=4, folder=tmp_path / "a", report=lambda *found: seen.append(found))
    again = tiny.train_tiny(5, stages=stages, frames=4, eval_every=4, folder=tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    assert [(stage, step) for stage, step, _ in seen] == [("depth", 4), ("pose", 2)]
    assert all(math.isfinite(value) for value in seen[-1][2].values())


def test_every_clip_is_seen_both_ways():
    rooms = tiny._Rooms(0, "depth", 4)
    first, second, third = next(rooms), next(rooms), next(rooms)
    assert torch.equal(first.frames.flip(1), second.frames)
    assert third.frames.shape != first.frames.shape or not torch.equal(third.frames, first.frames)
    torch.testing.assert_close(second.camtoworlds[:, 0], torch.eye(4).expand_as(second.camtoworlds[:, 0]), atol=1e-5, rtol=0)


def test_log_depth_is_zero_at_the_truth(batch):
    class Truth:
        depth = gs_depth = batch.depth[:, ::2]

    class Double:
        depth, gs_depth = 2 * batch.depth[:, ::2], batch.depth[:, ::2]

    assert tiny.log_depth_loss(Truth, batch) == 0
    assert float(tiny.log_depth_loss(Double, batch)) == pytest.approx((math.log(2) / 0.3) ** 2, rel=1e-5)


def test_file_round_trip(tmp_path):
    model = tiny.new_tiny(1)
    path = tiny.save(model, tmp_path / "x" / "tiny.safetensors", recipe={"seed": 1}, curve=[{"step": 1}])
    loaded = tiny.load(path)
    assert all(torch.equal(value.half().float(), loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert not loaded.training
    assert tiny.about(path)["recipe"] == {"seed": 1} and tiny.about(path)["curve"] == [{"step": 1}]
    with pytest.raises(FileNotFoundError, match="train_tiny"):
        tiny.load(tmp_path / "none.safetensors")


def test_file_of_another_model_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="tiny_config"):
        tiny.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("keys", [2, 3])
def test_evaluation_names_and_baselines(keys):
    found = tiny.evaluate_tiny(tiny.new_tiny(0), [tiny.HELD_OUT], keys=keys)
    assert all(isinstance(value, float) for value in found.values())
    assert ("reversed" in found) == (keys > 2)
    assert found["still_ate"] > 0 and found["copy_psnr"] > 10
    # Without training displacements are nearly zero, and so is what they cost.
    assert found["forward"] == pytest.approx(found["zero_forward"], rel=0.1)


def test_refusals():
    with pytest.raises(ValueError, match="stage"):
        tiny.tiny_objective("motions")
    with pytest.raises(ValueError, match="arm"):
        tiny.tiny_trial("best", 0)


def test_the_shipped_model_beats_what_costs_nothing():
    model = NeoVerseReconstructor.load_tiny()
    found = tiny.evaluate_tiny(model, range(tiny.HELD_OUT + 500, tiny.HELD_OUT + 508), pictures=False)
    assert found["gs_depth"] < 0.8 * found["mean_depth"]
    assert found["ate"] < 0.7 * found["still_ate"]
    assert found["backward"] < found["zero_backward"] and found["backward_middle"] < found["reversed"]
