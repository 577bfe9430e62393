"""The Wan generator at full scale, on a miniature that diffusers and transformers make themselves."""

import copy
import json
import pickle
import shutil

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from papers10.core.config import ConfigError, replace
from papers10.core.data import DataMissing
from papers10.core.media import read_video, write_video
from papers10.core.random import generator
from papers10.kernels.common import BackendUnavailable
from papers10.neoverse import full_scale as fs
from papers10.neoverse.degradation import RenderConditions
from papers10.neoverse.generator import ControlInput
from papers10.neoverse.world import SceneSpec, scene_clip


def inputs(batch=1, frames=5, height=32, width=32, seed=0):
    draw = generator(seed, "test input")
    latent = (batch, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    control = ControlInput(torch.randn(latent, generator=draw), torch.randn(latent, generator=draw), torch.randn(batch, 7, frames, height, width, generator=draw))
    return torch.randn(latent, generator=draw), torch.full((batch,), 300.0), torch.randn(batch, 6, 16, generator=draw), control


def rooms(count=1, frames=5, height=32, width=32):
    found = []
    for seed in range(count):
        clip = scene_clip(SceneSpec.random(seed), torch.linspace(0, 1, frames).tolist(), width, height)
        mask = torch.ones(1, frames, height, width, 1)
        found.append(RenderConditions(clip.rgb[None].float(), clip.depth[None, ..., None].float(), mask, clip.camtoworlds[None].float(), clip.Ks[None].float()))
    return RenderConditions.cat(found)


@pytest.fixture(scope="module")
def parts():
    return fs.miniature(0)


@pytest.fixture
def model(parts):
    return copy.deepcopy(parts.transformer)


@pytest.fixture
def moved(model):
    with torch.no_grad():
        for block in model.control.blocks:
            block.after_proj.weight.normal_(std=0.3, generator=generator(1, "after"))
    return model


@pytest.fixture(scope="module")
def release(parts, tmp_path_factory):
    return fs.save_release(parts, tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        clip = scene_clip(SceneSpec.random(number), torch.linspace(0, 1, 11).tolist(), 32, 32)
        write_video(folder / f"room{number}.mp4", clip.rgb, 16)
        (folder / f"room{number}.txt").write_text("a room\n")
    return folder


def tiny(clips, **changes):
    return fs.FullScale(**{**dict(generator="mini", reconstructor="random", data=str(clips), width=32, height=32, num_frames=5, num_keyframes=(2, 3), kernels=None, trans=(0.1, 0.3), iterations=2, lr=1e-3,
                                  precision="float32", device="cpu", devices=1, strategy="single", save_every=1, log_every=1, max_text=8), **changes})


# control branch

def test_untrained_branch_changes_no_bit(model):
    noisy, when, words, control = inputs(2)
    plain = model.base(noisy, when, words, return_dict=False)[0]
    for scale in (1.0, 0.0, [0.3, 2.0]):
        assert torch.equal(model(noisy, when, words, control, scale), plain)
    assert torch.equal(model(noisy, when, words), plain)


def test_same_numbers_as_diffusers_vace(moved):
    noisy, when, words, control = inputs()
    with torch.no_grad():
        theirs = fs.to_vace(moved)(noisy, when, words, control_hidden_states=moved.control.embedding(control), return_dict=False)[0]
        assert torch.equal(moved(noisy, when, words, control), theirs)


def test_first_step_reaches_only_the_last_maps_and_never_wan(model):
    noisy, when, words, control = inputs()
    model(noisy, when, words, control).square().mean().backward()
    reached = {name for name, value in model.control.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0}
    assert reached == {f"blocks.{number}.after_proj.{end}" for number in (0, 1) for end in ("weight", "bias")}
    assert all(value.grad is None and not value.requires_grad for value in model.base.parameters())


def test_recomputing_gives_the_same_gradients(moved):
    noisy, when, words, control = inputs()
    found = []
    for on in (False, True):
        moved.zero_grad()
        moved.enable_checkpointing(on)(noisy, when, words, control).square().mean().backward()
        found.append([value.grad.clone() for value in moved.control.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_sizes_of_the_real_models():
    ghost = fs.build_transformer("14B", seed=None)
    assert sum(p.numel() for p in ghost.base.parameters()) == 14_288_491_584 and sum(p.numel() for p in ghost.control.parameters()) == 3_049_216_192
    assert ghost.control.layers == (0, 5, 10, 15, 20, 25, 30, 35) and fs.token_count(81, 336, 560) == 15435
    latent = torch.empty(1, 16, 21, 42, 70, device="meta")
    tokens = ghost.control.patch_embedding(ghost.control.embedding(ControlInput(latent, latent, torch.empty(1, 7, 81, 336, 560, device="meta"))))
    assert tokens.flatten(2).transpose(1, 2).shape == (1, 15435, 5120)


@pytest.mark.parametrize("change, message", [
    (dict(size="15B"), "size: expected one of"), (dict(control_layers=(1, 2)), "ascending numbers from 0"), (dict(control_layers=(0, 9)), "below 4"), (dict(control_layers=()), "layers: expected"),
])
def test_wrong_models_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fs.build_transformer(**change)


def test_wrong_conditions_are_refused(model):
    noisy, when, words, control = inputs()
    with pytest.raises(ValueError, match="control_scale: expected one number or 2, got 3"):
        model(noisy, when, words, control, [1, 1, 1])
    with pytest.raises(ValueError, match="depth: expected latents"):
        model(noisy, when, words, control._replace(depth=control.depth[:, :8]))
    with pytest.raises(ValueError, match="nearest: 5 x 32 x 32"):
        model(noisy, when, words, control._replace(mask_rays=control.mask_rays[:, :, :4]))
    with pytest.raises(ValueError, match="control: expected 8 tokens"):
        model(noisy, when, words, inputs(height=48)[3])
    with pytest.raises(fs.UnsupportedVersion, match="lacks"):
        fs.WanControlTransformer(torch.nn.Linear(2, 2))


# the release's files

def test_release_comes_back_bit_for_bit(parts, release):
    again, report = fs.load_release(release)
    assert report.complete and len(report.loaded) == len(parts.transformer.state_dict())
    for ours, theirs in zip(parts[:3], again[:3]):
        after = theirs.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in ours.state_dict().items())
    ids = torch.tensor([[3, 4, 1, 0]])
    assert torch.equal(again.text_encoder(ids).last_hidden_state, parts.text_encoder(ids).last_hidden_state)
    assert not any(value.requires_grad for value in again.transformer.base.parameters()) and all(value.requires_grad for value in again.transformer.control.parameters())


def test_half_precision_keeps_norms_and_time_in_float32(release):
    again, _ = fs.load_release(release, dtype=torch.bfloat16)
    base = again.transformer.base
    assert base.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert fs.WanGenerator(again, max_text=8)(rooms(), "a room", steps=1).isfinite().all()
    assert base.blocks[0].norm2.weight.dtype == base.scale_shift_table.dtype == base.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32


def spoiled(release, folder, change):
    from safetensors.torch import load_file, save_file

    shutil.copytree(release, folder)
    last = fs.shard_files(folder)[-1]
    tensors = load_file(last)
    change(tensors)
    save_file(tensors, last)
    return folder


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(max(t)), "missing: 1"), (lambda t: t.update({"blocks.0.adapter": torch.zeros(1)}), "unexpected: 1: blocks.0.adapter"),
    (lambda t: t.update({max(t): torch.zeros(7)}), "reshaped: 1"),
])
def test_incomplete_releases_are_refused_with_a_report(release, tmp_path, change, message):
    folder = spoiled(release, tmp_path / "spoiled", change)
    with pytest.raises(ValueError, match=message):
        fs.load_release(folder)
    assert not fs.load_release(folder, strict=False)[1].complete


