"""Which tokens of a batch see which: what all layers with the same attention mask derive from it."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from agnostic_train.impact import kernels
from agnostic_train.impact.row_blocks import Block, row_blocks


@dataclass(frozen=True, eq=False)
class Visibility:
    """The attention mask of a batch.

    Attributes:
        visible: (batch, 1, length, length), bool, which keys each query sees; every query sees a key.
        real: (batch, length), bool, False at padding.
    """

    visible: Tensor
    real: Tensor
    _parts: dict[tuple[int, int], "Visibility"] = field(init=False, default_factory=dict, repr=False)

    @classmethod
    def of(cls, mask: Tensor, real: Tensor) -> "Visibility":
        """Lets padding, which may see nothing, see itself. mask: (batch, 1, length, length), bool."""
        itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
        return cls(mask | (itself & ~real[:, None, :, None]), real)

    def sentences(self, part: slice) -> "Visibility":
        """The mask of the sentences in `part`, made once."""
        key = part.start, part.stop
        if key not in self._parts:
            self._parts[key] = Visibility(self.visible[part], self.real[part])
        return self._parts[key]

    @cached_property
    def padding(self) -> Tensor:
        """(batch, length), bool."""
        return ~self.real

    @cached_property
    def hidden(self) -> Tensor:
        """The keys that each query doesn't see, shaped like `visible`."""
        return ~self.visible

    @cached_property
    def blocks(self) -> list[Block]:
        """The query rows in blocks, each with the keys that its rows see; synchronises with the device."""
        return row_blocks(self.visible)

    @cached_property
    def key_spans(self) -> Tensor:
        """The keys that each of the kernels' blocks of rows sees: (batch, blocks, 2), int32."""
        return kernels.key_spans(self.visible)

    @cached_property
    def num_spanned(self) -> Tensor:
        """How many logits of a head lie in `key_spans`: (batch,), int64."""
        spans = self.key_spans.diff(dim=-1).squeeze(-1)
        # Computed for all blocks: assigning the last one's number of rows would copy it from the host and synchronise.
        starts = kernels.BLOCK_ROWS * torch.arange(spans.shape[1], device=spans.device)
        return (spans * (self.real.shape[1] - starts).clamp(max=kernels.BLOCK_ROWS)).sum(1)
