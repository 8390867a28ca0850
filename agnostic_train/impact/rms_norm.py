"""How zeroing one entry changes the others under a root-mean-square norm: they all grow by the same factor.

The change of the logits therefore keeps a closed form if queries and keys are normalised per head (Qwen3, Gemma 3): the
logits grow by that factor, minus the rank-two contribution of the zeroed entry.
"""

import torch
from torch import Tensor, nn

# The closed form subtracts from grown logits, so growth multiplies their rounding error: at a growth of 1000, float32
# is off by 1e-4 of an impact. Only a head in which one entry holds all but a millionth of the squares' sum grows more.
MAX_GROWTH = 1000.0
_NAMES_OF_EPS = ("variance_epsilon", "eps")


def rms_eps(norm: nn.Module, size: int, like: Tensor) -> float | None:
    """Returns the epsilon of a norm that computes `x / sqrt(mean(x^2) + eps) * gain`; None for any other module.

    The module is tested on vectors of size `size`, of the dtype and device of `like`.
    """
    eps = next((getattr(norm, name) for name in _NAMES_OF_EPS if hasattr(norm, name)), None)
    if not isinstance(eps, float):
        return None
    ones = torch.ones(size, dtype=like.dtype, device=like.device)
    # Small vectors reveal the epsilon; a larger first entry reveals whether a mean is subtracted.
    probes = torch.arange(1, size + 1, device=like.device).to(like.dtype).cos() * eps**0.5
    probes = torch.stack([probes, 1e3 * probes, 1e6 * probes, ones])
    probes[:, 0] *= 3
    expected = probes * (probes.square().mean(-1, keepdim=True) + eps).rsqrt() * norm(ones) * (1 + eps) ** 0.5
    actual = norm(probes)
    return eps if actual.dtype == expected.dtype and torch.allclose(actual, expected, rtol=1e-4, atol=0) else None


def growth_without(heads: Tensor, eps: float) -> Tensor:
    """The factor by which the other entries grow when one is zeroed before the norm: at least 1, shaped like `heads`.

    heads: (..., head_dim), a projection's output, at least float32.
    """
    # If one entry holds nearly the whole sum, the rest is a difference that float32 would lose.
    squares = heads.double().square()
    total = squares.sum(-1, keepdim=True)
    eps = eps * heads.shape[-1]
    return ((total + eps) / ((total - squares).clamp_(min=0) + eps)).sqrt_().to(heads.dtype)
