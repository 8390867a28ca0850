"""A run's results for readers: a self-contained HTML page with figures, and the comparison's text."""

import base64
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from transformers.trainer import TRAINER_STATE_NAME

from agnostic_train.files import read_json, whole_directory, whole_file
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.percent import percent
from agnostic_train.report.comparison_figures import costly_group, draw_forgetting, draw_rates, draw_trade
from agnostic_train.report.comparison_prose import GROUP_TITLES, penalty, remarks, selection, twin_sentences, verdicts
from agnostic_train.report.plotting import ENDINGS, is_figure, write_figures
from agnostic_train.report.run_figures import (
    draw_change,
    draw_neurons,
    draw_overlap,
    draw_relative_change,
    draw_training,
)
from agnostic_train.report.score_figures import draw_ablation, draw_emergence, draw_score
from agnostic_train.scores.ablation import NOTHING
from agnostic_train.scores.result import describe_score

_SMALLEST_SCALE = 0.6
"""Figures of many languages are wide; smaller than this, their text can't be read."""
COMPARISON = "comparison"
COMPARISON_TEXT, COMPARISON_TABLE, DIFFERENCES_TABLE = "comparison.md", "comparison.csv", "differences.csv"
_EMERGENCE_FIGURES = frozenset(["emergence"])
_COMPARISON_FIGURES = frozenset(["trade", "rates", "forgetting"])
_RUN_FIGURES = _EMERGENCE_FIGURES | _COMPARISON_FIGURES | {
    "change", "relative_change", "neurons", "overlap", "score", "ablation", "training"
}  # fmt: skip
COMPARISON_FILES = [f"{name}{ending}" for name in sorted(_COMPARISON_FIGURES) for ending in ENDINGS]
EMERGENCE_FILES = [f"{name}{ending}" for name in sorted(_EMERGENCE_FIGURES) for ending in ENDINGS]
RUN_FILES = [f"{name}{ending}" for name in sorted(_RUN_FIGURES) for ending in ENDINGS]
"""The figures that a run may write; those of `emergence/` are among them."""


