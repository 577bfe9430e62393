"""Preference tuning: the loss at known points, its gradient, losers and their cache, the trainer and its controls."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.avatar_forcing import preference as P
from papers10.avatar_forcing.data import DyadicConversation
from papers10.avatar_forcing.model import STREAMS, AvatarForcingConfig, build_model
from papers10.avatar_forcing.training import MotionTrainer
from papers10.core.checkpoint import CheckpointMismatch
from papers10.core.random import generator

SMALL = dict(hidden=16, audio_dim=8, num_layers=1, window_frames=20)


def full(*values):
    return [torch.tensor([[value]], dtype=torch.float64) for value in values]


def awake(model, scale=0.05):
    """A model whose velocity is not 0, as a fresh one's is."""
    draw = generator(0, "test", "awake")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
    return model.eval()


@pytest.fixture(scope="module")
def small():
    model = awake(build_model(AvatarForcingConfig.small(**SMALL)))
    tensors = P.cut_clips(DyadicConversation(4, 45, seed=3).tensors(), 20)
    return model, tensors, P.cache_losers(tensors, P.LoserSampler(model, num_steps=2))


@pytest.mark.parametrize("change_w, change_l, expected", [(0, 0, math.log(2)), (-1e-3, 1e-3, 0.126928), (1e-3, -1e-3, 2.126928), (0.5, 0.5, math.log(2))])
def test_known_values(change_w, change_l, expected):
    for per in P.PER:
        loss, info = P.flow_dpo_loss(*full(0.3 + change_w, 0.7 + change_l, 0.3, 0.7), per=per, block_size=1)
        assert float(loss) == pytest.approx(expected, abs=1e-6)
        assert float(info["margin"]) == pytest.approx(-1000 * (change_w - change_l), abs=1e-9)
    assert float(info["implicit_accuracy"]) == float(change_w < change_l and change_w < 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_on_the_wrong_side_stays_finite(dtype):
    err = torch.tensor([[100.0]], dtype=dtype, requires_grad=True)
    zero = torch.zeros(1, 1, dtype=dtype)
    loss, info = P.flow_dpo_loss(err, zero, zero, zero)
    loss.backward()
    assert float(info["logits"]) == -1e5 and loss.item() == pytest.approx(1e5) and float(err.grad) == pytest.approx(1000)
    right = torch.tensor([[-100.0]], dtype=dtype, requires_grad=True)
    loss, info = P.flow_dpo_loss(right, zero, zero, zero)
    loss.backward()
    assert loss.item() == 0 and float(right.grad) == 0 and float(info["implicit_accuracy"]) == 1


@pytest.mark.parametrize("beta", [1.0, 1000.0])
def test_gradient_at_the_reference_is_half_of_beta(beta):
    errors = [value.requires_grad_(True) for value in full(0.3, 0.7, 0.3, 0.7)]
    loss, _ = P.flow_dpo_loss(*errors, dpo_beta=beta)
    loss.backward()
    assert [float(error.grad) for error in errors[:2]] == [beta / 2, -beta / 2]
    assert errors[2].grad is None and errors[3].grad is None


@pytest.mark.parametrize("per", P.PER)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(per, reduction):
    draw = generator(0, "test", "gradcheck")
    values = [torch.rand(2, 6, dtype=torch.float64, generator=draw) for _ in range(4)]
    live = [value.requires_grad_(True) for value in values[:2]]
    assert torch.autograd.gradcheck(lambda w, l: P.flow_dpo_loss(w, l, *values[2:], dpo_beta=3.0, per=per, block_size=3, reduction=reduction)[0], live)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 3), blocks=st.integers(1, 3), size=st.integers(1, 4), beta=st.floats(0.1, 2000))
