"""A session is the masked rollout, whatever the mask, the cut and the guidance."""

import math

import pytest
import torch

from papers10.avatar_forcing.model import STREAMS, AvatarForcingConfig, build_model
from papers10.avatar_forcing.streaming import StreamingSession, generate, masked_rollout
from papers10.kernels.attention import MaskSpec


def opened(dtype=torch.float64, **sizes):
    config = AvatarForcingConfig.small(hidden=16, audio_dim=8, condition_heads=2, condition_memory=20, **sizes)
    model, generator = build_model(config).to(dtype).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in (model.generator.modulation.linear, model.generator.final.linear, model.generator.final.modulation.linear):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
    return model


def given(frames, n=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return {name: draw(n, frames, width) for name, width in zip(STREAMS, (4, 4, 8))}, draw(n, frames, 8), draw(n, 8)


def streamed(model, streams, noise, ref, **options):
    run, block = StreamingSession(model, ref, **options), model.config.block_size
    return torch.cat([run.step(**{name: s[:, i : i + block] for name, s in streams.items()}, noise=noise[:, i : i + block]).motion for i in range(0, noise.shape[1], block)], 1)


@pytest.mark.parametrize("mode", ["frame_causal", "block_causal", "block_lookahead", "frame_lookahead", "block_frame_lookahead", "eq5_literal"])
@pytest.mark.parametrize("blocks, layers", [(1, 2), (3, 2), (6, 3)])
def test_stream_is_masked_rollout(mode, blocks, layers):
    model = opened(mask=mode, lookahead=1 if mode == "eq5_literal" else 2, num_layers=layers)
    streams, noise, ref = given(10 * blocks, n=2)
    got = streamed(model, streams, noise, ref, num_steps=2, offset="exact", window_frames=math.inf)
    torch.testing.assert_close(got, masked_rollout(model, ref, streams, noise, num_steps=2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"cfg_mode": "joint"}, {"cfg_audio": 0.0}, {"cfg_user": 0.0}, {"cfg_audio": 0.0, "cfg_user": 0.0}, {"cfg_audio": 1.0, "cfg_user": 1.0, "cfg_mode": "joint"}])
def test_every_guidance(options):
    model = opened()
    streams, noise, ref = given(40)
    got = streamed(model, streams, noise, ref, num_steps=2, **options)
    torch.testing.assert_close(got, masked_rollout(model, ref, streams, noise, num_steps=2, mask=MaskSpec("frame_lookahead", 10, 2, 41), **options), rtol=1e-10, atol=1e-10)


def test_a_long_stream_is_the_windowed_mask():
    model = opened(num_layers=3)
    streams, noise, ref = given(200)
    got = streamed(model, streams, noise, ref, num_steps=1, offset="exact", window_frames=30)
    torch.testing.assert_close(got, masked_rollout(model, ref, streams, noise, num_steps=1, mask=MaskSpec("frame_lookahead", 10, 2, 21)), rtol=1e-9, atol=1e-9)


def test_single_precision():
    model = opened(torch.float32)
    streams, noise, ref = given(60, dtype=torch.float32)
    got = streamed(model, streams, noise, ref, num_steps=2, window_frames=math.inf)
    whole = masked_rollout(model, ref, streams, noise, num_steps=2)
    assert float((got - whole).abs().max() / whole.abs().max()) < 1e-5


def test_conditions_that_see_everything_leak():
    """Under the released condition mask, streaming sees less than training did."""
    model = opened(condition_mask="full", condition_rope=False)
    streams, noise, ref = given(40)
    later = {name: torch.cat((stream[:, :20], stream[:, 20:] + 1), 1) for name, stream in streams.items()}
    first, second = (masked_rollout(model, ref, s, noise, num_steps=1) for s in (streams, later))
    assert not torch.equal(first[:, :20], second[:, :20])
    first, second = (streamed(model, s, noise, ref, num_steps=1) for s in (streams, later))
    assert torch.equal(first[:, :20], second[:, :20])


def test_batches_are_sessions_side_by_side():
    model = opened()
    streams, noise, ref = given(30, n=3)
    both = streamed(model, streams, noise, ref, num_steps=2)
    for clip in range(3):
        one = slice(clip, clip + 1)
        torch.testing.assert_close(both[one], streamed(model, {k: s[one] for k, s in streams.items()}, noise[one], ref[one], num_steps=2))


