"""Attention in a block of query rows, and how far changed logits move its output, in plain torch.

A softmax passes over its logits four times. If a neuron changes them little, powers of two need fewer passes: logits
are expressed in bits relative to the largest unchanged logit of their row, and the division by the sum of the powers
and the comparison with the unchanged attention are one pass. If a neuron changes them much, a softmax of the same
logits is computed instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import e, log, log2
from typing import Any

import torch
from torch import Tensor

from agnostic_train.impact.attention import LogitChange

# A row's largest power then lies between 2^-40 and 2^40, and its square is far from float32's limits, because values
# are scaled to a largest norm of 1.
_MAX_BITS = 40.0


def bits_moved(change: LogitChange, largest_logits: Tensor) -> Tensor:
    """An upper bound on how far each neuron moves a logit, in bits; 0 for a neuron that changes nothing.

    Args:
        largest_logits: upper bounds on the logits' absolute values, (batch, query heads).

    Returns: (batch, query heads, head_dim).
    """
    reach = change.reach
    for growth in (change.row_growth, change.column_growth):
        if growth is not None:
            reach = reach + (growth.amax(-2) - 1) * largest_logits.unsqueeze(-1)
    return reach * log2(e)


@dataclass(frozen=True)
class AttentionBlock:
    """The attention of some heads in a block of query rows, with which changed attention is compared.

    Attributes:
        scale: the logits' unit: `log2(e)` for bits, 1 for natural logits.
        logits: those that neurons change, natural ones times `scale`, (heads, rows, keys), -inf at unseen keys.
        shift: added to logits after they have grown, (heads, rows, 1); None without growth.
        attention: unchanged, (heads, rows, keys); 0 in rows that don't count.
        counted: (heads, rows), 1 at rows that count, else 0.
        by_powers: whether changed attention is computed by powers of two, not by a softmax.
        value: (heads, keys, head_dim).
        value_scale: the factor on squared outputs that undoes the scaling of `value`, (heads, 1).
    """

    scale: float
    logits: Tensor
    shift: Tensor | None
    attention: Tensor
    counted: Tensor
    by_powers: bool
    value: Tensor
    value_scale: Tensor

    def of_heads(self, heads: Tensor | slice) -> "AttentionBlock":
        """The block of the given heads; an index tensor may repeat heads."""

        def chosen(part: Tensor | None) -> Any:
            if part is None:
                return None
            return part[heads] if isinstance(heads, slice) else part.index_select(0, heads)

        parts = ("logits", "shift", "attention", "counted", "value", "value_scale")
        return replace(self, **{name: chosen(getattr(self, name)) for name in parts})

    def changed(self, factors: Sequence[Tensor], growths: Sequence[Tensor]) -> Tensor:
        """Computes the logits after each neuron's deactivation, times `scale`: (heads, neurons, rows, keys).

        Args:
            factors: a, b, c, d of a `LogitChange`; a, c (heads, neurons, rows, 1) and b, d (heads, neurons, 1, keys).
            growths: those of `row_growth` and `column_growth` that aren't None, in the same two shapes.
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
            # The last product and the shift in one pass.
            changed = torch.addcmul(self.shift.unsqueeze(1), changed, last)
        return torch.addcmul(changed, a, b, value=-self.scale).addcmul_(c, d, value=-self.scale)

    def squares(self, changed: Tensor) -> Tensor:
        """How far changed logits move the output, squared and summed over features and counted rows: (heads, neurons).

        changed: logits times `scale`, (heads, neurons, rows, keys); overwritten.
        """
        counted, attention = self.counted.unsqueeze(1), self.attention.unsqueeze(1)
        if self.by_powers:
            weights = changed.exp2_()
            # Divided by infinity, nothing is left of a row that doesn't count.
            total = weights.sum(-1).div_(counted)
            torch.addcdiv(attention, weights, total.unsqueeze(-1), value=-1, out=weights)
        else:
            weights = changed.mul_(1 / self.scale) if self.scale != 1 else changed
            weights = weights.softmax(-1).mul_(counted.unsqueeze(-1)).sub_(attention)
        # One matrix product per head is faster than one per neuron.
        moved = (weights.flatten(1, 2) @ self.value).view(*weights.shape[:2], -1)
        return torch.linalg.vector_norm(moved, dim=-1).square_().mul_(self.value_scale)


def plain_block(logits: Tensor, value: Tensor, counted: Tensor, start: Tensor | None = None) -> AttentionBlock:
    """Builds a block of natural logits and a softmax, which takes changes of any kind and size.

    Args:
        logits: as the softmax sees them, (heads, rows, keys).
        start: the logits that a neuron changes, if not `logits` (before a cap).
    """
    # Over the block's keys, like the changed softmax: a neuron that changes no logit has an impact of exactly zero.
    attention = logits.softmax(-1).mul_(counted.unsqueeze(-1))
    start = logits if start is None else start
    return AttentionBlock(
        scale=1.0, logits=start, shift=None, attention=attention, counted=counted, by_powers=False,
        value=value, value_scale=torch.ones_like(counted[:, :1]),
    )  # fmt: skip


class BlockForms:
    """A block's attention in bits, both as powers of two and as a softmax, each computed when first needed.

    Args:
        logits: natural, (heads, rows, keys).
        peaks: each row's largest logit, (heads, rows, 1).
        value: (heads, keys, head_dim).
        counted: (heads, rows), 1 at rows that count, else 0.
        grows: whether the changes multiply logits by growths; logits are then shifted by the peaks only afterwards.
    """

    def __init__(self, logits: Tensor, peaks: Tensor, value: Tensor, counted: Tensor, grows: bool):
        bits, shift = logits * log2(e), peaks * -log2(e)
        self._shifted = bits + shift
        self._start, self._shift = bits if grows else self._shifted, shift if grows else None
        longest = (
            torch.linalg.vector_norm(value, dim=-1).amax(-1, keepdim=True).clamp_(min=torch.finfo(value.dtype).tiny)
        )
        self._value, self._value_scale, self._counted = value / longest.unsqueeze(-1), longest.square(), counted

    def squares(
        self, heads: Tensor | slice, factors: Sequence[Tensor], growths: Sequence[Tensor], bits: Tensor
    ) -> Tensor:
        """`AttentionBlock.squares` of some heads: by powers, or by softmax for neurons that move a logit far.

        A neuron's form depends only on its own bits, not on the neurons computed with it.

        Args:
            factors, growths: as for `AttentionBlock.changed`.
            bits: `bits_moved`, (heads, neurons); NaN counts as far.

        Returns: (heads, neurons).
        """
        far = ~(bits <= _MAX_BITS)
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
        return self._block(powers / powers.sum(-1, keepdim=True), by_powers=True)

    @cached_property
    def softmax(self) -> AttentionBlock:
        return self._block((self._shifted * log(2)).softmax(-1), by_powers=False)

    def _block(self, attention: Tensor, by_powers: bool) -> AttentionBlock:
        attention = attention * self._counted.unsqueeze(-1)
        return AttentionBlock(
            scale=log2(e), logits=self._start, shift=self._shift, attention=attention, counted=self._counted,
            by_powers=by_powers, value=self._value, value_scale=self._value_scale,
        )  # fmt: skip
