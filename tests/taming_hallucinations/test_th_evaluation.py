"""Pairwise accuracy by hand, its bounds, comparisons, scores of usefulness, the paper's tables, power, bad input."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from papers10.core.random import numpy_generator
from papers10.core.stats import wilson_interval
from papers10.taming_hallucinations import evaluation as E

GOLD = (["A", "B", "C", "D"], ["B", "C", "A", "A"])


def test_a_report_by_hand():
    report = E.pairwise_accuracy(["A", "B", None, "D"], [1, -1, 2, 0], *GOLD, ["x", "x", "y", "y"])
    assert (report.n, report.real.mean, report.cf.mean, report.both.mean, report.unparsable) == (4, 0.75, 0.5, 0.5, 2)
    assert report.right_both.tolist() == [True, False, False, True]
    assert {name: (part.n, part.both.mean) for name, part in report.categories.items()} == {"x": (2, 0.5), "y": (2, 0.5)}
    assert report.both == wilson_interval(2, 4)
    assert report.metrics("test/") == {"test/real": 75, "test/cf": 50, "test/both": 50, "test/unparsable": 25, "test/both/x": 50, "test/both/y": 50}
    assert [row["category"] for row in report.rows()] == ["x", "y", "overall"] and report.rows()[-1]["Both"].high == pytest.approx(100 * report.both.high)


def test_an_unreadable_answer_is_wrong_and_stays_in_the_count():
    texts = ["<answer>B</answer>", "no idea", "", "The answer is C"]
    assert E.parse_answers(texts).tolist() == [1, -1, -1, 2]
    assert E.parse_answers(["it stays", "it flies"], [["it goes", "it stays"]] * 2).tolist() == [1, -1]
    assert E.pairwise_accuracy(E.parse_answers(texts), [1] * 4, [1] * 4, [0] * 4).real.mean == 0.25
    with pytest.raises(ValueError, match="options: expected 4 lists"):
        E.parse_answers(texts, [["a"]])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10_000))
def test_bounds_of_the_three_shares(n, seed):
    draw = numpy_generator(seed, "bounds")
    real = draw.integers(0, 4, n)
    cf = (real + draw.integers(1, 4, n)) % 4
    told = draw.integers(-1, 4, (2, n))
    report = E.pairwise_accuracy(told[0], told[1], real, cf)
    assert max(0.0, report.real.mean + report.cf.mean - 1) - 1e-12 <= report.both.mean <= min(report.real.mean, report.cf.mean) + 1e-12
    blind = E.pairwise_accuracy(told[0], told[0], real, cf)
    assert blind.both.mean == 0 and blind.real.mean + blind.cf.mean <= 1 + 1e-12, "who does not look is never right on both"


@pytest.mark.parametrize("arguments, error, said", [
    (([0], [1], [0], [0]), ValueError, "pair 0 has A twice"), (([], [], [], []), ValueError, "at least one pair"), (([0, 1], [1], [0], [1]), ValueError, "pred_real: expected 1"),
    (([0], [1], [0], [1, 2]), ValueError, "gold_cf: expected 1"), (([0], [1], [None], [1]), ValueError, r"gold_real\[0\]"), ((["AB"], [1], [0], [1]), TypeError, r"pred_real\[0\]"),
    (([0.5], [1], [0], [1]), TypeError, "pred_real"), (("A", [1], [0], [1]), TypeError, "pred_real"), (([30], [1], [0], [1]), ValueError, "pred_real"),
])
def test_wrong_input_is_named(arguments, error, said):
    with pytest.raises(error, match=said):
        E.pairwise_accuracy(*arguments)


def test_categories_of_another_length():
    with pytest.raises(ValueError, match="categories: expected 4"):
        E.pairwise_accuracy(*GOLD, *GOLD, ["x"])


def test_comparison_by_hand():
    gold = ([0] * 10, [1] * 10)
    a = E.pairwise_accuracy([0] * 8 + [2] * 2, [1] * 10, *gold)
    b = E.pairwise_accuracy([0] * 10, [1] * 3 + [2] * 7, *gold)
    found = E.compare(a, b)
    assert (found.both.only_a, found.both.only_b) == (5, 0) and found.both.p_value == pytest.approx(2 / 2**5)
    assert (found.real.only_a, found.real.only_b, found.discordant) == (0, 2, 0.5)
    assert found.difference.mean == 0.5 and found.difference.low < 0.5 < found.difference.high
    back = E.compare(b, a)
    assert back.difference.mean == -0.5 and back.difference.low == pytest.approx(-found.difference.high)


def test_only_the_same_pairs_are_compared():
    a = E.pairwise_accuracy([0], [1], [0], [1])
    for b in (E.pairwise_accuracy([0], [1], [0], [2]), E.pairwise_accuracy([0, 0], [1, 1], [0, 0], [1, 1])):
        with pytest.raises(ValueError, match="same 1 pairs"):
            E.compare(a, b)


def test_the_paired_interval_covers():
    draw = numpy_generator(0, "coverage")
    counts = draw.multinomial(100, [0.15, 0.05, 0.8], size=2000)
    hits = np.mean([found.low <= 0.1 <= found.high for found in (E.paired_difference(int(b), int(c), 100) for b, c, _ in counts)])
    # Nominal 0.95; three standard deviations of 2000 draws are 0.015, and the interval is slightly conservative.
    assert 0.935 <= hits <= 0.985


def distributions(rows=6, options=4):
    return arrays(np.float64, (rows, options), elements=st.floats(0.01, 1)).map(lambda x: x / x.sum(1, keepdims=True))


@settings(max_examples=40, deadline=None)
@given(distributions(), distributions(), distributions())
def test_total_variation_is_a_bounded_distance(p, q, r):
    d = E.total_variation(p, q)
    assert ((d >= 0) & (d <= 1)).all() and np.allclose(d, E.total_variation(q, p)) and np.allclose(E.total_variation(p, p), 0)
    assert (d <= E.total_variation(p, r) + E.total_variation(r, q) + 1e-12).all()


def test_gaps_of_known_answers_are_one_minus_the_probability():
    p = np.array([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    assert np.allclose(E.visual_gap(p, [0, "B"]), [0.3, 1.0]) and np.allclose(E.prior_gap(p, ["C", 2]), [0.9, 0.0])
    assert np.allclose(E.visual_gap(p, p), 0), "people's own probabilities may stand for the truth"
    assert np.allclose(E.pair_divergence(p, p[::-1]), [0.9, 0.9])


def test_usefulness_and_thresholds():
    blind, real, cf = np.full((3, 2), 0.5), np.array([[0.9, 0.1]] * 3), np.array([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    scores = E.usefulness(blind, real, cf, [0] * 3, [1] * 3)
    assert np.allclose(scores.visual_gap, [0.9, 0.1, 0.5]) and np.allclose(scores.pair_divergence, [0, 0.8, 0.4]) and np.allclose(scores.real_gap, 0.1)
    assert scores.keep(min_visual_gap=0.5, max_real_gap=0.2).tolist() == [True, False, True] and scores.keep(max_pair_divergence=0.1).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="min_prior_gap"):
        scores.keep(min_prior_gap=2)


def test_marginal_is_the_mean_over_clips_of_a_question():
    p = np.array([[1.0, 0], [0, 1], [0.5, 0.5]])
    assert np.allclose(E.marginal(p, ["a", "a", "b"]), 0.5)
    with pytest.raises(ValueError, match="question"):
        E.marginal(p, ["a"])


@pytest.mark.parametrize("call, said", [
    (lambda: E.total_variation(np.ones((1, 2)), np.ones((1, 2)) / 2), "p: expected sums of 1"), (lambda: E.total_variation(np.ones((1, 2)) / 2, np.ones((1, 3)) / 3), "q: expected shape"),
    (lambda: E.visual_gap([0.5, 0.5], [0]), "p_seen: expected shape"), (lambda: E.visual_gap(np.ones((1, 2)) / 2, [3]), "gold"), (lambda: E.visual_gap(np.ones((1, 2)) / 2, [0, 1]), "gold: expected 1"),
    (lambda: E.prior_gap(np.array([[math.nan, 1.0]]), [0]), "p_blind"),
])
def test_scores_refuse_what_is_no_distribution(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_table_1_agrees_with_itself():
    assert len(E.TABLE_1) == 13 and sum(E.PAPER_CATEGORIES.values()) == 599
    for model, cells in E.TABLE_1.items():
        for k in range(3):
            mean = sum(count * cells[name][k] for name, count in E.PAPER_CATEGORIES.items()) / 599
            # Five printed values, each rounded by up to 0.05.
            assert mean == pytest.approx(cells["overall"][k], abs=0.1), (model, k)
        assert all(cell[2] <= min(cell[:2]) + 1e-9 for cell in cells.values())


def test_tables_agree_with_each_other():
    column = "DualityVidQA-Test"
    for model, cells in E.TABLE_2.items():
        assert cells[column] == E.TABLE_1[model]["overall"][2]
    assert E.TABLE_5["7B SFT+RL"] == E.TABLE_4["DNA"] == E.TABLE_2["DNA-Train-7B"] and E.TABLE_5["7B SFT"] == E.TABLE_4["SFT"]
    assert E.TABLE_6["LLaVA-Next-Video base"] == E.TABLE_2["LLaVA-Next-Video"] and E.TABLE_2["VideoChat2-HD"]["TOMATO"] is None
    assert (E.TABLE_3["paired"][column], E.TABLE_4["SFT"][column]) == (70.6, 58.7), "both printed, and both shown"


def test_the_headline_is_points_not_per_cent():
    points, relative = E.gain(E.TABLE_2["Qwen2.5-VL-7B"]["DualityVidQA-Test"], E.TABLE_2["DNA-Train-7B"]["DualityVidQA-Test"])
    assert points == pytest.approx(24.0) and relative == pytest.approx(45.45, abs=0.01)
    assert "45.5 %" in E.FOOTNOTES["relative"]
    with pytest.raises(ValueError, match="before"):
        E.gain(0, 10)


def test_our_row_stands_below_the_papers():
    report = E.pairwise_accuracy(*GOLD, *GOLD, ["attribute change"] * 4)
    row = E.paper_rows({"ours": report})[-1]
    assert row["model"] == "ours" and row["attribute change"] == 100.0 and row["causal reversal"] is None and len(E.paper_rows()) == 13


def test_two_points_are_significant_only_with_few_discordant_pairs():
    found = E.mcnemar_range(76.8, 74.6, 599)
    assert found["discordant"][0] == 13 and found["p_value"][0] == pytest.approx(2 / 2**13) and (np.diff(found["p_value"]) >= 0).all()
    assert found["discordant"][found["p_value"] < 0.05].max() == 37
    assert found["p_value"][found["discordant"] >= 60].min() > 0.1
    assert E.mcnemar_range(76.8, 52.8, 599)["p_value"].max() < 1e-6
    assert E.mcnemar_range(50, 50, 10)["p_value"].tolist() == [1.0] * 6


def test_the_range_agrees_with_the_test_itself():
    gold = ([0] * 20, [1] * 20)
    a, b = (E.pairwise_accuracy([0 if ok else 2 for ok in right], [1] * 20, *gold) for right in ([1] * 12 + [0] * 8, [1] * 5 + [0] * 7 + [1] * 3 + [0] * 5))
    found, test = E.mcnemar_range(60, 40, 20), E.compare(a, b).both
    assert found["p_value"][found["discordant"] == test.only_a + test.only_b][0] == pytest.approx(test.p_value)


def test_pairs_needed_gives_the_power_asked_for():
    # Four standard deviations of 2000 simulated tests are 0.036; the exact test is a little weaker than the normal one.
    assert E.mcnemar_power(E.pairs_needed(0.05, 0.15), 0.05, 0.15) == pytest.approx(0.8, abs=0.05)
    assert E.mcnemar_power(500, 1e-9, 0.2) < 0.06
    assert E.pairs_needed(0.022, 0.2) > E.pairs_needed(0.022, 0.1) > 599


@pytest.mark.parametrize("call", [lambda: E.pairs_needed(0.2, 0.1), lambda: E.pairs_needed(0, 0.1), lambda: E.mcnemar_power(10, 0.2, 0.1), lambda: E.mcnemar_range(101, 50, 10), lambda: E.paired_difference(5, 6, 10)])
def test_power_refuses_impossible_shares(call):
    with pytest.raises(ValueError):
        call()
