"""Percentile bootstrap over sentences: how much a number would vary on other text of the same kind."""

import torch
from torch import Tensor


def resample_counts(num_items: int, count: int, seed: int) -> Tensor:
    """How often each of some items is drawn, with replacement: (count, items), float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_items, (count, num_items), generator=generator, device="cpu")
    return torch.zeros_like(drawn, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )


def interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of resampled values (count,)."""
    tail = (1 - level) / 2
    # A resample may contain no token to score, and then has no perplexity.
    low, high = torch.nanquantile(values, values.new_tensor([tail, 1 - tail])).tolist()
    return low, high
