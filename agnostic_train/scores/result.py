"""Results of scoring a model: the language-agnostic score, its table, its controls, and its file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from agnostic_train.errors import UserError
from agnostic_train.files import read_json
from agnostic_train.scores.ablation import Ablation

SMALLEST_CHANGE = 1e-6
"""Smaller changes of perplexity are set to this value and reported as clipped."""


@dataclass(frozen=True)
class LanguageScore:
    """One language's row of the score's table.

    Attributes:
        perplexity: with no neuron off.
        change_shared, change_exclusive: how much the perplexity rises with that set off; None if the set is empty.
        importance: the ratio of the two changes; None if undefined.
        clipped: which of the two changes, `shared` or `exclusive`, were below `SMALLEST_CHANGE`.
        interval: 95% interval of the importance, from resampled sentences.
    """

    language: str
    perplexity: float
    num_shared: int
    num_exclusive: int
    change_shared: float | None
    change_exclusive: float | None
    importance: float | None
    clipped: tuple[str, ...] = ()
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class ScoreVariant:
    """The score by another measure, see `AgnosticScore.variant_table`.

    Changes are clipped exactly where the score's are.

    Attributes:
        value, interval: as for `AgnosticScore`.
        importance: per language, the ratio of the effects of its two sets; None if undefined.
        intervals: per language, the 95% interval of the importance; None if undefined.
    """

    value: float | None
    interval: tuple[float, float] | None
    importance: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]


@dataclass(frozen=True)
class AgnosticScore:
    """The score with its table, and the scores of random sets of the same sizes.

    Attributes:
        value: mean over defined languages of log(1 + importance); None if no language is defined.
        table: one row per language.
        controls: the scores with random sets, by seed.
        matched_controls: the scores with random sets of similar mean absolute activation, by seed: over all languages
            for the shared set, in its own language for an exclusive one.
        interval: 95% interval of the value, from resampled sentences (percentile bootstrap, the same draw of sentences
            for every set).
        variant_table: `per_neuron`, with each change divided by its set's size, and `log_perplexity`, with changes of
            the log-perplexity.
        ablation: the measured perplexities.
        activation_ratios: by kind of control, `random` and `matched`, how active the controls are relative to the
            `shared` set and each language's `exclusive` one, see `activation_ratio`; None if that wasn't measured.
    """

    value: float | None
    table: list[LanguageScore]
    controls: dict[int, "AgnosticScore"] = field(default_factory=dict)
    matched_controls: dict[int, "AgnosticScore"] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    variant_table: dict[str, ScoreVariant] = field(default_factory=dict)
    ablation: Ablation | None = None
    activation_ratios: dict[str, dict | None] = field(default_factory=dict)

    @property
    def importance(self) -> dict[str, float | None]:
        """Per language, the shared set's change over that of its exclusive set; None if undefined."""
        return {row.language: row.importance for row in self.table}

    @property
    def variants(self) -> dict[str, float | None]:
        """The value of each variant."""
        return {name: it.value for name, it in self.variant_table.items()}

    @property
    def undefined(self) -> list[str]:
        """Languages left out of the mean, because a set is empty."""
        return [row.language for row in self.table if row.importance is None]

    @property
    def clipped(self) -> list[str]:
        """Languages for which a change was set to `SMALLEST_CHANGE`."""
        return [row.language for row in self.table if row.clipped]

    @classmethod
    def load(cls, file: str | Path) -> "AgnosticScore":
        """Reads `score.json` without its controls.

        Raises:
            UserError: the file is missing or broken; the message names it.
        """
        content = read_json(file)
        names = {it.name for it in fields(LanguageScore)}
        try:
            # JSON has no tuples.
            rows: list[dict[str, Any]] = [
                {name: tuple(row[name]) if isinstance(row[name], list) else row[name] for name in names}
                for row in content["table"]
            ]
            return cls(content["value"], [LanguageScore(**row) for row in rows])
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{file}: not a language-agnostic score; run the score stage again") from None

    def to_json(self) -> dict:
        """Converts to plain JSON values, as in `score.json`."""
        return {
            "value": self.value,
            "interval": self.interval,
            "variants": self.variants,
            "variant_table": _variants_json(self),
            "importance": self.importance,
            "undefined": self.undefined,
            "clipped": self.clipped,
            "table": [vars(row) | {"clipped": list(row.clipped)} for row in self.table],
            "controls": _controls_json(
                "the score with random sets of the same number of neurons at every site",
                self.controls,
                self.activation_ratios.get("random"),
            ),
            "matched_controls": _controls_json(
                "the score with as many random neurons at every site, outside the set and of similar mean absolute "
                "activation (shared: mean over languages; exclusive: its own language)",
                self.matched_controls,
                self.activation_ratios.get("matched"),
            ),
            "ablation": None if self.ablation is None else self.ablation.to_json(),
        }


def _variants_json(score: AgnosticScore) -> dict:
    return {
        name: {
            "interval": it.interval,
            "importance": it.importance,
            "intervals": it.intervals,
            "clipped": score.clipped,
        }
        for name, it in score.variant_table.items()
    }


def _controls_json(description: str, controls: Mapping[int, AgnosticScore], activation_ratios: dict | None) -> dict:
    return {
        "description": description,
        "activation_ratio": activation_ratios,
        "values": {str(seed): control.value for seed, control in controls.items()},
        "intervals": {str(seed): control.interval for seed, control in controls.items()},
        "variants": {str(seed): control.variants for seed, control in controls.items()},
        "variant_table": {str(seed): _variants_json(control) for seed, control in controls.items()},
        "clipped": {str(seed): control.clipped for seed, control in controls.items()},
        "importance": {str(seed): control.importance for seed, control in controls.items()},
        "importance_intervals": {
            str(seed): {row.language: row.interval for row in control.table} for seed, control in controls.items()
        },
    }
