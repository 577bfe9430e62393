"""Moving primitives, splits and density strategies."""

import math

import pytest
import torch

from papers10.adagar.scene import (
    DefaultGaborStrategy,
    GaborSplats,
    MCMCGaborStrategy,
    apply_to_optimizers,
    relocated,
    split_rows,
)
from papers10.core import loop


def model(n=6, frames=9, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    splats = GaborSplats(n, frames, **options)
    with torch.no_grad():
        for value in splats.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
        splats.means[:, 2] = 1 + torch.rand(n, generator=generator)
        splats.log_scales.fill_(math.log(0.15))
        splats.opacities.fill_(1.0)
    return splats


@pytest.mark.parametrize("motion", ["hermite", "linear", "cubic", "poly_fourier"])
def test_batch_of_times_is_a_loop_over_times(motion):
    splats = model(motion=motion)
    times = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64)
    together = splats.render(times, 30, 22, channels=("color",)).color
    for index, t in enumerate(times):
        torch.testing.assert_close(together[index], splats.render(float(t), 30, 22).color[0], atol=1e-5, rtol=1e-5)


def test_one_frame_has_one_knot_and_no_curvature():
    splats = model(frames=1)
    assert splats.position_knots.shape[1] == 1 and splats.curvature() == 0
    assert splats.render(0.0, 8, 6).color.shape == (1, 6, 8, 3)


def test_still_scene_has_no_curvature_and_uniform_motion_neither():
    splats = model()
    with torch.no_grad():
        splats.position_knots[:] = torch.linspace(0, 1, splats.position_knots.shape[1])[:, None]
        splats.rotation_knots.zero_()
    assert splats.curvature() < 1e-10
    with torch.no_grad():
        splats.position_knots[:, 0] += 1
    assert splats.curvature() > 0


def test_curvature_is_per_frame():
    # x = t^2 over T frames: the second derivative is 2 in clip units, 2/(T-1)^2 a frame.
    splats = GaborSplats(1, 21, n_knots=21)
    with torch.no_grad():
        splats.position_knots[0, :, 0] = torch.linspace(0, 1, 21) ** 2
    assert splats.curvature().item() == pytest.approx(4 / 20**4, rel=0.1)


def test_split_keeps_waves_in_pixels_and_clone_keeps_everything():
    splats = model(n_waves=2)
    rows, changes = split_rows(splats.params(), torch.tensor([1, 4]), random=torch.Generator().manual_seed(0))
    assert rows.tolist() == [0, 2, 3, 5, 1, 4, 1, 4]
    parents = rows[4:]
    torch.testing.assert_close(changes["waves"][4:] / changes["log_scales"][4:, None].exp(), splats.waves[parents] / splats.log_scales[parents, None].exp())
    before = {name: value.clone() for name, value in splats.params().items()}
    splats.clone(torch.tensor([2]))
    assert len(splats) == 7 and all(torch.equal(value[6], before[name][2]) for name, value in splats.params().items())


def test_phase_of_a_child_continues_the_stripes():
    splats = model(1, n_waves=1)
    with torch.no_grad():
        splats.quats.copy_(torch.tensor([[1.0, 0, 0, 0]]))
    _rows, changes = split_rows(splats.params(), torch.tensor([0]), random=torch.Generator().manual_seed(1))
    offset = changes["means"] - splats.means
    wave = splats.waves[0, 0] / splats.log_scales[0].exp()
    torch.testing.assert_close(changes["wave_phases"][:, 0], splats.wave_phases[0, 0] + offset @ wave)


def test_child_of_a_turning_primitive_stays_on_its_pattern():
    splats = model(1, n_waves=1, motion="linear", n_knots=3)
    with torch.no_grad():
        splats.rotation_knots.copy_(torch.tensor([[[0.0, 0, 0], [0, 0, 0.9], [0.4, 0, 1.5]]]))
    rows, changes = split_rows(splats.params(), torch.tensor([0]), random=torch.Generator().manual_seed(1))
    children = GaborSplats(1, 9, n_waves=1, motion="linear", n_knots=3)
    children.load_state_dict(splats.state_dict())
    children.take(rows, changes)
    for t in (0.0, 0.5, 1.0):
        parent, child = splats.at(t), children.at(t)
        from papers10.splat.rotations import quat_conjugate, rotate

        inside = rotate(quat_conjugate(parent.quats).expand(2, 4), child.means - parent.means) / parent.scales
        torch.testing.assert_close(child.wave_phases[:, 0], parent.wave_phases[0, 0] + inside @ parent.waves[0, 0], atol=1e-5, rtol=1e-5)


def test_rows_are_chosen_by_numbers_or_masks():
    mask = torch.tensor([True, False, False, True, False, False])
    for kind in ("prune", "clone", "split"):
        first, second = model(n_waves=1), model(n_waves=1)
        getattr(first, kind)(mask)
        getattr(second, kind)(torch.tensor([0, 3]))
        assert len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    for wrong in (torch.tensor([7]), torch.tensor([True]), torch.tensor([0.5])):
        with pytest.raises(ValueError, match="index"):
            model().prune(wrong)


def test_prune_and_empty_scene():
    splats = model()
    splats.prune(torch.ones(6, dtype=torch.bool))
    assert len(splats) == 0 and not splats.render(0.5, 6, 5).color.any() and splats.curvature() == 0


