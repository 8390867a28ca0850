"""What a run found, for people: a self-contained HTML page, figures, the final table, the model card."""

import base64
import math
import re
from datetime import UTC, datetime
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a report is drawn without a screen

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from rich.table import Table
from transformers.trainer import TRAINER_STATE_NAME

from agnostic_train.decoder import PROJECTIONS
from agnostic_train.files import read_json, whole_directory, whole_file
from agnostic_train.neurons import LanguageNeurons
from agnostic_train.recipe import Recipe


def write_report(directory: Path, recipe: dict, manifest: dict) -> None:
    """Writes `figures/*.png` and `report.html` from the files that the other stages left in `directory`."""
    found = LanguageNeurons.load(directory / "neurons")
    score = read_json(directory / "score.json")
    evaluation = read_json(directory / "evaluation.json")["languages"]
    training = manifest["stages"]["train"]
    history = read_json(directory / training["checkpoint"] / TRAINER_STATE_NAME)["log_history"]
    figures = {
        "neurons": ("Neurons per layer and projection", _draw_neurons(found)),
        "change": ("Bits per byte before and after", _draw_change(evaluation, recipe["training"]["languages"])),
        "score": ("Importance of shared neurons, by language", _draw_score(score)),
    }
    if score["ablation"]:
        figures["ablation"] = ("Perplexity with sets of neurons switched off", _draw_ablation(score["ablation"]))
    if (directory / "emergence.json").exists():
        figures["emergence"] = ("Over the model's training", _draw_emergence(read_json(directory / "emergence.json")))
    if any("loss" in entry for entry in history):
        figures["training"] = ("Training loss", _draw_training(history))
    with whole_directory(directory / "figures") as temporary:
        for name, (_, figure) in figures.items():
            figure.savefig(temporary / f"{name}.png", dpi=150)
            plt.close(figure)
    environment = Environment(loader=PackageLoader("agnostic_train", "templates"), autoescape=True)
    page = environment.get_template("report.html").render(
        title=f"{', '.join(recipe['training']['languages'])} in {recipe['model']['name']}",
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        recipe=recipe,
        manifest=manifest,
        training=training,
        found=found,
        score=score,
        evaluation=evaluation,
        frozen=manifest["frozen_weights"],
        figures=[
            (title, base64.b64encode((directory / "figures" / f"{name}.png").read_bytes()).decode())
            for name, (title, _) in figures.items()
        ],
    )
    with whole_file(directory / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def summary_table(directory: Path, enhanced: list[str]) -> Table:
    """The run's last word: per language its neurons, and perplexity and bits per byte before and after."""
    found = LanguageNeurons.load(directory / "neurons")
    evaluation = read_json(directory / "evaluation.json")["languages"]
    score = read_json(directory / "score.json")
    value = "undefined" if score["value"] is None else f"{score['value']:.3f}"
    table = Table(
        title=f"language-agnostic score {value}, {len(found.shared)} shared neurons",
        caption="test text; * enhanced; exclusive: " + found.settings["exclusive"],
    )
    table.add_column("language", no_wrap=True)
    for header in ("related", "shared", "exclusive", "perplexity", "after", "bits/byte", "after", "change"):
        table.add_column(header, justify="right", no_wrap=True)
    for language, row in evaluation.items():
        before, after = row["before"], row["after"]
        table.add_row(
            language + (" *" if language in enhanced else ""),
            str(len(found.related[language])),
            str(len(found.shared & found.related[language])),
            str(len(found.exclusive[language])),
            f"{before['perplexity']:.2f}",
            f"{after['perplexity']:.2f}",
            f"{before['bits_per_byte']:.4f}",
            f"{after['bits_per_byte']:.4f}",
            f"{row['bits_per_byte_change']:+.1%}",
        )
    return table


def model_card(recipe: Recipe, training: dict, to: str = "merged", evaluation: dict | None = None) -> str:
    """The README.md of an enhanced checkpoint or adapter.

    Args:
        training: what the manifest says of the training.
        to: what was exported: `merged`, `lora`, or `delta`.
        evaluation: per language, the numbers before and after, as in `evaluation.json`, once they are known.
    """
    languages = "\n".join(f"- {language}" for language in recipe.training.languages)
    # The hub's metadata takes only its own names; a local path isn't one.
    hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.model.name) and not Path(recipe.model.name).exists()
    base = f"base_model: {recipe.model.name}\n" if hub_name else ""
    title = recipe.model.name if hub_name else Path(recipe.model.name).name  # a card is published, a path is private
    counts = training["neurons"]
    neurons = (
        "all weights" if counts is None else ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    )
    if training["strategy"] == "full":
        what = "Trained with agnostic_train as a baseline: all weights learned."
    else:
        kind = "random" if training["strategy"] == "random" else "chosen"
        what = (
            f"Trained with agnostic_train: only {kind} neurons learned (Chen et al. 2025, arXiv 2506.09890). Every "
            "other weight was compared with the base's, bit for bit: see `manifest.json`."
        )
    library, use = _USES[to]
    return f"""---
library_name: {library}
pipeline_tag: text-generation
{base}language:
{languages}
tags:
- agnostic-train
---

# {title}, enhanced for {", ".join(recipe.training.languages)}

{what} {use}

- languages detected on: {", ".join(recipe.corpus.languages)}
- strategy: {training["strategy"]} ({training["reason"]})
- neurons trained: {neurons}
- top ratio {recipe.detection.top_ratio}, consistency {recipe.detection.consistency}
- update: {recipe.training.update}; {", ".join(f"{key} {value}" for key, value in recipe.training.arguments.items())}
{_numbers(evaluation, recipe.training.languages)}"""


