"""Choices that a recipe's keys and the Python functions have in common."""

from typing import Any, Literal, get_args

from agnostic_train.errors import UserError

Attention = Literal["exact", "paper"]
Exclusive = Literal["complement", "unique"]
Method = Literal["impact", "lape"]
Update = Literal["compact", "mask"]
ExportTarget = Literal["merged", "lora", "delta"]
SetStrategy = Literal["shared", "exclusive", "shared+exclusive", "related"]


def check_choice(key: str, value: Any, choices: Any) -> None:
    """Refuses a value that isn't one of a `Literal`'s.

    Raises:
        UserError: it isn't.
    """
    if value not in get_args(choices):
        raise UserError(f"{key}: {value!r} isn't one of {', '.join(get_args(choices))}")
