"""Figures in any script: the fonts that draw a text, and the content of the files."""

import logging
from itertools import pairwise

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agnostic_train.percent import percent
from agnostic_train.report.comparison_figures import draw_rates, draw_trade
from agnostic_train.report.fonts import font_families
from agnostic_train.report.plotting import line_style, make_grid, name_columns, width_of, write_figures
from agnostic_train.report.run_figures import draw_change, draw_training
from agnostic_train.report.score_figures import draw_emergence, draw_score
from agnostic_train.scores.result import CONTROLS


class Font:
    """A stand-in for a FreeType font whose file name lists the characters it has."""

    def __init__(self, path):
        if "broken" in path:
            raise RuntimeError("FT2Font: cannot open resource")
        self.family_name = path
        self.characters = path.partition(":")[2]

    def get_charmap(self):
        return {ord(character): 1 for character in self.characters}


@pytest.fixture
def installed(monkeypatch):
    paths = ["/broken", "/Bold:中文", "/NotoSerif-Regular:中文", "/NotoSans-Regular:中文", "/NotoSansThai-Regular:ไทย"]
    added, original = [], font_manager.get_font
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    monkeypatch.setattr(font_manager, "get_font", lambda path: Font(path) if path in paths else original(path))
    monkeypatch.setattr(font_manager.fontManager, "addfont", added.append)
    return added


def test_other_fonts_are_added_only_for_missing_characters(installed):
    assert font_families("sw Kiswahili ř") == ["DejaVu Sans"] and not installed
    assert font_families("中 文") == ["DejaVu Sans", "/NotoSans-Regular:中文"]
    assert set(font_families("中文ไทย")[1:]) == {"/NotoSans-Regular:中文", "/NotoSansThai-Regular:ไทย"}


