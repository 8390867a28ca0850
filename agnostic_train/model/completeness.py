"""Checking that a checkpoint is complete: transformers fills missing weights with random numbers and continues."""

from pathlib import Path
from typing import Any

from agnostic_train.errors import UserError


def check_complete(info: dict[str, Any], name: str | Path, key: str = "model.name") -> None:
    """Refuses a model that was loaded with weights missing, or with weights of other shapes than its config says.

    Args:
        info: what `from_pretrained` returned with `output_loading_info=True` and `ignore_mismatched_sizes=True`.
        name: the checkpoint's folder or hub name.
        key: the recipe key that named the checkpoint, for the error message.

    Raises:
        UserError: the checkpoint isn't complete, or doesn't belong to its config.
    """
    if info["mismatched_keys"]:
        weight, shape, expected_shape = min(info["mismatched_keys"])
        raise UserError(
            f"{key}: {name} has weights of other shapes than its config.json says, such as {weight}: {tuple(shape)}, "
            f"not {tuple(expected_shape)}; one of the two is another model's"
        )
    if info["missing_keys"]:
        absent = sorted(info["missing_keys"])
        raise UserError(
            f"{key}: {name} lacks {len(absent)} weights that its config asks for, such as {absent[0]}; the checkpoint "
            "isn't complete, or its config.json is another model's"
        )
