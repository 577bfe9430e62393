"""core.stats: known values, invariants and refusals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from papers10.core.stats import (
    Interval,
    bootstrap_interval,
    frechet_distance,
    mcnemar_exact,
    paired_interval,
    quantiles,
    seed_interval,
    wilson_interval,
)

numbers = st.floats(-1e3, 1e3)


@given(st.lists(numbers, min_size=2, max_size=12), st.sampled_from([0.5, 0.9, 0.95]))
def test_seed_interval_is_scipys(values, level):
    ours = seed_interval(values, level=level)
    error = stats.sem(values)
    reach = stats.t.ppf(0.5 + level / 2, len(values) - 1) * error
    assert ours.low == pytest.approx(np.mean(values) - reach, abs=1e-9)
    assert ours.high == pytest.approx(np.mean(values) + reach, abs=1e-9)
    assert (ours.n, ours.method) == (len(values), "t-seeds")


def test_seed_interval_of_one_seed_has_no_ends():
    found = seed_interval([0.25])
    assert found.mean == 0.25 and math.isnan(found.low) and math.isnan(found.high) and found.method == "single"
    assert str(found) == "0.25 (n=1)"


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")], [[1.0, 2.0]], 3.0])
def test_seed_interval_refuses(values):
    with pytest.raises(ValueError, match="^values: expected"):
        seed_interval(values)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_level_is_a_share(level):
    with pytest.raises(ValueError, match="^level: expected"):
        seed_interval([1, 2], level=level)


def test_words_are_refused():
    with pytest.raises(TypeError, match="values: expected numbers, got list"):
        seed_interval(["a", "b"])


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    x = np.random.default_rng(0).normal(size=500)
    found = bootstrap_interval(x)
    # 10 000 resamples leave about 2 % noise on an end.
    assert found.half_width == pytest.approx(1.96 * x.std() / math.sqrt(500), rel=0.05)
    assert found.mean == pytest.approx(x.mean()) and found.n == 500 and found.method == "bootstrap-items"


@settings(max_examples=20, deadline=None)
@given(st.lists(numbers, min_size=2, max_size=20), st.integers(0, 5))
def test_bootstrap_stays_within_the_data_and_repeats(values, seed):
    found = bootstrap_interval(values, resamples=200, seed=seed)
    slack = 1e-9 * max(1, np.abs(values).max())
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack
    assert found == bootstrap_interval(values, resamples=200, seed=seed)


def test_groups_do_not_believe_copies():
    x = np.random.default_rng(1).normal(size=30)
    groups = np.repeat(np.arange(30), 10)
    honest = bootstrap_interval(x)
    clustered = bootstrap_interval(np.repeat(x, 10), groups=groups)
    assert clustered[1:3] == pytest.approx(honest[1:3]) and clustered.n == 30 and clustered.method == "bootstrap-groups"
    assert bootstrap_interval(np.repeat(x, 10)).half_width < 0.5 * clustered.half_width


def test_group_labels_may_be_words_in_any_order():
    x, labels = [1.0, 2.0, 3.0, 10.0], ["b", "a", "b", "a"]
    order = [2, 0, 3, 1]
    a = bootstrap_interval(x, groups=labels, resamples=500)
    b = bootstrap_interval([x[i] for i in order], groups=[labels[i] for i in order], resamples=500)
    assert a == b


def test_groups_of_unequal_size_weigh_by_items():
    # The clustered mean is a ratio of sums, as the statistic of the pooled items.
    x, groups = [0.0, 1.0, 1.0, 1.0], [0, 1, 1, 1]
    fast = bootstrap_interval(x, groups=groups, resamples=400)
    slow = bootstrap_interval(x, groups=groups, resamples=400, statistic=lambda v: v.mean())
    assert fast.mean == slow.mean == 0.75 and fast[1:3] == pytest.approx(slow[1:3])


@pytest.mark.parametrize("method", ["percentile", "basic", "bca"])
def test_bootstrap_methods(method):
    x = np.random.default_rng(2).exponential(size=200)
    found = bootstrap_interval(x, method=method, resamples=2000)
    assert found.low < found.mean < found.high
    assert bootstrap_interval(np.ones(5), method=method, resamples=100)[:3] == (1, 1, 1)


@pytest.mark.parametrize(
    ("items", "arguments", "name"),
    [
        ([], {}, "items"),
        ([1.0], {}, "items"),
        ([1.0, float("nan")], {}, "items"),
        (np.zeros((2, 2, 2)), {}, "items"),
        ([1.0, 2.0], {"groups": [0, 0]}, "groups"),
        ([1.0, 2.0], {"groups": [0]}, "groups"),
        ([1.0, 2.0], {"resamples": 0}, "resamples"),
        ([1.0, 2.0], {"method": "bcb"}, "method"),
        ([1.0, 2.0], {"statistic": lambda v: float("nan")}, "statistic"),
    ],
)
def test_bootstrap_refuses(items, arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        bootstrap_interval(items, **arguments)


def test_paired():
    a, b = [3.0, 5.0, 8.0], [2.0, 4.0, 6.0]
    assert paired_interval(a, b) == seed_interval([1.0, 1.0, 2.0])._replace(method="t-pairs")
    by_item = paired_interval(a, b, method="bootstrap", resamples=100)
    assert by_item.method == "bootstrap-items-paired" and 1 <= by_item.low <= by_item.high <= 2
    assert paired_interval(a, b, groups=[0, 0, 1], resamples=100).n == 2
    with pytest.raises(ValueError, match="b: expected 3 values, paired with a, got 2"):
        paired_interval(a, b[:2])


def test_wilson_known_values():
    # R. G. Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3.
    for k, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(k, n)[1:3] == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 300), st.data())
def test_wilson_is_scipys_and_inside(n, data):
    k = data.draw(st.integers(0, n))
    found = wilson_interval(k, n)
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert found[1:3] == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize(
    ("k", "n", "error"), [(-1, 3, ValueError), (4, 3, ValueError), (0, 0, ValueError), (1.5, 3, TypeError)]
)
def test_wilson_refuses(k, n, error):
    with pytest.raises(error, match="expected"):
        wilson_interval(k, n)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_counts_and_is_symmetric(pairs):
    a, b = zip(*pairs)
    found, mirrored = mcnemar_exact(a, b), mcnemar_exact(b, a)
    assert (found.only_a, found.only_b) == (mirrored.only_b, mirrored.only_a)
    assert found.p_value == pytest.approx(mirrored.p_value) and 0 < found.p_value <= 1


def test_mcnemar_known_value():
    # 1 against 9 disagreements: 2 (C(10,0) + C(10,1)) / 2^10.
    assert mcnemar_exact([1] * 1 + [0] * 9, [0] * 1 + [1] * 9).p_value == pytest.approx(22 / 1024)
    with pytest.raises(ValueError, match="a: expected 0 or 1, got 0.5"):
        mcnemar_exact([0.5], [1])


def test_frechet_against_the_matrix_root():
    random = np.random.default_rng(3)
    a, b = random.normal(size=(2, 6, 6))
    c1, c2, m1, m2 = a @ a.T, b @ b.T, *random.normal(size=(2, 6))
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(linalg.sqrtm(c1 @ c2)))
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(m1, c1, m1, c1) == pytest.approx(0, abs=1e-9)


def test_frechet_of_singular_covariances():
    assert frechet_distance([0, 0], np.diag([1.0, 0]), [0, 0], np.diag([0, 1.0])) == pytest.approx(2)


def test_frechet_unsquared_mean():
    assert frechet_distance([0, 0], np.eye(2), [3, 4], np.eye(2), squared_mean=False) == pytest.approx(5)


@pytest.mark.parametrize(
    ("cov", "name"),
    [([[1, 1], [0, 1]], "cov1"), (np.diag([1, -1]), "cov1"), (np.eye(3), "cov1"), (np.eye(2) * np.nan, "cov1")],
)
def test_frechet_refuses(cov, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        frechet_distance([0, 0], cov, [0, 0], np.eye(2))


def test_quantiles():
    assert quantiles(range(101)).tolist() == [5, 25, 50, 75, 95]
    assert quantiles(np.arange(6).reshape(2, 3), [0.5], axis=0).tolist() == [[1.5, 2.5, 3.5]]
    for bad in ([], [float("nan")]):
        with pytest.raises(ValueError, match="^values: expected"):
            quantiles(bad)
    with pytest.raises(ValueError, match=r"^q\[0\]: expected"):
        quantiles([1], [2])


def test_interval_reads_well():
    assert str(Interval(0.91234567, 0.9, 0.95, 3, "t-seeds")) == "0.9123 [0.9, 0.95]"
