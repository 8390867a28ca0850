"""Export of trained models: complete checkpoints, and adapters with only the trained rows and columns."""

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from textwrap import shorten
from typing import get_args

import torch
from peft import LoraConfig, TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from agnostic_train.choices import ExportTarget, check_choice
from agnostic_train.errors import UserError
from agnostic_train.export.frozen_weights import FrozenWeightCheck, check_frozen_weights
from agnostic_train.export.trained import Trained
from agnostic_train.files import check_replaceable, public_name, read_json, whole_directory, write_json
from agnostic_train.model.weights import bit_patterns
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.processes import process_index
from agnostic_train.training.compact import NeuronConfig
from agnostic_train.training.delta import KEY_PREFIX, Delta
from agnostic_train.versions import installed_version

logger = logging.get_logger(__name__)

CARD = "README.md"
MANIFEST = "manifest.json"
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def export_checkpoint(
    model: PreTrainedModel | str | Path,
    directory: str | Path,
    to: ExportTarget = "merged",
    base: PreTrainedModel | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    neurons: NeuronSet | Mapping | None = None,
    model_card: str | None = None,
) -> FrozenWeightCheck:
    """Exports a checkpoint or an adapter, with the frozen-weight check in `manifest.json`; writes all files or none.

    If several processes call it, the first one writes, and the others don't wait for it.

    Args:
        model: a model trained by `NeuronTrainer` (`trainer.model`), any model with one active neuron adapter, or the
            folder of such an adapter; left as found.
        directory: where to write; replaced if it is an earlier export.
        to: `merged`: a plain checkpoint that `AutoModelForCausalLM.from_pretrained` loads. `lora`: an adapter that
            PEFT loads without this package; R rows or columns form a LoRA of rank R with a one-hot factor. `delta`:
            only the rows and columns, which PEFT loads once `agnostic_train` is imported.
        base: the model before training, or its name or folder. If None, an adapter's base is the frozen model around it
            (for a folder, the base that its config names); for other models, the manifest says `unverified`, and only
            `merged` is possible.
        tokenizer: saved with the weights.
        dtype: the dtype of a `merged` checkpoint, such as `torch.float32` or "bfloat16"; by default, each weight's
            own, although loading gives all of them the model's, except those that the family keeps in float32. Each
            weight is rounded once, from the sum in float32. Adapters are float32, or float64 for a float64 model.
        neurons: all neurons trained since `base`, as a `NeuronSet` or a mapping; by default those of the adapter and
            the model's `trained_neurons`. If they are unknown, the manifest says `unverified`.
        model_card: the text of `README.md`.

    Returns: the result of the comparison with the base; its `status` is `identical`, `changed` or `unverified`.

    Raises:
        UserError: the target or dtype is unknown, the directory contains anything but an export or the model's own
            base, the base has other shapes, quantised weights would be merged, weights are offloaded, some aren't
            finite in `dtype`, or an adapter would lack resized embeddings.
        TypeError: `model` is neither a model nor a path, or `tokenizer` is a name instead of a tokenizer.
    """
    check_choice("export.to", to, ExportTarget)
    if isinstance(tokenizer, (str, Path)):
        raise TypeError("tokenizer: expected a tokenizer, such as AutoTokenizer.from_pretrained gives, not its name")
    if not isinstance(model, (nn.Module, str, Path)):
        raise TypeError(f"model: expected a model (trainer.model) or a folder, not a {type(model).__name__}")
    dtype = _dtype(dtype)
    check_replaceable(directory, is_exported)
    trained = Trained.of(model, base, neurons)
    for name in (trained.base_name, getattr(trained.model, "name_or_path", None)):
        if name and Path(name).resolve() == Path(directory).resolve():
            raise UserError(
                f"directory: {directory} holds the model that the training started from, which would be lost; export "
                "to another folder"
            )
    if to == "merged" and trained.is_quantised:
        raise UserError(
            "export.to: 'merged' can't add float32 rows to quantised weights; export the adapter's folder with the "
            "unquantised model as base, or export to 'lora' or 'delta'"
        )
    _check_vocabulary(trained, tokenizer, whole=to == "merged")
    if to != "merged":
        dtype = torch.promote_types(trained.model.dtype, torch.float32)
    check = check_frozen_weights(trained, dtype)
    _check_finite(trained, dtype)
    if process_index() > 0:
        return check
    with whole_directory(directory, is_exported) as temporary:
        if to == "merged":
            _write_merged(temporary, trained, dtype)
            _copy_processor(temporary, trained)
        elif to == "lora":
            _write_lora(temporary, trained)
        else:
            _write_delta(temporary, trained)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if model_card is not None:
            (temporary / CARD).write_text(model_card, encoding="utf-8")
        write_json(
            temporary / MANIFEST,
            {
                "format": to,
                "dtype": str(dtype or trained.model.dtype).removeprefix("torch."),
                "base": trained.base_name and public_name(trained.base_name),
                "revision": trained.base_revision,
                "frozen_weights": asdict(check),
                "neurons": None if trained.neurons is None else trained.neurons.counts(),
                "files": sorted(file.name for file in temporary.iterdir()),
                "versions": {
                    name: installed_version(name) for name in ("agnostic_train", "transformers", "peft", "torch")
                },
            },
        )
    return check


