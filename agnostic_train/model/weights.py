"""Bit patterns of a model's weights, for exact comparison, and a checksum of the weights."""

import json
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from agnostic_train.fingerprints import fingerprint

_ENTRIES_AT_ONCE = 1 << 18
"""The products of as many entries fit into a CPU's cache."""
DEACTIVATED_BY_HOOKS = "_deactivated_by_hooks"
"""The attribute of a linear whose neurons are deactivated by hooks: their dimension and indices, for each hook."""


def bit_patterns(values: Tensor) -> Tensor:
    """Views values as signed integers of the same size: NaN then equals NaN, and 0 differs from -0."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(integers[values.element_size()])


@torch.no_grad()
def weights_checksum(model: nn.Module) -> str:
    """Returns a checksum that changes with a training step, the active adapters and neurons that are switched off.

    It doesn't change with the device.

    Offloaded weights, which are on no device, are left out.
    """
    sums = [
        [name, list(value.shape), _sums(bit_patterns(value))]
        for name, value in chain(model.named_parameters(), model.named_buffers())
        if not value.is_meta and not value.is_complex()
    ]
    adapters = [
        [name, module.active_adapters, module.disable_adapters, str(getattr(module, "scaling", None))]
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "disable_adapters")
    ]
    off = deactivated_by_hooks(model)
    return fingerprint([sums, adapters, *off] if adapters or off else sums)


def deactivated_by_hooks(model: nn.Module) -> list:
    """Returns which neurons hooks of `deactivate` zero now: module name, dimension and indices of each hook."""
    return [[name, *it] for name, module in model.named_modules() for it in getattr(module, DEACTIVATED_BY_HOOKS, [])]


def model_checksum(model: nn.Module) -> str:
    """Returns a checksum of the weights and of the config, which determines what the model computes with them."""
    config: Any = getattr(model, "config", None)
    settings = {} if config is None else config.to_dict()
    settings.pop("_name_or_path", None)
    return fingerprint([weights_checksum(model), json.dumps(settings, sort_keys=True, default=str)])


def _sums(values: Tensor) -> list[int]:
    """Returns, for each part of the values, their sum weighted by position, so that the order of rows counts.

    The parts bound the memory of the products, which are int64.
    """
    if not values.numel():
        return []
    positions = torch.arange(1, 1 + min(_ENTRIES_AT_ONCE, values.numel()), device=values.device)
    parts = values.flatten().split(_ENTRIES_AT_ONCE)
    # One transfer: each synchronises with the device.
    return torch.stack([(part * positions[: len(part)]).sum() for part in parts]).tolist()
