"""Sessions that do not end: the pose anchor, positions, memory, state."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.avatar_forcing.anchor import PoseAnchor, slow_distance
from papers10.avatar_forcing.model import AvatarForcingConfig, build_model
from papers10.avatar_forcing.streaming import StreamingSession
from papers10.core.random import generator
from papers10.flow.cache import RollingKV
from papers10.lm.rope import rotary

SMALL = AvatarForcingConfig(hidden=16, audio_dim=16, num_layers=1, window_frames=20, condition_memory=20)


def awake(seed=0):
    model, draw = build_model(SMALL, seed).eval(), generator(seed, "awake")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_no_change_inside_the_dead_band(n, frames, width, seed):
    home = torch.randn(n, width, generator=generator(seed, "home"))
    anchor = PoseAnchor(home, scale=10.0)
    motion = home[:, None] + 0.1 * torch.randn(n, frames, width, generator=generator(seed, "motion"))
    kept = motion.clone()
    assert torch.equal(anchor(motion), motion) and torch.equal(motion, kept)


def test_known_correction():
    anchor = PoseAnchor(torch.tensor([[0.6, 0.8]]), gain=0.5, deadband=0.25, ema=1.0, max_step=10.0)
    moved = anchor(torch.tensor((3.0, 4.0)).expand(1, 4, 2))
    # away (2.4, 3.2), length 4, excess 3.75, half of it along (0.6, 0.8), ramped over four frames
    wanted = torch.tensor((3.0, 4.0)) - torch.arange(1, 5)[:, None] / 4 * 1.875 * torch.tensor((0.6, 0.8))
    assert torch.allclose(moved[0], wanted, atol=1e-6)
    assert float(anchor.distance) == pytest.approx(4.0, abs=1e-6)


def test_the_step_is_limited():
    anchor = PoseAnchor(torch.tensor([[1.0, 0.0]]), ema=1.0)
    moved = anchor(torch.full((1, 5, 2), 100.0))
    assert float((moved - 100.0)[0, -1].norm()) == pytest.approx(0.05, rel=1e-3)


def test_the_slow_component_follows_with_ema():
    anchor = PoseAnchor(torch.zeros(1, 1), ema=0.08, deadband=100.0, scale=1.0)
    for _ in range(10):
        anchor(torch.ones(1, 3, 1))
    assert float(anchor.mean) == pytest.approx(1 - 0.92**10, rel=1e-5)
    anchor.reset()
    assert float(anchor.mean) == 0


def test_avatars_of_a_batch_do_not_know_each_other():
    home, draw = torch.zeros(2, 3), generator(0, "two")
    both, first = PoseAnchor(home, scale=1.0), PoseAnchor(home[:1], scale=1.0)
    for _ in range(40):
        block = torch.randn(2, 10, 3, generator=draw) * 0.1 + torch.tensor((2.0, 0.0))[:, None, None]
        moved = both(block)
        assert torch.equal(moved[:1], first(block[:1])) and torch.equal(moved[1], block[1])
    assert not torch.equal(moved[0], block[0])


def test_a_pushed_pose_is_held():
    def walk(anchor):
        pose = torch.zeros(1, 2)
        for _ in range(400):
            block = (pose + torch.tensor((0.02, 0.0)))[:, None].repeat(1, 10, 1)
            pose = (block if anchor is None else anchor(block))[:, -1]
        return float(pose.norm())

    assert walk(None) == pytest.approx(8.0, rel=1e-3)
    # at rest the correction gain · excess equals the push
    assert walk(PoseAnchor(torch.zeros(1, 2), scale=1.0)) == pytest.approx(0.25 + 0.02 / 0.25, abs=0.05)


def test_roots_of_the_loop():
    gain, ema = 0.25, 0.08
    roots = torch.linalg.eigvals(torch.tensor(((1.0, -gain), (ema, 1 - ema)), dtype=torch.float64))
    assert float(roots.abs().max()) == pytest.approx(math.sqrt(1 - ema * (1 - gain))) and 2 * math.pi / float(roots.angle().abs().max()) == pytest.approx(44.6, abs=0.5)
    calm = torch.linalg.eigvals(torch.tensor(((1.0, -0.02 + 1e-9), (ema, 1 - ema)), dtype=torch.float64))
    assert float(calm.imag.abs().max()) < 1e-4


def test_a_hundred_thousand_frames_of_positions():
    ring, rows, draw = 20, 100, generator(0, "keys")
    cache, pool = RollingKV(1, ring, rope="rebase"), torch.randn(7, 3, 1, 1, rows, 16, generator=draw)
    for step in range(1000):
        q, k, v = pool[step % 7]
        cache.put(0, k, v)
        if step < 999:
            cache.commit(rows)
            before = (k, v)
    found = cache.attend(0, q[:, :, -1:])
    k, v = (torch.cat((old[:, :, -ring:], new), 2).double() for old, new in zip(before, (k, v)))
    places = torch.arange(99_900 - ring, 100_000)
    turn = lambda x, at: rotary(x, at, base=1e4, layout="interleaved")
    exact = (turn(q[:, :, -1:].double(), places[-1:]) @ turn(k, places).mT / 4).softmax(-1) @ v
    assert float((found - exact).abs().max()) < 1e-5


def run(session, streams, noise, start, blocks, offset=0):
    made = []
    for at in range(start, start + 10 * blocks, 10):
        made.append(session.step(*(stream[:, at - offset : at - offset + 10] for stream in streams), noise=noise[:, at - offset : at - offset + 10]))
    return made


@pytest.fixture(scope="module")
def talk():
    draw = generator(0, "talk")
    return (torch.rand(2, 400, 4, generator=draw), torch.rand(2, 400, 4, generator=draw), torch.randn(2, 400, 8, generator=draw)), torch.randn(2, 400, 8, generator=draw)


def test_home_and_dead_band_from_motion():
    motion = 3.0 + torch.randn(8, 600, 4, generator=generator(0, "recorded"))
    anchor = PoseAnchor.from_motion(motion, 2, quantile=0.9)
    assert anchor.home.shape == (2, 4) and torch.allclose(anchor.home[0], motion.mean((0, 1)))
    inside = slow_distance(motion, anchor.home[:1].expand(8, -1))[:, 30:] <= 0.25 * float(anchor.unit[0])
    assert float(inside.float().mean()) == pytest.approx(0.9, abs=0.02)


def test_slow_distance_of_a_step():
    motion = torch.ones(1, 35, 1)
    assert torch.allclose(slow_distance(motion, torch.zeros(1, 1)), 1 - 0.92 ** torch.arange(1, 4)[None], atol=1e-6)


def session(ref=1.0):
    home = torch.full((2, 8), ref)
    return StreamingSession(awake(), home, anchor=PoseAnchor(home, deadband=0.05), num_steps=2)


def test_saved_and_restored_mid_stream(talk, tmp_path):
    streams, noise = talk
    first = session()
    run(first, streams, noise, 0, 7)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    goes_on = run(first, streams, noise, 70, 5)
    second = session()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    again = run(second, streams, noise, 70, 5)
    assert all(torch.equal(a.motion, b.motion) and a.start == b.start for a, b in zip(goes_on, again))
    assert torch.equal(first.anchor.mean, second.anchor.mean) and not torch.equal(first.anchor.mean, first.anchor.home)


def test_memory_is_constant_and_nothing_knows_absolute_time(talk):
    streams, noise = talk
    stream = session()
    run(stream, streams, noise, 0, 6)
    before = stream.nbytes
    run(stream, streams, noise, 60, 34)
    assert stream.nbytes == before
    state = stream.state_dict()
    # a multiple of every ring, so that rows stay in their slots
    shift = math.lcm(*(ring["keys.0"].shape[2] for ring in (*state["past"], state["conditions"])), 10) * 1000
    state["frames_generated"] += shift
    for ring in (*state["past"], state["conditions"]):
        ring["length"], ring["origin"] = ring["length"] + shift, ring["origin"] + shift
    older = session()
    older.load_state_dict(state)
    a, b = run(stream, streams, noise, 0, 3), run(older, streams, noise, 0, 3)
    assert all(torch.equal(x.motion, y.motion) and y.start == x.start + shift for x, y in zip(a, b))


def test_an_anchor_at_rest_changes_no_session(talk):
    streams, noise = talk
    home = torch.ones(2, 8)
    with_anchor = StreamingSession(awake(), home, anchor=PoseAnchor(home, deadband=1e6), num_steps=2)
    without = StreamingSession(awake(), home, num_steps=2)
    assert all(torch.equal(a.motion, b.motion) for a, b in zip(run(with_anchor, streams, noise, 0, 5), run(without, streams, noise, 0, 5)))


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: PoseAnchor(torch.zeros(1, 2)), ValueError, "scale"),
        (lambda: PoseAnchor(torch.ones(2)), ValueError, "ref_motion"),
        (lambda: PoseAnchor(torch.ones(0, 2)), ValueError, "ref_motion"),
        (lambda: PoseAnchor(torch.ones(1, 2, dtype=torch.long)), TypeError, "ref_motion"),
        (lambda: PoseAnchor([[1.0]]), TypeError, "ref_motion"),
        (lambda: PoseAnchor(torch.tensor([[float("nan")]])), ValueError, "ref_motion"),
        (lambda: PoseAnchor(torch.ones(1, 2), gain=1.0), ValueError, "gain"),
        (lambda: PoseAnchor(torch.ones(1, 2), gain=-0.1), ValueError, "gain"),
        (lambda: PoseAnchor(torch.ones(1, 2), deadband=-1), ValueError, "deadband"),
        (lambda: PoseAnchor(torch.ones(1, 2), ema=0.0), ValueError, "ema"),
        (lambda: PoseAnchor(torch.ones(1, 2), max_step=-1), ValueError, "max_step"),
        (lambda: PoseAnchor(torch.ones(1, 2), scale=0.0), ValueError, "scale"),
        (lambda: PoseAnchor.from_motion(torch.ones(1, 20, 2), 1, quantile=1.0), ValueError, "quantile"),
        (lambda: PoseAnchor.from_motion(torch.ones(1, 20, 2), 0), ValueError, "n:"),
        (lambda: slow_distance(torch.ones(1, 5, 2), torch.ones(1, 2)), ValueError, "motion"),
        (lambda: PoseAnchor(torch.ones(1, 2))(torch.ones(1, 10, 3)), ValueError, "motion"),
        (lambda: PoseAnchor(torch.ones(1, 2))(torch.ones(2, 10, 2)), ValueError, "motion"),
        (lambda: PoseAnchor(torch.ones(1, 2))(torch.ones(1, 0, 2)), ValueError, "motion"),
        (lambda: PoseAnchor(torch.ones(1, 2))(torch.full((1, 3, 2), float("inf"))), ValueError, "motion"),
        (lambda: PoseAnchor(torch.ones(1, 2)).load_state_dict({"mean": torch.ones(2, 2)}), ValueError, "state"),
    ],
)
def test_bad_input(call, error, word):
    with pytest.raises(error, match=word):
        call()
