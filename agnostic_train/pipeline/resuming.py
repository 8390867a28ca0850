"""The checkpoints of an unfinished training: which ones a run resumes from, and which it refuses or deletes."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from agnostic_train.errors import UserError
from agnostic_train.pipeline.manifest import Manifest
from agnostic_train.training.checkpoints import is_resumable, saved_checkpoints


def check_checkpoints(directory: Path, manifest: Manifest, same: bool, launch: Mapping[str, object]) -> None:
    """Raises `UserError` for checkpoints of an unknown training, or of the same training launched in another way.

    same: whether the training on record has this run's inputs, so that this run would resume its checkpoints.
    launch: this run's `launch_settings`.
    """
    checkpoints, record = saved_checkpoints(directory), manifest.record("train")
    if checkpoints and not record:
        raise UserError(
            f"output_dir: {checkpoints[0]} isn't from a run recorded in {manifest.file}; move it away, or use another "
            "folder"
        )
    earlier = {key: record.get(key, value) for key, value in launch.items()}
    if not checkpoints or not same or earlier == launch:
        return
    # The number of processes changes the batch size, so the steps done so far would have read other text.
    then, now = (f"{it['processes']} process{'' if it['processes'] == 1 else 'es'}" for it in (earlier, launch))
    if earlier["processes"] == launch["processes"]:
        then, now = f"mixed_precision {earlier['precision']}", f"mixed_precision {launch['precision']}"
    raise UserError(
        f"output_dir: {checkpoints[-1]} is from a training with {then}, but this run has {now}; resume with the same "
        "launch settings, or start again with --force"
    )


def clear_checkpoints(directory: Path, resume: bool) -> None:
    """Deletes all checkpoints but those that this training, if it resumes, can continue from."""
    for path in saved_checkpoints(directory):
        if not resume or not is_resumable(path):
            shutil.rmtree(path)
