"""The tuner layer: a frozen linear layer plus trainable deltas for some of its rows or columns."""

import copy
import warnings
from collections.abc import Sequence

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F

from agnostic_train.training.compact.product import can_fuse, neuron_product


class NeuronLinear(nn.Module, BaseTunerLayer):
    """Wraps a linear layer and adds the active adapters' deltas for its chosen rows or columns.

    For chosen rows (dim 0): `y[..., index] += x @ delta.T`, delta of shape (rows, in). For chosen columns (dim 1):
    `y += x[..., index] @ delta.T`, delta of shape (out, columns). Deltas are float32, or float64 for a float64 base.

    While an adapter trains on float32 or float64 weights, each matrix product temporarily adds the delta to the base
    weight itself: evaluate or save such a model only in the thread that trains it. A frozen adapter never modifies the
    weight.

    Args:
        base_layer: an `nn.Linear`, quantised or not.
        dim: the dimension of the weight along which neurons are counted.
    """

    adapter_layer_names = ("neuron_delta",)
    other_param_names = ("neuron_index",)

    def __init__(self, base_layer: nn.Module, dim: int):
        super().__init__()
        self.base_layer = base_layer
        self.dim = dim
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.neuron_delta = nn.ParameterDict()
        self.neuron_index = BufferDict(persistent=True)
        self.cast_input_dtype_enabled = True  # PEFT's `disable_input_dtype_casting` sets it on every layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before_merge: list[Tensor] = []
        self._backend = resolve_quantization_backend(base_layer)

    def add(self, adapter_name: str, index: Tensor) -> None:
        """Adds a zero-initialised adapter for the rows or columns at `index` (int64, sorted, unique)."""
        weight = self.base_layer.weight
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        shape = (len(index), self.in_features) if self.dim == 0 else (self.out_features, len(index))
        self.neuron_delta[adapter_name] = nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))
        self.neuron_index[adapter_name] = index.to(weight.device)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adding = not (self.disable_adapters or self.merged)
        names = [name for name in self.active_adapters if name in self.neuron_delta] if adding else []
        plain = not args and not kwargs and len(names) == 1
        if plain and can_fuse(self.base_layer, self.neuron_delta[names[0]], x):
            return neuron_product(
                x, self.base_layer, self.neuron_delta[names[0]], self.neuron_index[names[0]], self.dim
            )
        y = self.base_layer(x, *args, **kwargs)
        for name in names:
            delta, index = self.neuron_delta[name].to(x.dtype), self.neuron_index[name]
            if self.dim == 0:
                y = y.index_add(-1, index, F.linear(x, delta).to(y.dtype))
            else:
                y = y + F.linear(x.index_select(-1, index), delta).to(y.dtype)
        return y

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves an adapter as PEFT's method does, but preserves the delta's dtype and `requires_grad`."""
        delta = self.neuron_delta.get(adapter_name)
        if delta is None or delta.is_meta:
            return
        device = self.base_layer.weight.device if device is None else device
        if delta.device != device:
            self.neuron_delta[adapter_name] = nn.Parameter(delta.data.to(device), requires_grad=delta.requires_grad)
        self.neuron_index[adapter_name] = self.neuron_index[adapter_name].to(device)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns what an adapter adds to the weight, as a dense (out, in) tensor."""
        delta = self.neuron_delta[adapter]
        dense = torch.zeros(self.out_features, self.in_features, dtype=delta.dtype, device=delta.device)
        return dense.index_copy(self.dim, self.neuron_index[adapter], delta.detach())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Returns False: PEFT converts by truncated SVD, whereas `export_checkpoint(to="lora")` is exact."""
        return False

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Merges adapters into the base weight; each sum is rounded once to the weight's dtype.

        Args:
            safe_merge: raise an error instead of merging an adapter whose sums aren't all finite.
            adapter_names: the adapters to merge; the active ones by default.

        Raises:
            ValueError: with `safe_merge`, if a sum isn't finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.neuron_delta:
                continue
            delta, index = self.neuron_delta[name], self.neuron_index[name]
            weight = self.base_layer.weight if self._backend is None else self._backend.get_base_weight(self.base_layer)
            before = weight.index_select(self.dim, index)
            merged = before + delta
            if safe_merge and not merged.isfinite().all():
                # Same message as PEFT's own tuners.
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            # Keep the whole quantised weight: quantising again at unmerge would not restore the same bits.
            self._before_merge.append(before if self._backend is None else copy.deepcopy(self.base_layer.weight))
            weight.index_copy_(self.dim, index, merged.to(weight.dtype))
            if self._backend is not None:
                self._backend.set_base_weight(self, weight)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the base weight's original values, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name, before, weight = self.merged_adapters[-1], self._before_merge[-1], self.base_layer.weight
            if self._backend is None:
                weight.index_copy_(self.dim, self.neuron_index[name], before.to(weight))
            else:
                self.base_layer.weight = before.to(weight.device)
            self.merged_adapters.pop()
            self._before_merge.pop()

    def __repr__(self) -> str:
        return "neuron." + super().__repr__()