@pytest.mark.parametrize("options", [{}, {"condition_mask": "full", "condition_rope": False}])
def test_saved_and_restored(options):
    model = opened(torch.float32, **options)
    streams, _, ref = given(60, dtype=torch.float32)
    block = lambda i: {name: s[:, i : i + 10] for name, s in streams.items()}
    run = StreamingSession(model, ref, num_steps=2, seed=1)
    for i in (0, 10, 20):
        run.step(**block(i))
    state = run.state_dict()
    expected = [run.step(**block(i)).motion for i in (30, 40, 50)]
    other = StreamingSession(model, ref, num_steps=2, seed=5)
    other.step(**block(0))
    other.load_state_dict(state)
    assert all(torch.equal(e, other.step(**block(i)).motion) for e, i in zip(expected, (30, 40, 50)))
    assert other.frames_generated == 60


def test_memory_is_constant():
    model = opened(torch.float32)
    run, sizes = StreamingSession(model, torch.zeros(1, 8), num_steps=1), set()
    for block in range(60):
        run.step()
        if block > 5:
            sizes.add(run.nbytes)
    assert len(sizes) == 1


def test_an_error_leaves_the_session_as_it_was():
    model = opened(torch.float32)
    streams, _, ref = given(20, dtype=torch.float32)
    first, second = (StreamingSession(model, ref, num_steps=2) for _ in range(2))
    with pytest.raises(ValueError):
        first.step(streams["avatar_audio"][:, :10] * float("inf"))
    with pytest.raises(ValueError):
        first.step(streams["avatar_audio"][:, :7])
    assert torch.equal(first.step(streams["avatar_audio"][:, :10]).motion, second.step(streams["avatar_audio"][:, :10]).motion)


@pytest.mark.parametrize("part", ["anchor", "decoder"])
def test_an_error_of_anchor_or_decoder_changes_nothing(part):
    model = opened(torch.float32)
    streams, _, ref = given(30, dtype=torch.float32)
    block = lambda i: {name: s[:, i : i + 10] for name, s in streams.items()}

    def breaks(motion):
        if calls.pop():
            raise OSError("no camera")
        return motion

    calls = [False, True, False]
    broken, whole = StreamingSession(model, ref, num_steps=2, **{part: breaks}), StreamingSession(model, ref, num_steps=2)
    assert torch.equal(broken.step(**block(0)).motion, whole.step(**block(0)).motion)
    with pytest.raises(OSError):
        broken.step(**block(10))
    calls[:] = [False, False]
    for start in (10, 20):
        assert torch.equal(broken.step(**block(start)).motion, whole.step(**block(start)).motion)


@pytest.mark.parametrize("options", [{"cfg_user": 0.0}, {"window_frames": 30}, {"offset": 4}, {"num_steps": 3}])
def test_a_state_of_other_settings_is_refused_and_nothing_changes(options):
    model = opened(torch.float32)
    streams, _, ref = given(10, dtype=torch.float32)
    other, run = StreamingSession(model, ref, **{"num_steps": 2, **options}), StreamingSession(model, ref, num_steps=2)
    for session in (other, run):
        session.step(**streams)
    expected = StreamingSession(model, ref, num_steps=2)
    expected.step(**streams)
    with pytest.raises(ValueError, match="state: expected"):
        run.load_state_dict(other.state_dict())
    assert torch.equal(run.step(**streams).motion, expected.step(**streams).motion)
    with pytest.raises(ValueError, match="portraits"):
        run.load_state_dict(StreamingSession(model, ref + 1, num_steps=2).state_dict())


def test_known_motion_is_taken_over():
    model = opened()
    streams, noise, ref = given(30)
    run = StreamingSession(model, ref, num_steps=2)
    made = [run.step(**{k: s[:, i : i + 10] for k, s in streams.items()}, noise=noise[:, i : i + 10]).motion for i in (0, 10, 20)]
    again = StreamingSession(model, ref, num_steps=2)
    for i in (0, 1):
        assert torch.equal(again.step(**{k: s[:, 10 * i : 10 * i + 10] for k, s in streams.items()}, motion=made[i]).motion, made[i])
    torch.testing.assert_close(again.step(**{k: s[:, 20:] for k, s in streams.items()}, noise=noise[:, 20:]).motion, made[2])
    with pytest.raises(ValueError, match="motion: expected finite"):
        again.step(motion=torch.zeros(1, 9, 8))


def test_the_window_mask_streams_and_full_conditions_take_any_offset():
    model = opened(condition_mask="window", num_layers=2)
    streams, noise, ref = given(60)
    got = streamed(model, streams, noise, ref, num_steps=2, window_frames=math.inf)
    torch.testing.assert_close(got, masked_rollout(model, ref, streams, noise, num_steps=2), rtol=1e-10, atol=1e-10)
    model = opened(torch.float32, condition_mask="full", condition_rope=False, num_layers=8)
    streams, noise, ref = given(50, dtype=torch.float32)
    assert streamed(model, streams, noise, ref, num_steps=1, offset="exact").shape == (1, 50, 8)


