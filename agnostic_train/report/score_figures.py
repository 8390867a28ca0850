"""Figures of what sets of neurons carry: the score, the ablation, and both over a model's training."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agnostic_train.report.plotting import draw_heat_map, line_style, make_grid, name_columns, name_series, width_of
from agnostic_train.scores.ablation import NOTHING
from agnostic_train.scores.result import CONTROLS, describe_score

_LEAST_GAP, _MOST_LEVEL = 0.06, 4
"""Of labels of steps: the distance as a share of the axis, and their number from which on they are turned."""
_HOLLOW = {"linestyle": "none", "markerfacecolor": "white"}


def draw_score(score: dict) -> Figure:
    rows = [row for row in score["table"] if row["importance"] is not None]
    figure, (axis,) = make_grid(width=width_of(len(rows), 0.6))
    positions = np.arange(len(rows))
    values = [np.log1p(row["importance"]) for row in rows]
    clipped = [bool(row["clipped"]) for row in rows]
    axis.bar(positions, values, 0.6, color=["white" if it else "0.7" for it in clipped], edgecolor="black")
    for position, value, row in zip(positions, values, rows, strict=True):
        if row["interval"]:
            low, high = np.log1p(row["interval"])
            axis.plot([position, position], [min(low, value), max(high, value)], color="black", marker="_")
    name_columns(axis, [row["language"] for row in rows])
    axis.set_ylabel("log(1 + importance)")
    axis.axhline(np.log(2), color="black", linestyle=":", label="log 2: shared matter as much as exclusive")
    if score["value"] is not None:
        axis.axhline(score["value"], color="black", label=f"score {describe_score(score['value'], score['clipped'])}")
    controls = {
        kind: [(it["value"], it["clipped"]) for it in it["scores"].values()] for kind, it in score["controls"].items()
    }
    fair = [np.log1p(max([row["importance"], *(row["interval"] or [])])) for row in rows if not row["clipped"]]
    top = _limit_score(axis, controls, fair if any(clipped) else None)
    if any(clipped):
        axis.bar([], [], color="white", edgecolor="black", label="white: clipped, so arbitrary")
    for (kind, scores), line in zip(controls.items(), ("--", "-."), strict=False):
        values = [value for value, _ in scores if value is not None]
        for index, value in enumerate(values):
            label = None if index else _name_control(kind, scores, top)
            axis.axhline(value, color="0.5", linestyle=line, label=label)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_ablation(rows: dict) -> Figure:
    """Heat map of switched-off sets by languages: the factor by which perplexity grows, shaded by its logarithm."""
    languages = list(rows[NOTHING]["languages"])
    # Random counterparts of exclusive sets are measured on one language only, so they don't fill a row.
    names = [name for name, row in rows.items() if name != NOTHING and len(row["languages"]) == len(languages)]
    times = np.array(
        [
            [
                rows[name]["languages"][it]["perplexity"] / rows[NOTHING]["languages"][it]["perplexity"]
                for it in languages
            ]
            for name in names
        ]
    ).reshape(len(names), len(languages))
    figure, (axis,) = make_grid(width=width_of(len(languages), 0.7), height=1.2 + 0.4 * len(names))
    draw_heat_map(axis, np.log(times.clip(min=1e-3)), np.vectorize(lambda value: f"{value:.3g}\u00d7")(times))
    name_columns(axis, languages)
    axis.set_yticks(range(len(names)), [f"{name} off ({rows[name]['neurons']})" for name in names])
    return figure


def draw_emergence(rows: list[dict]) -> Figure:
    """Shared ratio, set sizes and score against the training step."""
    figure, axes = make_grid(3, height=9, sharex=True)
    numeric = all(row["step"] is not None for row in rows)
    steps = [row["step"] for row in rows] if numeric else list(range(len(rows)))
    for index, language in enumerate(rows[0]["related"]):
        style = line_style(index)
        _plot(axes[0], steps, [row["shared_ratio"][language] for row in rows], label=language, **style)
        _plot(axes[1], steps, [row["exclusive"][language] for row in rows], label=f"exclusive {language}", **style)
    _plot(axes[1], steps, [row["shared"] for row in rows], label="shared", linewidth=3, marker="o", color="black")
    _plot_scores(axes[2], steps, rows)
    for axis, title in zip(axes, ("shared / related", "neurons", "language-agnostic score"), strict=True):
        axis.set_ylabel(title)
        name_series(axis, height=3)
    if numeric:
        if min(steps) > 0:
            axes[2].set_xscale("log")
        else:  # linear below the first step, because a logarithmic axis has no place for step 0
            axes[2].set_xscale("symlog", linthresh=min((step for step in steps if step), default=1))
        has_label = _spaced(axes[2].xaxis.get_transform().transform(np.array(steps, float)))
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(steps) > _MOST_LEVEL else {}
        labels = [str(step) if it else "" for step, it in zip(steps, has_label, strict=True)]
        axes[2].set_xticks(steps, labels, **turned)
        axes[2].minorticks_off()
    else:
        # Of a commit, the beginning suffices. The legend takes the rest of the width.
        name_columns(axes[2], [row["checkpoint"][:20] for row in rows], width=4)
    axes[2].set_xlabel("training step" if numeric else "checkpoint")
    return figure


def _plot_scores(axis: Axes, steps: list[int], rows: list[dict]) -> None:
    """The score and its controls over the steps; hollow where a change was clipped."""
    for step, row in zip(steps, rows, strict=True):
        if row["interval"]:
            axis.plot([step, step], row["interval"], color="black", marker="_")
    style: dict[str, Any] = dict(color="black", marker="o")
    _plot(axis, steps, [row["score"] for row in rows], label="score, 95% interval", linewidth=2, **style)
    _plot(axis, steps, [row["score"] if row["clipped"] else None for row in rows], **_HOLLOW, **style)
    axis.axhline(math.log(2), color="black", linestyle=":", label="log 2")
    controls = {
        kind: [(it["score"], it["clipped"]) for row in rows for it in row["controls"][kind]]
        for kind in rows[0]["controls"]
    }
    fair = [
        max([row["score"], *(row["interval"] or [])]) for row in rows if row["score"] is not None and not row["clipped"]
    ]
    top = _limit_score(axis, controls, fair if any(row["clipped"] for row in rows) else None)
    for (kind, scores), marker in zip(controls.items(), "sD", strict=False):
        # Draws at different steps have nothing in common but their number, so no line joins them.
        style = dict(color="0.5", marker=marker, zorder=1)
        where = [step for step, row in zip(steps, rows, strict=True) for _ in row["controls"][kind]]
        label = _name_control(kind, scores, top).replace(" of", "\nof", 1).replace(" (", "\n(")
        _plot(axis, where, [value for value, _ in scores], label=label, linestyle="none", **style)
        _plot(axis, where, [value if clipped else None for value, clipped in scores], **_HOLLOW, **style)
    if any(row["clipped"] for row in rows) or any(clipped for it in controls.values() for _, clipped in it):
        axis.plot([], [], marker="o", color="0.5", label="hollow: clipped in some\nlanguage, so arbitrary", **_HOLLOW)


def _plot(axis: Axes, places: list[int], values: list[float | None], **style) -> None:
    known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
    if known:
        axis.plot(*zip(*known, strict=True), markersize=5, **style)


def _limit_score(
    axis: Axes, controls: Mapping[str, list[tuple[float | None, list[str]]]], fair: list[float] | None = None
) -> float:
    """Ends the axis of scores, on which all but the controls are drawn, at the largest value without clipped changes.

    The ratio of clipped changes may be hundreds, and means nothing.

    Args:
        controls: by kind, each control's score (None if undefined) and clipped languages.
        fair: what is drawn without clipped changes, if not all of it.

    Returns: the largest score that the axis shows.
    """
    scores = [value for it in controls.values() for value, clipped in it if value is not None and not clipped]
    drawn = axis.get_ylim()[1] if fair is None else 1.05 * max(fair, default=0)
    top = max(drawn, 1.05 * max(scores, default=0), 1.05 * math.log(2))
    axis.set_ylim(0, top)
    return top


def _name_control(kind: str, scores: list[tuple[float | None, list[str]]], top: float) -> str:
    beyond = sum(value is not None and value > top for value, _ in scores)
    return CONTROLS[kind] + (f" ({beyond} of {len(scores)} beyond the scale)" if beyond else "")


def _spaced(places: np.ndarray) -> list[bool]:
    """Which of some rising places on an axis have room for a label, the last one first."""
    kept, last = [], math.inf
    for place in places[::-1]:
        kept.append(last - place >= _LEAST_GAP * (places[-1] - places[0]))
        last = place if kept[-1] else last
    return kept[::-1]
