"""TRELLIS, TRELLIS.2, Hi3DGen and words on a miniature of their published layout: the laws of the method, the sampler's calls, loading, refusals; the real package where it is installed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "miniatures"))
import trellis_miniature as miniature

from papers10.core.data import DataMissing
from papers10.core.random import generator
from papers10.flow.attention import MultiConditionProcessor, TemporalFusedProcessor, install
from papers10.flow.cache import StepKV
from papers10.flow.guidance import Guidance
from papers10.flow.sampler import euler, invert_euler
from papers10.flow.schedule import sigma_grid
from papers10.morphany3d.morphing import MorphConfig, MorphState, install_morph
from papers10.morphany3d.pipeline import Backbone, MorphPipeline, NonFiniteError
from papers10.morphany3d.trellis import (
    Dinov2Tokens,
    SamplerSettings,
    Trellis2Adapter,
    TrellisAdapter,
    check_release,
    follow,
    from_pretrained,
    gaussians_of,
    mesh_of,
    open_picture,
    read_sampler,
    write_sampler,
)

FIRST = {"steps": 25, "cfg_strength": 5.0, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0}
SECOND = {
    "steps": 12,
    "guidance_strength": 7.5,
    "guidance_interval": [0.6, 1.0],
    "guidance_rescale": 0.7,
    "rescale_t": 5.0,
}
GENERATORS = ("trellis", "trellis2", "words", "hi3dgen")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoints")
    miniature.write_trellis(place / "trellis", steps=3)
    miniature.write_trellis2(place / "trellis2", steps=3)
    miniature.write_trellis(place / "words", steps=3, kind="TrellisTextTo3DPipeline")
    miniature.write_trellis(place / "hi3dgen", steps=3, kind="Hi3DGenPipeline")
    return place


def load(folder, name):
    kind = json.loads((folder / name / "pipeline.json").read_text())["name"]
    pipe = getattr(miniature, kind).from_pretrained(folder / name)
    return Trellis2Adapter(pipe) if name == "trellis2" else TrellisAdapter(pipe)


@pytest.fixture(scope="module")
def adapters(folder):
    return {name: load(folder, name) for name in GENERATORS}


def contexts(adapter):
    assets = ["a chair", "two dogs"] if adapter.takes_text else [miniature.picture("red"), miniature.picture("blue")]
    return [tokens[None] for tokens in adapter.condition(assets)]


class Stage:
    """One stage of a generator with fixed noise, on voxels of the generator's own."""

    def __init__(self, adapter, stage):
        self.adapter, self.stage, self.model = adapter, stage, adapter.models()[stage]
        self.first, self.second = contexts(adapter)
        self.noise, self.coords, self.given = self.draw(adapter, "ss", 1), None, {}
        for name in adapter.stages[: adapter.stages.index(stage)]:
            made = adapter.sample(name, self.noise, self.first, MorphState(), coords=self.coords, given=self.given)
            if name == "ss":
                self.coords = adapter.voxels(adapter.decode_structure(made))
            else:
                self.given = {**self.given, name: made}
            following = adapter.stages[adapter.stages.index(name) + 1]
            self.noise = self.draw(adapter, following, len(self.coords))

    @staticmethod
    def draw(adapter, stage, rows, seed=0):
        return torch.randn(rows, *adapter.noise_shape(stage), generator=generator(seed, "test", stage))

    def run(self, state=None, context=None, processors=None, noise=None):
        state, context = MorphState() if state is None else state, self.first if context is None else context
        noise = self.noise if noise is None else noise
        handle = install(self.model, processors) if processors else None
        try:
            return self.adapter.sample(self.stage, noise, context, state, coords=self.coords, given=self.given)
        finally:
            if handle is not None:
                handle.remove()

    def blended(self, weights, pair):
        state = MorphState(contexts=list(pair), weights=weights)
        return self.run(state, pair[0], {"cross": MultiConditionProcessor(state)})

    def remembering(self, state, noise=None):
        return self.run(state, processors={"self": TemporalFusedProcessor(state)}, noise=noise)


EVERY = [("trellis", "ss"), ("trellis", "slat"), ("trellis2", "ss"), ("trellis2", "shape"), ("trellis2", "texture")]
EVERY += [("words", "ss"), ("hi3dgen", "slat")]


@pytest.fixture(scope="module", params=EVERY, ids="-".join)
def stage(request, adapters):
    return Stage(adapters[request.param[0]], request.param[1])


# The laws


def test_all_weight_on_one_condition_is_the_plain_run_with_it_bit_for_bit(stage):
    assert torch.equal(stage.blended((1.0, 0.0), (stage.first, stage.second)), stage.run())
    assert torch.equal(stage.blended((0.0, 1.0), (stage.first, stage.second)), stage.run(context=stage.second))


def test_equal_conditions_are_one_condition(stage):
    # float32 through three steps with guidance 6: rounding grows to about 1e-5
    difference = stage.blended((0.3, 0.7), (stage.first, stage.first.clone())) - stage.run()
    assert difference.abs().max() < 2e-4


def test_a_morph_lies_elsewhere(stage):
    assert (stage.blended((0.4, 0.6), (stage.first, stage.second)) - stage.run()).abs().max() > 1e-2


