"""What training changed: rows and columns to add to a base model's weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from agnostic_train.errors import UserError
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.chosen import chosen_entries
from agnostic_train.training.compact import NeuronConfig, NeuronLinear

KEY_PREFIX = "base_model.model."
"""What PEFT puts before the names of the base model's modules."""


@dataclass(frozen=True)
class Delta:
    """What to add to chosen rows (dim 0) or columns (dim 1) of one weight.

    index: int64, sorted, unique. values: (rows, in) or (out, columns), made float32 if they are less.
    """

    dim: int
    index: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        object.__setattr__(self, "values", self.values.to(dtype))

    def fits(self, weight: Tensor) -> bool:
        """Whether it can have been trained beside this weight."""
        return (
            len(self.index) > 0
            and self.index.shape == (self.values.shape[self.dim],)
            and self.values.shape[1 - self.dim] == weight.shape[1 - self.dim]
            and 0 <= int(self.index.min()) <= int(self.index.max()) < weight.shape[self.dim]
        )

    def added_to(self, weight: Tensor) -> Tensor:
        """The changed weight, in float32 or better: whoever needs less rounds once."""
        values = self.values.to(weight.device, torch.promote_types(weight.dtype, self.values.dtype))
        return weight.to(values.dtype).index_add(self.dim, self.index.to(weight.device), values)


def plain_model(model: nn.Module) -> nn.Module:
    """The model without PEFT's outer shells; its adapters' layers stay in it.

    Raises:
        UserError: adapters that aren't ours, several active ones, merged or disabled ones.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, NeuronLinear):
            raise UserError(
                f"model: {name} has {type(module).__name__} adapters beside it; merge them first (merge_and_unload)"
            )
        if module.merged:
            raise UserError("model: its adapter is merged into the weights; take it out first (unmerge_adapter)")
        if module.disable_adapters:
            raise UserError("model: its adapter is disabled; enable it first (enable_adapter_layers)")
        if sum(adapter in module.neuron_delta for adapter in module.active_adapters) > 1:
            raise UserError("model: several adapters are active; choose one (set_adapter)")
    return model


@torch.no_grad()
def adapter_deltas(model: nn.Module) -> dict[str, Delta]:
    """What the active neuron adapter adds, by module name; empty for a model without one."""
    deltas = {}
    for name, module in plain_model(model).named_modules():
        if isinstance(module, NeuronLinear):
            for adapter in module.active_adapters:
                if adapter in module.neuron_delta:
                    values = module.neuron_delta[adapter].detach()
                    deltas[name] = Delta(module.dim, module.neuron_index[adapter], values)
    return deltas


@torch.no_grad()
def weight_deltas(model: nn.Module, base: nn.Module, neurons: NeuronSet) -> dict[str, Delta]:
    """What a plain model differs in from its base, at the neurons that were trained."""
    weights, deltas = dict(base.named_modules()), {}
    for name, chosen in chosen_entries(model, neurons).items():
        weight = chosen.linear.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        before = weights[name].weight.to(weight.device, dtype).index_select(chosen.dim, chosen.index)
        after = weight.to(dtype).index_select(chosen.dim, chosen.index)
        deltas[name] = Delta(chosen.dim, chosen.index, after - before)
    return deltas


def read_deltas(directory: str | Path) -> tuple[dict[str, Delta], str | None]:
    """A saved adapter's deltas by module name, and the name or folder of the base that it was trained on.

    Raises:
        UserError: the folder holds no neuron adapter, or a broken one.
    """
    file = Path(directory) / SAFETENSORS_WEIGHTS_NAME
    try:
        config = PeftConfig.from_pretrained(str(directory))
        if not isinstance(config, NeuronConfig):
            raise UserError(f"{directory}: an adapter, but a {config.peft_type.value} one; merge it with its own tools")
        tensors = load_file(file)
        dims = dict.fromkeys(config.rows, 0) | dict.fromkeys(config.columns, 1)
        deltas = {
            name: Delta(dim, tensors[f"{KEY_PREFIX}{name}.neuron_index"], tensors[f"{KEY_PREFIX}{name}.neuron_delta"])
            for name, dim in dims.items()
        }
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{directory}: no readable neuron adapter ({shorten(str(error), 200)}); a plain checkpoint is given as a loaded model"
        ) from None
    return deltas, config.base_model_name_or_path


def add_deltas(weights: Mapping[str, Tensor], deltas: Mapping[str, Delta]) -> Iterator[tuple[str, Tensor]]:
    """The weights by name, with the deltas added; what has no delta is the same tensor.

    A sum is made when it is asked for, and kept by nobody here: those of a large model take more than the model.

    Raises:
        UserError: deltas of another model, before anything is yielded.
    """
    by_name = {f"{module}.weight": delta for module, delta in deltas.items()}
    for name, delta in by_name.items():
        if name not in weights or not delta.fits(weights[name]):
            raise UserError(
                f"base: {name} is missing there or has another shape; give the base that the adapter was trained on"
            )
    for name, weight in weights.items():
        yield name, by_name[name].added_to(weight) if name in by_name else weight
