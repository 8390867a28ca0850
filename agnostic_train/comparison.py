"""Which strategy is better, and is the difference more than noise? Paired over sentences and seeds.

The change of a language is its bits per byte after training over those before, minus one; on the same sentences that
is the ratio of nats. Noise is what resampling shows: of sentences (the same draw for every strategy) and of seeds.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from agnostic_train.bootstrap import interval, resample_counts
from agnostic_train.perplexity import Perplexity

LEVEL = 0.95
NUM_RESAMPLES = 5000
_AT_ONCE = 500


def relative_change(before: Perplexity, after: Perplexity) -> float:
    """How bits per byte changed on the same sentences; -0.1 is 10% less."""
    return after.nats / before.nats - 1


def resampled_changes(
    before: Perplexity, after: Sequence[Perplexity], seed_counts: Tensor, draw_seed: int
) -> tuple[Tensor, Tensor]:
    """The change on the text itself, and on resampled text by resampled runs.

    Args:
        before, after: on the same sentences; `after` has one result a run.
        seed_counts: how often each run counts, (resamples, runs), float64.
        draw_seed: of the draw of sentences.

    Returns: (runs,) and (resamples,), float64.
    """
    base = before.sentence_nats.double()
    runs = torch.stack([it.sentence_nats.double() for it in after], 1)  # (sentences, runs)
    weights = seed_counts / seed_counts.sum(1, keepdim=True)
    drawn = []
    # A resample counts every sentence: for a thousand of them all at once would take gigabytes.
    for start in range(0, len(weights), _AT_ONCE):
        part = weights[start : start + _AT_ONCE]
        counts = resample_counts(len(base), len(part), draw_seed + start)
        drawn.append((counts @ runs / (counts @ base).unsqueeze(1) * part).sum(1) - 1)
    return runs.sum(0) / base.sum() - 1, torch.cat(drawn)


def compare_strategies(
    before: Mapping[str, Perplexity],
    after: Mapping[str, Mapping[int, Mapping[str, Perplexity]]],
    enhanced: Sequence[str],
    num_resamples: int = NUM_RESAMPLES,
) -> dict:
    """Changes with their intervals, and which strategies differ beyond noise.

    Args:
        before: per language, of the base model.
        after: per strategy and seed, per language; the same seeds for every strategy.
        enhanced: the languages that were trained; the others are what may be forgotten.

    Returns plain JSON values:
        strategies: per strategy, per language (the forgetting matrix) and per group (`enhanced`, `others`, `all`: the
            mean over its languages) `mean`, `interval` (95%) and `by_seed`.
        differences: for each pair of strategies and group, the first's mean minus the second's, its 95% `interval`,
            and `beyond_noise`: whether an interval that holds for all pairs at once (Bonferroni) leaves out zero.
        best: per group, the strategies that no other one is beyond noise better than.
    """
    languages = list(before)
    others = [language for language in languages if language not in enhanced]
    groups = {"enhanced": [it for it in languages if it in enhanced], "others": others, "all": languages}
    groups = {name: members for name, members in groups.items() if members}
    points: dict[str, dict[str, Tensor]] = {}
    draws: dict[str, dict[str, Tensor]] = {}
    strategies = {}
    for name, by_seed in after.items():
        # The same draw for every strategy: seeds are paired too, by the order of the text that they give.
        seed_counts = resample_counts(len(by_seed), num_resamples, seed=0)
        points[name], draws[name] = {}, {}
        for index, language in enumerate(languages):
            points[name][language], draws[name][language] = resampled_changes(
                before[language],
                [of_seed[language] for of_seed in by_seed.values()],
                seed_counts,
                1 + index * num_resamples,
            )
        for values in (points[name], draws[name]):
            group_means = {
                group: torch.stack([values[it] for it in members]).mean(0) for group, members in groups.items()
            }
            values.update({f"group {group}": mean for group, mean in group_means.items()})

        def summary(key: str, name: str = name, by_seed: Mapping = by_seed) -> dict:
            runs = points[name][key].tolist()
            return {
                "mean": sum(runs) / len(runs),
                "interval": interval(draws[name][key], LEVEL),
                "by_seed": {str(seed): value for seed, value in zip(by_seed, runs, strict=True)},
            }

        strategies[name] = {
            "languages": {language: summary(language) for language in languages},
            "groups": {group: summary(f"group {group}") for group in groups},
        }
    pairs = list(combinations(after, 2))
    differences = []
    for group in groups:
        for first, second in pairs:
            drawn = draws[first][f"group {group}"] - draws[second][f"group {group}"]
            low, high = interval(drawn, 1 - (1 - LEVEL) / len(pairs))
            differences.append(
                {
                    "strategies": [first, second],
                    "group": group,
                    "mean": strategies[first]["groups"][group]["mean"] - strategies[second]["groups"][group]["mean"],
                    "interval": interval(drawn, LEVEL),
                    "beyond_noise": not low <= 0 <= high,
                }
            )
    return {
        "strategies": strategies,
        "differences": differences,
        "best": {
            group: _undominated(list(after), [it for it in differences if it["group"] == group]) for group in groups
        },
    }


def _undominated(names: Sequence[str], differences: Sequence[dict]) -> list[str]:
    """Those that no other one beats: less is better."""
    worse = set()
    for it in differences:
        if it["beyond_noise"]:
            first, second = it["strategies"]
            worse.add(second if it["mean"] < 0 else first)
    return [name for name in names if name not in worse]
