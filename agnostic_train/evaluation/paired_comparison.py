"""Whether one checkpoint does better than another, judged on the items that both have seen."""

from collections.abc import Sequence

import torch

from agnostic_train.scores.bootstrap import interval

_NUM_RESAMPLES = 2000
_SEED = 0


def compare_scores(first: Sequence[float], second: Sequence[float], higher_is_better: bool = True) -> dict:
    """Compares two checkpoints' scores of the same items.

    Pairing removes what the items have in common: a difference can be sure where both standard errors are large.
    Nothing is corrected for the number of comparisons that someone makes.

    Args:
        first, second: a score for each item, in the same order.
        higher_is_better: which direction `num_first_better` and `num_second_better` count as better.

    Returns: plain JSON values. `difference`: mean of second minus first. `interval`: its 95% percentile bootstrap
        interval over items. `num_first_better`, `num_second_better`: items on which one beats the other. `p_value`: of
        the exact two-sided McNemar test (McNemar 1947), None unless every score is 0 or 1.

    Raises:
        ValueError: no items, or not the same number of them.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"{len(first)} scores can't be paired with {len(second)}")
    changes = torch.tensor(second, dtype=torch.float64) - torch.tensor(first, dtype=torch.float64)
    gains = changes if higher_is_better else -changes
    num_first, num_second = int((gains < 0).sum()), int((gains > 0).sum())
    return {
        "difference": float(changes.mean()),
        "interval": _interval_of_mean(changes),
        "num_first_better": num_first,
        "num_second_better": num_second,
        "p_value": mcnemar_p_value(num_first, num_second) if {*first, *second} <= {0, 1} else None,
    }


def mcnemar_p_value(num_first: int, num_second: int) -> float:
    """Two-sided exact McNemar test: how likely a fair coin splits the discordant items at least so unevenly."""
    tosses, term, tail = num_first + num_second, 1, 0
    for heads in range(min(num_first, num_second) + 1):
        tail += term
        term = term * (tosses - heads) // (heads + 1)
    # Integers of any size, so that thousands of items neither overflow nor round.
    return min(1.0, 2 * tail / 2**tosses)


def _interval_of_mean(values: torch.Tensor) -> list[float]:
    generator = torch.Generator().manual_seed(_SEED)
    # One resample at a time: all of them together would be gigabytes for a task of 100k items.
    means = torch.stack(
        [values[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(_NUM_RESAMPLES)]
    )
    return list(interval(means))
