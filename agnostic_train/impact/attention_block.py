"""Attention in a block of rows, and how far changed attention moves its output, in plain torch.

A softmax passes over its logits four times. Where a neuron moves them little, powers of two do with less: the logits come in
bits below the largest unchanged one of their row, and the sum of the powers is divided out after the product with the
values. Where a neuron moves them far, a softmax is taken of the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import e, log, log2
from typing import Any

import torch
from torch import Tensor

from agnostic_train.impact.attention import LogitChange

# Squares of powers up to twice as high, or low, are far from float32's ends, as values are scaled to a largest norm of 1.
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

    logits: to be changed, (heads, rows, keys), -inf at unseen keys; natural ones times `scale`.
    shift: what is added to logits after they have grown, (heads, rows, 1); None where nothing grows.
    attention: unchanged, (heads, rows, keys): a softmax, or powers of two.
    total: sums of these powers, (heads, rows); None for a softmax.
    value: (heads, keys, head_dim). weight: (heads, rows), 1 at counted rows.
    value_scale: what squared outputs of these values are multiplied with, (heads, 1).
    """

    scale: float
    logits: Tensor
    shift: Tensor | None
    attention: Tensor
    total: Tensor | None
    value: Tensor
    weight: Tensor
    value_scale: Tensor

    def of_heads(self, heads: Tensor | slice) -> "AttentionBlock":
        """The same for some heads, or for heads as often as they are named."""

        def chosen(part: Tensor | None) -> Any:
            if part is None:
                return None
            return part[heads] if isinstance(heads, slice) else part.index_select(0, heads)

        parts = ("logits", "shift", "attention", "total", "value", "weight", "value_scale")
        return replace(self, **{name: chosen(getattr(self, name)) for name in parts})

    def changed(self, factors: Sequence[Tensor], growths: Sequence[Tensor]) -> Tensor:
        """The logits that each neuron's deactivation leaves, times `scale`: (heads, neurons, rows, keys).

        factors: a, b, c and d of a `LogitChange`, (heads, neurons, rows, 1) or (heads, neurons, 1, keys). growths: those
        of r and s that aren't 1, likewise.
        """
        a, b, c, d = factors
        changed = self.logits.unsqueeze(1)
        if self.shift is None:
            for growth in growths:
                changed = changed * growth
        else:
            *others, last = growths
            for growth in others:
                changed = changed * growth
            changed = torch.addcmul(self.shift.unsqueeze(1), changed, last)
        return torch.addcmul(changed, a, b, value=-self.scale).addcmul_(c, d, value=-self.scale)

    def squares(self, changed: Tensor) -> Tensor:
        """By how much changed logits move the output, squared and summed over features and counted rows: (heads, neurons).

        changed: logits times `scale`, (heads, neurons, rows, keys), overwritten.
        """
        if self.total is None:
            weights = changed.mul_(1 / self.scale) if self.scale != 1 else changed
            weights = weights.softmax(-1).sub_(self.attention.unsqueeze(1))
        else:
            weights = changed.exp2_()
            total = weights.sum(-1)
            # Of a row that nothing changes 1, to a rounding of powers that differs at a tensor's end: no difference is left.
            ratio = total / self.total.unsqueeze(1)
            weights.addcmul_(ratio.unsqueeze(-1), self.attention.unsqueeze(1), value=-1)
        # One product a head is faster than one a neuron.
        moved = torch.linalg.vector_norm(weights.flatten(1, 2) @ self.value, dim=-1).view(weights.shape[:3])
        if self.total is not None:
            moved.div_(total)
        return moved.square_().mul_(self.weight.unsqueeze(1)).sum(-1).mul_(self.value_scale)


def plain_block(logits: Tensor, value: Tensor, weight: Tensor, start: Tensor | None = None) -> AttentionBlock:
    """Natural logits, for any change of them, through a softmax.

    logits: as the softmax sees them, (heads, rows, keys). start: what a neuron changes, if not these logits themselves.
    """
    # Summed over a block's keys as a changed one is: a neuron that changes no logit has an impact of exactly zero.
    attention = logits.softmax(-1)
    start = logits if start is None else start
    return AttentionBlock(1.0, start, None, attention, None, value, weight, torch.ones_like(weight[:, :1]))


class BlockForms:
    """A block's attention in bits, as powers of two and as a softmax, each made when it is first asked for.

    Args:
        logits: (heads, rows, keys), natural.
        peaks: the largest, (heads, rows, 1).
        value: (heads, keys, head_dim). weight: (heads, rows), 1 at counted rows.
        grows: whether logits are multiplied before they are shifted.
    """

    def __init__(self, logits: Tensor, peaks: Tensor, value: Tensor, weight: Tensor, grows: bool = False):
        bits, shift = logits * log2(e), peaks * -log2(e)
        self._shifted = bits + shift
        self._start, self._shift = bits if grows else self._shifted, shift if grows else None
        longest = (
            torch.linalg.vector_norm(value, dim=-1).amax(-1, keepdim=True).clamp_(min=torch.finfo(value.dtype).tiny)
        )
        self._value, self._value_scale, self._weight = value / longest.unsqueeze(-1), longest.square(), weight

    def squares(
        self, heads: Tensor | slice, factors: Sequence[Tensor], growths: Sequence[Tensor], bits: Tensor
    ) -> Tensor:
        """`AttentionBlock.squares` of some heads, (heads, neurons): by powers, but for neurons that move a logit far.

        factors, growths: as for `AttentionBlock.changed`. bits: `bits_moved`, (heads, neurons). One that isn't a number counts
        as far. What is computed together with a neuron doesn't decide how it is.
        """
        far = ~(bits <= _MOST_BITS)
        by_powers = self._squares(self.powers, heads, factors, growths)
        if not bool(far.any()):
            return by_powers
        return torch.where(far, self._squares(self.softmax, heads, factors, growths), by_powers)

    @staticmethod
    def _squares(
        block: AttentionBlock, heads: Tensor | slice, factors: Sequence[Tensor], growths: Sequence[Tensor]
    ) -> Tensor:
        some = block.of_heads(heads)
        return some.squares(some.changed(factors, growths))

    @cached_property
    def powers(self) -> AttentionBlock:
        powers = self._shifted.exp2()
        return self._block(powers, powers.sum(-1))

    @cached_property
    def softmax(self) -> AttentionBlock:
        return self._block((self._shifted * log(2)).softmax(-1), None)

    def _block(self, attention: Tensor, total: Tensor | None) -> AttentionBlock:
        return AttentionBlock(
            log2(e), self._start, self._shift, attention, total, self._value, self._weight, self._value_scale
        )
