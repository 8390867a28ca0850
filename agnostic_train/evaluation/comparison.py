"""Statistical comparison of strategies, paired over sentences and seeds.

The change of a language is the ratio of its bits per byte after and before training, minus one. On the same sentences,
this is the ratio of nats, minus one. It has two sources of uncertainty. Sentences: a bootstrap resamples them, with the
same draw for every strategy. Seeds: a few runs can't be resampled (three never give a value beyond the largest of the
three), so the error of their mean is drawn from Student's t distribution, scaled by the variance over runs. With few
seeds, pooling this variance over strategies gives a far better estimate, but strategies may differ in it by orders of
magnitude. Therefore an interval is the wider of two: one with the pooled variance, and one with the strategy's own
variance and its few degrees of freedom.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from agnostic_train.scores.bootstrap import interval, resampled_sums
from agnostic_train.scores.perplexity import Perplexity

LEVEL = 0.95
NUM_RESAMPLES = 10_000
_SEED = 1


def relative_change(before: Perplexity, after: Perplexity) -> float:
    """Returns the relative change of bits per byte on the same sentences; -0.1 means 10% less."""
    return after.nats / before.nats - 1


def language_groups(
    enhanced: Sequence[str], trained: Sequence[str], detected: Sequence[str], measured: Sequence[str]
) -> dict[str, list[str]]:
    """Returns the languages whose changes are averaged, by group; a group with none is left out.

    Languages that are only measured have a group of their own: a mean over languages that a model knows and languages
    that it may never have seen says little about either.

    Args:
        enhanced: the languages to improve.
        trained: all languages in the training text.
        detected: the languages whose neurons were detected, `trained` among them.
        measured: further languages that are only measured.
    """
    groups = {
        "enhanced": enhanced,
        "also_trained": [it for it in trained if it not in enhanced],
        "others": [it for it in detected if it not in trained],
        "also_measured": measured,
        "all": [*detected, *measured],
    }
    return {name: list(languages) for name, languages in groups.items() if languages}


def group_means(changes: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Returns each group's mean change over its measured languages, without groups that have none."""
    measured = {name: [changes[it] for it in members if it in changes] for name, members in groups.items()}
    return {name: sum(values) / len(values) for name, values in measured.items() if values}


def resampled_changes(
    before: Perplexity, after: Sequence[Perplexity], num_resamples: int, draw_seed: int
) -> tuple[Tensor, Tensor]:
    """Returns each run's relative change on the original sentences and on resampled sentences.

    Args:
        before, after: results on the same sentences; `after` has one per run.
        num_resamples: number of bootstrap resamples.
        draw_seed: random seed for drawing sentences; the draw is the same for every run.

    Returns: (runs,) and (resamples, runs), float64.
    """
    nats = torch.stack([it.sentence_nats.double() for it in (before, *after)], 1)  # (sentences, 1 + runs)
    total, drawn = nats.sum(0), resampled_sums(nats, num_resamples, draw_seed)
    return total[1:] / total[0] - 1, drawn[:, 1:] / drawn[:, :1] - 1


def compare_strategies(
    before: Mapping[str, Perplexity],
    after: Mapping[str, Mapping[int, Mapping[str, Perplexity]]],
    groups: Mapping[str, Sequence[str]],
    *,
    aligned: bool = False,
    num_resamples: int = NUM_RESAMPLES,
) -> dict:
    """Computes the strategies' changes with intervals, and which strategies differ beyond noise.

    Args:
        before: per language, the result of the base model.
        after: per strategy, seed and language, the result after training; the same seeds for every strategy.
        groups: the languages of each group, whose mean change is compared; those not in `before` don't count.
        aligned: whether the languages' sentences are translations of each other, in the same order; if so, they are
            drawn together.
        num_resamples: number of bootstrap resamples.

    Returns: plain JSON values.
        strategies: per strategy, for each language (the forgetting matrix) and each group (the mean over its
            languages): `mean`, `interval` (95%) and `by_seed`. With one seed, the intervals cover only the sampling of
            sentences.
        differences: for each pair of strategies and each group, the mean of the first minus that of the second, its 95%
            `interval`, and `beyond_noise`: whether zero lies outside both this interval and `simultaneous_interval`,
            which uses the pooled variance (or the pair's own, if larger) and is Bonferroni-corrected for all pairs. In
            simulations of equally good strategies, 1 to 5 in 100 comparisons report some difference, and up to 8 if the
            variances over seeds differ widely. None with one seed, which gives no information about the variance over
            seeds.
        best: per group, the strategies that no other strategy beats beyond noise.
    """
    names = list(after)
    if not names:
        return {"strategies": {}, "differences": [], "best": {}}
    seeds = list(after[names[0]])
    by_language: dict[str, _Changes] = {}
    for index, language in enumerate(before):
        runs = [after[name][seed][language] for name in names for seed in seeds]
        draw_seed = _SEED if aligned else _SEED + index * num_resamples
        changes = resampled_changes(before[language], runs, num_resamples, draw_seed)
        by_language[language] = _Changes(*(it.unflatten(-1, (len(names), len(seeds))) for it in changes))
    by_group = {
        group: _mean([by_language[it] for it in measured])
        for group, members in groups.items()
        if (measured := [it for it in members if it in before])
    }
    strategies = {
        name: {
            "languages": {language: changes.summary(index, seeds) for language, changes in by_language.items()},
            "groups": {group: changes.summary(index, seeds) for group, changes in by_group.items()},
        }
        for index, name in enumerate(names)
    }
    differences = [
        {"strategies": [names[a], names[b]], "group": group, **difference}
        for group, changes in by_group.items()
        for (a, b), difference in changes.differences().items()
    ]
    best = {group: _undominated(names, [it for it in differences if it["group"] == group]) for group in by_group}
    return {"strategies": strategies, "differences": differences, "best": best}