def test_warning_names_characters_without_a_font(installed, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert font_families("中አ")[1:] == ["/NotoSans-Regular:中文"]
    assert "no installed font has አ" in caplog.text


@pytest.mark.parametrize(("cost", "scale"), [(0.004, "linear"), (0.1, "symlog")])
def test_small_costs_are_drawn_on_a_linear_scale(cost, scale):
    """A logarithmic scale has no ticks below 1."""

    def group(mean):
        return {"mean": mean, "interval": [mean - 0.002, mean + 0.002]}

    row = {"groups": {"enhanced": group(-0.01), "others": group(cost)}}
    compared = {"best": {"enhanced": [], "others": []}, "strategies": {"shared": row}}
    axis = draw_trade({"texts": {"test": compared}, "tuning": {"shared": {}}}).axes[0]
    assert axis.get_yscale() == scale and ("logarithmic" in axis.get_ylabel()) is (scale == "symlog")
    assert -1 < axis.get_ylim()[0] < 0  # no space below zero where nothing is


def test_rates_are_drawn_as_gain_against_cost():
    """Filled marks are the best rates; a diverged training has no place."""
    tried = [
        {"learning_rate": 0.1, "groups": {"enhanced": -0.01, "others": 0.002, "all": 0.001}},
        {"learning_rate": 0.3, "groups": {"enhanced": -0.03, "others": 0.005, "all": 0.003}},
        {"learning_rate": 0.9, "groups": None},
    ]
    axis = draw_rates({"tuning": {"lora": {"learning_rate": 0.3, "tried": tried}}}).axes[0]
    curve, best = axis.get_lines()[:2]
    assert np.allclose(curve.get_xydata(), [[1.0, 0.2], [3.0, 0.5]]) and np.allclose(best.get_xydata(), [[3.0, 0.5]])
    assert "the others" in axis.get_ylabel()


def test_cost_is_that_of_languages_that_are_not_enhanced():
    """If all of them are in the training text, they may still be forgotten; the enhanced ones' gain is no saving."""
    groups = {"enhanced": -0.2, "also_trained": 0.05, "all": -0.075}
    axis = draw_rates({"tuning": {"full": {"learning_rate": 0.1, "tried": [{"learning_rate": 0.1, "groups": groups}]}}})
    axis = axis.axes[0]
    assert np.allclose(axis.get_lines()[0].get_xydata(), [[20, 5]]) and "in the training text" in axis.get_ylabel()


def test_chosen_rate_is_shown_even_if_it_is_ruinous():
    tuned = {"lora": (0.01, 0.1), "full": (-0.7, 0.2)}
    tuning = {
        name: {"learning_rate": 1, "tried": [{"learning_rate": 1, "groups": {"enhanced": -gain, "others": cost}}]}
        for name, (gain, cost) in tuned.items()
    }
    (axis,) = draw_rates({"tuning": tuning}).axes
    (mark,) = [line for line in axis.get_lines() if line.get_label() == "full"]
    assert np.allclose(mark.get_xydata(), [[-70, 20]]) and axis.get_xlim()[0] < -70


def test_marks_belong_to_a_strategy_and_ruinous_rates_are_left_out():
    """`shared` diverged with a seed, so it is compared no more, but its rates were tried."""

    def tuned(*gains):
        tried = [{"learning_rate": rate, "groups": {"enhanced": -it, "others": 0.01}} for rate, it in enumerate(gains)]
        return {"learning_rate": 0, "tried": tried}

    tuning = {"shared": tuned(0.01, -2.0), "lora": tuned(0.02)}
    row = {"groups": {it: {"mean": -0.01, "interval": [-0.02, 0.0]} for it in ("enhanced", "others")}}
    compared = {"best": {"enhanced": [], "others": []}, "strategies": {"lora": row}}
    comparison = {"tuning": tuning, "texts": {"test": compared}}
    rates, trade = draw_rates(comparison).axes[0], draw_trade(comparison).axes[0]
    of_lora = next(line for line in rates.get_lines() if line.get_label() == "lora")
    assert of_lora.get_marker() == trade.containers[0].lines[0].get_marker() != rates.get_lines()[0].get_marker()
    assert rates.get_xlim()[0] > 0 and rates.get_xlim()[1] < 3
    assert "not shown: 1 that lose more" in rates.get_legend().get_title().get_text()


def test_controls_with_clipped_changes_do_not_set_the_scale():
    """Their ratios may be a hundred times the score's, and mean nothing; the legend says how many aren't visible."""
    undefined, fair, wild = (None, []), (1.5, []), (30.0, ["sw"])
    row = {"language": "sw", "importance": 0.2, "interval": [0.1, 0.3], "clipped": []}
    scores = {str(seed): {"value": value, "clipped": names} for seed, (value, names) in enumerate([undefined, wild])}
    matched = {"0": {"value": fair[0], "clipped": fair[1]}}
    controls = {"random": {"scores": scores}, "matched": {"scores": matched}}
    figure = draw_score({"table": [row], "value": 0.18, "clipped": [], "controls": controls})
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert 1.5 < figure.axes[0].get_ylim()[1] < 2
    assert f"{CONTROLS['random']} (1 of 2 beyond the scale)" in names and CONTROLS["matched"] in names

    rows = [
        {
            "step": step, "checkpoint": str(step), "interval": [0.1, 0.2], "score": 0.15, "shared": 1, "clipped": [],
            "related": {"sw": 4}, "exclusive": {"sw": 3}, "shared_ratio": {"sw": 0.25},
            "controls": {"random": [{"score": value, "clipped": names} for value, names in (fair, wild)]},
        }
        for step in (1, 10)
    ]  # fmt: skip
    axis = draw_emergence(rows).axes[2]
    assert 1.5 < axis.get_ylim()[1] < 2
    assert "(2 of 4 beyond the scale)" in " ".join(it.get_text() for it in axis.get_legend().get_texts())
    clipped = {"score": 9.0, "interval": [0.2, 13.0], "clipped": ["sw"]}
    assert 1.5 < draw_emergence([rows[0], rows[1] | clipped]).axes[2].get_ylim()[1] < 2


def test_clipped_importance_is_marked_and_does_not_set_the_scale():
    rows = [
        {"language": "en", "importance": 0.2, "interval": [0.1, 0.3], "clipped": []},
        {"language": "zh", "importance": 0.4, "interval": None, "clipped": []},
        {"language": "sw", "importance": 1e7, "interval": [0.1, 2e7], "clipped": ["exclusive"]},
    ]
    figure = draw_score({"table": rows, "value": 8.1, "clipped": ["sw"], "controls": {}})
    axis = figure.axes[0]
    assert axis.get_ylim()[1] < 1
    colors = [bar.get_facecolor()[:3] for bar in axis.containers[0]]
    assert colors == [(0.7, 0.7, 0.7)] * 2 + [(1, 1, 1)]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "white: clipped, so arbitrary" in names and "score 8.100 (clipped)" in names


@pytest.mark.parametrize(
    "steps", [range(1000, 31_000, 1000), [1, 64, 512, 1000, 3000, 13_000, 53_000, 103_000, 143_000]]
)
def test_labels_of_many_steps_do_not_overlap(steps):
    row = {
        "interval": None, "score": None, "shared": 1, "clipped": [], "related": {"sw": 4}, "exclusive": {"sw": 3},
        "shared_ratio": {"sw": 0.25}, "controls": {},
    }  # fmt: skip
    figure = draw_emergence([{"step": step, "checkpoint": str(step), **row} for step in steps])
    FigureCanvasAgg(figure).draw()
    labels = [it for it in figure.axes[2].get_xticklabels() if it.get_text()]
    assert labels[-1].get_text() == str(steps[-1]) and len(labels) > 4
    # Turned labels are apart if their ends are, by a line's height across their direction.
    ends = [it.get_window_extent().x1 for it in labels]
    height = 1.2 * labels[0].get_fontsize() * figure.dpi / 72
    assert all(right - left >= height for left, right in pairwise(ends))


def test_legends_of_many_languages_fit_beside_their_axes():
    languages = [f"lang{number}" for number in range(40)]
    rows = [
        {
            "step": step, "checkpoint": str(step), "interval": [0.1, 0.2], "score": 0.15, "shared": 1, "clipped": [],
            "related": dict.fromkeys(languages, 4), "exclusive": dict.fromkeys(languages, 3),
            "shared_ratio": dict.fromkeys(languages, 0.25), "controls": {},
        }
        for step in (1, 10)
    ]  # fmt: skip
    losses = {f"eval_{language}_loss": 5.0 for language in languages}
    for figure in (draw_emergence(rows), draw_training([{"step": 1, "loss": 6.0}, {"step": 1, **losses}])):
        FigureCanvasAgg(figure).draw()
        width, height = figure.canvas.get_width_height()
        boxes = [axis.get_legend().get_window_extent() for axis in figure.axes]
        assert all(box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
        assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))
        assert all(axis.get_window_extent().width > 200 for axis in figure.axes)
    assert len({tuple(line_style(index).values()) for index in range(40)}) == 40


