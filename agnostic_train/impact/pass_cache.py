"""What the layers of a forward pass compute alike from the tensors that they share, computed once."""

import torch
from torch import Tensor

from agnostic_train.impact.angles import Angles
from agnostic_train.impact.visibility import Visibility
from agnostic_train.model.decoder import Layer

# Layers share few masks and angles. Layers on another device receive copies of their own, which aren't worth keeping.
_MAX_KEPT = 4


class PassCache:
    """The angles and attention masks of a forward pass."""

    def __init__(self) -> None:
        # Each tensor is kept beside what was made of it: while it lives, no other tensor can have its id.
        self._angles: dict[tuple[int, type], tuple[Tensor, Angles]] = {}
        self._visibility: dict[int, tuple[Tensor, Visibility]] = {}

    def clear(self) -> None:
        """Discards what belongs to the previous pass."""
        self._angles.clear()
        self._visibility.clear()

    def angles(self, layer: Layer, cos_sin: tuple[Tensor, Tensor], batch: int, dtype: torch.dtype) -> Angles:
        """Returns the angles in `dtype`, expanded to every sentence of the batch."""
        key = id(cos_sin[0]), type(layer.attention)
        if key not in self._angles:
            cos, sin = (angle.to(dtype).expand(batch, -1, -1) for angle in cos_sin)
            rotation = layer.rotation(cos, sin)
            self._angles[key] = cos_sin[0], Angles(rotation, cos, sin, *rotation.coefficients(cos, sin))
            _drop_oldest(self._angles)
        return self._angles[key][1]

    def visibility(self, mask: Tensor, real: Tensor) -> Visibility:
        """Returns `Visibility.of` the arguments, which are on one device; a mask always comes with the same `real`."""
        if id(mask) not in self._visibility:
            self._visibility[id(mask)] = mask, Visibility.of(mask, real)
            _drop_oldest(self._visibility)
        return self._visibility[id(mask)][1]


def _drop_oldest(made: dict) -> None:
    if len(made) > _MAX_KEPT:
        del made[next(iter(made))]
