"""Blocks of a batch's query rows: keys that only later rows see needn't be computed for earlier rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Where blocks end, in sixteenths of a sentence's length: early rows see few keys, cost least and often change most.
# The last block ends with the sentence.
_BLOCK_ENDS = (4, 6, 8, 12)
_MIN_ROWS = 8
# Torch's softmax is slow over fewer keys than fit into a vector register.
_MIN_KEYS = 16


@dataclass(frozen=True)
class Block:
    """Consecutive query rows, and the range of keys that these rows see in any sentence of the batch."""

    rows: slice
    keys: slice

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def num_keys(self) -> int:
        return self.keys.stop - self.keys.start

    @property
    def num_logits(self) -> int:
        return self.num_rows * self.num_keys


def row_blocks(visible: Tensor) -> list[Block]:
    """Splits a batch's rows into blocks. visible: (batch, 1, length, length), bool; every row sees at least one key."""
    length = visible.shape[-1]
    ends = [0]
    for sixteenths in _BLOCK_ENDS:
        end = -(-length * sixteenths // 16)
        if end - ends[-1] >= _MIN_ROWS and length - end >= _MIN_ROWS:
            ends.append(end)
    rows = [slice(start, end) for start, end in zip(ends, [*ends[1:], length], strict=True)]
    seen = visible.flatten(0, 1).any(0)
    seen = torch.stack([seen[block].any(0) for block in rows]).int()
    # One transfer: each `.tolist()` synchronises with the GPU.
    ends_of_keys = torch.stack([seen.argmax(1), length - seen.flip(1).argmax(1)], 1).tolist()
    return [
        Block(block, slice(first, min(length, max(last, first + _MIN_KEYS))))
        for block, (first, last) in zip(rows, ends_of_keys, strict=True)
    ]