def test_state_dict_round_trip():
    first, second = model(seed=1, attributes={"mask": 1}), GaborSplats(6, 9, attributes={"mask": 1})
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.render(0.3, 12, 9).color, second.render(0.3, 12, 9).color)


def test_relocation_of_one_copy_changes_nothing():
    splats = model()
    unchanged = relocated(splats.params(), torch.ones(6, dtype=torch.long))
    assert all(torch.equal(value, splats.params()[name]) for name, value in unchanged.items())


def test_relocated_copies_add_up_at_the_centre():
    splats = model(1)
    for copies in (2, 5):
        shared = relocated(splats.params(), torch.tensor([copies]))["opacities"].sigmoid().item()
        assert 1 - (1 - shared) ** copies == pytest.approx(splats.opacities.sigmoid().item(), abs=1e-5)


@pytest.mark.parametrize("n, cap", [(40, 25), (10, 12)])
def test_mcmc_keeps_its_cap_also_when_the_start_exceeds_it(n, cap):
    splats = model(n)
    with torch.no_grad():
        splats.opacities.copy_(torch.linspace(-8, 3, n))
    strategy = MCMCGaborStrategy(cap, refine_start=0)
    for step in (100, 200, 300):
        change = strategy.decide(splats.params(), strategy.initialize_state(), step)
        if change is not None:
            splats.take(change.rows, change.values)
    assert len(splats) <= cap
    assert (splats.opacities.sigmoid() > 0.002).all()


def test_mcmc_noise_moves_only_faint_ones():
    splats = model(2)
    with torch.no_grad():
        splats.opacities.copy_(torch.tensor([-8.0, 4.0]))
    before = splats.means.detach().clone()
    MCMCGaborStrategy(5).perturb(splats.params(), 1, 1e-5)
    moved = (splats.means - before).norm(dim=-1)
    assert moved[0] > 1e-3 and moved[1] < 1e-3 * moved[0]


def test_default_strategy_grows_prunes_and_resets_with_the_optimizer():
    splats = model(8)
    with torch.no_grad():
        splats.opacities[0] = -9.0
    strategy = DefaultGaborStrategy(refine_start=0, refine_every=1, reset_every=3, grow_grad2d=0.0, grow_scale=1.0, n_max=12)
    params = splats.params()
    optimizers = {name: torch.optim.Adam([value], lr=1e-3) for name, value in params.items() if value.requires_grad}
    state = strategy.initialize_state()
    view = splats.render(0.5, 20, 16)
    strategy.step_pre_backward(params, optimizers, state, 1, view.meta)
    view.color.square().sum().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    strategy.step_post_backward(params, optimizers, state, 1, view.meta)
    assert 8 <= len(params["means"]) <= 12 and (params["opacities"].sigmoid() > 0.005).all()
    moments = optimizers["means"].state[params["means"]]["exp_avg"]
    assert moments.shape == params["means"].shape and (moments[-1] == 0).all() and moments[0].any()
    change = strategy.decide(params, strategy.initialize_state(), 3)
    apply_to_optimizers(change, params, optimizers)
    assert (params["opacities"].sigmoid() <= 0.0101).all()


def test_strategy_in_the_shared_loop():
    splats = model(8)
    strategy = DefaultGaborStrategy(refine_start=1, refine_every=1, refine_stop=4, grow_grad2d=0.0, grow_scale=1.0, n_max=20)
    memory, seen = strategy.initialize_state(), {}
    optimizer = torch.optim.Adam([value for value in splats.parameters() if value.requires_grad], lr=1e-3)
    state = loop.TrainState(model=splats, optimizer=optimizer, batches=[0])

    def step(state, _):
        view = state.model.render(0.5, 20, 16)
        strategy.step_pre_backward(None, None, memory, state.step, view.meta)
        seen["info"] = view.meta
        return {"loss": (view.color - 0.5).square().mean()}

    def after(state):
        from papers10.adagar.scene import apply_to_state

        strategy.accumulate(memory, seen["info"])
        change = strategy.decide(state.model.params(), memory, state.step)
        if change is not None:
            apply_to_state(change, state)

    loop.train(state, step, loop.LoopConfig(steps=6, log_every=1), after_step=[after])
    assert len(state.model) == 20 and all(len(value) == 20 for value in state.model.params().values())


def test_check_sanity():
    params = dict(model().params())
    DefaultGaborStrategy().check_sanity(params)
    with pytest.raises(ValueError, match="waves"):
        DefaultGaborStrategy().check_sanity({name: value for name, value in params.items() if name != "waves"})
    params["means"] = params["means"][:3]
    with pytest.raises(ValueError, match="as many rows"):
        DefaultGaborStrategy().check_sanity(params)


@pytest.mark.parametrize("call, message", [
    (lambda: GaborSplats(-1, 3), "n"),
    (lambda: GaborSplats(3, 0), "n_frames"),
    (lambda: GaborSplats(3, 3, motion="hermit"), "motion"),
    (lambda: GaborSplats(3, 3, gamma=2.0), "gamma"),
    (lambda: model().at(1.5), "t"),
    (lambda: model().rebuilt(torch.tensor([0]), {"mean": torch.zeros(1, 3)}), "changes"),
    (lambda: model().rebuilt(torch.tensor([0]), {"means": torch.zeros(2, 3)}), "changes"),
    (lambda: DefaultGaborStrategy(n_max=0), "n_max"),
    (lambda: MCMCGaborStrategy(0), "cap_max"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