@dataclass(frozen=True)
class _Changes:
    """The relative changes of a language, or their mean over the languages of a group, float64.

    Attributes:
        by_seed: (strategies, seeds).
        draws: on resampled sentences, (resamples, strategies, seeds).
    """

    by_seed: Tensor
    draws: Tensor

    def summary(self, strategy: int, seeds: Sequence[int]) -> dict:
        own = self.by_seed[strategy]
        noise = _wider(_seed_noise(self.by_seed, own, len(self.draws)))
        return {
            "mean": float(own.mean()),
            "interval": interval(self.draws[:, strategy].mean(-1) + noise, LEVEL),
            "by_seed": {str(seed): value for seed, value in zip(seeds, own.tolist(), strict=True)},
        }

    def differences(self) -> dict[tuple[int, int], dict]:
        """By pair of strategies, how far the first's mean lies above the second's."""
        num_strategies, num_seeds = self.by_seed.shape
        if num_strategies == 1:
            return {}
        pairs, drawn = list(combinations(range(num_strategies), 2)), self.draws.mean(-1)
        gaps = torch.stack([self.by_seed[a] - self.by_seed[b] for a, b in pairs])
        differences = {}
        for gap, (a, b) in zip(gaps, pairs, strict=True):
            # The pairs' differences have only (strategies - 1) * (seeds - 1) independent degrees of freedom in total.
            noises = _seed_noise(gaps, gap, len(drawn), num_independent=num_strategies - 1)
            difference = drawn[:, a] - drawn[:, b]
            alone = interval(difference + _wider(noises), LEVEL)
            among_all = interval(difference + noises[0], 1 - (1 - LEVEL) / len(pairs))
            differences[a, b] = {
                "mean": float(gap.mean()),
                "interval": alone,
                "simultaneous_interval": among_all,
                "beyond_noise": None if num_seeds == 1 else all(not it[0] <= 0 <= it[1] for it in (alone, among_all)),
            }
        return differences


def _mean(changes: Sequence[_Changes]) -> _Changes:
    by_seed, draws = [it.by_seed for it in changes], [it.draws for it in changes]
    return _Changes(torch.stack(by_seed).mean(0), torch.stack(draws).mean(0))


def _seed_noise(pool: Tensor, own: Tensor, count: int, num_independent: int | None = None) -> tuple[Tensor, Tensor]:
    """Draws the error of a mean over seeds: with the pooled variance (or its own, if larger), and with its own.

    Args:
        pool: (series, seeds), the series whose variances are pooled.
        own: (seeds,), the series whose mean is considered.
        count: number of draws.
        num_independent: number of independent series in `pool`; all by default.

    Returns: two tensors (count,), float64; zeros with one seed.
    """
    num_seeds = own.shape[-1]
    if num_seeds == 1:
        nothing = torch.zeros(count, dtype=torch.float64)
        return nothing, nothing
    variance = float(own.var())
    pooled = max(float(pool.var(-1).mean()), variance)
    degrees = (num_independent or len(pool)) * (num_seeds - 1)
    return (
        _student(degrees, count) * math.sqrt(pooled / num_seeds),
        _student(num_seeds - 1, count) * math.sqrt(variance / num_seeds),
    )


def _student(degrees: int, count: int) -> Tensor:
    """Returns draws from Student's t distribution, (count,), float64."""
    generator = torch.Generator().manual_seed(_SEED)
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    squares = torch.randn(count, degrees, generator=generator, dtype=torch.float64).square().mean(1)
    return normal / squares.sqrt()


def _wider(noises: Sequence[Tensor]) -> Tensor:
    """Returns the draws whose interval is the widest."""

    def width(noise: Tensor) -> float:
        low, high = interval(noise, LEVEL)
        return high - low

    return max(noises, key=width)


def _undominated(names: Sequence[str], differences: Sequence[dict]) -> list[str]:
    """Returns the names that no other strategy beats beyond noise; lower is better."""
    worse = set()
    for it in differences:
        if it["beyond_noise"]:
            first, second = it["strategies"]
            worse.add(second if it["mean"] < 0 else first)
    return [name for name in names if name not in worse]
