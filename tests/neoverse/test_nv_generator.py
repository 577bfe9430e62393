"""The small generator: codec, zero start of the control branch, schedule, files, trainings, refusals."""

import math

import pytest
import torch

from papers10.flow.schedule import sigma_grid
from papers10.neoverse import generator as g
from papers10.neoverse.degradation import RenderConditions

SMALL = g.GeneratorConfig(dim=24, heads=2, num_layers=3, control_layers=(0, 2), latent_channels=6, embed_channels=8)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conditions(clips=2, frames=5, height=8, width=12):
    draw = torch.Generator().manual_seed(1)
    poses = torch.eye(4).expand(clips, frames, 4, 4).clone()
    poses[..., 0, 3] = torch.linspace(0, 1, frames)
    K = torch.tensor([[10.0, 0, width / 2], [0, 10, height / 2], [0, 0, 1]]).expand(clips, frames, 3, 3)
    rgb, depth = (torch.rand(clips, frames, height, width, n, generator=draw) for n in (3, 1))
    return RenderConditions(rgb, 1 + depth, (depth > 0.5).float(), poses, K)


@pytest.fixture(scope="module")
def model():
    codec = g.PatchCodec(SMALL.latent_channels).fit(conditions(8).rgb)
    torch.manual_seed(0)
    base = g.VideoDiT(SMALL)
    torch.nn.init.normal_(base.head.linear.weight, std=0.2)
    for block in base.blocks:
        torch.nn.init.normal_(block.modulation.linear.bias, std=0.3)
    return g.VideoGenerator(codec, base, g.ControlBranch(base))


def opened(model, scale=0.1):
    branch = g.ControlBranch(model.base)
    branch.load_state_dict(model.branch.state_dict())
    for layer in branch.after_proj:
        torch.nn.init.normal_(layer.weight, std=scale, generator=torch.Generator().manual_seed(3))
    return g.VideoGenerator(model.codec, model.base, branch)


def test_codec_is_exact_with_all_components_and_a_projection_with_fewer():
    video = torch.rand(3, 9, 8, 12, 3, generator=torch.Generator().manual_seed(0))
    full = g.PatchCodec(48).fit(video)
    torch.testing.assert_close(full.decode(full.encode(video)), video, atol=1e-5, rtol=0)
    few = g.PatchCodec(5).fit(video)
    latents = few.encode(video)
    assert latents.shape == (3, 5, 3, 4, 6) and latents.square().mean().item() == pytest.approx(1, abs=1e-4)
    once = few.decode(latents)
    torch.testing.assert_close(few.decode(few.encode(once))[:, 1:], once[:, 1:], atol=1e-5, rtol=0)
    error = [
        (c.decode(c.encode(video)) - video).square().mean().item()
        for c in (g.PatchCodec(n).fit(video) for n in (2, 8, 32))
    ]
    assert error == sorted(error, reverse=True)


def test_fresh_branch_changes_nothing_and_scale_zero_is_the_base(model):
    shown = conditions()
    control, noise = g.control_input(shown, model.codec), model.noise(2, *shown.size)
    alone = model.sample(noise)
    assert torch.equal(model.sample(noise, control), alone)
    trained = opened(model)
    assert not torch.equal(trained.sample(noise, control), alone)
    assert torch.equal(trained.sample(noise, control, control_scale=0.0), alone)
    half, whole = (
        trained.velocity(noise, 0.9, control, control_scale=scale) - model.velocity(noise, 0.9)
        for scale in (1e-4, 2e-4)
    )
    torch.testing.assert_close(whole, 2 * half, atol=2e-5, rtol=0.05)


def test_hints_shapes_and_frozen_base(model):
    control = g.control_input(conditions(), model.codec)
    x, given = model.base.start(model.noise(2, 5, 8, 12), 0.5)
    assert x.shape == (2, 2 * 2 * 3, 24) and [h.shape for h in model.branch(control, x, given)] == [x.shape, x.shape]
    assert control.rgb.shape == control.depth.shape == (2, 6, 2, 4, 6) and control.mask_rays.shape == (2, 7, 5, 8, 12)


