"""A Trainer that stops where training has failed and says where, and refuses to go on from a damaged checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import DistributedDataParallelKwargs
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from agnostic_train.errors import UserError, in_one_line
from agnostic_train.files import read_json
from agnostic_train.processes import own_part, sum_over_processes
from agnostic_train.scores.perplexity import NonFiniteLossError

logger = logging.get_logger(__name__)

_NUM_TOKENS_NAMED = 12


class GuardedTrainer(Trainer):
    """A `Trainer` that stops at the first loss that isn't finite, and never saves weights that aren't.

    Raises (from `train`):
        NonFiniteLossError: naming the step and the batch, with the last good checkpoint left as it is.
        UserError: naming the file of a checkpoint that can't be resumed from.
    """

    def __init__(self, *args, **kwargs):
        # Losses since the last look, and their batches' tokens.
        self._unchecked: list[tuple[Tensor, Tensor | None]] = []
        super().__init__(*args, **kwargs)

    def _build_accelerator_args(self, **kwargs) -> dict:
        settings = super()._build_accelerator_args(**kwargs)
        if isinstance(self.model, PeftModel) and self.args.ddp_find_unused_parameters is None:
            # A forward pass uses all of an adapter. A Trainer has DDP look for what isn't used in every model that isn't
            # transformers' own: a walk through each graph, at which reentrant checkpointing fails.
            for handler in settings["kwargs_handlers"]:
                if isinstance(handler, DistributedDataParallelKwargs):
                    handler.find_unused_parameters = False
        return settings

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `Trainer.train`; a checkpoint is looked through before anything of it is loaded.

        Raises:
            NonFiniteLossError: a loss that isn't finite. UserError: a damaged checkpoint, a disk that takes none, or FSDP
                with checkpoints of parts.
        """
        if self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            raise UserError(
                "fsdp_state_dict_type: a Trainer saves parts alone with this one, no adapter or model to load; set it to "
                "FULL_STATE_DICT (recipes/accelerate/fsdp2.yaml)"
            )
        self._unchecked.clear()
        checkpoint = self.resumed_checkpoint(resume_from_checkpoint)
        if checkpoint:
            check_resumable(checkpoint)
            if not _has_optimizer(checkpoint):
                logger.warning(
                    f"{checkpoint}: has no optimizer (save_only_model); training goes on with a new one, and ends elsewhere"
                )
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            # What is told next would stand in the line of the progress bar.
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback):
                    for bar in (callback.prediction_bar, callback.training_bar):
                        if bar is not None:
                            bar.close()
                    callback.prediction_bar = callback.training_bar = None
            raise

    def resumed_checkpoint(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """The folder that `train` goes on from; True stands for the last one in `output_dir`."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        return Path(checkpoint) if checkpoint else None

    def _run_epoch(self, *args, **kwargs) -> None:
        # Resumed from the checkpoint of its last step, in the middle of an epoch, a Trainer would train one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Mapping | list, *args, **kwargs) -> Tensor:
        """As `Trainer.training_step`; before an optimizer step the losses that it is made of must be finite.

        Raises:
            NonFiniteLossError: one isn't.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        # Trainers that generate, such as TRL's GRPOTrainer, are handed a list of rows.
        self._unchecked.append((loss, inputs.get("input_ids") if isinstance(inputs, Mapping) else None))
        # A look waits for the device and for all processes: once a step, not at every batch that is accumulated.
        if self.accelerator.sync_gradients:
            unchecked, self._unchecked = self._unchecked, []
            self._check_losses(unchecked)
        return loss

    def _check_losses(self, batches: list[tuple[Tensor, Tensor | None]]) -> None:
        are_bad = torch.stack([(~loss.isfinite()).any() for loss, _ in batches])
        # The processes must agree: one that goes on alone waits for the others for ever.
        if not sum_over_processes(are_bad.any().int()):
            return
        # Where the batches of this process are fine, its last one stands for them.
        loss, ids = next((batch for batch, is_bad in zip(batches, are_bad, strict=True) if is_bad), batches[-1])
        batch = "" if ids is None else (
            f", on the batch of {len(ids)} sequences whose first begins with the tokens "
            f"{ids[0, :_NUM_TOKENS_NAMED].tolist()}"
        )  # fmt: skip
        raise NonFiniteLossError(
            f"training.learning_rate: the loss is {loss.mean().item()} at step {self.state.global_step + 1}{batch}; "
            "earlier checkpoints are kept; try a lower rate or a wider model.dtype, or look at that text"
        )

    def _save_checkpoint(self, *args, **kwargs) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:
            # Torch's words for a file that it couldn't write.
            if not any(it in str(error) for it in ("inline_container", "iostream")):
                raise
            raise UserError(
                f"output_dir: {self.args.output_dir} takes no checkpoint ({error}); is the disk full?"
            ) from None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, if what was trained is finite: a checkpoint of NaN would replace a good one.

        Raises:
            NonFiniteLossError: it isn't, and nothing is written.
        """
        bad = [
            name
            for name, it in self.model.named_parameters()
            # Of weights that are split over processes, each looks at its own part.
            if it.requires_grad and not own_part(it).isfinite().all()
        ]
        num_bad = torch.tensor(len(bad), device=self.args.device)
        # At a checkpoint all processes are here, and must agree; elsewhere one may save alone.
        if _internal_call:
            num_bad = sum_over_processes(num_bad)
        if num_bad:
            raise NonFiniteLossError(
                f"training.learning_rate: {bad[0] if bad else 'a weight'} isn't finite after step "
                f"{self.state.global_step}, and isn't saved; earlier checkpoints are kept; try a lower rate or a wider "
                "model.dtype"
            )
        super().save_model(output_dir, _internal_call)


def is_resumable(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved to the end, and with its optimizer. A Trainer writes its state last, and not atomically.

    `save_only_model` leaves the optimizer out: a training would go on from there with another, and end elsewhere.
    """
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return _has_optimizer(checkpoint)


def _has_optimizer(checkpoint: Path) -> bool:
    # DeepSpeed keeps its own in a folder of the step.
    return any(it.name.startswith(("optimizer", "global_step")) for it in checkpoint.iterdir())


def check_resumable(checkpoint: Path) -> None:
    """Opens every file that resuming reads, without reading the tensors in it.

    Raises:
        UserError: naming the file that is missing, cut short or not what it should be; pickles may hold tensors and plain
            values alone.
    """
    if not (checkpoint / TRAINER_STATE_NAME).exists():
        raise UserError(
            f"{checkpoint / TRAINER_STATE_NAME}: missing, so the checkpoint wasn't saved to its end; delete {checkpoint}, and "
            "training goes on from the one before it"
        )
    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".json":
                read_json(file)
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    tensors.keys()
            elif file.suffix in (".pt", ".pth", ".bin") and file.name != TRAINING_ARGS_NAME:  # which nobody reads
                with safe_globals():
                    torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # unpickling damaged bytes can raise anything
            raise UserError(
                f"{file}: can't be resumed from ({in_one_line(error, 200)}); delete {checkpoint}, and training goes on from "
                "the one before it"
            ) from None
