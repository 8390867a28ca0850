"""Reading configs, tokenizers and models from folders or the hub, with one-line errors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME
from transformers.utils.logging import get_logger

from agnostic_train.errors import UserError

logger = get_logger(__name__)

_PARTS = {AutoConfig: "the config", AutoTokenizer: "the tokenizer", AutoModelForCausalLM: "the weights"}


def read_model(name: str | Path, key: str, **settings) -> PreTrainedModel:
    """Reads a causal language model into main memory.

    Args:
        name: a local checkpoint folder or a hub name.
        key: the recipe key or argument that names it, for error messages.
        settings: passed on to `from_pretrained`.

    Raises:
        UserError: the model doesn't exist, can't be loaded, or its checkpoint isn't complete.
    """
    with _without_report():
        model, info = read(
            AutoModelForCausalLM, name, key, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    _check_complete(info, name, key)
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        logger.warning_once(
            f"{key}: {name} has {len(unused)} weights that its config has no use for, such as {unused[0]}"
        )
    return model


def read(auto_class, name: str | Path, key: str, **settings):
    """Calls `auto_class.from_pretrained(name, **settings)`; raises `UserError` that names `key` if it can't."""
    if (str(name).startswith((".", "/", "~")) or str(name).count("/") > 1) and not Path(name).exists():
        # This can't be a hub name; without the check, the hub would be asked for it repeatedly.
        raise UserError(f"{key}: no such folder {name}")
    if Path(name).is_dir():
        check_folder(name, key)
    try:
        return auto_class.from_pretrained(name, **settings)
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # reading damaged or unknown files can raise anything
        problem = shorten(str(error) or type(error).__name__, 400)
        if not Path(name).exists():
            problem = f"no such folder, and not available from the hub ({shorten(problem, 200)})"
        if "trust_remote_code" in str(error):
            problem = "it comes with code of its own; if you trust that, set model.trust_remote_code: true"
        raise UserError(f"{key}: can't load {_PARTS[auto_class]} of {name}: {problem}") from None


def commit_of(model: nn.Module) -> str | None:
    """The commit of the hub repository that a model was loaded from; None if it came from elsewhere."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def check_folder(folder: str | Path, key: str) -> None:
    """Raises `UserError` that names `key` if a folder holds no checkpoint."""
    if not (Path(folder) / "config.json").exists():
        found = " but an adapter; merge it into its base and save the result" if has_adapter(folder) else ""
        raise UserError(f"{key}: {folder} has no config.json{found}; name the folder of a checkpoint")


def has_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter, which transformers loads along with the model."""
    return (Path(folder) / ADAPTER_CONFIG_NAME).exists()


def _check_complete(info: dict[str, Any], name: str | Path, key: str) -> None:
    """Refuses a checkpoint without some weights of its config: transformers would fill them with random numbers.

    info: what `from_pretrained` returned with `output_loading_info=True` and `ignore_mismatched_sizes=True`.
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


@contextmanager
def _without_report() -> Iterator[None]:
    """Holds back the table in which transformers reports weights that don't fit; it is logged only if loading fails."""
    reporter, held = logging.getLogger("transformers.modeling_utils"), list[logging.LogRecord]()

    def is_no_report(record: logging.LogRecord) -> bool:
        if is_report := "LOAD REPORT" in record.getMessage():
            held.append(record)
        return not is_report

    reporter.addFilter(is_no_report)
    try:
        yield
    except UserError:
        reporter.removeFilter(is_no_report)
        for record in held:
            reporter.handle(record)
        raise
    finally:
        reporter.removeFilter(is_no_report)
