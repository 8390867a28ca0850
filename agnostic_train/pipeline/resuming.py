"""The checkpoints of an unfinished training: which ones a run goes on from, and which ones are in its way."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from agnostic_train.errors import UserError
from agnostic_train.pipeline.manifest import Manifest
from agnostic_train.training.guarded import is_resumable
from agnostic_train.training.trainer import saved_checkpoints


def check_checkpoints(directory: Path, manifest: Manifest, same: bool, launch: Mapping[str, object]) -> None:
    """Refuses a folder in which someone else's training has saved, or the same one when it was launched otherwise.

    same: whether it is this very training that has saved there, unfinished or with files that were lost since.
    launch: as by `launch_inputs`.
    """
    found, record = saved_checkpoints(directory), manifest.record("train")
    if found and not record:
        raise UserError(
            f"output_dir: {found[0]} isn't of a run that {manifest.file} records; move it away, or use another folder"
        )
    begun = {key: record.get(key, value) for key, value in launch.items()}
    if not found or not same or begun == launch:
        return
    # With the batch per device goes the batch: the steps done so far would stand for other text.
    by_whom, now = f"in {begun['processes']} processes", f"these are {launch['processes']}"
    if begun["processes"] == launch["processes"]:
        by_whom, now = f"with mixed_precision {begun['precision']}", f"this launcher has {launch['precision']}"
    raise UserError(
        f"output_dir: {found[-1]} is of a training {by_whom}, and {now}; go on as it began, or start it anew with --force"
    )


def clear_checkpoints(directory: Path, resume: bool) -> None:
    """Leaves the checkpoints that this very training can go on from, if it is resumed, and no others."""
    for path in saved_checkpoints(directory):
        if not resume or not is_resumable(path):
            shutil.rmtree(path)
