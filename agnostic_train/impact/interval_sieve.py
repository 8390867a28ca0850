"""Certified pruning on a GPU: intervals around all q and k impacts, and exact impacts where the intervals don't decide.

A neuron whose upper end lies below the n-th largest lower end of its sentence can't be among the n largest impacts. A
neuron whose lower end lies above the (n + 1)-th largest upper end must be among them. Only the neurons in between are
computed exactly. Nothing here synchronises the host with the device.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from agnostic_train.impact import kernels
from agnostic_train.impact.attention import LogitChange
from agnostic_train.impact.intervals import squared_intervals
from agnostic_train.impact.layer_attention import LayerAttention
from agnostic_train.impact.layout import QueryKeyLayout
from agnostic_train.impact.pruning import Work, check_enclosed, decide, num_top, settle


def interval_impacts(
    attention: LayerAttention,
    logit_changes: Mapping[str, LogitChange],
    num_kv_heads: int,
    top_ratio: float,
    work: Mapping[str, Work],
) -> dict[str, Tensor]:
    """Impacts of one layer that tell each sentence's top q and k neurons; needs the kernels.

    Args:
        attention: the layer's attention for a batch.
        logit_changes: by `q` and `k`, or one of them, how each neuron changes the logits.
        num_kv_heads: number of KV heads.
        top_ratio: fraction of a site's neurons to find. At 1 every impact is exact, and the intervals are checked
            against the exact impacts.
        work: by `q` and `k`; the work done is added to it.

    Returns: by `q` and `k`, (batch, neurons), float32: the middle of the interval for neurons that are certainly in the
        top, zero for those that certainly aren't, the exact impact for the others.

    Raises:
        UserError: an exact impact lies outside its interval.
    """
    layout = QueryKeyLayout(attention, logit_changes, num_kv_heads, kernels.padded_length(attention.length))
    ends = squared_intervals(
        attention.logits,
        attention.probabilities,
        attention.value,
        attention.counted,
        layout.factors,
        attention.key_spans,
        attention.largest_logits,
        layout.growths,
        attention.softcap,
    )
    low, high = (layout.by_site(end.view(len(attention.value), -1)) for end in ends)
    by_site = zip(layout.split(low), layout.split(high), layout.sizes, strict=True)
    decided = [decide(lower, upper, num_top(top_ratio, size)) for lower, upper, size in by_site]
    certain, unclear = (torch.cat(parts, 1) for parts in zip(*decided, strict=True))
    exact = layout.by_site(
        kernels.squared_changes(
            attention.changed_logits,
            attention.centred_value,
            attention.counted,
            layout.factors,
            attention.key_spans,
            layout.by_head(unclear).flatten(),
            layout.growths,
            attention.softcap,
        ).view(len(attention.value), -1)
    )
    if top_ratio == 1:
        check_enclosed(exact, low, high)
    squares = settle(low, high, certain, unclear, exact)
    spans = attention.key_spans.diff(dim=-1).squeeze(-1)
    # Computed for all blocks: assigning the last one's number of rows would copy it from the host and synchronise.
    starts = kernels.BLOCK_ROWS * torch.arange(spans.shape[1], device=spans.device)
    rows = (attention.length - starts).clamp(max=kernels.BLOCK_ROWS)
    per_neuron = (spans * rows).sum(1)
    for name, part in zip(logit_changes, layout.split(unclear), strict=True):
        work[name].neurons += part.sum()
        work[name].all_neurons += part.numel()
        work[name].logits += (part.sum(1) * per_neuron).sum()
        work[name].all_logits += part.numel() * attention.length**2
        work[name].rough_logits += part.shape[1] * per_neuron.sum()
    return dict(zip(logit_changes, layout.split(squares.sqrt().float()), strict=True))