def test_beta_zero_reads_and_writes_no_cache(stage):
    state = MorphState(beta=0.0, cache=StepKV())
    assert torch.equal(stage.remembering(state), stage.run())
    assert (state.cache.reads, state.cache.writes, len(state.cache)) == (0, 0, 0)


def test_the_same_frame_again_changes_nothing_and_another_frame_does(stage):
    state = MorphState(beta=0.2, cache=StepKV())
    first = stage.remembering(state)
    assert torch.equal(first, stage.run())
    state.cache.advance()
    assert (stage.remembering(state) - first).abs().max() < 2e-4
    state.cache.advance()
    other = stage.noise + 0.5 * Stage.draw(stage.adapter, stage.stage, len(stage.noise), seed=3)
    assert (stage.remembering(state, other) - stage.run(noise=other)).abs().max() > 1e-3


def test_cache_holds_every_step_and_block_of_the_conditional_calls_only(stage):
    state = MorphState(beta=0.2, cache=StepKV())
    stage.remembering(state)
    steps, blocks = stage.adapter.settings[stage.stage].steps, len(stage.model.blocks)
    assert state.cache.writes == len(state.cache) == steps * blocks
    assert {place[0] for place in state.cache.places()} == {stage.stage}


def test_the_unconditional_branch_is_not_touched(stage):
    seen = {"plain": [], "patched": []}

    def note(name):
        state = MorphState(contexts=[stage.first, stage.second], weights=(0.5, 0.5), beta=0.3, cache=StepKV())

        def hook(module, arguments, output):
            if state.branch == "uncond" and not seen[name]:
                seen[name].append((arguments[0], getattr(output, "feats", output).clone()))

        handle = stage.model.register_forward_hook(hook)
        both = {"self": TemporalFusedProcessor(state), "cross": MultiConditionProcessor(state)}
        stage.run(state, processors=both if name == "patched" else None)
        handle.remove()

    note("plain"), note("patched")
    if not seen["plain"]:
        assert stage.adapter.settings[stage.stage].guidance.scale == 1  # no unconditional call at all
        return
    # The first unconditional call starts from the same noise in both runs.
    assert torch.equal(seen["plain"][0][1], seen["patched"][0][1])


def test_remove_restores_the_bits_and_names_stay(stage):
    names, plain = list(stage.model.state_dict()), stage.run()
    state = MorphState(contexts=[stage.first, stage.second], weights=(0.5, 0.5), beta=0.3, cache=StepKV())
    config = MorphConfig.preset("paper")
    state.beta = 0.3
    handle = install_morph({stage.stage if stage.stage == "ss" else "slat": stage.model}, config, state)
    assert list(stage.model.state_dict()) == names
    changed = stage.run(state)
    handle.remove()
    assert list(stage.model.state_dict()) == names and torch.equal(stage.run(), plain)
    assert (changed - plain).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "turns_matter"), [("trellis", False), ("trellis2", True)])
def test_order_of_kept_keys_never_matters_and_places_only_where_there_are_rotations(adapters, name, turns_matter):
    stage = Stage(adapters[name], "ss")
    assert stage.adapter.rotary is turns_matter

    def second_frame(change):
        state = MorphState(beta=0.5, cache=StepKV())
        stage.remembering(state)
        change(state.cache)
        state.cache.advance()
        return stage.remembering(state, Stage.draw(stage.adapter, "ss", 1, seed=4))

    def permute(cache):
        order = torch.randperm(miniature.SIDE**3, generator=generator(1, "order"))
        for place in list(cache.places()):
            tensors = cache._entries[place]["tensors"]
            for key in ("keys", "values"):
                tensors[key] = tensors[key][:, :, order]
            if "positions" in tensors:
                tensors["positions"] = tensors["positions"][order]

    plain = second_frame(lambda cache: None)
    assert (second_frame(permute) - plain).abs().max() < 1e-4  # another order of sums
    turned = second_frame(lambda cache: cache.rotate("ss", 1, miniature.SIDE))
    assert bool((turned - plain).abs().max() > 1e-3) is turns_matter
    if not turns_matter:
        assert torch.equal(turned, plain)


def test_turning_the_kept_places_is_turning_the_kept_object(adapters):
    """With rotary positions: keys made at turned places are the keys of a turned object."""
    attention = adapters["trellis2"].models()["ss"].blocks[0].self_attn
    side, phases = miniature.SIDE, adapters["trellis2"].models()["ss"].rope_phases
    x = torch.randn(1, side**3, miniature.WIDTH, generator=generator(2, "turn"))
    grid = torch.arange(side**3).reshape(side, side, side)
    order = torch.rot90(grid, 1, dims=(0, 1)).reshape(-1)  # token i of the turned object is token order[i]

    def look_back(before, turns):
        state = MorphState(beta=1.0, cache=StepKV())
        with torch.no_grad(), install(torch.nn.ModuleDict({"one": attention}), {"self": TemporalFusedProcessor(state)}):
            attention(before, phases=phases)
            state.cache.rotate("", turns, side)
            state.cache.advance()
            return attention(x, phases=phases)

    before = torch.randn(1, side**3, miniature.WIDTH, generator=generator(3, "turn"))
    torch.testing.assert_close(look_back(before, 1), look_back(before[:, order], 0), rtol=0, atol=1e-5)


