"""Which strategy is better, and is the difference more than noise? Paired over sentences and seeds.

The change of a language is its bits per byte after training over those before, minus one; on the same sentences that
is the ratio of nats. Two things make it uncertain. Other sentences: the bootstrap resamples them, the same draw for
every strategy. Other seeds: a few runs can't be resampled (three give no value beyond the largest of the three), so
their mean gets the error that Student's t distribution says, from the runs' variance. Few seeds estimate it far better
when it is pooled over strategies, but strategies may differ in it by orders of magnitude. So an interval is the wider of
two: by the pooled variance, and by a strategy's own with the few degrees of freedom that it has.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from agnostic_train.scores.bootstrap import interval, resample_counts
from agnostic_train.scores.perplexity import Perplexity

LEVEL = 0.95
NUM_RESAMPLES = 10_000
_AT_ONCE = 500
_SEED = 1


def relative_change(before: Perplexity, after: Perplexity) -> float:
    """How bits per byte changed on the same sentences; -0.1 is 10% less."""
    return after.nats / before.nats - 1


def resampled_changes(
    before: Perplexity, after: Sequence[Perplexity], num_resamples: int, draw_seed: int
) -> tuple[Tensor, Tensor]:
    """Each run's change on the text itself, and on resampled sentences.

    Args:
        before, after: on the same sentences; `after` has one result a run.
        draw_seed: of the draw of sentences; the same draw for every run.

    Returns: (runs,) and (resamples, runs), float64.
    """
    base = before.sentence_nats.double()
    runs = torch.stack([it.sentence_nats.double() for it in after], 1)  # (sentences, runs)
    drawn = []
    # A resample counts every sentence: for a thousand of them all at once would take gigabytes.
    for start in range(0, num_resamples, _AT_ONCE):
        counts = resample_counts(len(base), min(_AT_ONCE, num_resamples - start), draw_seed + start)
        drawn.append(counts @ runs / (counts @ base).unsqueeze(1) - 1)
    return runs.sum(0) / base.sum() - 1, torch.cat(drawn)


def compare_strategies(
    before: Mapping[str, Perplexity],
    after: Mapping[str, Mapping[int, Mapping[str, Perplexity]]],
    enhanced: Sequence[str],
    *,
    aligned: bool = False,
    num_resamples: int = NUM_RESAMPLES,
) -> dict:
    """Changes with their intervals, and which strategies differ beyond noise.

    Args:
        before: per language, of the base model.
        after: per strategy and seed, per language; the same seeds for every strategy.
        enhanced: the languages that were trained; the others are what may be forgotten.
        aligned: the languages' sentences are translations of each other, in the same order: drawn together.

    Returns plain JSON values:
        strategies: per strategy, per language (the forgetting matrix) and per group (`enhanced`, `others`, `all`: the
            mean over its languages) `mean`, `interval` (95%) and `by_seed`. With one seed the intervals know of
            sentences alone.
        differences: for each pair of strategies and group, the first's mean minus the second's, its 95% `interval`,
            and `beyond_noise`: whether that leaves out zero, and so does one of the pooled variance that holds for all
            pairs at once (Bonferroni). Of strategies that are all alike 1 to 5 in 100 comparisons find some difference so,
            and up to 8 if they differ widely in their spread over seeds (simulated). None with one seed, which says
            nothing of how another training would come out.
        best: per group, the strategies that no other one is beyond noise better than.
    """
    names, languages = list(after), list(before)
    if not names:
        return {"strategies": {}, "differences": [], "best": {}}
    seeds = list(after[names[0]])
    others = [language for language in languages if language not in enhanced]
    groups = {"enhanced": [it for it in languages if it in enhanced], "others": others, "all": languages}
    groups = {name: members for name, members in groups.items() if members}
    # By language and group: (strategies, seeds), and (resamples, strategies, seeds).
    points: dict[str, Tensor] = {}
    draws: dict[str, Tensor] = {}
    for index, language in enumerate(languages):
        runs = [after[name][seed][language] for name in names for seed in seeds]
        draw_seed = _SEED if aligned else _SEED + index * num_resamples
        point, drawn = resampled_changes(before[language], runs, num_resamples, draw_seed)
        points[language], draws[language] = (it.unflatten(-1, (len(names), len(seeds))) for it in (point, drawn))
    of_group = {name: f"group {name}" for name in groups}
    for group, members in groups.items():
        for values in (points, draws):
            values[of_group[group]] = torch.stack([values[it] for it in members]).mean(0)

    def summary(key: str, index: int) -> dict:
        by_seed = points[key]
        noise = _wider(_seed_noise(by_seed, by_seed[index], num_resamples))
        return {
            "mean": float(by_seed[index].mean()),
            "interval": interval(draws[key][:, index].mean(-1) + noise, LEVEL),
            "by_seed": {str(seed): value for seed, value in zip(seeds, by_seed[index].tolist(), strict=True)},
        }

    strategies = {
        name: {
            "languages": {language: summary(language, index) for language in languages},
            "groups": {group: summary(of_group[group], index) for group in groups},
        }
        for index, name in enumerate(names)
    }
    differences = []
    pairs = list(combinations(range(len(names)), 2))
    for group in groups:
        by_seed, drawn = points[of_group[group]], draws[of_group[group]].mean(-1)
        gaps = torch.stack([by_seed[a] - by_seed[b] for a, b in pairs]) if pairs else by_seed[:0]
        for gap, (a, b) in zip(gaps, pairs, strict=True):
            # Of all strategies together there are (strategies - 1) * (seeds - 1) independent differences.
            noises = _seed_noise(gaps, gap, num_resamples, num_independent=len(names) - 1)
            difference = drawn[:, a] - drawn[:, b]
            alone = interval(difference + _wider(noises), LEVEL)
            among_all = interval(difference + noises[0], 1 - (1 - LEVEL) / len(pairs))
            differences.append(
                {
                    "strategies": [names[a], names[b]],
                    "group": group,
                    "mean": float(gap.mean()),
                    "interval": alone,
                    "beyond_noise": None
                    if len(seeds) == 1
                    else all(not it[0] <= 0 <= it[1] for it in (alone, among_all)),
                }
            )
    best = {group: _undominated(names, [it for it in differences if it["group"] == group]) for group in groups}
    return {"strategies": strategies, "differences": differences, "best": best}


def _seed_noise(pool: Tensor, own: Tensor, count: int, num_independent: int | None = None) -> tuple[Tensor, Tensor]:
    """Draws of the error of a mean over seeds, (count,) each: by the pooled variance, or its own if larger, and by its own.

    Args:
        pool: (series, seeds), whose variances are pooled. own: (seeds,).
        num_independent: how many of the series are independent; all by default.
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
    """Draws from Student's t distribution, (count,), float64."""
    generator = torch.Generator().manual_seed(_SEED)
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    squares = torch.randn(count, degrees, generator=generator, dtype=torch.float64).square().mean(1)
    return normal / squares.sqrt()


def _wider(noises: Sequence[Tensor]) -> Tensor:
    def width(noise: Tensor) -> float:
        low, high = interval(noise, LEVEL)
        return high - low

    return max(noises, key=width)


def _undominated(names: Sequence[str], differences: Sequence[dict]) -> list[str]:
    """Those that no other one beats: less is better."""
    worse = set()
    for it in differences:
        if it["beyond_noise"]:
            first, second = it["strategies"]
            worse.add(second if it["mean"] < 0 else first)
    return [name for name in names if name not in worse]