def test_missing_files_are_named(release, tmp_path):
    folder = shutil.copytree(release, tmp_path / "less")
    fs.shard_files(folder)[2].unlink()
    with pytest.raises(FileNotFoundError, match="number 3 is missing"):
        fs.load_release(folder)
    (folder / fs.VAE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="Wan2.1_VAE.pth"):
        fs.load_release(folder)
    with pytest.raises(FileNotFoundError, match="got none"):
        fs.shard_files(tmp_path)


def test_pickles_that_want_more_than_tensors_are_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return eval, ("1",)

    (tmp_path / "harm.pth").write_bytes(pickle.dumps({"encoder.conv1.weight": Harm()}))
    with pytest.raises(ValueError, match="expected tensors only in harm.pth"):
        fs.load_vae(tmp_path / "harm.pth")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="tensors of Wan's VAE"):
        fs.load_vae(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="umT5"):
        fs.load_text_encoder(tmp_path / "other.pth")


def test_branch_alone_and_wan_alone(moved, release, tmp_path):
    fs.save_control(moved, tmp_path / "branch")
    fresh = fs.build_transformer("mini", seed=5)
    assert fs.load_shards(fresh, tmp_path / "branch", part="control").complete
    assert all(torch.equal(value, fresh.control.state_dict()[name]) for name, value in moved.control.state_dict().items())
    with pytest.raises(ValueError, match="unexpected"):
        fs.load_shards(fresh, release, part="base")
    assert fs.read_sizes(release) == ({"in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2), "num_layers": 4, "ffn_dim": 48, "text_dim": 16, "freq_dim": 32, "num_attention_heads": 2, "attention_head_dim": 12}, (0, 2))
    with pytest.raises(ValueError, match="no 'patch_embedding.weight'"):
        fs.read_sizes(tmp_path / "branch")


def test_diffusers_layout_gets_a_new_branch(parts, tmp_path):
    for name, part in (("transformer", parts.transformer.base), ("vae", parts.vae), ("text_encoder", parts.text_encoder), ("tokenizer", parts.tokenizer)):
        part.save_pretrained(tmp_path / name)
    again = fs.load_diffusers(tmp_path)
    noisy, when, words, control = inputs()
    assert again.transformer.control.layers == (0, 2)
    assert all(torch.equal(value, again.transformer.base.state_dict()[name]) for name, value in parts.transformer.base.state_dict().items())
    # diffusers maps the file into memory, where products may add up in another order.
    assert torch.allclose(again.transformer(noisy, when, words, control), parts.transformer(noisy, when, words, control), atol=1e-5)
    half = fs.load_diffusers(tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in half.transformer.control.embedding.parameters()} == {torch.bfloat16}
    assert fs.WanGenerator(half, max_text=8)(rooms(), "a room", steps=1).isfinite().all()


# LoRA

def test_lora_does_what_changed_weights_do(moved):
    noisy, when, words, control = inputs()
    before = moved(noisy, when, words, control).detach()
    draw = generator(0, "lora")
    down, up, bias = (torch.randn(shape, generator=draw) for shape in ((2, 24), (48, 2), (48,)))
    merged = copy.deepcopy(moved)
    merged.base.blocks[1].ffn.net[0].proj.weight.data += 0.7 * 4 / 2 * up @ down
    merged.base.blocks[1].ffn.net[0].proj.bias.data += 0.7 * bias
    lead = "diffusion_model.blocks.1.ffn.0"
    stored = {f"{lead}.lora_down.weight": down, f"{lead}.lora_up.weight": up, f"{lead}.alpha": torch.tensor(4.0), f"{lead}.diff_b": bias}
    assert fs.load_lora(moved, stored, scale=0.7) == 1
    with torch.no_grad():
        assert torch.allclose(moved(noisy, when, words, control), merged(noisy, when, words, control), atol=1e-5)
        fs.set_lora(moved, {})
        assert torch.equal(moved(noisy, when, words, control), before)
    with pytest.raises(ValueError, match="there already"):
        fs.load_lora(moved, stored)
    with pytest.raises(ValueError, match="scales: expected one of"):
        fs.set_lora(moved, {"loro": 1.0})


def test_own_lora_starts_at_zero_trains_alone_and_comes_back(model, tmp_path):
    noisy, when, words, control = inputs()
    before = model(noisy, when, words, control).detach()
    own = fs.add_lora(model, 2, alpha=6, targets=("attn1.to_v",))
    assert torch.equal(model(noisy, when, words, control), before) and len(own) == 8
    assert {id(value) for value in model.base.parameters() if value.requires_grad} == {id(value) for value in own}
    with torch.no_grad():
        own[1].normal_(generator=generator(0, "b"))
        changed = model(noisy, when, words, control)
    fresh = fs.miniature(0).transformer
    fs.load_lora(fresh, fs.save_lora(model, tmp_path / "own.safetensors"))
    with torch.no_grad():
        assert torch.allclose(fresh(noisy, when, words, control), changed, atol=1e-6)


@pytest.mark.parametrize("lead, shape, message", [("blocks.7.self_attn.q", (2, 24), "got blocks.7.attn1.to_q"), ("blocks.0.self_attn.q", (2, 5), "expected a LoRA for weights")])
def test_a_lora_of_another_model_is_refused(model, lead, shape, message):
    stored = {f"diffusion_model.{lead}.lora_down.weight": torch.zeros(shape), f"diffusion_model.{lead}.lora_up.weight": torch.zeros(24, 2)}
    with pytest.raises(ValueError, match=message):
        fs.load_lora(model, stored)
    with pytest.raises(FileNotFoundError, match="expected a safetensors file"):
        fs.load_lora(model, "absent.safetensors")


# generation

def test_each_clip_has_its_own_noise_and_scale_zero_is_wan(parts, moved):
    generate = fs.WanGenerator(parts._replace(transformer=moved), max_text=8)
    both = generate(rooms(2), ["a room", "a street"], steps=2)
    assert both.shape == (2, 5, 32, 32, 3)
    assert torch.allclose(generate(rooms(2).index(0), "a room", steps=2)[0], both[0], atol=1e-5)
    assert torch.equal(generate(rooms(1), "a room", steps=2, control_scale=0), generate(None, "a room", steps=2, size=(1, 5, 32, 32)))


def test_low_memory_changes_where_and_not_what(parts, moved):
    some = parts._replace(transformer=moved)
    frames, peaks = [], []
    for mode in fs.LOW_MEMORY:
        generate = fs.WanGenerator(some, low_memory=mode, max_text=8)
        frames.append(generate(rooms(), "a room", steps=1))
        peaks.append(max(generate.resident.values()))
        assert list(generate.resident) == ["text encoder", "VAE", "transformer"]
    assert torch.equal(frames[0], frames[1]) and torch.equal(frames[0], frames[2])
    assert peaks[0] == sum(map(fs.module_bytes, some[:3])) and peaks[1] == max(map(fs.module_bytes, some[:3])) >= peaks[2]


def test_eight_bits_once(model):
    before = fs.module_bytes(model.base)
    assert fs.module_bytes(fs.store_8bit(model).base) < 0.6 * before
    with pytest.raises(ValueError, match="not stored in 8 bits yet"):
        fs.store_8bit(model)


def test_conditions_become_latents_and_rays(parts):
    generate, conditions = fs.WanGenerator(parts, max_text=8), rooms()
    control = generate.encode_conditions(conditions)
    rays = control.mask_rays[0]
    assert torch.equal(rays[0], conditions.mask[0, ..., 0]) and torch.allclose(rays[1:4].norm(dim=0), torch.ones(5, 32, 32), atol=1e-5)
    assert torch.allclose((rays[1:4] * rays[4:7]).sum(0), torch.zeros(5, 32, 32), atol=1e-5)
    raw = parts.vae.encode(2 * conditions.rgb.movedim(-1, 1) - 1).latent_dist.mode()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (parts.vae.config.latents_mean, parts.vae.config.latents_std))
    assert torch.allclose(control.rgb, (raw - mean) / std, atol=1e-5)
    assert torch.allclose(generate.decode(control.rgb), ((parts.vae.decode(raw).sample.movedim(1, -1) + 1) / 2).clamp(0, 1), atol=1e-4)


def test_text_is_cleaned_and_padded_with_zeros(parts):
    generate = fs.WanGenerator(parts, max_text=8)
    words = generate.encode_text(["a  room", "a room &amp; a street with two moving things and a red light"])
    assert words.shape == (2, 8, 16) and torch.equal(words[0, 3:], torch.zeros(5, 16)) and words[1].abs().sum(-1).gt(0).all()
    assert fs.clean_text(" a &amp;amp; b\n c ") == "a & b c"


@pytest.mark.parametrize("change, message", [
    (dict(size=(1, 5, 32, 32)), "size: expected"), (dict(prompts=["a", "b"]), "prompts: expected 1"), (dict(conditions=None), "size: expected"),
    (dict(conditions=None, size=(1, 6, 32, 32)), "nearest: 5 x 32 x 32"), (dict(guidance_scale=float("nan")), "scale"), (dict(steps=0), "steps"),
])
def test_wrong_requests_are_refused(parts, change, message):
    with pytest.raises(ValueError, match=message):
        fs.WanGenerator(parts, max_text=8)(**{"conditions": rooms(), "prompts": "a room", **change})


def test_unknown_mode_is_refused(parts):
    with pytest.raises(ValueError, match="low_memory: expected one of"):
        fs.WanGenerator(parts, low_memory="all")


# data

def test_three_layouts_of_clips(clips, tmp_path):
    assert [(clip.name, clip.caption) for clip in fs.clip_files(clips)] == [(f"room{number}", "a room") for number in range(3)]
    listed = tmp_path / "listed"
    listed.mkdir()
    shutil.copy(clips / "room1.mp4", listed)
    (listed / "metadata.jsonl").write_text(json.dumps({"file_name": "room1.mp4", "text": "one"}) + "\n")
    assert fs.clip_files(listed)[0].caption == "one"
    (listed / "metadata.jsonl").write_text(json.dumps({"file_name": "room1.mp4"}) + "\n")
    with pytest.raises(ValueError, match="row 0: expected one of the columns prompt"):
        fs.clip_files(listed)
    (listed / "metadata.jsonl").write_text(json.dumps({"file_name": "room9.mp4", "text": "nine"}) + "\n")
    with pytest.raises(FileNotFoundError, match="row 0"):
        fs.clip_files(listed)
    spatial = tmp_path / "spatial"
    for part in ("videos/group_0001", "annotations/group_0001/a", "data/train"):
        (spatial / part).mkdir(parents=True)
    shutil.copy(clips / "room0.mp4", spatial / "videos/group_0001/a.mp4")
    (spatial / "annotations/group_0001/a/caption.json").write_text(json.dumps({"SceneSummary": "short", "SceneDescription": "long"}))
    (spatial / "data/train/SpatialVID_HQ_metadata.csv").write_text("id,group id,num frames\na,1,11\nb,2,11\n")
    assert [(clip.name, clip.caption) for clip in fs.clip_files(spatial)] == [("a", "long")]


def test_clips_that_cannot_be_used_are_refused(clips, tmp_path):
    with pytest.raises(FileNotFoundError, match="folder of clips"):
        fs.clip_files(tmp_path / "absent")
    with pytest.raises(ValueError, match="got none"):
        fs.clip_files(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="expected a video"):
        fs.count_frames(tmp_path / "broken.mp4")
    with pytest.raises(ValueError, match="at least 13 frames, got 11"):
        next(fs.TrainingClips(fs.clip_files(clips), 13, 32, 32, keys=(2, 3)))
    with pytest.raises(ValueError, match="keys: expected"):
        fs.TrainingClips(fs.clip_files(clips), 5, 32, 32)


def test_samples_depend_on_seed_and_number_alone(clips):
    files = fs.clip_files(clips)
    options = dict(frames=5, height=32, width=32, keys=(2, 4))
    first = fs.TrainingClips(files, batch=3, **options)
    one, two = next(first), next(first)
    assert sorted(one.names) == sorted(two.names) == ["room0", "room1", "room2"] and one.frames.shape == (3, 5, 32, 32, 3)
    later = fs.TrainingClips(files, batch=3, **options)
    later.load_state_dict({"drawn": 1})
    assert torch.equal(next(later).frames, two.frames) and later.state_dict() == {"drawn": 2}
    shares = [next(fs.TrainingClips(files, rank=rank, world=3, **options)).frames for rank in range(3)]
    assert torch.equal(torch.cat(shares), one.frames)
    assert one.keys[0] == 0 and one.keys[-1] == 4
    still = fs.TrainingClips(files, reverse=0, max_stride=1, **options).sample(0)[1]
    assert torch.equal(fs.TrainingClips(files, reverse=1, max_stride=1, **options).sample(0)[1], still.flip(0))


# training

def test_a_pair_hides_all_but_key_frames_and_repeats(parts, clips):
    settings = tiny(clips)
    batch = next(fs.TrainingClips(fs.clip_files(clips), 5, 32, 32, keys=(2, 3)))
    reconstructor = fs.frozen_reconstructor("random")
    pairs = [fs.training_pair(batch, fs.WanGenerator(parts, max_text=8), reconstructor, fs.degradation_of(settings), settings) for _ in range(2)]
    assert torch.equal(pairs[0].control.rgb, pairs[1].control.rgb) and pairs[0].numbers == pairs[1].numbers
    assert pairs[0].conditions.mask[:, [frame for frame in range(5) if frame not in batch.keys]].sum() == 0
    nothing = fs.training_pair(batch, fs.WanGenerator(parts, max_text=8), reconstructor, fs.degradation_of(settings), replace(settings, cond_drop=1.0, prompt_drop=1.0))
    assert nothing.prompts == [""] and nothing.control.mask_rays.abs().sum() == 0 and torch.equal(nothing.latents, pairs[0].latents)


def test_training_goes_on_exactly(clips, tmp_path):
    whole = fs.train_generator(tiny(clips), tmp_path / "run")
    file = tmp_path / "run" / "control" / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "generator" / "step-00000002")
    assert fs.train_generator(tiny(clips).model_dump(), tmp_path / "run")["loss"] == whole["loss"] and file.read_bytes() == before
    stored = torch.load(tmp_path / "run" / "checkpoints" / "generator" / "step-00000002" / "extras.pt", weights_only=True)
    assert stored[0]["batches"] == {"drawn": 2}
    with pytest.raises(ValueError, match="lr"):
        fs.train_generator(tiny(clips, lr=1e-2), tmp_path / "run")


