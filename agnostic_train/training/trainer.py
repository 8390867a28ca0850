"""The Trainer of which only the chosen neurons learn."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from agnostic_train.files import UserError
from agnostic_train.neurons import NeuronSet
from agnostic_train.training.callbacks import DetectionCallback
from agnostic_train.training.mask import GradientMask

UPDATES = ("mask",)
NEURONS_FILE = "neurons.safetensors"


@dataclass
class NeuronTrainingArguments(TrainingArguments):
    """`TrainingArguments` and how the chosen neurons are updated."""

    update: str = field(
        default="mask", metadata={"help": "How the chosen neurons learn: 'mask' masks the gradients of full weights."}
    )


class NeuronTrainer(Trainer):
    """A `Trainer` in which only the chosen neurons' rows and columns learn.

    Biases, norms, embeddings and every unchosen row and column keep the very bits that they had, whatever the
    optimizer's weight decay and momentum. Checkpoints hold the neurons beside the weights, and a resumed run takes
    them from there. Weight decay draws the chosen entries toward zero.

    Args:
        neurons: the neurons to train, or a file of them. None: a `DetectionCallback` among `callbacks` finds them
            inside `train()`, on the training device, before the optimizer exists.
        update: overrides the arguments' `update`.
        Others as for `Trainer`.

    Attributes:
        neurons: what trains; None until detection has run. After training `model.trained_neurons` says it too, which
            `export_checkpoint` reads.

    Raises:
        UserError: neither neurons nor a `DetectionCallback`, neurons of another model, an engine or optimizer with
            which nothing else can be kept from moving.
    """

    def __init__(self, *args, neurons: NeuronSet | str | Path | None = None, update: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.neurons = NeuronSet.load(neurons) if isinstance(neurons, (str, Path)) else neurons
        self.update = update or getattr(self.args, "update", "mask")
        if self.update not in UPDATES:
            raise UserError(f"training.update: {self.update!r} isn't one of {', '.join(UPDATES)}")
        if self.neurons is not None:
            self.neurons.check(self.model)
        elif self._detection is None:
            raise UserError("neurons: give NeuronTrainer a NeuronSet, or a DetectionCallback that finds one")
        self._mask: GradientMask | None = None
        self._guarded: torch.optim.Optimizer | None = None
        self._resumed_neurons: NeuronSet | None = None

    @property
    def _detection(self) -> DetectionCallback | None:
        return next((it for it in self.callback_handler.callbacks if isinstance(it, DetectionCallback)), None)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `Trainer.train`; a resumed run trains the neurons that its checkpoint names."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if checkpoint:
            self._resumed_neurons = NeuronSet.load(Path(checkpoint) / NEURONS_FILE)
            if self.neurons is not None and self.neurons != self._resumed_neurons:
                raise UserError(
                    f"{Path(checkpoint) / NEURONS_FILE}: the checkpoint trains other neurons; resume with those, or "
                    "start in another output_dir"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Chooses the neurons if that is still to do, masks the model, and guards the optimizer."""
        if self._mask is None or self._mask.model is not self.model:
            self._install_mask()
        optimizer = super().create_optimizer(model)
        # A second `train()` finds the first one's optimizer, which accelerate has wrapped since.
        bare = getattr(optimizer, "optimizer", optimizer)
        if bare is not self._guarded:
            self._mask.guard(bare)
            self._guarded = bare
        return optimizer

    def _install_mask(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UserError(
                "training.update: 'mask' needs whole weights and gradients on every process, which ZeRO and FSDP "
                "split; train with plain data parallelism (DDP)"
            )
        detection = self._detection
        if detection is not None:
            detection.log = self.log
        if self._resumed_neurons is not None:
            self.neurons = self._resumed_neurons
        elif self.neurons is None:
            detection.run(self.model)
            self.neurons = detection.choose(self.model).neurons
        self._mask = GradientMask(self.model, self.neurons)
        self.model.trained_neurons = self.neurons

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with the neurons beside the weights."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and self.neurons is not None:
            self.neurons.save(Path(output_dir or self.args.output_dir) / NEURONS_FILE)
