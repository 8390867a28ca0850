"""Figures of a run: neurons, languages before and after, the training."""

import re
from itertools import combinations_with_replacement

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agnostic_train.detection.stability import jaccard
from agnostic_train.model.decoder import PROJECTIONS
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.percent import percent
from agnostic_train.report.plotting import draw_heat_map, line_style, make_grid, name_columns, name_series, width_of


def draw_neurons(detected: LanguageNeurons) -> Figure:
    """Heat maps of neuron counts by layer and projection, for the shared set and each language's exclusive set."""
    sizes = detected.shared.sizes or {}
    projections = [name for name in PROJECTIONS if any(site[1] == name for site in sizes)] or list(PROJECTIONS)
    num_layers = 1 + max((layer for layer, _ in sizes), default=0)
    sets = {"shared": detected.shared, **{f"exclusive {name}": neurons for name, neurons in detected.exclusive.items()}}
    figure, axes = make_grid(len(sets), height=0.9 + len(sets) * (0.5 + 0.22 * len(projections)))
    for axis, (name, neurons) in zip(axes, sets.items(), strict=True):
        counts = np.array([[len(neurons[(layer, it)]) for layer in range(num_layers)] for it in projections])
        image = axis.imshow(counts, aspect="auto", cmap="Greys", vmin=0, vmax=max(1, counts.max()))
        axis.set_yticks(range(len(projections)), projections)
        axis.set_title(f"{name}: {len(neurons)}", fontsize=10, loc="left")
        axis.set_xticks(range(num_layers) if num_layers <= 16 else range(0, num_layers, 4))
        figure.colorbar(image, ax=axis, fraction=0.02, ticks=MaxNLocator(4, integer=True))
    axes[-1].set_xlabel("layer")
    return figure


def draw_overlap(detected: LanguageNeurons) -> Figure:
    """Jaccard overlap of every two languages' related neurons."""
    languages = detected.languages
    values = np.zeros((len(languages), len(languages)))
    for (row, a), (column, b) in combinations_with_replacement(enumerate(languages), 2):
        values[row, column] = values[column, row] = jaccard(detected.related[a], detected.related[b])["all"] or 0.0
    figure, (axis,) = make_grid(width=1.5 + 0.9 * len(languages), height=1.2 + 0.6 * len(languages))
    draw_heat_map(axis, values, np.vectorize(lambda value: f"{value:.2f}")(values), vmax=1.0)
    name_columns(axis, languages)
    axis.set_yticks(range(len(languages)), languages)
    return figure


def draw_change(evaluation: dict, enhanced: list[str]) -> Figure:
    languages = list(evaluation)
    positions = np.arange(len(languages))
    figure, (axis,) = make_grid(width=width_of(len(languages), 0.95))
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
    name_columns(axis, languages, enhanced)
    axis.set_ylabel("bits per byte, test text")
    axis.set_ylim(0, top * 1.15)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_relative_change(evaluation: dict, enhanced: list[str]) -> Figure:
    """Change of bits per byte per language with its 95% interval, on test and (open marks) parallel text."""
    texts = {"test text": evaluation["languages"], "parallel text": evaluation.get("parallel") or {}}
    languages = list(texts["test text"])
    figure, (axis,) = make_grid(height=1.2 + 0.45 * len(languages))
    axis.axvline(0, color="black", linewidth=0.8)
    for offset, (label, rows) in enumerate(texts.items()):
        places = [place + 0.2 * offset for place, language in enumerate(languages) if language in rows]
        rows = [rows[language] for language in languages if language in rows]
        if rows:
            _draw_intervals(axis, places, rows, label, "o" if offset == 0 else "s", filled=offset == 0)
    axis.set_yticks(range(len(languages)), [name + (" (enhanced)" if name in enhanced else "") for name in languages])
    axis.set_ylim(len(languages) - 0.5, -0.5)
    axis.set_xlabel("change of bits per byte, %, and its 95% interval (left is better)")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_training(history: list[dict]) -> Figure:
    figure, (axis,) = make_grid()
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    axis.plot(*zip(*losses, strict=True), color="black", marker="." if len(losses) < 50 else None, label="training")
    keys = sorted({key for entry in history for key in entry if re.fullmatch(r"eval_.+_loss", key)})
    for index, key in enumerate(keys):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axis.plot(*zip(*points, strict=True), markersize=4, label=key[5:-5], **line_style(index + 1))
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats per token")
    name_series(axis, height=4)
    return figure


def _draw_intervals(axis: Axes, places: list[float], rows: list[dict], label: str, marker: str, filled: bool) -> None:
    values = np.array([100 * row["bits_per_byte_change"] for row in rows])
    ends = 100 * np.array([row["interval"] for row in rows])
    axis.errorbar(
        values, places, xerr=np.abs([values - ends[:, 0], ends[:, 1] - values]), linestyle="none", marker=marker,
        color="black", mfc="black" if filled else "white", capsize=3, label=label,
    )  # fmt: skip
