"""Figures, legible in black and white, as PNG and as SVG whose text stays text (the browser supplies the fonts)."""

import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter, SymmetricalLogLocator
from transformers.utils import logging

from agnostic_train.detection.stability import jaccard
from agnostic_train.model.decoder import PROJECTIONS
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.percent import percent
from agnostic_train.scores.ablation import NOTHING
from agnostic_train.scores.result import CONTROLS

logger = logging.get_logger(__name__)

_FIRST_FONT = "DejaVu Sans"  # comes with matplotlib
_MARKERS = "osv^DxP*hX"
_LINES = ("-", "--", ":", "-.")
ENDINGS = (".png", ".svg")
"""The formats in which each figure is written."""


def write_figures(folder: Path, figures: Mapping[str, Callable[[], Figure]], labels: Iterable[str] = ()) -> None:
    """Draws each figure into `folder`, as NAME.png and NAME.svg.

    Args:
        labels: texts in the figures that may be in any script, such as names of languages.
    """
    # With a fixed salt, equal figures are equal files.
    style = {"svg.fonttype": "none", "svg.hashsalt": "agnostic_train", "font.family": _families("".join(labels))}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # `_families` has said so, once
        for name, draw in figures.items():
            figure = draw()
            figure.savefig(folder / f"{name}.png", dpi=150)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def is_figure(path: Path, names: Collection[str]) -> bool:
    """Whether a path is a file that `write_figures` writes for a figure with one of these names."""
    return path.is_file() and path.suffix in ENDINGS and path.stem in names


def _families(text: str) -> list[str]:
    """The font families that can draw a text: matplotlib's own, and installed ones for the characters that it lacks."""
    families = [_FIRST_FONT]
    missing = {ord(character) for character in text if not character.isspace()}
    missing -= font_manager.get_font(font_manager.findfont(_FIRST_FONT)).get_charmap().keys()
    if not missing:
        return families
    # The system is asked, because matplotlib's cached list may lack newer fonts. Upright faces come first.
    paths = font_manager.findSystemFonts()
    for path in sorted(
        paths, key=lambda path: (not re.search("sans.*regular", path.lower()), "regular" not in path.lower(), path)
    ):
        try:
            font = font_manager.get_font(path)
        except RuntimeError:  # a format that FreeType can't read
            continue
        if covered := missing & font.get_charmap().keys():
            font_manager.fontManager.addfont(path)
            families.append(font.family_name)
            missing -= covered
        if not missing:
            return families
    characters = "".join(map(chr, sorted(missing)))
    logger.warning(f"no installed font has {characters}: PNG figures show boxes, report.html uses the browser's fonts")
    return families


def _grid(rows: int = 1, width: float = 8, height: float = 4, **settings) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, 1, squeeze=False, **settings)[:, 0]


def _width(num_columns: int, inches: float) -> float:
    """The width of a figure whose columns need some inches each."""
    return max(8.0, 2.0 + inches * num_columns)


def _name_columns(axis: Axes, names: Sequence[str], enhanced: Collection[str] = ()) -> None:
    """Labels the columns; long names are turned, so that they don't overlap."""
    is_long = max(map(len, names), default=0) > 8 and len(names) > 5
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
    labels = [name + ((" " if is_long else "\n") + "(enhanced)" if name in enhanced else "") for name in names]
    axis.set_xticks(range(len(names)), labels, **turned)


