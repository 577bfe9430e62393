"""Motion auto-encoder: orthonormal directions, warping, losses, training, shipped weights."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from papers10.avatar_forcing import autoencoder as ae
from papers10.avatar_forcing.data import PARAMETERS
from papers10.core.random import generator

TINY = ae.AutoencoderConfig(size=16, dim=12, num_directions=3, width=4, num_warps=2)


@pytest.fixture(scope="module")
def tiny():
    return ae.build_autoencoder(TINY, seed=1).eval()


@pytest.fixture(scope="module")
def shipped():
    return ae.load_small()


def pictures(count, size=16, seed=0, dtype=torch.float32):
    return 2 * torch.rand(count, 3, size, size, generator=generator(seed, "test pictures"), dtype=dtype) - 1


# Directions


def test_known_basis():
    q = ae.orthonormal(torch.tensor([[3.0, 0.0], [4.0, 5.0]], dtype=torch.float64))
    assert torch.allclose(q, torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64), atol=1e-15)
    motion = q @ torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert torch.allclose(motion, torch.tensor([-1.0, 2.0], dtype=torch.float64), atol=1e-15)
    assert motion.square().sum().item() == pytest.approx(5.0)


@settings(max_examples=25, deadline=None)
@given(dim=st.integers(1, 24), count=st.integers(1, 24), seed=st.integers(0, 1000))
def test_basis_is_orthonormal_and_unique(dim, count, seed):
    count = min(dim, count)
    weight = torch.randn(dim, count, generator=generator(seed, "weight"), dtype=torch.float64)
    q = ae.orthonormal(weight)
    assert torch.allclose(q.T @ q, torch.eye(count, dtype=q.dtype), atol=1e-12)
    r = q.T @ weight
    assert torch.allclose(q @ r, weight, atol=1e-10) and bool((r.diagonal() > 0).all())
    # The same weights with columns scaled by positive numbers have the same Q.
    assert torch.allclose(ae.orthonormal(weight * torch.linspace(0.5, 2, count, dtype=q.dtype)), q, atol=1e-8)
    raw = ae.orthonormal(weight, positive=False)
    assert torch.allclose(raw.abs(), q.abs(), atol=1e-10)


def test_basis_gradient():
    weight = torch.randn(4, 2, generator=generator(0, "gradient"), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ae.orthonormal, (weight,))


def test_basis_is_kept_and_follows_the_weight(tiny):
    model = copy.deepcopy(tiny)
    with torch.no_grad():
        first = model.basis
        assert model.basis is first
        model.directions.weight[0, 0] += 1.0
        second = model.basis
        assert not torch.equal(first, second)
        model.load_state_dict(tiny.state_dict())
        assert torch.equal(model.basis, first)
    assert model.basis.requires_grad and not pickle.loads(pickle.dumps(model)).eval().directions._kept


def test_basis_from_inference_mode_serves_training(tiny):
    model = copy.deepcopy(tiny).requires_grad_(False)
    with torch.inference_mode():
        kept = model.basis
    assert not kept.is_inference()
    code = torch.randn(2, 3, requires_grad=True)
    model.motion_from_coefficients(code).sum().backward()
    assert code.grad is not None


def test_directions_stay_out_of_autocast(tiny):
    code = torch.randn(5, 3, generator=generator(2, "code"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = tiny.motion_from_coefficients(code)
    with torch.no_grad():
        assert inside.dtype == torch.float32 and torch.equal(inside, tiny.motion_from_coefficients(code))


@torch.no_grad()
def test_motion_and_coefficients(tiny):
    code = torch.randn(2, 4, 3, generator=generator(3, "code"))
    motion = tiny.motion_from_coefficients(code)
    assert motion.shape == (2, 4, 12)
    assert torch.allclose(motion.norm(dim=-1), code.norm(dim=-1), atol=1e-5)
    assert torch.allclose(tiny.coefficients_from_motion(motion), code, atol=1e-5)
    assert tiny.residual(motion).max() < 1e-5 and torch.allclose(tiny.project_to_basis(motion), motion, atol=1e-5)
    off = torch.linalg.svd(tiny.basis.T)[2][-1]
    assert tiny.residual(off[None]).item() == pytest.approx(1.0, abs=1e-5)
    assert tiny.residual(motion + motion.norm(dim=-1, keepdim=True) * off).sub(0.5**0.5).abs().max() < 1e-4
    assert torch.equal(tiny.residual(torch.zeros(1, 12)), torch.zeros(1))


@torch.no_grad()
def test_edit_moves_one_coefficient(tiny):
    motion = tiny.motion_from_coefficients(torch.randn(4, 3, generator=generator(4, "code")))
    before = motion.clone()
    amounts = torch.tensor([0.0, 1.0, -2.0, 0.5])
    change = tiny.coefficients_from_motion(tiny.edit(motion, 1, amounts)) - tiny.coefficients_from_motion(motion)
    assert torch.allclose(change, amounts[:, None] * torch.tensor([0.0, 1.0, 0.0]), atol=1e-5)
    assert torch.equal(motion, before)
    assert torch.allclose(tiny.edit(tiny.edit(motion, 2, 0.7), 2, -0.7), motion, atol=1e-6)


# Networks


def test_warp_known_values():
    images = pictures(1, 8, dtype=torch.float64)
    nothing = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    assert torch.allclose(ae.warp(images, nothing), images)
    down = nothing.clone()
    down[:, 1] = 2 / 7
    assert torch.allclose(ae.warp(images, down)[:, :, :-1], images[:, :, 1:])
    assert torch.allclose(ae.warp(images, down)[:, :, -1], images[:, :, -1])
    half = nothing.clone()
    half[:, 0] = 1 / 7
    assert torch.allclose(ae.warp(images, half)[..., :-1], (images[..., 1:] + images[..., :-1]) / 2)


def test_gradients_of_warp_and_decoder():
    images = pictures(1, 4, dtype=torch.float64)[:, :2].clone().requires_grad_()
    offset = (0.11 + 0.2 * torch.rand(1, 2, 4, 4, generator=generator(1, "offset"), dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(ae.warp, (images, offset))
    model = ae.build_autoencoder(ae.AutoencoderConfig(size=8, dim=4, num_directions=2, width=2, num_warps=1)).double()
    code, features = model.encode_identity(pictures(1, 8, dtype=torch.float64))
    code, features = code.detach(), [feature.detach() for feature in features]
    motion = torch.randn(1, 4, generator=generator(2, "motion"), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: model.decode(code, features, m)[:, :, ::3, ::3], (motion,))


@torch.no_grad()
def test_modulated_convolution_is_one_filter_a_picture():
    layer = ae.ModulatedConv(3, 5, 7).double()
    x, z = pictures(2, 6, dtype=torch.float64), torch.randn(2, 7, generator=generator(3, "z"), dtype=torch.float64)
    for picture, vector, out in zip(x, z, layer(x, z)):
        weight = layer.weight * layer.style(vector)[None, :, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        assert torch.allclose(nn.functional.conv2d(picture[None], weight, layer.bias, padding=1)[0], out)


@settings(max_examples=8, deadline=None)
@given(size=st.sampled_from([8, 16, 32]), dim=st.integers(4, 20), count=st.integers(1, 4), width=st.integers(2, 5), warps=st.integers(1, 3), batch=st.integers(1, 3), frames=st.integers(1, 3))
def test_shapes(size, dim, count, width, warps, batch, frames):
    config = ae.AutoencoderConfig(size=size, dim=dim, num_directions=count, width=width, num_warps=min(warps, size.bit_length() - 3))
    model = ae.build_autoencoder(config).double()
    images = pictures(batch, size, dtype=torch.float64)
    with torch.no_grad():
        identity, features = model.encode_identity(images)
        assert identity.shape == (batch, dim) and model.coefficients(images).shape == (batch, count) and model.basis.shape == (dim, count)
        assert features[-1].shape[-2:] == (size, size) and len(features) == config.num_warps
        motion = model.encode_motion(images)
        assert model.decode(identity, features, motion).shape == images.shape
        assert model.decode(identity, features, motion[:, None].repeat(1, frames, 1)).shape == (batch, frames, 3, size, size)
        assert torch.allclose(model(images, images), model.decode(identity, features, motion), atol=1e-9)


@torch.no_grad()
def test_clips_are_their_frames(tiny):
    tiny, clips = copy.deepcopy(tiny).double(), pictures(6, dtype=torch.float64).unflatten(0, (2, 3))
    before = clips.clone()
    motion = ae.encode_clip(tiny, clips, chunk=4)
    assert motion.shape == (2, 3, 12) and torch.allclose(motion[1, 2], tiny.encode_motion(clips[1, 2:])[0], atol=1e-5)
    assert torch.equal(clips, before) and ae.encode_clip(tiny, clips[0, :0]).shape == (0, 12)
    identity, features = tiny.encode_identity(clips[:, 0])
    whole = tiny.decode(identity, features, motion)
    alone = tiny.decode(identity[1:], [feature[1:] for feature in features], motion[1:, 2])
    assert torch.allclose(whole[1, 2], alone[0], atol=1e-5)
    assert tiny.decode(identity * 100, features, motion, clamp=True).abs().max() <= 1


def test_same_seed_same_weights():
    state = torch.random.get_rng_state()
    first, again, other = (ae.build_autoencoder(TINY, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first) and not torch.equal(first["constant"], other["constant"])


# Losses


def flat(value):
    return torch.full((2, 3, 16, 16), float(value))


def some_masks():
    masks = {"eyes": torch.zeros(2, 1, 16, 16), "mouth": torch.zeros(2, 1, 16, 16)}
    masks["eyes"][..., 4:6, 4:12], masks["mouth"][..., 10:14, 6:10] = 1, 1
    return masks


def test_loss_known_values():
    total, terms = ae.autoencoder_loss(flat(0.5), flat(0.0))
    assert total.item() == pytest.approx(0.5 + 4 * 0.25) and terms["gradient"] == 0
    masks = some_masks()
    weights = ae.AutoencoderWeights(l1=2.0, gradient=0.0, component=10.0)
    total, terms = ae.autoencoder_loss(flat(0.5), flat(0.0), masks, weights=weights)
    share = 32 / 256
    assert terms["component"].item() == pytest.approx(0.5 * share) and total.item() == pytest.approx(1.0 + 5 * share)
    ramp = torch.linspace(0, 1.5, 16).expand(2, 3, 16, 16)
    assert ae.autoencoder_loss(ramp, torch.zeros_like(ramp))[1]["gradient"].item() == pytest.approx(0.1)
    assert ae.autoencoder_loss(ramp, ramp, masks, weights="component")[0] == 0


def test_component_error_counts_only_under_the_masks():
    masks, outside = some_masks(), flat(0.0)
    outside[..., 0, 0] = 1
    assert ae.autoencoder_loss(outside, flat(0.0), masks, weights="component")[1]["component"] == 0


def test_perceptual_terms():
    halves = ae.pyramid(lambda images: [images], levels=2)
    assert [value.shape[-1] for value in halves(flat(0))] == [16, 8]
    weights = ae.AutoencoderWeights(l1=0.0, gradient=0.0, perceptual=1.0, component_perceptual=2.0)
    total, terms = ae.autoencoder_loss(flat(0.5), flat(0.0), some_masks(), halves, weights=weights)
    assert terms["perceptual"].item() == pytest.approx(1.0) and terms["component_perceptual"].item() == pytest.approx(2 * 0.5 * 32 / 256)
    assert total.item() == pytest.approx(1 + 2 * 0.125)


def test_preset_of_float_uses_every_term():
    networks = ae.build_discriminators(16, crop=8, width=4)
    rec = flat(0.2).requires_grad_()
    total, terms = ae.autoencoder_loss(rec, pictures(2), some_masks(), lambda images: [images], networks, "float")
    total.backward()
    assert set(terms) == {name for name, value in ae.LOSS_WEIGHTS["float"].model_dump().items() if value} and rec.grad.abs().sum() > 0
    assert total.item() == pytest.approx(sum(float(getattr(ae.LOSS_WEIGHTS["float"], name) * value) for name, value in terms.items()), rel=1e-4)
    against = ae.discriminator_loss(networks, rec, pictures(2), some_masks())
    rec.grad = None
    against.backward()
    assert rec.grad is None and all(parameter.grad is not None for parameter in networks.parameters())


def test_identity_share_known_values():
    person = torch.randn(4000, 1, generator=generator(0, "person"))
    motion = torch.randn(2, 4000, 3, generator=generator(1, "motion"))
    share = torch.tensor([0.0, 0.5, 0.9])
    first, second = (share.sqrt() * person + (1 - share).sqrt() * part for part in motion)
    assert ae.identity_share(first, second).item() == pytest.approx(float(share.mean()), abs=0.03)
    assert ae.identity_share(first * 7 - 3, second + 5).item() == pytest.approx(float(ae.identity_share(first, second)), abs=1e-3)
    assert ae.identity_share(first, first).item() == pytest.approx(1, abs=1e-3)


def test_component_head_sees_shape_not_colour():
    head = ae.ComponentHead(12, size=8).eval()
    z, images = torch.zeros(2, 12), 8 * pictures(2)
    assert head(z, images, some_masks()).item() == pytest.approx(head(z, 0.5 * images + 0.2, some_masks()).item(), rel=0.05)


def test_crop_is_centred_on_the_mask():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 33), torch.linspace(-1, 1, 33), indexing="ij")
    places = torch.stack([x, y, x])[None]
    mask = ((x - 0.5).abs().clamp(min=(y + 0.25).abs()) < 0.13).float()[None, None]
    crop = ae.component_crops(places, mask, 9)
    assert crop.shape == (1, 3, 9, 9) and crop[0, 0, 4, 4].item() == pytest.approx(0.5, abs=0.01) and crop[0, 1, 4, 4].item() == pytest.approx(-0.25, abs=0.01)
    assert ae.component_crops(places, torch.zeros_like(mask), 9).isfinite().all()


# Training


def test_training_reduces_the_loss_and_says_its_terms():
    model, history = ae.train_autoencoder(TINY, steps=16, batch_size=3, seed=2, log_every=4)
    losses = history.column("loss")[1]
    assert losses[-1] < 0.9 * losses[0] and not model.training
    assert {"l1", "gradient", "component", "crops", "identity"} <= set(history.records[-1])


def test_interrupted_training_ends_with_the_same_weights(tmp_path):
    options = dict(steps=6, batch_size=2, seed=5, log_every=1)
    whole, _ = ae.train_autoencoder(TINY, **options)
    stop = iter([False] * 3 + [True])

    def pairs(n, draw):
        if next(stop, False):
            raise KeyboardInterrupt
        return ae.face_pairs(16)(n, draw)

    with pytest.raises(KeyboardInterrupt):
        ae.train_autoencoder(TINY, **options, pairs=pairs, folder=tmp_path, save_every=2)
    again, history = ae.train_autoencoder(TINY, **options, folder=tmp_path, save_every=2)
    assert history.resumed_from == 2
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_training_with_a_discriminator_and_half_precision():
    networks = ae.build_discriminators(16, crop=8, width=4)
    before = copy.deepcopy(networks.state_dict())
    weights = ae.AutoencoderWeights(component=1.0, full_adversarial=0.1, mouth_adversarial=0.1)
    _, history = ae.train_autoencoder(TINY, steps=2, batch_size=2, weights=weights, discriminator=networks, amp="bf16", ema=0.5, log_every=1)
    assert history.records[-1]["discriminator"] > 0 and any(not torch.equal(value, before[name]) for name, value in networks.state_dict().items())


def test_pairs_and_parameters():
    draw = generator(0, "pairs")
    pairs = ae.face_pairs(16)(3, draw)
    assert pairs.source.shape == pairs.driver.shape == (3, 3, 16, 16) and set(pairs.masks) == {"eyes", "mouth"}
    params = ae.sample_parameters(4000, draw)
    assert params.shape == (4000, len(PARAMETERS)) and params[:, 4:].abs().max() <= 1 and params[:, 0].min() == 0
    again = ae.face_pairs(16)(3, generator(0, "pairs"))
    assert torch.equal(pairs.driver, again.driver)
    images = pictures(2)
    assert torch.equal(ae.recolored(images, 0.0, draw), images) and not torch.equal(ae.recolored(images, 0.4, draw), images)


# Measures


def test_probe_known_values():
    x = torch.randn(400, 3, generator=generator(1, "probe"))
    y = torch.stack([x[:, 0] - 2 * x[:, 2] + 5, torch.randn(400, generator=generator(2, "probe")), torch.full((400,), 3.0)], 1)
    linear, noise, constant = ae.probe(x, y)
    assert linear.item() == pytest.approx(1, abs=1e-4) and abs(noise) < 0.1 and constant.isnan()
    assert torch.allclose(ae.probe(10 * x + 7, y)[:2], torch.stack([linear, noise]), atol=1e-3)


def test_psnr_known_value():
    assert ae.psnr(torch.full((1, 3, 8, 8), 0.2), torch.zeros(1, 3, 8, 8)).item() == pytest.approx(20.0, abs=1e-3)
    assert ae.psnr(torch.ones(1, 3, 8, 8) * 3, torch.ones(1, 3, 8, 8)).item() == pytest.approx(100)


# Shipped weights


def test_shipped_weights_reach_the_plans_targets(shipped):
    found = ae.evaluate_autoencoder(shipped, faces=80, fit=240, seed=77)
    assert found["r2_jaw"] >= 0.8 and found["r2_smile"] >= 0.5 and min(found["r2_yaw"], found["r2_pitch"]) >= 0.88
    assert found["gain"] >= 6 and abs(found["r2_identity"]) <= 0.2 and found["orthogonality"] <= 1e-5
    assert ae.shipped().stat().st_size <= 2_000_000


def test_weights_survive_a_file(tiny, tmp_path):
    path = ae.save_autoencoder(tiny, tmp_path / "folder" / "weights.safetensors", recipe={"steps": 3}, curve=[{"step": 1, "loss": 0.5}])
    again = ae.load_small(path)
    assert ae.about_autoencoder(path)["recipe"] == {"steps": 3} and again.config == TINY and not again.training
    with torch.no_grad():
        assert torch.equal(again.basis, tiny.basis) and torch.allclose(again(pictures(1), pictures(1, seed=1)), tiny(pictures(1), pictures(1, seed=1)), atol=0.02)
    with pytest.raises(FileNotFoundError, match="train_autoencoder"):
        ae.load_small(tmp_path / "none.safetensors")
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if name != "constant"}, tmp_path / "short.safetensors", {"config": TINY.model_dump_json()})
    with pytest.raises(ValueError, match="constant"):
        ae.load_small(tmp_path / "short.safetensors")
    save_file(tensors, tmp_path / "silent.safetensors")
    with pytest.raises(ValueError, match="no config"):
        ae.load_small(tmp_path / "silent.safetensors")


def test_trial_returns_numbers():
    found = ae.autoencoder_trial("plain", 0, steps=2, faces=20)
    assert all(isinstance(value, float) for value in found.values()) and {"cross", "r2_jaw", "r2_identity"} <= set(found)


# Bad input

MODEL = ae.build_autoencoder(TINY)
IDENTITY, FEATURES = torch.zeros(1, 12), [torch.zeros(1, 12, 8, 8), torch.zeros(1, 4, 16, 16)]


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ae.orthonormal([[1.0]]), TypeError, "weight"),
        (lambda: ae.orthonormal(torch.ones(2, 2, dtype=torch.int64)), TypeError, "int64"),
        (lambda: ae.orthonormal(torch.ones(2, 3)), ValueError, "at most d = 2"),
        (lambda: ae.orthonormal(torch.ones(3, 2)), ValueError, "independent"),
        (lambda: ae.orthonormal(torch.full((3, 2), torch.nan)), ValueError, "weight"),
        (lambda: ae.MotionAutoencoder(size=48), ValueError, "power of two, got 48"),
        (lambda: ae.MotionAutoencoder(16, 4, 5, num_warps=2), ValueError, "num_directions"),
        (lambda: ae.MotionAutoencoder(16, num_warps=3), ValueError, "num_warps"),
        (lambda: ae.AutoencoderConfig(dims=4), ValueError, "dim"),
        (lambda: MODEL.encode_identity(torch.zeros(1, 3, 8, 8)), ValueError, "images"),
        (lambda: MODEL.encode_motion(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), TypeError, "images"),
        (lambda: MODEL.motion_from_coefficients(torch.zeros(1, 4)), ValueError, "coefficients.*3"),
        (lambda: MODEL.coefficients_from_motion(torch.zeros(1, 4)), ValueError, "motion.*12"),
        (lambda: MODEL.residual(torch.zeros(1, 4)), ValueError, "motion"),
        (lambda: MODEL.edit(torch.zeros(1, 12), 3, 1.0), ValueError, "direction"),
        (lambda: MODEL.edit(torch.zeros(1, 4), 0, 1.0), ValueError, "motion"),
        (lambda: MODEL.decode(IDENTITY, FEATURES[:1], torch.zeros(1, 12)), ValueError, "features"),
        (lambda: MODEL.decode(IDENTITY, FEATURES, torch.zeros(2, 12)), ValueError, "one row a portrait"),
        (lambda: MODEL.decode(IDENTITY, FEATURES, torch.zeros(12)), ValueError, "motion"),
        (lambda: MODEL.decode(torch.zeros(1, 3), FEATURES, torch.zeros(1, 12)), ValueError, "identity"),
        (lambda: MODEL(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16)), ValueError, "driver"),
        (lambda: ae.autoencoder_loss(flat(0), flat(0), weights="floats"), ValueError, "float"),
        (lambda: ae.autoencoder_loss(flat(0), flat(0), weights=3), TypeError, "weights"),
        (lambda: ae.autoencoder_loss(flat(0), flat(0), weights="component"), ValueError, "masks"),
        (lambda: ae.autoencoder_loss(flat(0), flat(0), {"eyes": flat(0)}, weights="component"), ValueError, "masks"),
        (lambda: ae.autoencoder_loss(flat(0), flat(0)[:1]), ValueError, "target"),
        (lambda: ae.autoencoder_loss(flat(0), flat(0), some_masks(), weights="float"), ValueError, "perceptual"),
        (lambda: ae.autoencoder_loss(flat(0), flat(0), some_masks(), lambda x: [x], weights="float"), ValueError, "discriminator.*'eyes'"),
        (lambda: ae.train_autoencoder({"size": 16}, steps=1), TypeError, "config"),
        (lambda: ae.train_autoencoder(TINY, steps=0), ValueError, "steps"),
        (lambda: ae.train_autoencoder(TINY, steps=1, lr=0.0), ValueError, "lr"),
        (lambda: ae.train_autoencoder(ae.AutoencoderConfig.tiny(), steps=1, model=MODEL), ValueError, "model"),
        (lambda: ae.probe(torch.zeros(4, 5), torch.zeros(4, 1)), ValueError, "train"),
        (lambda: ae.probe(torch.zeros(4, 1), torch.zeros(3, 1)), ValueError, "params"),
        (lambda: ae.encode_clip(MODEL, torch.zeros(3, 16, 16)), ValueError, "frames"),
        (lambda: ae.autoencoder_trial("components", 0), ValueError, "component"),
        (lambda: ae.recolored(flat(0), 2.0, generator(0, "x")), ValueError, "strength"),
        (lambda: ae.pyramid(lambda x: [x], levels=0), ValueError, "levels"),
        (lambda: ae.Discriminator(4), ValueError, "size"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
