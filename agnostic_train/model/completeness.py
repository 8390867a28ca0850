"""Whether a checkpoint held all of its model: transformers fills with random numbers what is missing, and goes on."""

from pathlib import Path
from typing import Any

from agnostic_train.errors import UserError


def check_complete(info: dict[str, Any], name: str | Path, key: str = "model.name") -> None:
    """Refuses a model that was loaded with weights missing, or of other shapes than its config says.

    Args:
        info: what `from_pretrained` returns for `output_loading_info=True`, with `ignore_mismatched_sizes=True`.
        name: the checkpoint's folder or hub name. key: by which the user gave it.

    Raises:
        UserError: the checkpoint isn't complete, or isn't its config's.
    """
    if info["mismatched_keys"]:
        weight, found, wanted = min(info["mismatched_keys"])
        raise UserError(
            f"{key}: {name} has weights of other shapes than its config.json says, such as {weight}: {tuple(found)}, not "
            f"{tuple(wanted)}; one of the two is another model's"
        )
    if info["missing_keys"]:
        absent = sorted(info["missing_keys"])
        raise UserError(
            f"{key}: {name} lacks {len(absent)} weights that its config asks for, such as {absent[0]}; the checkpoint "
            "isn't complete, or its config.json is another model's"
        )