def draw_neurons(found: LanguageNeurons) -> Figure:
    """Heat maps of neuron counts by layer and projection, for the shared set and each language's exclusive set."""
    sizes = found.shared.sizes or {}
    projections = [name for name in PROJECTIONS if any(site[1] == name for site in sizes)] or list(PROJECTIONS)
    num_layers = 1 + max((layer for layer, _ in sizes), default=0)
    sets = {"shared": found.shared, **{f"exclusive {name}": neurons for name, neurons in found.exclusive.items()}}
    figure, axes = _grid(len(sets), height=0.9 + len(sets) * (0.5 + 0.22 * len(projections)))
    for axis, (name, neurons) in zip(axes, sets.items(), strict=True):
        counts = np.array([[len(neurons[(layer, it)]) for layer in range(num_layers)] for it in projections])
        image = axis.imshow(counts, aspect="auto", cmap="Greys", vmin=0)
        axis.set_yticks(range(len(projections)), projections)
        axis.set_title(f"{name}: {len(neurons)}", fontsize=10, loc="left")
        axis.set_xticks(range(num_layers) if num_layers <= 16 else range(0, num_layers, 4))
        figure.colorbar(image, ax=axis, fraction=0.02)
    axes[-1].set_xlabel("layer")
    return figure


def draw_change(evaluation: dict, enhanced: list[str]) -> Figure:
    languages = list(evaluation)
    positions = np.arange(len(languages))
    figure, (axis,) = _grid(width=_width(len(languages), 0.95))
    for offset, (moment, color, hatch) in enumerate((("before", "white", "///"), ("after", "0.45", ""))):
        values = [evaluation[language][moment]["bits_per_byte"] for language in languages]
        axis.bar(
            positions + (offset - 0.5) * 0.4, values, 0.4, label=moment, color=color, hatch=hatch, edgecolor="black"
        )
    top = max(max(row[moment]["bits_per_byte"] for moment in ("before", "after")) for row in evaluation.values())
    for position, language in zip(positions, languages, strict=True):
        row = evaluation[language]
        height = max(row["before"]["bits_per_byte"], row["after"]["bits_per_byte"])
        axis.text(position, height + 0.02 * top, percent(row["bits_per_byte_change"]), ha="center", fontsize=10)
    _name_columns(axis, languages, enhanced)
    axis.set_ylabel("bits per byte, test text")
    axis.set_ylim(0, top * 1.15)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_score(score: dict) -> Figure:
    rows = [row for row in score["table"] if row["importance"] is not None]
    figure, (axis,) = _grid(width=_width(len(rows), 0.6))
    positions = np.arange(len(rows))
    values = [np.log1p(row["importance"]) for row in rows]
    axis.bar(positions, values, 0.6, color="0.7", edgecolor="black")
    for position, value, row in zip(positions, values, rows, strict=True):
        if row["interval"]:
            low, high = np.log1p(row["interval"])
            axis.plot([position, position], [min(low, value), max(high, value)], color="black", marker="_")
    _name_columns(axis, [row["language"] for row in rows])
    axis.set_ylabel("log(1 + importance)")
    axis.axhline(np.log(2), color="black", linestyle=":", label="log 2: shared matter as much as exclusive")
    if score["value"] is not None:
        axis.axhline(score["value"], color="black", label=f"score {score['value']:.3f}")
    for (kind, controls), line in zip(score["controls"].items(), ("--", "-."), strict=False):
        values = [it["value"] for it in controls["scores"].values() if it["value"] is not None]
        for index, value in enumerate(values):
            axis.axhline(value, color="0.5", linestyle=line, label=None if index else CONTROLS[kind])
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
    figure, (axis,) = _grid(width=_width(len(languages), 0.7), height=1.2 + 0.4 * len(names))
    _heat_map(axis, np.log(times.clip(min=1e-3)), np.vectorize(lambda value: f"{value:.3g}\u00d7")(times))
    _name_columns(axis, languages)
    axis.set_yticks(range(len(names)), [f"{name} off ({rows[name]['neurons']})" for name in names])
    return figure


