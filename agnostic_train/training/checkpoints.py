"""The checkpoints that a Trainer saves: which there are, and which can be resumed from."""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals

from agnostic_train.errors import UserError, in_one_line
from agnostic_train.files import read_json

NEURONS_FILE = "neurons.safetensors"
"""The file of the trained neurons in a `NeuronTrainer`'s checkpoints."""

# A resumed Trainer (of transformers 5.17, for one) loads the optimizer onto its own device. In one of several processes
# on a CPU that is "cpu:0", a place of which torch knows only the first part.
torch.serialization.register_package(
    30, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


def saved_checkpoints(directory: Path) -> list[Path]:
    """Returns a Trainer's checkpoints in its output folder, oldest first."""
    checkpoints = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def is_resumable(checkpoint: Path) -> bool:
    """Returns whether a checkpoint is complete and contains the optimizer state.

    Trainer writes its own state last, and not atomically. `save_only_model` omits the optimizer: a resumed training
    would create a new one, and its result would differ.
    """
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return has_optimizer(checkpoint)


def has_optimizer(checkpoint: Path) -> bool:
    """Returns whether a checkpoint contains the state of an optimizer, of any engine."""
    # DeepSpeed saves its optimizer in a folder named `global_step<n>`.
    return any(it.name.startswith(("optimizer", "global_step")) for it in checkpoint.iterdir())


def check_resumable(checkpoint: Path) -> None:
    """Opens every file needed to resume, without reading its tensors.

    Raises:
        UserError: a file is missing, truncated or invalid; pickles may contain only tensors and plain values.
    """
    if not (checkpoint / TRAINER_STATE_NAME).exists():
        raise UserError(
            f"{checkpoint / TRAINER_STATE_NAME}: missing, so the checkpoint is incomplete; delete {checkpoint}, and "
            "training continues from the one before it"
        )
    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".json":
                read_json(file)
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    tensors.keys()
            elif file.suffix in (".pt", ".pth", ".bin") and file.name != TRAINING_ARGS_NAME:  # never read when resuming
                with safe_globals():
                    torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # unpickling damaged bytes can raise anything
            raise UserError(
                f"{file}: can't be resumed from ({in_one_line(error, 200)}); delete {checkpoint}, and training "
                "continues from the one before it"
            ) from None
