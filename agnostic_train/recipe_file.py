"""Reading a recipe from a YAML file and flags. Flags override the file, the file overrides defaults."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from reprlib import Repr
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from agnostic_train.errors import UserError
from agnostic_train.recipe import Recipe, TrainingSection
from agnostic_train.recipe_keys import (
    OWN_KEYS,
    SECTIONS,
    own_types,
    recipe_keys,
    suggestion,
    training_argument_types,
)

_UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")
_MAX_VALUES = 10_000
_FINITE = ConfigDict(allow_inf_nan=False)
_TRAINING_KEYS = [it.name for it in fields(TrainingSection) if it.name != "arguments"]


def load_recipe(file: str | Path, flags: dict[str, str] | None = None) -> Recipe:
    """Reads a YAML recipe; flags override the file, the file overrides defaults.

    Args:
        file: YAML 1.2, so that `no` is the language code of Norwegian, not false, and 1e-4 is a number.
        flags: values by `section.key` or `output_dir`, parsed as YAML. If the key takes text, a value that YAML would
            read as something else ({lang}, 1e5, 2024-01-01) stays as it was typed.

    Raises:
        UserError: a mistake in the file or a flag; one line that names it and the key, and says what would be right.
    """
    source = str(file)
    try:
        values = _parse_yaml(Path(file).read_text(encoding="utf-8"), source)
    except FileNotFoundError:
        raise UserError(f"{source}: no such recipe") from None
    except IsADirectoryError:
        raise UserError(f"{source}: a folder, where a recipe (YAML) was expected") from None
    except UnicodeDecodeError:
        raise UserError(f"{source}: not UTF-8 text") from None
    if values is None:
        raise UserError(f"{source}: the recipe is empty")
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected sections such as 'model:' and 'corpus:', not a {type(values).__name__}")
    # A section whose keys are all commented out is read as None.
    values |= {name: {} for name in SECTIONS if name in values and values[name] is None}
    for key, value in (flags or {}).items():
        section, _, name = key.partition(".")
        parsed = _parse_flag(key, value)
        if not name:
            values[section] = parsed
            continue
        if not isinstance(values.setdefault(section, {}), dict):
            raise UserError(f"{source}: {section} must be a section of keys")
        values[section][name] = parsed
    try:
        return make_recipe(values, source)
    except UserError as error:
        # A mistake in a flag is reported under the flag's name, not the file's.
        message = str(error).removeprefix(str(UserError(f"{source}:"))).lstrip()
        if any(re.match(rf"{re.escape(key)}[.: ]", message) for key in flags or {}):
            raise UserError(f"--{message}") from None
        section_flags = [f"--{key}" for key in flags or {} if message.startswith(f"{key.partition('.')[0]}: ")]
        if section_flags:
            raise UserError(f"{source} with {', '.join(section_flags)}: {message}") from None
        raise


def make_recipe(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Builds a recipe from plain values, nested by section; errors are as by `load_recipe` and name `source`."""
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for name, section in values.items():
        for key, value in section.items() if isinstance(section, dict) else [("", section)]:
            if not isinstance(name, str) or not isinstance(key, str):
                raise UserError(f"{source}: unknown key {_short(key or name)}; a key is a word")
            where = f"{name}.{key}".rstrip(".")
            _check_plain([name, key, value], f"{source}: {where}")
            _check_truth(value, own_types().get(where), f"{source}: {where}")
    training, arguments = values.get("training"), {}
    if isinstance(training, dict):
        arguments = {key: value for key, value in training.items() if key not in _TRAINING_KEYS}
        values["training"] = {key: value for key, value in training.items() if key in _TRAINING_KEYS}
    try:
        recipe = TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        # A misspelt key is also missing under its right name; the error about the misspelling is more helpful.
        errors = sorted(error.errors(), key=lambda it: it["type"] not in _UNKNOWN_KEY)
        if errors[0]["loc"][:1] == ("training",):
            _check_arguments(arguments, source)
        raise UserError(f"{source}: {_explain(errors[0])}") from None
    # Checked last: it imports transformers, which takes seconds, and other mistakes should show at once.
    arguments = _check_arguments(arguments, source)
    return replace(recipe, training=replace(recipe.training, arguments=arguments))


def _parse_flag(key: str, value: str) -> Any:
    takes_text, text = _takes_text(key), value.strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] in "'\""
    if takes_text == "one" and text.lower() not in ("", "~", "null") and not is_quoted:
        return text  # YAML would read {lang}_Latn, 1e3 or "a #1" as something else
    try:
        parsed = _parse_yaml(value, f"--{key}")
    except UserError:
        if takes_text == "one":
            return text
        raise
    if parsed is None or not takes_text or isinstance(parsed, str):
        return parsed
    return parsed if takes_text == "several" and isinstance(parsed, list) else value


