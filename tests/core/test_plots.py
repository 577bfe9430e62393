"""core.plots: what is drawn, what is escaped, what is left in a notebook."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papers10.core import plots
from papers10.core.optional import MissingExtra
from papers10.core.plots import (
    COLORS,
    bars_with_interval,
    heatmap,
    image_strip,
    interactive,
    line_with_band,
    paper_versus_ours,
    table,
    theme,
)
from papers10.core.stats import Interval, seed_interval


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def axis():
    return plt.subplots()[1]


def test_theme_as_a_block_restores():
    before = dict(matplotlib.rcParams)
    with theme(figure_dpi=77):
        assert matplotlib.rcParams["figure.dpi"] == 77 and matplotlib.rcParams["axes.prop_cycle"].by_key()[
            "color"
        ] == list(COLORS)
    assert dict(matplotlib.rcParams) == before


def test_theme_alone_stays():
    with matplotlib.rc_context():
        theme()
        assert matplotlib.rcParams["figure.facecolor"] == "white" and not matplotlib.rcParams["axes.spines.top"]


def test_theme_refuses_unknown_settings():
    before = matplotlib.rcParams["font.size"]
    with pytest.raises(ValueError, match="did you mean 'figure_dpi'"):
        theme(figure_dp=80)
    assert matplotlib.rcParams["font.size"] == before


def test_line_with_band_draws_the_seed_interval(axis):
    runs = np.random.default_rng(0).normal(size=(3, 5))
    line_with_band(axis, range(5), torch.tensor(runs), "ours")
    assert np.allclose(axis.lines[0].get_ydata(), runs.mean(0)) and axis.lines[0].get_label() == "ours"
    ends = seed_interval(runs[:, 2])
    vertices = axis.collections[0].get_paths()[0].vertices
    at_two = vertices[vertices[:, 0] == 2, 1]
    assert at_two.min() == pytest.approx(ends.low) and at_two.max() == pytest.approx(ends.high)


def test_line_of_one_run_has_no_band(axis):
    line_with_band(axis, [0, 1], torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "one")
    assert len(axis.lines) == 1 and not axis.collections


@pytest.mark.parametrize("runs", [np.zeros((2, 3)), np.zeros((0, 2)), np.zeros((1, 2, 2)), [[0.0, float("nan")]]])
def test_line_refuses(axis, runs):
    with pytest.raises(ValueError, match="^runs: expected"):
        line_with_band(axis, [0, 1], runs)


def test_bars(axis):
    records = [
        {"label": "a", "interval": Interval(1.0, 0.5, 1.5, 3, "t-seeds")},
        {"label": "b", "mean": 2.0, "low": None, "high": None},
        {"label": "c", "interval": Interval(3.0, float("nan"), float("nan"), 1, "single")},
    ]
    bars_with_interval(axis, records, highlight=["b"])
    assert [bar.get_width() for bar in axis.patches] == [1, 2, 3]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["a", "b", "c"]
    assert len(axis.containers) == 2, "one bar container and one whisker"
    assert matplotlib.colors.to_hex(axis.patches[1].get_facecolor()).upper() == COLORS[0]


@pytest.mark.parametrize(
    ("records", "arguments", "name"),
    [
        ([], {}, "records"),
        ([{"label": "a"}], {}, r"records\[0\]"),
        ([{"label": "a", "mean": float("nan")}], {}, "records"),
        ([{"label": "a", "mean": 1}], {"highlight": ["b"]}, "highlight"),
    ],
)
def test_bars_refuse(axis, records, arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        bars_with_interval(axis, records, **arguments)


@given(st.text(), st.text())
def test_table_escapes_everything(heading, text):
    shown = table([{heading: text}], caption=text)._repr_html_()
    inside = shown
    for tag in ("table", "caption", "thead", "tbody", "tr"):
        inside = inside.replace(f"<{tag}>", "").replace(f"</{tag}>", "")
    for tag in ("th", "td"):
        inside = inside.replace(f'<{tag} style="text-align:left">', "").replace(f"</{tag}>", "")
    assert "<" not in inside.replace("<br>", "") and ">" not in inside.replace("<br>", "")


def test_table_cells():
    shown = table(
        [
            {"n": 5, "x": 1 / 3, "ok": True, "i": seed_interval([1, 2, 3])},
            {"n": 124_000_000, "x": None, "i": float("nan")},
        ],
        {"n": "count", "x": "x", "ok": "ok", "i": "loss"},
        digits=3,
    )
    assert shown.rows == [["5", "0.333", "yes", "2 [-0.484, 4.48]"], ["124\u202f000\u202f000", "–", "–", "–"]]
    assert shown.columns == ["count", "x", "ok", "loss"]
    assert (
        'style="text-align:right">count' in shown._repr_html_() and str(shown).splitlines()[0].split() == shown.columns
    )


def test_table_refuses():
    with pytest.raises(ValueError, match="did you mean 'loss'"):
        table([{"loss": 1}], ["los"])
    with pytest.raises(ValueError, match="records: expected"):
        table([])
    assert table([], ["a"]).rows == []


def test_image_strip_accepts_the_usual_layouts():
    images = [
        np.zeros((4, 4)),
        np.zeros((4, 4, 3)),
        torch.zeros(3, 4, 4),
        np.zeros((4, 4), np.uint8),
        torch.zeros(1, 4, 4),
    ]
    figure = image_strip(images, list("abcde"), columns=3)
    assert len(figure.axes) == 6 and sum(len(a.images) for a in figure.axes) == 5
    assert all(a.images[0].get_clim() == (0, 1) for a in figure.axes if a.images and a.images[0].get_array().ndim == 2)


@pytest.mark.parametrize("images", [[], [np.zeros(4)], [np.zeros((2, 4, 5))], [np.full((2, 2), np.nan)]])
def test_image_strip_refuses(images):
    with pytest.raises(ValueError, match="^images"):
        image_strip(images)
    with pytest.raises(ValueError, match="titles: expected 1"):
        image_strip([np.zeros((2, 2))], ["a", "b"])


def test_heatmap_two_sided_is_symmetric(axis):
    heatmap(axis, [[1.0, -3.0], [float("nan"), 0.0]], center=0, annotate=True)
    assert axis.images[0].get_clim() == (-3, 3) and len(axis.texts) == 3


@pytest.mark.parametrize(
    ("matrix", "arguments", "name"),
    [
        ([1.0], {}, "matrix"),
        (np.zeros((0, 2)), {}, "matrix"),
        ([[float("nan")]], {}, "matrix"),
        ([[1.0]], {"rows": ["a", "b"]}, "rows"),
    ],
)
def test_heatmap_refuses(axis, matrix, arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        heatmap(axis, matrix, **arguments)


def test_paper_versus_ours_pairs_numbers(monkeypatch):
    from papers10.core import claims, results

    claim = claims.Claim.model_validate(
        {
            "id": "a.loss",
            "kind": "quality",
            "statement": "s",
            "where": "w",
            "metric": {"name": "text.loss", "unit": "nats"},
            "paper": [
                {"setting": "new", "value": 1.0, "baseline": 2.0, "baseline_name": "old"},
                {"setting": "words", "value": "better"},
            ],
            "tests": {name: {"not_testable": "here"} for name in ("smoke", "small", "paper")},
        }
    )
    record = {
        "claims": [{"id": "a.loss", "verdict": "not held"}],
        "metrics": {"text.new.loss": {"mean": 1.5, "ci95": [1.4, 1.6]}, "text.new.other": {"mean": 9.0, "ci95": None}},
    }
    monkeypatch.setattr(claims, "load", lambda slug: type("Chapter", (), {"claims": [claim]}))
    monkeypatch.setattr(results, "records", lambda slug: {"small": record})
    left, right = paper_versus_ours("some-paper").axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["old", "new"]
    assert [t.get_text() for t in right.get_yticklabels()] == ["text.new.loss"]
    assert right.get_title(loc="left") == "ours: not held"
    monkeypatch.setattr(results, "records", lambda slug: {})
    right = paper_versus_ours("some-paper").axes[1]
    assert right.texts[0].get_text() == "no number at this scale"


def test_paper_versus_ours_without_numbers():
    with pytest.raises(ValueError, match="^claims: expected"):
        plots._draw_paper_versus_ours([{"id": "a", "metric": {"name": "x"}, "paper": []}], {})


@pytest.fixture
def displayed(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    return shown


def test_interactive_leaves_the_picture_only(displayed):
    figure = plt.figure()
    interactive(lambda: "widget", lambda: figure)
    assert displayed == [figure] and not plt.fignum_exists(figure.number)


def test_interactive_in_a_live_session_shows_both(displayed, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    interactive(lambda: "widget", lambda: ["one", "two"])
    assert displayed == ["widget", "one", "two"]


def test_interactive_without_the_extra(displayed, capsys):
    def widget():
        raise MissingExtra("ipywidgets", "notebook")

    interactive(widget, lambda: "picture", live=True)
    assert displayed == ["picture"] and "papers10[notebook]" in capsys.readouterr().out
