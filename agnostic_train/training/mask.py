"""Training with `update="mask"`: gradient masks on the full weights, the exact and simple reference.

The cost is close to that of full fine-tuning: every weight with at least one chosen neuron has gradients and optimizer
state of its full size. Weights without a chosen neuron don't require gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.utils import logging

from agnostic_train.errors import UserError
from agnostic_train.model.decoder import is_quantised
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.processes import check_whole
from agnostic_train.training.chosen import chosen_entries

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class MaskedParameter:
    """A weight in which only some rows (dim 0) or columns (dim 1) are trained.

    Attributes:
        chosen: int64 indices along `dim`, on the weight's device.
        frozen: bool, True for entries that must not change; broadcasts over the weight, and is on its device.
    """

    parameter: nn.Parameter
    dim: int
    chosen: Tensor
    frozen: Tensor


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Tested values of `TrainingArguments.optim` whose optimizers update each weight entry independently."""


class GradientMask:
    """Restricts training to the rows and columns of the chosen neurons by masking gradients.

    All other parameters, including biases, norms and embeddings, are frozen. The mask stays on the model until
    `remove()` is called.

    Args:
        model: the model to train; its `requires_grad` flags are set, and each gradient is masked once accumulated.
        neurons: the neurons to train.

    Raises:
        UserError: `neurons` is empty or belongs to another model.
    """

    def __init__(self, model: nn.Module, neurons: NeuronSet):
        if not len(neurons):
            raise UserError("neurons: the set is empty, there is nothing to train")
        check_whole(model, "masking gradients")
        self.parameters = list(masked_parameters(model, neurons))
        self._found = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._handles: list[RemovableHandle] = []
        self._guarded: list[tuple[Optimizer, list[float]]] = []
        if any(masked.parameter.dtype in (torch.float16, torch.bfloat16) for masked in self.parameters):
            logger.warning(
                "update='mask' on half-precision weights: most steps of a usual learning rate round to nothing "
                "(1e-5 leaves 85% of bfloat16 weights unchanged over 100 steps); load the model in float32"
            )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for masked in self.parameters:
            masked.parameter.requires_grad_(True)
            # Under FSDP2 a plain tensor hook silently never fires. This hook also sees the accumulated gradient.
            self._handles.append(masked.parameter.register_post_accumulate_grad_hook(_zero_frozen(masked.frozen)))

    def guard(self, optimizer: Optimizer) -> None:
        """Prevents weight decay and the momentum of an earlier run from changing frozen entries.

        The optimizer's own weight decay is set to zero. Instead, the chosen rows and columns alone are decayed toward
        zero, with the same arithmetic and at the same point of the step as the optimizer would.

        Raises:
            UserError: the optimizer isn't Adam, AdamW or SGD: it may mix entries or decay weights in another way.
        """
        if not isinstance(optimizer, (Adam, AdamW, SGD)):
            name = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
            raise UserError(
                f"training.optim: {name} isn't known to update each weight independently, so update='mask' can't "
                f"guarantee that no other weight changes; use {', '.join(OPTIMIZERS)}"
            )
        decays = {
            id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
        }
        self._guarded.append((optimizer, [group["weight_decay"] for group in optimizer.param_groups]))
        self._take_decay_out(optimizer)
        self._clean_state(optimizer)
        self._handles += [
            optimizer.register_step_pre_hook(lambda optimizer, *_: self._before_step(optimizer, decays)),
            # A loaded state restores the optimizer's own decay, and its momentum may belong to other neurons.
            optimizer.register_load_state_dict_post_hook(self._take_decay_out),
            optimizer.register_load_state_dict_post_hook(self._clean_state),
        ]

    @staticmethod
    def _take_decay_out(optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0

    def _clean_state(self, optimizer: Optimizer) -> None:
        for masked in self.parameters:
            for value in optimizer.state.get(masked.parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == masked.parameter.shape:
                    value.masked_fill_(masked.frozen.to(value.device), 0)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, decays: dict[int, float]) -> None:
        for masked in self.parameters:
            if masked.parameter.grad is not None:
                # Clipping runs after the gradient mask: a NaN norm turns the zeros of frozen entries into NaN as well.
                masked.parameter.grad.masked_fill_(masked.frozen, 0)
        self._decay_chosen(optimizer, decays)

    def _decay_chosen(self, optimizer: Optimizer, decays: dict[int, float]) -> None:
        masked_by_id = {id(masked.parameter): masked for masked in self.parameters}
        # With a gradient scaler, a fused optimizer itself skips a step that overflowed; decay must be skipped too.
        overflowed = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            # By default, Adam adds decay to the gradient, and AdamW subtracts it from the weight before the step.
            decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, AdamW))
            for parameter in group["params"]:
                masked, decay = masked_by_id.get(id(parameter)), decays.get(id(parameter), 0.0)
                if masked is None or not decay or parameter.grad is None:
                    continue
                values = parameter.index_select(masked.dim, masked.chosen)
                if decoupled:
                    decay = group["lr"] * decay
                    if overflowed is not None:
                        decay = decay * (1 - overflowed.to(values))
                    parameter.index_copy_(masked.dim, masked.chosen, values * (1 - decay))
                else:
                    values = values.to(parameter.grad.dtype)
                    # With `maximize`, the optimizer negates the gradient before it adds decay.
                    decay = -decay if group.get("maximize") else decay
                    parameter.grad.index_add_(masked.dim, masked.chosen, values, alpha=decay)

    def remove(self) -> None:
        """Removes all hooks, and restores the parameters' `requires_grad` and the optimizers' weight decay."""
        for handle in self._handles:
            handle.remove()
        for parameter, requires_grad in self._found:
            parameter.requires_grad_(requires_grad)
        for optimizer, decays in self._guarded:
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay


def masked_parameters(model: nn.Module, neurons: NeuronSet) -> Iterator[MaskedParameter]:
    """Yields the weights that contain chosen neurons, each with its chosen rows or columns.

    Raises:
        UserError: the neurons belong to another model, or a chosen weight has adapters or is quantised.
    """
    for name, chosen in chosen_entries(model, neurons).items():
        if not isinstance(chosen.linear, nn.Linear) or is_quantised(chosen.linear.weight):
            raise UserError(
                f"training.update: 'mask' trains plain weights, and {name} has adapters or is quantised; "
                "use 'compact', or merge the adapters first"
            )
        weight = chosen.linear.weight
        yield MaskedParameter(weight, chosen.dim, chosen.index, chosen.frozen(weight.shape[chosen.dim]))


def _zero_frozen(frozen: Tensor):
    def zero(parameter: nn.Parameter) -> None:
        # Fill instead of multiplying by zero: NaN * 0 is NaN.
        parameter.grad.masked_fill_(frozen.to(parameter.grad.device), 0)

    return zero
