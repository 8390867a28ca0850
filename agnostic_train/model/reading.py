"""Reading configs, tokenizers and models from folders or the hub, with one-line errors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub.errors import RevisionNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file, extract_commit_hash
from transformers.utils.logging import get_logger

from agnostic_train.errors import UserError
from agnostic_train.hub_names import is_path, refusal

logger = get_logger(__name__)

_LFS = b"version https://git-lfs"
_PARTS = {AutoConfig: "the config", AutoTokenizer: "the tokenizer", AutoModelForCausalLM: "the weights"}
_FILES = {
    "the config": [CONFIG_NAME],
    "the tokenizer": ["tokenizer*", "*.model", "vocab*", "*.tiktoken"],
    "the weights": ["*.safetensors", "*.bin"],
}


def read_model(name: str | Path, key: str, revision: str | None = None, **settings) -> PreTrainedModel:
    """Reads a causal language model into main memory.

    Args:
        name: a local checkpoint folder or a hub name.
        key: the recipe key or argument that names it, for error messages.
        revision: a branch, tag or commit of the hub repository; its main branch by default.
        settings: passed on to `from_pretrained`.

    Raises:
        UserError: the model doesn't exist, can't be loaded, or its checkpoint isn't complete.
    """
    commit = hub_commit(name, key, revision)
    settings |= {"revision": commit or revision, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _without_report():
        model, info = read(AutoModelForCausalLM, name, key, **settings)
    _check_complete(info, name, key)
    # Under the name that transformers used, which doesn't record it any more.
    model.config._commit_hash = commit
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        logger.warning_once(
            f"{key}: {name} has {len(unused)} weights that its config has no use for, such as {unused[0]}"
        )
    return model


def read(auto_class, name: str | Path, key: str, **settings):
    """Calls `auto_class.from_pretrained(name, **settings)`; raises `UserError` that names `key` if it can't."""
    if _is_local(name) and not Path(name).exists():
        raise UserError(f"{key}: no such folder {name}")
    if Path(name).exists():
        check_folder(name, key)
    with _in_one_line(_PARTS[auto_class], name, key, settings.get("revision")):
        return auto_class.from_pretrained(name, **settings)


def hub_commit(name: str | Path, key: str, revision: str | None = None) -> str | None:
    """Returns the commit that a revision of a hub repository stands for now; None for a local folder.

    Args:
        name: a local checkpoint folder or a hub name.
        key: the recipe key or argument that names it, for error messages.
        revision: a branch, tag or commit; the main branch by default.

    Raises:
        UserError: there is no such repository or revision, or neither the hub nor its local cache has it.
    """
    if _is_local(name):
        return None
    with _in_one_line(_PARTS[AutoConfig], name, key, revision):
        # The cache keeps files in folders named by commit.
        return extract_commit_hash(cached_file(name, CONFIG_NAME, revision=revision), None)


def commit_of(model: nn.Module) -> str | None:
    """The commit of the hub repository from which `read_model` loaded a model; None if it came from elsewhere."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def _is_local(name: str | Path) -> bool:
    return Path(name).exists() or is_path(name)  # the hub would be asked for any other path repeatedly


@contextmanager
def _in_one_line(part: str, name: str | Path, key: str, revision: str | None) -> Iterator[None]:
    """Turns any error of reading a part of a model into a `UserError` that names `key` and says what to do."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # reading damaged or unknown files can raise anything
        problem = shorten(str(error) or type(error).__name__, 400)
        if isinstance(error.__cause__, RevisionNotFoundError):
            key = "model.revision" if key == "model.name" else key
            raise UserError(f"{key}: {name} has no revision {revision!r}") from None
        if refused := refusal(error.__cause__, "model"):
            problem = refused
        elif "trust_remote_code" in str(error):
            problem = "it comes with code of its own; if you trust that, set model.trust_remote_code: true"
        elif "Unrecognized configuration class" in str(error):
            problem = "it isn't a decoder-only language model"
        elif Path(name).is_dir():
            problem = _problem_of_files(Path(name), part) or problem
        elif not Path(name).exists():
            problem = f"no such folder, and not available from the hub ({shorten(problem, 200)})"
            part += f" at revision {revision!r}" if revision else ""
        raise UserError(f"{key}: can't load {part} of {name}: {problem}") from None


def _problem_of_files(folder: Path, part: str) -> str | None:
    """What a folder's files say about why a part of the model can't be read from them, if anything."""
    found = sorted(file for pattern in _FILES[part] for file in folder.glob(pattern) if file.is_file())
    for file in found:
        with file.open("rb") as content:
            if content.read(len(_LFS)) == _LFS:
                return f"{file.name} is only a pointer of Git LFS; run `git lfs pull` there"
    if part == _PARTS[AutoTokenizer] and not found:
        return "it has no tokenizer, such as a tokenizer.json; save the model's there"
    return None


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has the vocabulary of a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return any(Path(folder, name).is_file() for name in names)


def check_folder(folder: str | Path, key: str) -> None:
    """Raises `UserError` that names `key` if a folder holds no checkpoint."""
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{key}: {folder} is a file; name the folder of a checkpoint")
    if not (folder / CONFIG_NAME).exists():
        found = ""
        if has_adapter(folder):
            found = " but an adapter; merge it into its base and save the result"
        elif any(folder.glob("*.gguf")):
            found = " but a GGUF file, which isn't supported"
        raise UserError(f"{key}: {folder} has no {CONFIG_NAME}{found}; name the folder of a checkpoint")


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
