"""Linear layer with a frozen weight and a trainable delta for some rows or columns, as one autograd function.

In full precision, the delta is added to the weight itself for the duration of one matrix product, so that outputs and
input gradients take no more matrix products than without an adapter. In half precision, this would round the delta
away: the product with the delta is computed separately and added in place.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

_FULL_PRECISION = (torch.float32, torch.float64)
# Without the lock, a second thread could save the first thread's sum as the original weight, and restore that.
_ONE_AT_A_TIME = Lock()


def can_fuse(base_layer: nn.Module, delta: Tensor, x: Tensor) -> bool:
    """Returns whether `neuron_product` can replace the base layer plus the separate product with the delta.

    This requires a plain `nn.Linear` without hooks and a trainable delta; frozen adapters are excluded because several
    threads may share one. Under `torch.compile`, which fuses the plain form itself, and `torch.func`, which can
    differentiate only the plain form, the answer is False.
    """
    # Checked first: the compiler can't trace the checks below.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if type(base_layer) is not nn.Linear or type(base_layer.weight) is not nn.Parameter:
        return False
    weight, bias = base_layer.weight, base_layer.bias
    if not (torch.is_grad_enabled() and delta.requires_grad) or weight.requires_grad:
        return False
    if bias is not None and (bias.requires_grad or bias.dtype != weight.dtype):
        return False
    # Other processes may read a weight in shared memory at any time.
    if weight.device.type == "meta" or (weight.device.type == "cpu" and weight.is_shared()):
        return False
    if _hooked(base_layer) or not weight.device == x.device == delta.device:
        return False
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return weight.dtype == dtype


def neuron_product(x: Tensor, base_layer: nn.Linear, delta: Tensor, index: Tensor, dim: int) -> Tensor:
    """Computes `F.linear(x, weight + delta at index, bias)`, differentiable once with respect to x and delta.

    Several threads may call it concurrently, but no thread may read the weight in any other way meanwhile.

    Args:
        x: (..., in).
        delta: (rows, in) for dim 0, (out, columns) for dim 1; float32 or float64.
        index: int64, sorted, unique.

    Returns: (..., out), in the weight's dtype.
    """
    kind = x.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        x = x.to(base_layer.weight.dtype)
        return _NeuronProduct.apply(x, base_layer.weight, base_layer.bias, delta, index, dim)


def _hooked(module: nn.Module) -> bool:
    # Accelerate's hooks replace `forward` on the instance.
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds) or "forward" in vars(module) or _has_any_global_hook()


class _NeuronProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, index: Tensor, dim: int
    ) -> Tensor:
        ctx.dim = dim
        # The gradient of the chosen columns needs only these columns of x.
        seen = x if dim == 0 else _columns(x, index)
        ctx.save_for_backward(seen, weight, delta, index)
        if _in_place(weight, delta):
            with _summed(weight, delta, index, dim):
                return F.linear(x, weight, bias)
        y, low = F.linear(x, weight, bias), delta.to(x.dtype)
        return y.index_add_(-1, index, F.linear(seen, low)) if dim == 0 else _add_product(y, seen, low.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
        seen, weight, delta, index = ctx.saved_tensors
        grad_x = grad_delta = None
        grad_chosen = _columns(grad, index) if ctx.dim == 0 else grad
        if ctx.needs_input_grad[0]:
            if _in_place(weight, delta):
                with _summed(weight, delta, index, ctx.dim):
                    grad_x = grad @ weight
            else:
                grad_x, low = grad @ weight, delta.to(grad.dtype)
                if ctx.dim == 0:
                    _add_product(grad_x, grad_chosen, low)
                else:
                    grad_x.index_add_(-1, index, grad_chosen @ low)
        if ctx.needs_input_grad[3]:
            grad_delta = (_by_token(grad_chosen).T @ _by_token(seen)).to(delta.dtype)
        return grad_x, None, None, grad_delta, None, None


def _columns(values: Tensor, index: Tensor) -> Tensor:
    # On the CPU, `index_select` along the last dimension runs on a single thread.
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


def _add_product(values: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Adds `left @ right` to values in place; the matrix product itself adds, before it rounds."""
    values.view(values.shape[:-1].numel(), values.shape[-1]).addmm_(_by_token(left), right)
    return values


def _by_token(values: Tensor) -> Tensor:
    return values.reshape(values.shape[:-1].numel(), values.shape[-1])


def _in_place(weight: Tensor, delta: Tensor) -> bool:
    return weight.dtype == delta.dtype and weight.dtype in _FULL_PRECISION


@contextmanager
def _summed(weight: Tensor, delta: Tensor, index: Tensor, dim: int) -> Iterator[None]:
    """Adds the delta to the weight inside the `with` block, and restores the weight bit for bit afterwards."""
    # `.data` bypasses autograd's version counter: tensors saved for backward stay valid, since the weight is restored.
    weight = weight.data
    with _ONE_AT_A_TIME:
        own = weight.index_select(0, index) if dim == 0 else _columns(weight, index)
        try:
            weight.index_copy_(dim, index, own + delta)
            yield
        finally:
            weight.index_copy_(dim, index, own)
