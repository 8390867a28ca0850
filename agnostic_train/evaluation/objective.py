"""What sweeps and comparisons select by: gain in the enhanced languages, weighed against forgetting in the others."""

from collections.abc import Collection, Mapping

_WEIGHT = 10


def largest_forgetting(changes: Mapping[str, float], enhanced: Collection[str]) -> float:
    """Returns the largest relative rise of bits per byte among languages that aren't enhanced; 0 if none rose."""
    return max([0.0, *(change for language, change in changes.items() if language not in enhanced)])


def objective(target: float, forgetting: float, max_forgetting: float) -> float:
    """Returns `target * (1 + 10 * excess)`, to be minimised, where `forgetting` exceeds `max_forgetting` by `excess`.

    One more point of forgetting must gain ten points in the target.

    Args:
        target: bits per byte of the enhanced languages, absolute or relative to those before training.
    """
    return target * (1 + _WEIGHT * max(0.0, forgetting - max_forgetting))
