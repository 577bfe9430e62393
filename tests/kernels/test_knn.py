"""Nearest neighbours: the same bits on every path, ties, copies, hard scales, bad input, bounded memory."""

import math
import os
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from papers10.core.bench import extra_memory
from papers10.core.random import generator
from papers10.kernels import knn as module
from papers10.kernels.common import BackendUnavailable, installed, interpreting, last_backend
from papers10.kernels.knn import METRICS, knn, knn_reference

PATHS = [
    (backend, metric) for backend in ("torch", "kdtree") for metric in METRICS if (backend, metric) != ("kdtree", "dot")
]


def draw(rows, width, seed=0, dtype=torch.float64):
    return torch.randn(rows, width, generator=generator(seed, "knn", rows, width), dtype=torch.float64).to(dtype)


def same(got, expected):
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[0], expected[0])


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    m=st.integers(0, 30),
    n=st.integers(1, 150),
    width=st.integers(1, 9),
    share=st.floats(0, 1),
    path=st.sampled_from(PATHS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    chunk=st.sampled_from([1, 7, 64, 4096]),
    exclude_self=st.booleans(),
    grid=st.booleans(),
    offset=st.sampled_from([0.0, 100.0]),
)
def test_every_path_returns_the_bits_of_the_reference(
    seed, m, n, width, share, path, dtype, chunk, exclude_self, grid, offset
):
    backend, metric = path
    reference = draw(n + exclude_self, width, seed=seed)
    reference = ((reference.round() if grid else reference) + offset + 10 * (metric == "cosine" and grid)).to(dtype)
    query = reference if exclude_self else (draw(m, width, seed=seed + 1) + offset).to(dtype)
    k = 1 + round(share * (n - 1))
    expected = knn_reference(query, reference, k, metric=metric, exclude_self=exclude_self)
    same(knn(query, reference, k, metric=metric, exclude_self=exclude_self, chunk=chunk, backend=backend), expected)
    assert (expected[0].diff(dim=1) >= 0).all()
    tied = expected[0].diff(dim=1) == 0
    assert (expected[1].diff(dim=1)[tied] > 0).all()
    if exclude_self:
        assert not (expected[1] == torch.arange(n + 1)[:, None]).any()


@pytest.mark.parametrize(
    "metric, name", [("euclidean", "euclidean"), ("sqeuclidean", "sqeuclidean"), ("cosine", "cosine")]
)
def test_the_reference_is_what_scipy_says(metric, name):
    query, reference = draw(25, 6), draw(90, 6, seed=1)
    distances, indices = knn_reference(query, reference, 7, metric=metric)
    table = cdist(query.numpy(), reference.numpy(), name)
    np.testing.assert_array_equal(indices.numpy(), np.argsort(table, axis=1, kind="stable")[:, :7])
    np.testing.assert_allclose(distances.numpy(), np.sort(table, axis=1)[:, :7], rtol=1e-12, atol=1e-14)


def test_the_reference_by_products():
    query, reference = draw(25, 6), draw(90, 6, seed=1)
    products, order = (query @ reference.T).sort(1, descending=True)
    distances, indices = knn_reference(query, reference, 7, metric="dot")
    assert torch.equal(indices, order[:, :7])
    torch.testing.assert_close(-distances, products[:, :7])


@pytest.mark.parametrize("backend", ["reference", "torch", "kdtree"])
def test_equals_a_tree(backend):
    query, reference = draw(40, 3), draw(700, 3, seed=1)
    distances, indices = cKDTree(reference.numpy()).query(query.numpy(), k=5)
    got = knn(query, reference, 5, backend=backend)
    np.testing.assert_array_equal(got[1].numpy(), indices)
    np.testing.assert_allclose(got[0].numpy(), distances, rtol=1e-14)


@pytest.mark.parametrize("backend", ["reference", "torch", "kdtree"])
def test_ties_take_the_lower_index(backend):
    cross = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [-1.0, 0.0], [0.0, 0.5]])
    distances, indices = knn(torch.zeros(1, 2), cross, 4, backend=backend)
    assert indices.tolist() == [[4, 0, 1, 2]] and distances.tolist() == [[0.5, 1, 1, 1]]
    copies = torch.ones(300, 3)
    assert torch.equal(knn(copies[:4], copies, 6, backend=backend)[1], torch.arange(6).expand(4, 6))
    assert knn(copies, copies, 2, exclude_self=True, backend=backend)[1][:3].tolist() == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.parametrize("backend", ["torch", "kdtree"])