def test_half_precision_trains_a_float32_branch(clips, tmp_path):
    from safetensors.torch import load_file

    result = fs.train_generator(tiny(clips, precision="bfloat16", iterations=1, sample_every=1, steps=1, low_memory="components"), tmp_path / "run")
    assert read_video(tmp_path / "run/samples/step-00000001.mp4").frames.shape == (5, 32, 96, 3)

    assert result["loss"] > 0 and all(value.dtype == torch.float32 for value in load_file(tmp_path / "run/control/diffusion_pytorch_model.safetensors").values())


# cost, needs, refusals

def test_parameters_and_flops_are_those_of_the_classes(model):
    from torch.utils.flop_counter import FlopCounterMode

    assert fs.wan_parameters(fs.WAN_SIZES["mini"], 2) == tuple(sum(p.numel() for p in part.parameters()) for part in (model.base, model.control))
    # The counter knows attention on the meta device, but not torch's own form of it for processors.
    ghost, (noisy, when, words, control) = fs.build_transformer("mini", seed=None), inputs()
    control = ControlInput(*(part.to("meta") for part in control))
    with torch.no_grad():
        with FlopCounterMode(display=False) as plain:
            ghost(noisy.to("meta"), when.to("meta"), words.to("meta"))
        with FlopCounterMode(display=False) as both:
            ghost(noisy.to("meta"), when.to("meta"), words.to("meta"), control)
    base, branch = fs.wan_flops(fs.WAN_SIZES["mini"], 5, 32, 32, control_layers=2, text=6)
    assert base == plain.get_total_flops() and branch == both.get_total_flops() - plain.get_total_flops()


