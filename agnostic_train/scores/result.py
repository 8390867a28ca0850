"""Results of scoring a model: the language-agnostic score, its table, its controls, and its file."""

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from agnostic_train.errors import UserError
from agnostic_train.files import read_json
from agnostic_train.scores.ablation import Ablation

MIN_CHANGE = 1e-6
"""Smaller changes of perplexity are set to this value and reported as clipped."""
CONTROLS = {"random": "random sets of equal size", "matched": "random sets of similar activation"}
"""The kinds of control sets. Both have as many neurons at every site as the detected sets. `matched` ones lie
outside all of them, unless a site has too few other neurons, and have similar mean absolute activations: for the shared
set over all languages, for an exclusive one in its own."""


@dataclass(frozen=True)
class LanguageScore:
    """One language's row of the score's table.

    Attributes:
        perplexity: with no neuron off.
        change_shared, change_exclusive: how much the perplexity rises with that set off; None if the set is empty.
        importance: the ratio of the two changes; None if undefined.
        clipped: which of the two changes, `shared` or `exclusive`, were below `MIN_CHANGE`.
        interval: 95% interval of the importance, from resampled sentences. Changes of resamples are clipped like the
            language's own: an end in the millions, or near zero, comes from clipped ones.
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
    """The score by another measure, see `AgnosticScore.variants`.

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
        controls: by kind, see `CONTROLS`; empty for the score of control sets themselves.
        interval: 95% interval of the value, from resampled sentences (percentile bootstrap, the same draw of sentences
            for every set).
        variants: `per_neuron`, with each change divided by its set's size, and `log_perplexity`, with changes of
            the log-perplexity.
        ablation: the measured perplexities.
    """

    value: float | None
    table: list[LanguageScore]
    controls: dict[str, "Controls"] = field(default_factory=dict, repr=False)
    interval: tuple[float, float] | None = None
    variants: dict[str, ScoreVariant] = field(default_factory=dict, repr=False)
    ablation: Ablation | None = field(default=None, repr=False, compare=False)

    @property
    def importance(self) -> dict[str, float | None]:
        """Per language, the shared set's change over that of its exclusive set; None if undefined."""
        return {row.language: row.importance for row in self.table}

    @property
    def undefined(self) -> list[str]:
        """Languages left out of the mean, because a set is empty."""
        return [row.language for row in self.table if row.importance is None]

    @property
    def clipped(self) -> list[str]:
        """Languages for which a change was set to `MIN_CHANGE`."""
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
            **self._summary(),
            "table": [vars(row) | {"clipped": list(row.clipped)} for row in self.table],
            "controls": {
                kind: {
                    "description": CONTROLS[kind],
                    "activation_ratio": controls.activation_ratio,
                    "scores": {str(seed): score._summary() for seed, score in controls.scores.items()},
                }
                for kind, controls in self.controls.items()
            },
            "ablation": None if self.ablation is None else self.ablation.to_json(),
        }

    def _summary(self) -> dict:
        return {
            "value": self.value,
            "interval": self.interval,
            "importance": self.importance,
            "importance_intervals": {row.language: row.interval for row in self.table},
            "undefined": self.undefined,
            "clipped": self.clipped,
            "variants": {name: vars(it) for name, it in self.variants.items()},
        }


def describe_score(value: float | None, clipped: Collection[str]) -> str:
    """A score in words; `clipped` are the languages for which a change was set to `MIN_CHANGE`."""
    return "undefined" if value is None else f"{value:.3f}" + (" (clipped)" if clipped else "")


@dataclass(frozen=True)
class Controls:
    """The scores of random sets of one kind.

    Attributes:
        scores: by seed.
        activation_ratio: how active the sets are relative to the `shared` set and each language's `exclusive` one, see
            `contrast.activation_ratio`; None if that wasn't measured.
    """

    scores: dict[int, AgnosticScore]
    activation_ratio: dict | None = None
