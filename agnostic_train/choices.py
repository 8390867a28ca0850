"""The options of choices that recipe keys and Python functions share."""

from typing import Any, Literal, get_args

from agnostic_train.errors import UserError

Attention = Literal["exact", "paper"]
Exclusive = Literal["complement", "unique"]
Method = Literal["impact", "lape"]
Update = Literal["compact", "mask"]
ExportTarget = Literal["merged", "lora", "delta"]
SetStrategy = Literal["shared", "exclusive", "shared+exclusive", "related"]
Baseline = Literal["lora", "full"]
ComparedStrategy = Literal[SetStrategy, "random", Baseline]
StrategyName = Literal[SetStrategy, "random", "auto", Baseline]


def check_choice(key: str, value: Any, choices: Any) -> None:
    """Checks that a value is one of the options of a `Literal` type.

    Raises:
        UserError: it isn't; the message names `key` and lists the options.
    """
    if value not in get_args(choices):
        raise UserError(f"{key}: {value!r} isn't one of {', '.join(get_args(choices))}")
