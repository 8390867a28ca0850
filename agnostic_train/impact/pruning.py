"""What all ways of pruning share: how many neurons are sought, what intervals decide, and a count of the work."""

from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor

from agnostic_train.errors import UserError

# Relative slack on proven bounds: rounding depends on which neurons are computed together.
ROUNDING_MARGIN = 1e-4


def num_top(top_ratio: float, size: int) -> int:
    """How many of a site's neurons are top in a sentence: `max(1, floor(top_ratio * size))`."""
    # The slack keeps 0.29 of 100 neurons at 29, whatever 0.29 * 100 is in binary.
    return max(1, floor(top_ratio * size * (1 + 1e-9)))


def decide(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which neurons intervals around their impacts put into their sentence's top.

    Args:
        low, high: the ends, (sentences, neurons), on any increasing scale.
        count: how many neurons the top has. If it has all, none is decided, so that all are computed.

    Returns: in the top for certain; not decided. Both (sentences, neurons), bool.
    """
    if count == low.shape[1]:
        return torch.zeros_like(low, dtype=torch.bool), torch.ones_like(low, dtype=torch.bool)
    beyond = high.topk(count + 1, 1).values[:, -1:]
    threshold = low.topk(count, 1).values[:, -1:]
    certain = low > beyond * (1 + ROUNDING_MARGIN)
    return certain, (high * (1 + ROUNDING_MARGIN) >= threshold) & ~certain


def settle(low: Tensor, high: Tensor, certain: Tensor, unclear: Tensor, exact: Tensor) -> Tensor:
    """The middle of the interval for neurons in the top for certain, exact impacts for undecided ones, zero for others.

    Where the upper end is far off, or infinite, the lower one stands for the interval: it alone decided.
    """
    middle = torch.where(high <= 2 * low, (low + high) / 2, low)
    return torch.where(certain, middle, torch.where(unclear, exact, 0))


def check_enclosed(exact: Tensor, low: Tensor, high: Tensor) -> None:
    """Compares exact impacts with the intervals around them.

    Raises:
        UserError: one lies outside.
    """
    if ((exact < low * (1 - ROUNDING_MARGIN)) | (exact > high * (1 + ROUNDING_MARGIN))).any():
        raise UserError(
            "detection.pruning: impacts lie outside the intervals that were proven for them; set it to false"
        )


@dataclass
class Work:
    """How much pruning left to compute exactly: neurons and their changed logits, out of all.

    rough_logits: changed logits that were computed in half precision, for intervals. Numbers found on a device are tensors
    there until they are read.
    """

    neurons: int | Tensor = 0
    all_neurons: int = 0
    logits: int | Tensor = 0
    all_logits: int = 0
    rough_logits: int | Tensor = 0

    def __add__(self, other: "Work") -> "Work":
        """Adds up as plain numbers."""
        return Work(*(int(mine) + int(vars(other)[name]) for name, mine in vars(self).items()))

    def add_all(self, num_neurons: int, num_logits: int, length: int) -> None:
        """Counts neurons that were all computed exactly, each by so many of a sentence's logits."""
        self.neurons += num_neurons
        self.all_neurons += num_neurons
        self.logits += num_neurons * num_logits
        self.all_logits += num_neurons * length**2
