"""Deltas: the changes made by training, as rows and columns to add to a base model's weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from agnostic_train.errors import UserError
from agnostic_train.model.weights import deactivated_by_hooks
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.chosen import check_not_compiled, chosen_entries
from agnostic_train.training.compact import NeuronConfig, NeuronLinear

KEY_PREFIX = "base_model.model."
"""The prefix that PEFT adds to the base model's module names."""


@dataclass(frozen=True)
class Delta:
    """Values to add to chosen rows (dim 0) or columns (dim 1) of one weight.

    Attributes:
        index: int64, sorted, unique.
        values: (rows, in) or (out, columns); lower precisions are converted to float32.
    """

    dim: int
    index: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        object.__setattr__(self, "values", self.values.to(dtype))

    def fits(self, weight: Tensor) -> bool:
        """Returns whether the shape and indices match this weight."""
        return (
            len(self.index) > 0
            and self.index.shape == (self.values.shape[self.dim],)
            and self.values.shape[1 - self.dim] == weight.shape[1 - self.dim]
            and 0 <= int(self.index.min()) <= int(self.index.max()) < weight.shape[self.dim]
        )

    def added_to(self, weight: Tensor) -> Tensor:
        """Returns the changed weight in float32 or float64, so that callers round only once."""
        values = self.values.to(weight.device, torch.promote_types(weight.dtype, self.values.dtype))
        return weight.to(values.dtype).index_add(self.dim, self.index.to(weight.device), values)


def plain_model(model: nn.Module) -> nn.Module:
    """Returns the model inside the wrappers of PEFT, `torch.compile` and data parallelism; adapter layers remain.

    Raises:
        UserError: an adapter isn't a neuron adapter, is merged or disabled, several are active, or single layers are
            compiled, or neurons are switched off.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    check_not_compiled(model)
    if deactivated_by_hooks(model):
        raise UserError("model: some of its neurons are switched off; end the block of `deactivate` first")
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, NeuronLinear):
            raise UserError(f"model: {name} has {type(module).__name__} adapters; merge them first (merge_and_unload)")
        if module.merged:
            raise UserError("model: its adapter is merged into the weights; unmerge it first (unmerge_adapter)")
        if module.disable_adapters:
            raise UserError("model: its adapter is disabled; enable it first (enable_adapter_layers)")
        if sum(adapter in module.neuron_delta for adapter in module.active_adapters) > 1:
            raise UserError("model: several adapters are active; choose one (set_adapter)")
    return model


@torch.no_grad()
def adapter_deltas(model: nn.Module) -> dict[str, Delta]:
    """Returns the active neuron adapter's deltas by module name; empty for a model without an adapter."""
    deltas = {}
    for name, module in plain_model(model).named_modules():
        if isinstance(module, NeuronLinear):
            for adapter in module.active_adapters:
                if adapter in module.neuron_delta:
                    values = module.neuron_delta[adapter].detach()
                    deltas[name] = Delta(module.dim, module.neuron_index[adapter], values)
    return deltas


@torch.no_grad()
def weight_deltas(
    model: nn.Module, base: nn.Module, neurons: NeuronSet, adapter: Mapping[str, Delta]
) -> dict[str, Delta]:
    """Returns the differences between a trained model and its base at the trained neurons, by module name.

    adapter: the model's own deltas, of some of these neurons; added to what its frozen weights differ by. Their
        rounding to the model's dtype isn't part of the difference then, as in an adapter alone.
    """
    weights, deltas = dict(base.named_modules()), {}
    for name, chosen in chosen_entries(model, neurons).items():
        weight = chosen.linear.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        before = weights[name].weight.to(weight.device, weight.dtype if adapter else dtype).to(dtype)
        before = before.index_select(chosen.dim, chosen.index)
        difference = weight.to(dtype).index_select(chosen.dim, chosen.index) - before
        if name in adapter:
            held = adapter[name]
            places = torch.searchsorted(chosen.index, held.index.to(chosen.index.device))
            difference.index_add_(chosen.dim, places, held.values.to(difference))
        deltas[name] = Delta(chosen.dim, chosen.index, difference)
    return deltas


def read_deltas(directory: str | Path) -> tuple[dict[str, Delta], NeuronConfig]:
    """Reads a saved adapter: its deltas by module name, and its configuration, which may name the base model.

    Raises:
        UserError: the folder is missing, or has no neuron adapter, or a damaged one.
    """
    file = Path(directory) / SAFETENSORS_WEIGHTS_NAME
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: no such folder")
    try:
        config = PeftConfig.from_pretrained(str(directory))
        if not isinstance(config, NeuronConfig):
            raise UserError(
                f"{directory}: holds a {config.peft_type.value} adapter, not a neuron adapter; merge it with PEFT"
            )
        tensors = load_file(file)
        dims = dict.fromkeys(config.rows, 0) | dict.fromkeys(config.columns, 1)
        deltas = {
            name: Delta(dim, tensors[f"{KEY_PREFIX}{name}.neuron_index"], tensors[f"{KEY_PREFIX}{name}.neuron_delta"])
            for name, dim in dims.items()
        }
        others = sorted(name for name in tensors if not name.endswith((".neuron_index", ".neuron_delta")))
        if others:
            # PEFT also saves embeddings that were resized.
            raise UserError(
                f"{directory}: the adapter came with other weights, such as {others[0].removeprefix(KEY_PREFIX)}; load "
                "it with PEFT onto its base (resized, if the vocabulary was), and export that model"
            )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        remedy = "pass a plain checkpoint as a loaded model"
        named = sorted(it.parent.name for it in Path(directory).glob(f"*/{CONFIG_NAME}"))
        if named:
            remedy = f"adapters with names of their own are in subfolders, such as {named[0]}"
        elif file.with_name(WEIGHTS_NAME).exists():
            remedy = "save it with safe_serialization=True, or pass it loaded"
        raise UserError(f"{directory}: no readable neuron adapter ({shorten(str(error), 200)}); {remedy}") from None
    return deltas, config


def add_deltas(weights: Mapping[str, Tensor], deltas: Mapping[str, Delta]) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights by name, with the deltas added; a weight without a delta is the same tensor.

    Each sum is computed on demand and not kept: all the sums of a large model would need more memory than the model.

    Raises:
        UserError: the deltas belong to another model; raised before the first weight is yielded.
    """
    by_name = {f"{module}.weight": delta for module, delta in deltas.items()}
    for name, delta in by_name.items():
        if name not in weights or not delta.fits(weights[name]):
            raise UserError(
                f"base: {name} is missing or has another shape; give the base that the adapter was trained on"
            )
    for name, weight in weights.items():
        yield name, by_name[name].added_to(weight) if name in by_name else weight
