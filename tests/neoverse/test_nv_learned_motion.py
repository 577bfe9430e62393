"""The flat world of discs, the small motion network and its training."""

import pytest
import torch

from papers10.core.random import generator, seeded
from papers10.neoverse.learned_motion import (
    FlatMotionNetwork,
    disc_clips,
    learned_motion_trial,
    motion_attention,
    motion_errors,
    object_motion_loss,
    position_features,
    train_flat,
)


def small(motion="bidirectional", **options):
    return seeded(0, "small", lambda: FlatMotionNetwork(motion, dim=16, num_heads=2, pairs=1, **options))


def test_clips_are_what_their_generator_says():
    first, second, other = (disc_clips(32, generator(seed, "x")) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first.images, other.images)
    assert first.images.shape == (32, 3, 3, 24, 32) and 0 <= first.images.min() and first.images.max() <= 1
    assert not first.forward[~first.inside[:, :2]].any() and not first.backward[~first.inside[:, 1:]].any()


def test_forward_of_the_first_frame_is_minus_backward_of_the_second():
    clips = disc_clips(64, generator(3, "x"))
    for clip in range(64):
        if clips.inside[clip, 0].any() and clips.inside[clip, 1].any():
            torch.testing.assert_close(clips.forward[clip, 0][clips.inside[clip, 0]][0], -clips.backward[clip, 0][clips.inside[clip, 1]][0])


@pytest.mark.parametrize(("count", "size", "name"), [(0, {}, "count"), (2, {"width": 8}, "width"), (2, {"height": 8}, "height")])
def test_clips_refuse(count, size, name):
    with pytest.raises(ValueError, match=name):
        disc_clips(count, generator(0, "x"), **size)


def test_loss_by_hand():
    truth = torch.zeros(2, 2, dtype=torch.float64)
    guess = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    inside = torch.tensor([True, False])
    expected = (8 * 25 / 4 + 0.05 * 1 / 4) / 8.05
    torch.testing.assert_close(object_motion_loss(guess, truth, inside, unit=2.0), torch.tensor(expected, dtype=torch.float64))
    assert object_motion_loss(truth, truth, inside) == 0
    guess.requires_grad_()
    assert torch.autograd.gradcheck(lambda g: object_motion_loss(g, truth, inside), (guess,))
    with pytest.raises(ValueError, match="prediction"):
        object_motion_loss(guess, truth[:1], inside)


def test_positions_tell_patches_apart():
    features = position_features(6, 8, 64)
    assert features.shape == (48, 64)
    assert torch.pdist(features).min() > 0.2
    torch.testing.assert_close(features[0, :2], torch.tensor([-7 / 8, -5 / 6]))


def test_network_shapes_and_ablation():
    clips = disc_clips(2, generator(0, "x"))
    for motion in ("bidirectional", "unidirectional", "frame"):
        onward, back = small(motion)(clips.images)
        assert onward.shape == back.shape == (2, 2, 24, 32, 2)
    count = lambda network: sum(p.numel() for p in network.parameters())
    assert count(small()) == count(small("frame")) > count(small("unidirectional"))
    onward, back = small("unidirectional")(clips.images)
    torch.testing.assert_close(back[:, 0], -onward[:, 1])
    with pytest.raises(ValueError, match="motion"):
        FlatMotionNetwork("none")
    with pytest.raises(ValueError, match="patch"):
        FlatMotionNetwork(patch=5)
    with pytest.raises(ValueError, match="images"):
        small()(clips.images[..., :-1])


def test_attention_rows_are_shares():
    clips = disc_clips(2, generator(0, "x"))
    weights = motion_attention(small(), clips.images, direction="backward")
    assert weights.shape == (2, 2, 48, 48)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 48))
    with pytest.raises(ValueError, match="direction"):
        motion_attention(small("unidirectional"), clips.images, direction="backward")


def test_no_motion_has_the_error_of_no_motion():
    class Still(torch.nn.Module):
        def forward(self, images):
            nothing = torch.zeros(len(images), 2, 24, 32, 2)
            return nothing, nothing

    found = motion_errors(Still(), disc_clips(64, generator(0, "x")))
    assert found["forward"] == found["zero_forward"] and found["backward"] == found["reversed"] == found["zero_backward"]


def test_training_is_deterministic_and_lowers_the_loss():
    (one, history), (two, _) = (train_flat("bidirectional", 0, steps=12, batch=4, dim=16, pairs=1, log_every=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    losses = history.column("loss")[1]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="arm"):
        train_flat("both", 0)


def test_trial_gives_plain_numbers():
    found = learned_motion_trial("plain", 0, steps=2, batch=2, test_clips=8)
    assert all(isinstance(value, float) for value in found.values())
    assert set(found) == {"forward", "backward", "reversed", "zero_forward", "zero_backward", "parameters"}
