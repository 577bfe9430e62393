"""splat.rotations: hand values, round trips, gradients and refusals."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp

from papers10.core.random import generator
from papers10.splat import rotations as ro

FLOAT64 = torch.float64


def draw(*shape, name="rotations", unit=False):
    values = torch.randn(*shape, generator=generator(0, name), dtype=FLOAT64)
    return torch.nn.functional.normalize(values, dim=-1) if unit else values


def scipy_matrix(q):
    return torch.from_numpy(Rotation.from_quat(ro.convert_quat(q, "wxyz", "xyzw").numpy()).as_matrix())


def test_products_matrices_and_turns_agree_with_scipy():
    a, b, v = draw(50, 4, name="a"), draw(50, 4, name="b"), draw(50, 3, name="v")
    torch.testing.assert_close(ro.quat_to_matrix(a), scipy_matrix(a))
    torch.testing.assert_close(ro.quat_to_matrix(ro.quat_mul(a, b)), scipy_matrix(a) @ scipy_matrix(b))
    torch.testing.assert_close(ro.rotate(a, v), (scipy_matrix(a) @ v[..., None])[..., 0])
    torch.testing.assert_close(ro.quat_to_matrix(ro.quat_conjugate(a)), scipy_matrix(a).mT)


def test_leading_dimensions_broadcast():
    assert ro.quat_mul(draw(5, 1, 4), draw(3, 4)).shape == (5, 3, 4)
    assert ro.rotate(draw(5, 1, 4), draw(3, 3)).shape == (5, 3, 3)
    assert ro.quat_slerp(draw(5, 1, 4), draw(3, 4), torch.rand(5, 3)).shape == (5, 3, 4)
    assert ro.quat_to_matrix(draw(0, 4)).shape == (0, 3, 3)
    assert ro.matrix_to_quat(ro.quat_to_matrix(draw(0, 4))).shape == (0, 4)


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, -2, 0.5)])
@pytest.mark.parametrize("angle", [0.0, 1e-7, 1.0, math.pi - 1e-7, math.pi])
def test_matrix_to_quat_is_exact_at_every_angle(axis, angle):
    r = angle * torch.nn.functional.normalize(torch.tensor(axis, dtype=FLOAT64), dim=0)
    matrix = ro.quat_to_matrix(ro.so3_exp(r)).requires_grad_()
    q = ro.matrix_to_quat(matrix)
    assert q[0] >= 0
    torch.testing.assert_close(ro.quat_to_matrix(q), matrix, rtol=0, atol=1e-14)
    q.sum().backward()
    assert matrix.grad.isfinite().all()


def test_gradients():
    q, v = draw(6, 4, unit=True).requires_grad_(), draw(6, 3, name="v").requires_grad_()
    check = torch.autograd.gradcheck
    assert check(ro.quat_mul, (q, draw(6, 4, name="b").requires_grad_()))
    assert check(ro.rotate, (q, v))
    assert check(ro.quat_to_matrix, (q,))
    assert check(lambda q: ro.matrix_to_quat(ro.quat_to_matrix(q)), (q,))
    assert check(ro.so3_exp, (v,)) and check(ro.so3_log, (q,)) and check(ro.quat_log, (q,))
    fractions = torch.linspace(0.1, 0.9, 6, dtype=FLOAT64).requires_grad_()
    assert check(ro.quat_slerp, (q, draw(6, 4, name="b").requires_grad_(), fractions))
    assert check(lambda q: ro.quat_mean(q), (draw(3, 4, unit=True).requires_grad_(),))


@pytest.mark.parametrize("length", [0.0, 1e-12, 1e-5, 1e-3])
def test_so3_exp_near_zero(length):
    r = (length * torch.tensor([0.6, 0.0, -0.8], dtype=FLOAT64)).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(ro.so3_exp, r)
    expected = torch.cat([torch.zeros(1, 3, dtype=FLOAT64), 0.5 * torch.eye(3, dtype=FLOAT64)])
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=0.26 * length + 1e-15)
    assert torch.autograd.gradcheck(ro.so3_exp, (r,)) and torch.autograd.gradgradcheck(ro.so3_exp, (r,))


def test_known_exponentials():
    torch.testing.assert_close(ro.so3_exp(torch.tensor([0.0, 0, math.pi])), torch.tensor([0.0, 0, 0, 1]), rtol=0, atol=1e-6)
    r = draw(100, 3)
    torch.testing.assert_close(ro.so3_exp(r), ro.quat_exp(r / 2))
    torch.testing.assert_close(ro.quat_to_matrix(ro.so3_exp(r)), torch.from_numpy(Rotation.from_rotvec(r.numpy()).as_matrix()))


def test_logarithms_go_back():
    v = draw(200, 3) * torch.logspace(-12, 0, 200, dtype=FLOAT64)[:, None]
    v = v[v.norm(dim=-1) < 3.1]
    torch.testing.assert_close(ro.quat_log(2.5 * ro.quat_exp(v)), v, rtol=1e-9, atol=0)
    q = draw(200, 4)
    torch.testing.assert_close(ro.so3_log(q), ro.so3_log(-q))
    torch.testing.assert_close(ro.so3_log(q), torch.from_numpy(Rotation.from_quat(ro.convert_quat(q, "wxyz", "xyzw").numpy()).as_rotvec()))
    minus_one = torch.tensor([-1.0, 0, 0, 0])
    assert torch.equal(ro.quat_log(minus_one), torch.zeros(3)) and torch.equal(ro.so3_log(minus_one), torch.zeros(3))


def test_slerp_is_scipys_and_takes_the_short_way():
    a, b = draw(2, 4, unit=True)
    times = torch.linspace(0, 1, 9, dtype=FLOAT64)
    theirs = Slerp([0, 1], Rotation.from_quat(ro.convert_quat(torch.stack([a, b]), "wxyz", "xyzw").numpy()))(times.numpy())
    ours = ro.quat_slerp(a, -b, times)
    torch.testing.assert_close(ro.quat_to_matrix(ours), torch.from_numpy(theirs.as_matrix()))
    angle = ro.so3_log(ro.quat_mul(ro.quat_conjugate(ours[:-1]), ours[1:])).norm(dim=-1)
    torch.testing.assert_close(angle, angle[:1].expand(8))
    torch.testing.assert_close(ro.quat_slerp(a, a, 0.3), a)
    long_way = ro.quat_slerp(a, -b if (a @ b) > 0 else b, 0.5, shortest=False)
    assert abs(float(long_way @ ro.quat_slerp(a, b, 0.5))) < 1e-12


def test_slerp_of_equal_rotations_has_a_gradient():
    a = draw(4, unit=True).requires_grad_()
    ro.quat_slerp(a, a.detach().clone(), 0.5).sum().backward()
    assert a.grad.isfinite().all()


def test_mean_is_blind_to_signs_and_weighs():
    q = draw(7, 4)
    mean = ro.quat_mean(q)
    flipped = q * torch.tensor([1, -1, 1, -1, 1, 1, -1.0])[:, None]
    torch.testing.assert_close(ro.quat_mean(flipped), mean)
    theirs = Rotation.from_quat(ro.convert_quat(q, "wxyz", "xyzw").numpy()).mean()
    torch.testing.assert_close(ro.quat_to_matrix(mean), torch.from_numpy(theirs.as_matrix()))
    only_second = torch.zeros(7, dtype=FLOAT64)
    only_second[1] = 2
    torch.testing.assert_close(ro.quat_to_matrix(ro.quat_mean(q, only_second)), ro.quat_to_matrix(q[1]))


def test_convert_quat_round_trip():
    q = draw(5, 4)
    assert torch.equal(ro.convert_quat(ro.convert_quat(q, "wxyz", "xyzw"), "xyzw", "wxyz"), q)
    assert torch.equal(ro.convert_quat(q, "wxyz", "wxyz"), q)


def test_zero_and_half_precision():
    zero = torch.zeros(4, requires_grad=True)
    assert torch.equal(ro.quat_to_matrix(zero), torch.eye(3))
    ro.quat_to_matrix(zero).sum().backward()
    assert zero.grad.isfinite().all()
    with pytest.warns(UserWarning, match="raised to float32"):
        assert ro.so3_exp(torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ro.quat_normalize(torch.ones(2, 3)), ValueError, "q: expected"),
        (lambda: ro.quat_mul(torch.ones(4), torch.ones(5)), ValueError, "b: expected"),
        (lambda: ro.quat_to_matrix(torch.ones(4, dtype=torch.int64)), TypeError, "q: expected a floating"),
        (lambda: ro.so3_exp([0.0, 0, 0]), TypeError, "r: expected"),
        (lambda: ro.rotate(torch.ones(4), torch.ones(4)), ValueError, "v: expected"),
        (lambda: ro.matrix_to_quat(2 * torch.eye(3)), ValueError, "matrix: expected a rotation"),
        (lambda: ro.matrix_to_quat(-torch.eye(3)), ValueError, "reflection"),
        (lambda: ro.quat_slerp(torch.ones(4), torch.ones(4), math.nan), ValueError, "t: expected finite"),
        (lambda: ro.quat_mean(torch.ones(0, 4)), ValueError, "at least one"),
        (lambda: ro.quat_mean(torch.ones(2, 4), torch.ones(3)), ValueError, "weights: expected"),
        (lambda: ro.quat_mean(torch.ones(2, 4), torch.zeros(2)), ValueError, "positive sum"),
        (lambda: ro.convert_quat(torch.ones(4), "wxyz", "zyxw"), ValueError, "dst: expected one of"),
    ],
)
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