_USES = {
    "merged": ("transformers", "It is a plain checkpoint: `AutoModelForCausalLM.from_pretrained`."),
    "lora": ("peft", "It is a LoRA adapter: `PeftModel.from_pretrained`."),
    "delta": (
        "peft",
        "It is an adapter of rows and columns: `import agnostic_train`, then `PeftModel.from_pretrained`.",
    ),
}


def _numbers(evaluation: dict | None, enhanced: list[str]) -> str:
    if evaluation is None:
        return ""
    lines = [
        "",
        "Bits per byte on held-out text (lower is better; * enhanced):",
        "",
        "| language | before | after | change |",
    ]
    lines.append("| --- | ---: | ---: | ---: |")
    for language, row in evaluation.items():
        before, after = row["before"]["bits_per_byte"], row["after"]["bits_per_byte"]
        name = language + (" *" if language in enhanced else "")
        lines.append(f"| {name} | {before:.4f} | {after:.4f} | {row['bits_per_byte_change']:+.1%} |")
    return "\n".join([*lines, ""])


def _draw_neurons(found: LanguageNeurons) -> Figure:
    """A map of layers by projections for the shared set and for each language's exclusive one."""
    sizes = found.shared.sizes or {}
    projections = [name for name in PROJECTIONS if any(site[1] == name for site in sizes)] or list(PROJECTIONS)
    num_layers = 1 + max((layer for layer, _ in sizes), default=0)
    sets = {"shared": found.shared, **{f"exclusive {name}": neurons for name, neurons in found.exclusive.items()}}
    figure, axes = plt.subplots(
        len(sets),
        1,
        figsize=(8, 0.9 + len(sets) * (0.5 + 0.22 * len(projections))),
        layout="constrained",
        squeeze=False,
    )
    for axis, (name, neurons) in zip(axes[:, 0], sets.items(), strict=True):
        counts = np.array([[len(neurons[(layer, it)]) for layer in range(num_layers)] for it in projections])
        image = axis.imshow(counts, aspect="auto", cmap="Greys", vmin=0)
        axis.set_yticks(range(len(projections)), projections)
        axis.set_title(f"{name}: {len(neurons)}", fontsize=10, loc="left")
        axis.set_xticks(range(num_layers) if num_layers <= 16 else range(0, num_layers, 4))
        figure.colorbar(image, ax=axis, fraction=0.02)
    axes[-1, 0].set_xlabel("layer")
    return figure


