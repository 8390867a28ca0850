"""`NeuronTrainer`: a Trainer that trains only the chosen neurons."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from agnostic_train.choices import Update, check_choice
from agnostic_train.errors import UserError
from agnostic_train.model.decoder import check_predicts_tokens, find_decoder
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.callbacks import DetectionCallback
from agnostic_train.training.checkpoints import NEURONS_FILE
from agnostic_train.training.chosen import check_not_compiled, chosen_entries, record_trained
from agnostic_train.training.compact import NeuronConfig, NeuronLinear, adapter_neurons
from agnostic_train.training.guarded import GuardedTrainer
from agnostic_train.training.mask import GradientMask
from agnostic_train.training.strategy import BASELINES, STRATEGIES, Choice

_DEFAULT_ADAPTER = "default"
"""The name that PEFT gives to an adapter by default."""


@dataclass
class NeuronTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the method that updates the chosen neurons.

    Args:
        update: `compact` trains a small adapter of the neurons' rows and columns and keeps the weights frozen; `mask`
            trains the full weights with masked gradients. Without weight decay, the optimizers that both support
            produce the same weights, up to rounding.
        Other arguments: as for `TrainingArguments`.

    Raises:
        UserError: `update` is neither.
    """

    update: Update = field(
        default="compact",
        metadata={
            "help": "How the chosen neurons are trained: 'compact' trains a small adapter of their rows and columns on "
            "top of frozen weights, 'mask' trains the full weights with masked gradients."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("training.update", self.update, Update)


class NeuronTrainer(GuardedTrainer):
    """A `Trainer` that trains only the chosen neurons' rows and columns.

    Biases, norms, embeddings and all unchosen rows and columns stay bit-identical, whatever the optimizer's weight
    decay and momentum. Checkpoints also contain the neurons, and a resumed run reads them from there.

    With `update="compact"`, `trainer.model` is a `PeftModel` that wraps the given model: the chosen rows and columns
    are its only trainable tensors, and checkpoints contain only these. Weight decay pulls them toward the base model's
    values; with `update="mask"`, toward zero.

    Args:
        model: a causal language model, either plain or with one neuron adapter whose training continues.
        neurons: the neurons to train: a `NeuronSet`, a mapping to build one from, or the path of its file. If None,
            those of the model's adapter; without an adapter, a `DetectionCallback` detects them inside `train()`, on
            the training device, before the optimizer is created.
        update: overrides the arguments' `update`.
        Other arguments: as for `Trainer`.

    Attributes:
        neurons: the neurons to train; None until detection has run. With `model_init`, each training starts anew from
            those given to the constructor. `model.trained_neurons` also records them, together with those trained
            earlier, for `export_checkpoint`: with `update="mask"` at once, with "compact" when the adapter is merged.

    Raises:
        UserError: the neurons belong to another model, the model has other adapters or is compiled or offloaded, the
            callback's strategy trains no neurons, or the engine or optimizer can't keep all other weights fixed.
            `train` also raises if there are neither neurons nor a `DetectionCallback`, a loss isn't finite or a
            checkpoint is damaged.
    """

    # Declared because the type checker doesn't read Trainer.
    model: nn.Module
    args: TrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        *args,
        neurons: NeuronSet | Mapping | str | Path | None = None,
        update: Update | None = None,
        **kwargs,
    ):
        # Found by type: TRL's preference trainers take the arguments in another position.
        arguments = next((it for it in (*args, *kwargs.values()) if isinstance(it, TrainingArguments)), None)
        self.update = update or getattr(arguments, "update", "compact")
        check_choice("training.update", self.update, Update)
        self.neurons: NeuronSet | str | Path | None = (
            neurons if neurons is None or isinstance(neurons, (str, Path)) else NeuronSet.of(neurons)
        )
        self._given_neurons = self.neurons
        check_keeps_weights(arguments)
        self._mask: GradientMask | None = None
        self._guarded: torch.optim.Optimizer | None = None
        self._resumed_neurons: NeuronSet | None = None
        self._in_float32: dict[str, torch.Tensor] = {}
        if isinstance(model, nn.Module):
            # Before `super().__init__`, because Trainer accepts quantised models only with an adapter.
            model = self._with_adapter(model)
            if getattr(arguments, "load_best_model_at_end", False) and isinstance(model, PeftModel):
                self._check_restorable(model)
            if not isinstance(model, PeftModel) and kwargs.get("peft_config") is None:
                self._check_not_quantised(model)
        adapter = [it for it in model.parameters() if it.requires_grad] if isinstance(model, PeftModel) else []
        values = [it.data for it in adapter]
        super().__init__(model, *args, **kwargs)
        if isinstance(self.args, NeuronTrainingArguments) and self.args.update != self.update:
            self.args = copy(self.args)  # the caller's own stay as they are
            self.args.update = self.update
        _undo_casts(self.model, adapter, values)
        if self.neurons is None and self._detection is not None:
            self._check_strategy(self._detection)

    def _check_not_quantised(self, model: nn.Module) -> None:
        """Refuses a quantised model without an adapter if there can be none yet."""
        if self.neurons is None and getattr(model, "hf_quantizer", None) is not None:
            raise UserError(
                "neurons: a Trainer takes a quantised model only with an adapter, so they must be known at once: "
                "call detect_neurons first, and pass them"
            )

    @staticmethod
    def _check_strategy(detection: DetectionCallback) -> None:
        if detection.strategy.name in BASELINES:
            raise UserError(
                f"strategy: {detection.strategy.name!r} trains no neurons; a NeuronTrainer follows one of "
                f"{', '.join(STRATEGIES)}"
            )

    @staticmethod
    def _check_restorable(model: PeftModel) -> None:
        """Refuses an adapter whose best checkpoint `Trainer` can't restore: it would restore another one, or none."""
        if model.active_adapters != [_DEFAULT_ADAPTER]:
            raise UserError(
                f"load_best_model_at_end: transformers restores only an adapter named {_DEFAULT_ADAPTER!r}, and the "
                f"active one is {', '.join(map(repr, model.active_adapters))}; set it to False"
            )

    @property
    def _detection(self) -> DetectionCallback | None:
        return next((it for it in self.callback_handler.callbacks if isinstance(it, DetectionCallback)), None)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Trains as `Trainer.train` does; a resumed run trains the neurons stored in its checkpoint.

        Raises:
            UserError: the checkpoint is damaged, trains other neurons or was trained with another `update`, the
                engine shards weights that `mask` needs whole, detection finds nothing to train, or a checkpoint can't
                be written.
            NonFiniteLossError: a loss isn't finite.
        """
        checkpoint = self.resumed_checkpoint(resume_from_checkpoint)
        self._resumed_neurons = None
        if self.model_init is not None:
            # Each training starts from a new model, whose neurons may be others than those of the previous one.
            self.neurons = self._given_neurons
        if checkpoint:
            if any(checkpoint.rglob("adapter_*")) != (self.update == "compact"):
                other = "mask" if self.update == "compact" else "compact"
                raise UserError(
                    f"training.update: {checkpoint} was trained with {other!r}; resume with that, or start in another "
                    "output_dir"
                )
            self._resumed_neurons = NeuronSet.load(checkpoint / NEURONS_FILE)
            neurons = self._resolve_neurons(self.model)
            if neurons is not None and neurons != self._resumed_neurons:
                raise UserError(
                    f"{checkpoint / NEURONS_FILE}: the checkpoint trains other neurons; resume with those, or "
                    "start in another output_dir"
                )
        try:
            with nullcontext() if self._detection is None else self._detection.reporting_to(self._log_detection):
                if self.model_init is None:
                    prepared = self._prepared(self.model)
                    if prepared is not self.model:
                        self.model = self.model_wrapped = self.callback_handler.model = prepared
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._mask is not None:
                # A mask left on the model would silently freeze the parameters of a later training.
                self._mask.remove()
                self._mask = self._guarded = None

    def _log_detection(self, metrics: dict[str, float]) -> None:
        if any(it.__module__.startswith("trl.") and "log" in vars(it) for it in type(self).__mro__):
            # TRL's `log` adds means of its metrics since it was last called, which belong to the loss.
            Trainer.log(self, metrics)
        else:
            self.log(metrics)

    def call_model_init(self, trial=None) -> nn.Module:
        """Creates the model as `Trainer` does; inside `train()`, also prepares it for neuron training."""
        model = super().call_model_init(trial)
        if not getattr(self, "is_in_train", False):
            return model
        return self._prepared(self._with_adapter(model.to(self.args.device)))

    def _prepared(self, model: nn.Module) -> nn.Module:
        """Returns the model ready for training: chooses the neurons if needed, and freezes everything else."""
        self._check_engine()
        detection = self._detection
        if self._resumed_neurons is not None:
            self.neurons = self._resumed_neurons
            if detection is not None:
                detection.choice = Choice(detection.strategy.name, self.neurons, "read from the checkpoint")
        elif self.neurons is None and not _has_neuron_layers(model):  # TRL makes them itself of a `peft_config`
            if detection is None:
                raise UserError("neurons: give NeuronTrainer a NeuronSet, or a DetectionCallback that finds one")
            self._check_strategy(detection)
            self.neurons = detection.find_neurons(model)
        if self.update == "compact" or self.neurons is None:
            return self._with_adapter(model)
        neurons = self._resolve_neurons(model)
        assert neurons is not None
        self._mask = GradientMask(model, neurons)
        return model

    def _check_engine(self) -> None:
        """Raises `UserError` if FSDP or DeepSpeed can't train or detect as asked."""
        splits = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        if self._detection is not None and self._detection.every_n_steps and splits:
            raise UserError(
                "every_n_steps: detection needs whole weights, which FSDP and ZeRO-3 split during the training; leave "
                "it out, and score the checkpoints afterwards"
            )
        if self.update == "mask" and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise UserError(
                "training.update: 'mask' needs whole weights and gradients on every process, which ZeRO and FSDP "
                "split; use 'compact', or train with plain data parallelism (DDP)"
            )
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            raise UserError(
                "fsdp_cpu_ram_efficient_loading: accelerate can't broadcast the adapter's indices from the first "
                "process; set it to false (recipes/accelerate/fsdp2.yaml)"
            )

    def _resolve_neurons(self, model: nn.Module) -> NeuronSet | None:
        """Returns the neurons, first replacing a path or mapping in `self.neurons` by the set that it stands for."""
        if self.neurons is None:
            return None
        self.neurons = neurons = NeuronSet.given(self.neurons, model)
        return neurons

    def _with_adapter(self, model: nn.Module) -> nn.Module:
        """Returns the model; with `compact` and known neurons, with an adapter of these neurons."""
        check_not_compiled(model)
        adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        if adapters and (self.update != "compact" or not all(isinstance(it, NeuronLinear) for it in adapters)):
            kinds = sorted({it.peft_type.value for it in getattr(model, "peft_config", {}).values()})
            raise UserError(
                f"training.update: {self.update!r} trains a plain model, and this one has adapters "
                f"({', '.join(kinds) or type(adapters[0]).__name__}); merge them first (merge_and_unload)"
            )
        neurons = self._resolve_neurons(model)
        if adapters:
            self.neurons = _continued(model, adapters, neurons)
        elif neurons is not None:
            chosen_entries(model, neurons)  # refuses other models' neurons, and compiled and offloaded models
            check_predicts_tokens(model)
            if self.update == "compact":
                model = get_peft_model(model, NeuronConfig(task_type=TaskType.CAUSAL_LM, neurons=neurons))
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates the optimizer as `Trainer` does; with `mask`, prevents it from changing frozen entries.

        Raises:
            UserError: the optimizer has no trainable parameter, or, with `mask`, mixes the entries of a weight.
        """
        optimizer = super().create_optimizer(model)
        # On a second call of `train()`, this is the optimizer of the first, now wrapped by accelerate.
        bare = getattr(optimizer, "optimizer", optimizer)
        held = {id(parameter) for group in bare.param_groups for parameter in group["params"]}
        trained = {name: it for name, it in (model or self.model).named_parameters() if it.requires_grad}
        missing = [name for name, parameter in trained.items() if id(parameter) not in held]
        if self._mask is None and len(missing) == len(trained):
            raise UserError(
                "optimizers: this optimizer was created before the adapter, and has none of its parameters; pass "
                "optimizer_cls_and_kwargs, or call get_peft_model(model, NeuronConfig(...)) first"
            )
        if missing:
            raise UserError(
                f"optimizers: this optimizer lacks {len(missing)} of the parameters to train, such as {missing[0]}; "
                "pass optimizer_cls_and_kwargs, and for other neurons make another NeuronTrainer"
            )
        if self._mask is not None and bare is not self._guarded:
            self._mask.guard(bare)
            self._guarded = bare
            neurons = self._resolve_neurons(self.model)
            assert neurons is not None
            record_trained(self.model, neurons)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict:
            state_dict.update(self._in_float32)
        super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves as `Trainer.save_model` does, plus the neurons.

        Raises:
            NonFiniteLossError: a trained weight isn't finite; nothing is written then.
        """
        if self.is_deepspeed_enabled:
            # Gathering needs all processes, and some versions of transformers call `_save` only in the first one.
            self._in_float32 = self._gathered_in_float32()
        super().save_model(output_dir, _internal_call)
        self._in_float32 = {}
        neurons = self._resolve_neurons(self.model)
        if self.args.should_save and neurons is not None:
            neurons.save(Path(output_dir or self.args.output_dir) / NEURONS_FILE)

    def _gathered_in_float32(self) -> dict[str, torch.Tensor]:
        """Returns the trainable parameters in float32, by name; empty on processes that save nothing.

        With DeepSpeed's bf16 or fp16, the model itself has only rounded values, also of the delta.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        gathered = {}
        for name, parameter in self.model.named_parameters():
            # Gathering is a collective operation: every process must call it.
            value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if self.args.should_save and value is not None:
                gathered[name] = value
        return gathered


def check_keeps_weights(arguments: TrainingArguments | None) -> None:
    """Raises `UserError` for arguments with which an evaluation outside the training would round all weights."""
    for key in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(arguments, key, False):
            raise UserError(
                f"training.{key}: evaluation would round all weights in place, the frozen ones too; leave it out (with "
                f"{key.removesuffix('_full_eval')}, evaluation computes in half precision without that)"
            )


def _undo_casts(model: nn.Module, adapter: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    """Restores float32 to what TRL casts to bfloat16: the trainable parameters of quantised models.

    Args:
        adapter, values: the parameters of an adapter that TRL didn't make, and their values before it cast them.
    """
    for parameter, value in zip(adapter, values, strict=True):
        if parameter.dtype != value.dtype:
            parameter.data = value.to(parameter.device)
    for module in model.modules():
        for delta in module.neuron_delta.values() if isinstance(module, NeuronLinear) else []:
            delta.data = delta.data.to(torch.promote_types(delta.dtype, torch.float32))


def _has_neuron_layers(model: nn.Module) -> bool:
    return any(isinstance(module, NeuronLinear) for module in model.modules())


def _continued(model: nn.Module, adapters: Sequence[NeuronLinear], neurons: NeuronSet | None) -> NeuronSet:
    """Makes a model's neuron adapter, and nothing else, trainable; returns its neurons.

    neurons: those that it must have, if any.
    """
    if not isinstance(model, PeftModel):
        raise UserError(
            "model: it has an adapter, perhaps of an earlier NeuronTrainer, but isn't a PeftModel; continue "
            "with that trainer's model (trainer.model), or remove the adapter (trainer.model.unload())"
        )
    if any(it.disable_adapters for it in adapters):
        raise UserError("model: its adapter is disabled; enable it first (enable_adapter_layers)")
    if len(model.active_adapters) != 1:
        raise UserError("model: several adapters are active; choose the one to train (set_adapter)")
    find_decoder(model).check_on_devices("training")
    trained = adapter_neurons(model)
    if neurons is not None and neurons != trained:
        raise UserError("neurons: the model has an adapter of other neurons; merge it first (merge_and_unload)")
    if neurons is None and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model: its adapter is frozen; load it with is_trainable=True")
    model.requires_grad_(False)
    model.set_adapter(model.active_adapters[0])
    return trained
