"""Certified pruning where a norm spans all heads (OLMo 2), so that a neuron of q or k acts through every head.

When an entry is zeroed, the others grow by one factor r (`rms_norm`). In the neuron's own heads, the change of the
logits has its closed form. In the other heads the logits S_ij become `r_i S_ij` (q) or `r_j S_ij` (k), with r close to
1, because one entry is a small part of all heads. With `u = r - 1` and `y_ij = u_i S_ij` or `u_j S_ij`, a query's
output changes by `Cov(y, v)` under its attention, plus a remainder. `Cov(y, v)` is linear in u: one vector (q) or one
matrix (k) gives its square for all neurons. The remainder is half the joint cumulant of y, y and v under some attention
between the old one and the new, at most `max ||v|| exp(max y - min y) E[(y - E y)^2]`.

This encloses every squared impact in an interval. Neurons whose interval doesn't decide whether they are among their
sentence's largest are computed exactly, with the norm applied anew.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agnostic_train.impact.attention import LogitChange
from agnostic_train.impact.layer_attention import LayerAttention
from agnostic_train.impact.pruning import Work, check_enclosed, decide, num_top, settle
from agnostic_train.impact.rms_norm import MAX_GROWTH


@dataclass(frozen=True)
class _OtherHeads:
    """How growth of the logits moves the output of some heads, as coefficients of powers of `u = growth - 1` by token.

    Attributes:
        linear: the linear part's square: for q the coefficients of u^2, (..., length); for k those of u u^T, (...,
            length, length).
        rest: the squared bound on the remainder, before the exponential: the coefficients of u^4, (..., length).
        error: the square of what rounding adds to the linear part: the coefficients of u^2, (..., length).
    """

    linear: Tensor
    rest: Tensor
    error: Tensor


def pruned_impacts(
    name: str,
    attention: LayerAttention,
    own_change: LogitChange,
    growth: Tensor,
    replayed: Callable[[Tensor], Tensor],
    top_ratio: float,
) -> tuple[Tensor, Work]:
    """Impacts of one layer's q or k that tell each sentence's top neurons.

    Args:
        name: `q` or `k`.
        attention: the layer's attention for a batch.
        own_change: how each neuron changes the logits of its own heads.
        growth: the factor by which the other entries grow without each neuron, (batch, length, neurons).
        replayed: returns exact squared changes of the neurons marked in (batch, neurons), bool; zero for the others.
        top_ratio: fraction of the site's neurons to find. At 1 every impact is exact, and the intervals are checked.

    Returns: the impacts, (batch, neurons), float32, and the work done. The impacts are the middle of the interval for
        neurons that are certainly in the top, zero for those that certainly aren't, and exact for the others.

    Raises:
        UserError: an exact impact lies outside its interval.
    """
    num_groups = attention.num_own_heads(name)  # neurons of a group act through the same heads
    own = attention.summed_over_heads(name, attention.squared_changes(own_change).flatten(0, 1))
    excess = (growth - 1).to(own.dtype).unflatten(-1, (num_groups, -1)).transpose(1, 2)
    others = _query_growth(attention) if name == "q" else _key_growth(attention)
    noise = _noise(attention)
    low, high = ((own + it.flatten(1)).sqrt() for it in _intervals(attention, others, excess))
    low, high = (low - noise).clamp(min=0).square(), (high + noise).square()
    unknown = ~high.isfinite() | (growth.amax(1) > MAX_GROWTH)
    low, high = low.masked_fill(unknown, 0), high.masked_fill(unknown, torch.inf)
    certain, unclear = decide(low, high, num_top(top_ratio, own.shape[1]))
    exact = replayed(unclear)
    if top_ratio == 1:
        check_enclosed(exact, low, high)
    # A replayed neuron takes the logits of all heads, any other only those of its own heads.
    per_neuron, num_replayed = attention.length**2, unclear.sum()
    work = Work(
        neurons=num_replayed,
        all_neurons=unclear.numel(),
        logits=(num_replayed * num_groups + (unclear.numel() - num_replayed)) * per_neuron,
        all_logits=unclear.numel() * num_groups * per_neuron,
    )
    return settle(low, high, certain, exact).sqrt().float(), work


def _intervals(attention: LayerAttention, heads: _OtherHeads, excess: Tensor) -> tuple[Tensor, Tensor]:
    """Encloses each neuron's squared change of the output of all heads but its own.

    excess: u by group, (batch, groups, length, head_dim). Returns: low, high, both (batch, groups, head_dim).
    """
    num_groups = excess.shape[1]
    is_other = 1 - torch.eye(num_groups, dtype=excess.dtype, device=excess.device)

    def over_others(by_head: Tensor) -> Tensor:
        by_group = by_head.unflatten(0, (attention.batch, num_groups, -1)).sum(2)
        return torch.tensordot(by_group, is_other, dims=([1], [1])).movedim(-1, 1)

    square = excess.square()
    linear = over_others(heads.linear)
    linear = (linear @ excess * excess if linear.dim() == 4 else linear.unsqueeze(-1) * square).sum(2)
    rest = (over_others(heads.rest).unsqueeze(-1) * square.square()).sum(2)
    error = (over_others(heads.error).unsqueeze(-1) * square).sum(2)
    largest_logit = attention.largest_logits.view(attention.batch, -1).amax(1)[:, None, None]
    spread = rest.sqrt() * (2 * largest_logit * excess.amax(2)).exp() + error.sqrt()
    middle = linear.clamp(min=0).sqrt()
    return (middle - spread).clamp(min=0).square(), (middle + spread).square()


def _query_growth(attention: LayerAttention) -> _OtherHeads:
    """Coefficients where the logits of query i grow by 1 + u_i: `u_i Cov(S_i, v)`. By head: (batch * heads, length)."""
    probabilities, value, weight = attention.probabilities, attention.centred_value, attention.counted
    logits = _seen_logits(attention)
    distance = logits - (probabilities * logits).sum(-1, keepdim=True)
    moved = probabilities * distance
    variance = (moved * distance).sum(-1)
    longest = attention.longest_value
    rounding = _rounding(attention)
    return _OtherHeads(
        linear=(moved @ value).square().sum(-1) * weight,
        rest=(longest * variance).square() * weight,
        error=(rounding * longest).square() * variance * weight,
    )


def _key_growth(attention: LayerAttention) -> _OtherHeads:
    """Coefficients where the logits of key j grow by 1 + u_j: `sum_j u_j A_ij S_ij (v_j - o_i)`.

    By head: (batch * heads, length[, length]).
    """
    probabilities, value, weight = attention.probabilities, attention.centred_value, attention.counted.unsqueeze(-1)
    logits = _seen_logits(attention)
    output = probabilities @ value
    moved = probabilities * logits
    square = moved * logits
    longest = attention.longest_value
    # By query: E[S^2] times the longest value's square; E[S^2] bounds the variance of y where |u| is 1.
    second = square.sum(-1, keepdim=True) * weight * longest.unsqueeze(-1).square()
    # (v_j - o_i) (v_k - o_i) = v_j v_k - v_j o_i - v_k o_i + o_i o_i, summed over i with the factors of j and k.
    counted = moved * weight
    cross = (moved * (output @ value.mT)).mT @ counted
    gram = (counted.mT @ moved) * (value @ value.mT)
    gram += (counted * output.square().sum(-1, keepdim=True)).mT @ moved - cross - cross.mT
    return _OtherHeads(
        linear=gram,
        rest=(square * second).sum(-2),
        # The linear part is a difference of large terms: the error is a fraction of these, not of the difference.
        error=4 * _rounding(attention) * (probabilities * second).sum(-2),
    )


def _seen_logits(attention: LayerAttention) -> Tensor:
    return attention.logits.masked_fill(attention.logits == -torch.inf, 0)


def _rounding(attention: LayerAttention) -> float:
    """Bound on the relative error of a sum over keys of sums over features."""
    return 4 * torch.finfo(attention.value.dtype).eps * (attention.length + attention.head_dim)


def _noise(attention: LayerAttention) -> Tensor:
    """How far rounding of logits and weights moves a sentence's output, here and in the exact form: (batch, 1)."""
    roundings = 4 * attention.largest_logits + (2 * attention.length**0.5 + 16)
    # Norms compute in float32, whatever their input's dtype.
    per_row = torch.finfo(torch.float32).eps * roundings * attention.longest_value.squeeze(-1)
    return (per_row.square() * attention.counted.sum(-1)).view(attention.batch, -1).sum(1, keepdim=True).sqrt()