def test_shapes_symmetry_and_bounds(n, blocks, size, beta):
    draw = generator(n, "test", "shapes")
    w, l, rw, rl = (torch.rand(n, blocks * size, dtype=torch.float64, generator=draw) for _ in range(4))
    for per, shape in (("frame", (n, blocks * size)), ("block", (n, blocks)), ("sequence", (n,))):
        options = dict(dpo_beta=beta, per=per, block_size=size)
        loss, info = P.flow_dpo_loss(w, l, rw, rl, reduction="none", **options)
        swapped, other = P.flow_dpo_loss(l, w, rl, rw, reduction="none", **options)
        assert loss.shape == shape == info["logits"].shape and bool((loss >= 0).all()) and not info["logits"].requires_grad
        assert torch.allclose(info["logits"], -other["logits"]) and torch.allclose(loss - swapped, -info["logits"], atol=1e-9)
        assert float(P.flow_dpo_loss(w, l, rw, rl, **options)[0]) == pytest.approx(float(loss.mean()))
        assert float(P.flow_dpo_loss(w, l, rw, rl, reduction="sum", **options)[0]) == pytest.approx(float(loss.sum()))


def test_matches_the_published_form_of_diffusion_dpo():
    """−½ β' on squared errors there, −β on whatever error is given here: β = β' / 2."""
    draw = generator(0, "test", "peer")
    w, l, rw, rl = (torch.rand(5, 1, dtype=torch.float64, generator=draw) for _ in range(4))
    inside = -0.5 * 20.0 * ((w - l) - (rw - rl))
    assert float(P.flow_dpo_loss(w, l, rw, rl, dpo_beta=10.0)[0]) == pytest.approx(float(-torch.nn.functional.logsigmoid(inside).mean()))


def test_cut_clips():
    tensors = {"a": torch.arange(24.0).reshape(2, 12, 1), "b": torch.zeros(2, 13, 3)}
    cut = P.cut_clips(tensors, 5)
    assert cut["a"].shape == (4, 5, 1) and cut["b"].shape == (4, 5, 3)
    assert cut["a"][:, 0, 0].tolist() == [0, 5, 12, 17]


def test_losers_follow_the_voice_and_know_nothing_of_the_user(small):
    model, tensors, losers = small
    assert losers.shape == tensors["avatar_motion"].shape and bool(losers.isfinite().all()) and not losers.is_inference()
    changed = {**tensors, "user_motion": tensors["user_motion"] + 3, "user_audio": tensors["user_audio"] * 0}
    assert torch.equal(P.cache_losers(changed, P.LoserSampler(model, num_steps=2)), losers)
    spoken = {**tensors, "avatar_audio": tensors["avatar_audio"].flip(0)}
    assert not torch.allclose(P.cache_losers(spoken, P.LoserSampler(model, num_steps=2)), losers)
    assert not torch.allclose(P.cache_losers(tensors, P.LoserSampler(model, num_steps=2, seed=1)), losers)


def test_cache_of_losers(small, tmp_path):
    model, tensors, losers = small
    path = tmp_path / "made" / "losers.safetensors"
    sampler = P.LoserSampler(model, num_steps=2)
    assert torch.equal(P.cache_losers(tensors, sampler, path), losers) and path.is_file()
    assert not list(path.parent.glob(".*")), "nothing unfinished is left"
    sampler.source = None  # what is read from the file needs no network
    sampler.fingerprint = P.LoserSampler(model, num_steps=2).fingerprint
    assert torch.equal(P.cache_losers(tensors, sampler, path), losers)
    other = P.LoserSampler(model, num_steps=3)
    with pytest.raises(ValueError, match="path: expected losers of this model"):
        P.cache_losers(tensors, other, path)
    with pytest.raises(ValueError, match="path"):
        P.cache_losers({**tensors, "avatar_audio": tensors["avatar_audio"] + 1}, P.LoserSampler(model, num_steps=2), path)
    with pytest.raises(ValueError, match="path"):
        P.cache_losers(tensors, P.LoserSampler(awake(copy.deepcopy(model)), num_steps=2), path)
    assert not torch.equal(P.cache_losers(tensors, other, path, overwrite=True), losers)
    assert not torch.equal(P.cache_losers(tensors, other, path), losers)


