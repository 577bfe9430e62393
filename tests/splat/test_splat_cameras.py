"""splat.cameras: poses, rays, paths, alignment: hand values, invariants, gradients and refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from papers10.core.random import generator
from papers10.splat import cameras as ca
from papers10.splat.rotations import quat_to_matrix, so3_exp

FLOAT64 = {"dtype": torch.float64}


def draw(*shape, name="cameras", seed=0):
    return torch.randn(*shape, generator=generator(seed, name), **FLOAT64)


def poses(n, *, seed=0, spread=1.0):
    return ca.make_poses(quat_to_matrix(draw(n, 4, seed=seed)), spread * draw(n, 3, name="places", seed=seed))


class TestPoses:
    @pytest.mark.parametrize("length", [0.0, 1e-9, 1e-3, 0.09, 0.11, 1.0, 3.1])
    def test_exp_is_the_matrix_exponential_and_log_goes_back(self, length):
        twist = draw(6)
        twist[3:] *= length / twist[3:].norm()
        generator_ = torch.zeros(4, 4, **FLOAT64)
        generator_[:3, :3] = torch.linalg.cross(twist[3:].expand(3, 3), torch.eye(3, **FLOAT64)).T
        generator_[:3, 3] = twist[:3]
        torch.testing.assert_close(ca.se3_exp(twist), torch.linalg.matrix_exp(generator_), atol=1e-13, rtol=0)
        torch.testing.assert_close(ca.se3_log(ca.se3_exp(twist)), twist, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("scale", [0.0, 0.05, 1.0])
    def test_exp_has_gradients(self, scale):
        twist = (scale * draw(3, 6)).requires_grad_()
        assert torch.autograd.gradcheck(ca.se3_exp, (twist,))
        assert torch.autograd.gradcheck(ca.rays, (poses(2).requires_grad_(), torch.eye(3, **FLOAT64), 2, 3))

    def test_inverse(self):
        some = poses(5)
        torch.testing.assert_close(ca.invert_poses(some), torch.linalg.inv(some))
        views = ca.pinhole_cameras(8, 6, viewmats=some)
        torch.testing.assert_close(views.camtoworlds, torch.linalg.inv(some))

    def test_half_precision_is_raised(self):
        with pytest.warns(UserWarning, match="poses: torch.float16 is raised"):
            assert ca.invert_poses(torch.eye(4, dtype=torch.float16)).dtype == torch.float32

    def test_refusals(self):
        some = poses(3)
        some[1, 0, 0] = math.nan
        with pytest.raises(ValueError, match=r"cams: expected finite values, got 1 non-finite, first nan at index \(1, 0, 0\)"):
            ca.check_poses("cams", some)
        with pytest.raises(ValueError, match="expected a rotation"):
            ca.check_poses("cams", 1.1 * torch.eye(4, **FLOAT64))
        with pytest.raises(ValueError, match="reflection"):
            ca.check_poses("cams", torch.diag(torch.tensor([1.0, 1, -1, 1])))
        bad = torch.eye(4)
        bad[3, 0] = 2
        with pytest.raises(ValueError, match=r"last row \(0, 0, 0, 1\), got \[2.0"):
            ca.check_poses("cams", bad)
        with pytest.raises(TypeError, match="twist: expected a floating point tensor"):
            ca.se3_exp(torch.zeros(6, dtype=torch.int64))
        with pytest.raises(ValueError, match="twist: expected shape"):
            ca.se3_exp(torch.zeros(5))


class TestRays:
    def test_known_value_of_the_spec(self):
        pose = ca.make_poses(torch.eye(3, **FLOAT64), torch.tensor([1.0, 2, 3], **FLOAT64))
        K = torch.tensor([[100.0, 0, 2], [0, 100, 2], [0, 0, 1]], **FLOAT64)
        wanted = torch.tensor([-0.014997, -0.014997, 0.999775, 2.04454, -1.04476, 0.014997], **FLOAT64)
        torch.testing.assert_close(ca.pluecker(pose, K, 4, 4)[:, 0, 0], wanted, atol=5e-6, rtol=0)
        corner = ca.pluecker(pose, K, 4, 4, pixel_center=0.0)[:3, 2, 2]
        torch.testing.assert_close(corner, torch.tensor([0.0, 0, 1], **FLOAT64))

    def test_pluecker_invariants(self):
        some, K = poses(2)[:, None].expand(2, 3, 4, 4), torch.tensor([[5.0, 0, 2], [0, 6, 3], [0, 0, 1]], **FLOAT64)
        lines = ca.pluecker(some, K, 5, 7)
        assert lines.shape == (2, 3, 6, 7, 5)
        d, m = lines.split(3, 2)
        torch.testing.assert_close(d.norm(dim=2), torch.ones(2, 3, 7, 5, **FLOAT64))
        assert float((d * m).sum(2).abs().max()) < 1e-14
        origins, directions = ca.rays(some, K, 5, 7)
        moved = torch.linalg.cross(origins + 2.5 * directions, directions).movedim(-1, 2)
        torch.testing.assert_close(moved, m)

    @pytest.mark.parametrize("model", ca.MODELS)
    def test_rays_meet_the_pixels_they_come_from(self, model):
        views = ca.Cameras(poses(2), torch.tensor([[[4.0, 0, 3], [0, 5, 2], [0, 0, 1]]], **FLOAT64).expand(2, 3, 3), 6, 4, model)
        origins, directions = ca.rays(views.camtoworlds, views.Ks, 6, 4, model=model)
        for view in range(2):
            pixels, _ = ca.project_points(origins[view] + 1.7 * directions[view], views.index(view))
            torch.testing.assert_close(pixels[0, 3, 5], torch.tensor([5.5, 3.5], **FLOAT64))
            torch.testing.assert_close(pixels[0, 0, 1], torch.tensor([1.5, 0.5], **FLOAT64))

    def test_unproject_and_project(self):
        views = ca.pinhole_cameras(6, 4, viewmats=poses(3))
        depth = 1 + torch.rand(3, 4, 6, **FLOAT64)
        world = ca.unproject(depth, views.camtoworlds, views.Ks)
        for view in range(3):
            pixels, z = ca.project_points(world[view], views.index(view))
            torch.testing.assert_close(z[0], depth[view])
            torch.testing.assert_close(pixels[0, :, :, 0], (torch.arange(6, **FLOAT64) + 0.5).expand(4, 6))
        one = ca.unproject(depth[0], views.camtoworlds, views.Ks[:1])
        assert one.shape == (3, 4, 6, 3)

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"Ks: expected leading dimensions that fit camtoworlds \[2, 4, 4\], got \[3, 3, 3\]"):
            ca.rays(torch.eye(4).expand(2, 4, 4), torch.eye(3).expand(3, 3, 3), 4, 4)
        with pytest.raises(ValueError, match="width"):
            ca.pluecker(torch.eye(4), torch.eye(3), 0, 4)
        with pytest.raises(ValueError, match="depth: expected leading dimensions"):
            ca.unproject(torch.ones(3, 4, 4), torch.eye(4).expand(2, 4, 4), torch.eye(3))
        with pytest.raises(ValueError, match="model"):
            ca.rays(torch.eye(4), torch.eye(3), 4, 4, model="fish")


class TestInterpolate:
    def test_linear_is_scipys_slerp_and_straight(self):
        keys, at = poses(4), [0.0, 1.0, 1.5, 4.0]
        times = torch.linspace(0, 4, 33, **FLOAT64)
        path = ca.interpolate_poses(keys, at, times)
        turns = Slerp(at, Rotation.from_matrix(keys[:, :3, :3].numpy()))(times.numpy()).as_matrix()
        np.testing.assert_allclose(path[:, :3, :3], turns, atol=1e-12)
        for axis in range(3):
            np.testing.assert_allclose(path[:, axis, 3], np.interp(times, at, keys[:, axis, 3]), atol=1e-12)

    @pytest.mark.parametrize("kind", ["linear", "cubic"])
    @settings(max_examples=15, deadline=None)
    @given(n=st.integers(1, 5), seed=st.integers(0, 99))
    def test_keys_are_met_poses_stay_rigid_and_the_frame_does_not_matter(self, kind, n, seed):
        keys = poses(n, seed=seed)
        at = torch.cumsum(torch.rand(n, generator=generator(seed, "times"), **FLOAT64) + 0.1, 0)
        torch.testing.assert_close(ca.interpolate_poses(keys, at, at, kind=kind), keys)
        times = torch.linspace(float(at[0]) - 1, float(at[-1]) + 1, 20, **FLOAT64)
        path = ca.check_poses("path", ca.interpolate_poses(keys, at, times, kind=kind, extrapolate="linear"))
        world = poses(1, seed=seed + 1)
        moved = ca.interpolate_poses(world @ keys, 3 * at + 1, 3 * times + 1, kind=kind, extrapolate="linear")
        torch.testing.assert_close(moved, world @ path, atol=1e-9, rtol=0)

    def test_a_motion_of_constant_speed_stays_one_beyond_the_keys_too(self):
        at = torch.tensor([0.0, 1.0, 2.5, 3.0], **FLOAT64)
        speed, velocity = torch.tensor([0.1, 0.3, -0.2], **FLOAT64), torch.tensor([1.0, 2, 3], **FLOAT64)

        def truth(t):
            return ca.make_poses(quat_to_matrix(so3_exp(t[:, None] * speed)), t[:, None] * velocity)

        times = torch.linspace(-1, 4, 21, **FLOAT64)
        for kind in ("linear", "cubic"):
            path = ca.interpolate_poses(truth(at), at, times, kind=kind, extrapolate="linear")
            torch.testing.assert_close(path, truth(times), atol=1e-12, rtol=0)

    def test_cubic_has_no_corner(self):
        keys, at, step = poses(4), [0.0, 1.0, 1.5, 4.0], 1e-5
        times = torch.tensor([1 - step, 1.0, 1 + step], **FLOAT64)
        path = ca.interpolate_poses(keys, at, times, kind="cubic")
        assert float((path[0] + path[2] - 2 * path[1]).abs().max()) / step < 1e-3
        corner = ca.interpolate_poses(keys, at, times)
        assert float((corner[0] + corner[2] - 2 * corner[1]).abs().max()) / step > 0.1

    def test_outside_and_single_key_and_gradient(self):
        keys = poses(2)
        held = ca.interpolate_poses(keys, [0, 1], [-1.0, 2.0])
        torch.testing.assert_close(held, keys)
        assert torch.equal(ca.interpolate_poses(keys[:1], [3], [0.0, 3.0, 9.0]), keys[:1].expand(3, 4, 4))
        twist = torch.zeros(3, 6, **FLOAT64).requires_grad_()
        for kind in ("linear", "cubic"):
            ca.interpolate_poses(ca.se3_exp(twist) @ poses(3), [0, 1, 2], [0.5, 1.0, 1.7], kind=kind).sum().backward()
        assert twist.grad.isfinite().all() and bool((twist.grad != 0).any())

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"key_times": [0, 0]}, "strictly increasing"),
            ({"key_times": [0, 1, 2]}, "key_times: expected shape"),
            ({"times": [0.5, math.nan]}, "times: expected finite"),
            ({"times": [2.0], "extrapolate": "error"}, r"times: expected times in \[0, 1\], got 2"),
            ({"kind": "quintic"}, "kind"),
            ({"camtoworlds": torch.zeros(0, 4, 4), "key_times": torch.zeros(0)}, "at least one pose"),
        ],
    )
    def test_refusals(self, change, words):
        with pytest.raises(ValueError, match=words):
            ca.interpolate_poses(**{"camtoworlds": poses(2), "key_times": [0, 1], "times": [0.5], **change})


class TestTurntable:
    def test_both_ups_look_at_the_target(self):
        target = torch.tensor([0.3, -0.2, 0.5], **FLOAT64)
        for up, axis in (("-y", (0, -1, 0)), ("z", (0, 0, 1))):
            views = ca.turntable(torch.linspace(-3, 3, 7, **FLOAT64), 0.3, 2.0, math.radians(40), width=64, height=48, up=up, target=target)
            pixels, depth = ca.project_points(target, views)
            torch.testing.assert_close(pixels, torch.tensor([32.0, 24.0], **FLOAT64).expand(7, 2))
            torch.testing.assert_close(depth, torch.full((7,), 2.0, **FLOAT64))
            above = ca.project_points(target + 0.1 * torch.tensor(axis, **FLOAT64), views)[0]
            assert bool((above[:, 1] < 24).all())
            height = (views.camtoworlds[:, :3, 3] - target) @ torch.tensor(axis, **FLOAT64)
            torch.testing.assert_close(height, torch.full((7,), 2 * math.sin(0.3), **FLOAT64))

    def test_one_field_of_view_each(self):
        views = ca.turntable([0.0, 1.0], fov=torch.tensor([0.5, 1.0]), width=20, height=10)
        torch.testing.assert_close(views.Ks[:, 0, 0], 10 / torch.tan(torch.tensor([0.25, 0.5], **FLOAT64)))

    @pytest.mark.parametrize(("change", "words"), [({"yaws": []}, "yaws"), ({"pitch": 1.6}, "pitch"), ({"radius": 0}, "radius"), ({"fov": 4}, "fov"), ({"up": "y"}, "up"), ({"pitch": [0.1, 0.2]}, "pitch")])
    def test_refusals(self, change, words):
        with pytest.raises(ValueError, match=words):
            ca.turntable(**{"yaws": [0.0, 1.0, 2.0], **change})


class TestAlignment:
    @settings(max_examples=20, deadline=None)
    @given(n=st.integers(4, 9), seed=st.integers(0, 99), scale=st.floats(0.01, 100))
    def test_the_similarity_is_found_again(self, n, seed, scale):
        world = ca.Sim3(torch.tensor(scale, **FLOAT64), poses(1, seed=seed)[0, :3, :3], draw(3, seed=seed))
        points = draw(n, 3, name="points", seed=seed)
        for a, b in zip(ca.umeyama_sim3(points, world.points(points)), world):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(world.inverse().points(world.points(points)), points, atol=1e-9, rtol=0)
        cams = poses(n, seed=seed)
        for rotation in ("orientations", "positions"):
            found = ca.align_poses(cams, world.poses(cams), rotation=rotation)
            torch.testing.assert_close(found.poses(cams), world.poses(cams), atol=1e-8, rtol=1e-8)

    def test_the_result_is_a_rotation_for_mirrored_points(self):
        points = draw(10, 3)
        found = ca.umeyama_sim3(points, points * torch.tensor([1.0, 1, -1], **FLOAT64))
        torch.testing.assert_close(torch.det(found.rotation), torch.tensor(1.0, **FLOAT64))

    def test_weights_leave_outliers_out_and_scale_can_stay(self):
        points = draw(6, 3)
        target = 2 * points + 1
        target[0] += 100
        weights = torch.ones(6, **FLOAT64)
        weights[0] = 0
        found = ca.umeyama_sim3(points, target, weights)
        torch.testing.assert_close(found.scale, torch.tensor(2.0, **FLOAT64))
        assert float(ca.umeyama_sim3(points, target, with_scale=False).scale) == 1

    def test_orientations_settle_what_a_straight_path_leaves_open(self):
        cams = poses(5)
        cams[:, :3, 3] = torch.linspace(0, 1, 5, **FLOAT64)[:, None] * torch.tensor([0.0, 0, 1], **FLOAT64)
        world = ca.Sim3(torch.tensor(3.0, **FLOAT64), poses(1, seed=4)[0, :3, :3], draw(3))
        torch.testing.assert_close(ca.align_poses(cams, world.poses(cams)).poses(cams), world.poses(cams))
        still = cams.clone()
        still[:, :3, 3] = 1
        found = ca.align_poses(still, world.poses(still))
        assert float(found.scale) == 1
        torch.testing.assert_close(found.poses(still)[:, :3, 3], world.poses(still)[:, :3, 3])
        one = ca.align_poses(cams[:1], cams[1:2])
        torch.testing.assert_close(one.poses(cams[:1]), cams[1:2])

    def test_refusals(self):
        points = draw(4, 3)
        with pytest.raises(ValueError, match="target: expected shape"):
            ca.umeyama_sim3(points, points[:3])
        with pytest.raises(ValueError, match="weights"):
            ca.umeyama_sim3(points, points, torch.zeros(4))
        with pytest.raises(ValueError, match="at least one point"):
            ca.umeyama_sim3(points[:0], points[:0])
        with pytest.raises(ValueError, match="source: expected finite"):
            ca.umeyama_sim3(points * math.nan, points)
        with pytest.raises(ValueError, match="rotation: expected one of"):
            ca.align_poses(poses(3), poses(3), rotation="both")
