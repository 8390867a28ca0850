"""Whether the Triton kernels work on a device: each is compared once with its definition before use."""

from functools import cache

import torch
from torch import Tensor
from transformers.utils import logging

from agnostic_train.impact.intervals import KEPT_LENGTHS, Intervals
from agnostic_train.impact.kernels import MAX_HEAD_DIM, key_spans, squared_changes, triton

# Largest accepted relative error of the exact kernel; plain `tf32` instead of `tf32x3` would exceed it.
_TOLERANCE = 1e-4
_NUM_HEADS = 2
# How much shorter than the longest sentences of a kind the trial's are: not a multiple of a warp.
_SHORTER = 26
_SOFTCAP = 3.0

logger = logging.get_logger(__name__)


def available(value: Tensor, grows: bool = False, capped: bool = False) -> bool:
    """Whether the kernels support values like these, (heads, length, head_dim); if not, use the torch form.

    grows, capped: how logits change.
    """
    return (
        triton is not None
        and value.is_cuda
        and value.dtype == torch.float32
        and value.shape[-1] <= MAX_HEAD_DIM
        and torch.version.hip is None
        and torch.cuda.get_device_capability(value.device) >= (8, 0)
        and _work_on(value.device, value.shape[2], _trial_length(value.shape[1], grows or capped), grows, capped)
    )


def _trial_length(length: int, only_looped: bool) -> int:
    """A length for which the kernels are compiled as for `length`.

    only_looped: whether no length is kept in registers, so that all are compiled alike.
    """
    longest = next((it for it in KEPT_LENGTHS if length <= it and not only_looped), KEPT_LENGTHS[-1] + 64)
    return longest - _SHORTER


@cache
def _work_on(device: torch.device, head_dim: int, length: int, grows: bool, capped: bool) -> bool:
    """Tries both kernels on the device; if they can't be used, a log line says why.

    Triton needs a C compiler, Python's headers and CUDA's library, which some machines lack, and it may not support a
    GPU that is newer than itself.
    """
    try:
        problem = None if _are_right(device, head_dim, length, grows, capped) else "their results are wrong there"
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # these say nothing about the kernels
    # Missing parts cause many kinds of errors, including AssertionError; the torch form needs none of these parts.
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        logger.warning(
            "the Triton kernels can't be used on %s for heads of %d and sentences like those of %d tokens (%s): "
            "q and k impacts take longer", device, head_dim, length, problem,
        )  # fmt: skip
    return problem is None


def _are_right(device: torch.device, head_dim: int, length: int, grows: bool, capped: bool) -> bool:
    """Compares both kernels with float64 on random attention; synchronises with the device."""
    softcap = _SOFTCAP if capped else None
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(device)

    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    products, value = random(_NUM_HEADS, length, length), random(_NUM_HEADS, length, head_dim)
    weight = torch.ones_like(value[..., 0])
    factors = [random(_NUM_HEADS, length, head_dim) for _ in range(4)]
    growths = [1 + 0.1 * random(_NUM_HEADS, length, head_dim).abs() for _ in range(2 if grows else 0)]
    spans = key_spans(visible.expand(1, 1, -1, -1))

    def seen(logits: Tensor) -> Tensor:
        """The softmax's input."""
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        return logits.masked_fill(~visible, -torch.inf)

    before = products.double()
    squares = []
    for a, b, c, d, *growth in zip(*(it.double().unbind(2) for it in (*factors, *growths)), strict=True):
        after = before * growth[0].unsqueeze(2) * growth[1].unsqueeze(1) if grows else before
        after = after - a.unsqueeze(2) * b.unsqueeze(1) - c.unsqueeze(2) * d.unsqueeze(1)
        moved = (seen(after).softmax(-1) - seen(before).softmax(-1)) @ value.double()
        squares.append(moved.square().sum((1, 2)))
    expected = torch.stack(squares, 1)

    changed = products.masked_fill(~visible, -torch.inf)
    exact = squared_changes(changed, value, weight, factors, spans, growths=growths, softcap=softcap)
    close = (exact - expected).abs() <= _TOLERANCE * expected
    if grows and capped:  # which intervals don't support
        return bool(close.all())
    logits, largest = seen(products), products.abs().amax((1, 2))
    low, high = Intervals(logits, logits.softmax(-1), value, weight, spans, largest, softcap).around(factors, growths)
    enclosed = (low <= expected * (1 + _TOLERANCE)) & (expected <= high * (1 + _TOLERANCE))
    return bool((close & enclosed).all())