def test_talking_models(small):
    model, tensors, losers = small
    talker = awake(build_model(AvatarForcingConfig.small(**SMALL, use_user_motion=False), 1))
    by_model = P.LoserSampler(model, "talking_model", talker, num_steps=2)
    made = P.cache_losers(tensors, by_model)
    assert made.shape == losers.shape and not torch.allclose(made, losers)

    def still(ref, avatar_audio, seed):
        return ref[:, None].expand(-1, avatar_audio.shape[1], -1)

    class Window:
        model = talker

        def generate(self, ref, avatar_audio, seed=0):
            return still(ref, avatar_audio, seed) + 1

    assert torch.equal(P.cache_losers(tensors, P.LoserSampler(model, "talking_model", still)), still(tensors["avatar_motion"][:, 0], tensors["avatar_audio"], 0))
    assert torch.equal(P.cache_losers(tensors, P.LoserSampler(model, "talking_model", Window()))[:, 0], tensors["avatar_motion"][:, 0] + 1)
    with pytest.raises(ValueError, match="losers"):
        P.cache_losers(tensors, P.LoserSampler(model, "talking_model", lambda ref, audio, seed: ref))


def test_talking_batches_train_a_talking_model(small):
    _, tensors, _ = small
    batches = P.talking_batches(tensors, 2, 20)
    assert set(next(batches)) == {"motion", "avatar_audio", "ref"}
    model = build_model(AvatarForcingConfig.small(**SMALL))
    history = MotionTrainer(model, batches, steps=2, warmup=1).train()
    assert math.isfinite(history.last("loss"))


def test_inputs_and_reference_stay_as_they_are(small):
    model, tensors, losers = small
    model, kept, kept_losers = copy.deepcopy(model), {name: value.clone() for name, value in tensors.items()}, losers.clone()
    trainer = P.DPOTrainer(model, tensors, losers, steps=3, batch_size=2, log_every=1)
    before = copy.deepcopy(model.state_dict())
    history = trainer.train()
    assert all(torch.equal(kept[name], tensors[name]) for name in kept) and torch.equal(losers, kept_losers)
    assert all(torch.equal(before[name], value) for name, value in trainer.reference.state_dict().items())
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training and not any(p.requires_grad for p in trainer.reference.parameters())
    first = history.records[0]
    assert first["dpo_loss"] == pytest.approx(math.log(2), abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] == pytest.approx(first["df_loss"] + 0.1 * first["dpo_loss"], abs=1e-5)
    assert {"margin", "implicit_accuracy", "saturated", "grad_norm"} <= set(history.records[-1])


def test_pairs_share_levels_noise_and_every_condition(small, monkeypatch):
    model, tensors, losers = small
    seen = []
    real = P.velocity_error

    def spy(model, motion, streams, ref, times, noise, **options):
        seen.append((motion, streams, ref, times, noise, options))
        return real(model, motion, streams, ref, times, noise, **options)

    monkeypatch.setattr(P, "velocity_error", spy)
    P.DPOTrainer(copy.deepcopy(model), tensors, losers, steps=1, batch_size=3).train()
    assert len(seen) == 2, "the frozen copy and the model, winners and losers in one batch each"
    for motion, streams, ref, times, noise, options in seen:
        assert motion.shape[0] == 6 and not torch.equal(motion[:3], motion[3:])
        for both in (ref, times, noise, *streams.values()):
            assert torch.equal(both[:3], both[3:])
        assert set(streams) == set(STREAMS) and all(stream is not None for stream in streams.values())
        assert options.get("keep") is None, "no condition is dropped"
        for winner, portrait in zip(motion[:3], ref):
            assert torch.equal(winner[0], portrait)
    for name in (0, 2, 3, 4):
        assert torch.equal(seen[0][name], seen[1][name])


