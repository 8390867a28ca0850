"""Loading models and tokenizers as the recipe's `model` section says, with one-line errors."""

from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from agnostic_train.errors import UserError
from agnostic_train.fingerprints import hash_file
from agnostic_train.model.reading import check_folder, hub_commit, read, read_model
from agnostic_train.recipe import ModelSection

_SMALL_FILE = 1 << 20


def load_model(section: ModelSection, key: str = "model.name") -> PreTrainedModel:
    """Loads a causal language model in `model.dtype` onto the accelerator, if there is one.

    Args:
        key: the recipe key that names it, for error messages.

    Raises:
        UserError: the model doesn't exist, can't be loaded, or its checkpoint isn't complete.
    """
    dtype = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    return read_model(section.name, key, dtype=dtype, **_source(section)).to(find_accelerator() or "cpu").eval()


def find_accelerator() -> torch.device | None:
    """Returns the device that models are loaded and trained on; None for the CPU."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):  # recipes/accelerate/cpu.yaml, even if there is a GPU
        return None
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    # Apple's MPS has no float64, in which detection and perplexity sum.
    return None if accelerator is not None and accelerator.type == "mps" else accelerator


def load_config(section: ModelSection, key: str = "model.name") -> PreTrainedConfig:
    """Reads a model's config; raises `UserError` that names `key` if it can't."""
    return read(AutoConfig, section.name, key, **_source(section))


def load_empty_model(section: ModelSection) -> PreTrainedModel:
    """Builds the model from its config alone, on the meta device: its modules and shapes, without weights.

    Raises:
        UserError: the config doesn't exist, or isn't one of a causal language model.
    """
    config = load_config(section)
    dtype = (config.get_text_config().dtype or torch.float32) if section.dtype == "auto" else section.dtype
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, str(dtype).removeprefix("torch.")),
                trust_remote_code=section.trust_remote_code,
            )
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"model.name: no model can be made of the config of {section.name}: {shorten(str(error), 400)}"
        ) from None


def at_checkpoint(section: ModelSection, source: str, key: str) -> ModelSection:
    """The section that loads an earlier state of the model: a folder, or a revision of its hub repository.

    Raises:
        UserError: there is no such folder, or it holds no checkpoint; the message names `key`.
    """
    check_checkpoint(section, source, key)
    return replace(section, name=source) if Path(source).is_dir() else replace(section, revision=source)


def check_checkpoint(section: ModelSection, source: str, key: str) -> None:
    """Raises `UserError` that names `key` if `source` is neither a checkpoint's folder nor possibly a revision."""
    if Path(source).is_dir():
        check_folder(source, key)
    elif Path(section.name).exists():
        raise UserError(f"{key}: no such folder {source}, and model.name is a folder without revisions")


def load_tokenizer(section: ModelSection, key: str = "model.name") -> PreTrainedTokenizerBase:
    """Loads the model's tokenizer; raises `UserError` that names `key` if it can't."""
    return read(AutoTokenizer, section.name, key, **_source(section))


def model_identity(section: ModelSection, key: str = "model.name") -> dict:
    """Returns what distinguishes a model from others: the hub's commit, or the files of a local folder.

    key: the recipe key that names it, for error messages.

    Small files are identified by content, large ones by size and modification time: hashing 16 GB of weights at every
    start would be slow.
    """
    folder = Path(section.name)
    if not folder.is_dir():
        return {"name": section.name, "commit": hub_commit(section.name, key, section.revision) or section.revision}
    files = {}
    for file in sorted(folder.glob("*")):
        # All files but documentation: weights and tokenizers have many names, and a model's own code counts, too.
        if file.is_file() and file.suffix != ".md" and not file.name.startswith("."):
            stat = file.stat()
            files[file.name] = hash_file(file) if stat.st_size < _SMALL_FILE else [stat.st_size, stat.st_mtime_ns]
    return {"files": files}


def _source(section: ModelSection) -> dict[str, Any]:
    return {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