def is_exported(path: Path) -> bool:
    """Returns whether a file or folder is part of an export, according to the manifest in the same folder."""
    manifest = path.with_name(MANIFEST)
    try:
        content = read_json(manifest)
    except UserError:  # the manifest is missing or damaged
        return False
    if not isinstance(content, dict) or content.get("format") not in get_args(ExportTarget):
        return False
    # The model card can be written after the manifest.
    return path.name in (CARD, MANIFEST, *content.get("files", []))


def _write_merged(directory: Path, trained: Trained, dtype: torch.dtype | None) -> None:
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
        state[name] = rounded
        if not is_sum:
            cast[storage] = rounded
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
    if written.dtype != meant.dtype or not torch.equal(bit_patterns(written.cpu()), bit_patterns(meant.cpu())):
        raise RuntimeError(f"{name} wasn't written correctly")


def _check_vocabulary(trained: Trained, tokenizer: PreTrainedTokenizerBase | None, whole: bool) -> None:
    """Warns of a tokenizer with more tokens than embeddings; refuses an adapter whose base has other embeddings.

    whole: whether the export holds the embeddings.
    """
    size = trained.model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > size:
        logger.warning(f"tokenizer: it has {len(tokenizer)} tokens, the model only {size} embeddings")
    if whole or trained.base_name is None:
        return
    try:
        config = AutoConfig.from_pretrained(
            trained.base_name, revision=trained.base_revision, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):  # not at hand, or with code of its own
        return
    of_base = config.get_text_config().vocab_size
    if of_base != size:
        raise UserError(
            f"export.to: an adapter holds no embeddings, and the model's vocabulary of {size} was resized from the "
            f"{of_base} of {trained.base_name}; export to 'merged'"
        )


def _check_finite(trained: Trained, dtype: torch.dtype | None) -> None:
    for name, chosen in (trained.chosen or {}).items():
        weight, delta = trained.model.get_submodule(name).weight, trained.adapter.get(name)
        written = []
        if weight.is_floating_point():  # a quantised weight can't be added to
            written.append(weight.index_select(chosen.dim, chosen.index.to(weight.device)))
        if delta is not None:
            values = delta.values.to(weight.device)
            base = weight.index_select(delta.dim, delta.index.to(weight.device)) if weight.is_floating_point() else 0
            written.append(base + values)
        target = dtype or weight.dtype
        if not all(it.to(target).isfinite().all() for it in written):
            raise UserError(
                f"{name}: trained weights aren't finite in {str(target).removeprefix('torch.')}; train with a lower "
                "learning rate, or export in a wider export.dtype"
            )


def _write_delta(directory: Path, trained: Trained) -> None:
    deltas = trained.deltas()
    sizes = [{name: len(it.index) for name, it in deltas.items() if it.dim == dim} for dim in (0, 1)]
    config = NeuronConfig(
        task_type=TaskType.CAUSAL_LM, base_model_name_or_path=trained.base_name, revision=trained.base_revision,
        inference_mode=True, rows=sizes[0], columns=sizes[1],
    )  # fmt: skip
    tensors = {f"{name}.neuron_delta": delta.values for name, delta in deltas.items()}
    tensors |= {f"{name}.neuron_index": delta.index for name, delta in deltas.items()}
    _write_adapter(directory, config, tensors)


def _write_lora(directory: Path, trained: Trained) -> None:
    deltas, chosen = trained.deltas(), trained.chosen or {}
    ranks = {name: len(delta.index) for name, delta in deltas.items()}
    largest = max(ranks.values())
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, base_model_name_or_path=trained.base_name, revision=trained.base_revision,
        inference_mode=True, r=largest, lora_alpha=largest, rank_pattern=ranks, alpha_pattern=ranks,
        target_modules=sorted(ranks),
    )  # fmt: skip
    tensors = {}
    for name, delta in deltas.items():
        linear = chosen[name].linear
        for factor, values in zip("AB", _lora_factors(delta, (linear.out_features, linear.in_features)), strict=True):
            tensors[f"{name}.lora_{factor}.weight"] = values
    _write_adapter(directory, config, tensors)


def _lora_factors(delta: Delta, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns A (rank, in) and B (out, rank) with B @ A = delta: one has the values, the other is one-hot."""
    index, values = delta.index.to(delta.values.device), delta.values
    picked = torch.zeros(len(index), shape[delta.dim], dtype=values.dtype, device=values.device)
    picked.scatter_(1, index.unsqueeze(1), 1)
    return (values, picked.T) if delta.dim == 0 else (picked, values)


def _write_adapter(directory: Path, config: NeuronConfig | LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    config.save_pretrained(str(directory))
    tensors = {f"{KEY_PREFIX}{name}": values.contiguous().cpu() for name, values in tensors.items()}
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if resolved not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16) or (dtype and not resolved):
        raise UserError(f"export.dtype: {dtype!r} isn't one of float64, float32, bfloat16, float16")
    return resolved
