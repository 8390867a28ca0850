"""The language-agnostic score: how much more the shared neurons matter than each language's exclusive ones."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from agnostic_train.model.batches import Batch, check_corpora
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.scores.ablation import NOTHING, Ablation, ablate
from agnostic_train.scores.bootstrap import interval, resample_chunks
from agnostic_train.scores.contrast import Contrast, activation_ratios, detected_contrast, random_contrast
from agnostic_train.scores.result import (
    CONTROLS,
    MIN_CHANGE,
    AgnosticScore,
    Controls,
    LanguageScore,
    ScoreVariant,
)

MEASURES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "perplexity": lambda change, before, size: change,
    "per_neuron": lambda change, before, size: change / size,
    "log_perplexity": lambda change, before, size: (change / before).log1p(),
}
"""Measures of the effect of switching a set off, from the (already clipped) change of perplexity, the perplexity before
and the set's size: the score's own, the change per neuron, and the log-perplexity's change in nats per token."""


def language_agnostic_score(
    model: nn.Module,
    neurons: LanguageNeurons,
    corpora: Mapping[str, Iterable[Batch]],
    *,
    control_seeds: Sequence[int] = (1, 2, 3),
    num_resamples: int = 1000,
    progress: bool = False,
    resume_dir: str | Path | None = None,
) -> AgnosticScore:
    """Scores how language-agnostic a model is (Chen et al. 2025, Eq. 4-5).

    For language l: `Imp_l = dPPL(l | shared off) / dPPL(l | exclusive_l off)`, where dPPL is the perplexity after minus
    the one before; `score = mean over l of log(1 + Imp_l)`. An empty set makes l undefined: it is left out of the mean
    and listed.

    Args:
        model: left as found; weights are changed in place and restored bit for bit.
        neurons: from `detect_neurons` on this model.
        corpora: per language of `neurons`, batches as for `perplexity`. They are read several times; an iterator's
            batches are kept in memory.
        control_seeds: also score random sets of the same sizes, one for each seed; if `neurons` has activations, also
            random sets of similar activation. Without seeds the score is faster, but has nothing to be compared with.
        num_resamples: number of bootstrap resamples; 0 omits the intervals.
        progress: show a progress bar.
        resume_dir: a folder for the measurements so far, from which an interrupted score continues. Measurements of
            other weights, text or neurons aren't reused.

    Raises:
        ValueError: a language without a corpus, or `num_resamples` below 0.
        TypeError: `neurons` isn't a `LanguageNeurons`, or `corpora` doesn't map languages to batches.
        UserError: the neurons belong to another model.
        NonFiniteLossError: with some set switched off, the loss isn't finite; a `UserError`.
    """
    check_corpora(corpora)
    if num_resamples < 0:
        raise ValueError(f"num_resamples must be at least 0, not {num_resamples}")
    if not isinstance(neurons, LanguageNeurons):
        raise TypeError(f"neurons: give the LanguageNeurons of a detection, not a {type(neurons).__name__}")
    missing = [language for language in neurons.languages if language not in corpora]
    if missing:
        raise ValueError(f"no corpus for {', '.join(missing)}")
    batches = {language: list(corpora[language]) for language in neurons.languages}
    detected = detected_contrast(neurons)
    drawn: dict[str, dict[int, Contrast]] = {
        kind: {seed: random_contrast(neurons, seed, model, kind) for seed in control_seeds}
        for kind in CONTROLS
        if kind == "random" or neurons.activations is not None
    }
    contrasts = [detected, *(contrast for by_seed in drawn.values() for contrast in by_seed.values())]
    sets = {name: neuron_set for contrast in contrasts for name, neuron_set in contrast.sets.items()}
    # A language's exclusive control set is measured only on that language.
    only = {contrast.exclusive_name(language): [language] for contrast in contrasts[1:] for language in batches}
    num_passes = sum(len(only.get(name, batches)) for name, it in sets.items() if len(it)) + len(batches)
    with tqdm(total=num_passes, desc="score", unit=" passes", disable=not progress, leave=False) as bar:
        ablation = ablate(model, sets, batches, only, bar.update, resume_dir)
    scores = score_contrasts(ablation, contrasts, num_resamples)
    controls = {
        kind: Controls(
            {seed: scores[contrast.name] for seed, contrast in by_seed.items()},
            activation_ratios(neurons, [*by_seed.values()], model),
        )
        for kind, by_seed in drawn.items()
    }
    return replace(scores[detected.name], controls=controls, ablation=ablation)