def test_preferences_are_learned_on_their_own_pairs(small):
    model, tensors, losers = small
    trainer = P.DPOTrainer(copy.deepcopy(model), tensors, losers, steps=30, batch_size=8, lr=2e-3, dpo_lambda=1.0, dpo_beta=50.0)
    history = trainer.train()
    assert history.tail("margin") > 0 and history.tail("dpo_loss") < math.log(2) and history.tail("implicit_accuracy") > 0.6


def test_control_equals_plain_training_and_shares_its_draws(small):
    model, tensors, losers = small

    def tune(kind, **options):
        own = copy.deepcopy(model)
        return own.state_dict(), kind(own, tensors, losers, steps=2, batch_size=2, log_every=1, **options).train()

    control, history = tune(P.FineTuner)
    watched, with_numbers = tune(P.FineTuner, monitor=True)
    zero, _ = tune(P.DPOTrainer, dpo_lambda=0.0)
    _, tuned = tune(P.DPOTrainer)
    assert all(torch.equal(control[name], watched[name]) and torch.equal(control[name], zero[name]) for name in control)
    assert "margin" not in history.records[-1] and "margin" in with_numbers.records[-1]
    assert tuned.records[0]["df_loss"] == pytest.approx(history.records[0]["df_loss"], abs=1e-6), "the same windows, levels and noise"


def test_matched_work():
    assert P.matched_steps(60) == 220 and P.matched_steps(10, 3.0) == 30 and P.matched_steps(0) == 0


def test_compute_matched_control_runs_longer(small):
    model, tensors, _ = small
    history = P.FineTuner(copy.deepcopy(model), tensors, steps=2, compute_matched=True, batch_size=2).train()
    assert history.records[-1]["step"] == 7


def test_resume_is_exact_and_refuses_another_base(small, tmp_path):
    model, tensors, losers = small
    options = dict(batch_size=2, save_every=2, evaluate=lambda model: {"weights": sum(float(p.sum()) for p in model.parameters())})
    whole = copy.deepcopy(model)
    P.DPOTrainer(whole, tensors, losers, steps=4, folder=tmp_path / "whole", **options).train()

    class Stop(Exception):
        pass

    def stop(model):
        raise Stop

    broken = copy.deepcopy(model)
    with pytest.raises(Stop):
        P.DPOTrainer(broken, tensors, losers, steps=4, folder=tmp_path / "broken", **{**options, "evaluate": stop, "eval_every": 3}).train()
    again = copy.deepcopy(model)
    with pytest.raises(CheckpointMismatch):
        P.DPOTrainer(awake(copy.deepcopy(model)), tensors, losers, steps=4, folder=tmp_path / "broken", **options, eval_every=3).train()
    with pytest.raises(CheckpointMismatch):
        P.DPOTrainer(copy.deepcopy(model), tensors, losers + 1, steps=4, folder=tmp_path / "broken", **options, eval_every=3).train()
    history = P.DPOTrainer(again, tensors, losers, steps=4, folder=tmp_path / "broken", **options, eval_every=3).train()
    assert history.resumed_from == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_windows_inside_clips_warn(small):
    model, _, _ = small
    tensors = DyadicConversation(2, 40, seed=3).tensors()
    with pytest.warns(UserWarning, match="portrait fits the winner only"):
        P.DPOTrainer(copy.deepcopy(model), tensors, tensors["avatar_motion"] * 0.5, steps=1, batch_size=2).train()


TENSORS = {name: torch.zeros(2, 20, width) for name, width in (("avatar_motion", 8), ("avatar_audio", 4), ("user_audio", 4), ("user_motion", 8))}
ONE, TWO = torch.zeros(1, 4), torch.zeros(2, 4)
NAN = torch.full((1, 4), math.nan)


