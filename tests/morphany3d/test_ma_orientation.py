"""Quarter turns, orientation correction and its statistics: known values, invariants, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.kernels.knn import knn
from papers10.morphany3d.orientation import (
    EmptyStructureError,
    correct_sequence,
    orientation_correct,
    orientation_jumps,
    orientation_trial,
    path_length,
    plot_jumps,
    plot_rose,
    pose_prior,
    rotate_coords_yaw,
    rotate_grid_yaw,
    spontaneous_jumps,
    turned_sequences,
)


def voxels(resolution, seed, share=0.3):
    return (torch.rand((resolution,) * 3, generator=torch.Generator().manual_seed(seed)) < share).nonzero()


def batched(places, index=0):
    return torch.cat([torch.full((len(places), 1), index), places], 1).int()


def flag(resolution=8):
    """A pole with a flag on one side: all four yaws differ."""
    grid = torch.zeros((resolution,) * 3)
    grid[3:5, 3:5, :] = 1
    grid[5:8, 4, 5:] = 1
    return grid


def test_known_turns():
    places = torch.tensor([[0, 0, 0, 2], [0, 1, 2, 3]], dtype=torch.int32)
    turned = rotate_coords_yaw(places, 1, 4)
    assert turned.tolist() == [[0, 3, 0, 2], [0, 1, 1, 3]] and turned.dtype == torch.int32
    assert torch.equal(rotate_coords_yaw(places, 4, 4), places)


@settings(max_examples=30, deadline=None)
@given(resolution=st.integers(1, 7), k=st.integers(-5, 5), seed=st.integers(0, 99))
def test_lists_and_grids_turn_in_the_same_sense(resolution, k, seed):
    places = voxels(resolution, seed)
    grid = torch.zeros((resolution,) * 3, dtype=torch.bool)
    grid[places.unbind(1)] = True
    turned = torch.zeros_like(grid)
    turned[rotate_coords_yaw(places, k, resolution).unbind(1)] = True
    assert torch.equal(turned, rotate_grid_yaw(grid, k)) and torch.equal(turned, torch.rot90(grid, k, (0, 1)))


@pytest.mark.parametrize("k", range(4))
def test_turn_of_places_in_the_world(k):
    """(x, y, z) goes to (−y, x, z), with the centre of the grid as origin."""
    places = voxels(6, 1)
    world = places / 5 - 0.5
    for _ in range(k):
        world = torch.stack([-world[:, 1], world[:, 0], world[:, 2]], 1)
    torch.testing.assert_close(rotate_coords_yaw(places, k, 6) / 5 - 0.5, world, atol=1e-6, rtol=0)


def test_grids_with_channels_and_batch():
    logits = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    turned = rotate_grid_yaw(logits, 1)
    assert turned.is_contiguous() and torch.equal(turned, torch.rot90(logits, 1, (2, 3)))
    assert torch.equal(rotate_grid_yaw(logits.movedim(1, -1), 1, (1, 2)), turned.movedim(1, -1))


def test_known_distance():
    costs = orientation_correct(torch.tensor([[0, 0, 0]]), torch.tensor([[1, 0, 0], [0, 2, 0]]), 4, angles=(0,)).costs
    # whole numbers divided once
    assert costs.tolist() == [3.5 / 9]


@settings(max_examples=15, deadline=None)
@given(resolution=st.integers(2, 9), seed=st.integers(0, 999), share=st.sampled_from([0.02, 0.3, 0.9]))
def test_costs_are_those_of_nearest_neighbours(resolution, seed, share):
    now, before = (torch.unique(torch.cat([voxels(resolution, seed + i, share), torch.tensor([[0, 1, 1]])]), dim=0) for i in (0, 1000))
    costs = orientation_correct(batched(now, 3), before, resolution).costs
    for k in range(4):
        here, there = rotate_coords_yaw(now, k, resolution) / (resolution - 1) - 0.5, before / (resolution - 1) - 0.5
        expected = sum(knn(a.double(), b.double(), 1)[0].square().mean() for a, b in ((here, there), (there, here)))
        assert abs(costs[k] - expected) <= 1e-6


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999))
def test_overlap_by_counting(seed):
    now, before = voxels(5, seed), voxels(5, seed + 1000)
    costs = orientation_correct(now, before, 5, criterion="iou").costs
    for k in range(4):
        a, b = (set(map(tuple, places.tolist())) for places in (rotate_coords_yaw(now, k, 5), before))
        assert costs[k].item() == pytest.approx(1 - len(a & b) / len(a | b), abs=1e-15)


@pytest.mark.parametrize("criterion", ["chamfer", "iou"])
@pytest.mark.parametrize("k", range(4))
def test_a_turned_copy_is_put_back_and_then_left_alone(k, criterion):
    before = flag().nonzero()
    now = rotate_coords_yaw(before, k, 8)
    decision = orientation_correct(now, before, 8, criterion=criterion)
    assert (k + decision.turns) % 4 == 0 and decision.costs[decision.turns] == 0
    assert orientation_correct(rotate_coords_yaw(now, decision.turns, 8), before, 8, criterion=criterion).turns == 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), margin=st.sampled_from([0.0, 0.2]), criterion=st.sampled_from(["chamfer", "iou"]))
def test_a_second_call_changes_nothing(seed, margin, criterion):
    now, before = voxels(5, seed), voxels(5, seed + 1000)
    turns = orientation_correct(now, before, 5, margin=margin, criterion=criterion).turns
    assert orientation_correct(rotate_coords_yaw(now, turns, 5), before, 5, margin=margin, criterion=criterion).turns == 0


def test_the_order_of_the_rows_does_not_matter():
    now, before = voxels(6, 0), voxels(6, 1)
    shuffled = now[torch.randperm(len(now), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(orientation_correct(now, before, 6).costs, orientation_correct(shuffled, before, 6).costs)


def test_ties_go_to_the_smallest_turn():
    half_turn = torch.zeros(6, 6, 6)
    half_turn[0:6, 2:4] = 1
    now, before = half_turn.nonzero(), half_turn.nonzero()
    decision = orientation_correct(now, before, 6)
    assert decision.turns == 0 and decision.costs[0] == decision.costs[2] == 0
    turned = rotate_coords_yaw(now, 1, 6)
    for angles in ((0, 90, 180, 270), (0, 270, 180, 90)):
        # 90 and 270 degrees are equally good
        decision = orientation_correct(turned, before, 6, angles=angles)
        assert decision.turns == 1 and decision.costs[angles.index(90)] == decision.costs[angles.index(270)]


def test_margin_decides_at_its_value():
    now, before = voxels(5, 4), voxels(5, 1004)
    costs = orientation_correct(now, before, 5).costs
    best = int(costs.argmin())
    assert best != 0
    gain = 1 - (costs[best] / costs[0]).item()
    assert orientation_correct(now, before, 5, margin=gain - 1e-6).turns == best
    assert orientation_correct(now, before, 5, margin=gain + 1e-6).turns == 0


def test_only_the_angles_that_are_asked_for():
    before = flag().nonzero()
    now = rotate_coords_yaw(before, 1, 8)
    decision = orientation_correct(now, before, 8, angles=(0, 180))
    full = orientation_correct(now, before, 8)
    assert decision.costs.tolist() == full.costs[[0, 2]].tolist() and decision.turns in (0, 2)


def test_empty_frames_say_where():
    some = torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(EmptyStructureError, match=r"coords.*frame 7, alpha 0.5") as caught:
        orientation_correct(some[:0], some, 4, frame=7, alpha=0.5)
    assert (caught.value.frame, caught.value.alpha) == (7, 0.5) and isinstance(caught.value, ValueError)
    with pytest.raises(EmptyStructureError, match="previous"):
        orientation_correct(some, some[:0], 4)
    with pytest.raises(EmptyStructureError, match="frame 1"):
        correct_sequence(torch.stack([flag(), -flag()]))
    with pytest.raises(EmptyStructureError, match="frame 0"):
        orientation_jumps([some[:0], some], 4)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(coords=torch.tensor([[0, 4, 0, 0]])), ValueError, r"\[0, 4\)"),
        (dict(previous=torch.tensor([[0, 0, 0], [0, 0, 0]])), ValueError, "previous: expected each voxel once"),
        (dict(coords=torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])), ValueError, "one sample"),
        (dict(coords=torch.tensor([[0.0, 0, 0]])), TypeError, "integer"),
        (dict(resolution=1), ValueError, "resolution"),
        (dict(angles=(90, 180)), ValueError, "angles"),
        (dict(angles=(0, 45)), ValueError, "angles"),
        (dict(angles=(0, 0)), ValueError, "angles"),
        (dict(angles=()), ValueError, "angles"),
        (dict(margin=-0.1), ValueError, "margin"),
        (dict(margin=1.0), ValueError, "margin"),
        (dict(margin=math.nan), ValueError, "margin"),
        (dict(criterion="cd"), ValueError, "criterion"),
    ],
)
def test_refusals(arguments, error, message):
    given_ = dict(coords=torch.tensor([[1, 1, 1]]), previous=torch.tensor([[1, 2, 1]]), resolution=4) | arguments
    with pytest.raises(error, match=message):
        orientation_correct(given_.pop("coords"), given_.pop("previous"), given_.pop("resolution"), **given_)


def test_refusals_of_turns():
    with pytest.raises(TypeError, match="k"):
        rotate_coords_yaw(torch.tensor([[0, 0, 0]]), 0.5, 4)
    with pytest.raises(ValueError, match="edges"):
        rotate_grid_yaw(torch.zeros(3, 4, 4), 1)
    with pytest.raises(ValueError, match="volumes"):
        correct_sequence(torch.zeros(4, 4, 4))


def test_a_sequence_that_jumps_twice_is_put_back():
    clean = torch.stack([flag()] * 5)
    broken = torch.stack([rotate_grid_yaw(volume, k) for volume, k in zip(clean, (0, 1, 1, 3, 0))])
    corrected, decisions = correct_sequence(broken)
    assert torch.equal(corrected, clean)
    assert [decision.turns for decision in decisions] == [0, 3, 3, 1, 0] and decisions[0].costs.isnan().all()


def test_jumps_are_the_turns_that_were_made():
    frames = [rotate_coords_yaw(flag().nonzero(), k, 8) for k in (0, 0, 1, 1, 0, 2)]
    assert orientation_jumps(frames, 8) == [0, 1, 0, 3, 2]
    with pytest.raises(ValueError, match="at least 2"):
        orientation_jumps(frames[:1], 8)


def test_statistics_count_every_jump_at_its_progress():
    still = [flag().nonzero()] * 5
    jumping = [rotate_coords_yaw(flag().nonzero(), k, 8) for k in (0, 0, 1, 1, 3)]
    statistics = spontaneous_jumps([still, jumping], 8)
    assert statistics.alphas.tolist() == [0.375, 0.875] and statistics.turns.tolist() == [1, 2]
    assert statistics.by_yaw() == [1, 1, 0] and statistics.by_alpha(4) == [0, 1, 0, 1] and statistics.share == 0.25
    metrics = statistics.metrics("x.")
    assert (metrics["x.count"], metrics["x.steps"], metrics["x.per_sequence"], metrics["x.near_middle"], metrics["x.yaw_180"]) == (2, 8, 1, 1, 1)
    given_ = spontaneous_jumps([jumping], 8, alphas=[0.0, 0.1, 0.2, 0.3, 1.0])
    torch.testing.assert_close(given_.alphas, torch.tensor([0.15, 0.65], dtype=torch.float64))
    assert spontaneous_jumps([], 8).share == 0
    for wrong in ([0.0, 1.0], [[0, 0.5, 1, 1, 1]] * 2):
        with pytest.raises(ValueError, match="alphas"):
            spontaneous_jumps([jumping], 8, alphas=wrong)


def test_pose_prior_counts_turns_against_the_reference():
    structures = [rotate_coords_yaw(flag().nonzero(), k, 8) for k in (0, 3, 1, 2, 1)]
    assert pose_prior(structures, [flag().nonzero()], 8).tolist() == [0, 3, 1, 2, 1]
    assert pose_prior(structures, structures, 8).tolist() == [0] * 5
    with pytest.raises(ValueError, match="references"):
        pose_prior(structures, structures[:2], 8)


def test_plots_draw():
    plt = pytest.importorskip("matplotlib.pyplot")
    figure = plt.figure()
    axes = [figure.add_subplot(121), figure.add_subplot(122, projection="polar")]
    plot_jumps(axes, spontaneous_jumps([[rotate_coords_yaw(flag().nonzero(), k, 8) for k in (0, 1)]], 8))
    assert sum(patch.get_height() for patch in axes[0].patches) == 1
    with pytest.raises(ValueError, match="counts"):
        plot_rose(axes[1], [1, 2])
    plt.close(figure)


def test_path_length_by_hand():
    volumes = -torch.ones(3, 4, 4, 4)
    volumes[0, 0, 0, 0] = volumes[1, 0, 0, 0] = volumes[1, 1, 0, 0] = volumes[2, 1, 0, 0] = 1
    # one voxel comes, one goes; 4/3 voxels on average
    assert path_length(volumes) == pytest.approx(2 / (4 / 3), abs=1e-15)
    with pytest.raises(EmptyStructureError):
        path_length(-torch.ones(2, 4, 4, 4))


def test_turned_sequences_are_as_promised():
    for group in ("same", "cross", "symmetric"):
        made = turned_sequences(group, 100, sequences=4)
        assert len(made) == 4 and all(5 <= one.start <= 10 and one.turns in (1, 2, 3) and one.clean.shape == (16, 16, 16, 16) for one in made)
        assert all((one.names[0] != one.names[1]) == (group == "cross") for one in made)
        one = made[0]
        assert torch.equal(one.jumped[: one.start], one.clean[: one.start])
        assert torch.equal(rotate_grid_yaw(one.jumped[one.start :], -one.turns), one.clean[one.start :])
    with pytest.raises(ValueError, match="group"):
        turned_sequences("all", 0)


def test_trial_puts_families_back_and_repeats():
    first = orientation_trial("same", 100, sequences=4)
    assert first == orientation_trial("same", 100, sequences=4)
    assert first["frames_put_back"] == 1 and first["false_rotations"] == 0 and first["path_corrected"] == first["path_clean"] < first["path_jumped"]


def test_a_margin_makes_fewer_mistakes_on_clean_sequences():
    none, much = (orientation_trial("cross", 100, sequences=8, margin=margin) for margin in (0.0, 0.3))
    assert none["path_clean"] == much["path_clean"] and none["path_jumped"] == much["path_jumped"]
    assert much["false_rotations"] <= none["false_rotations"]
