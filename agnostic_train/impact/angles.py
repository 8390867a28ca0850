"""The angles by which rotary embeddings rotate the queries and keys of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from agnostic_train.model.decoder import Layer, Rotation


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

    def sentences(self, part: slice) -> "Angles":
        """The angles of the sentences in `part`."""
        return Angles(self.rotation, self.cos[part], self.sin[part], self.own[part], self.other[part])


class SharedAngles:
    """The angles of a forward pass, computed once for all layers of a kind that receive the same tensors."""

    def __init__(self) -> None:
        # The tensor is kept beside its angles: while it lives, no other tensor can have its id.
        self._by_tensor: dict[tuple[int, type], tuple[Tensor, Angles]] = {}

    def clear(self) -> None:
        """Discards the angles of the previous pass."""
        self._by_tensor.clear()

    def get(self, layer: Layer, cos_sin: tuple[Tensor, Tensor], batch: int, dtype: torch.dtype) -> Angles:
        """Returns the angles in `dtype`, expanded to every sentence of the batch."""
        key = id(cos_sin[0]), type(layer.attention)
        if key not in self._by_tensor:
            cos, sin = (angle.to(dtype).expand(batch, -1, -1) for angle in cos_sin)
            rotation = layer.rotation(cos, sin)
            self._by_tensor[key] = cos_sin[0], Angles(rotation, cos, sin, *rotation.coefficients(cos, sin))
        return self._by_tensor[key][1]
