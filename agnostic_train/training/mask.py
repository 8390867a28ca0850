"""`update="mask"`: gradient masks on the full weights, the exact and simple reference.

It costs what full fine-tuning costs: gradients and optimizer state are as large as the weights that hold a chosen
neuron. Weights without one don't require gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.utils import logging

from agnostic_train.errors import UserError
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.chosen import chosen_entries

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class MaskedParameter:
    """A weight of which only some rows (dim 0) or columns (dim 1) learn.

    chosen: int64 indices along `dim`. frozen: bool, True where an entry must not move, shaped to broadcast over the
    weight. Both on the weight's device.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    chosen: Tensor
    frozen: Tensor

    @property
    def num_chosen(self) -> int:
        """Number of single weights that learn."""
        return len(self.chosen) * self.parameter.numel() // self.parameter.shape[self.dim]


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""The names of `TrainingArguments.optim` that treat each weight on its own, and were tested."""


class GradientMask:
    """Lets only the chosen neurons' rows and columns learn: freezes all else, masks every gradient.

    Biases, norms and embeddings never learn. A mask is a state of the model: `remove()` ends it.

    Args:
        model: its parameters' `requires_grad` are set; gradients are masked as soon as they are accumulated.
        neurons: the neurons to train.

    Raises:
        UserError: no neuron, or neurons of another model.
    """

    def __init__(self, model: nn.Module, neurons: NeuronSet):
        if not len(neurons):
            raise UserError("neurons: the set is empty, there is nothing to train")
        self.model = model
        self.neurons = neurons
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
            # A tensor hook would silently never fire under FSDP2; this one also sees the accumulated gradient.
            self._handles.append(masked.parameter.register_post_accumulate_grad_hook(_zero_frozen(masked.frozen)))

    @property
    def num_trainable(self) -> int:
        """Number of single weights that learn."""
        return sum(masked.num_chosen for masked in self.parameters)

    def guard(self, optimizer: Optimizer) -> None:
        """Keeps the optimizer from moving a frozen entry by weight decay or by momentum of an earlier run.

        Decay is taken out of the optimizer and done on the chosen rows and columns alone, toward zero, in the order
        and arithmetic of the optimizer's own.

        Raises:
            UserError: an optimizer that mixes entries, or whose weight decay isn't known.
        """
        if not isinstance(optimizer, (Adam, AdamW, SGD)):
            name = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
            raise UserError(
                f"training.optim: {name} isn't known to treat each weight on its own, so update='mask' can't promise "
                f"that nothing else moves; use {', '.join(OPTIMIZERS)}"
            )
        decays = {
            id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
        }
        self._guarded.append((optimizer, [group["weight_decay"] for group in optimizer.param_groups]))
        self._take_decay_out(optimizer)
        self._handles += [
            optimizer.register_step_pre_hook(lambda optimizer, *_: self._before_step(optimizer, decays)),
            # A resumed optimizer brings back its own decay, and momentum that may belong to other neurons.
            optimizer.register_load_state_dict_post_hook(self._take_decay_out),
            optimizer.register_load_state_dict_post_hook(self._clean_loaded_state),
        ]

    @staticmethod
    def _take_decay_out(optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0

    def _clean_loaded_state(self, optimizer: Optimizer) -> None:
        for masked in self.parameters:
            for value in optimizer.state.get(masked.parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == masked.parameter.shape:
                    value.masked_fill_(masked.frozen.to(value.device), 0)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, decays: dict[int, float]) -> None:
        for masked in self.parameters:
            if masked.parameter.grad is not None:
                # Clipping came after the mask, and a norm that is NaN makes NaN of frozen entries' zeros too.
                masked.parameter.grad.masked_fill_(masked.frozen, 0)
        self._decay_chosen(optimizer, decays)

    def _decay_chosen(self, optimizer: Optimizer, decays: dict[int, float]) -> None:
        masked_by_id = {id(masked.parameter): masked for masked in self.parameters}
        # A gradient scaler leaves it to a fused optimizer to skip a step that overflowed.
        overflowed = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            # Adam adds decay to the gradient unless told otherwise, AdamW takes it off the weight before its step.
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
                    # An optimizer that maximizes turns the gradient's sign before it adds decay.
                    decay = -decay if group.get("maximize") else decay
                    parameter.grad.index_add_(masked.dim, masked.chosen, values, alpha=decay)

    def remove(self) -> None:
        """Takes all hooks off, and gives parameters their `requires_grad` and optimizers their decay back."""
        for handle in self._handles:
            handle.remove()
        for parameter, requires_grad in self._found:
            parameter.requires_grad_(requires_grad)
        for optimizer, decays in self._guarded:
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay


def masked_parameters(model: nn.Module, neurons: NeuronSet) -> Iterator[MaskedParameter]:
    """The weights that hold a chosen neuron, each with its chosen rows or columns.

    Raises:
        UserError: neurons of another model, or a model with adapters or quantised weights.
    """
    for name, chosen in chosen_entries(model, neurons).items():
        if not isinstance(chosen.linear, nn.Linear) or not chosen.linear.weight.is_floating_point():
            raise UserError(
                f"training.update: 'mask' trains plain weights, and {name} has adapters beside it or is quantised; "
                "use 'compact', or merge the adapters first"
            )
        weight = chosen.linear.weight
        yield MaskedParameter(
            f"{name}.weight", weight, chosen.dim, chosen.index, chosen.frozen(weight.shape[chosen.dim])
        )


def _zero_frozen(frozen: Tensor):
    def zero(parameter: nn.Parameter) -> None:
        # Filled, not multiplied: NaN times zero is NaN.
        parameter.grad.masked_fill_(frozen.to(parameter.grad.device), 0)

    return zero