def _takes_text(key: str) -> Literal["one", "several"] | None:
    """Returns `"one"` if a key takes text, `"several"` if it takes a list of texts, and otherwise None."""
    section, _, name = key.partition(".")
    kind = own_types().get(key)
    if kind is None and section == "training":
        kind = training_argument_types().get(name)
    parts = [it for it in (get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]) if it is not NoneType]
    if all(_plain_type(it) is str for it in parts):
        return "one"
    lists = [get_args(_plain_type(it)) for it in parts if get_origin(_plain_type(it)) is list]
    return "several" if len(lists) == len(parts) and all(_plain_type(it) is str for (it,) in lists) else None


def _plain_type(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _check_arguments(arguments: dict[str, Any], source: str) -> dict[str, Any]:
    """Checks the names and types of TrainingArguments and returns their values, converted to these types."""
    if not arguments:
        return {}
    known = training_argument_types()
    checked = {}
    for key, value in arguments.items():
        if key in OWN_KEYS:
            raise UserError(f"{source}: training.{key} comes from the recipe's own key {OWN_KEYS[key]}")
        if key not in known:
            candidates = [f"training.{it}" for it in (*_TRAINING_KEYS, *known)]
            raise UserError(f"{source}: {_unknown(f'training.{key}', candidates)}")
        _check_truth(value, known[key], f"{source}: training.{key}")
        try:
            checked[key] = TypeAdapter(known[key], config=_FINITE).validate_python(value)
        except ValidationError as error:
            raise UserError(f"{source}: training.{key}: {error.errors()[0]['msg']}, not {_short(value)}") from None
    return checked


def _check_plain(value: Any, where: str) -> None:
    """Refuses values that a manifest (strict JSON) or a file name can't hold, such as dates and recursive lists."""
    pending, num_values = [value], 0
    while pending:
        item = pending.pop()
        num_values += 1
        if num_values > _MAX_VALUES:
            # With aliases of aliases, a few lines of YAML can stand for billions of values, or for endlessly many.
            raise UserError(f"{where}: more than {_MAX_VALUES:,} values, or it contains itself; make it shorter")
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            pending += item
        elif isinstance(item, str):
            if "\0" in item or any("\ud800" <= character <= "\udfff" for character in item):
                raise UserError(f"{where}: {_short(item)} holds characters that no text or file name can hold")
        elif isinstance(item, int):
            if not abs(item) < 2**63:
                raise UserError(f"{where}: a whole number must be below 2^63")
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise UserError(f"{where}: must be a finite number, not {item}")
        elif item is not None:
            raise UserError(f"{where}: {_short(item)} is a {type(item).__name__}; write it as text, in quotes")


def _check_truth(value: Any, kind: Any, where: str) -> None:
    """Refuses `true` and `false` where they would be read as the numbers 1 and 0.

    Args:
        kind: the key's type; None, which lets every value pass, if it is unknown.
    """
    values = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
    booleans = [it for it in values if isinstance(it, bool)]
    if booleans and kind is not None and not _holds(kind, bool) and (_holds(kind, int) or _holds(kind, float)):
        raise UserError(f"{where}: takes a number, not {str(booleans[0]).lower()}")


def _holds(kind: Any, wanted: type) -> bool:
    """Whether a type is `wanted` or has it among its type arguments, at any depth."""
    return kind is wanted or any(_holds(it, wanted) for it in get_args(kind))


def _short(value: Any) -> str:
    shortened = Repr()
    shortened.maxlevel, shortened.maxstring, shortened.maxother = 2, 100, 100
    return shortened.repr(value)


def _explain(error: dict) -> str:
    key = ".".join(str(part) for part in error["loc"] if isinstance(part, str))
    if error["type"] in _UNKNOWN_KEY:
        candidates = [*SECTIONS, *recipe_keys()] if "." not in key else list(recipe_keys())
        return _unknown(key, candidates)
    if error["type"] in ("missing", "missing_argument"):
        return f"{key} is missing"
    if error["type"] in ("dataclass_type", "dataclass_exact_type"):
        return f"{key} must be a section of keys, not {_short(error['input'])}"
    if error["type"] == "too_short":
        return f"{key}: needs at least {error['ctx']['min_length']}, not {_short(error['input'])}"
    message = error["msg"].removeprefix("Value error, ")
    # Errors of our own validators already say what was given.
    is_own = error["type"] == "value_error"
    given = "" if is_own or isinstance(error["input"], (dict, ArgsKwargs)) else f", not {_short(error['input'])}"
    if error["input"] is None and re.search(r":\S*$", key):
        given += "; YAML needs a space after the colon"
    return f"{key}: {message[0].lower() + message[1:]}{given}"


def _unknown(key: str, candidates: list[str]) -> str:
    return f"unknown key {key}{suggestion(key, candidates)}"


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise UserError(f"{source}: not valid YAML (nested too deeply)") from None
    except (YAMLError, ValueError, LookupError) as error:  # `!!int x` and 99 May raise Python's own
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or error
        if re.search(r"\d{4}-\d+-\d+", text):
            problem = f"{problem}; put a text that looks like a date in quotes"
        raise UserError(f"{source}: not valid YAML{where} ({problem})") from None
