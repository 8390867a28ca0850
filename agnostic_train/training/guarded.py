"""A Trainer that stops with a precise error when training fails, and refuses to resume from a damaged checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import DistributedDataParallelKwargs
from peft import PeftModel
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from agnostic_train.errors import UserError
from agnostic_train.processes import own_part, sum_over_processes
from agnostic_train.scores.perplexity import NonFiniteLossError
from agnostic_train.training.checkpoints import check_resumable, has_optimizer
from agnostic_train.training.jit_checkpoint import AgreedCheckpoint

logger = logging.get_logger(__name__)

_NUM_TOKENS_NAMED = 12


class GuardedTrainer(Trainer):
    """A `Trainer` that stops at the first non-finite loss, and never saves non-finite weights.

    `train` raises:
        NonFiniteLossError: with the step and the batch; earlier checkpoints are kept.
        UserError: a checkpoint can't be resumed from, with the name of the damaged file.
    """

    def __init__(self, *args, **kwargs):
        # The losses since the last check, each with its batch's token ids.
        self._unchecked: list[tuple[Tensor, Tensor | None]] = []
        super().__init__(*args, **kwargs)
        on_signal = self.pop_callback(JITCheckpointCallback)
        if on_signal is not None:
            self.add_callback(AgreedCheckpoint(on_signal.jit_manager))

    def _build_accelerator_args(self, **kwargs) -> dict:
        settings = super()._build_accelerator_args(**kwargs)
        if isinstance(self.model, PeftModel) and self.args.ddp_find_unused_parameters is None:
            # Every forward pass uses all adapter parameters. For any model that isn't a `PreTrainedModel`, Trainer
            # makes DDP search each graph for unused parameters, which fails with reentrant gradient checkpointing.
            for handler in settings["kwargs_handlers"]:
                if isinstance(handler, DistributedDataParallelKwargs):
                    handler.find_unused_parameters = False
        return settings

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Trains as `Trainer.train` does, but checks a checkpoint's files before loading any of them.

        Raises:
            NonFiniteLossError: a loss isn't finite.
            UserError: a checkpoint is damaged or can't be written, or FSDP is set to save sharded checkpoints.
        """
        if self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            raise UserError(
                "fsdp_state_dict_type: with this value, a Trainer saves only shards, not a loadable adapter or model; "
                "set it to FULL_STATE_DICT (recipes/accelerate/fsdp2.yaml)"
            )
        self._unchecked.clear()
        checkpoint = self.resumed_checkpoint(resume_from_checkpoint)
        if checkpoint:
            check_resumable(checkpoint)
            if not has_optimizer(checkpoint):
                logger.warning(
                    f"{checkpoint}: has no optimizer (save_only_model); training continues with a new one, and the "
                    "result will differ"
                )
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            # Close the progress bars: otherwise the error message would be printed on the same line.
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback):
                    for bar in (callback.prediction_bar, callback.training_bar):
                        if bar is not None:
                            bar.close()
                    callback.prediction_bar = callback.training_bar = None
            raise

    def resumed_checkpoint(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """Returns the folder to resume from, or None; True means the last checkpoint in `output_dir`.

        Raises:
            UserError: there is no such folder.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if checkpoint and not Path(checkpoint).is_dir():
            raise UserError(f"resume_from_checkpoint: no such folder {checkpoint}")
        return Path(checkpoint) if checkpoint else None

    def _run_epoch(self, *args, **kwargs) -> None:
        # When resumed mid-epoch from the checkpoint of the last step, Trainer would train one step too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Mapping | list, *args, **kwargs) -> Tensor:
        """Runs `Trainer.training_step`, and before each optimizer step checks that its losses are finite.

        Raises:
            NonFiniteLossError: one isn't.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        # In trainers that generate, such as TRL's GRPOTrainer, `inputs` is a list of rows.
        self._unchecked.append((loss, inputs.get("input_ids") if isinstance(inputs, Mapping) else None))
        # Once per optimizer step, not per accumulated batch: the check synchronises the device and all processes.
        if self.accelerator.sync_gradients:
            unchecked, self._unchecked = self._unchecked, []
            self._check_losses(unchecked)
        return loss

    def _check_losses(self, batches: list[tuple[Tensor, Tensor | None]]) -> None:
        are_bad = torch.stack([(~loss.isfinite()).any() for loss, _ in batches])
        # All processes must stop together: one that continued alone would wait forever for the others.
        if not sum_over_processes(are_bad.any().int()):
            return
        step, kept = self.state.global_step + 1, "earlier checkpoints are kept"
        bad = [batch for batch, is_bad in zip(batches, are_bad, strict=True) if is_bad]
        if not bad:
            raise NonFiniteLossError(
                f"training.learning_rate: the loss of another process isn't finite at step {step}; its message names "
                f"the batch; {kept}"
            )
        loss, ids = bad[0]
        batch = "" if ids is None else (
            f", on the batch of {len(ids)} sequences whose first begins with the tokens "
            f"{ids[0, :_NUM_TOKENS_NAMED].tolist()}"
        )  # fmt: skip
        raise NonFiniteLossError(
            f"training.learning_rate: the loss is {loss.mean().item()} at step {step}{batch}; {kept}; try a lower rate "
            "or a wider model.dtype, or look at that text"
        )

    def _save_checkpoint(self, *args, **kwargs) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:
            # Torch's error messages for a file that couldn't be written.
            if not any(it in str(error) for it in ("inline_container", "iostream")):
                raise
            raise UserError(
                f"output_dir: can't write a checkpoint to {self.args.output_dir} ({error}); is the disk full?"
            ) from None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves as `Trainer.save_model` does, but refuses non-finite weights, which would replace a good checkpoint.

        Raises:
            NonFiniteLossError: a trained weight isn't finite; nothing is written then.
        """
        bad = [
            name
            for name, it in self.model.named_parameters()
            # Each process checks its own shard of sharded weights.
            if it.requires_grad and not own_part(it).isfinite().all()
        ]
        num_bad = torch.tensor(len(bad), device=self.args.device)
        # Trainer's own checkpoints are saved by all processes, which must agree; a user may call this on one alone.
        if _internal_call:
            num_bad = sum_over_processes(num_bad)
        if num_bad:
            raise NonFiniteLossError(
                f"training.learning_rate: {bad[0] if bad else 'a weight'} isn't finite after step "
                f"{self.state.global_step}, and isn't saved; earlier checkpoints are kept; try a lower rate or a wider "
                "model.dtype"
            )
        super().save_model(output_dir, _internal_call)