def draw_emergence(rows: list[dict]) -> Figure:
    """Shared ratio, set sizes and score against the training step."""
    figure, axes = _grid(3, height=9, sharex=True)
    numeric = all(row["step"] is not None for row in rows)
    steps = [row["step"] for row in rows] if numeric else list(range(len(rows)))
    styles = [dict(marker=marker, linestyle=_LINES[index % len(_LINES)]) for index, marker in enumerate(_MARKERS)]

    def draw(axis, values, label, style):
        known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        if known:
            axis.plot(*zip(*known, strict=True), label=label, color=style.pop("color", "black"), markersize=5, **style)

    for index, language in enumerate(rows[0]["related"]):
        style = styles[index % len(styles)]
        draw(axes[0], [row["shared_ratio"][language] for row in rows], language, dict(style))
        draw(axes[1], [row["exclusive"][language] for row in rows], f"exclusive {language}", dict(style))
    draw(axes[1], [row["shared"] for row in rows], "shared", dict(linewidth=3, marker="o"))
    for kind, (line, marker) in zip(rows[0]["controls"], (("--", "."), (":", "+")), strict=False):
        for index in range(len(rows[0]["controls"][kind])):
            scores = [row["controls"][kind][index]["score"] for row in rows]
            style = dict(color="0.6", linestyle=line, marker=marker)
            draw(axes[2], scores, None if index else CONTROLS[kind].replace(" of", "\nof"), style)
    for step, row in zip(steps, rows, strict=True):
        if row["interval"]:
            axes[2].plot([step, step], row["interval"], color="black", marker="_")
    draw(axes[2], [row["score"] for row in rows], "score, 95% interval", dict(linewidth=2, marker="o"))
    axes[2].axhline(math.log(2), color="black", linestyle=":", label="log 2")
    for axis, title in zip(axes, ("shared / related", "neurons", "language-agnostic score"), strict=True):
        axis.set_ylabel(title)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    if numeric:
        if min(steps) > 0:
            axes[2].set_xscale("log")
        else:  # linear below the first step, because a logarithmic axis has no place for step 0
            axes[2].set_xscale("symlog", linthresh=min((step for step in steps if step), default=1))
        axes[2].set_xticks(steps, [str(step) for step in steps])
        axes[2].minorticks_off()
    else:
        axes[2].set_xticks(steps, [row["checkpoint"] for row in rows])
    axes[2].set_xlabel("training step" if numeric else "checkpoint")
    return figure


def draw_training(history: list[dict]) -> Figure:
    figure, (axis,) = _grid()
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    axis.plot(*zip(*losses, strict=True), color="black", marker="." if len(losses) < 50 else None, label="training")
    keys = sorted({key for entry in history for key in entry if re.fullmatch(r"eval_.+_loss", key)})
    for index, key in enumerate(keys):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        style = ("--", ":", "-.")[index % 3]
        axis.plot(*zip(*points, strict=True), linestyle=style, marker="ov^sD"[index % 5], markersize=4, label=key[5:-5])
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats per token")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_overlap(found: LanguageNeurons) -> Figure:
    """Jaccard overlap of every two languages' related neurons."""
    languages = found.languages
    values = np.array(
        [[jaccard(found.related[a], found.related[b])["all"] or 0.0 for b in languages] for a in languages]
    )
    figure, (axis,) = _grid(width=1.5 + 0.9 * len(languages), height=1.2 + 0.6 * len(languages))
    _heat_map(axis, values, np.vectorize(lambda value: f"{value:.2f}")(values), vmax=1.0)
    _name_columns(axis, languages)
    axis.set_yticks(range(len(languages)), languages)
    return figure


