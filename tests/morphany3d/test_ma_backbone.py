"""The small generator: encoders, flows, sampling, training, and the weights that ship."""

import copy
import json

import pytest
import torch

from papers10.core.random import generator
from papers10.morphany3d.backbone import (
    ImageEncoder,
    LabelEncoder,
    TinyConfig,
    TinySLatFlow,
    TinySSFlow,
    about,
    evaluate_tiny,
    generate,
    load,
    nearest_shape,
    new_tiny,
    position_code,
    sample_slat,
    sample_ss,
    save,
    shipped,
    tiny_trial,
    train_tiny,
)
from papers10.morphany3d.latents import SparseLatent, active_voxels
from papers10.morphany3d.shapes import CATEGORIES, ProceduralShapes

SMALL = TinyConfig(channels=4, vae_hidden=8, ss_dim=24, ss_blocks=1, ss_heads=2, slat_dim=24, slat_blocks=1, slat_heads=2, cond_dim=16, label_tokens=3)


def lively(module, seed=0):
    """The module with no weight at zero, in float64, so that every path counts."""
    draw = generator(seed, "lively")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return module.double().eval()


def some_latent(lengths, channels=7, seed=0):
    parts = []
    for number, length in enumerate(lengths):
        places = torch.randperm(4096, generator=generator(seed, number))[:length].sort().values
        parts.append(torch.stack([torch.full_like(places, number), places // 256, places // 16 % 16, places % 16], 1).int())
    return SparseLatent(torch.cat(parts), torch.randn(sum(lengths), channels, generator=generator(seed, "feats"), dtype=torch.float64), len(lengths))


@pytest.fixture(scope="module")
def model():
    return load()


def test_image_encoder_reads_patches_in_rows_and_normalises():
    encoder = lively(ImageEncoder(16))
    images = torch.rand(2, 4, 32, 32, generator=generator(1), dtype=torch.float64)
    tokens = encoder(images)
    assert tokens.shape == (2, 64, 16)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 64, dtype=torch.float64), atol=1e-9, rtol=0)
    # The layer norm's epsilon, 1e-5, takes a little off the variance.
    torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(2, 64, dtype=torch.float64), atol=1e-2, rtol=0)
    patch = images[1, :, 4:8, 12:16].flatten() * 2 - 1
    embedded = torch.nn.functional.unfold(2 * images - 1, 4, stride=4).transpose(1, 2)[1, 8 + 3]
    assert torch.equal(patch, embedded)


def test_label_encoder():
    encoder = LabelEncoder(16, 3)
    tokens = encoder(["dog", "car", "dog"])
    assert tokens.shape == (3, 3, 16) and torch.equal(tokens[0], tokens[2]) and not torch.equal(tokens[0], tokens[1])


