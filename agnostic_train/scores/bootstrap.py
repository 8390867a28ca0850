"""Percentile bootstrap over sentences or items: how much a number would vary on others of the same kind."""

from collections.abc import Iterator

import torch
from torch import Tensor

_AT_ONCE = 500
_MAX_COUNTS = 2**23  # float64: 64 MiB


def resample_counts(num_items: int, count: int, seed: int) -> Tensor:
    """Draws with replacement; returns how often each item is drawn: (count, num_items), float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_items, (count, num_items), generator=generator, device="cpu")
    one = drawn.new_ones((), dtype=torch.float64)
    return torch.zeros_like(drawn, dtype=torch.float64).scatter_add_(1, drawn, one.expand_as(drawn))


def resample_chunks(num_items: int, num_resamples: int, seed: int, at_once: int) -> Iterator[Tensor]:
    """Yields `resample_counts` of all resamples, at most `at_once` at a time, and fewer if there are many items.

    Each resample has a count for every item: all at once could take gigabytes. Each chunk has a seed of its own, from
    `seed` to `seed + num_resamples - 1`: for independent draws, seeds must be that far apart.
    """
    at_once = max(1, min(at_once, _MAX_COUNTS // num_items))
    for start in range(0, num_resamples, at_once):
        yield resample_counts(num_items, min(at_once, num_resamples - start), seed + start)


def resampled_sums(values: Tensor, num_resamples: int, seed: int) -> Tensor:
    """Sums of values over resampled items.

    values: (items, columns), float64; all columns get the same draw.

    Returns: (resamples, columns), float64.
    """
    return torch.cat([counts @ values for counts in resample_chunks(len(values), num_resamples, seed, _AT_ONCE)])


def interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The central interval that contains a fraction `level` of resampled values, (count,)."""
    tail = (1 - level) / 2
    # A resample without a scored token has no perplexity: its value is NaN.
    low, high = torch.nanquantile(values, values.new_tensor([tail, 1 - tail])).tolist()
    return low, high
