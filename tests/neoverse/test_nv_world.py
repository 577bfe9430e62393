"""Drawn rooms: depth, points and colours agree, laws of motion, exact scene flow, refusals."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.neoverse.world import LAWS, SceneSpec, camera_path, render_scene, scene_clip, scene_flow
from papers10.splat.cameras import project_points


def test_the_same_seed_gives_the_same_room():
    one, two = SceneSpec.random(7), SceneSpec.random(7)
    assert one.laws == two.laws and numpy.array_equal(one.rests, two.rests)
    assert numpy.array_equal(SceneSpec.random(7, "sine").rests, one.rests)
    assert not numpy.array_equal(SceneSpec.random(8).wall_colors, one.wall_colors)


@pytest.mark.parametrize(("law", "phases"), [("linear", [-1, -0.5, 0, 0.5, 1]), ("arrive", [-1, 0, 1, 1, 1]), ("depart", [-1, -1, -1, 0, 1]), ("static", [0] * 5)])
def test_laws_at_quarters(law, phases):
    spec = SceneSpec.random(0, law)
    assert numpy.allclose([spec.phase(t)[0] for t in (0, 0.25, 0.5, 0.75, 1)], phases)


@pytest.mark.parametrize("law", LAWS)
def test_phases_stay_in_range_and_objects_move(law):
    spec = SceneSpec.random(3, law)
    phases = numpy.stack([spec.phase(t) for t in numpy.linspace(0, 1, 41)])
    assert phases.min() >= -1 and phases.max() <= 1 and spec.moving([0.0, 0.4, 0.8, 1.0]).all()


def test_world_points_project_to_their_pixels_at_their_depth():
    clip = scene_clip(SceneSpec.random(1), [0.2, 0.7], 20, 14, dtype=torch.float64)
    for number in range(2):
        pixels, depth = project_points(clip.world[number], clip.cameras.index([number]))
        rows, columns = torch.meshgrid(torch.arange(14) + 0.5, torch.arange(20) + 0.5, indexing="ij")
        assert torch.allclose(pixels[0], torch.stack([columns, rows], -1).double(), atol=1e-9)
        assert torch.allclose(depth[0], clip.depth[number], atol=1e-9)


def test_points_lie_on_walls_or_objects():
    spec = SceneSpec.random(2)
    clip = scene_clip(spec, [0.3], 40, 30, dtype=torch.float64)
    room, world = clip.ids[0] < 0, clip.world[0].numpy()
    sides = numpy.stack([numpy.abs(world - low) for low in ([-2, -1.5, -1.2], [2, 1.5, 4])]).min(0).min(-1)
    assert sides[room.numpy()].max() < 1e-9
    centres, turns = spec.pose(0.3)
    for number in range(spec.count):
        local = (world[(clip.ids[0] == number).numpy()] - centres[number]) @ turns[number]
        reach = numpy.linalg.norm(local, axis=1) if spec.kinds[number] == "sphere" else numpy.abs(local).max(1)
        assert numpy.allclose(reach, spec.sizes[number])


def test_a_carried_point_shows_the_same_colour():
    spec = SceneSpec.random(4, "sine")
    pose = camera_path(spec, [0.3])[0]
    K = torch.tensor([[160.0, 0, 80], [0, 160.0, 60], [0, 0, 1]], dtype=torch.float64)
    before, after = (render_scene(spec, t, pose, K, 160, 120, dtype=torch.float64) for t in (0.3, 0.33))
    moved = scene_flow(spec, before.world, before.ids, 0.3, 0.33)
    clip = scene_clip(spec, [0.33], 160, 120, camtoworlds=pose[None])
    pixels, depth = project_points(moved, clip.cameras._replace(Ks=K[None], viewmats=torch.linalg.inv(pose)[None]))
    column, row = pixels[0, ..., 0].long().clamp(0, 159), pixels[0, ..., 1].long().clamp(0, 119)
    same = (after.ids[row, column] == before.ids) & (before.ids >= 0) & ((after.depth[row, column] - depth[0]).abs() < 0.02)
    assert int(same.sum()) > 300 and float((after.rgb[row, column] - before.rgb)[same].abs().mean()) < 0.02


@given(seed=st.integers(0, 50), t=st.floats(0, 1), t2=st.floats(0, 1), law=st.sampled_from(LAWS))
@settings(max_examples=25, deadline=None)
def test_flow_there_and_back(seed, t, t2, law):
    spec = SceneSpec.random(seed, law)
    points = torch.randn(spec.count + 1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ids = torch.arange(-1, spec.count)[:, None].expand(-1, 5)
    moved = scene_flow(spec, points, ids, t, t2)
    assert torch.equal(moved[0], points[0]) and torch.allclose(scene_flow(spec, moved, ids, t2, t), points, atol=1e-12)
    assert torch.allclose(torch.cdist(moved, moved), torch.cdist(points, points), atol=1e-9)


def test_an_empty_room_and_no_frames():
    spec = SceneSpec.random(0, objects=0)
    assert spec.count == 0 and bool((scene_clip(spec, [0.1], 8, 6).ids == -1).all())
    assert scene_clip(spec, [], 8, 6).rgb.shape == (0, 6, 8, 3)
    assert not spec.moving([0, 1]).any()


def test_the_camera_looks_at_the_middle():
    poses = camera_path(SceneSpec.random(5), [0.0, 0.5, 1.0])
    ahead = torch.tensor([0.0, 0.1, 2.0], dtype=torch.float64) - poses[:, :3, 3]
    assert torch.allclose(torch.nn.functional.normalize(ahead, dim=-1), poses[:, :3, 2])
    assert torch.allclose(torch.linalg.det(poses[:, :3, :3]), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(("call", "word"), [
    (lambda: SceneSpec.random(0, "jump"), "motion"),
    (lambda: SceneSpec.random(0, objects=17), "objects"),
    (lambda: scene_clip(SceneSpec.random(0), [0.1], 0, 6), "width"),
    (lambda: scene_clip(SceneSpec.random(0), [0.1], fov=math.pi), "fov"),
    (lambda: scene_clip(SceneSpec.random(0), [0.1], camtoworlds=torch.eye(4)[None].repeat(2, 1, 1)), "camtoworlds"),
    (lambda: scene_clip(SceneSpec.random(0), [0.1], camtoworlds=torch.eye(4)[None] + 9), "camtoworld"),
    (lambda: render_scene(SceneSpec.random(0), 0.1, torch.full((4, 4), math.nan), torch.eye(3), 4, 4), "camtoworld"),
    (lambda: scene_flow(SceneSpec.random(0), torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), 0, 1), "ids"),
    (lambda: scene_flow(SceneSpec.random(0), torch.zeros(1, 3), torch.tensor([9]), 0, 1), "ids"),
])
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()
