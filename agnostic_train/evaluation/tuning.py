"""A learning rate for every strategy, so that none of them is a straw man."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

FACTOR = 3.0
"""Between neighbouring rates."""
NUM_EXTENSIONS = 2


@dataclass(frozen=True)
class Tuning:
    """The best rate, None where every one diverged, and what was tried.

    tried: per rate, each language's change on validation text; None where the training diverged.
    at_end: whether the best rate is still the lowest or highest of several, so that a better one may lie beyond.
    """

    learning_rate: float | None
    tried: Mapping[float, Mapping[str, float] | None]
    at_end: bool


def default_rates(learning_rate: float) -> list[float]:
    """A rate, and a third and three times of it."""
    return [learning_rate / FACTOR, learning_rate, learning_rate * FACTOR]


def num_trainings(num_strategies: int, num_rates: int, num_seeds: int) -> tuple[int, int]:
    """How many trainings a comparison takes where none diverges: at least, and at most if every grid is extended."""
    # Of two rates the best is always at an end, a single one never.
    least = num_rates + (num_rates == 2) + num_seeds
    most = num_rates + NUM_EXTENSIONS * (num_rates > 1) + num_seeds
    return num_strategies * least, num_strategies * most


def tune(
    measure: Callable[[float], Mapping[str, float] | None], rates: Sequence[float], languages: Sequence[str]
) -> Tuning:
    """Picks the rate with the lowest mean change of some languages' bits per byte.

    While the best is the lowest or highest, one more is tried beyond it, `NUM_EXTENSIONS` times at most. A single rate
    is taken as it is.

    Args:
        measure: trains at a rate, and gives each language's change; None if it diverged.
        rates: to begin with.
        languages: that count.
    """
    tried = {rate: measure(rate) for rate in sorted(rates)}

    def loss(rate: float) -> float:
        changes = tried[rate]
        return math.inf if changes is None else sum(changes[it] for it in languages) / len(languages)

    for extension in range(NUM_EXTENSIONS + 1):
        # Of rates that all diverge the lowest comes first: lower ones may do better.
        best = min(sorted(tried), key=loss)
        beyond = {max(tried): best * FACTOR, min(tried): best / FACTOR}
        at_end = len(tried) > 1 and best in beyond
        if not at_end or extension == NUM_EXTENSIONS:
            break
        tried[beyond[best]] = measure(beyond[best])
    return Tuning(None if loss(best) == math.inf else best, dict(sorted(tried.items())), at_end)
