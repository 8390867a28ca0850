"""What sweeps, comparisons and pilots select by: gain in the enhanced languages, weighed against forgetting in others.

Changes are relative changes of bits per byte on validation text, by language.
"""

from collections.abc import Collection, Mapping
from statistics import fmean

_WEIGHT = 10


def target_change(changes: Mapping[str, float], enhanced: Collection[str]) -> float:
    """Returns the mean change of the enhanced languages."""
    return fmean(changes[it] for it in enhanced)


def largest_forgetting(changes: Mapping[str, float], enhanced: Collection[str]) -> float:
    """Returns the largest rise among languages that aren't enhanced; 0 if none rose."""
    return max([0.0, *(change for language, change in changes.items() if language not in enhanced)])


def objective(target: float, forgetting: float, max_forgetting: float) -> float:
    """Returns `target * (1 + 10 * excess)`, to be minimised, where `forgetting` exceeds `max_forgetting` by `excess`.

    One more point of forgetting must gain ten points in the target.

    Args:
        target: bits per byte of the enhanced languages, absolute or relative to those before training.
    """
    return target * (1 + _WEIGHT * max(0.0, forgetting - max_forgetting))


def relative_objective(changes: Mapping[str, float], enhanced: Collection[str], max_forgetting: float) -> float:
    """Returns the `objective` of changes, as a multiple of the enhanced languages' bits per byte before training."""
    return objective(1 + target_change(changes, enhanced), largest_forgetting(changes, enhanced), max_forgetting)
