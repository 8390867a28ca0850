"""The Trainer of which only the chosen neurons learn."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainingArguments

from agnostic_train.choices import Update, check_choice
from agnostic_train.errors import UserError
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.callbacks import DetectionCallback
from agnostic_train.training.compact import NeuronConfig, NeuronLinear, adapter_neurons
from agnostic_train.training.guarded import GuardedTrainer
from agnostic_train.training.mask import GradientMask
from agnostic_train.training.strategy import BASELINES, STRATEGIES, Choice

NEURONS_FILE = "neurons.safetensors"


@dataclass
class NeuronTrainingArguments(TrainingArguments):
    """`TrainingArguments` and how the chosen neurons are updated.

    Args:
        update: `compact`, a small adapter of their rows and columns beside frozen weights, or `mask`, the full weights
            with masked gradients. Without weight decay the optimizers that both take end at the same weights, to
            rounding.
        Others as for `TrainingArguments`.

    Raises:
        UserError: another `update`.
    """

    update: Update = field(
        default="compact",
        metadata={
            "help": "How the chosen neurons learn: 'compact' trains a small adapter of their rows and columns beside "
            "frozen weights, 'mask' the full weights with masked gradients."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("training.update", self.update, Update)


class NeuronTrainer(GuardedTrainer):
    """A `Trainer` in which only the chosen neurons' rows and columns learn.

    Biases, norms, embeddings and every unchosen row and column keep the very bits that they had, whatever the
    optimizer's weight decay and momentum. Checkpoints hold the neurons beside the weights, and a resumed run takes
    them from there.

    With `update="compact"` the model becomes a `PeftModel` around the one given (`trainer.model`): the chosen rows
    and columns are its only trainable tensors, and checkpoints hold them alone. Weight decay draws them toward the
    base model; with `update="mask"`, toward zero.

    Args:
        model: a causal language model, plain or with one neuron adapter to go on training.
        neurons: the neurons to train, as a `NeuronSet`, what makes one, or a file of one. None: those of the model's
            adapter, or else a `DetectionCallback` among the callbacks finds them inside `train()`, on the training
            device, before the optimizer exists.
        update: overrides the arguments' `update`.
        Others as for `Trainer`.

    Attributes:
        neurons: what trains; None until detection has run. Training with masks notes it in `model.trained_neurons`
            too (what was trained earlier included), which `export_checkpoint` reads.

    Raises:
        UserError: neurons of another model, other adapters in the model, an engine or optimizer with which nothing else
            can be kept from moving, a callback whose strategy trains no neurons; in `train`, neither neurons nor a
            `DetectionCallback`, a loss that isn't finite and a damaged checkpoint.
    """

    model: nn.Module  # said here because the type checker doesn't read Trainer

    def __init__(
        self,
        model: nn.Module | None = None,
        *args,
        neurons: NeuronSet | Mapping | str | Path | None = None,
        update: Update | None = None,
        **kwargs,
    ):
        # Trainers for preferences, such as TRL's, have them in another place.
        arguments = next((it for it in (*args, *kwargs.values()) if isinstance(it, TrainingArguments)), None)
        self.update = update or getattr(arguments, "update", "compact")
        check_choice("training.update", self.update, Update)
        self.neurons: NeuronSet | str | Path | None = (
            neurons if neurons is None or isinstance(neurons, (str, Path)) else NeuronSet.of(neurons)
        )
        self._mask: GradientMask | None = None
        self._guarded: torch.optim.Optimizer | None = None
        self._resumed_neurons: NeuronSet | None = None
        self._in_float32: dict[str, torch.Tensor] = {}
        if isinstance(model, nn.Module):
            # As early as this, because a Trainer takes quantised models only with their adapter.
            model = self._with_adapter(model)
        adapter = [it for it in model.parameters() if it.requires_grad] if isinstance(model, PeftModel) else []
        values = [it.data for it in adapter]
        super().__init__(model, *args, **kwargs)
        for parameter, value in zip(adapter, values, strict=True):
            if parameter.dtype != value.dtype:  # TRL rounds what learns beside a quantised base to bfloat16
                parameter.data = value.to(parameter.device)
        if self.neurons is None and self._detection is not None:
            self._check_strategy(self._detection)

    @staticmethod
    def _check_strategy(detection: DetectionCallback) -> None:
        if detection.strategy.name in BASELINES:
            raise UserError(
                f"strategy: {detection.strategy.name!r} trains no neurons; a NeuronTrainer follows one of "
                f"{', '.join(STRATEGIES)}"
            )

    @property
    def _detection(self) -> DetectionCallback | None:
        return next((it for it in self.callback_handler.callbacks if isinstance(it, DetectionCallback)), None)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `Trainer.train`; a resumed run trains the neurons that its checkpoint names.

        Raises:
            UserError: the checkpoint is damaged or of other neurons, an engine splits the weights that `mask` needs
                whole, detection found nothing to train, or a disk takes no checkpoint.
            NonFiniteLossError: a loss that isn't finite.
        """
        checkpoint = self.resumed_checkpoint(resume_from_checkpoint)
        if checkpoint:
            self._resumed_neurons = NeuronSet.load(checkpoint / NEURONS_FILE)
            neurons = self._read_neurons(self.model)
            if neurons is not None and neurons != self._resumed_neurons:
                raise UserError(
                    f"{checkpoint / NEURONS_FILE}: the checkpoint trains other neurons; resume with those, or "
                    "start in another output_dir"
                )
        try:
            if self.model_init is None:
                prepared = self._prepared(self.model)
                if prepared is not self.model:
                    self.model = self.model_wrapped = self.callback_handler.model = prepared
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._detection is not None:
                self._detection.end()
            if self._mask is not None:
                # A mask left on the model would silently freeze what another training is told to train.
                self._mask.remove()
                self._mask = self._guarded = None

    def call_model_init(self, trial=None) -> nn.Module:
        """As `Trainer.call_model_init`; inside `train()`, the model is made ready for its neurons to learn."""
        model = super().call_model_init(trial)
        return self._prepared(model.to(self.args.device)) if getattr(self, "is_in_train", False) else model

    def _prepared(self, model: nn.Module) -> nn.Module:
        """The model with its neurons chosen, and everything else kept from learning."""
        if self.update == "mask" and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise UserError(
                "training.update: 'mask' needs whole weights and gradients on every process, which ZeRO and FSDP "
                "split; use 'compact', or train with plain data parallelism (DDP)"
            )
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            raise UserError(
                "fsdp_cpu_ram_efficient_loading: accelerate can't spread the adapter's indices from the first process; "
                "set it to false (recipes/accelerate/fsdp2.yaml)"
            )
        detection = self._detection
        if detection is not None:
            detection.log = self.log
        if self._resumed_neurons is not None:
            self.neurons = self._resumed_neurons
            if detection is not None:
                detection.choice = Choice(detection.strategy.name, self.neurons, "as the checkpoint has them")
        elif self.neurons is None:
            if detection is None:
                raise UserError("neurons: give NeuronTrainer a NeuronSet, or a DetectionCallback that finds one")
            self._check_strategy(detection)
            detection.run(model)
            detection.is_fresh = True
            self.neurons = detection.choose(model).neurons
            assert self.neurons is not None
        if self.update == "compact":
            return self._with_adapter(model)
        neurons = self._read_neurons(model)
        assert neurons is not None
        self._mask = GradientMask(model, neurons)
        return model

    def _read_neurons(self, model: nn.Module) -> NeuronSet | None:
        """The neurons, from here on without their file."""
        if isinstance(self.neurons, (str, Path)):
            self.neurons = NeuronSet.read(self.neurons, model)
        return self.neurons

    def _with_adapter(self, model: nn.Module) -> nn.Module:
        """The model, in `compact` with an adapter of the chosen neurons, as soon as they are known."""
        adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        if adapters and (self.update != "compact" or not all(isinstance(it, NeuronLinear) for it in adapters)):
            raise UserError(
                f"training.update: {self.update!r} trains a plain model, and this one has adapters "
                f"({type(adapters[0]).__name__}); merge them first (merge_and_unload)"
            )
        neurons = self._read_neurons(model)
        if adapters:
            if not isinstance(model, PeftModel):
                raise UserError(
                    "model: it holds an adapter, perhaps of an earlier NeuronTrainer, but is no PeftModel; go on with that "
                    "trainer's model (trainer.model), or take the adapter out (trainer.model.unload())"
                )
            if any(it.disable_adapters for it in adapters):
                raise UserError("model: its adapter is disabled; enable it first (enable_adapter_layers)")
            if len(model.active_adapters) != 1:
                raise UserError("model: several adapters are active; choose the one to train (set_adapter)")
            found = adapter_neurons(model)
            if neurons is not None and neurons != found:
                raise UserError("neurons: the model has an adapter of other neurons; merge it first (merge_and_unload)")
            if neurons is None and not any(parameter.requires_grad for parameter in model.parameters()):
                raise UserError("model: its adapter is frozen; load it with is_trainable=True")
            model.requires_grad_(False)
            model.set_adapter(model.active_adapters[0])
            self.neurons = found
        elif neurons is not None:
            neurons.check(model)
            if self.update == "compact":
                model = get_peft_model(model, NeuronConfig(task_type=TaskType.CAUSAL_LM, neurons=neurons))
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`; with masks, the optimizer is kept from moving anything else.

        Raises:
            UserError: it holds nothing that learns, or mixes a weight's entries, which masks can't undo.
        """
        optimizer = super().create_optimizer(model)
        # A second `train()` finds the first one's optimizer, which accelerate has wrapped since.
        bare = getattr(optimizer, "optimizer", optimizer)
        trainable = {id(parameter) for parameter in (model or self.model).parameters() if parameter.requires_grad}
        if not any(id(parameter) in trainable for group in bare.param_groups for parameter in group["params"]):
            raise UserError(
                "optimizers: this optimizer was made before the adapter, and holds none of it; give "
                "optimizer_cls_and_kwargs, or get_peft_model(model, NeuronConfig(...)) first"
            )
        if self._mask is not None and bare is not self._guarded:
            self._mask.guard(bare)
            self._guarded = bare
            neurons, earlier = self._read_neurons(self.model), getattr(self.model, "trained_neurons", None)
            self.model.trained_neurons = neurons if earlier is None else earlier | neurons
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict:
            state_dict.update(self._in_float32)
        super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with the neurons beside the weights.

        Raises:
            NonFiniteLossError: a trained weight isn't finite, and nothing is written.
        """
        if self.is_deepspeed_enabled:
            # Here, for some versions of transformers call `_save` in the first process alone.
            self._in_float32 = self._gathered_in_float32()
        super().save_model(output_dir, _internal_call)
        self._in_float32 = {}
        neurons = self._read_neurons(self.model)
        if self.args.should_save and neurons is not None:
            neurons.save(Path(output_dir or self.args.output_dir) / NEURONS_FILE)

    def _gathered_in_float32(self) -> dict[str, torch.Tensor]:
        """What learns: DeepSpeed's bf16 and fp16 round all of the model, the delta too. Empty where nothing is saved."""
        from deepspeed.utils import safe_get_full_fp32_param

        gathered = {}
        for name, parameter in self.model.named_parameters():
            # Every process takes part in gathering it.
            value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if self.args.should_save and value is not None:
                gathered[name] = value
        return gathered


def saved_checkpoints(directory: Path) -> list[Path]:
    """A Trainer's checkpoints in its folder, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))
