"""splat.motion: hand values, the bases against scipy, curvature, fits with gaps, the module and refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import CubicHermiteSpline, CubicSpline, PchipInterpolator

from papers10.core.random import generator
from papers10.splat import motion as mo

FLOAT64 = torch.float64
KNOTTED = ("hermite", "cubic", "linear")


def draw(*shape, name="motion"):
    return torch.randn(*shape, generator=generator(0, name), dtype=FLOAT64)


def grid(count, low=0.0, high=1.0):
    return torch.linspace(low, high, count, dtype=FLOAT64)


def test_known_rows():
    rows = mo.hermite_matrix(torch.tensor([1 / 2, 1 / 6], dtype=FLOAT64), 4) * 16
    torch.testing.assert_close(rows, torch.tensor([[-1.0, 9, 9, -1], [7, 10, -1, 0]], dtype=FLOAT64))
    row = torch.tensor([[-0.064, 0.912, 0.168, -0.016, 0]])
    torch.testing.assert_close(mo.hermite_matrix(torch.tensor([0.3]), 5), row, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(KNOTTED), st.integers(1, 9), st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_rows_sum_to_one_and_lines_are_reproduced(kind, knots, times):
    t = torch.tensor(times, dtype=FLOAT64)
    rows = mo.motion_matrix(kind, t, knots)
    torch.testing.assert_close(rows.sum(1), torch.ones_like(t))
    if knots > 1:
        torch.testing.assert_close(rows @ (3 - 2 * grid(knots)), 3 - 2 * t)


@pytest.mark.parametrize("kind", KNOTTED)
@pytest.mark.parametrize("knots", [1, 2, 3, 4, 9])
def test_knots_are_met(kind, knots):
    torch.testing.assert_close(mo.motion_matrix(kind, grid(knots), knots), torch.eye(knots, dtype=FLOAT64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("knots", [2, 3, 4, 5, 9])
def test_cubic_and_hermite_are_scipys(knots):
    points, t = draw(knots, 2), grid(37)
    theirs = CubicSpline(grid(knots).numpy(), points.numpy())
    slopes = np.gradient(points.numpy(), 1 / (knots - 1), axis=0)
    hermite = CubicHermiteSpline(grid(knots).numpy(), points.numpy(), slopes)
    for order in (0, 1):
        ours = mo.motion_matrix("cubic", t, knots, derivative=order) @ points
        torch.testing.assert_close(ours, torch.from_numpy(theirs(t.numpy(), order)), atol=1e-9, rtol=1e-9)
        ours = mo.motion_matrix("hermite", t, knots, derivative=order) @ points
        torch.testing.assert_close(ours, torch.from_numpy(hermite(t.numpy(), order)), atol=1e-9, rtol=1e-9)


def test_parabolas_on_inner_segments():
    t = grid(21, 0.25, 0.75)
    torch.testing.assert_close(mo.hermite_matrix(t, 5) @ grid(5) ** 2, t**2)


@pytest.mark.parametrize("kind", [*KNOTTED, "poly_fourier", "polynomial"])
def test_derivatives_are_those_of_autograd(kind):
    n = 12 if kind == "poly_fourier" else 6
    t = (grid(16) * 0.96 + 0.013).requires_grad_()
    for order in (0, 1):
        rows = mo.motion_matrix(kind, t, n, derivative=order)
        weights = draw(n)
        expected = mo.motion_matrix(kind, t.detach(), n, derivative=order + 1) @ weights
        if not rows.requires_grad:  # the speed along straight lines is constant
            assert kind == "linear" and order == 1 and not expected.any()
            continue
        (slope,) = torch.autograd.grad((rows @ weights).sum(), t)
        torch.testing.assert_close(slope, expected)


def test_poly_fourier_columns():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=FLOAT64)
    rows = mo.poly_fourier_matrix(t)
    expected = torch.cat([t[:, None] ** torch.arange(4)] + [f(math.pi * t[:, None] * torch.arange(1, 5)) for f in (torch.cos, torch.sin)], 1)
    torch.testing.assert_close(rows, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(rows, mo.motion_matrix("poly_fourier", t, 12))


def test_outside_the_span():
    points, t = draw(5, 2), torch.tensor([-0.5, 0.0, 1.0, 1.25], dtype=FLOAT64)
    with pytest.raises(ValueError, match="t: expected times in"):
        mo.hermite_eval(points, t)
    for tangents in ("auto", "monotone"):
        options = {"tangents": tangents}
        clamped = mo.hermite_eval(points, t, extrapolate="clamp", **options)
        torch.testing.assert_close(clamped, points[[0, 0, 4, 4]])
        speed = mo.hermite_derivative(points, t[1:3], **options)
        straight = mo.hermite_eval(points, t, extrapolate="linear", **options)
        torch.testing.assert_close(straight[0], points[0] - 0.5 * speed[0])
        torch.testing.assert_close(straight[3], points[4] + 0.25 * speed[1])
        assert not mo.hermite_derivative(points, t[[0, 3]], extrapolate="clamp", **options).any()
        assert not mo.hermite_derivative(points, t[[0, 3]], 2, extrapolate="linear", **options).any()
    # A rounding above 1, as float32 frame numbers give, is no error.
    mo.hermite_matrix(torch.tensor([1 + 1e-7], dtype=FLOAT64), 5)


def test_span_scales_time_and_derivatives():
    points, t = draw(5, 2), grid(9)
    torch.testing.assert_close(mo.hermite_eval(points, 10 + 4 * t, span=(10, 14)), mo.hermite_eval(points, t))
    for order in (1, 2):
        ours = mo.hermite_derivative(points, 10 + 4 * t, order, span=(10, 14))
        torch.testing.assert_close(ours, mo.hermite_derivative(points, t, order) / 4**order)


def test_times_in_any_order_and_one_by_one():
    points, t = draw(3, 6, 2), torch.rand(7, generator=generator(0, "t"), dtype=FLOAT64)
    together = mo.hermite_eval(points, t, tangents="monotone")
    torch.testing.assert_close(together, torch.cat([mo.hermite_eval(points, one[None], tangents="monotone") for one in t], -2))
    assert mo.hermite_eval(points, t[:0]).shape == (3, 0, 2)


def test_monotone_slopes():
    points = draw(8, 3)
    inner = mo.hermite_derivative(points, grid(8), tangents="monotone")[1:-1]
    theirs = PchipInterpolator(grid(8).numpy(), points.numpy()).derivative()(grid(8).numpy())[1:-1]
    torch.testing.assert_close(inner, torch.from_numpy(theirs))
    path = mo.hermite_eval(points, grid(71), tangents="monotone")[:-1].reshape(7, 10, 3)
    low, high = torch.minimum(points[1:], points[:-1]), torch.maximum(points[1:], points[:-1])
    assert (path >= low[:, None] - 1e-12).all() and (path <= high[:, None] + 1e-12).all()


def test_monotone_of_equal_points_has_a_gradient():
    points = torch.ones(5, 2, requires_grad=True)
    mo.hermite_eval(points, torch.linspace(0, 1, 9), tangents="monotone").sum().backward()
    assert points.grad.isfinite().all()


def test_learned_tangents():
    points, t = draw(5, 2), grid(9)
    auto = mo.hermite_eval(points, t)
    torch.testing.assert_close(mo.hermite_eval(points, t, tangents="learned", gates=torch.full_like(points, 40.0)), auto)
    slopes = draw(5, 2, name="slopes")
    closed = mo.hermite_eval(points, t, tangents="learned", gates=torch.full_like(points, -1e3), slopes=slopes)
    theirs = CubicHermiteSpline(grid(5).numpy(), points.numpy(), slopes.numpy())
    torch.testing.assert_close(closed, torch.from_numpy(theirs(t.numpy())))


def test_gradients():
    points, t = draw(2, 5, 2).requires_grad_(), (grid(6) * 0.91 + 0.03).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(mo.hermite_eval, (points, t))
    assert check(lambda p, t: mo.hermite_eval(p, t, tangents="monotone"), (points, t))
    assert check(lambda p, g, s: mo.hermite_eval(p, t.detach(), tangents="learned", gates=g, slopes=s), (points, points, points))
    for form in ("integral", "discrete", "sampled"):
        assert check(lambda p, form=form: mo.curvature_energy(p, form=form, n_frames=7), (points,))


def test_known_curvature():
    bump = torch.tensor([[0.0], [1], [0]])
    assert float(mo.curvature_energy(bump, time_unit="unit")) == pytest.approx(64, rel=1e-6)
    torch.testing.assert_close(bump.T @ mo.curvature_matrix(3, dtype=torch.float32) @ bump, torch.tensor([[64.0]]))
    assert float(mo.curvature_energy(bump, n_frames=3)) == pytest.approx(4)
    assert float(mo.curvature_energy(bump, form="discrete", time_unit="unit")) == pytest.approx(64)
    line = grid(6)[:, None] * torch.tensor([2.0, -1])
    assert float(mo.curvature_energy(line, time_unit="unit")) < 1e-20
    for knots in (1, 2):
        assert not mo.curvature_matrix(knots).any() and float(mo.curvature_energy(draw(knots, 2), n_frames=1)) == 0


@pytest.mark.parametrize("kind", ["hermite", "cubic", "poly_fourier", "polynomial"])
def test_curvature_matrix_is_the_integral(kind):
    n = 12 if kind == "poly_fourier" else 7
    points = draw(n, 2)
    by_matrix = (points * (mo.motion_curvature(kind, n) @ points)).sum()
    torch.testing.assert_close(mo.curvature_energy(points, kind=kind, time_unit="unit"), by_matrix)
    # Midpoint rule on a grid that has the knots on its cell borders; its error falls with the square of the step.
    second = mo.motion_matrix(kind, (torch.arange(12000, dtype=FLOAT64) + 0.5) / 12000, n, derivative=2) @ points
    torch.testing.assert_close(second.square().sum(-1).mean(), by_matrix, rtol=1e-5, atol=0)
    torch.testing.assert_close(mo.motion_curvature(kind, n), mo.motion_curvature(kind, n).T)


def test_curvature_of_other_tangents_and_invariants():
    points = draw(4, 6, 3)
    for extra in ({"tangents": "monotone"}, {"tangents": "learned", "slopes": draw(4, 6, 3, name="slopes")}, {}):
        energy = mo.curvature_energy(points, n_frames=11, **extra)
        nodes = (torch.arange(5000, dtype=FLOAT64) + 0.5) / 5000
        second = mo.hermite_derivative(points, nodes, 2, **extra).square().sum(-1).mean(-1) / 10**4
        torch.testing.assert_close(energy, second, rtol=1e-5, atol=0)
    for form in ("integral", "discrete", "sampled"):
        energy = mo.curvature_energy(points, form=form, n_frames=11)
        rotation = torch.linalg.qr(draw(3, 3, name="q"))[0]
        torch.testing.assert_close(mo.curvature_energy(3 * points @ rotation + 5, form=form, n_frames=11), 9 * energy)
    assert not mo.motion_curvature("linear", 5).any()
    discrete = (points * (mo.motion_curvature("linear", 6, form="discrete") @ points)).sum((-2, -1))
    torch.testing.assert_close(mo.curvature_energy(points, form="discrete", time_unit="unit"), discrete)


@pytest.mark.parametrize("kind", ["hermite", "cubic", "linear", "poly_fourier", "polynomial"])
def test_fit_recovers_and_is_shift_invariant(kind):
    n = 12 if kind == "poly_fourier" else 6
    points, t = draw(4, n, 2), grid(41)
    tracks = mo.motion_matrix(kind, t, n) @ points
    found = mo.motion_matrix(kind, t, n) @ mo.fit_tracks(tracks, None, None, t, n, lam=0, ridge=1e-12, kind=kind)
    torch.testing.assert_close(found, tracks, atol=1e-5, rtol=0)
    shifted = mo.fit_tracks(tracks + 100, None, None, t, n, kind=kind)
    path = mo.motion_matrix(kind, t, n) @ shifted
    torch.testing.assert_close(path, mo.motion_matrix(kind, t, n) @ mo.fit_tracks(tracks, None, None, t, n, kind=kind) + 100)


def test_fit_is_the_minimum_of_its_objective():
    t, tracks = grid(20), draw(3, 20, 2)
    visible = torch.rand(3, 20, generator=generator(0, "visible")) > 0.4
    confidence = torch.rand(3, 20, generator=generator(0, "confidence"), dtype=FLOAT64)
    found = mo.fit_tracks(tracks, visible, confidence, t, 7, lam=1e-3, ridge=1e-2).requires_grad_()
    weights = (visible * confidence)[..., None]
    mean = (weights * tracks).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    misfit = (weights * (mo.hermite_eval(found, t) - tracks).square()).sum()
    loss = misfit + 1e-3 * mo.curvature_energy(found, time_unit="unit").sum() + 1e-2 * (found - mean).square().sum()
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.abs().max() < 1e-10


def test_fit_of_hidden_frames():
    t, tracks = grid(20), draw(3, 20, 2)
    visible = torch.rand(3, 20, generator=generator(0, "visible")) > 0.4
    hidden = torch.where(visible[..., None], tracks, torch.nan)
    expected = mo.fit_tracks(tracks, visible, None, t, 9)
    torch.testing.assert_close(mo.fit_tracks(hidden, visible, None, t, 9), expected)
    torch.testing.assert_close(mo.fit_tracks(hidden, visible, None, t, 9, chunk=1), expected)
    torch.testing.assert_close(mo.fit_tracks(hidden.float(), visible, None, t, 9), expected.float())
    once = torch.zeros(1, 20, dtype=torch.bool)
    once[0, 6] = True
    torch.testing.assert_close(mo.fit_tracks(tracks[:1] + 50, once, None, t, 9), (tracks[:1, 6:7] + 50).expand(1, 9, 2))
    assert mo.fit_tracks(tracks[:0], None, None, t, 9).shape == (0, 9, 2)


def test_curvature_penalty_makes_a_gap_well_posed():
    t = grid(33)
    truth = torch.stack([t, (5 * t).sin() / 2], -1)
    seen = ((torch.arange(33) < 12) | (torch.arange(33) > 20))[None]
    noisy = truth + 0.01 * draw(33, 2)
    error = [float((mo.hermite_eval(mo.fit_tracks(noisy[None], seen, None, t, 17, lam=lam), t)[0] - truth)[12:21].norm(dim=-1).max()) for lam in (0, 1e-4)]
    assert error[1] < 0.05 < 10 * 0.05 < error[0]
    with pytest.raises(ValueError, match="make the fit unique"):
        mo.fit_tracks(noisy[None], seen, None, t, 33, lam=0, ridge=0)


@pytest.mark.parametrize(("kind", "tangents"), [("hermite", "auto"), ("hermite", "monotone"), ("hermite", "learned"), ("linear", "auto"), ("cubic", "auto"), ("poly_fourier", "auto")])
def test_module(kind, tangents):
    tracks, t = draw(5, 30, 3).float(), torch.linspace(0, 1, 30)
    paths = mo.HermiteTrajectory.from_tracks(tracks, kind=kind, tangents=tangents)
    n = 12 if kind == "poly_fourier" else 7
    assert paths.points.shape == (5, n, 3)
    assert paths.num_coefficients == 3 * n * (3 if tangents == "learned" else 1)
    assert paths(t).shape == (30, 5, 3) and paths.derivative(t, 2).shape == (30, 5, 3)
    copy = mo.HermiteTrajectory(5, n, 3, kind, tangents)
    copy.load_state_dict(paths.state_dict())
    assert torch.equal(copy(t), paths(t))
    form = "discrete" if kind == "linear" else "integral"
    (paths(t).square().sum() + paths.curvature(30, form=form)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in paths.parameters())


def test_module_with_few_knots_or_primitives():
    t = torch.linspace(0, 1, 5)
    for knots in (1, 2):
        paths = mo.HermiteTrajectory(3, knots, 2)
        torch.nn.init.normal_(paths.points)
        assert paths.derivative(t, 2).abs().max() == 0 and paths.curvature(1).item() == 0
        if knots == 1:
            assert torch.equal(paths(t), paths.points[:, 0].expand(5, 3, 2))
    empty = mo.HermiteTrajectory(0, 4, 2)
    assert empty(t).shape == (5, 0, 2) and empty.curvature(5).item() == 0 and empty.num_coefficients == 8
    assert mo.HermiteTrajectory.from_tracks(torch.ones(2, 1, 3)).points.shape == (2, 1, 3)


def test_default_knots():
    assert [mo.default_knots(frames) for frames in (1, 2, 6, 7, 49, 50)] == [1, 2, 2, 3, 11, 11]


def test_learned_tangents_start_almost_automatic():
    paths = mo.HermiteTrajectory.from_tracks(draw(5, 30, 3), tangents="learned")
    auto = mo.HermiteTrajectory.from_tracks(draw(5, 30, 3))
    assert (paths(grid(30)) - auto(grid(30))).abs().max() < 0.02 * auto(grid(30)).abs().max()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: mo.hermite_matrix(grid(3), 0), ValueError, "n: expected"),
        (lambda: mo.hermite_matrix(grid(3), 2.5), TypeError, "n: expected an int"),
        (lambda: mo.hermite_matrix(torch.tensor(0.5), 3), ValueError, "t: expected shape"),
        (lambda: mo.hermite_matrix(torch.tensor([math.nan]), 3), ValueError, "t: expected finite"),
        (lambda: mo.hermite_matrix(torch.tensor([1.1]), 3), ValueError, r"got 1.1 \(extrapolate"),
        (lambda: mo.hermite_matrix(grid(3), 3, extrapolate="wrap"), ValueError, "extrapolate: expected one of"),
        (lambda: mo.hermite_matrix(grid(3), 3, span=(1, 1)), ValueError, "span: expected start < end"),
        (lambda: mo.motion_matrix("hermit", grid(3), 3), ValueError, "did you mean 'hermite'"),
        (lambda: mo.motion_matrix("poly_fourier", grid(3), 7), ValueError, "n: expected 4"),
        (lambda: mo.motion_curvature("polynomial", 4, form="discrete"), ValueError, "no knots"),
        (lambda: mo.motion_curvature("hermite", 0), ValueError, "n: expected"),
        (lambda: mo.hermite_eval(torch.ones(0, 2), grid(3)), ValueError, "at least one knot"),
        (lambda: mo.hermite_eval(torch.full((3, 2), math.nan), grid(3)), ValueError, "points: expected finite"),
        (lambda: mo.hermite_eval(torch.ones(3, 2), grid(3), tangents="flat"), ValueError, "tangents: expected one of"),
        (lambda: mo.hermite_eval(torch.ones(3, 2), grid(3), tangents="learned"), ValueError, "at least one of them"),
        (lambda: mo.hermite_eval(torch.ones(3, 2), grid(3), slopes=torch.ones(3, 2)), ValueError, "expected None"),
        (lambda: mo.hermite_eval(torch.ones(3, 2), grid(3), tangents="learned", gates=torch.ones(2, 2)), ValueError, "gates: expected shape"),
        (lambda: mo.hermite_derivative(torch.ones(3, 2), grid(3), 3), ValueError, "order: expected one of"),
        (lambda: mo.curvature_energy(torch.ones(3, 2)), ValueError, "n_frames: expected the frames"),
        (lambda: mo.curvature_energy(torch.ones(3, 2), n_frames=1), ValueError, "n_frames: expected a number >= 2"),
        (lambda: mo.curvature_energy(torch.ones(3, 2), kind="linear", n_frames=3), ValueError, "straight lines"),
        (lambda: mo.curvature_energy(torch.ones(12, 2), kind="poly_fourier", form="discrete", n_frames=3), ValueError, "no knots"),
        (lambda: mo.curvature_energy(torch.ones(3, 2), kind="cubic", tangents="monotone", n_frames=3), ValueError, "slopes of its own"),
        (lambda: mo.fit_tracks(torch.ones(2, 3, 2), None, None, grid(4), 2), ValueError, "t: expected shape"),
        (lambda: mo.fit_tracks(torch.ones(2, 3, 2), torch.ones(2, 3), None, grid(3), 2), TypeError, "visible: expected bool"),
        (lambda: mo.fit_tracks(torch.ones(2, 3, 2).long(), None, None, grid(3), 2), TypeError, "tracks: expected a floating"),
        (lambda: mo.fit_tracks(torch.ones(2, 3, 2), None, 2 * torch.ones(2, 3), grid(3), 2), ValueError, "confidence: expected values in"),
        (lambda: mo.fit_tracks(torch.full((2, 3, 2), math.inf), None, None, grid(3), 2), ValueError, "tracks: expected finite"),
        (lambda: mo.fit_tracks(torch.ones(2, 3, 2), torch.tensor([[True] * 3, [False] * 3]), None, grid(3), 2), ValueError, "1 never seen, first track 1"),
        (lambda: mo.fit_tracks(torch.ones(2, 3, 2), None, None, grid(3), 2, lam=-1), ValueError, "lam: expected"),
        (lambda: mo.HermiteTrajectory(-1, 3), ValueError, "n: expected"),
        (lambda: mo.HermiteTrajectory(2, 3, kind="linear", tangents="monotone"), ValueError, "slopes of its own"),
    ],
)
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
