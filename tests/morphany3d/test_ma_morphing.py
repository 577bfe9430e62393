"""Configurations, schedules, and what `install_morph` does to a trained network."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.config import ConfigError
from papers10.flow.attention import attention_modules
from papers10.flow.cache import StepKV
from papers10.morphany3d import backbone
from papers10.morphany3d.morphing import (
    PRESETS,
    MorphConfig,
    MorphState,
    install_morph,
    interpolated_context,
    schedule_alphas,
)


@pytest.fixture(scope="module")
def model():
    return backbone.load().double().requires_grad_(False)


@pytest.fixture(scope="module")
def ends(model):
    return model.condition(["dog"]), model.condition(["car"])


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(2, 60), schedule=st.sampled_from(["linear", "smoothstep", "beta(2,2)", "beta(0.5,3)"]))
def test_schedules_rise_from_source_to_target(frames, schedule):
    alphas = schedule_alphas(schedule, frames)
    assert len(alphas) == frames and alphas[0] == 0 and alphas[-1] == 1
    assert all(a <= b for a, b in pairwise(alphas))


@pytest.mark.parametrize("schedule", ["lineal", "beta(0,1)", "beta(2)", [0.0, 1.0], [0, 0.5, 1.5], ""])
def test_bad_schedules(schedule):
    with pytest.raises(ValueError, match="schedule"):
        schedule_alphas(schedule, 3)


def test_the_default_is_the_papers_method():
    config = MorphConfig.preset("paper")
    assert config == MorphConfig() and (config.n_frames, config.beta, config.oc) == (50, 0.2, True)
    assert (config.ss_ca, config.slat_ca, config.ss_sa, config.slat_sa) == ("mca", "mca", "tfsa", "tfsa")


def test_presets_are_configurations():
    for name in PRESETS:
        assert MorphConfig.preset(name, n_frames=3).n_frames == 3
    assert MorphConfig.preset("structure").slat_ca == "none" and MorphConfig.preset("detail").ss_ca == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": -0.1}, "beta"), ({"beta": math.nan}, "beta"), ({"n_frames": 1}, "n_frames"), ({"ss_ca": "mac"}, "mca"), ({"oc_angles": (90, 0)}, "angles"), ({"oc_margin": 1.0}, "oc_margin"),
        ({"tfsa_steps": (0.8, 0.2)}, "tfsa_steps"), ({"cfg_interval": (0.0, 1.5)}, "cfg_interval"), ({"cache_device": "disk"}, "cache_folder"), ({"schedule": (0.0, 1.0)}, "schedule"), ({"betta": 0.2}, "beta"),
    ],
)  # fmt: skip
def test_bad_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        MorphConfig(**changes)


def test_an_unknown_preset_lists_the_names():
    with pytest.raises(ValueError, match="kv_both.*did you mean 'official'"):
        MorphConfig.preset("oficial")


def test_official_parameters():
    config = MorphConfig.from_official({"morphing_num": 30, "tfsa_alpha": 0.7, "init_morphing_flag": True, "ss_mca_flag": True, "ss_tfsa_flag": True, "oc_flag": True})
    assert (config.n_frames, config.beta, config.noise_mode, config.slat_noise) == (30, 0.3, "lerp", "nearest")
    assert (config.ss_ca, config.slat_ca, config.ss_sa, config.slat_sa, config.oc, config.endpoints) == ("mca", "none", "tfsa", "none", True, "skip")


@pytest.mark.parametrize("name", ["mca", "kv_ca", "direct", "mca_tfsa"])
def test_endpoints_are_the_plain_network_bit_for_bit(model, ends, name):
    noise = draw(0, 1, *model.ss_vae.latent_shape)
    for alpha, end in zip((0.0, 1.0), ends):
        state = MorphState(cache=StepKV())
        state.blend(alpha, ends)
        with torch.no_grad(), install_morph({"ss": model.ss_flow}, MorphConfig.preset(name), state):
            got = model.ss_flow(noise, 0.7, ends[0])
        assert torch.equal(got, model.ss_flow(noise, 0.7, end))


def test_linear_conditions_are_mixed_keys(model, ends):
    noise, answers = draw(1, 1, *model.ss_vae.latent_shape), {}
    for name, changes in (("kv_ca", {}), ("direct", {"context_interp": "lerp"}), ("direct", {})):
        state = MorphState()
        state.blend(0.4, ends)
        with torch.no_grad(), install_morph({"ss": model.ss_flow}, MorphConfig.preset(name, **changes), state):
            answers[name, *changes] = model.ss_flow(noise, 0.6, ends[0])
    torch.testing.assert_close(answers["direct", "context_interp"], answers["kv_ca",], rtol=0, atol=1e-11)  # rounding of two orders of the same sums
    assert (answers["direct",] - answers["kv_ca",]).abs().max() > 1e-5


def test_text_of_another_length(model):
    images = torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    picture, word = model.condition(images), model.condition(["tree"])
    assert picture.shape[1] != word.shape[1]
    state = MorphState()
    state.blend(0.5, [picture, word])
    noise = draw(2, 1, *model.ss_vae.latent_shape)
    with torch.no_grad(), install_morph({"ss": model.ss_flow}, MorphConfig.preset("mca"), state):
        assert torch.isfinite(model.ss_flow(noise, 0.5, picture)).all()
    for name in ("kv_ca", "direct"):
        with torch.no_grad(), install_morph({"ss": model.ss_flow}, MorphConfig.preset(name), state), pytest.raises(ValueError, match=f"{picture.shape[1]} and {word.shape[1]}"):
            model.ss_flow(noise, 0.5, picture)


def test_nothing_is_left(model, ends):
    names = list(model.state_dict())
    noise = draw(3, 1, *model.ss_vae.latent_shape)
    before = model.ss_flow(noise, 0.5, ends[0])
    handle = install_morph(TwoStages(model), MorphConfig(), MorphState(cache=StepKV()))
    assert {name.split(".")[0] for name in handle.modules} == {"ss", "slat"} and list(model.state_dict()) == names
    handle.remove()
    assert torch.equal(model.ss_flow(noise, 0.5, ends[0]), before)


class TwoStages:
    def __init__(self, model):
        self.model = model

    def models(self):
        return {"ss": self.model.ss_flow, "slat": self.model.slat_flow}


def test_a_block_that_is_not_there(model):
    with pytest.raises(ValueError, match="tfsa_blocks"):
        install_morph({"ss": model.ss_flow}, MorphConfig(tfsa_blocks=("blocks.99.attn",)))
    assert not any("forward" in module.__dict__ for module in attention_modules(model.ss_flow).values())


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_is_checked(alpha, ends):
    with pytest.raises(ValueError, match="alpha"):
        MorphState().blend(alpha, ends)


def test_conditions_on_the_sphere_keep_their_length():
    first, second = draw(4, 1, 5, 8), draw(5, 1, 5, 8)
    first, second = first / first.norm(dim=-1, keepdim=True), second / second.norm(dim=-1, keepdim=True)
    between = interpolated_context([first, second], (0.5, 0.5), "slerp")
    torch.testing.assert_close(between.norm(dim=-1), torch.ones(1, 5, dtype=torch.float64), rtol=0, atol=1e-12)
    zero = interpolated_context([torch.zeros_like(first), second], (0.5, 0.5), "slerp")
    torch.testing.assert_close(zero, 0.5 * second, rtol=0, atol=1e-12)


def test_replaced_conditions_are_seen(model):
    noise, state = draw(6, 1, *model.ss_vae.latent_shape), MorphState()
    with torch.no_grad(), install_morph({"ss": model.ss_flow}, MorphConfig.preset("direct"), state):
        answers = []
        for seed in range(6):
            state.blend(0.5, [draw(10 + seed, 1, 4, 64), draw(20 + seed, 1, 4, 64)])
            answers.append(model.ss_flow(noise, 0.5, state.contexts[0]))
    assert all(not torch.equal(*pair) for pair in pairwise(answers))