# One whole block in float64 against the formulas, two calls each


def _normed(x, gamma):
    return F.normalize(x, dim=-1) * gamma * x.shape[-1] ** 0.5


def _heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(-3, -2)


def _attend(q, k, v):
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(-3, -2).flatten(-2)


def _turn(x, places, base=10000.0):
    """Rotation written out: pairs of features turn by place times frequency, axis after axis."""
    count = x.shape[-1] // 2 // 3
    frequencies = base ** -(torch.arange(count, dtype=torch.float32) / count)
    angles = (places[:, :, None].float() * frequencies).flatten(1).double()
    angles = F.pad(angles, (0, x.shape[-1] // 2 - angles.shape[1]))
    a, b = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)
    return turned.flatten(-2)


def _self_attention(module, x, keys_of, places=None, key_places=None):
    q, k, v = (_heads(part, module.num_heads) for part in (module.to_qkv(x).chunk(3, -1)))
    _, k, v = (_heads(part, module.num_heads) for part in (module.to_qkv(keys_of).chunk(3, -1)))
    gamma = [norm.gamma[:, None] for norm in (module.q_rms_norm, module.k_rms_norm)]
    q, k = _normed(q, gamma[0]), _normed(k, gamma[1])
    if places is not None:
        q, k = _turn(q, places), _turn(k, key_places)
    return module.to_out(_attend(q, k, v))


def _cross_attention(module, x, context):
    q, (k, v) = (
        _heads(module.to_q(x), module.num_heads),
        (_heads(p, module.num_heads) for p in module.to_kv(context).chunk(2, -1)),
    )
    if module.qk_rms_norm:
        q, k = _normed(q, module.q_rms_norm.gamma[:, None]), _normed(k, module.k_rms_norm.gamma[:, None])
    return module.to_out(_attend(q, k, v))


def _block(block, x, mod, source, target, before, alpha, beta, *, places=None, before_places=None):
    """The official two-call block: self-attention twice, cross-attention twice, outputs mixed after the output layer. before: what the earlier frame's self-attention was given."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in mod.chunk(6, -1))
    norm = lambda values: F.layer_norm(values, values.shape[-1:], eps=1e-6)
    h = norm(x) * (1 + scale1) + shift1
    own = _self_attention(block.self_attn, h, h, places, places)
    fused = (
        own
        if before is None
        else (1 - beta) * own + beta * _self_attention(block.self_attn, h, before, places, before_places)
    )
    x = x + gate1 * fused
    h2 = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, eps=1e-6)
    x = (
        x
        + (1 - alpha) * _cross_attention(block.cross_attn, h2, source)
        + alpha * _cross_attention(block.cross_attn, h2, target)
    )
    return x + gate2 * block.mlp(norm(x) * (1 + scale2) + shift2), h


@pytest.mark.parametrize("name", ["trellis", "trellis2"])
def test_a_dense_block_is_the_two_call_block_in_float64(folder, name):
    model = load(folder, name).models()["ss"].double()
    block, tokens = model.blocks[1], miniature.SIDE**3
    draw = lambda *shape: torch.randn(*shape, generator=generator(7, *shape), dtype=torch.float64)
    x, earlier, time = (
        draw(2, tokens, miniature.WIDTH),
        draw(2, tokens, miniature.WIDTH) + 1,
        draw(2, 6 * miniature.WIDTH),
    )
    source, target = draw(2, 5, miniature.CONDITION), draw(2, 9, miniature.CONDITION)
    if name == "trellis2":
        mod, extra, places = time + block.modulation, (model.rope_phases,), miniature._grid(miniature.SIDE)
    else:
        time = draw(2, miniature.WIDTH)
        mod, extra, places = block.adaLN_modulation(time), (), None
    alpha, beta = 0.3, 0.2
    state = MorphState(contexts=[source, target], weights=(1 - alpha, alpha), beta=beta, cache=StepKV())
    with (
        torch.no_grad(),
        install(model, {"self": TemporalFusedProcessor(state), "cross": MultiConditionProcessor(state)}),
    ):
        first = block(earlier, time, source, *extra)
        state.cache.advance()
        second = block(x, time, source, *extra)
    with torch.no_grad():
        wanted_first, kept = _block(block, earlier, mod, source, target, None, alpha, beta, places=places)
        wanted, _ = _block(block, x, mod, source, target, kept, alpha, beta, places=places, before_places=places)
    # float64 apart from the phases, which the module keeps in float32
    torch.testing.assert_close(first, wanted_first, rtol=1e-6 if extra else 1e-10, atol=1e-6 if extra else 1e-10)
    torch.testing.assert_close(second, wanted, rtol=1e-6 if extra else 1e-10, atol=1e-6 if extra else 1e-10)


@pytest.mark.parametrize("name", ["trellis", "trellis2"])
def test_a_sparse_block_is_the_two_call_block_in_float64_though_token_sets_differ(folder, name):
    adapter = load(folder, name)
    model = adapter.models()[adapter.stages[1]].double()
    block = model.blocks[0]

    def tokens(count, seed):
        """Two samples of different sizes."""
        rng = generator(seed, "sparse")
        places = [
            miniature._grid(8)[torch.randperm(512, generator=rng)[: count + extra].sort().values] for extra in (0, 5)
        ]
        coords = torch.cat([torch.cat((torch.full((len(part), 1), i), part), 1) for i, part in enumerate(places)]).int()
        return miniature.SparseTensor(
            torch.randn(len(coords), miniature.WIDTH, generator=rng, dtype=torch.float64), coords
        )

    draw = lambda *shape: torch.randn(*shape, generator=generator(8, *shape), dtype=torch.float64)
    x, earlier, second_generation = tokens(20, 1), tokens(33, 2), name == "trellis2"
    source, target, time = (
        draw(2, 5, miniature.CONDITION),
        draw(2, 9, miniature.CONDITION),
        draw(2, (6 if second_generation else 1) * miniature.WIDTH),
    )
    mod = time + block.modulation if second_generation else block.adaLN_modulation(time)
    state = MorphState(contexts=[source, target], weights=(0.6, 0.4), beta=0.2, cache=StepKV())
    with (
        torch.no_grad(),
        install(model, {"self": TemporalFusedProcessor(state), "cross": MultiConditionProcessor(state)}),
    ):
        block(earlier, time, source)
        state.cache.advance()
        found = block(x, time, source)
    for sample in range(2):
        mine, theirs = x.layout[sample], earlier.layout[sample]
        places = (x.coords[mine, 1:], earlier.coords[theirs, 1:]) if second_generation else (None, None)
        own = slice(sample, sample + 1)
        with torch.no_grad():
            _, kept = _block(
                block, earlier.feats[theirs][None], mod[own], source[own], target[own], None, 0.4, 0.2, places=places[1]
            )
            wanted, _ = _block(
                block,
                x.feats[mine][None],
                mod[own],
                source[own],
                target[own],
                kept,
                0.4,
                0.2,
                places=places[0],
                before_places=places[1],
            )
        tolerance = 1e-6 if second_generation else 1e-10
        torch.testing.assert_close(found.feats[mine], wanted[0], rtol=tolerance, atol=tolerance)


# Samplers


def test_the_two_guidance_forms_are_read_and_written_under_their_own_names():
    first, second = read_sampler(FIRST), read_sampler(SECOND)
    assert (first.steps, first.shift, first.guidance.scale, first.guidance.interval) == (25, 3.0, 6.0, (0.5, 1.0))
    assert (second.guidance.scale, second.guidance.rescale) == (7.5, 0.7)
    assert write_sampler(first, 1) == FIRST and write_sampler(second, 2) == SECOND
    assert write_sampler(first, 2)["guidance_strength"] == 6.0
    assert (
        read_sampler({"steps": 4}).guidance.scale == 4.0
        and read_sampler({"guidance_interval": [0, 1]}).guidance.scale == 3.0
    )
    with pytest.raises(ValueError, match="one generation"):
        read_sampler({**FIRST, "guidance_strength": 6.0})
    with pytest.raises(ValueError, match="cfg_scale"):
        read_sampler({"cfg_scale": 5.0})
    with pytest.raises(ValueError, match="rescale"):
        write_sampler(second, 1)
    with pytest.raises(ValueError, match="generation"):
        write_sampler(first, 3)
    with pytest.raises((TypeError, ValueError), match="steps"):
        SamplerSettings(steps=0)


class Line(torch.nn.Module):
    """A velocity that depends on everything, and says which branch it was told."""

    def __init__(self):
        super().__init__()
        self.state, self.rows = None, []

    def forward(self, x, times, condition):
        if self.state is not None:
            self.rows.append((self.state.stage, self.state.step, round(self.state.sigma, 9), self.state.branch))
        return (
            0.3 * x + times.to(x)[:, None, None, None, None] / 1000 + condition.mean((1, 2))[:, None, None, None, None]
        )


@pytest.mark.parametrize(
    ("generation", "parameters"), [(1, FIRST), (2, {**SECOND, "guidance_rescale": 0.0}), (2, SECOND)]
)
def test_their_samplers_are_our_sampler_with_guidance(generation, parameters):
    sampler = {1: miniature.FlowEulerGuidanceIntervalSampler, 2: miniature.FlowEulerGuidanceIntervalSampler2}[
        generation
    ](1e-5)
    settings, network = read_sampler(parameters), Line()
    noise = torch.randn(2, 3, 4, 4, 4, generator=generator(0, "sampler"), dtype=torch.float64)
    condition = torch.randn(2, 5, 6, generator=generator(1, "sampler"), dtype=torch.float64)
    theirs = sampler.sample(
        network, noise, cond=condition, neg_cond=torch.zeros_like(condition), verbose=False, **parameters
    ).samples

    def velocity(x, sigma, branches):
        times = torch.full((2,), 1000 * float(sigma), dtype=torch.float64)
        return torch.stack(
            [network(x, times, condition if branch else torch.zeros_like(condition)) for branch in branches]
        )

    ours = euler(velocity, noise, sigma_grid(settings.steps, settings.shift), guidance=settings.guidance)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # their times are float32


@pytest.mark.parametrize(("kind", "parameters", "unconditional"), [
    (miniature.FlowEulerGuidanceIntervalSampler, FIRST, 19),
    (miniature.FlowEulerCfgSampler, {"steps": 5, "cfg_strength": 2.0}, 5),
    (miniature.FlowEulerSampler, {"steps": 5}, 0),
    (miniature.FlowEulerGuidanceIntervalSampler2, SECOND, 10),
    (miniature.FlowEulerGuidanceIntervalSampler2, {**SECOND, "guidance_strength": 1.0}, 0),
])  # fmt: skip
def test_follow_says_step_noise_level_and_branch(kind, parameters, unconditional):
    sampler, network, state = kind(1e-5), Line(), MorphState()
    network.state = state
    cond = torch.ones(2, 3, 4)
    options = {} if kind is miniature.FlowEulerSampler else {"neg_cond": torch.zeros(2, 3, 4)}
    with follow(sampler, state, "slat"):
        noise = torch.randn(2, 1, 2, 2, 2, generator=generator(0, "follow"))
        sampler.sample(network, noise, cond=cond, verbose=False, **options, **parameters)
    grid = sigma_grid(parameters["steps"], parameters.get("rescale_t", 1.0))
    conditional = [row for row in network.rows if row[3] == "cond"]
    assert [row[:3] for row in conditional] == [
        ("slat", i, round(float(grid[i]), 9)) for i in range(parameters["steps"])
    ]
    assert sum(row[3] == "uncond" for row in network.rows) == unconditional
    assert "_inference_model" not in vars(sampler) and state.branch == "cond"


def test_only_an_unconditional_call_is_one_and_repeated_conditions_are_told_apart():
    network, state = Line(), MorphState()
    network.state = state
    second = miniature.FlowEulerGuidanceIntervalSampler2(1e-5)
    with follow(second, state, "ss"):
        second.sample(
            network,
            torch.zeros(1, 1, 2, 2, 2),
            cond=torch.ones(1, 3, 4),
            neg_cond=torch.zeros(1, 3, 4),
            steps=4,
            guidance_strength=0.0,
            guidance_interval=(0.6, 1.0),
        )
    assert [row[3] for row in network.rows] == ["uncond", "uncond", "cond", "cond"]  # σ = 1, .75 | .5, .25
    network.rows.clear()
    first = miniature.FlowEulerGuidanceIntervalSampler(1e-5)
    with follow(first, state, "ss"):  # one condition for three samples: the sampler repeats it
        first.sample(
            network,
            torch.zeros(3, 1, 2, 2, 2),
            cond=torch.ones(1, 3, 4),
            neg_cond=torch.zeros(1, 3, 4),
            steps=2,
            cfg_strength=1.0,
            cfg_interval=(0.0, 1.0),
        )
    assert [row[3] for row in network.rows] == ["cond", "uncond"] * 2


def test_follow_refuses_and_cleans_up():
    sampler, state = miniature.FlowEulerSampler(1e-5), MorphState()
    with pytest.raises(ValueError, match="_inference_model"), follow(object(), state, "ss"):
        pass
    with follow(sampler, state, "ss"), pytest.raises(ValueError, match="nobody follows"), follow(sampler, state, "ss"):
        pass
    with pytest.raises(NonFiniteError) as caught, follow(sampler, state, "ss"):
        sampler.sample(lambda x, t, c: x / 0, torch.zeros(1, 1, 2, 2, 2), cond=torch.zeros(1, 1, 1), steps=2)
    assert "'ss'" in str(caught.value) and caught.value.step == 0 and "_inference_model" not in vars(sampler)


def test_settings_of_a_configuration_win_and_w_becomes_g(adapters):
    config = MorphConfig(steps=7, slat_steps=9, cfg_strength=2.0, cfg_interval=(0.1, 0.9), rescale_t=4.0)
    for name in ("trellis", "trellis2"):
        adapter = adapters[name]
        last = adapter.stages[-1]
        assert adapter.sampler("ss", config).steps == 7 and adapter.sampler(last, config).steps == 9
        assert (
            adapter.sampler("ss", config).guidance.scale == 3.0
            and adapter.sampler("ss", MorphConfig()) == adapter.settings["ss"]
        )
    assert write_sampler(adapters["trellis2"].sampler("ss", config), 2)["guidance_strength"] == 3.0
    assert write_sampler(adapters["trellis"].sampler("ss", config), 1)["cfg_strength"] == 2.0
    assert adapters["trellis2"].sampler("ss", config).guidance.rescale == 0.7


# Adapters


@pytest.mark.parametrize("name", GENERATORS)
def test_an_adapter_is_a_backbone_and_changes_nothing(adapters, name):
    adapter = adapters[name]
    assert isinstance(adapter, Backbone)
    pipe, (context, _) = adapter.pipe, contexts(adapter)
    noise = Stage.draw(adapter, "ss", 1)
    own = adapter.sample("ss", noise, context, MorphState())
    negative = pipe.text_cond_model["null_cond"] if adapter.takes_text else torch.zeros_like(context)
    theirs = pipe.sparse_structure_sampler.sample(
        pipe.models["sparse_structure_flow_model"],
        noise,
        cond=context,
        neg_cond=negative,
        verbose=False,
        **pipe.sparse_structure_sampler_params,
    )
    assert torch.equal(own, theirs.samples)
    coords = adapter.voxels(adapter.decode_structure(own))
    decoded = pipe.models["sparse_structure_decoder"](own) > 0
    if name == "trellis2":
        decoded = F.max_pool3d(decoded.float(), 2) > 0.5
    assert torch.equal(coords, torch.argwhere(decoded)[:, [0, 2, 3, 4]].int()) and coords.dtype == torch.int32


def test_texture_reads_the_shape_on_the_networks_own_scale(adapters):
    stage = Stage(adapters["trellis2"], "texture")
    pipe, shape = stage.adapter.pipe, stage.given["shape"]
    own = stage.run()
    mean, std = (torch.tensor(pipe.shape_slat_normalization[name]) for name in ("mean", "std"))
    theirs = pipe.tex_slat_sampler.sample(
        stage.model, stage.adapter.sparse(stage.noise, stage.coords), cond=stage.first, neg_cond=torch.zeros_like(stage.first),
        concat_cond=stage.adapter.sparse((shape - mean) / std, stage.coords), verbose=False, **pipe.tex_slat_sampler_params,
    ).samples  # fmt: skip
    mean, std = (torch.tensor(pipe.tex_slat_normalization[name]) for name in ("mean", "std"))
    assert torch.equal(own, theirs.feats * std + mean)
    assert stage.adapter.noise_shape("texture") == (6,)


def test_batches_are_their_samples(adapters):
    adapter = adapters["trellis"]
    both = torch.cat(contexts(adapter))
    noise = torch.cat([Stage.draw(adapter, "ss", 1, seed) for seed in (0, 1)])
    together = adapter.sample("ss", noise, both, MorphState())
    alone = torch.cat([adapter.sample("ss", noise[i : i + 1], both[i : i + 1], MorphState()) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    coords = adapter.voxels(adapter.decode_structure(alone))
    tokens = Stage.draw(adapter, "slat", len(coords))
    packed = adapter.sample("slat", tokens, both, MorphState(), coords=coords)
    for i in range(2):
        rows = coords[:, 0] == i
        own = coords[rows].clone()
        own[:, 0] = 0
        torch.testing.assert_close(
            packed[rows],
            adapter.sample("slat", tokens[rows], both[i : i + 1], MorphState(), coords=own),
            rtol=0,
            atol=1e-4,
        )


def test_inversion_finds_the_noise_again(adapters):
    stage = Stage(adapters["trellis"], "ss")
    adapter = stage.adapter
    velocity = lambda x, sigma: adapter.velocity("ss", x, sigma, stage.first)
    grid = sigma_grid(30, 1.0)
    with torch.no_grad():
        clean = euler(velocity, stage.noise, grid)
        noise = invert_euler(velocity, clean, grid, iterations=8)
        again = euler(velocity, noise, grid)
    assert (again - clean).abs().max() < 1e-3  # what eight fixed-point rounds leave in float32
    latent = Stage(adapter, "slat")
    assert adapter.velocity("slat", latent.noise, 0.5, latent.first, coords=latent.coords).shape == latent.noise.shape


@pytest.mark.parametrize(
    ("name", "formats"),
    [("trellis", ("mesh", "gaussian", "radiance")), ("trellis2", ("mesh",)), ("hi3dgen", ("mesh",))],
)
def test_decoded_objects(adapters, name, formats):
    adapter = adapters[name]
    assert adapter.formats == formats
    stage = Stage(adapter, adapter.stages[-1])
    features = {**stage.given, stage.stage: stage.run()}
    made = adapter.decode(torch.zeros(16, 16, 16), stage.coords, features, formats)
    mesh = made["mesh"].check()
    assert (
        mesh.vertices.abs().max() <= 0.5 + 1e-6
        and mesh.colors is not None
        and 0 <= mesh.colors.min() <= mesh.colors.max() <= 1
    )
    if "gaussian" in formats:
        found = made["gaussian"].check()
        assert len(found) == len(stage.coords) and found.sh.shape[1:] == (1, 3)
        torch.testing.assert_close(found.quats.norm(dim=-1), torch.ones(len(found)))
    with pytest.raises(ValueError, match="formats"):
        adapter.decode(torch.zeros(16, 16, 16), stage.coords, features, ("points",))
    with pytest.raises(ValueError, match="features"):
        adapter.decode(torch.zeros(16, 16, 16), stage.coords, {}, ("mesh",))


def test_colours_of_a_mesh_with_voxels_and_of_one_without_colours():
    vertices, faces = torch.rand(5, 3) - 0.5, torch.tensor([[0, 1, 2]])
    assert mesh_of(miniature.MeshExtractResult(vertices, faces)).colors is None
    colours = torch.tensor([[1.0, 0, 0, 0.5, 0.5, 1], [0, 1.0, 0, 0.5, 0.5, 1]])
    places, corners = torch.tensor([[0, 0, 0], [3, 3, 3]]), torch.tensor([[-0.4] * 3, [0.4] * 3, [0.3, 0.4, 0.4]])
    voxels = miniature.MeshWithVoxel(
        corners, faces, [-0.5] * 3, 1 / 4, places, colours, None, {"base_color": slice(0, 3)}
    )
    torch.testing.assert_close(mesh_of(voxels).colors, torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]]))
    given = miniature.Gaussian(
        torch.full((2, 3), 0.75), torch.zeros(2, 1, 3), torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 1)
    )
    found = gaussians_of(given)
    torch.testing.assert_close(found.means, torch.full((2, 3), 0.25))
    torch.testing.assert_close(found.quats, torch.tensor([[1.0, 0, 0, 0]]).expand(2, 4))
    torch.testing.assert_close(found.scales, torch.full((2, 3), 0.02))  # softplus of its inverse
    torch.testing.assert_close(found.opacities, torch.full((2,), 0.1))


@pytest.mark.parametrize(("asset", "error", "message"), [
    ("nowhere.png", FileNotFoundError, "nowhere.png"),
    (7, TypeError, "int"),
    (torch.zeros(4, 4, 2), TypeError, "Tensor"),
    (torch.zeros(4, 4, 4), ValueError, "transparent"),
])  # fmt: skip
def test_pictures_that_are_none(asset, error, message):
    with pytest.raises(error, match=message):
        open_picture(asset)


def test_pictures_come_in_many_forms(adapters, tmp_path):
    picture = miniature.picture("green")
    picture.save(tmp_path / "green.png")
    numbers = torch.from_numpy(np.asarray(picture).copy())
    for asset in (tmp_path / "green.png", str(tmp_path / "green.png"), numbers, numbers.float() / 255, numbers.numpy()):
        assert torch.equal(adapters["trellis"].condition([asset])[0], adapters["trellis"].condition([picture])[0])


def test_a_picture_without_alpha_needs_a_remover_or_is_kept(adapters):
    picture = miniature.picture("red").convert("RGB")
    for name in ("trellis", "trellis2"):
        with pytest.raises(ImportError, match="background='keep'"):
            adapters[name].condition([picture])
    kept = TrellisAdapter(adapters["trellis"].pipe, background="keep")
    assert kept.condition([picture])[0].shape == (21, miniature.CONDITION)


@pytest.mark.parametrize("call", [
    lambda a: a["words"].condition([miniature.picture("red")]),
    lambda a: a["trellis"].sample("slat", torch.zeros(1, 4, 4, 4, 4), torch.zeros(1, 2, 24), MorphState()),
    lambda a: a["trellis"].sample("ss", torch.zeros(2, 4, 4, 4, 4), torch.zeros(1, 2, 24), MorphState()),
    lambda a: a["trellis"].sample("ss", torch.zeros(1, 4, 4, 4, 4), torch.zeros(1, 2, 24), MorphState(), coords=torch.zeros(1, 4, dtype=torch.int32)),
    lambda a: a["trellis"].sample("slat", torch.zeros(3, 8), torch.zeros(2, 2, 24), MorphState(), coords=torch.zeros(3, 4, dtype=torch.int32)),
    lambda a: a["trellis2"].sample("texture", torch.zeros(3, 6), torch.zeros(1, 2, 24), MorphState(), coords=torch.zeros(3, 4, dtype=torch.int32)),
    lambda a: a["trellis"].noise_shape("shape"),
    lambda a: TrellisAdapter(a["trellis2"].pipe),
    lambda a: Trellis2Adapter(a["trellis2"].pipe, kind="1024_cascade"),
    lambda a: Trellis2Adapter(a["trellis2"].pipe, kind="1024"),
    lambda a: TrellisAdapter(a["trellis"].pipe, settings={"texture": SamplerSettings()}),
    lambda a: TrellisAdapter(a["trellis"].pipe, background="blur"),
])  # fmt: skip
def test_refusals(adapters, call):
    with pytest.raises((TypeError, ValueError), match="expected"):
        call(adapters)


# Whole morphs


@pytest.mark.parametrize("name", GENERATORS)
def test_a_whole_morph_has_plain_ends(adapters, name):
    adapter = adapters[name]
    pipeline = MorphPipeline(adapter)
    ends = ["a chair", "two dogs"] if adapter.takes_text else [miniature.picture("red"), miniature.picture("blue")]
    frames = list(pipeline.morph(*ends, MorphConfig(n_frames=3), formats=("mesh",)))
    assert [frame.index for frame in frames] == [0, 1, 2] and all(len(frame.coords) for frame in frames)
    assert set(frames[1].latents) == set(adapter.stages[1:]) and frames[1].mesh.vertices.shape[1] == 3
    for frame, end in ((frames[0], 0), (frames[2], 1)):
        own = list(pipeline.morph(ends[end], ends[end], MorphConfig(n_frames=2, oc=False), formats=()))
        if end == 0:
            assert torch.equal(own[0].coords, frame.coords) and torch.equal(own[0].features, frame.features)
    assert not any("forward" in vars(module) for model in adapter.models().values() for module in model.modules())


def test_mixed_keys_of_tokens_that_are_cells_of_voxels(adapters):
    """TRELLIS joins 2³ voxels before its attentions: keys of the endpoints' runs are looked up among these cells."""
    pipeline, ends = MorphPipeline(adapters["trellis"]), [miniature.picture("red"), miniature.picture("blue")]
    frames = list(pipeline.morph(*ends, MorphConfig.preset("kv_both", n_frames=3), formats=()))
    assert len(frames) == 3 and all(torch.isfinite(frame.features).all() for frame in frames)


def test_prompts_of_other_length_morph_and_mixed_keys_refuse_them(adapters, monkeypatch):
    adapter = adapters["words"]
    source, target = contexts(adapter)
    stage, longer = Stage(adapter, "ss"), torch.cat((target, target[:, :3]), 1)
    assert torch.isfinite(stage.blended((0.5, 0.5), (source, longer))).all()
    config = MorphConfig.preset("kv_ca", n_frames=2)
    state = MorphState(contexts=[source, longer], weights=(0.5, 0.5))
    with install_morph(adapter, config, state), pytest.raises(ValueError, match="12 and 15"):
        adapter.sample("ss", stage.noise, source, state)


# Loading


def test_loading_from_a_folder_through_the_package(folder, capsys):
    with miniature.as_package("trellis", "trellis2", "hi3dgen"):
        assert check_release(folder / "trellis", device="cpu") == ("trellis", "TrellisImageTo3DPipeline")
        loaded = {name: from_pretrained(folder / name, device="cpu") for name in GENERATORS}
    assert [loaded[name].name for name in GENERATORS] == ["trellis", "trellis2", "trellis", "trellis"] and loaded[
        "words"
    ].takes_text
    assert "trellis" not in sys.modules


@pytest.mark.parametrize(("change", "error", "message"), [
    ({}, ImportError, "clone https://github.com/microsoft/TRELLIS"),
    ({"name": "OtherPipeline"}, ValueError, "OtherPipeline"),
    ({"broken": "{"}, ValueError, "pipeline.json with a name"),
    ({"gone": True}, FileNotFoundError, "pipeline.json"),
    ({"id": "microsoft/TRELLIS-image-large"}, DataMissing, "papers10 data get trellis-image-large"),
    ({"id": "microsoft/TRELLIS-imgae-large"}, DataMissing, "did you mean"),
])  # fmt: skip
def test_what_is_missing_is_said(folder, tmp_path, change, error, message, monkeypatch):
    monkeypatch.setenv("PAPERS10_HOME", str(tmp_path / "home"))
    config = json.loads((folder / "trellis" / "pipeline.json").read_text())
    if not change.get("gone"):
        (tmp_path / "pipeline.json").write_text(
            change.get("broken") or json.dumps({**config, "name": change.get("name", config["name"])})
        )
    with pytest.raises(error, match=message):
        from_pretrained(change.get("id", tmp_path), device="cpu")


def test_a_card_is_asked_for_before_anything_is_loaded(folder):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with miniature.as_package("trellis"), pytest.raises(RuntimeError, match="CUDA"):
        from_pretrained(folder / "trellis")


def test_dinov2_of_transformers_gives_the_tokens_before_the_last_norm(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=miniature.CONDITION,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        num_register_tokens=4,
    )
    model = transformers.Dinov2WithRegistersModel(config)
    encoder = Dinov2Tokens(model)
    images = torch.randn(2, 3, 56, 56, generator=generator(0, "pictures"))
    with torch.no_grad():
        out = encoder(images, is_training=True)
        torch.testing.assert_close(
            model.layernorm(out["x_prenorm"]), model(images).last_hidden_state, rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            torch.cat((out["x_norm_clstoken"][:, None], out["x_norm_regtokens"], out["x_norm_patchtokens"]), 1),
            model(images).last_hidden_state,
            rtol=0,
            atol=1e-6,
        )
    assert out["x_prenorm"].shape == (2, 1 + 4 + 16, miniature.CONDITION)
    # It can stand where the package's encoder stood.
    adapter = load(folder, "trellis")
    adapter.pipe.models["image_cond_model"] = encoder
    assert adapter.condition([miniature.picture("red")])[0].shape == (21, miniature.CONDITION)


def test_guidance_of_settings_is_the_familys():
    assert read_sampler(FIRST).guidance == Guidance(6.0, (0.5, 1.0), None, 1e-5)


# The real package, where it is installed


def _real():
    modulated = pytest.importorskip(
        "trellis.modules.transformer.modulated", reason="the package trellis is not installed"
    )
    return modulated.ModulatedTransformerCrossBlock


def test_the_real_block_is_the_miniatures_and_can_be_patched():
    block = _real()(miniature.WIDTH, miniature.CONDITION, num_heads=2, qk_rms_norm=True)
    own = miniature.ModulatedTransformerCrossBlock(miniature.WIDTH, miniature.CONDITION, num_heads=2, qk_rms_norm=True)
    miniature._fill(own, 0, "block")
    block.load_state_dict(own.state_dict())
    assert list(block.state_dict()) == list(own.state_dict())
    draw = lambda *shape: torch.randn(*shape, generator=generator(9, *shape))
    x, time, source, target = (
        draw(2, 16, miniature.WIDTH),
        draw(2, miniature.WIDTH),
        draw(2, 5, miniature.CONDITION),
        draw(2, 9, miniature.CONDITION),
    )
    for module in (block, own):
        module.found = []
        state = MorphState(contexts=[source, target], weights=(0.3, 0.7), beta=0.2, cache=StepKV())
        with torch.no_grad():
            module.found.append(module(x, time, source))
            with install(module, {"self": TemporalFusedProcessor(state), "cross": MultiConditionProcessor(state)}):
                module.found.append(module(x + 1, time, source))
                state.cache.advance()
                module.found.append(module(x, time, source))
    for theirs, ours in zip(block.found, own.found):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)  # float32, two attention backends