@pytest.mark.parametrize(
    "call, kind, word",
    [
        (lambda m: P.flow_dpo_loss(ONE, TWO, ONE, ONE), ValueError, "err_l"),
        (lambda m: P.flow_dpo_loss(ONE, ONE, ONE, NAN), ValueError, "ref_err_l"),
        (lambda m: P.flow_dpo_loss(ONE.long(), ONE, ONE, ONE), TypeError, "err_w"),
        (lambda m: P.flow_dpo_loss(ONE[0], ONE, ONE, ONE), ValueError, "err_w"),
        (lambda m: P.flow_dpo_loss(*[ONE[:0]] * 4), ValueError, "err_w"),
        (lambda m: P.flow_dpo_loss(*[ONE] * 4, dpo_beta=0), ValueError, "dpo_beta"),
        (lambda m: P.flow_dpo_loss(*[ONE] * 4, per="clip"), ValueError, "per"),
        (lambda m: P.flow_dpo_loss(*[ONE] * 4, per="block"), ValueError, "block_size"),
        (lambda m: P.flow_dpo_loss(*[ONE] * 4, per="block", block_size=3), ValueError, "block_size"),
        (lambda m: P.flow_dpo_loss(*[ONE] * 4, reduction="max"), ValueError, "reduction"),
        (lambda m: P.cut_clips(TENSORS, 21), ValueError, "frames"),
        (lambda m: P.cut_clips(TENSORS, 0), ValueError, "frames"),
        (lambda m: P.LoserSampler(m, "other"), ValueError, "mode"),
        (lambda m: P.LoserSampler(m, "talking_model"), ValueError, "talking_model"),
        (lambda m: P.LoserSampler(m, talking_model=m), ValueError, "talking_model"),
        (lambda m: P.LoserSampler(m, "talking_model", 3), TypeError, "talking_model"),
        (lambda m: P.LoserSampler(m, num_steps=0), ValueError, "num_steps"),
        (lambda m: P.cache_losers({**TENSORS, "avatar_audio": torch.zeros(2, 3, 4)}, P.LoserSampler(m)), ValueError, "avatar_audio"),
        (lambda m: P.DPOTrainer(m, TENSORS, None, steps=1), ValueError, "losers"),
        (lambda m: P.DPOTrainer(m, TENSORS, torch.zeros(2, 19, 8), steps=1), ValueError, "losers"),
        (lambda m: P.DPOTrainer(m, TENSORS, torch.full((2, 20, 8), math.nan), steps=1), ValueError, "losers"),
        (lambda m: P.DPOTrainer(m, {**TENSORS, "avatar_motion": torch.zeros(2, 20, 7)}, torch.zeros(2, 20, 7), steps=1), ValueError, "avatar_motion"),
        (lambda m: P.DPOTrainer(m, {k: v[:, :10] for k, v in TENSORS.items()}, torch.zeros(2, 10, 8), steps=1), ValueError, "tensors"),
        (lambda m: P.DPOTrainer(m, {"avatar_motion": TENSORS["avatar_motion"]}, torch.zeros(2, 20, 8), steps=1), ValueError, "tensors"),
        (lambda m: P.DPOTrainer(m, TENSORS, TENSORS["avatar_motion"], steps=1, dpo_beta=-1), ValueError, "dpo_beta"),
        (lambda m: P.DPOTrainer(m, TENSORS, TENSORS["avatar_motion"], steps=1, dpo_lambda=-1), ValueError, "dpo_lambda"),
        (lambda m: P.DPOTrainer(m, TENSORS, TENSORS["avatar_motion"], steps=1, lr=0), ValueError, "lr"),
        (lambda m: P.DPOTrainer(m, TENSORS, TENSORS["avatar_motion"], steps=1, per="x"), ValueError, "per"),
        (lambda m: P.FineTuner(m, TENSORS, steps=1, dpo_lambda=0.1), ValueError, "dpo_lambda"),
        (lambda m: P.matched_steps(-1), ValueError, "steps"),
    ],
)
def test_bad_input(small, call, kind, word):
    with warnings.catch_warnings(), pytest.raises(kind, match=word):
        warnings.simplefilter("ignore")
        call(small[0])
