"""What all ways of pruning share: how many neurons are sought, what intervals decide, and counts of the work."""

import operator
from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor

from agnostic_train.errors import UserError

# Relative slack on proven bounds, because rounding depends on which neurons are computed together.
ROUNDING_MARGIN = 1e-4


def num_top(top_ratio: float, size: int) -> int:
    """Number of a site's neurons that are top in a sentence: `max(1, floor(top_ratio * size))`."""
    # The slack makes 0.29 of 100 neurons 29, although 0.29 * 100 is less in floating point.
    return max(1, floor(top_ratio * size * (1 + 1e-9)))


def decide(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Decides by intervals around the neurons' impacts which are in their sentence's top.

    Args:
        low, high: the ends, (sentences, neurons), on any increasing scale.
        count: the number of neurons in the top. If it is all of them, every neuron is undecided, so that all are
            computed.

    Returns: whether a neuron is certainly in the top, and whether it is undecided; both (sentences, neurons), bool.
    """
    if count == low.shape[1]:
        return torch.zeros_like(low, dtype=torch.bool), torch.ones_like(low, dtype=torch.bool)
    beyond = high.topk(count + 1, 1).values[:, -1:]
    threshold = low.topk(count, 1).values[:, -1:]
    certain = low > beyond * (1 + ROUNDING_MARGIN)
    # Of two bools, `a > b` is `a and not b` in one operation.
    return certain, (high >= threshold * (1 - ROUNDING_MARGIN)) > certain


def settle(low: Tensor, high: Tensor, certain: Tensor, exact: Tensor) -> Tensor:
    """The middle of the interval for certain neurons, the exact impact for the others.

    The lower end replaces the middle if the upper end is far off or infinite: the lower end alone decided.

    exact: zero for neurons that are neither certain nor undecided.
    """
    middle = torch.where(high <= 2 * low, low.lerp(high, 0.5), low)
    return torch.where(certain, middle, exact)


def check_enclosed(exact: Tensor, low: Tensor, high: Tensor) -> None:
    """Checks that exact impacts lie in the intervals around them.

    Raises:
        UserError: one lies outside.
    """
    if ((exact < low * (1 - ROUNDING_MARGIN)) | (exact > high * (1 + ROUNDING_MARGIN))).any():
        raise UserError("detection.pruning: impacts lie outside the intervals proven for them; set it to false")


@dataclass(frozen=True)
class Work:
    """How much pruning left to compute exactly: neurons and their changed logits, out of all.

    Counts made on a device stay tensors there until `read`.

    Attributes:
        rough_logits: changed logits that were computed in half precision, for intervals.
    """

    neurons: int | Tensor = 0
    all_neurons: int = 0
    logits: int | Tensor = 0
    all_logits: int = 0
    rough_logits: int | Tensor = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(operator.add, vars(self).values(), vars(other).values()))

    def read(self) -> "Work":
        """Returns the counts as plain integers, which waits for the device."""
        return Work(*map(int, vars(self).values()))
