"""Writes a trained model as a plain checkpoint, and reads it back to check it."""

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file, logging

from agnostic_train.errors import UserError
from agnostic_train.export.trained import Trained
from agnostic_train.model.weights import bit_patterns
from agnostic_train.training.delta import KEY_PREFIX

logger = logging.get_logger(__name__)

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def write_merged(directory: Path, trained: Trained, dtype: torch.dtype | None) -> None:
    """Writes the weights, the config and, of a multimodal model, the processor.

    dtype: of the weights; None keeps each weight's own.

    Raises:
        UserError: a weight is beyond the range of the dtype, or the model's config is invalid.
        RuntimeError: what was written isn't what was meant.
    """
    # Cast once per storage: tied weights stay tied, and are written once.
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    state = {}
    for name, value, own_dtype in trained.weights(trained.model.state_dict().items()):
        storage = value.data_ptr(), value.shape
        is_sum = name.removesuffix(".weight") in trained.adapter  # the next sum may reuse this one's memory
        if storage in cast and not is_sum:
            state[name] = cast[storage]
            continue
        rounded = value.to(dtype or own_dtype) if value.is_floating_point() else value
        if _has_smaller_range(rounded.dtype, value.dtype) and not torch.equal(rounded.isfinite(), value.isfinite()):
            raise UserError(
                f"{name}: weights beyond the range of {str(rounded.dtype).removeprefix('torch.')}; export in a wider "
                "export.dtype"
            )
        # In main memory: the accelerator's would have to hold the model twice.
        state[name] = rounded.cpu()
        if not is_sum:
            cast[storage] = state[name]
        del value, rounded
    model = trained.model
    try:
        with _without_native_adapter(model):
            model.save_pretrained(directory, state_dict=dict(state))  # a copy: it removes what it has written
    except ValueError as error:
        problem = shorten(str(error), 500)
        raise UserError(
            f"model: its config or generation_config is invalid, so it can't be saved ({problem})"
        ) from None
    _check_written(directory, type(model), state)
    # save_pretrained writes the dtype of the model in memory to the config, not that of the given weights.
    config = copy.deepcopy(model.config)
    config.dtype = dtype or model.dtype
    if trained.base is not None and hasattr(trained.base.config, "use_cache"):
        config.use_cache = trained.base.config.use_cache  # a Trainer sets it to False
    config.save_pretrained(directory)
    _copy_processor(directory, trained)


def _has_smaller_range(dtype: torch.dtype, than: torch.dtype) -> bool:
    return dtype != than and torch.finfo(dtype).max < torch.finfo(than).max


def _copy_processor(directory: Path, trained: Trained) -> None:
    """Copies what prepares a multimodal model's other inputs, such as images, from where its base was loaded."""
    config = trained.model.config
    if trained.base_name is None or config.get_text_config() is config:
        return
    for name in _PROCESSOR_FILES:
        try:
            file = cached_file(
                trained.base_name,
                name,
                revision=trained.base_revision,
                _raise_exceptions_for_missing_entries=False,
            )
        except (OSError, ValueError) as error:
            logger.warning(f"{trained.base_name}: its processor's files aren't at hand ({shorten(str(error), 200)})")
            return
        if file is not None:
            shutil.copyfile(file, directory / name)


@contextmanager
def _without_native_adapter(model: PreTrainedModel) -> Iterator[None]:
    """Hides adapters that transformers loaded: `save_pretrained` would otherwise save an adapter and drop the rest."""
    changed: dict[str, object] = {}
    if getattr(model, "_hf_peft_config_loaded", False):
        changed["_hf_peft_config_loaded"] = False
    if any(KEY_PREFIX in str(it.source_patterns) for it in getattr(model, "_weight_conversions", None) or []):
        # These conversions belong to the adapter, but would rename the model's weights; None selects the family's own.
        changed["_weight_conversions"] = None
    original = {name: getattr(model, name) for name in changed}
    vars(model).update(changed)
    try:
        yield
    finally:
        vars(model).update(original)


def _check_written(directory: Path, model_class: type[PreTrainedModel], state: Mapping[str, Tensor]) -> None:
    """Reads the files back, and checks that every weight was written as intended, once per storage."""
    read = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            if not state.keys() >= set(names):
                # Some families' checkpoints (multimodal Gemma 3) use names that differ from those of their modules.
                return _check_loaded(directory, model_class, state)
            for name in names:
                _check_equal(name, tensors.get_tensor(name), state[name])
                read.add(state[name].data_ptr())
    lost = [name for name, value in state.items() if value.data_ptr() not in read]
    if lost:
        raise RuntimeError(f"{len(lost)} weights weren't written, such as {lost[0]}")


def _check_loaded(directory: Path, model_class: type[PreTrainedModel], state: Mapping[str, Tensor]) -> None:
    # Loading gives all weights one dtype. The widest of theirs can hold each of them.
    widest = reduce(torch.promote_types, {value.dtype for value in state.values() if value.is_floating_point()})
    loaded_state = model_class.from_pretrained(directory, dtype=widest).state_dict()
    for name, value in state.items():
        _check_equal(name, loaded_state[name].to(value.dtype), value)


def _check_equal(name: str, written: Tensor, meant: Tensor) -> None:
    # By bits: a NaN in a weight that nothing uses doesn't equal itself.
    if written.dtype != meant.dtype or not torch.equal(bit_patterns(written), bit_patterns(meant)):
        raise RuntimeError(f"{name} wasn't written correctly")
