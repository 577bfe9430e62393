"""Cameras, sets of Gaussians and their rendering."""

import inspect
import math

import pytest
import torch

from papers10.splat.cameras import Cameras, look_at, orbit, ortho_cameras, pinhole_cameras, project_points
from papers10.splat.gaussians import Gaussians
from papers10.splat.render import project_gaussians, rasterization, render, sh_basis


def cloud(n=12, seed=0, waves=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(*shape, generator=generator, dtype=dtype)
    waved = {"waves": 4 * uniform(n, waves, 3) - 2, "wave_weights": uniform(n, waves), "wave_phases": uniform(n, waves)} if waves else {}
    return Gaussians(uniform(n, 3) * torch.tensor([2.0, 1.5, 1.0], dtype=dtype) + torch.tensor([-1.0, -0.75, 2.0], dtype=dtype), uniform(n, 4) - 0.5, 0.05 + 0.2 * uniform(n, 3),
                     0.2 + 0.7 * uniform(n), uniform(n, 3), extra={"mask": uniform(n, 1)}, **waved).check()


def test_projection_of_covariance_is_that_of_samples():
    one = cloud(1)
    camera = pinhole_cameras(200, 150, math.radians(50), dtype=torch.float64)
    flat = project_gaussians(one.replace(scales=one.scales / 50), camera, eps2d=0.0)
    from papers10.splat.rotations import rotate

    points = one.means + rotate(one.quats.expand(40000, 4), one.scales / 50 * torch.randn(40000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    pixels = project_points(points, camera)[0][0]
    torch.testing.assert_close(torch.cov(pixels.T), flat.covs2d[0, 0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(flat.conics[0, 0, [0, 1, 1, 2]].reshape(2, 2) @ flat.covs2d[0, 0], torch.eye(2, dtype=torch.float64))


def test_ortho_does_not_depend_on_depth():
    scene, camera = cloud(), ortho_cameras(40, 30, dtype=torch.float64)
    far = scene.replace(means=scene.means + torch.tensor([0.0, 0, 5], dtype=torch.float64))
    torch.testing.assert_close(render(scene, camera).color, render(far, camera).color)


@pytest.mark.parametrize("waves", [0, 2])
def test_several_times_are_one_at_a_time(waves):
    scene, camera = cloud(waves=waves), ortho_cameras(33, 21, dtype=torch.float64)
    moved = torch.stack([scene.means, scene.means + 0.1])
    pair = camera._replace(viewmats=camera.viewmats.expand(2, 4, 4), Ks=camera.Ks.expand(2, 3, 3))
    both = render(scene.replace(means=moved), pair, channels=("color", "depth", "mask"))
    for index in range(2):
        alone = render(scene.replace(means=moved[index]), camera, channels=("color", "depth", "mask"))
        torch.testing.assert_close(both.color[index], alone.color[0])
        torch.testing.assert_close(both.extra["mask"][index], alone.extra["mask"][0])


def test_zero_weights_are_the_gaussian_renderer():
    scene, camera = cloud(waves=2), ortho_cameras(40, 30, dtype=torch.float64)
    still = render(scene.replace(wave_weights=torch.zeros_like(scene.wave_weights)), camera).color
    plain = render(scene.replace(waves=None, wave_weights=None, wave_phases=None), camera).color
    torch.testing.assert_close(still, plain, rtol=0, atol=1e-12)


def test_depth_modes():
    scene, camera = cloud(), ortho_cameras(40, 30, dtype=torch.float64)
    expected, accumulated = render(scene, camera), render(scene, camera, depth="accumulated")
    torch.testing.assert_close(expected.depth * expected.alpha, accumulated.depth)
    assert (expected.depth[expected.alpha == 0] == 0).all()


def test_background_only_behind_the_colour():
    scene, camera = cloud(2), ortho_cameras(40, 30, dtype=torch.float64)
    view = render(scene, camera, channels=("color", "depth", "mask"), backgrounds=torch.ones(3, dtype=torch.float64))
    empty = view.alpha[..., 0] == 0
    assert empty.any() and (view.color[empty] == 1).all() and (view.extra["mask"][empty] == 0).all()


def test_empty_set_and_no_channel():
    scene, camera = cloud().index([]), ortho_cameras(8, 6, dtype=torch.float64)
    assert not render(scene, camera).color.any()
    only = render(cloud(), camera, channels=("alpha",))
    assert only.color is None and only.depth is None and only.alpha.any()


def test_near_and_far_hide():
    scene, camera = cloud(), ortho_cameras(16, 12, dtype=torch.float64)
    assert not render(scene, camera, far=1.0).alpha.any() and not render(scene, camera, near=10.0).alpha.any()


def test_gsplat_call_has_its_parameters():
    gsplat = pytest.importorskip("gsplat")
    theirs = inspect.signature(gsplat.rasterization).parameters
    ours = inspect.signature(rasterization).parameters
    shared = ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks", "width", "height", "near_plane", "far_plane", "radius_clip", "eps2d", "sh_degree", "packed", "tile_size",
              "backgrounds", "render_mode", "sparse_grad", "absgrad", "rasterize_mode", "camera_model")
    assert all(name in theirs and name in ours for name in shared)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_spherical_harmonics_as_colours(degree):
    scene, camera = cloud(6), pinhole_cameras(24, 18, dtype=torch.float64)
    sh = torch.randn(6, (degree + 1) ** 2, 3, generator=torch.Generator().manual_seed(degree), dtype=torch.float64)
    picture, _, _ = rasterization(scene.means, scene.quats, scene.scales, scene.opacities, sh, camera.viewmats, camera.Ks, 24, 18, sh_degree=degree)
    directions = torch.nn.functional.normalize(scene.means, dim=-1)
    colors = (torch.einsum("nk,nkc->nc", sh_basis(directions, (degree + 1) ** 2), sh) + 0.5).clamp_min(0)
    torch.testing.assert_close(picture, render(scene.replace(colors=colors), camera).color)


def test_antialiased_mode_weakens_small_primitives():
    scene, camera = cloud(6), ortho_cameras(24, 18, dtype=torch.float64)
    small = scene.scales / 20
    arguments = (scene.means, scene.quats, small, scene.opacities, scene.colors, camera.viewmats, camera.Ks, 24, 18)
    classic = rasterization(*arguments, camera_model="ortho")[1].sum()
    assert rasterization(*arguments, camera_model="ortho", rasterize_mode="antialiased")[1].sum() < classic


def test_look_at_centres_its_target():
    view = look_at(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0.2, 0.1, 4.0]))
    local = view @ torch.tensor([0.2, 0.1, 4.0, 1.0])
    assert local[:2].abs().max() < 1e-5 and local[2] > 0
    torch.testing.assert_close(view[:3, :3] @ view[:3, :3].T, torch.eye(3), atol=1e-6, rtol=0)
    assert torch.linalg.det(view[:3, :3]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("make, message", [
    (lambda: look_at(torch.zeros(3), torch.zeros(3)), "target"),
    (lambda: look_at(torch.zeros(3), torch.tensor([0.0, 1, 0])), "up"),
    (lambda: ortho_cameras(0, 5), "width"),
    (lambda: ortho_cameras(5, 5, "isotrop"), "aspect"),
    (lambda: orbit(0, 1.0), "views"),
    (lambda: Cameras(torch.eye(4)[None], torch.eye(3), 4, 4).check(), "Ks"),
    (lambda: Cameras(torch.eye(4)[None], torch.eye(3)[None], 4, 4, "fisheye").check(), "model"),
    (lambda: render(cloud(), ortho_cameras(4, 4, dtype=torch.float64), channels=("colour",)), "channels"),
    (lambda: render(cloud(), ortho_cameras(4, 4, dtype=torch.float64), near=5.0, far=1.0), "near"),
    (lambda: render(cloud(waves=1), ortho_cameras(4, 4, dtype=torch.float64), energy="gama"), "energy"),
    (lambda: render(cloud(), ortho_cameras(4, 4, dtype=torch.float64), gamma=2.0), "gamma"),
    (lambda: render(cloud(waves=1).replace(wave_weights=None), ortho_cameras(4, 4, dtype=torch.float64)), "wave_weights"),
    (lambda: render(cloud().replace(quats=cloud().quats * math.nan), ortho_cameras(4, 4, dtype=torch.float64)), "quats"),
    (lambda: render(cloud().replace(colors=None), ortho_cameras(4, 4, dtype=torch.float64)), "colors"),
    (lambda: render(cloud(), ortho_cameras(4, 4, dtype=torch.float64), backgrounds=torch.ones(4, dtype=torch.float64)), "backgrounds"),
    (lambda: Gaussians.cat([]), "sets"),
    (lambda: Gaussians.cat([cloud(), cloud(waves=1)]), "sets"),
    (lambda: cloud().replace(scales=torch.zeros(12, 3, dtype=torch.float64)).check(), "scales"),
])
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