def test_motion_can_be_trained_on():
    model = opened(torch.float32)
    out = StreamingSession(model, torch.zeros(1, 8), num_steps=1).step().motion
    (torch.ones(1, requires_grad=True) * out).sum().backward()


def test_a_shorter_user_holds_the_last_frame():
    model = opened(torch.float32)
    streams, _, ref = given(30, dtype=torch.float32)
    with pytest.warns(UserWarning, match="user_motion: 17 of 30 frames"):
        got = generate(model, ref, streams["avatar_audio"], streams["user_audio"], streams["user_motion"][:, :17], num_steps=1)
    held = streams["user_motion"][:, torch.arange(30).clamp(max=16)]
    assert torch.equal(got, generate(model, ref, streams["avatar_audio"], streams["user_audio"], held, num_steps=1))


def test_clips_of_any_length():
    model = opened(torch.float32)
    streams, _, ref = given(37, dtype=torch.float32)
    assert generate(model, ref, **streams, num_steps=1).shape == (1, 37, 8)
    assert generate(model, ref, frames=0).shape == (1, 0, 8)
    assert generate(model, ref, **streams, num_steps=1, prime="window").shape == (1, 37, 8)
    whole = generate(model, ref, **streams, num_steps=1)
    assert torch.equal(whole[:, :30], generate(model, ref, **{k: s[:, :30] for k, s in streams.items()}, num_steps=1))


def test_the_released_ring_forgets_more():
    model = opened(torch.float32)
    kept = {ring: StreamingSession(model, torch.zeros(1, 8), ring=ring).capacity for ring in ("rule", "released")}
    assert kept == {"rule": 50, "released": 38}


def test_an_anchor_and_a_decoder_are_called():
    model = opened(torch.float32)
    run = StreamingSession(model, torch.zeros(1, 8), num_steps=1, anchor=lambda motion: motion * 0 + 3, decoder=lambda motion: motion.sum((1, 2)))
    out = run.step()
    assert torch.equal(out.motion, torch.full((1, 10, 8), 3.0)) and float(out.frames) == 240 and out.start == 0
    assert {"conditions", "sampling", "commit", "decoding", "total"} <= set(out.timings)


@pytest.mark.parametrize(
    "attempt, error, words",
    [
        (lambda m: StreamingSession(m, torch.zeros(1, 7)), ValueError, "ref_motion"),
        (lambda m: StreamingSession(m, torch.full((1, 8), math.nan)), ValueError, "ref_motion"),
        (lambda m: StreamingSession(m, torch.zeros(1, 8), num_steps=0), ValueError, "num_steps"),
        (lambda m: StreamingSession(m, torch.zeros(1, 8), offset="exactly"), ValueError, "offset"),
        (lambda m: StreamingSession(m, torch.zeros(1, 8), offset=41), ValueError, "offset"),
        (lambda m: StreamingSession(m, torch.zeros(1, 8), prime="full"), ValueError, "prime"),
        (lambda m: StreamingSession(m, torch.zeros(1, 8), window_frames=9), ValueError, "window_frames"),
        (lambda m: StreamingSession(m, torch.zeros(1, 8), cfg_mode="both"), ValueError, "cfg_mode"),
        (lambda m: StreamingSession(m, torch.zeros(1, 8)).step(torch.zeros(1, 9, 4)), ValueError, "avatar_audio: expected 1 clips of 10 frames"),
        (lambda m: StreamingSession(m, torch.zeros(1, 8)).step(torch.zeros(2, 10, 4)), ValueError, "avatar_audio"),
        (lambda m: StreamingSession(m, torch.zeros(1, 8)).step(user_motion=torch.zeros(1, 10, 9)), ValueError, "user_motion"),
        (lambda m: StreamingSession(m, torch.zeros(1, 8)).step(noise=torch.zeros(1, 9, 8)), ValueError, "noise"),
        (lambda m: generate(m, torch.zeros(1, 8)), ValueError, "at least one"),
        (lambda m: generate(m, torch.zeros(1, 8), torch.zeros(1, 10, 4, dtype=torch.int64)), TypeError, "floating"),
        (lambda m: _closed(m).reset(), RuntimeError, "close"),
        (lambda m: _closed(m).step(), RuntimeError, "close"),
        (lambda m: StreamingSession(m, torch.zeros(2, 8)).load_state_dict(StreamingSession(m, torch.zeros(1, 8)).state_dict()), ValueError, "2 avatars"),
    ],
)
def test_what_does_not_fit_is_refused(attempt, error, words):
    with pytest.raises(error, match=words):
        attempt(opened(torch.float32))


def _closed(model):
    run = StreamingSession(model, torch.zeros(1, 8))
    run.close()
    return run