@pytest.mark.parametrize(
    "names", [["en", "sw"], [f"{name}_Latn" for name in ("eng", "swh", "deu", "fra", "ita", "tha")]]
)
@pytest.mark.parametrize("times", [1, 4])
def test_names_of_languages_do_not_overlap(names, times):
    languages = [f"{name}{number or ''}" for number in range(times) for name in names]
    measured = {"before": {"bits_per_byte": 2.0}, "after": {"bits_per_byte": 1.9}, "bits_per_byte_change": -0.05}
    figure = draw_change(dict.fromkeys(languages, measured), languages[:2])
    figure.draw_without_rendering()
    for texts in (figure.axes[0].get_xticklabels(), figure.axes[0].texts):
        boxes = [it.get_window_extent() for it in texts]
        assert len(boxes) == len(languages)
        if texts[0].get_rotation() == 0:
            assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (0.0, "+0.0%"),
        (-0.0, "+0.0%"),
        (3e-4, "+0.03%"),
        (-3e-4, "-0.03%"),
        (-4e-5, "-0.004%"),
        (2.3e-6, "+0.0002%"),
        (-3e-8, "-3e-06%"),
        (1e-3, "+0.1%"),
        (-0.0123, "-1.2%"),
    ],
)
def test_percent_keeps_the_sign_of_small_changes(change, text):
    assert percent(change) == text


@pytest.mark.figures
def test_both_files_are_written_and_svg_keeps_text(tmp_path):
    def draw():
        figure = Figure()
        figure.subplots().set_title("Kiswahili <&>")
        return figure

    write_figures(tmp_path, {"one": draw}, ["Kiswahili"])
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert "Kiswahili &lt;&amp;&gt;" in (tmp_path / "one.svg").read_text()
    first = (tmp_path / "one.svg").read_text()
    write_figures(tmp_path, {"one": draw})
    assert first == (tmp_path / "one.svg").read_text()  # it has neither a date nor random ids


@pytest.mark.figures
def test_names_with_dollar_signs_are_drawn_as_they_are(tmp_path):
    row = {"language": "$_$", "importance": 0.2, "interval": [0.1, 0.3], "clipped": []}
    score = {"table": [row], "value": 0.18, "clipped": [], "controls": {}}
    write_figures(tmp_path, {"score": lambda: draw_score(score)})
    assert "$_$" in (tmp_path / "score.svg").read_text()


@pytest.mark.parametrize("count, name, turned", [(10, "swh_Latn", True), (10, "sw", False), (4, "swh_Latn", False)])
def test_names_of_columns_are_turned_if_they_would_overlap(count, name, turned):
    axis = make_grid(width=width_of(count, 0.6))[1][0]
    name_columns(axis, [name] * count)
    assert all((it.get_rotation() == 30) is turned for it in axis.get_xticklabels())
