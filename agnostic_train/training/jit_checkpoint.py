"""A checkpoint when a cluster ends the job (`enable_jit_checkpoint`), after the same step in every process."""

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from agnostic_train.processes import sum_over_processes


class AgreedCheckpoint(JITCheckpointCallback):
    """Saves a checkpoint and ends the training after a step before whose end any process was told to.

    Transformers' callback acts on its own process's signal, at four places of a step. SIGTERM doesn't reach all
    processes at the same moment: one would then save, which takes all of them, while another waits for its gradients.

    Args:
        manager: the manager of transformers' callback, which handles the signal.
    """

    def __init__(self, manager: CheckpointManager):
        super().__init__()
        self.jit_manager = manager

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Asks all processes whether any has received the signal."""
        asked = torch.tensor(int(self.jit_manager.is_checkpoint_requested), device=args.device)
        if sum_over_processes(asked):
            self.jit_manager.is_checkpoint_requested = True
            super().on_step_end(args, state, control, **kwargs)

    def _wait_for_step_end(self, *args, **kwargs) -> None:
        pass

    on_pre_optimizer_step = on_step_begin = on_epoch_end = _wait_for_step_end
