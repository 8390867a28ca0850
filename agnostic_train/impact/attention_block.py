"""Attention in a block of rows, and how far changed attention moves its output, in plain torch.

A softmax passes over its logits four times. Where the changed logits stay near the old ones, powers of two do with less:
the logits come in bits below the largest unchanged one of their row, and the sum of the powers is divided out after the
product with the values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import e, log2
from typing import Any

import torch
from torch import Tensor

from agnostic_train.impact.attention import LogitChange

# Twice as many, for squares of what powers add up to, are far from float32's ends on both sides.
_MOST_BITS = 40.0


def bits_moved(change: LogitChange, largest_logits: Tensor) -> Tensor:
    """How far each neuron moves a logit, at most, in bits; 0 for one that changes nothing: (batch, query heads, head_dim).

    largest_logits: (batch, query heads), at least the largest absolute value.
    """
    reach = change.reach
    for growth in (change.row_growth, change.column_growth):
        if growth is not None:
            reach = reach + (growth.amax(-2) - 1) * largest_logits.unsqueeze(-1)
    return reach * log2(e)


@dataclass(frozen=True)
class AttentionBlock:
    """The attention of some heads in a block of rows, as changed attention is compared with it.

    logits: to be changed, in units of `1 / scale`, (heads, rows, keys), -inf at unseen keys.
    shift: what is added to logits after they have grown, (heads, rows, 1); None where nothing grows.
    attention: unchanged, (heads, rows, keys). Of a softmax, or powers of two.
    total: sums of these powers, (heads, rows); None for a softmax.
    value: (heads, keys, head_dim). weight: (heads, rows), 1 at counted rows.
    """

    scale: float
    logits: Tensor
    shift: Tensor | None
    attention: Tensor
    total: Tensor | None
    value: Tensor
    weight: Tensor

    def of_heads(self, heads: Tensor | slice) -> "AttentionBlock":
        """The same for some heads, or for heads as often as they are named."""

        def chosen(part: Tensor | None) -> Any:
            if part is None:
                return None
            return part[heads] if isinstance(heads, slice) else part.index_select(0, heads)

        parts = ("logits", "shift", "attention", "total", "value", "weight")
        return replace(self, **{name: chosen(getattr(self, name)) for name in parts})

    def changed(self, factors: Sequence[Tensor], growths: Sequence[Tensor]) -> Tensor:
        """The logits that each neuron's deactivation leaves: (heads, neurons, rows, keys).

        factors: a, b, c and d of a `LogitChange`, (heads, neurons, rows, 1) or (heads, neurons, 1, keys). growths: those
        of r and s that aren't 1, likewise.
        """
        a, b, c, d = factors
        changed = self.logits.unsqueeze(1)
        if self.shift is not None:
            *others, last = growths
            for growth in others:
                changed = changed * growth
            changed = torch.addcmul(self.shift.unsqueeze(1), changed, last)
        return torch.addcmul(changed, a, b, value=-self.scale).addcmul_(c, d, value=-self.scale)

    def squares(self, changed: Tensor) -> Tensor:
        """By how much changed logits move the output, squared and summed over features and counted rows: (heads, neurons).

        changed: (heads, neurons, rows, keys), overwritten.
        """
        if self.total is None:
            weights = changed.softmax(-1).sub_(self.attention.unsqueeze(1))
        else:
            weights = changed.exp2_()
            total = weights.sum(-1)
            # Of a row that nothing changes exactly one: then there is no difference.
            growth = total / self.total.unsqueeze(1)
            weights.addcmul_(growth.unsqueeze(-1), self.attention.unsqueeze(1), value=-1)
        # One product a head is faster than one a neuron.
        moved = torch.linalg.vector_norm(weights.flatten(1, 2) @ self.value, dim=-1).view(weights.shape[:3])
        if self.total is not None:
            moved.div_(total)
        return moved.square_().mul_(self.weight.unsqueeze(1)).sum(-1)


class BlockForms:
    """A block's attention in both forms, each made when it is first asked for.

    Args:
        logits: what a neuron changes, (heads, rows, keys).
        seen: what the softmax sees of them, the same where nothing bends them.
        peaks: the largest logits, (heads, rows, 1).
        value, weight: as for `AttentionBlock`.
        grows: whether logits are multiplied before they are shifted.
    """

    def __init__(self, logits: Tensor, seen: Tensor, peaks: Tensor, value: Tensor, weight: Tensor, grows: bool = False):
        self._logits, self._seen, self._peaks, self._grows = logits, seen, peaks, grows
        self._value, self._weight = value, weight

    def of(self, bits: Tensor) -> AttentionBlock:
        """The form for neurons that move the logits so far, of any shape; powers for none that isn't finite."""
        return self.powers if bool((bits <= _MOST_BITS).all()) else self.softmax

    @cached_property
    def softmax(self) -> AttentionBlock:
        # Summed over a block's keys as a changed one is: a neuron that changes no logit has an impact of exactly zero.
        attention = self._seen.softmax(-1)
        shift = torch.zeros_like(attention[..., :1]) if self._grows else None
        return AttentionBlock(1.0, self._logits, shift, attention, None, self._value, self._weight)

    @cached_property
    def powers(self) -> AttentionBlock:
        logits = self._logits * log2(e)
        shift = -log2(e) * self._peaks
        shifted = logits + shift
        attention = shifted.exp2()
        start, shift = (logits, shift) if self._grows else (shifted, None)
        return AttentionBlock(log2(e), start, shift, attention, attention.sum(-1), self._value, self._weight)