def test_estimates_of_the_paper():
    base, branch = fs.wan_flops(fs.WAN_SIZES["14B"], 81, 336, 560, control_layers=8)
    assert base == pytest.approx(572.9e12, rel=1e-3) and branch == pytest.approx(121.9e12, rel=1e-3)
    for keys, whole, together in ((11, 31e12, 11e12), (21, 79e12, 41e12), (81, 753e12, 603e12)):
        found = fs.reconstructor_flops(keys, 336, 560)
        assert found == pytest.approx((whole, together), rel=0.05)
    paper = fs.FullScale()
    assert fs.estimate(paper).hours == pytest.approx(50_000 * fs.estimate(paper).seconds / 3600)
    assert fs.estimate(replace(paper, optimizer="zero")).memory["its moments"] == fs.estimate(paper).memory["its moments"] / 32
    assert fs.estimate(replace(paper, gradient_checkpointing=False)).memory["kept for gradients"] > 10 * fs.estimate(paper).memory["kept for gradients"]
    with pytest.raises(ValueError, match="card: expected one of"):
        fs.estimate(paper, card="A100")


def test_sizes_are_read_from_folders(release, parts, tmp_path, clips):
    assert fs.sizes_of(tiny(clips, generator=str(release)))[1] == 2
    parts.transformer.base.save_pretrained(tmp_path / "transformer")
    assert fs.estimate(tiny(clips, generator=str(tmp_path))).parameters["Wan"] == sum(p.numel() for p in parts.transformer.base.parameters())


