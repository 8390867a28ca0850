"""Loading models and tokenizers as the recipe's `model` section says, with one-line errors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from textwrap import shorten

import torch
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import get_logger

from agnostic_train.errors import UserError
from agnostic_train.files import hash_file
from agnostic_train.model.completeness import check_complete
from agnostic_train.recipe import ModelSection

logger = get_logger(__name__)

_SMALL_FILE = 1 << 20
_PARTS = {AutoConfig: "the config", AutoTokenizer: "the tokenizer", AutoModelForCausalLM: "the weights"}


def load_model(section: ModelSection, name: str | Path, key: str = "model.name") -> PreTrainedModel:
    """Loads a causal language model in `model.dtype` onto the accelerator, if there is one.

    Args:
        name: a local checkpoint folder or a hub name.
        key: the recipe key that names it, for error messages.

    Raises:
        UserError: the model doesn't exist, can't be loaded, or its checkpoint isn't complete.
    """
    dtype = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    with _without_report():
        model, info = _load(
            AutoModelForCausalLM,
            section,
            name,
            key,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_complete(info, name, key)
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        logger.warning_once(
            f"{key}: {name} has {len(unused)} weights that its config has no use for, such as {unused[0]}"
        )
    return model.to(find_accelerator() or "cpu").eval()


def find_accelerator() -> torch.device | None:
    """Returns the device that models are loaded and trained on; None for the CPU."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):  # recipes/accelerate/cpu.yaml, even if there is a GPU
        return None
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    # Apple's MPS has no float64, in which detection and perplexity sum.
    return None if accelerator is not None and accelerator.type == "mps" else accelerator


def load_config(section: ModelSection, name: str | Path) -> PreTrainedConfig:
    """Reads the model's config; raises `UserError` if it can't."""
    return _load(AutoConfig, section, name)


def load_empty_model(section: ModelSection, name: str | Path) -> PreTrainedModel:
    """Builds the model from its config alone, on the meta device: its modules and shapes, without weights.

    Raises:
        UserError: the config doesn't exist, or isn't one of a causal language model.
    """
    config = load_config(section, name)
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
            f"model.name: no model can be made of the config of {name}: {shorten(str(error), 400)}"
        ) from None


def load_checkpoint(section: ModelSection, source: str, key: str = "model.checkpoints") -> PreTrainedModel:
    """Loads an earlier state of the model: a folder, or a revision of its hub repository.

    Args:
        source: the folder or revision.
        key: the recipe key that names it, for error messages.

    Raises:
        UserError: there is no such folder or revision, or the model can't be loaded from it.
    """
    check_checkpoint(section, source, key)
    if Path(source).is_dir():
        return load_model(section, source, key)
    return load_model(replace(section, revision=source), section.name, key)


def checkpoint_identity(section: ModelSection, source: str) -> dict:
    """Returns the `model_identity` of the state that `load_checkpoint` loads."""
    if Path(source).is_dir():
        return model_identity(section, source)
    return model_identity(replace(section, revision=source), section.name)


def check_checkpoint(section: ModelSection, source: str, key: str) -> None:
    """Raises `UserError` that names `key` if `source` is neither a checkpoint's folder nor possibly a revision."""
    if Path(source).is_dir():
        _check_folder(source, key)
    elif Path(section.name).exists():
        raise UserError(f"{key}: no such folder {source}, and model.name is a folder without revisions")


def load_tokenizer(section: ModelSection, name: str | Path) -> PreTrainedTokenizerBase:
    """Loads the model's tokenizer; raises `UserError` if it can't."""
    return _load(AutoTokenizer, section, name)


def model_identity(section: ModelSection, name: str | Path) -> dict:
    """Returns what distinguishes a model from others: the hub's commit, or the files of a local folder.

    Small files are identified by content, large ones by size and modification time: hashing 16 GB of weights at every
    start would be slow.
    """
    folder = Path(name)
    if not folder.is_dir():
        config = load_config(section, name)
        return {"name": str(name), "revision": section.revision, "commit": getattr(config, "_commit_hash", None)}
    files = {}
    for file in sorted(folder.glob("*")):
        # All files but documentation: weights and tokenizers have many names, and a model's own code counts, too.
        if file.is_file() and file.suffix != ".md" and not file.name.startswith("."):
            stat = file.stat()
            files[file.name] = hash_file(file) if stat.st_size < _SMALL_FILE else [stat.st_size, stat.st_mtime_ns]
    return {"files": files}


def _load(auto_class, section: ModelSection, name: str | Path, key: str = "model.name", **settings):
    if (str(name).startswith((".", "/", "~")) or str(name).count("/") > 1) and not Path(name).exists():
        # This can't be a hub name; without the check, the hub would be asked for it repeatedly.
        raise UserError(f"{key}: no such folder {name}")
    if Path(name).is_dir():
        _check_folder(name, key)
    try:
        return auto_class.from_pretrained(
            name, revision=section.revision, trust_remote_code=section.trust_remote_code, **settings
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        problem = shorten(str(error), 400)
        if not Path(name).exists():
            problem = f"no such folder, and not available from the hub ({shorten(problem, 200)})"
        if "trust_remote_code" in str(error):
            problem = "it comes with code of its own; if you trust that, set model.trust_remote_code: true"
        raise UserError(f"{key}: can't load {_PARTS[auto_class]} of {name}: {problem}") from None


def _check_folder(folder: str | Path, key: str) -> None:
    if not (Path(folder) / "config.json").exists():
        raise UserError(f"{key}: {folder} has no config.json; name the folder of a checkpoint")


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
