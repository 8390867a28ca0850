"""The angles by which rotary embeddings turn the queries and keys of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from agnostic_train.model.decoder import Layer, Rotation


@dataclass(frozen=True)
class Angles:
    """How the positions of a batch are rotated.

    rotation: of the layers. cos, sin: as the model passes them to its attention, (batch, length, rotary_dim). own, other:
    what the rotation makes of unit vectors, see `Rotation.coefficients`, (batch, length, head_dim).
    """

    rotation: Rotation
    cos: Tensor
    sin: Tensor
    own: Tensor
    other: Tensor

    def sentences(self, part: slice) -> "Angles":
        """The same for some sentences of the batch."""
        return Angles(self.rotation, self.cos[part], self.sin[part], self.own[part], self.other[part])


class SharedAngles:
    """The angles of a pass, computed once for all layers of a kind that are given the same tensors."""

    def __init__(self) -> None:
        # The tensor is kept with its angles: as long as it lives, no other has its id.
        self._by_tensor: dict[tuple[int, type], tuple[Tensor, Angles]] = {}

    def clear(self) -> None:
        """Forgets the last pass."""
        self._by_tensor.clear()

    def get(self, layer: Layer, cos_sin: tuple[Tensor, Tensor], batch: int, dtype: torch.dtype) -> Angles:
        """Angles in a dtype, for every sentence of the batch."""
        key = id(cos_sin[0]), type(layer.attention)
        if key not in self._by_tensor:
            cos, sin = (angle.to(dtype).expand(batch, -1, -1) for angle in cos_sin)
            rotation = layer.rotation(cos, sin)
            self._by_tensor[key] = cos_sin[0], Angles(rotation, cos, sin, *rotation.coefficients(cos, sin))
        return self._by_tensor[key][1]