def _draw_change(evaluation: dict, enhanced: list[str]) -> Figure:
    languages = list(evaluation)
    positions = np.arange(len(languages))
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for offset, (moment, color, hatch) in enumerate((("before", "white", "///"), ("after", "0.45", ""))):
        values = [evaluation[language][moment]["bits_per_byte"] for language in languages]
        axis.bar(
            positions + (offset - 0.5) * 0.4, values, 0.4, label=moment, color=color, hatch=hatch, edgecolor="black"
        )
    top = max(max(row[moment]["bits_per_byte"] for moment in ("before", "after")) for row in evaluation.values())
    for position, language in zip(positions, languages, strict=True):
        row = evaluation[language]
        height = max(row["before"]["bits_per_byte"], row["after"]["bits_per_byte"])
        axis.text(position, height + 0.02 * top, f"{row['bits_per_byte_change']:+.1%}", ha="center", fontsize=10)
    axis.set_xticks(positions, [name + (" (enhanced)" if name in enhanced else "") for name in languages])
    axis.set_ylabel("bits per byte, test text")
    axis.set_ylim(0, top * 1.15)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_score(score: dict) -> Figure:
    rows = [row for row in score["table"] if row["importance"] is not None]
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    positions = np.arange(len(rows))
    values = [np.log1p(row["importance"]) for row in rows]
    axis.bar(positions, values, 0.6, color="0.7", edgecolor="black")
    for position, value, row in zip(positions, values, rows, strict=True):
        if row["interval"]:
            low, high = np.log1p(row["interval"])
            axis.plot([position, position], [min(low, value), max(high, value)], color="black", marker="_")
    axis.set_xticks(positions, [row["language"] for row in rows])
    axis.set_ylabel("log(1 + importance)")
    axis.axhline(np.log(2), color="black", linestyle=":", label="log 2: shared matter as much as exclusive")
    if score["value"] is not None:
        axis.axhline(score["value"], color="black", label=f"score {score['value']:.3f}")
    controls = [value for value in score["controls"]["values"].values() if value is not None]
    for index, value in enumerate(controls):
        axis.axhline(value, color="0.5", linestyle="--", label="random sets" if index == 0 else None)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _draw_ablation(rows: dict) -> Figure:
    """Sets that were off by languages: how many times larger the perplexity is, on a scale of its logarithm."""
    languages = list(rows["none"]["languages"])
    # Random counterparts of exclusive sets are measured on their own language alone: no row of a map.
    names = [name for name, row in rows.items() if name != "none" and len(row["languages"]) == len(languages)]
    times = np.array(
        [
            [
                rows[name]["languages"][it]["perplexity"] / rows["none"]["languages"][it]["perplexity"]
                for it in languages
            ]
            for name in names
        ]
    ).reshape(len(names), len(languages))
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.4 * len(names)), layout="constrained")
    shades = np.log(times.clip(min=1e-3))
    image = axis.imshow(shades, aspect="auto", cmap="Greys", vmin=min(0.0, shades.min(initial=0)))
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for (row, column), value in np.ndenumerate(times):
        color = "white" if shades[row, column] > middle else "black"
        axis.text(column, row, f"{value:.3g}\u00d7", ha="center", va="center", fontsize=9, color=color)
    axis.set_xticks(range(len(languages)), languages)
    axis.set_yticks(range(len(names)), [f"{name} off ({rows[name]['neurons']})" for name in names])
    return figure


def _draw_emergence(rows: list[dict]) -> Figure:
    """Shared ratio, set sizes and score against the training step."""
    figure, axes = plt.subplots(3, 1, figsize=(8, 9), layout="constrained", sharex=True)
    numeric = all(row["step"] for row in rows)
    steps = [row["step"] for row in rows] if numeric else list(range(len(rows)))
    styles = [dict(marker="osv^Dx"[i % 6], linestyle=("-", "--", ":", "-.")[i % 4]) for i in range(20)]

    def draw(axis, values, label, style):
        known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        axis.plot(*zip(*known, strict=True), label=label, color=style.pop("color", "black"), markersize=5, **style)

    for index, language in enumerate(rows[0]["related"]):
        style = styles[index % len(styles)]
        draw(axes[0], [row["shared_ratio"][language] for row in rows], language, dict(style))
        draw(axes[1], [row["exclusive"][language] for row in rows], f"exclusive {language}", dict(style))
    draw(axes[1], [row["shared"] for row in rows], "shared", dict(linewidth=3, marker="o"))
    for index in range(len(rows[0]["controls"])):
        label = "random sets" if index == 0 else None
        draw(axes[2], [row["controls"][index] for row in rows], label, dict(color="0.6", linestyle="--", marker="."))
    for step, row in zip(steps, rows, strict=True):
        if row["interval"]:
            axes[2].plot([step, step], row["interval"], color="black", marker="_")
    draw(axes[2], [row["score"] for row in rows], "score, 95% interval", dict(linewidth=2, marker="o"))
    axes[2].axhline(math.log(2), color="black", linestyle=":", label="log 2")
    for axis, title in zip(axes, ("shared / related", "neurons", "language-agnostic score"), strict=True):
        axis.set_ylabel(title)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    if numeric:
        axes[2].set_xscale("log")
        axes[2].set_xticks(steps, [str(step) for step in steps])
        axes[2].minorticks_off()
    else:
        axes[2].set_xticks(steps, [row["checkpoint"] for row in rows])
    axes[2].set_xlabel("training step" if numeric else "checkpoint")
    return figure


def _draw_training(history: list[dict]) -> Figure:
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
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
