"""Percentile bootstrap over sentences: how much a number would vary on other text of the same kind."""

import torch
from torch import Tensor


def resample_counts(num_items: int, count: int, seed: int) -> Tensor:
    """Draws with replacement; returns how often each item is drawn: (count, num_items), float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_items, (count, num_items), generator=generator, device="cpu")
    one = drawn.new_ones((), dtype=torch.float64)
    return torch.zeros_like(drawn, dtype=torch.float64).scatter_add_(1, drawn, one.expand_as(drawn))


def interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The central interval that contains a fraction `level` of resampled values, (count,)."""
    tail = (1 - level) / 2
    # A resample without a scored token has no perplexity: its value is NaN.
    low, high = torch.nanquantile(values, values.new_tensor([tail, 1 - tail])).tolist()
    return low, high