def test_needs_name_memory_time_and_licences():
    text = fs.needs(fs.FullScale())
    for part in ("108 GB", "50000 steps", "Tencent", "CC-BY-NC-SA-4.0", "papers10[data,fast,flow,dist]"):
        assert part in text
    assert "your own" in fs.needs(fs.FullScale(generator="/absent"))


@pytest.mark.parametrize("change, error, message", [
    (dict(num_frames=6), ValueError, "nearest: 5"), (dict(num_keyframes=(3, 9)), ValueError, "num_keyframes"), (dict(optimizer="zero"), ValueError, "several devices"),
    (dict(data="/absent"), (DataMissing, FileNotFoundError), "absent"), (dict(lora="absent.safetensors"), FileNotFoundError, "lora"), (dict(generator="neoverse"), DataMissing, "papers10 data get neoverse"),
    (dict(device="cuda"), BackendUnavailable, "GPU"),
])
def test_what_would_fail_later_fails_at_once(clips, change, error, message):
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(error, match=message):
        fs.check(tiny(clips, **change))


def test_unknown_settings_are_refused(clips):
    with pytest.raises(ConfigError, match="num_frames"):
        tiny(clips, num_frame=5)
    found = fs.from_parameters({"seeds": [0], "lr": 1e-4, "other": 1}, device="cuda:0")
    assert found.lr == 1e-4 and found.device == "cuda"


