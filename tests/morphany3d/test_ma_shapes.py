"""Primitives, shapes, volumes and the data set of the small reproduction."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.morphany3d.shapes import CANONICAL, CATEGORIES, Primitive, ProceduralShapes, Shape, Volume

GREY = (0.5, 0.5, 0.5)


def centres(resolution):
    axis = (torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution - 0.5
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)


@pytest.mark.parametrize(
    ("kind", "size", "axis", "point", "distance"),
    [
        ("box", (0.2, 0.1, 0.1), 2, (0.5, 0.5, 0.1), 0.5),
        ("box", (0.2, 0.1, 0.1), 2, (0.0, 0.05, 0.0), -0.05),
        ("ellipsoid", (0.2, 0.2, 0.2), 2, (0.3, 0.4, 0.0), 0.3),
        ("ellipsoid", (0.4, 0.1, 0.2), 2, (0.4, 0.0, 0.0), 0.0),
        ("ellipsoid", (0.4, 0.1, 0.2), 2, (0.0, 0.0, 0.0), -0.1),
        ("cylinder", (0.1, 0.2), 0, (0.5, 0.0, 0.5), 0.5),
        ("cylinder", (0.1, 0.2), 1, (0.0, 0.1, 0.0), -0.1),
        ("cylinder", (0.1, 0.2), 2, (0.3, 0.0, 0.0), 0.2),
    ],
)
def test_signed_distances(kind, size, axis, point, distance):
    assert Primitive(kind, (0.0, 0.0, 0.0), size, GREY, axis).distance(np.array([point])) == pytest.approx(distance, abs=1e-12)


@given(st.integers(0, 2), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_an_exact_distance_never_changes_faster_than_the_point(kind, seed):
    draw = np.random.default_rng(seed)
    part = Primitive(("box", "cylinder", "cylinder")[kind], tuple(draw.uniform(-0.2, 0.2, 3)), tuple(draw.uniform(0.05, 0.3, 3 if kind == 0 else 2)), GREY, kind)
    a, b = draw.uniform(-0.5, 0.5, (2, 50, 3))
    assert (np.abs(part.distance(a) - part.distance(b)) <= np.linalg.norm(a - b, axis=-1) + 1e-12).all()


@pytest.mark.parametrize("kind", ["box", "ellipsoid", "cylinder"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_first_hit_lies_on_the_surface_and_nothing_is_before_it(kind, axis):
    part = Primitive(kind, (0.05, -0.1, 0.02), (0.1, 0.2) if kind == "cylinder" else (0.1, 0.2, 0.15), GREY, axis)
    x, z = np.random.default_rng(axis).uniform(-0.3, 0.3, (2, 200))
    y = part.first_hit(x, z)
    hit = np.isfinite(y)
    assert 5 < hit.sum() < 195
    assert np.abs(part.distance(np.stack([x, y, z], -1)[hit])).max() < 1e-9
    for share in np.linspace(0, 0.999, 20):
        earlier = -0.5 + share * (y[hit] + 0.5)
        assert (part.distance(np.stack([x[hit], earlier, z[hit]], -1)) > 0).all()
    for place in np.linspace(-0.5, 0.5, 40):
        missed = np.stack([x[~hit], np.full((~hit).sum(), place), z[~hit]], -1)
        assert (part.distance(missed) >= -1e-12).all()


@pytest.mark.parametrize("category", CATEGORIES)
def test_volume_is_the_cut_signed_distance_of_the_turned_shape(category):
    for turns in range(4):
        shape = Shape(category, Shape.random(category, 5).primitives, turns)
        volume, (distance, color) = shape.volume(16), shape.sdf(centres(16))
        # Volumes are float32.
        torch.testing.assert_close(volume.tsdf.double(), (-distance * 16 / 1.5).clamp(-1, 1), atol=1e-6, rtol=0)
        near = volume.tsdf > -1
        torch.testing.assert_close(volume.color[near].double(), color[near], atol=1e-6, rtol=0)
        assert volume.color[~near].abs().max() == 0


@pytest.mark.parametrize("category", CATEGORIES)
def test_shapes_stay_in_the_world_box(category):
    for seed in range(20):
        low, high = [], []
        for part in Shape.random(category, seed).primitives:
            low.append(np.asarray(part.center) - part.half)
            high.append(np.asarray(part.center) + part.half)
        assert np.min(low) >= -0.5 and np.max(high) <= 0.5


def test_a_quarter_turn_sends_x_to_y():
    grid = torch.zeros(4, 4, 4)
    grid[0, 0, 1] = grid[1, 2, 3] = 1
    once = Volume(grid, grid[..., None].expand(4, 4, 4, 3)).turned(1)
    assert once.tsdf[3, 0, 1] == 1 and once.tsdf[1, 1, 3] == 1
    assert torch.equal(once.turned(3).tsdf, grid)
    ahead = Shape("chair", (Primitive("box", (0.3, 0.0, 0.0), (0.1, 0.05, 0.05), GREY),), 1)
    assert ahead.sdf(torch.tensor([[0.0, 0.3, 0.0]]))[0] < 0 < ahead.sdf(torch.tensor([[0.3, 0.0, 0.0]]))[0]


def test_pose_prior():
    turns = torch.tensor([Shape.random("dog", seed).turns for seed in range(800)]).bincount(minlength=4) / 800
    # Four standard deviations of a share of 0.75 out of 800 are 0.06.
    assert turns[CANONICAL["dog"]] == pytest.approx(0.75, abs=0.06) and turns.min() > 0.04
    assert {Shape.random("car", seed, p_rotated=0.5, modes=(2,)).turns for seed in range(30)} == {0, 2}
    assert all(Shape.random("plane", seed, p_rotated=0.0).turns == 1 for seed in range(10))


def test_pose_does_not_change_the_object_or_its_picture():
    one, other = Shape.random("mug", 3, p_rotated=0.0), Shape.random("mug", 3, p_rotated=1.0)
    assert one.primitives == other.primitives and one.turns != other.turns
    assert torch.equal(one.image(), other.image())


def test_picture_shows_what_is_in_front_and_is_darker_behind():
    front = Primitive("box", (0.0, -0.4, 0.0), (0.1, 0.05, 0.1), (1.0, 0.0, 0.0))
    behind = Primitive("box", (0.0, 0.3, 0.2), (0.3, 0.1, 0.3), (0.0, 1.0, 0.0))
    picture = Shape("chair", (behind, front)).image(32)
    assert picture.shape == (32, 32, 4) and picture.dtype == torch.float32
    torch.testing.assert_close(picture[16, 16], torch.tensor([1 - 0.5 * 0.05, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(picture[8, 8], torch.tensor([0.0, 1 - 0.5 * 0.7, 0.0, 1.0]))
    # Above z = 0.5 there is nothing, and the green box reaches down to z = -0.1 only.
    assert picture[31, 16].abs().max() == 0 and picture[20, 8, 3] == 0


@pytest.mark.parametrize("category", CATEGORIES)
def test_picture_of_a_volume_agrees_with_the_analytic_one(category):
    shape = Shape.random(category, 11, p_rotated=0.0)
    if shape.turns:
        shape = Shape(category, shape.primitives)
    exact, drawn = shape.image(32), shape.volume(32).image(32)
    both = (exact[..., 3] > 0) & (drawn[..., 3] > 0)
    # Only pixels at silhouettes differ, where a voxel is in or out.
    assert ((exact[..., 3] > 0) == (drawn[..., 3] > 0)).float().mean() > 0.94
    assert (exact - drawn)[both].abs().median() < 0.02


def test_volume_from_occupancy():
    full = Shape.random("car", 1).volume(16)
    made = Volume.from_occupancy(full.occupancy, full.color)
    assert torch.equal(made.occupancy, full.occupancy) and made.tsdf.abs().max() <= 1
    single = torch.zeros(5, 5, 5, dtype=torch.bool)
    single[2, 2, 2] = True
    tsdf = Volume.from_occupancy(single, (1.0, 0.0, 0.0)).tsdf
    assert tsdf[2, 2, 2] == pytest.approx(0.5 / 1.5) and tsdf[2, 2, 3] == pytest.approx(-0.5 / 1.5) and tsdf[0, 0, 0] == -1
    border = torch.ones(4, 4, 4, dtype=torch.bool)
    assert Volume.from_occupancy(border).tsdf[0, 1, 1] == pytest.approx(0.5 / 1.5)


def test_data_set():
    data = ProceduralShapes(10, seed=4)
    assert data.tsdf.shape == (10, 16, 16, 16) and data.color.shape == (10, 16, 16, 16, 3) and data.images.shape == (10, 4, 32, 32)
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1] and len(data) == 10
    assert torch.equal(data[3]["tsdf"], data.volume(3).tsdf) and data[9]["label"] == 1
    assert torch.equal(ProceduralShapes(4, seed=4).tsdf, data.tsdf[:4]) and not torch.equal(ProceduralShapes(4, seed=5).tsdf, data.tsdf[:4])
    assert torch.equal(ProceduralShapes(3, ("mug",), seed=4).labels, torch.zeros(3, dtype=torch.long))
    assert torch.equal(torch.utils.data.default_collate([data[0], data[1]])["image"], data.images[:2])


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: Primitive("sphere", (0, 0, 0), (1, 1, 1), GREY), ValueError, "kind"),
        (lambda: Primitive("cylinder", (0, 0, 0), (1, 1, 1), GREY), ValueError, "size"),
        (lambda: Primitive("box", (0, 0, 0), (1, 1, 0), GREY), ValueError, "size"),
        (lambda: Primitive("box", (0, 0, float("nan")), (1, 1, 1), GREY), ValueError, "center"),
        (lambda: Primitive("box", (0, 0, 0), (1, 1, 1), (0, 0, 2)), ValueError, "color"),
        (lambda: Shape("car", ()), ValueError, "primitives"),
        (lambda: Shape.random("car", 0, p_rotated=1.5), ValueError, "p_rotated"),
        (lambda: Shape.random("car", 0, modes=(0,)), ValueError, "modes"),
        (lambda: Shape.random("boat", 0), ValueError, "category"),
        (lambda: Shape.random("car", 0).sdf(torch.zeros(3, 2)), ValueError, "points"),
        (lambda: Volume(torch.zeros(4, 4, 3), torch.zeros(4, 4, 4, 3)).check(), ValueError, "tsdf"),
        (lambda: Volume(torch.full((4, 4, 4), 2.0), torch.zeros(4, 4, 4, 3)).check(), ValueError, "tsdf"),
        (lambda: Volume(torch.zeros(4, 4, 4), torch.zeros(5, 5, 5, 3)).check(), ValueError, "color"),
        (lambda: Volume.from_occupancy(torch.zeros(4, 4, 4)), TypeError, "occupancy"),
        (lambda: Volume.from_occupancy(torch.ones(4, 4, 3, dtype=torch.bool)), ValueError, "occupancy"),
        (lambda: ProceduralShapes(0), ValueError, "n"),
        (lambda: ProceduralShapes(4, "car"), ValueError, "categories"),
    ],
)
def test_refused(make, error, name):
    with pytest.raises(error, match=name):
        make()