def test_batch_and_single_clips_agree(model):
    trained, shown = opened(model), conditions(3)
    both = trained.generate(shown, steps=2, seed=4)
    assert both.shape == (3, 5, 8, 12, 3) and both.min() >= 0 and both.max() <= 1
    torch.testing.assert_close(trained.generate(shown.index([0, 1]), steps=2, seed=4), both[:2], atol=1e-5, rtol=0)
    assert not torch.equal(trained.generate(shown, steps=2, seed=5), both)
    torch.testing.assert_close(trained(shown, "a room", steps=2, seed=4), both)


def test_guidance_moves_away_from_the_answer_without_control(model):
    trained, control, noise = opened(model), g.control_input(conditions(), model.codec), model.noise(2, 5, 8, 12)
    with torch.no_grad():
        without, with_control = trained.velocity(noise, 1.0), trained.velocity(noise, 1.0, control)
    out = trained.codec.decode(noise - (without + 2.0 * (with_control - without)))
    torch.testing.assert_close(
        trained.sample(noise, control, steps=1, guidance_scale=2.0), out.clamp(0, 1), atol=1e-5, rtol=0
    )


def test_file_round_trip(model, tmp_path):
    trained = opened(model)
    trained.student = g.VideoDiT(SMALL)
    trained.save(tmp_path / "model.safetensors")
    back = g.VideoGenerator.load(tmp_path / "model.safetensors")
    assert back.config == SMALL and back.shift == 5.0
    torch.testing.assert_close(
        back.generate(conditions(), steps=3), trained.generate(conditions(), steps=3), atol=0, rtol=0
    )
    assert torch.equal(back.generate(conditions(), steps=4), trained.quick().generate(conditions(), steps=4))
    assert not torch.equal(
        back.generate(conditions(), steps=4),
        g.VideoGenerator(back.codec, back.base, back.branch).generate(conditions(), steps=4),
    )


def test_scheduler_reaches_data_with_the_oracle_and_agrees_with_the_sampler():
    clean, noise = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    for steps in (1, 4, 50):
        scheduler = g.FlowShiftScheduler()
        scheduler.set_timesteps(steps)
        assert torch.allclose(scheduler.sigmas, sigma_grid(steps, 5.0))
        state = noise
        for timestep in scheduler.timesteps:
            state = scheduler.step((state - clean) / (timestep / 1000), timestep, state, return_dict=False)[0]
        torch.testing.assert_close(state, clean, atol=2e-5, rtol=0)
    torch.testing.assert_close(scheduler.scale_noise(clean, 250.0, noise), 0.75 * clean + 0.25 * noise)
    with pytest.raises(ValueError, match="timestep"):
        scheduler.index_for_timestep(1234.0)


def test_scheduler_has_the_levels_of_diffusers():
    pytest.importorskip("diffusers")
    ours = g.FlowShiftScheduler()
    ours.set_timesteps(4)
    theirs = ours.to_diffusers(4)
    torch.testing.assert_close(theirs.timesteps.double(), ours.timesteps, atol=1e-3, rtol=0)
    state, velocity = normal(1, 2, 3), normal(1, 2, 3, seed=1)
    a, b = ours.step(velocity, ours.timesteps[0], state), theirs.step(velocity, theirs.timesteps[0], state)
    torch.testing.assert_close(a.prev_sample, b.prev_sample)


