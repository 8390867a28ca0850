"""The angles by which rotary embeddings rotate the queries and keys of a batch."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from agnostic_train.model.decoder import Rotation


@dataclass(frozen=True)
class Angles:
    """The rotation of a batch's positions.

    Attributes:
        rotation: how the family rotates a head.
        cos, sin: as the model passes them to its attention, (batch, length, rotary_dim).
        own, other: the coefficients of rotated unit vectors, see `Rotation.coefficients`, (batch, length, head_dim).
    """

    rotation: Rotation
    cos: Tensor
    sin: Tensor
    own: Tensor
    other: Tensor
    _scaled: dict[float, tuple[Tensor, Tensor]] = field(init=False, default_factory=dict, repr=False)
    _parts: dict[tuple[int, int], "Angles"] = field(init=False, default_factory=dict, repr=False)

    def scaled(self, scaling: float) -> tuple[Tensor, Tensor]:
        """`own` and `other` times `scaling`, computed once."""
        if scaling not in self._scaled:
            self._scaled[scaling] = self.own * scaling, self.other * scaling
        return self._scaled[scaling]

    @cached_property
    def unrotated(self) -> "Angles":
        """The angles of a layer that doesn't rotate: all zero."""
        return Angles(
            self.rotation,
            torch.ones_like(self.cos),
            torch.zeros_like(self.sin),
            torch.ones_like(self.own),
            torch.zeros_like(self.other),
        )

    def sentences(self, part: slice) -> "Angles":
        """The angles of the sentences in `part`, made once."""
        key = part.start, part.stop
        if key not in self._parts:
            tensors = (self.cos, self.sin, self.own, self.other)
            self._parts[key] = Angles(self.rotation, *(it[part] for it in tensors))
        return self._parts[key]