def score_contrasts(ablation: Ablation, contrasts: Sequence[Contrast], num_resamples: int) -> dict[str, AgnosticScore]:
    """Scores each contrast from the measured perplexities, by its name."""
    rows = {it.name: [_row(ablation, it, language) for language in ablation.languages] for it in contrasts}
    defined = {name: [row.language for row in table if row.importance is not None] for name, table in rows.items()}
    resampled: dict[str, dict[str, dict[str, Tensor]]] = {it.name: {} for it in contrasts}
    for seed, language in enumerate(ablation.languages if num_resamples else []):
        of_language = [it for it in contrasts if language in defined[it.name]]
        for name, importances in _resampled(ablation, of_language, language, num_resamples, seed).items():
            resampled[name][language] = importances
    return {it.name: _score(ablation, it, rows[it.name], resampled[it.name]) for it in contrasts}


def _resampled(
    ablation: Ablation, contrasts: Sequence[Contrast], language: str, num_resamples: int, seed: int
) -> dict[str, dict[str, Tensor]]:
    """Importances by contrast and measure, (resamples,), all for the same draw of sentences."""
    num_sentences = len(ablation.measured[NOTHING][language].sentence_nats)
    chunks = [
        {it.name: _importances(ablation, it, language, counts) for it in contrasts}
        for counts in resample_chunks(num_sentences, num_resamples, seed, at_once=num_resamples)
    ]
    return {
        it.name: {measure: torch.cat([chunk[it.name][measure] for chunk in chunks]) for measure in MEASURES}
        for it in contrasts
    }


def _row(ablation: Ablation, contrast: Contrast, language: str) -> LanguageScore:
    shared, exclusive = names = contrast.names(language)
    before = _measured(ablation, NOTHING, language)
    afters = {name: ablation.perplexity(name, language) for name in names}
    changes = {name: None if after is None else float(after - before) for name, after in afters.items()}
    clipped = {name: change is not None and change < MIN_CHANGE for name, change in changes.items()}
    is_defined = None not in changes.values()
    return LanguageScore(
        language,
        perplexity=float(before),
        num_shared=ablation.num_neurons.get(shared, 0),
        num_exclusive=ablation.num_neurons.get(exclusive, 0),
        change_shared=changes[shared],
        change_exclusive=changes[exclusive],
        importance=float(_importances(ablation, contrast, language)["perplexity"]) if is_defined else None,
        clipped=tuple(part for part, name in (("shared", shared), ("exclusive", exclusive)) if clipped[name]),
    )


def _score(
    ablation: Ablation, contrast: Contrast, rows: Sequence[LanguageScore], resampled: Mapping[str, Mapping[str, Tensor]]
) -> AgnosticScore:
    """Builds one score from the measured perplexities.

    resampled: per defined language, importances (resamples,) by measure; empty without resamples.
    """
    values = {
        row.language: _importances(ablation, contrast, row.language) for row in rows if row.importance is not None
    }
    variants = {}
    for name in MEASURES:
        logs = [it[name].log1p() for it in resampled.values()]
        importance = {
            row.language: float(values[row.language][name]) if row.language in values else None for row in rows
        }
        intervals = {
            row.language: interval(resampled[row.language][name]) if row.language in resampled else None for row in rows
        }
        variants[name] = ScoreVariant(
            _mean(importance.values()), interval(torch.stack(logs).nanmean(0)) if logs else None, importance, intervals
        )
    own = variants.pop("perplexity")
    rows = [replace(row, interval=own.intervals[row.language]) for row in rows]
    return AgnosticScore(own.value, rows, interval=own.interval, variants=variants)


def _importances(
    ablation: Ablation, contrast: Contrast, language: str, resamples: Tensor | None = None
) -> dict[str, Tensor]:
    """By measure, the shared set's effect over that of the language's exclusive set: (resamples,), or a scalar."""
    before = _measured(ablation, NOTHING, language, resamples)
    names = contrast.names(language)
    # Clipped before the measures are applied: `MIN_CHANGE` is a change of perplexity, whatever the measure.
    changes = [(_measured(ablation, it, language, resamples) - before).clamp(min=MIN_CHANGE) for it in names]
    sizes = [ablation.num_neurons[it] for it in names]
    importances = {}
    for name, measure in MEASURES.items():
        shared, exclusive = (measure(change, before, size) for change, size in zip(changes, sizes, strict=True))
        importances[name] = shared / exclusive
    return importances


def _measured(ablation: Ablation, off: str, language: str, resamples: Tensor | None = None) -> Tensor:
    """`Ablation.perplexity` of a set that was measured."""
    value = ablation.perplexity(off, language, resamples)
    assert value is not None
    return value


def _mean(importances: Iterable[float | None]) -> float | None:
    defined = [math.log1p(it) for it in importances if it is not None]
    return sum(defined) / len(defined) if defined else None
