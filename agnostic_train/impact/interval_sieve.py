"""Certified pruning on a GPU: intervals around all q and k impacts, and exact impacts where the intervals don't decide.

A neuron whose upper end lies below the n-th largest lower end of its sentence can't be among the n largest impacts. A
neuron whose lower end lies above the (n + 1)-th largest upper end must be among them. Only the neurons in between are
computed exactly. The host waits for the device only if all neurons are sought, to check the intervals.
"""

from collections.abc import Mapping

from torch import Tensor

from agnostic_train.impact import kernels
from agnostic_train.impact.attention import LogitChange
from agnostic_train.impact.intervals import Intervals
from agnostic_train.impact.layer_attention import LayerAttention
from agnostic_train.impact.pruning import Work, check_enclosed, decide, num_top, settle


def interval_impacts(
    attention: LayerAttention,
    logit_changes: Mapping[str, LogitChange],
    top_ratio: float,
) -> dict[str, tuple[Tensor, Work]]:
    """Impacts of one layer that tell each sentence's top q and k neurons; needs the kernels.

    Args:
        attention: the layer's attention for a batch.
        logit_changes: by `q` and `k`, or one of them, how each neuron changes the logits.
        top_ratio: fraction of a site's neurons to find. At 1 every impact is exact, and the intervals are checked
            against the exact impacts.

    Returns: by `q` and `k`, the impacts, (batch, neurons), float32, and the work done. The impacts are the middle of
        the interval for neurons that are certainly in the top, zero for those that certainly aren't, and exact for the
        others.

    Raises:
        UserError: an exact impact lies outside its interval.
    """
    intervals = Intervals(
        attention.logits,
        attention.probabilities,
        attention.value,
        attention.counted,
        attention.inputs.visibility.key_spans,
        attention.largest_logits,
        attention.softcap,
    )
    return {name: _impacts(name, attention, intervals, change, top_ratio) for name, change in logit_changes.items()}


def _impacts(
    name: str, attention: LayerAttention, intervals: Intervals, change: LogitChange, top_ratio: float
) -> tuple[Tensor, Work]:
    """`interval_impacts` of q or k."""
    factors = [part.flatten(0, 1) for part in change.factors]
    growths = [part.flatten(0, 1) for part in change.growths()]
    low, high = (attention.summed_over_heads(name, it) for it in intervals.around(factors, growths))
    certain, unclear = decide(low, high, num_top(top_ratio, low.shape[1]))
    num_own_heads = attention.num_own_heads(name)
    chosen = unclear.unflatten(1, (num_own_heads, 1, -1)).expand(-1, -1, attention.num_heads // num_own_heads, -1)
    exact = kernels.squared_changes(
        attention.changed_logits,
        intervals.centred_value,
        attention.counted,
        factors,
        attention.inputs.visibility.key_spans,
        chosen.flatten(0, 2),
        growths,
        attention.softcap,
    )
    exact = attention.summed_over_heads(name, exact)
    if top_ratio == 1:
        check_enclosed(exact, low, high)
    num_unclear, num_spanned = unclear.sum(1), attention.inputs.visibility.num_spanned
    work = Work(
        neurons=num_unclear.sum(),
        all_neurons=unclear.numel(),
        logits=(num_unclear * num_spanned).sum(),
        all_logits=unclear.numel() * attention.length**2,
        rough_logits=unclear.shape[1] * num_spanned.sum(),
    )
    return settle(low, high, certain, exact).sqrt().float(), work