def test_training_lowers_losses_and_distillation_starts_as_the_teacher():
    clips = g.room_clips(3, 6, frames=5, width=12, height=8)
    losses = []
    for steps in (0, 30):
        model, _ = g.train_base(clips, seed=0, config=SMALL, steps=steps, batch=4)
        losses.append(sum(g.loss_by_level(model, clips, None, [0.5, 0.8, 0.95], seed=1)))
    assert losses[1] < losses[0]
    shown, truth = g.degraded_pairs(3, 4, frames=5, width=12, height=8, key_frames=(0, 4))
    before = {k: v.clone() for k, v in model.base.state_dict().items()}
    trained, _ = g.train_control(model, shown, truth, seed=0, steps=30, batch=4)
    assert all(torch.equal(v, before[k]) for k, v in trained.base.state_dict().items())
    assert trained.branch.after_proj[0].weight.abs().max() > 0
    control = g.control_input(shown, trained.codec)
    assert sum(g.loss_by_level(trained, truth, control, [0.8, 0.95], seed=1)) < sum(
        g.loss_by_level(trained, truth, None, [0.8, 0.95], seed=1)
    )
    student, _ = g.distill(trained, clips, seed=0, steps=0, substeps=1)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    again, _ = g.train_base(clips, seed=0, config=SMALL, steps=2, batch=4)
    twice, _ = g.train_base(clips, seed=0, config=SMALL, steps=2, batch=4)
    assert torch.equal(again.base.head.linear.weight, twice.base.head.linear.weight)


def test_trial_returns_numbers():
    out = g.generator_trial(
        "distilled",
        101,
        steps=2,
        control_steps=2,
        distill_steps=1,
        clips=4,
        pairs=2,
        test_clips=2,
        batch=2,
        long_steps=2,
    )
    assert all(isinstance(v, float) and math.isfinite(v) for v in out.values())
    assert out["zero_init_difference"] == 0 and out["scale_zero_difference"] == 0 and "seen_distilled_4" in out


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda m: g.GeneratorConfig(control_layers=(1, 2)), "control_layers"),
        (lambda m: g.GeneratorConfig(embed_channels=12), "embed_channels"),
        (lambda m: SMALL.check_video(8, 8, 12), "nearest: 9 x 8 x 12"),
        (lambda m: SMALL.check_video(9, 10, 12), "nearest: 9 x 8 x 12"),
        (lambda m: m.codec.encode(torch.rand(1, 4, 8, 12, 3)), "video"),
        (lambda m: m.base(torch.rand(1, 5, 2, 4, 4), 0.5), "latents"),
        (lambda m: m.base(torch.rand(1, 6, 2, 3, 4), 0.5), "latents"),
        (lambda m: m.base(torch.rand(1, 6, 2, 4, 4), 0.5, text=torch.rand(1, 2, 3)), "text"),
        (lambda m: m.base(torch.rand(1, 6, 2, 4, 4), 0.5, labels=torch.zeros(1, dtype=torch.int64)), "labels"),
        (lambda m: m.sample(m.noise(1, 5, 8, 12), g.control_input(conditions(), m.codec)), "control"),
        (lambda m: m.generate(conditions(frames=4)), "frames"),
        (lambda m: m.generate(conditions(), steps=0), "steps"),
        (lambda m: m.quick(), "student"),
        (lambda m: g.generator_trial("other", 0), "arm"),
        (lambda m: g.FlowShiftScheduler(shift=0.0), "shift"),
    ],
)
def test_refusals_name_the_argument(model, call, word):
    with pytest.raises(ValueError, match=word):
        call(model)


def test_labels_and_text_are_read():
    base = g.VideoDiT(
        g.GeneratorConfig(
            dim=24, heads=2, num_layers=2, control_layers=(0,), latent_channels=6, num_classes=3, text_dim=5
        )
    )
    torch.nn.init.normal_(base.head.linear.weight, std=0.2)
    for block in base.blocks:
        torch.nn.init.normal_(block.modulation.linear.weight, std=0.2)
        torch.nn.init.normal_(block.cross_attn.to_out.weight, std=0.5)
    z, text = normal(2, 6, 2, 4, 4), normal(2, 3, 5)
    none = base(z, 0.5, text=text)
    assert torch.equal(base(z, 0.5, text=text, labels=torch.tensor([3, 3])), none)
    assert not torch.equal(base(z, 0.5, text=text, labels=torch.tensor([0, 1])), none)
    assert not torch.equal(base(z, 0.5, text=2 * text), none)
