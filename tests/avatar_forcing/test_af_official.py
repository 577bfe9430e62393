"""Released models: layout of the auto-encoder, names, strict loading, clock and sign, against an independent reading of the released networks."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from papers10.avatar_forcing import official
from papers10.avatar_forcing.model import AvatarForcingConfig, AvatarForcingModel
from papers10.avatar_forcing.streaming import StreamingSession
from papers10.core.data import source

SMALL = dict(motion_dim=16, audio_features=24, audio_dim=16, hidden=32, num_heads=4, num_layers=3)


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shaken(module, scale=0.2):
    """Every parameter moved, so that none is zero or one."""
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            parameter.add_(draw(*parameter.shape, seed=place, scale=scale, dtype=parameter.dtype))
    return module.eval()


@pytest.fixture(scope="module")
def model():
    return shaken(AvatarForcingModel(AvatarForcingConfig.paper(**SMALL))).double()


@pytest.fixture(scope="module")
def autoencoder():
    return shaken(official.OfficialMotionAutoencoder(32, dim=12, num_directions=4, width=16)).double()


# The released transformer once more: plain torch, released names, released time and sign, nothing of this package.


class Oracle:
    def __init__(self, tensors, heads, condition_heads=4, lookahead=2, kept=38):
        self.w = {name.removeprefix("flow_transformer."): value for name, value in tensors.items()}
        self.heads, self.condition_heads, self.lookahead, self.kept = heads, condition_heads, lookahead, kept
        self.depth = len({name.split(".")[1] for name in self.w if name.startswith("blocks.")})

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, x, name=None, eps=1e-6):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt()
        return x if name is None else x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def silu(self, x):
        return x / (1 + (-x).exp())

    def split(self, x, heads):
        n, rows, width = x.shape
        return x.reshape(n, rows, heads, width // heads).transpose(1, 2)

    def attend(self, q, k, v, allowed=None):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        out = scores.softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)

    def multihead(self, name, query, other):
        weight, bias = self.w[f"{name}.in_proj_weight"].chunk(3), self.w[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (self.split(x @ w.T + b, self.condition_heads) for x, w, b in zip((query, other, other), weight, bias))
        return self.linear(f"{name}.out_proj", self.attend(q, k, v))

    def project_audio(self, features):
        x = features @ self.w["audio_encoder.audio_projection.0.weight"].T
        x = self.norm(x + self.w["audio_encoder.audio_projection.0.bias"], "audio_encoder.audio_projection.1", 1e-5)
        return self.silu(x)

    def conditions(self, audio, user_audio, user_motion):
        e = "c_embedder"
        q = self.silu(self.norm(self.linear(f"{e}.motion_embedder.0", user_motion), f"{e}.motion_embedder.1", 1e-5))
        q = self.silu(self.norm(self.linear(f"{e}.motion_embedder.3", q), f"{e}.motion_embedder.4", 1e-5))
        u = self.silu(self.norm(q + self.multihead(f"{e}.dual_modal_attn", q, user_audio), f"{e}.ln1", 1e-5))
        c = self.silu(self.norm(audio + self.multihead(f"{e}.user_agent_attn", audio, u), f"{e}.ln2", 1e-5))
        return self.linear(f"{e}.to_cond_user", c)

    def time(self, tau):
        angles = tau[..., None] * 10_000.0 ** (-torch.arange(128, dtype=tau.dtype) / 128)
        x = torch.cat([angles.cos(), angles.sin()], -1)
        return self.linear("t_embedder.mlp.2", self.silu(self.linear("t_embedder.mlp.0", x)))

    def rope(self, x, start):
        width = x.shape[-1]
        speeds = 10_000.0 ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
        angles = (start + torch.arange(x.shape[2], dtype=x.dtype))[:, None] * speeds
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2)

    def velocity(self, x, tau, cond, ref, start=0, cache=None, commit=0):
        """Noise − clean. cache: list of [k, v, cross k, cross v] a layer, which `commit` > 0 moves on by that many rows."""
        rows = x.shape[1]
        y = self.linear("x_embedder.proj", torch.cat([x, ref[:, None].expand(-1, rows, -1)], -1))
        e = self.time(tau)
        parts = self.linear("adaLN_modulation.1", self.silu(e)).chunk(6, -1)
        places = start + torch.arange(rows)
        for layer in range(self.depth):
            b = f"blocks.{layer}"
            shift, scale, gate = parts[:3]
            qkv = self.linear(f"{b}.attn.qkv", self.norm(y) * (1 + scale) + shift).chunk(3, -1)
            q, k, v = (self.split(part, self.heads) for part in qkv)
            q, k = self.rope(q, start), self.rope(k, start)
            ck, cv = (self.split(p, self.heads) for p in self.linear(f"{b}.cross_attn.kv", cond).chunk(2, -1))
            new = [k, v, ck, cv]
            if cache is not None and cache[layer] is not None:
                k, v, ck, cv = (torch.cat([old, now], 2) for old, now in zip(cache[layer], new))
            seen = places[-1] + 1 - k.shape[2] + torch.arange(k.shape[2])
            out = self.attend(q, k, v, seen[None] <= places[:, None] + self.lookahead)
            y = y + gate * self.linear(f"{b}.attn.proj", out)
            seen = places[-1] + 1 - ck.shape[2] + torch.arange(ck.shape[2])
            q = self.split(self.linear(f"{b}.cross_attn.q", self.norm(y)), self.heads)
            out = self.attend(q, ck, cv, (seen[None] - places[:, None]).abs() <= self.lookahead)
            y = y + self.linear(f"{b}.cross_attn.proj", out)
            shift, scale, gate = parts[3:]
            hidden = self.linear(f"{b}.mlp.fc1", self.norm(y) * (1 + scale) + shift)
            y = y + gate * self.linear(f"{b}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
            if commit:
                lengths = (self.kept, self.kept, self.lookahead, self.lookahead)
                old = cache[layer] or [t[:, :, :0] for t in new]
                cache[layer] = [torch.cat([o, n[:, :, :commit]], 2)[:, :, -m:] for o, n, m in zip(old, new, lengths)]
        shift, scale = self.linear("final_layer.adaLN_modulation.1", self.silu(e)).chunk(2, -1)
        return self.linear("final_layer.linear", self.norm(y) * (1 + scale) + shift)


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(official.to_official(model), heads=4)


def streams(frames, n=2, seed=0):
    return dict(avatar_audio=draw(n, frames, 24, seed=seed), user_audio=draw(n, frames, 24, seed=seed + 1),
                user_motion=draw(n, frames, 16, seed=seed + 2))  # fmt: skip


def released_conditions(oracle, given):
    audio, user = (oracle.project_audio(given[name]) for name in ("avatar_audio", "user_audio"))
    return oracle.conditions(audio, user, given["user_motion"])


# Generator


@torch.no_grad()
def test_conditions_are_the_released_ones(model, oracle):
    given = streams(50)
    assert torch.allclose(model.conditions(**given), released_conditions(oracle, given), atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("tau", ["blocks", 0.0, 875.0, 1000.0])
def test_velocity_of_a_window_is_the_released_one(model, oracle, tau):
    levels = 1000 * torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    levels = levels.repeat_interleave(10, 1) if tau == "blocks" else torch.full((2, 50), tau, dtype=torch.float64)
    given, x, ref = streams(50), draw(2, 50, 16, seed=9), draw(2, 16, seed=10)
    cond = model.conditions(**given)
    theirs = oracle.velocity(x, levels, cond, ref)
    assert theirs.abs().max() > 0.1
    assert torch.allclose(official.code_velocity(model, x, levels, cond, ref), theirs, atol=1e-10)
    assert torch.allclose(model.velocity(x, 1 - levels / 1000, cond, ref), -theirs, atol=1e-10)


@torch.no_grad()
def test_cached_steps_are_the_released_ones(model, oracle):
    x, ref, zero = draw(2, 50, 16, seed=9), draw(2, 16, seed=10), torch.zeros(2, 50, dtype=torch.float64)
    cond = model.conditions(**streams(50))
    cache, past = [None] * 3, model.generator.new_caches(38)
    clean = oracle.velocity(x, zero, cond, ref, 0, cache, commit=48)
    assert torch.allclose(official.code_velocity(model, x, zero, cond, ref, past=past), clean, atol=1e-10)
    for ring in past:
        ring.commit(48)
    for start in (48, 58, 68):
        rows = torch.cat([x[:, -2:], draw(2, 10, 16, seed=start)], 1)
        cond = model.conditions(**streams(12, seed=start))
        tau = torch.cat([torch.zeros(2, 2), torch.full((2, 10), 625.0)], 1).double()
        theirs = oracle.velocity(rows, tau, cond, ref, start, cache)
        assert torch.allclose(official.code_velocity(model, rows, tau, cond, ref, past=past), theirs, atol=1e-10), start
        clean = oracle.velocity(rows, 0 * tau, cond, ref, start, cache, commit=10)
        assert cache[0][0].shape[2] == 38 and cache[0][2].shape[2] == 2
        ours = official.code_velocity(model, rows, 0 * tau, cond, ref, past=past)
        assert torch.allclose(ours, clean, atol=1e-10), start
        for ring in past:
            ring.commit(10)
        x = rows


@torch.no_grad()
@pytest.mark.parametrize("snap", [True, False])
def test_a_released_session_is_the_released_loop(model, oracle, snap):
    """50 frames at once, then blocks of 10: ten calls a block there, nine here."""
    given, ref, frames = streams(70), draw(2, 16, seed=10), 70
    noise = draw(2, frames, 16, seed=4)
    taus = torch.linspace(1000, 0, 9, dtype=torch.float64)
    ticks = 1000 - torch.arange(1000).double() * 1000 / 999
    nearest = lambda t: ticks[(ticks - t).abs().round(decimals=6).argmin()] / 1000  # first of two as near
    cache, made, start = [None] * 3, noise[:, :0], 0
    while start < frames:
        first, new = max(start - 2, 0), 50 if start == 0 else 10
        held = start - first
        part = {name: stream[:, first : start + new] for name, stream in given.items()}
        audio, user = oracle.project_audio(part["avatar_audio"]), oracle.project_audio(part["user_audio"])
        motion, none = part["user_motion"], torch.zeros_like
        triples = [(none(audio), none(user), none(motion)), (audio, none(user), none(motion)), (none(audio), user, motion)]
        cond = torch.cat([oracle.conditions(*triple) for triple in triples])
        x, refs = torch.cat([made[:, first:], noise[:, start : start + new]], 1), ref.repeat(3, 1)
        for index, tau in enumerate(taus):
            level = torch.full((6, held + new), float(tau), dtype=torch.float64)
            level[:, :held] = 0
            empty, voice, other = oracle.velocity(x.repeat(3, 1, 1), level, cond, refs, first, cache).chunk(3)
            v = empty + 2.0 * (voice - empty) + 1.0 * (other - empty)
            sigma, after = (nearest(t) if snap else t / 1000 for t in (tau, taus[min(index + 1, 8)]))
            ratio = after / sigma if sigma > 0 else torch.ones(())
            moved = ratio * x + (1 - ratio) * (x - sigma * v)
            x = torch.cat([x[:, :held], moved[:, held:]], 1)
        oracle.velocity(x.repeat(3, 1, 1), torch.zeros(6, held + new).double(), cond, refs, first, cache, commit=held + new - 2)
        made = torch.cat([made[:, :start], x[:, held:]], 1)
        start += new
    session = official.released_session(model, ref, snap_to_table=snap)
    blocks = [slice(0, 50), slice(50, 60), slice(60, 70)]
    ours = torch.cat([session.step(**{k: s[:, b] for k, s in given.items()}, noise=noise[:, b]).motion for b in blocks], 1)
    assert made.abs().max() > 1
    assert torch.allclose(ours, made, atol=1e-8)


@torch.no_grad()
def test_table_moves_a_session_by_less_than_a_percent(model):
    given, ref = streams(50), draw(2, 16, seed=10)
    noise = draw(2, 50, 16, seed=4)
    ends = [official.released_session(model, ref, snap_to_table=snap).step(**given, noise=noise).motion for snap in (True, False)]
    plain = StreamingSession(model, ref, prime="window", offset="paper", ring="released", num_steps=8)
    assert torch.equal(plain.step(**given, noise=noise).motion, ends[1])
    gap = (ends[0] - ends[1]).norm() / ends[1].norm()
    assert 0 < gap < 0.01


# Time and table


def test_time_and_sign():
    assert official.tau_of(1.0) == 0 and official.tau_of(0.0) == 1000 and official.time_of(250.0) == 0.75
    t = torch.rand(10, dtype=torch.float64)
    assert torch.allclose(official.time_of(official.tau_of(t)), t, atol=1e-15)


def test_table_has_a_thousand_levels():
    assert official.TABLE.shape == (1000,) and official.TABLE[0] == 1 and official.TABLE[-1] == 0
    assert torch.allclose(official.TABLE, torch.linspace(1, 0, 1000).double(), atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(t=st.floats(0, 1))
def test_snapped_is_the_nearest_entry(t):
    found = float(official.snapped(torch.tensor(t, dtype=torch.float64)))
    assert abs(found - t) <= 0.5 / 999 + 1e-12
    assert abs(found * 999 - round(found * 999)) < 1e-9
    assert abs(float(official.snapped(torch.tensor(found, dtype=torch.float64))) - found) < 1e-12


def test_ten_evaluations_are_eight_steps():
    grid = official.released_grid(10)
    assert len(grid.times) == len(grid.levels) == 9
    assert torch.allclose(grid.times, torch.arange(9).double() / 8)
    indices = (grid.levels * 999).round().long().tolist()
    assert indices == [0, 125, 250, 375, 499, 624, 749, 874, 999]
    assert torch.equal(official.released_grid(10, snap_to_table=False).levels, grid.times)
    calls = []
    end = official.released_euler(lambda x, t: calls.append(float(t)) or torch.ones_like(x), torch.zeros(3))
    assert calls == [k / 8 for k in range(8)] and torch.allclose(end, torch.ones(3))


@pytest.mark.parametrize("nfe", [3, 4, 10, 33])
def test_point_mass_is_reached_exactly(nfe):
    goal = draw(4, 5)
    end = official.released_euler(lambda x, t: (goal - x) / (1 - t), draw(4, 5, seed=1), nfe=nfe, snap_to_table=False)
    assert torch.allclose(end, goal, atol=1e-12)


# Names


def test_every_parameter_has_one_place():
    with torch.device("meta"):
        paper = AvatarForcingModel(AvatarForcingConfig.paper())
    own = {name: parameter.shape for name, parameter in paper.named_parameters()}
    placed = [name for names in official.OFFICIAL_NAMES.values() for name in names]
    assert sorted(placed) == sorted(own) and len(official.OFFICIAL_NAMES) == 150
    assert sum(parameter.numel() for parameter in paper.parameters()) == official.GENERATOR_PARAMETERS == 153_484_288
    assert official.OFFICIAL_NAMES["flow_transformer.c_embedder.dual_modal_attn.in_proj_weight"] == (
        "condition_encoder.user_attention.to_q.weight", "condition_encoder.user_attention.to_kv.weight")  # fmt: skip


def test_autoencoder_has_the_released_size_and_names():
    with torch.device("meta"):
        whole = official.OfficialMotionAutoencoder()
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())
    assert count(whole) == official.AUTOENCODER_PARAMETERS == 45_239_560
    assert count(whole.enc) == 22_726_196 and count(whole.dec) == 22_513_364
    shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    assert set(shapes) == set(whole.state_dict()), "kernels are not stored"
    assert shapes["enc.net_app.convs.0.0.weight"] == (32, 3, 1, 1) and shapes["enc.net_app.convs.0.1.bias"] == (1, 32, 1, 1)
    assert shapes["enc.net_app.convs.1.conv2.1.weight"] == (64, 32, 3, 3)
    assert shapes["enc.net_app.convs.8.weight"] == (512, 512, 4, 4) and "enc.net_app.convs.8.bias" not in shapes
    assert shapes["enc.fc.4.weight"] == (20, 512) and shapes["dec.direction.weight"] == (512, 20)
    assert shapes["dec.input.input"] == (1, 512, 4, 4) and shapes["dec.convs.13.conv.weight"] == (1, 32, 32, 3, 3)
    assert shapes["dec.to_flows.6.conv.weight"] == (1, 3, 32, 1, 1) and shapes["dec.convs.0.noise.weight"] == (1,)
    assert shapes["dec.to_rgbs.6.conv.0.weight"] == (3, 32, 1, 1) and shapes["dec.to_rgb1.bias"] == (1, 3, 1, 1)


def test_small_picture_of_full_width():
    with torch.device("meta"):
        assert sum(p.numel() for p in official.OfficialMotionAutoencoder(64).parameters()) == 43_574_087


# Auto-encoder


@torch.no_grad()
def test_filter_and_doubling(autoencoder):
    flat = torch.ones(1, 2, 8, 8, dtype=torch.float64)
    assert torch.allclose(official._Blur(2)(flat)[..., 2:-2, 2:-2], torch.ones(1, 2, 5, 5, dtype=torch.float64))
    doubled = official._Double()(flat)
    assert doubled.shape == (1, 2, 16, 16) and torch.allclose(doubled[..., 2:-2, 2:-2], torch.ones(1).double())
    zeros = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    picture = draw(1, 1, 8, 8)
    zeros[..., ::2, ::2] = picture
    taps = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8
    by_hand = F.conv2d(F.pad(zeros, (2, 1, 2, 1)), 4 * torch.outer(taps, taps)[None, None])
    assert torch.allclose(official._Double()(picture), by_hand, atol=1e-7)


@torch.no_grad()
def test_modulated_convolution_is_the_one_with_weights_a_sample():
    layer = shaken(official._Modulated(3, 5, 3, 4)).double()
    x, style = draw(2, 3, 6, 6), draw(2, 4, seed=1)
    for number in range(2):
        scales = style[number] @ layer.modulation.weight.T / 2 + layer.modulation.bias
        weight = layer.weight[0] / math.sqrt(27) * scales[None, :, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        assert torch.allclose(layer(x, style)[number], F.conv2d(x[number][None], weight, padding=1)[0], atol=1e-12)


@torch.no_grad()
def test_shapes_of_the_encoder(autoencoder):
    z, maps = autoencoder.encode_identity(draw(3, 3, 32, 32))
    assert z.shape == (3, 12) and [tuple(each.shape[1:]) for each in maps] == [(16, 8, 8), (16, 16, 16), (16, 32, 32)]
    motion = autoencoder.encode_motion(draw(3, 3, 32, 32))
    coefficients = autoencoder.coefficients(draw(3, 3, 32, 32))
    assert torch.allclose(autoencoder.coefficients_from_motion(motion), coefficients, atol=1e-12)
    assert torch.allclose(motion.norm(dim=-1), coefficients.norm(dim=-1), atol=1e-12)
    assert autoencoder.off_basis(motion).max() < 1e-12


def test_coefficients_are_one_affine_map(autoencoder):
    h = draw(5, 12)
    weight, bias = torch.eye(12).double(), torch.zeros(12).double()
    for layer in autoencoder.enc.fc:
        weight, bias = layer.weight / math.sqrt(12) @ weight, layer.weight / math.sqrt(12) @ bias + layer.bias
    assert torch.allclose(autoencoder.enc.fc(h), h @ weight.T + bias, atol=1e-10)


def test_basis_is_orthonormal_kept_and_follows_the_weight():
    module = official.OfficialMotionAutoencoder(8, dim=10, num_directions=3, width=2)
    first = module.basis
    assert first is module.basis and (first.T @ first - torch.eye(3)).abs().max() < 1e-6
    raw = torch.linalg.qr(module.dec.direction.weight.detach() + 1e-8)[0]
    assert torch.equal(first, raw), "sign of LAPACK"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.basis.dtype == torch.float32
    with torch.no_grad():
        module.dec.direction.weight.copy_(module.dec.direction.weight.flip(0))
    assert (module.basis - first).abs().max() > 0.1
    assert module.double().basis.dtype == torch.float64


@torch.no_grad()
def test_clips_are_pictures_one_by_one(autoencoder):
    z, maps = autoencoder.encode_identity(draw(2, 3, 32, 32))
    motion = draw(2, 5, 12, seed=3)
    clip = autoencoder.decode(z, maps, motion, frames_at_once=3)
    assert clip.shape == (2, 5, 3, 32, 32)
    for frame in range(5):
        assert torch.allclose(clip[:, frame], autoencoder.decode(z, maps, motion[:, frame]), atol=1e-10)
    assert autoencoder.decode(z, maps, motion[:, :0]).shape == (2, 0, 3, 32, 32)
    inside = autoencoder.decode(z, maps, motion, project_to_basis=True)
    assert torch.allclose(inside, autoencoder.decode(z, maps, autoencoder.project(motion)), atol=1e-10)
    assert autoencoder.decode(z, maps, 10 * motion, clamp=True).abs().max() <= 1
    assert torch.allclose(autoencoder(maps_source := draw(2, 3, 32, 32, seed=5), maps_source),
                          autoencoder.decode(*autoencoder.encode_identity(maps_source), autoencoder.encode_motion(maps_source)))  # fmt: skip


def test_picture_has_gradients_to_all_that_is_used():
    module = shaken(official.OfficialMotionAutoencoder(16, dim=6, num_directions=2, width=4))
    images = draw(2, 3, 16, 16, dtype=torch.float32)
    module(images, images.flip(0)).square().mean().backward()
    unused = {name for name, parameter in module.named_parameters() if parameter.grad is None}
    assert {name for name in unused if "noise" not in name} == {
        "dec.direction.weight", "dec.to_rgb1.bias", "dec.to_rgb1.conv.0.weight", "dec.to_rgb1.conv.1.bias"}  # fmt: skip


# Loading


def written(folder, tensors, name="flow_transformer.pth"):
    path = folder / name
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["flow_transformer.pth", "flow_transformer.safetensors"])
@pytest.mark.parametrize("prefix", [True, False])
def test_round_trip(tmp_path, model, autoencoder, prefix, name, capsys):
    whole = model.float()
    tensors = official.to_official(whole, prefix=prefix)
    assert any(key.startswith("flow_transformer.") for key in tensors) == prefix
    tensors["alignment_mask"] = torch.ones(50, 50)
    tensors[("audio_encoder." if prefix else "") + "wav2vec2.masked_spec_embed"] = torch.ones(4)
    written(tmp_path, tensors, name)
    kernels = {"dec.convs.0.conv.blur.kernel": torch.ones(4, 4)}
    ae = autoencoder.float()
    parts = official.to_official(ae, prefix=prefix) | kernels
    written(tmp_path, parts, name.replace("flow_transformer", "motion_autoencoder"))
    release = official.from_official(tmp_path, num_heads=4)
    out = capsys.readouterr().out
    assert "CC BY-NC" in out and "3 left out" in out
    assert release.report.complete and same(release.model, whole) and same(release.autoencoder, ae)
    assert release.model.config == AvatarForcingConfig.paper(**SMALL) and release.audio is None
    assert not any(parameter.requires_grad for parameter in release.model.parameters())
    model.double(), autoencoder.double()


def test_the_last_map_is_stored_with_the_other_sign(model):
    made = official.to_official(model)
    assert torch.equal(made["flow_transformer.final_layer.linear.weight"], -model.generator.final.linear.weight)
    assert torch.equal(made["flow_transformer.final_layer.linear.bias"], -model.generator.final.linear.bias)


def test_whole_model_in_one_file_and_nested(tmp_path, model, autoencoder):
    tensors = official.to_official(model) | official.to_official(autoencoder)
    torch.save({"state_dict": {f"module.{name}": value.float() for name, value in tensors.items()}}, tmp_path / "all.pt")
    release = official.from_official(tmp_path / "all.pt", num_heads=4, verbose=False)
    assert release.autoencoder.size == 32 and release.autoencoder.width == 16 and release.autoencoder.num_directions == 4
    assert release.report.complete and same(release.model, model.float())
    model.double()


def test_the_autoencoder_alone(tmp_path, autoencoder):
    parts = {name: value.float() for name, value in official.to_official(autoencoder, prefix=False).items()}
    path = written(tmp_path, parts, "motion_autoencoder.safetensors")
    for place in (path, tmp_path):
        assert same(official.autoencoder_from_official(place, verbose=False), autoencoder.float())
    autoencoder.double()
    del parts["dec.to_rgb1.bias"]
    with pytest.raises(RuntimeError, match=r"missing \(1\): motion_autoencoder.dec.to_rgb1.bias"):
        official.autoencoder_from_official(written(tmp_path, parts, "motion_autoencoder.pth"), verbose=False)


def test_without_an_autoencoder(tmp_path, model):
    release = official.from_official(written(tmp_path, official.to_official(model)), num_heads=4, verbose=False, mask="full")
    assert release.autoencoder is None and release.model.config.mask == "full"


def test_all_that_does_not_fit_is_listed(tmp_path, model):
    tensors = official.to_official(model)
    del tensors["flow_transformer.c_embedder.ln1.bias"], tensors["flow_transformer.blocks.1.attn.qkv.weight"]
    tensors["flow_transformer.blocks.0.attn.q_norm.weight"] = torch.ones(8)
    tensors["flow_transformer.final_layer.linear.bias"] = torch.ones(3)
    path = written(tmp_path, tensors)
    with pytest.raises(RuntimeError) as caught:
        official.from_official(path, num_heads=4, verbose=False)
    text = str(caught.value)
    for part in ("missing (2)", "c_embedder.ln1.bias", "blocks.1.attn.qkv.weight", "unexpected (1)", "blocks.0.attn.q_norm.weight",
                 "reshaped (1)", "[3] in the file, [16] here"):  # fmt: skip
        assert part in text
    release = official.from_official(path, num_heads=4, strict=False, verbose=False)
    assert not release.report.complete and len(release.report.loaded) == len(tensors) - 2


def test_names_without_any_match_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="x_embedder"):
        official.from_official(written(tmp_path, {"student.x_embedder.proj.weight": torch.ones(2, 2)}), verbose=False)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"x_embedder.proj.weight": SystemExit}, tmp_path / "bad.pth")
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        official.read_release(tmp_path / "bad.pth")


def test_wave_features_come_along(tmp_path, model):
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(hidden_size=2, num_hidden_layers=12, num_attention_heads=1, intermediate_size=4, conv_dim=(4, 4),
                                         conv_kernel=(10, 8), conv_stride=(40, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
                                         num_conv_pos_embedding_groups=1)  # fmt: skip
    release = official.from_official(written(tmp_path, {k: v.float() for k, v in official.to_official(model).items()}),
                                     wav2vec=transformers.Wav2Vec2Model(config), num_heads=4, verbose=False)  # fmt: skip
    features = release.audio(draw(1, 6400, dtype=torch.float32), 16_000, 10)
    assert features.shape == (1, 10, 24)
    assert release.model.conditions(avatar_audio=features).shape == (1, 10, 32)


def test_source_is_listed_as_not_commercial():
    item = source("avatar-forcing-weights")
    assert item.kind == "hub" and item.gate == "noncommercial" and "CC-BY-NC-4.0" in item.licence


# Bad input


def build(**kinds):
    return official.OfficialMotionAutoencoder(8, dim=6, num_directions=2, width=2, **kinds)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: official.OfficialMotionAutoencoder(100), "size: expected a power of two"),
        (lambda: official.OfficialMotionAutoencoder(4), "size"),
        (lambda: official.OfficialMotionAutoencoder(True), "size"),
        (lambda: official.OfficialMotionAutoencoder(8, dim=4, num_directions=5), "num_directions"),
        (lambda: official.OfficialMotionAutoencoder(8, width=0), "width"),
        (lambda: build().encode_motion(torch.zeros(1, 3, 16, 16)), r"images: expected shape \[n, 3, 8, 8\]"),
        (lambda: build().encode_motion(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), "images: expected a floating tensor"),
        (lambda: build().encode_motion([1]), "images: expected a floating tensor, got list"),
        (lambda: build().motion_from_coefficients(torch.zeros(1, 3)), "coefficients: expected 2"),
        (lambda: build().coefficients_from_motion(torch.zeros(1, 3)), "motion: expected 6"),
        (lambda: build().decode(torch.zeros(1, 6), [], torch.zeros(2, 6)), "motion: expected shape"),
        (lambda: build().decode(torch.zeros(1, 6), [], torch.zeros(1, 6)), "features: expected 1 maps"),
        (lambda: build().decode(torch.zeros(1, 6), [torch.zeros(1, 2, 8, 8)], torch.zeros(1, 6), frames_at_once=0), "frames_at_once"),
        (lambda: official.snapped(torch.tensor([0.5, 1.5])), "t: expected times"),
        (lambda: official.snapped(torch.tensor(float("nan"))), "t: expected times"),
        (lambda: official.released_grid(2), "nfe"),
        (lambda: official.released_grid(10.0), "nfe"),
        (lambda: official.map_names(0), "num_layers"),
        (lambda: official.to_official(torch.nn.Linear(1, 1)), "module"),
        (lambda: official.read_release("nowhere.pth"), "path: expected a file"),
        (lambda: official.from_official("nowhere.pth", verbose=False), "path: expected a file"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        call()


def test_unfit_content(tmp_path, model):
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"enc.fc.0.bias": torch.ones(1), "motion_autoencoder.enc.fc.0.bias": torch.ones(1)}, tmp_path / "twice.pth")
    with pytest.raises(ValueError, match="named tensors"):
        official.read_release(tmp_path / "list.pth")
    with pytest.raises(ValueError, match="each tensor once"):
        official.read_release(tmp_path / "twice.pth")
    path = written(tmp_path, official.to_official(model))
    with pytest.raises(ValueError, match="ae_path"):
        official.from_official(path, written(tmp_path, {"enc.fc.0.bias": torch.ones(1)}, "motion_autoencoder.pth"), num_heads=4, verbose=False)