def test_a_folder_of_clips_becomes_a_folder_of_films(clips, tmp_path):
    result = fs.generate_clips(tiny(clips, stage="infer", steps=1), tmp_path, trajectory="pan_left", limit=1)
    assert result["clips"] == 1 and set(result["seconds"]) >= {"reconstruct", "render", "generate"} and (tmp_path / "room0.mp4").is_file()
    assert fs.generate_clips(tiny(clips, stage="infer", steps=1), tmp_path, limit=1)["seconds"] == {}


class Notes:
    """What a run of `core.runs` takes."""

    device = "cpu"

    def __init__(self, folder):
        self.folder, self.metrics = folder, {}

    def metric(self, name, value, **options):
        self.metrics[name] = value

    def data(self, name, **options):
        pass


@pytest.mark.parametrize("stage", ["train_gen", "infer"])
def test_each_stage_of_the_chapters_run(clips, tmp_path, stage, capsys):
    parameters = tiny(clips, stage=stage, steps=1, iterations=1).model_dump()
    run = Notes(tmp_path)
    result = fs.run_full_scale(run, {**parameters, "seeds": [3], "other": None})[3]
    wanted = {"train_gen": "generator.loss", "infer": "infer.generate"}[stage]
    assert run.metrics[wanted] > 0 and result and "licence" in capsys.readouterr().out


def test_the_reconstructors_stages_go_to_their_own_page(monkeypatch, tmp_path):
    from papers10.neoverse import reconstructor_training

    monkeypatch.setattr(reconstructor_training, "run_reconstruction", lambda run, parameters: parameters["stage"], raising=False)
    assert [fs.run_full_scale(Notes(tmp_path), {"stage": stage, "seeds": [0]}) for stage in ("train_recon", "eval")] == ["train_recon", "eval"]
