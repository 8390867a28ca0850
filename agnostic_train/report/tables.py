"""Measurements as flat tables, one row each, the same for CSV files and experiment tracking."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from agnostic_train.files import whole_file
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.scores.ablation import NOTHING

Table = list[dict[str, object]]
"""Rows whose keys are the columns, in order; a key that a row lacks is an empty cell."""


def neuron_table(detected: LanguageNeurons) -> Table:
    """The number of neurons per set, layer and projection."""
    sets = {"shared": detected.shared}
    sets |= {f"related {language}": neurons for language, neurons in detected.related.items()}
    sets |= {f"exclusive {language}": neurons for language, neurons in detected.exclusive.items()}
    sites = dict.fromkeys(site for neurons in sets.values() for site, _ in neurons.items())
    return [
        {"set": name, "layer": layer, "projection": projection, "neurons": len(neurons[(layer, projection)])}
        for name, neurons in sets.items()
        for layer, projection in sorted(sites)
    ]


def score_table(score: dict) -> Table:
    """The score, its variants and its controls, by language and in total (`all`). Takes the content of `score.json`.

    `importance` is a language's ratio, and `score` is log(1 + importance), in the row `all` its mean over the languages
    for which it is defined; `_low` and `_high` are the ends of their 95% intervals. `clipped` says whether the language
    was clipped; in the row `all`, whether any was.
    """
    table = _score_rows("detected", None, score)
    for kind, controls in score["controls"].items():
        for seed, control in controls["scores"].items():
            table += _score_rows(kind, seed, control)
    return table


def _score_rows(kind: str, seed: str | None, score: dict) -> Table:
    """The rows of one score, then those of its variants."""
    clipped = score["clipped"]
    rows = _rows(kind, seed, score | {"intervals": score["importance_intervals"]}, clipped)
    for name, variant in score["variants"].items():
        rows += _rows(f"{kind}, {name}", seed, variant, clipped)
    return rows


def _rows(kind: str, seed: str | None, variant: dict, clipped: list[str]) -> Table:
    Ends = Sequence[float] | None

    def row(
        language: str, ratio: float | None, ratio_ends: Ends, score: float | None, score_ends: Ends, is_clipped: bool
    ) -> dict:
        (ratio_low, ratio_high), (low, high) = ratio_ends or (None, None), score_ends or (None, None)
        return {
            "sets": kind, "seed": seed, "language": language,
            "importance": ratio, "importance_low": ratio_low, "importance_high": ratio_high,
            "score": score, "score_low": low, "score_high": high, "clipped": is_clipped,
        }  # fmt: skip

    rows = [row("all", None, None, variant["value"], variant["interval"], bool(clipped))]
    for language, ratio in variant["importance"].items():
        # log1p increases, so it maps the ends of an interval to the ends of the new interval.
        ends = variant["intervals"][language]
        logs = None if ends is None else [math.log1p(it) for it in ends]
        rows.append(row(language, ratio, ends, None if ratio is None else math.log1p(ratio), logs, language in clipped))
    return rows


def ablation_table(ablation: dict) -> Table:
    """Every measured language with every set switched off. Takes `ablation` of `score.json`."""
    before = ablation[NOTHING]["languages"]
    return [
        {
            "off": off, "neurons": row["neurons"], "language": language, "perplexity": it["perplexity"],
            "bits_per_byte": it["bits_per_byte"], "times": it["perplexity"] / before[language]["perplexity"],
        }
        for off, row in ablation.items()
        for language, it in row["languages"].items()
    ]  # fmt: skip


def evaluation_table(evaluation: dict) -> Table:
    """Every language before and after training, by kind of text. Takes the content of `evaluation.json`."""
    rows = []
    for text, key in (("test", "languages"), ("parallel", "parallel"), ("validation", "validation")):
        for language, it in (evaluation.get(key) or {}).items():
            low, high = it["interval"]
            rows.append(
                {
                    "text": text, "language": language,
                    "perplexity_before": it["before"]["perplexity"], "perplexity_after": it["after"]["perplexity"],
                    "bits_per_byte_before": it["before"]["bits_per_byte"],
                    "bits_per_byte_after": it["after"]["bits_per_byte"], "change": it["bits_per_byte_change"],
                    "low": low, "high": high, "sentences": it["num_sentences"],
                }
            )  # fmt: skip
    return rows


def task_table(tasks: dict) -> Table:
    """Each checkpoint's metrics on each task. Takes `tasks` of `evaluation.json`."""
    return [
        {
            "task": name,
            "checkpoint": checkpoint,
            "metric": metric,
            "value": it["value"],
            "standard_error": it["standard_error"],
            "items": task["num_items"],
        }
        for name, task in tasks["tasks"].items()
        for checkpoint, row in task["checkpoints"].items()
        for metric, it in row["metrics"].items()
    ]


