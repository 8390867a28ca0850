"""Upper bounds on the q and k impacts of all neurons, at the price of a few attention passes.

Deactivating a neuron takes `x_ij` from query i's logits. With `w_j = exp(-x_ij)` and expectations over the keys under
the attention A_i, the output changes by exactly `Cov(w, v) / E[w]`. Three steps bound its norm:

- Cauchy-Schwarz: at most `sd(w) / E[w]` times the square root of the largest eigenvalue of Cov(v), of which the
  Frobenius norm and the trace are upper bounds.
- With `t_j = E[x] - x_ij <= delta = E[x] - min x`, `|exp(t) - 1| <= |t| (exp(delta) - 1) / delta`, because
  `(exp(t) - 1) / t` increases in t. The standard deviation is at most the root mean square distance from 1, and
  `E[exp(t)] >= 1` (Jensen), so `sd(w) / E[w] <= sd(x) (exp(delta) - 1) / delta`.
- The output stays a convex combination of the values: it moves at most to the farthest of them.

`x` is rank two, so sd(x) of all neurons comes from five products with A. A column of `x` or of v may lose a constant
without changing anything: both are centred first, or float32 would lose their variance in a large common part.
What rounding can add, here and in the exact form that the bounds are compared with, is added to the bounds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from agnostic_train.impact.attention import OutputChange, RankTwo

# Parts of a sentence, in sixteenths of its length: early rows see few keys, cost least and often change most.
_BLOCK_ENDS = (2, 4, 8, 12, 16)
_LEAST_ROWS = 8


@dataclass(frozen=True)
class Block:
    """Consecutive query rows, and the keys that some sentence of the batch sees from them."""

    rows: slice
    keys: slice

    @property
    def num_logits(self) -> int:
        return (self.rows.stop - self.rows.start) * (self.keys.stop - self.keys.start)


@dataclass(frozen=True)
class ValueSpread:
    """How far the values lie from each query's output, by head and row: all (heads, length).

    largest: at least the largest eigenvalue of the values' covariance under the attention. typical: the mean of its
    eigenvalues, weighted by themselves. farthest: at least the squared distance of the farthest visible value.
    unit: what one rounding of an attention weight can move the output by. roundings: how many the exact form makes
    before it subtracts any change of the logits.
    """

    largest: Tensor
    typical: Tensor
    farthest: Tensor
    unit: Tensor
    roundings: Tensor


def row_blocks(visible: Tensor) -> list[Block]:
    """Cuts a batch's rows into blocks. visible: (batch, 1, length, length) bool; every row sees a key."""
    length = visible.shape[-1]
    ends = [0]
    for sixteenths in _BLOCK_ENDS:
        end = -(-length * sixteenths // 16)
        if end - ends[-1] >= _LEAST_ROWS and length - end >= _LEAST_ROWS:
            ends.append(end)
    rows = [slice(start, end) for start, end in zip(ends, [*ends[1:], length], strict=True)]
    seen = visible.flatten(0, 1).any(0)
    seen = torch.stack([seen[block].any(0) for block in rows]).int()
    first, last = seen.argmax(1).tolist(), seen.flip(1).argmax(1).tolist()
    return [Block(block, slice(f, length - t)) for block, f, t in zip(rows, first, last, strict=True)]


def value_spread(change: OutputChange, heads: slice) -> ValueSpread:
    """The spread of the values of some heads of the batch."""
    logits, attention, value = change.logits[heads], change.attention[heads], change.value[heads]
    length, head_dim = value.shape[-2:]
    rounding = _rounding(value.dtype, length + head_dim)
    longest = value.norm(dim=-1).amax(-1, keepdim=True)
    value = value - change.output[heads].mean(-2, keepdim=True)
    output = attention @ value
    visible = logits != -torch.inf
    square, own = value.square().sum(-1), output.square().sum(-1)
    second = (attention @ square.unsqueeze(-1)).squeeze(-1)
    trace = (second - own).clamp_(min=0) + rounding * second
    cross = output @ value.transpose(-1, -2)
    farthest = (square.unsqueeze(-2) - 2 * cross).masked_fill_(~visible, -torch.inf).amax(-1) + own
    farthest = farthest.clamp_(min=0) + 4 * rounding * square.amax(-1, keepdim=True)
    # ||Cov||^2 = E E' (v.v')^2 - 2 E (v.o)^2 + ||o||^4
    gram = (value @ value.transpose(-1, -2)).square_()
    squares = (attention @ gram).sub_(cross.square_(), alpha=2).mul_(attention).sum(-1) + own.square()
    squares = squares.clamp_(min=0) + 8 * rounding * second.square()
    # A logit's rounding is a part of its size, and a relative error of the weight that it becomes.
    roundings = logits.masked_fill(~visible, 0).abs_().amax(-1) + (2 * length**0.5 + 16)
    return ValueSpread(
        largest=torch.minimum(squares.sqrt(), trace),
        typical=squares / trace.clamp(min=torch.finfo(trace.dtype).tiny),
        farthest=farthest,
        unit=(longest * torch.finfo(value.dtype).eps / 2).expand_as(roundings),
        roundings=roundings,
    )


def square_bounds(
    change: OutputChange, heads: slice, spread: ValueSpread, x: RankTwo, blocks: list[Block]
) -> tuple[Tensor, Tensor]:
    """Bounds on each neuron's squared change, summed over a block's counted rows, and an estimate over all rows.

    Args:
        x: what each neuron takes from the logits, as for `OutputChange.of_rank_two`.

    Returns: (heads, blocks, head_dim) and (heads, head_dim). The bounds may be infinite or NaN.
    """
    a, b, c, d = (part.flatten(0, 1)[heads] for part in (x.a, x.b, x.c, x.d))
    length, head_dim = a.shape[-2:]
    rounding = _rounding(a.dtype, length)
    b_common, d_common = b.mean(-2, keepdim=True), d.mean(-2, keepdim=True)
    b, d = b - b_common, d - d_common
    moments = change.attention[heads] @ torch.cat([b, d, b.square(), d.square(), b * d], -1)
    bounds = a.new_empty(len(a), len(blocks), head_dim)
    estimate = a.new_zeros(len(a), head_dim)
    for index, block in enumerate(blocks):
        left, right = a[:, block.rows], c[:, block.rows]
        mean_b, mean_d, square_b, square_d, product = moments[:, block.rows].split(head_dim, -1)
        mean = torch.addcmul(left * mean_b, right, mean_d)
        size = torch.addcmul(left.square().mul_(square_b), right.square(), square_d)
        variance = torch.addcmul((left * right).mul_(product).mul_(2).add_(size), mean, mean, value=-1)
        variance = variance.clamp_(min=0).add_(size, alpha=8 * rounding)
        least, reach = mean.new_zeros(()), mean.new_zeros(())
        for factor, values, common in ((left, b, b_common), (right, d, d_common)):
            seen = values[:, block.keys]
            low, high = seen.amin(-2, keepdim=True), seen.amax(-2, keepdim=True)
            least = torch.minimum(factor * low, factor * high).add_(least)
            reach = torch.addcmul(reach, factor.abs(), torch.maximum(high, -low).add_(common.abs()))
        delta = mean.sub_(least).clamp_(min=1e-6).add_(reach, alpha=4 * rounding)
        bound = delta.expm1().div_(delta).square_().mul_(variance).mul_(spread.largest[:, block.rows, None])
        bound = torch.minimum(bound, spread.farthest[:, block.rows, None]).sqrt_()
        noise = reach.mul_(2).add_(spread.roundings[:, block.rows, None]).mul_(spread.unit[:, block.rows, None])
        weight = change.weight[heads, None, block.rows]
        bounds[:, index] = (weight @ bound.add_(noise).square_()).squeeze(1)
        estimate += ((weight * spread.typical[:, None, block.rows]) @ variance).squeeze(1)
    return bounds, estimate


def _rounding(dtype: torch.dtype, terms: float) -> float:
    """Relative error of a sum of so many terms."""
    return (terms + 16) * torch.finfo(dtype).eps / 2