def write_report(
    directory: Path, recipe: dict, manifest: dict, has_pilot: bool = False, has_comparison: bool = False
) -> None:
    """Writes `figures/` (PNG and SVG) and `report.html` from the files that the other stages left in `directory`.

    has_pilot, has_comparison: whether a `pilot.json` or `comparison.json` there belongs to this recipe.
    """
    detected = LanguageNeurons.load(directory / "neurons")
    score = read_json(directory / "score.json")
    evaluation = read_json(directory / "evaluation.json")
    training = manifest["stages"]["train"]
    history = read_json(directory / TRAINER_STATE_NAME)["log_history"]
    enhanced = recipe["training"]["languages"]
    titles: dict[str, tuple[str, Callable[[], Figure]]] = {
        "change": ("Bits per byte before and after", partial(draw_change, evaluation["languages"], enhanced)),
        "relative_change": ("Change per language", partial(draw_relative_change, evaluation, enhanced)),
        "neurons": ("Neurons per layer and projection", partial(draw_neurons, detected)),
        "overlap": ("Overlap of the languages' related neurons", partial(draw_overlap, detected)),
        "score": ("Importance of shared neurons, by language", partial(draw_score, score)),
    }
    if score["ablation"].keys() - {NOTHING}:
        title = "Perplexity with sets of neurons switched off"
        titles["ablation"] = (title, partial(draw_ablation, score["ablation"]))
    if recipe["model"]["checkpoints"]:
        rows = read_json(directory / "emergence.json")
        titles["emergence"] = ("Over the model's training", partial(draw_emergence, rows))
    comparison = read_json(directory / "comparison.json") if has_comparison else None
    if comparison is not None:
        titles |= _comparison_figures(comparison)
    if any("loss" in entry for entry in history):
        titles["training"] = ("Training loss", partial(draw_training, history))
    assert titles.keys() <= _RUN_FIGURES
    with whole_directory(directory / "figures", is_run_figure) as temporary:
        write_figures(temporary, {name: figure for name, (_, figure) in titles.items()}, evaluation["languages"])
    page = (
        _environment()
        .get_template("report.html")
        .render(
            title=f"{', '.join(enhanced)} in {recipe['model']['name']}",
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            recipe=recipe,
            manifest=manifest,
            training=training,
            detected=detected,
            score=score,
            evaluation=evaluation,
            pilot=read_json(directory / "pilot.json") if has_pilot else None,
            comparison=comparison,
            frozen=manifest["frozen_weights"],
            figures={
                name: {"title": title, **_embedded(directory / "figures" / f"{name}.svg")}
                for name, (title, _) in titles.items()
            },
        )
    )
    with whole_file(directory / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _embedded(figure: Path) -> dict[str, str]:
    """An SVG file's content for the page, and the width below which it scrolls instead of shrinking."""
    content = figure.read_bytes()
    width = re.search(rb'width="([0-9.]+)pt"', content)
    assert width is not None
    return {"content": base64.b64encode(content).decode(), "least_width": f"{_SMALLEST_SCALE * float(width[1]):.0f}pt"}


def is_run_figure(path: Path) -> bool:
    """Whether a path is a file that `write_report` writes in `figures/`."""
    return is_figure(path, _RUN_FIGURES)


def is_emergence_file(path: Path) -> bool:
    """Whether a path is a file of `emergence/`."""
    return is_figure(path, _EMERGENCE_FIGURES)


def is_comparison_file(path: Path) -> bool:
    """Whether a path is a file of `comparison/`."""
    return is_figure(path, _COMPARISON_FIGURES) or path.name in (COMPARISON_TEXT, COMPARISON_TABLE, DIFFERENCES_TABLE)


def write_comparison_figures(comparison: dict, folder: Path) -> None:
    """Draws the comparison's figures into `folder`."""
    figures = {name: figure for name, (_, figure) in _comparison_figures(comparison).items()}
    write_figures(folder, figures, comparison["before"]["test"])


def write_emergence_figures(rows: list[dict], folder: Path) -> None:
    """Draws the figure of the score over a model's checkpoints into `folder`."""
    write_figures(folder, {"emergence": partial(draw_emergence, rows)}, rows[0]["related"])


def comparison_text(comparison: dict) -> str:
    """The comparison as Markdown: the tables, what differs beyond noise, and how the learning rates were chosen."""
    return _environment().get_template("comparison.md").render(comparison, comparison=comparison)


def _comparison_figures(comparison: dict) -> dict[str, tuple[str, Callable[[], Figure]]]:
    compared = comparison["texts"]["test"]
    if not compared["strategies"]:
        return {}
    figures: dict[str, tuple[str, Callable[[], Figure]]] = {}
    if costly_group(compared["best"]):
        figures["trade"] = ("What each strategy gains and costs", partial(draw_trade, comparison))
    tried = [it for tuned in comparison["tuning"].values() for it in tuned["tried"] if it["groups"] is not None]
    if costly_group(tried[0]["groups"]) and len(tried) > len(comparison["tuning"]):
        title = "Gain and cost on validation text at every learning rate tried"
        figures["rates"] = (title, partial(draw_rates, comparison))
    return figures | {"forgetting": ("Change of every language by strategy", partial(draw_forgetting, compared))}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("agnostic_train.report", "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = percent
    # Jinja's own, made for scripts, writes all but ASCII as escapes.
    environment.filters["as_json"] = partial(json.dumps, ensure_ascii=False, indent=1)
    environment.globals |= {
        "group_titles": GROUP_TITLES, "selection": selection, "penalty": penalty, "verdicts": verdicts,
        "remarks": remarks, "twin_sentences": twin_sentences, "describe_score": describe_score,
    }  # fmt: skip
    return environment
