"""Tunes the learning rate of every strategy, so that comparisons are fair."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

FACTOR = 3.0
"""The ratio of neighbouring rates in the grid."""
NUM_EXTENSIONS = 2


@dataclass(frozen=True)
class Tuning:
    """The result of tuning the learning rate.

    Attributes:
        learning_rate: the best rate, or None if every training diverged.
        tried: per rate, each language's change on validation text, or None if the training diverged.
        at_end: whether the best rate is the lowest or highest of several, so that a better one may lie beyond.
    """

    learning_rate: float | None
    tried: Mapping[float, Mapping[str, float] | None]
    at_end: bool


def default_rates(learning_rate: float) -> list[float]:
    """Returns a third of a rate, the rate, and three times the rate."""
    return [learning_rate / FACTOR, learning_rate, learning_rate * FACTOR]


def num_trainings(num_strategies: int, num_rates: int, num_seeds: int) -> tuple[int, int]:
    """Returns the minimum and maximum number of trainings in a comparison if none diverges.

    The maximum applies if every grid is extended as far as allowed.
    """
    # Of two rates, the best is always at an end of the grid; a single rate is never extended.
    least = num_rates + (num_rates == 2) + num_seeds
    most = num_rates + NUM_EXTENSIONS * (num_rates > 1) + num_seeds
    return num_strategies * least, num_strategies * most


def tune(
    measure: Callable[[float], Mapping[str, float] | None],
    rates: Sequence[float],
    objective: Callable[[Mapping[str, float]], float],
) -> Tuning:
    """Finds the rate with the lowest objective.

    While the best rate is the lowest or highest of the grid, one more beyond it is tried, at most `NUM_EXTENSIONS`
    times. A single rate is not extended.

    Args:
        measure: trains at a rate and returns each language's relative change, or None if the training diverged.
        rates: the initial grid.
        objective: what to minimise, from the languages' changes.
    """
    tried = {rate: measure(rate) for rate in sorted(rates)}

    def loss(rate: float) -> float:
        changes = tried[rate]
        return math.inf if changes is None else objective(changes)

    for extension in range(NUM_EXTENSIONS + 1):
        # Ties go to the lowest rate: if all rates diverge, a still lower one may not.
        best = min(sorted(tried), key=loss)
        beyond = {max(tried): best * FACTOR, min(tried): best / FACTOR}
        at_end = len(tried) > 1 and best in beyond
        if not at_end or extension == NUM_EXTENSIONS:
            break
        tried[beyond[best]] = measure(beyond[best])
    return Tuning(None if loss(best) == math.inf else best, dict(sorted(tried.items())), at_end)
