"""The language-agnostic score: how much more the shared neurons carry than each language's own."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from agnostic_train.deactivation import deactivate
from agnostic_train.files import UserError, read_json
from agnostic_train.inference import Batch
from agnostic_train.neurons import LanguageNeurons, NeuronSet
from agnostic_train.perplexity import Perplexity, perplexity

SMALLEST_CHANGE = 1e-6
"""A smaller change of perplexity is set to this and reported as clipped."""


@dataclass(frozen=True)
class LanguageScore:
    """One language's row of the score's table.

    perplexity: with no neuron off. change_shared, change_exclusive: how much it rises with that set off, None where
    the set is empty. clipped: which of the two changes were below `SMALLEST_CHANGE`. importance: their ratio, None
    where undefined.
    """

    language: str
    perplexity: float
    num_shared: int
    num_exclusive: int
    change_shared: float | None
    change_exclusive: float | None
    importance: float | None
    clipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class AgnosticScore:
    """The score with its table, and the same for random sets of the same sizes.

    value: mean over defined languages of log(1 + importance); None when no language is defined.
    table: a row per language. controls: the scores with random sets, by seed.
    """

    value: float | None
    table: list[LanguageScore]
    controls: dict[int, "AgnosticScore"] = field(default_factory=dict)

    @property
    def importance(self) -> dict[str, float | None]:
        """Per language, the change by the shared neurons over the change by its exclusive ones."""
        return {row.language: row.importance for row in self.table}

    @property
    def undefined(self) -> list[str]:
        """Languages left out of the mean, because a set is empty."""
        return [row.language for row in self.table if row.importance is None]

    @property
    def clipped(self) -> list[str]:
        """Languages of which a change was set to `SMALLEST_CHANGE`."""
        return [row.language for row in self.table if row.clipped]

    @classmethod
    def load(cls, file: str | Path) -> "AgnosticScore":
        """Reads `score.json` without its controls; raises `UserError` that names the file if it is missing or broken."""
        content = read_json(file)
        names = {it.name for it in fields(LanguageScore)}
        try:
            table = [LanguageScore(**{name: row[name] for name in names}) for row in content["table"]]
            return cls(content["value"], table)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{file}: not a language-agnostic score; run the score stage again") from None

    def to_json(self) -> dict:
        """Plain JSON values, as in `score.json`."""
        return {
            "value": self.value,
            "importance": self.importance,
            "undefined": self.undefined,
            "clipped": self.clipped,
            "table": [vars(row) | {"clipped": list(row.clipped)} for row in self.table],
            "controls": {
                "description": "the score with random sets of the same number of neurons at every site",
                "values": {str(seed): control.value for seed, control in self.controls.items()},
                "clipped": {str(seed): control.clipped for seed, control in self.controls.items()},
            },
        }


def language_agnostic_score(
    model: nn.Module,
    neurons: LanguageNeurons,
    corpora: Mapping[str, Iterable[Batch]],
    *,
    control_seeds: Sequence[int] = (),
    progress: bool = False,
) -> AgnosticScore:
    """Scores how language-agnostic a model is (Chen et al. 2025, Eq. 4-5).

    For language l: `Imp_l = dPPL(l | shared off) / dPPL(l | exclusive_l off)`, dPPL the perplexity after minus before;
    `score = mean over l of log(1 + Imp_l)`. An empty set makes l undefined: it is left out of the mean and listed.

    Args:
        model: left as found; weights are changed in place and restored bit for bit.
        neurons: from `detect_neurons` on this model.
        corpora: per language of `neurons`, batches as for `perplexity`. They are read several times; an iterator is
            kept in memory.
        control_seeds: also score random sets of the same sizes, one for each seed.
        progress: show a progress bar.

    Raises:
        ValueError: a language without a corpus.
        UserError: neurons of another model.
    """
    missing = [language for language in neurons.languages if language not in corpora]
    if missing:
        raise ValueError(f"no corpus for {', '.join(missing)}")
    batches = {language: list(corpora[language]) for language in neurons.languages}
    num_passes = len(batches) * (1 + 2 * (1 + len(control_seeds)))
    with tqdm(total=num_passes, desc="score", unit=" passes", disable=not progress, leave=False) as bar:

        def measure(language: str) -> Perplexity:
            result = perplexity(model, batches[language])
            bar.update()
            return result

        before = {language: measure(language) for language in batches}
        table = _table(model, neurons, before, measure)
        controls = {}
        for seed in control_seeds:
            drawn = LanguageNeurons(
                neurons.related,
                neurons.shared.random_like(seed, model),
                {language: own.random_like(seed, model) for language, own in neurons.exclusive.items()},
            )
            control_table = _table(model, drawn, before, measure)
            controls[seed] = AgnosticScore(_mean(control_table), control_table)
    return AgnosticScore(_mean(table), table, controls)


def _table(model: nn.Module, neurons: LanguageNeurons, before: dict[str, Perplexity], measure) -> list[LanguageScore]:
    shared_off: dict[str, float] = {}
    if len(neurons.shared):
        with deactivate(model, neurons.shared):
            shared_off = {language: measure(language).value for language in before}
    rows = []
    for language, found in before.items():
        own: NeuronSet = neurons.exclusive[language]
        exclusive_off = None
        if len(own):
            with deactivate(model, own):
                exclusive_off = measure(language).value
        rows.append(
            language_score(
                language, found.value, shared_off.get(language), exclusive_off, len(neurons.shared), len(own)
            )
        )
    return rows


def language_score(
    language: str,
    before: float,
    shared_off: float | None,
    exclusive_off: float | None,
    num_shared: int,
    num_exclusive: int,
) -> LanguageScore:
    """One row from three perplexities; None for a perplexity that an empty set leaves undefined."""
    changes = {"shared": shared_off, "exclusive": exclusive_off}
    changes = {name: None if after is None else after - before for name, after in changes.items()}
    clipped = tuple(name for name, change in changes.items() if change is not None and change < SMALLEST_CHANGE)
    importance = None
    if changes["shared"] is not None and changes["exclusive"] is not None:
        importance = max(changes["shared"], SMALLEST_CHANGE) / max(changes["exclusive"], SMALLEST_CHANGE)
    return LanguageScore(
        language, before, num_shared, num_exclusive, changes["shared"], changes["exclusive"], importance, clipped
    )


def _mean(table: list[LanguageScore]) -> float | None:
    defined = [math.log1p(row.importance) for row in table if row.importance is not None]
    return sum(defined) / len(defined) if defined else None
