"""Every key of a recipe, with its type, help text, choices and default."""

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from agnostic_train.recipe import Recipe

SECTIONS = {it.name: it.type for it in fields(Recipe) if it.name != "output_dir"}
OWN_KEYS = {
    "output_dir": "output_dir", "report_to": "tracking.wandb", "run_name": "tracking.run_name",
    "project": "tracking.project",
}  # fmt: skip
"""TrainingArguments that a recipe sets by other keys of its own."""
_RENAMED = {
    "group_by_length": "train_sampling_strategy: group_by_length", "warmup_ratio": "warmup_steps (a fraction, below 1)",
    "evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu",
}  # fmt: skip
"""TrainingArguments of transformers 4 that have another name now."""


def training_argument_types() -> dict[str, Any]:
    """Every key of transformers' `TrainingArguments` that a recipe may set, with its type."""
    from transformers import TrainingArguments  # slow to import, and not needed to read a recipe's own keys

    hints = get_type_hints(TrainingArguments)
    return {it.name: hints[it.name] for it in fields(TrainingArguments) if it.init and it.name not in OWN_KEYS}


class KeyRow(NamedTuple):
    """One key of a recipe: its description, choices, and default or `required`; a field without a value is empty."""

    key: str
    description: str
    choices: str
    default: str


def own_types() -> dict[str, Any]:
    """Every key that isn't a TrainingArgument, as `section.key` or `output_dir`, with its type."""
    return {key: info.annotation for key, info in _own_infos().items()}


def key_table() -> list[KeyRow]:
    """Every key that isn't a TrainingArgument, as `section.key` or `output_dir`, in the order of the recipe."""
    rows = _own_infos().items()
    return [KeyRow(key, info.description or "", _choices(info), _default(info)) for key, info in rows]


def recipe_keys() -> dict[str, str]:
    """Every key that isn't a TrainingArgument, with its help text."""
    texts = {}
    for row in key_table():
        parts = [f"one of {row.choices}"] if row.choices else []
        if row.default:
            parts.append(row.default if row.default == "required" else f"default {row.default}")
        texts[row.key] = row.description + (f" ({'; '.join(parts)})" if parts else "")
    return texts


def suggestion(name: str, candidates: Sequence[str]) -> str:
    """What a message adds about an unknown key or flag: its new name, the same in a section, the nearest candidate, or
    nothing.
    """
    renamed = _RENAMED.get(name.removeprefix("--").removeprefix("training."))
    if renamed is not None:
        return f"; since transformers 5 it is {renamed}"
    bare = name.lstrip("-")
    without_section = [it for it in candidates if bare and it.lstrip("-").partition(".")[2] == bare]
    nearest = without_section or get_close_matches(name, candidates, n=1)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""


def _own_infos() -> dict[str, FieldInfo]:
    infos = {"output_dir": _infos(Recipe)["output_dir"]}
    for name, section in SECTIONS.items():
        infos |= {f"{name}.{key}": info for key, info in _infos(section).items() if info.description}
    return infos


def _infos(section: Any) -> dict[str, FieldInfo]:
    """Pydantic's field information of a section; the attribute is added at run time, so type checkers don't know it."""
    return section.__pydantic_fields__


def _choices(info: FieldInfo) -> str:
    kinds = [info.annotation, *get_args(info.annotation)]
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return ", ".join(choices)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True)
    if default is None:
        return ""
    if isinstance(default, list):
        return ", ".join(map(str, default))
    return f"{default:.4g}" if isinstance(default, float) else str(default)