def task_comparison_table(tasks: dict) -> Table:
    """Each pair of checkpoints on each task, compared on the same items. Takes `tasks` of `evaluation.json`."""
    return [
        {
            "task": name,
            **{key: value for key, value in it.items() if key != "interval"},
            "low": it["interval"][0],
            "high": it["interval"][1],
        }
        for name, task in tasks["tasks"].items()
        for it in task["comparisons"]
    ]


def emergence_table(rows: list[dict]) -> Table:
    """One row per checkpoint; `clipped` names the clipped languages. Takes the content of `emergence.json`."""
    table = []
    for row in rows:
        low, high = row["interval"] or (None, None)
        flat = {it: row[it] for it in ("step", "checkpoint", "shared", "score")} | {"low": low, "high": high}
        flat |= {f"score_{name}": value for name, value in row["variants"].items()}
        flat["clipped"] = ", ".join(row["clipped"])
        for kind, controls in row["controls"].items():
            for index, it in enumerate(controls, 1):
                flat |= {f"{kind}_{index}": it["score"], f"{kind}_{index}_clipped": ", ".join(it["clipped"])}
        for name in ("exclusive", "related", "shared_ratio", "perplexity"):
            flat |= {f"{name}_{language}": value for language, value in row[name].items()}
        table.append(flat)
    return table


def pilot_table(pilot: dict) -> Table:
    """One row per candidate, the best first. Takes the content of `pilot.json`."""
    return [
        {key: it for key, it in row.items() if key != "languages"}
        | {f"change_{language}": change for language, change in (row["languages"] or {}).items()}
        for row in pilot["ranking"]
    ]


def comparison_table(comparison: dict) -> Table:
    """One row per strategy, seed (`all` for the mean), text and language. Takes the content of `comparison.json`."""
    rows = []
    for text, compared in comparison["texts"].items():
        for name, strategy in compared["strategies"].items():
            tuning = comparison["tuning"][name]
            for language, it in strategy["languages"].items():
                common = {
                    "strategy": name,
                    "learning_rate": tuning["learning_rate"],
                    "text": text,
                    "language": language,
                }
                low, high = it["interval"]
                rows.append({**common, "seed": "all", "change": it["mean"], "low": low, "high": high})
                rows += [
                    {**common, "seed": seed, "change": change, "low": None, "high": None}
                    for seed, change in it["by_seed"].items()
                ]
    return rows


def differences_table(comparison: dict) -> Table:
    """One row per text, group and pair of strategies: how far the first lies above the second.

    Takes the content of `comparison.json`.
    """
    return [
        {
            "text": text,
            "group": it["group"],
            "first": it["strategies"][0],
            "second": it["strategies"][1],
            "difference": it["mean"],
            **dict(zip(("low", "high"), it["interval"], strict=True)),
            **dict(zip(("simultaneous_low", "simultaneous_high"), it["simultaneous_interval"], strict=True)),
            "beyond_noise": it["beyond_noise"],
        }
        for text, compared in comparison["texts"].items()
        for it in compared["differences"]
    ]


def write_csv(table: Table, file: Path) -> None:
    """Writes a table with a header as UTF-8, atomically; None is an empty cell."""
    columns: Sequence[str] = list(dict.fromkeys(key for row in table for key in row))
    with whole_file(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(table)