def test_two_crowds_of_copies_and_a_few_others(backend):
    reference = torch.cat((torch.zeros(150, 3), torch.full((150, 3), 5.0), draw(20, 3, dtype=torch.float32)))
    same(
        knn(reference, reference, 12, exclude_self=True, backend=backend),
        knn_reference(reference, reference, 12, exclude_self=True),
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "dtype, size", [("float32", 1e38), ("float32", 1e-30), ("float64", 1e140), ("float64", 1e-100)]
)
def test_sizes_near_the_end_of_the_range(metric, dtype, size):
    query, reference = ((0.3 * size * draw(rows, 8, seed=rows).tanh()).to(getattr(torch, dtype)) for rows in (15, 400))
    same(knn(query, reference, 5, metric=metric, backend="torch"), knn_reference(query, reference, 5, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
def test_clusters_far_smaller_than_their_distance_from_the_origin(metric):
    near = (1000 + 1e-3 * draw(400, 8)).float()
    same(
        knn(near, near, 5, metric=metric, exclude_self=True, backend="torch"),
        knn_reference(near, near, 5, metric=metric, exclude_self=True),
    )


@pytest.mark.parametrize("metric", METRICS)
def test_one_point_far_away_from_all(metric):
    reference = draw(500, 6, dtype=torch.float32)
    reference[77] = 1e12
    same(
        knn(reference, reference, 4, metric=metric, backend="torch"),
        knn_reference(reference, reference, 4, metric=metric),
    )


def test_a_query_of_length_zero_has_the_first_points_by_product():
    assert knn(torch.zeros(1, 4), draw(200, 4).float(), 3, metric="dot")[1].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("metric", METRICS)
def test_the_margin_covers_the_rounding(metric):
    """What is left out never lies below the bound, also for points without any structure in common."""
    query, reference = draw(30, 200, dtype=torch.float32) + 3, draw(900, 200, seed=1, dtype=torch.float32) * 5
    lengths = (module._lengths("x", points, 100) if metric == "cosine" else None for points in (query, reference))
    asking, points = (module._Points(*pair) for pair in zip((query, reference), lengths))
    bounds, columns = module._Product(asking, points, metric, 128).candidates(torch.arange(30), 900)
    exact = module._refined(asking, points, torch.arange(30), columns, metric)
    assert (bounds <= exact).all()
    assert ((exact - bounds) / exact.abs().amax()).max() < 1e-3
    assert torch.equal(columns.sort(1).values, torch.arange(900).expand(30, 900))


@pytest.mark.parametrize("backend, metric", PATHS)
def test_ordinary_points_are_proven_without_a_full_search(backend, metric, monkeypatch):
    def never(*arguments):
        raise AssertionError("searched in full")

    monkeypatch.setattr(module, "_in_full", never)
    for width in (2, 48):
        query, reference = draw(60, width, dtype=torch.float32), draw(1500, width, seed=1, dtype=torch.float32)
        knn(query, reference, 8, metric=metric, backend=backend)


def test_products_that_may_round_coarsely_are_taken_in_float64():
    points = module._Points(draw(50, 8, dtype=torch.float32), None)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert module._Product(points, points, "euclidean", 64).dtype == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)
    assert module._Product(points, points, "euclidean", 64).dtype == torch.float32


def test_autocast_changes_nothing():
    query, reference = draw(20, 40, dtype=torch.float32), draw(500, 40, seed=1, dtype=torch.float32)
    expected = knn(query, reference, 5)
    with torch.autocast("cpu", torch.bfloat16):
        same(knn(query, reference, 5), expected)
        same(knn(query, reference, 5, refine=False), knn(query, reference, 5, refine=False))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("exclude_self", [False, True])
def test_without_refinement_distances_are_close(metric, exclude_self):
    reference = draw(600, 32, dtype=torch.float32)
    query = reference if exclude_self else draw(40, 32, seed=1, dtype=torch.float32)
    options = {"metric": metric, "exclude_self": exclude_self}
    got = knn(query, reference, 6, refine=False, backend="torch", **options)
    expected = knn_reference(query, reference, 6, **options)
    torch.testing.assert_close(got[0], expected[0], atol=1e-4, rtol=1e-4)
    assert got[0].dtype == torch.float64 and got[1].dtype == torch.int64


@pytest.mark.parametrize("backend", ["reference", "torch", "kdtree"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_arguments_stay_as_they_were_and_results_carry_no_gradient(backend, metric):
    query, reference = draw(9, 3).requires_grad_(), draw(70, 3, seed=1).requires_grad_()
    before = query.detach().clone(), reference.detach().clone()
    distances, indices = knn(query, reference, 2, metric=metric, backend=backend)
    assert not distances.requires_grad and not indices.requires_grad
    assert torch.equal(query, before[0]) and torch.equal(reference, before[1])
    assert distances.dtype == torch.float64 and indices.dtype == torch.int64


def test_moved_or_permuted_points_keep_their_neighbours():
    points, order = draw(300, 4).round(decimals=3), torch.randperm(300, generator=generator(0, "order"))
    distances = knn(points, points, 5, exclude_self=True)[0]
    moved = knn(points[:, [2, 0, 3, 1]] + 1, points[:, [2, 0, 3, 1]] + 1, 5, exclude_self=True)
    torch.testing.assert_close(moved[0], distances)
    shuffled = knn(points[order], points[order], 5, exclude_self=True)
    torch.testing.assert_close(shuffled[0], distances[order])


def test_empty_and_smallest():
    distances, indices = knn(torch.zeros(0, 3), torch.zeros(5, 3), 2)
    assert distances.shape == indices.shape == (0, 2)
    for backend in ("reference", "torch", "kdtree"):
        same(
            knn(torch.ones(1, 1), torch.zeros(1, 1), 1, backend=backend),
            (torch.ones(1, 1).double(), torch.zeros(1, 1).long()),
        )


def test_what_auto_takes():
    few, many = draw(10, 3), draw(200, 3, seed=1)
    for arguments, taken in (
        ((few, many, 1), "torch"),
        ((many, many, 1), "kdtree"),
        ((draw(200, 20), draw(200, 20), 1), "torch"),
    ):
        knn(*arguments)
        assert last_backend("knn") == taken
    knn(many, many, 1, metric="dot")
    assert last_backend("knn") == "torch"


@pytest.mark.parametrize("size", [3000, 12000])
def test_memory_does_not_grow_with_the_table(size):
    points = draw(size, 16, dtype=torch.float32)
    extra = extra_memory(lambda: knn(points, points, 4, backend="torch"))
    assert extra < 16e6 + 1000 * size


def test_strided_arguments():
    wide = draw(300, 12)
    strided = wide[::2, ::3]
    same(knn(strided, strided.flip(0), 4, backend="torch"), knn_reference(strided.contiguous(), strided.flip(0), 4))


Q, R = torch.zeros(4, 3), torch.ones(9, 3)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch", "kdtree"])
@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((None, R, 1), {}, TypeError, "query: expected a tensor, got NoneType"),
        ((Q, np.ones((9, 3)), 1), {}, TypeError, "reference: expected a tensor, got ndarray"),
        ((Q, R.long(), 1), {}, TypeError, "reference: expected a floating dtype, got torch.int64; use .double()"),
        ((Q[0], R, 1), {}, ValueError, "query: expected shape [m, d] with d >= 1, got [3]"),
        ((Q[:, :0], R[:, :0], 1), {}, ValueError, "query: expected shape [m, d] with d >= 1, got [4, 0]"),
        ((Q, R[:, :2], 1), {}, ValueError, "reference: expected shape [n, 3] for query [4, 3], got [9, 2]"),
        ((Q, R.to("meta"), 1), {}, ValueError, "reference: expected the device of query, cpu, got meta"),
        (
            (Q, R, 10),
            {},
            ValueError,
            "k: expected a whole number from 1 to 9, the points that can be neighbours, got 10",
        ),
        ((Q, R, 0), {}, ValueError, "k: expected"),
        ((Q, R, 2.0), {}, ValueError, "k: expected"),
        ((Q, R, True), {}, ValueError, "k: expected"),
        ((Q, R[:0], 1), {}, ValueError, "k: expected a whole number from 1 to 0"),
        ((R, R, 9), {"exclude_self": True}, ValueError, "k: expected a whole number from 1 to 8"),
        (
            (Q, R, 1),
            {"exclude_self": True},
            ValueError,
            "exclude_self: expected query and reference to be the same points, got shapes [4, 3] and [9, 3]",
        ),
        (
            (R + 1, R, 1),
            {"exclude_self": True},
            ValueError,
            "exclude_self: expected query and reference to be the same points, got different values",
        ),
        ((Q, R, 1), {"chunk": 0}, ValueError, "chunk: expected a whole number >= 1, got 0"),
        (
            (Q, R, 1),
            {"metric": "l2"},
            ValueError,
            "metric: expected one of euclidean, sqeuclidean, cosine, dot, got 'l2'",
        ),
        (
            (Q, R, 1),
            {"metric": "cosine"},
            ValueError,
            "query: expected rows of length > 0 for metric='cosine', got length 0 at row 0",
        ),
        (
            (Q, R.index_fill(0, torch.tensor([5]), math.nan), 1),
            {},
            ValueError,
            "reference: expected finite numbers below 1e150, got 3 others, the first nan at row 5",
        ),
        ((Q - math.inf, R, 1), {}, ValueError, "query: expected finite numbers"),
        ((Q.double() + 1e200, R, 1), {}, ValueError, "query: expected finite numbers below 1e150"),
    ],
)
def test_bad_input_is_named(arguments, options, error, message, backend):
    with pytest.raises(error) as caught:
        knn(*arguments, **options, backend=backend)
    assert message in str(caught.value)


def test_bad_backends_are_named():
    with pytest.raises(ValueError, match="nearest: 'kdtree'"):
        knn(Q, R, 1, backend="kdtre")
    with pytest.raises(
        ValueError, match="metric: expected 'euclidean', 'sqeuclidean' or 'cosine' for backend='kdtree', got 'dot'"
    ):
        knn(Q, R, 1, metric="dot", backend="kdtree")
    with pytest.raises(TypeError):
        knn(Q, R, 1, order="ascending")


INTERPRETED = """
import torch
from papers10.kernels import knn as module
from papers10.kernels.knn import METRICS, knn, knn_reference

draw = torch.Generator().manual_seed(0)
r = lambda *shape: torch.randn(*shape, generator=draw)

def same(got, expected):
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])

def never(*arguments):
    raise AssertionError("searched in full")

full, module._in_full = module._in_full, never
for metric in METRICS:
    query, points = r(20, 40), r(300, 40)
    torch.set_float32_matmul_precision("medium" if metric == "dot" else "highest")
    same(knn(query, points, 4, metric=metric, backend="triton"), knn_reference(query, points, 4, metric=metric))
    rough = knn(query, points, 4, metric=metric, backend="triton", refine=False)
    torch.testing.assert_close(rough[0], knn_reference(query, points, 4, metric=metric)[0], atol=1e-4, rtol=1e-4)
torch.set_float32_matmul_precision("highest")
query, points = r(17, 2), r(2500, 2)
same(knn(query, points, 3, backend="triton"), knn_reference(query, points, 3))
module._in_full = full
crowd = torch.cat((torch.ones(60, 3), r(10, 3)))
same(knn(crowd, crowd, 3, exclude_self=True, backend="triton"), knn_reference(crowd, crowd, 3, exclude_self=True))
for arguments in ((query.double(), points, 3), (query, points, 121)):
    try: knn(*arguments, backend="triton")
    except (TypeError, ValueError) as problem: print(type(problem).__name__, problem)
"""


@pytest.mark.skipif(not installed("triton"), reason="Triton is not installed")
def test_triton_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "TypeError backend: expected query and reference in float32, bfloat16 or float16 for 'triton', got torch.float64 and torch.float32; use backend='torch'",
        "ValueError k: expected at most 120 for backend='triton', got 121; use backend='torch'",
    ]


@pytest.mark.skipif(
    interpreting() or not installed("triton"), reason="Triton's interpreter is on, or Triton is not installed"
)
def test_triton_on_a_processor_says_what_to_do():
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1"):
        knn(Q, R, 1, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("metric", METRICS)
def test_a_graphics_card_returns_the_same_bits(metric):
    query, reference = draw(300, 24, dtype=torch.float32), draw(5000, 24, seed=1, dtype=torch.float32)
    got = knn(query.cuda(), reference.cuda(), 9, metric=metric)
    assert last_backend("knn") == "triton"
    expected = knn(query, reference, 9, metric=metric)
    same([value.cpu() for value in got], expected)
    same([value.cpu() for value in knn(query.cuda(), reference.cuda(), 9, metric=metric, backend="torch")], expected)
    crowd = torch.cat((reference[:, :3], torch.ones(900, 3)))
    same(
        [value.cpu() for value in knn(crowd.cuda(), crowd.cuda(), 3, exclude_self=True)],
        knn(crowd, crowd, 3, exclude_self=True),
    )
    with pytest.raises(BackendUnavailable):
        knn(query.cuda(), reference.cuda(), 1, backend="kdtree")
