"""Paired comparison of two checkpoints on the same items."""

from collections.abc import Sequence

import torch

from agnostic_train.scores.bootstrap import interval, resampled_sums

_NUM_RESAMPLES = 5_000
_SEED = 0


def compare_scores(first: Sequence[float], second: Sequence[float], higher_is_better: bool = True) -> dict:
    """Compares two checkpoints' scores on the same items.

    Pairing removes the variance between items that both scores share: a difference can be significant even if both
    standard errors are large. The results are not corrected for multiple comparisons.

    Args:
        first, second: one score per item, in the same order.
        higher_is_better: the direction that `num_first_better` and `num_second_better` count as better.

    Returns: plain JSON values. `difference`: mean of second minus first. `interval`: its 95% percentile bootstrap
        interval over items. `num_first_better`, `num_second_better`: number of items on which one beats the other.
        `p_value`: of the exact two-sided McNemar test (McNemar 1947); None unless every score is 0 or 1.

    Raises:
        ValueError: there are no items, or the numbers of scores differ.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"{len(first)} scores can't be paired with {len(second)}")
    changes = torch.tensor(second, dtype=torch.float64) - torch.tensor(first, dtype=torch.float64)
    gains = changes if higher_is_better else -changes
    num_first, num_second = int((gains < 0).sum()), int((gains > 0).sum())
    return {
        "difference": float(changes.mean()),
        "interval": list(interval(resampled_sums(changes.unsqueeze(1), _NUM_RESAMPLES, _SEED) / len(changes))),
        "num_first_better": num_first,
        "num_second_better": num_second,
        "p_value": mcnemar_p_value(num_first, num_second) if {*first, *second} <= {0, 1} else None,
    }


def mcnemar_p_value(num_first: int, num_second: int) -> float:
    """Two-sided exact McNemar test: the probability that a fair coin splits discordant items at least as unevenly."""
    tosses, term, tail = num_first + num_second, 1, 0
    for heads in range(min(num_first, num_second) + 1):
        tail += term
        term = term * (tosses - heads) // (heads + 1)
    # `tail` is an arbitrary-size integer: thousands of items neither overflow nor round.
    return min(1.0, 2 * tail / 2**tosses)
