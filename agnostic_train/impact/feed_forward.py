"""Impact of feed-forward neurons: their change is rank one, so its norm factors (Chen et al. 2025, Eq. 8)."""

import torch
from torch import Tensor

from agnostic_train.impact.tokens import without_tokens


def column_norms(values: Tensor, counted: Tensor) -> Tensor:
    """L2 norm of each column over a sentence's counted tokens.

    Args:
        values: (batch, length, size), any floating dtype; other tokens are ignored, even if they hold NaN.
        counted: (batch, length), bool.

    Returns: (batch, size), float32.
    """
    return _norms(without_tokens(values, ~counted), 1)


def weight_norms(weight: Tensor) -> Tensor:
    """L2 norm of each column of an `nn.Linear` weight (out, in): (in,), float32."""
    return _norms(weight, 0)


def _norms(values: Tensor, dim: int) -> Tensor:
    dtype = torch.promote_types(values.dtype, torch.float32)
    if values.device.type == "cpu":
        # On a CPU, torch's norm over any dimension but the last takes six times as long.
        return values.to(dtype).square().sum(dim).sqrt_().float()
    return torch.linalg.vector_norm(values, dim=dim, dtype=dtype).float()


def hidden_unit_impacts(hidden: Tensor, down_norms: Tensor, counted: Tensor) -> Tensor:
    """Impact of each hidden unit k, and so of gate, up and down neuron k: `||H[:, k]|| * ||W_down[:, k]||`.

    Args:
        hidden: the input of `down_proj`, (batch, length, intermediate).
        down_norms: `weight_norms` of `down_proj`, (intermediate,).
        counted: (batch, length), bool.

    Returns: (batch, intermediate), float32.
    """
    return column_norms(hidden, counted) * down_norms
