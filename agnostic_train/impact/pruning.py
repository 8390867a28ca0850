"""What both ways of pruning share: how many neurons are sought, with which slack, and a count of the work."""

from dataclasses import dataclass
from math import floor

from torch import Tensor

# Relative slack on proven bounds: rounding depends on which neurons are computed together.
ROUNDING_MARGIN = 1e-4


def num_top(top_ratio: float, size: int) -> int:
    """How many of a site's neurons are top in a sentence: `max(1, floor(top_ratio * size))`."""
    # The slack keeps 0.29 of 100 neurons at 29, whatever 0.29 * 100 is in binary.
    return max(1, floor(top_ratio * size * (1 + 1e-9)))


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

    def add_all(self, num_neurons: int, length: int) -> None:
        """Counts neurons of sentences of one length that were all computed exactly."""
        self.neurons += num_neurons
        self.all_neurons += num_neurons
        self.logits += num_neurons * length**2
        self.all_logits += num_neurons * length**2
