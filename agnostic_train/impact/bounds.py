"""Upper bounds on the q and k impacts of all neurons, at the cost of a few attention passes.

Deactivating a neuron subtracts `x_ij` from query i's logits. With `w_j = exp(-x_ij)` and expectations over the keys
under the attention A_i, the output changes by exactly `Cov(w, v) / E[w]`. Three steps bound its norm:

- By Cauchy-Schwarz it is at most `sd(w) / E[w]` times the square root of the largest eigenvalue of Cov(v). The
  Frobenius norm and the trace of Cov(v) are upper bounds on this eigenvalue.
- With `t_j = E[x] - x_ij <= delta = E[x] - min x`, `|exp(t) - 1| <= |t| (exp(delta) - 1) / delta`, because
  `(exp(t) - 1) / t` increases in t. The standard deviation of exp(t) is at most its root mean square distance from 1,
  and `E[exp(t)] >= 1` (Jensen), so `sd(w) / E[w] <= sd(x) (exp(delta) - 1) / delta`. The square of the last factor is
  at most `exp(delta + delta^2 / 12)`, because `sinh(z) / z <= exp(z^2 / 6)`.
- The output stays a convex combination of the values, so it moves by at most its own norm plus the largest norm of a
  value.

`x` is rank two, so sd(x) of all neurons follows from five products with A. If a norm makes the other entries grow, a
part of the logits themselves is subtracted from this `x`, which takes up to four more products with A and the logits.
Subtracting a constant over the keys from `x` or from v changes nothing: `x` is passed in centred, and v is centred
here, because float32 would lose their variance in a large common part. What rounding can add, here and in the exact
form with which the bounds are compared, is added to the bounds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from agnostic_train.impact.attention import LogitChange
from agnostic_train.impact.layer_attention import LayerAttention
from agnostic_train.impact.row_blocks import Block

# Fraction by which bounds are enlarged, so that rounding adds the same term in every row; see `square_bounds`.
_PART = 0.01


@dataclass(frozen=True)
class ValueSpread:
    """How far the values lie from each query's output, by head and row.

    Attributes:
        largest: upper bound on the largest eigenvalue of the values' covariance under the attention, (heads, length).
        typical: the mean of its eigenvalues, weighted by themselves, (heads, length).
        farthest: upper bound on the squared distance of the farthest visible value, (heads, length).
        unit: how far one rounding of an attention weight can move the output, (heads, 1).
        roundings: how many roundings the exact form makes besides those of the change, (heads, 1).
    """

    largest: Tensor
    typical: Tensor
    farthest: Tensor
    unit: Tensor
    roundings: Tensor


def value_spread(attention: LayerAttention, heads: slice, blocks: list[Block]) -> ValueSpread:
    """Computes the spread of the values for the heads in `heads`, a slice of (batch * heads)."""
    probabilities, value = attention.probabilities[heads], attention.value[heads]
    length, head_dim = value.shape[-2:]
    rounding = _rounding(value.dtype, length + 3 * head_dim)
    longest = torch.linalg.vector_norm(value, dim=-1).amax(-1, keepdim=True)
    # In units of the longest value, because fourth powers of small values would underflow.
    scale = longest.clamp(min=torch.finfo(value.dtype).tiny)
    value = (value - attention.output[heads].mean(-2, keepdim=True)) / scale.unsqueeze(-1)
    output = probabilities @ value
    square, own = value.square().sum(-1), output.square().sum(-1)
    second = (probabilities @ square.unsqueeze(-1)).squeeze(-1)
    trace = (second - own).clamp_(min=0) + rounding * second
    cross = output @ value.transpose(-1, -2)
    longest_seen = [square[:, block.keys].amax(-1, keepdim=True).expand(-1, block.num_rows) for block in blocks]
    farthest = (torch.cat(longest_seen, -1).sqrt() + own.sqrt()).square()
    farthest += 4 * rounding * square.amax(-1, keepdim=True)
    # Squared Frobenius norm, v' an independent copy of v: ||Cov||^2 = E E' (v.v')^2 - 2 E (v.o)^2 + ||o||^4
    gram = (value @ value.transpose(-1, -2)).square_()
    squares = (probabilities @ gram).sub_(cross.square_(), alpha=2).mul_(probabilities).sum(-1) + own.square()
    squares = squares.clamp_(min=0) + 8 * rounding * second.square()
    largest = torch.minimum(squares.sqrt(), trace)
    for block in blocks[1:]:
        common = _largest_in_block(probabilities[:, block.rows, block.keys], value[:, block.keys], rounding)
        largest[:, block.rows] = torch.minimum(largest[:, block.rows], common)
    # Rounding moves each value by a fraction of its norm.
    unit = torch.finfo(value.dtype).eps / 2
    largest += (4 * unit) ** 2
    # A logit's rounding error is a fraction of its size, and becomes a relative error of its attention weight.
    roundings = attention.largest_logits[heads, None] + (2 * length**0.5 + 16)
    area = scale.square()
    return ValueSpread(
        largest=largest * area,
        typical=squares / trace.clamp(min=torch.finfo(trace.dtype).tiny) * area,
        farthest=farthest * area,
        unit=longest * unit,
        roundings=roundings,
    )


def _largest_in_block(probabilities: Tensor, value: Tensor, rounding: float) -> Tensor:
    """An upper bound on the largest eigenvalue of the values' covariance under any row's attention: (heads, 1).

    With p_j the largest weight of key j in any of the rows, and any centre c, each row's covariance is at most (as a
    quadratic form) the matrix `M = sum_j p_j (v_j - c) (v_j - c)^T`. `||M^4||^(1/4)` is only slightly more than M's
    largest eigenvalue. The Gram matrix of the vectors `sqrt(p_j) (v_j - c)` has the same largest eigenvalue.
    """
    weight = probabilities.amax(-2).unsqueeze(-1)
    value = value - (weight * value).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True)
    value = value.mul_(weight.sqrt_())
    trace = value.square().sum((-2, -1), keepdim=True)
    value = value.mul_(trace.rsqrt().clamp_(max=torch.finfo(trace.dtype).max))
    fewest = min(value.shape[1:])
    matrix = value @ value.mT if fewest == value.shape[1] else value.mT @ value
    matrix = matrix @ matrix
    matrix = matrix @ matrix
    largest = torch.linalg.vector_norm(matrix.flatten(1), dim=-1).sqrt_().sqrt_()[:, None]
    # M's trace is 1 here, so ||M^4|| is at least fewest^-3.5: the relative error of M^2 grows less than `fewest`-fold.
    return trace.squeeze(-1) * (largest * (1 + rounding * fewest) + 4 * rounding)


def square_bounds(
    attention: LayerAttention, heads: slice, spread: ValueSpread, x: LogitChange, blocks: list[Block]
) -> tuple[Tensor, Tensor]:
    """Bounds each neuron's squared change, summed over a block's counted rows, and estimates it over all rows.

    Args:
        heads: slice of (batch * heads).
        x: the change of the logits, `centred`.

    Returns: bounds (heads, blocks, head_dim), which may be infinite or NaN, and estimates (heads, head_dim).
    """
    a, b, c, d = (part.flatten(0, 1)[heads] for part in x.factors)
    rounding = _rounding(a.dtype, a.shape[1])
    # The largest possible change of a logit; rounding errors are a fraction of it: (heads, 1, head_dim).
    reach = x.reach.flatten(0, 1)[heads].unsqueeze(1)
    growth = _growth(attention, heads, x, b, d)
    if growth is not None:
        reach = reach + growth.reach
    probabilities = attention.probabilities[heads]
    # By `(x + e)^2 <= (1 + p) x^2 + (1 + 1 / p) e^2`, rounding adds one term to every row: (heads, 1, head_dim).
    noise = spread.unit.unsqueeze(1) * (spread.roundings.unsqueeze(1) + 2 * reach)
    noise = (1 + 1 / _PART) * noise.square()
    mean_b, mean_d, square_b, square_d, product = (probabilities @ it for it in (b, d, b.square(), d.square(), b * d))
    size = a.square().mul_(square_b).addcmul_(c.square(), square_d)
    mean = (a * mean_b).addcmul_(c, mean_d)
    mixed = (a * c).mul_(product)
    if growth is not None:
        size += growth.square
        mean -= growth.mean
        mixed.addcmul_(a, growth.with_b, value=-1).addcmul_(c, growth.with_d, value=-1)
    variance = torch.add(size, mixed, alpha=2, out=mixed).addcmul_(mean, mean, value=-1)
    variance = variance.clamp_(min=0).add_(size, alpha=12 * rounding)
    delta = mean
    for factor, values in ((a, b), (c, d)):
        absolute = factor.abs()
        for block in blocks:
            rows = block.rows
            # The minimum of f * value for a value in [low, high]: `f (low + high) / 2 - |f| (high - low) / 2`.
            low, high = (limit(values[:, block.keys], -2, keepdim=True) / 2 for limit in (torch.amin, torch.amax))
            delta[:, rows].addcmul_(factor[:, rows], low + high, value=-1).addcmul_(absolute[:, rows], high - low)
    if growth is not None:
        delta += growth.largest
    delta = delta.add_(4 * rounding * reach).clamp_(min=0)
    excess = delta.addcmul(delta, delta, value=1 / 12).exp_()
    bound = excess.mul_(variance).mul_(spread.largest.unsqueeze(-1))
    bound = torch.minimum(bound, spread.farthest.unsqueeze(-1), out=bound)
    counted = attention.counted[heads].unsqueeze(1)
    estimates = ((counted * spread.typical.unsqueeze(1)) @ variance).squeeze(1)
    bounds = [
        (1 + _PART) * (counted[..., rows] @ bound[:, rows]) + counted[..., rows].sum(-1, keepdim=True) * noise
        for rows in (block.rows for block in blocks)
    ]
    return torch.cat(bounds, 1), estimates


@dataclass(frozen=True)
class _Growth:
    """The part `g_ij = u_i S_ij` or `S_ij v_j` that a norm's growth subtracts from x, and its moments under A.

    Attributes:
        mean, square: of g and of its square, (heads, length, head_dim).
        with_b, with_d: the means of g's products with b and d, (heads, length, head_dim).
        largest: an upper bound on g, (heads, length, head_dim).
        reach: the size of which rounding errors are a fraction, (heads, 1, head_dim).
    """

    mean: Tensor
    square: Tensor
    with_b: Tensor
    with_d: Tensor
    largest: Tensor
    reach: Tensor


def _growth(attention: LayerAttention, heads: slice, x: LogitChange, b: Tensor, d: Tensor) -> _Growth | None:
    """Computes the growth's part of x; None where nothing grows.

    b, d: centred, (heads, length, head_dim).
    """
    if not x.grows:
        return None
    probabilities, logits = attention.probabilities[heads], attention.logits[heads]
    seen = logits.masked_fill(logits == -torch.inf, 0)
    size, highest = seen.abs().amax((-2, -1), keepdim=True), logits.amax(-1, keepdim=True)
    if x.column_growth is not None:
        v = x.column_growth.flatten(0, 1)[heads] - 1
        weighted = probabilities * seen
        return _Growth(
            mean=weighted @ v,
            square=(weighted * seen) @ v.square(),
            with_b=weighted @ (v * b),
            with_d=weighted @ (v * d),
            largest=highest.clamp(min=0) * v.amax(-2, keepdim=True),
            reach=size * (4 + v.amax(-2, keepdim=True)),
        )
    assert x.row_growth is not None
    u = x.row_growth.flatten(0, 1)[heads] - 1
    # Subtracting a constant from a row of x changes nothing either.
    mean = (probabilities * seen).sum(-1, keepdim=True)
    seen = seen - mean
    weighted = probabilities * seen  # 0 at hidden keys, like the attention
    return _Growth(
        mean=u * weighted.sum(-1, keepdim=True),
        square=u.square() * (weighted * seen).sum(-1, keepdim=True),
        with_b=u * (weighted @ b),
        with_d=u * (weighted @ d),
        largest=u * (highest - mean).clamp(min=0),
        reach=size * (4 + u.amax(-2, keepdim=True)),
    )


def _rounding(dtype: torch.dtype, terms: float) -> float:
    """Bound on the relative error of a sum of `terms` terms."""
    return (terms + 16) * torch.finfo(dtype).eps / 2