def test_position_code():
    code = position_code(torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64), 20)
    assert code.shape == (1, 20) and code[0, 18:].abs().max() == 0
    torch.testing.assert_close(code[0, 0:6], torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    assert code[0, 6] == pytest.approx(0.8414709848) and code[0, 12] == pytest.approx(0.9092974268)


def test_fresh_flows_predict_zero():
    flow, sparse = TinySSFlow(SMALL), TinySLatFlow(SMALL)
    latent = some_latent([5, 9]).to(torch.float32)
    assert flow(torch.randn(2, 4, 4, 4, 4), 0.3, torch.randn(2, 5, 16)).abs().max() == 0
    assert sparse(latent, 0.3, torch.randn(2, 5, 16)).feats.abs().max() == 0


def test_structure_flow_is_equivariant_in_the_batch_and_its_level_may_be_a_number():
    flow = lively(TinySSFlow(SMALL))
    x, condition = torch.randn(3, 4, 4, 4, 4, dtype=torch.float64), torch.randn(3, 6, 16, dtype=torch.float64)
    whole = flow(x, 0.4, condition)
    for row in range(3):
        torch.testing.assert_close(flow(x[row : row + 1], torch.tensor([0.4], dtype=torch.float64), condition[row : row + 1])[0], whole[row])
    assert not torch.allclose(flow(x, torch.tensor([0.4, 0.5, 0.4]), condition)[1], whole[1])


def test_cells_and_tokens_correspond():
    flow = lively(TinySSFlow(SMALL))
    seen = []
    handle = flow.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x = torch.randn(1, 4, 4, 4, 4, dtype=torch.float64)
    flow(x, 0.5, torch.zeros(1, 2, 16, dtype=torch.float64))
    handle.remove()
    expected = flow.input(x[0, :, 1, 2, 3]) + position_code(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 24)
    torch.testing.assert_close(seen[0][0, 1 * 16 + 2 * 4 + 3], expected, atol=1e-6, rtol=0)


def test_packed_objects_do_not_see_each_other():
    flow, latent = lively(TinySLatFlow(SMALL)), some_latent([7, 1, 12])
    condition, sigma = torch.randn(3, 6, 16, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    whole = flow(latent, sigma, condition)
    for number in range(3):
        alone = flow(latent.sample(number), sigma[number : number + 1], condition[number : number + 1])
        torch.testing.assert_close(alone.feats, whole.sample(number).feats)


def test_order_of_voxels_does_not_matter():
    flow, latent = lively(TinySLatFlow(SMALL)), some_latent([20])
    order = torch.randperm(20, generator=generator(3))
    condition = torch.randn(1, 6, 16, dtype=torch.float64)
    shuffled = flow(SparseLatent(latent.coords[order], latent.feats[order], 1), 0.5, condition)
    torch.testing.assert_close(shuffled.feats, flow(latent, 0.5, condition).feats[order])


def test_objects_without_voxels_pass_through():
    flow = lively(TinySLatFlow(SMALL))
    latent = some_latent([4, 0, 3])
    out = flow(latent, 0.5, torch.randn(3, 6, 16, dtype=torch.float64))
    assert out.lengths == [4, 0, 3] and out.feats.isfinite().all()


def test_attention_is_found_by_the_names_of_trellis():
    backbone = new_tiny(0, SMALL)
    for flow in (backbone.ss_flow, backbone.slat_flow):
        found = [(name, module._type) for name, module in flow.named_modules() if getattr(module, "_type", None) in ("self", "cross")]
        assert found == [("blocks.0.attn", "self"), ("blocks.0.cross_attn", "cross")]
        assert flow.blocks[0].attn.q_rms_norm is not None and flow.blocks[0].cross_attn.q_rms_norm is None


@pytest.mark.parametrize("stage", ["vae", "ss", "slat", "flows"])
def test_training_changes_what_it_should_and_repeats_itself(stage):
    data = ProceduralShapes(16, seed=100)
    base = new_tiny(2, SMALL)
    base.ss_vae.normalise(data.tsdf)
    runs = [train_tiny(stage, data, steps=4, seed=3, backbone=copy.deepcopy(base), batch=4, slat_batch=2) for _ in range(2)]
    assert runs[0]["loss"] == runs[1]["loss"] and runs[0]["steps"] == 4
    changed = {name.split(".")[0] for name, value in runs[0]["backbone"].named_parameters() if not torch.equal(value, base.get_parameter(name))}
    wanted = {"vae": {"ss_vae"}, "ss": {"ss_flow"}, "slat": {"slat_flow"}, "flows": {"ss_flow", "slat_flow"}}[stage]
    assert wanted <= changed <= wanted | ({"image_encoder", "label_encoder"} if stage in ("ss", "flows") else set())
    assert all(parameter.requires_grad for parameter in runs[0]["backbone"].parameters()) and not runs[0]["backbone"].training
    if stage == "vae":
        latent = runs[0]["backbone"].ss_vae.encode(data.tsdf)
        torch.testing.assert_close(latent.std((0, 2, 3, 4)), torch.ones(4), atol=1e-2, rtol=0)
        assert not torch.equal(runs[0]["backbone"].slat_std, base.slat_std)


def test_training_lowers_the_loss():
    data = ProceduralShapes(16, seed=100)
    found = train_tiny("vae", data, steps=100, seed=0, backbone=new_tiny(0, SMALL), batch=8, rate=3e-3)
    assert found["curve"][-1]["loss"] < 0.8 * found["curve"][0]["loss"]


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    data = ProceduralShapes(8, seed=100)
    arguments = {"stage": "flows", "dataset": data, "steps": 6, "seed": 1, "batch": 2, "slat_batch": 1}
    whole = train_tiny(backbone=new_tiny(1, SMALL), **arguments)
    seen = []

    def stop(step, metrics):
        seen.append(step)

    first = train_tiny(backbone=new_tiny(1, SMALL), folder=tmp_path / "a", report=stop, **arguments)
    again = train_tiny(backbone=new_tiny(1, SMALL), folder=tmp_path / "a", **arguments)
    for name, value in whole["backbone"].state_dict().items():
        assert torch.equal(value, first["backbone"].state_dict()[name]) and torch.equal(value, again["backbone"].state_dict()[name]), name


def test_save_and_load(tmp_path):
    backbone = new_tiny(4, SMALL)
    path = save(backbone, tmp_path / "deep" / "x.safetensors", recipe={"steps": 3}, curve=[{"step": 1, "loss": 2.0}])
    back = load(path)
    assert back.config == SMALL and about(path)["recipe"] == {"steps": 3} and about(path)["curve"][0]["loss"] == 2.0
    for name, value in back.state_dict().items():
        torch.testing.assert_close(value, backbone.state_dict()[name].half().float(), atol=0, rtol=0)
    assert not any(parameter.requires_grad for parameter in back.parameters())
    with pytest.raises(FileNotFoundError, match="path"):
        load(tmp_path / "y.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "z.safetensors", {"config": json.dumps({"channels": 4})})
    with pytest.raises(ValueError, match="path"):
        load(tmp_path / "z.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="config"):
        load(tmp_path / "w.safetensors")


def test_what_ships_is_small_and_says_how_it_was_made():
    told = about()
    assert shipped().stat().st_size < 3_000_000
    assert told["recipe"]["steps"] >= 3000 and told["recipe"]["steps"] == told["recipe"]["of"] and told["recipe"]["data_seed"] == 100 and told["curve"]


def test_sampling_is_repeatable_and_independent_of_the_batch(model):
    data = ProceduralShapes(2, seed=60, p_rotated=0.0)
    tokens = model.condition(data.images)
    noise = torch.randn(2, *model.ss_vae.latent_shape, generator=generator(1))
    steps = []
    both = sample_ss(model, noise, tokens, steps=4, callback=lambda step, sigma, x, velocity: steps.append(float(sigma)))
    assert steps == pytest.approx([1.0, 0.9, 0.75, 0.5])
    # Sums are taken in another order for another batch.
    torch.testing.assert_close(sample_ss(model, noise[1:], tokens[1:], steps=4), both[1:], atol=1e-4, rtol=1e-4)
    coords = active_voxels(data.tsdf)
    start = SparseLatent(coords, torch.randn(len(coords), 7, generator=generator(2)), 2)
    feats = sample_slat(model, start, tokens, steps=4)
    assert torch.equal(feats.feats, sample_slat(model, start, tokens, steps=4).feats)
    torch.testing.assert_close(sample_slat(model, start.sample(0), tokens[:1], steps=4).feats, feats.sample(0).feats, atol=1e-3, rtol=1e-3)


def test_without_guidance_zeros_are_not_asked(model):
    tokens = model.condition(["mug"])
    noise = torch.randn(1, *model.ss_vae.latent_shape, generator=generator(3))
    sizes = []
    handle = model.ss_flow.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    sample_ss(model, noise, tokens, steps=4, weight=0.0)
    sample_ss(model, noise, tokens, steps=4, weight=3.0, interval=(0.8, 1.0))
    handle.remove()
    assert sizes == [1, 1, 1, 1, 2, 2, 1, 1]


def test_samples_are_of_the_family_that_was_asked_for(model):
    data = ProceduralShapes(8, seed=61)
    found = evaluate_tiny(model, data, seed=1)
    assert found["family_right"] == 1 and found["overlap"] > 0.6 and found["autoencoder_overlap"] > 0.92 and found["empty"] == 0
    assert sum(found[f"pose_{k}"] for k in range(4)) == pytest.approx(1) and found["color_error"] < 0.15
    logits, latent = generate(model, model.condition(list(CATEGORIES)), seed=5)
    assert logits.shape == (8, 16, 16, 16) and torch.equal(latent.coords, active_voxels(logits)) and latent.check(16).batch_size == 8


def test_nearest_shape_finds_a_turned_one():
    bank = ProceduralShapes(16, seed=9)
    indices = torch.tensor([3, 10, 4])
    asked = torch.stack([torch.rot90(bank.tsdf[i], turn, (0, 1)) for i, turn in zip(indices.tolist(), (1, 2, 0))])
    found, turns = nearest_shape(asked, bank)
    assert torch.equal(found, indices) and turns.tolist() == [1, 2, 0]


def test_trial_repeats_itself():
    assert tiny_trial("unguided", 3, shapes=2) == tiny_trial("unguided", 3, shapes=2)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: ImageEncoder()(torch.zeros(2, 3, 32, 32)), ValueError, "images"),
        (lambda: LabelEncoder()(["cars"]), ValueError, "did you mean 'car'"),
        (lambda: LabelEncoder()("car"), TypeError, "names"),
        (lambda: TinySSFlow(SMALL)(torch.zeros(1, 4, 5, 5, 5), 0.5, torch.zeros(1, 2, 16)), ValueError, "x"),
        (lambda: TinySSFlow(SMALL)(torch.zeros(2, 4, 4, 4, 4), torch.zeros(3), torch.zeros(2, 2, 16)), ValueError, "sigma"),
        (lambda: TinySLatFlow(SMALL)(some_latent([3, 3]).to(torch.float32), 0.5, torch.zeros(1, 2, 16)), ValueError, "condition"),
        (lambda: TinySLatFlow(SMALL)(some_latent([3], channels=5).to(torch.float32), 0.5, torch.zeros(1, 2, 16)), ValueError, "feats"),
        (lambda: train_tiny("all", ProceduralShapes(2), steps=1), ValueError, "stage"),
        (lambda: train_tiny("ss", ProceduralShapes(2), steps=0), ValueError, "steps"),
        (lambda: train_tiny("ss", ProceduralShapes(2, resolution=8), steps=1), ValueError, "dataset"),
        (lambda: evaluate_tiny(new_tiny(0, SMALL), ProceduralShapes(2), given="text"), ValueError, "given"),
        (lambda: tiny_trial("words", 0), ValueError, "arm"),
    ],
)
def test_refused(call, error, name):
    with pytest.raises(error, match=name):
        call()