def draw_relative_change(evaluation: dict, enhanced: list[str]) -> Figure:
    """Change of bits per byte per language with its 95% interval, on test and (open marks) parallel text."""
    texts = {"test text": evaluation["languages"], "parallel text": evaluation.get("parallel") or {}}
    languages = list(texts["test text"])
    figure, (axis,) = _grid(height=1.2 + 0.45 * len(languages))
    axis.axvline(0, color="black", linewidth=0.8)
    for offset, (label, rows) in enumerate(texts.items()):
        places = [place + 0.2 * offset for place, language in enumerate(languages) if language in rows]
        rows = [rows[language] for language in languages if language in rows]
        if rows:
            _intervals(axis, places, rows, label, "o" if offset == 0 else "s", filled=offset == 0)
    axis.set_yticks(range(len(languages)), [name + (" (enhanced)" if name in enhanced else "") for name in languages])
    axis.set_ylim(len(languages) - 0.5, -0.5)
    axis.set_xlabel("change of bits per byte, %, and its 95% interval (left is better)")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_forgetting(compared: dict) -> Figure:
    """Heat map of strategies by languages: the change of bits per byte, dark where a language got worse."""
    strategies = compared["strategies"]
    languages = list(next(iter(strategies.values()))["languages"])
    changes = np.array([[100 * row["languages"][it]["mean"] for it in languages] for row in strategies.values()])
    figure, (axis,) = _grid(width=_width(len(languages), 0.7), height=1.2 + 0.45 * len(strategies))
    # Training all weights may cost a hundred times what other strategies do: the scale is logarithmic beyond 1%.
    shades = np.log1p(changes.clip(min=0))
    # The scale reaches at least 1%, so that tiny changes stay light even if they are the largest.
    darkest = max(np.log1p(1.0), shades.max(initial=0))
    _heat_map(axis, shades, np.vectorize(lambda value: percent(value / 100))(changes), vmax=darkest)
    _name_columns(axis, languages)
    axis.set_yticks(range(len(strategies)), list(strategies))
    return figure


def draw_trade(compared: dict) -> Figure:
    """What each strategy gains in the enhanced languages against what it costs the others, with 95% intervals."""
    figure, (axis,) = _grid(height=5)
    axis.axhline(0, color="0.6", linewidth=0.8)
    costly = "others" if "others" in compared["best"] else "all"
    for index, (name, row) in enumerate(compared["strategies"].items()):
        gain, cost = row["groups"]["enhanced"], row["groups"][costly]
        x, y = -100 * gain["mean"], 100 * cost["mean"]
        errors = [
            [[x + 100 * gain["interval"][1]], [-100 * gain["interval"][0] - x]],
            [[y - 100 * cost["interval"][0]], [100 * cost["interval"][1] - y]],
        ]
        axis.errorbar(
            x, y, np.abs(errors[1]), np.abs(errors[0]), marker=_MARKERS[index % len(_MARKERS)], linestyle="none",
            color="black", mfc="white" if index % 2 else "black", elinewidth=0.7, markersize=7,
            label=name,
        )  # fmt: skip
    scale = ""
    if max(map(abs, axis.get_ylim())) > 2:
        scale = ", logarithmic beyond 1"
        axis.set_yscale("symlog", linthresh=1)
        axis.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:+g}"))
    axis.set_xlabel("gain in the enhanced languages: fewer bits per byte, %")
    axis.set_ylabel(f"cost for {'the others' if costly == 'others' else 'all languages'}: more bits per byte, %{scale}")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _intervals(axis: Axes, places: list[float], rows: list[dict], label: str, marker: str, filled: bool) -> None:
    values = np.array([100 * row["bits_per_byte_change"] for row in rows])
    ends = 100 * np.array([row["interval"] for row in rows])
    axis.errorbar(
        values, places, xerr=np.abs([values - ends[:, 0], ends[:, 1] - values]), linestyle="none", marker=marker,
        color="black", mfc="black" if filled else "white", capsize=3, label=label,
    )  # fmt: skip


def _heat_map(
    axis: Axes, shades: np.ndarray, texts: np.ndarray, vmin: float | None = None, vmax: float | None = None
) -> None:
    """Draws cells from white to black, with their text on them."""
    vmin = min(0.0, shades.min(initial=0)) if vmin is None else vmin
    image = axis.imshow(shades, aspect="auto", cmap="Greys", vmin=vmin, vmax=vmax)
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for (row, column), text in np.ndenumerate(texts):
        color = "white" if shades[row, column] > middle else "black"
        axis.text(column, row, str(text), ha="center", va="center", fontsize=9, color=color)
