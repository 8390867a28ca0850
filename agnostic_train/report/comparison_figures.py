"""Figures of a comparison of strategies."""

from collections.abc import Collection

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter, SymmetricalLogLocator

from agnostic_train.percent import percent
from agnostic_train.report.plotting import draw_heat_map, line_style, make_grid, name_columns, width_of

_COSTLY = {
    "others": "the others",
    "also_trained": "others in the training text",
    "also_measured": "languages that are only measured",
}


def costly_group(groups: Collection[str]) -> str | None:
    """The group of languages whose mean change is drawn as the cost: the first that there is, or None."""
    return next((it for it in _COSTLY if it in groups), None)


def draw_trade(comparison: dict) -> Figure:
    """What each strategy gains in the enhanced languages against what it costs others, with 95% intervals."""
    figure, (axis,) = make_grid(height=5)
    compared = comparison["texts"]["test"]
    costly = costly_group(compared["best"])
    for name, row in compared["strategies"].items():
        gain, cost = row["groups"]["enhanced"], row["groups"][costly]
        x, y = -100 * gain["mean"], 100 * cost["mean"]
        errors = [
            [[x + 100 * gain["interval"][1]], [-100 * gain["interval"][0] - x]],
            [[y - 100 * cost["interval"][0]], [100 * cost["interval"][1] - y]],
        ]
        axis.errorbar(
            x, y, np.abs(errors[1]), np.abs(errors[0]), elinewidth=0.7, markersize=7, label=name,
            **_style(comparison, name) | {"linestyle": "none"},
        )  # fmt: skip
    _name_gain_and_cost(axis, costly)
    return figure


def draw_rates(comparison: dict) -> Figure:
    """Gain against cost on validation text at every learning rate tried, joined in the order of the rates.

    It compares strategies at an equal gain, which their best rates don't. Left out are diverged trainings and, apart
    from the rates chosen, those that lose more than the largest gain: nobody would choose them.
    """
    figure, (axis,) = make_grid(height=5)
    tried = {
        name: [(it["learning_rate"], it["groups"]) for it in tuned["tried"] if it["groups"] is not None]
        for name, tuned in comparison["tuning"].items()
    }
    changes = [groups["enhanced"] for rates in tried.values() for _, groups in rates]
    costly = costly_group(next(iter(tried.values()))[0][1])
    num_left_out = 0
    for name, rates in tried.items():
        chosen, style = comparison["tuning"][name]["learning_rate"], _style(comparison, name)
        shown = [it for it in rates if it[0] == chosen or it[1]["enhanced"] <= max(0, -min(changes))]
        num_left_out += len(rates) - len(shown)
        points = {rate: (-100 * groups["enhanced"], 100 * groups[costly]) for rate, groups in shown}
        axis.plot(*zip(*points.values(), strict=True), linewidth=0.8, mfc="white", **style)
        axis.plot(*points[chosen], label=name, **style)
    _name_gain_and_cost(axis, costly)
    left_out = f"\nnot shown: {num_left_out} that lose more" if num_left_out else ""
    axis.get_legend().set_title(f"filled: the rate chosen{left_out}")
    return figure


def draw_forgetting(compared: dict) -> Figure:
    """Heat map of strategies by languages: the change of bits per byte, dark where a language got worse."""
    strategies = compared["strategies"]
    languages = list(next(iter(strategies.values()))["languages"])
    changes = np.array([[100 * row["languages"][it]["mean"] for it in languages] for row in strategies.values()])
    figure, (axis,) = make_grid(width=width_of(len(languages), 0.7), height=1.2 + 0.45 * len(strategies))
    # Training all weights may cost a hundred times what other strategies do: the scale is logarithmic beyond 1%.
    shades = np.log1p(changes.clip(min=0))
    # The scale reaches at least 1%, so that tiny changes stay light even if they are the largest.
    darkest = max(np.log1p(1.0), shades.max(initial=0))
    draw_heat_map(axis, shades, np.vectorize(lambda value: percent(value / 100))(changes), vmax=darkest)
    name_columns(axis, languages)
    axis.set_yticks(range(len(strategies)), list(strategies))
    return figure


def _style(comparison: dict, name: str) -> dict:
    """The same marks for a strategy in all figures, also if others diverged."""
    return line_style(list(comparison["tuning"]).index(name))


def _name_gain_and_cost(axis: Axes, costly: str | None) -> None:
    axis.axhline(0, color="0.6", linewidth=0.8)
    scale = ""
    if max(map(abs, axis.get_ylim())) > 2:
        scale = " (logarithmic beyond 1%)"
        axis.set_yscale("symlog", linthresh=1)
        axis.autoscale_view(scalex=False)  # the margins so far are those of a linear scale
        axis.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:+g}"))
    axis.set_xlabel("gain in the enhanced languages: fewer bits per byte, %")
    axis.set_ylabel(f"cost for {_COSTLY[costly or 'others']}:\nmore bits per byte, %{scale}")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
