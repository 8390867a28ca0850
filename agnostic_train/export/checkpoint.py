"""Export of trained models: complete checkpoints, and adapters with only the trained rows and columns."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from agnostic_train.choices import ExportTarget, check_choice
from agnostic_train.errors import UserError
from agnostic_train.export.adapters import write_delta, write_lora
from agnostic_train.export.frozen_weights import FrozenWeightCheck, check_frozen_weights
from agnostic_train.export.merged import write_merged
from agnostic_train.export.trained import Trained
from agnostic_train.files import check_replaceable, public_name, read_json, whole_directory, write_json
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.processes import process_index
from agnostic_train.versions import installed_version

logger = logging.get_logger(__name__)

CARD = "README.md"
MANIFEST = "manifest.json"


def export_checkpoint(
    model: PreTrainedModel | str | Path,
    directory: str | Path,
    to: ExportTarget = "merged",
    base: PreTrainedModel | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    neurons: NeuronSet | Mapping | str | Path | None = None,
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
        neurons: all neurons trained since `base`, as a `NeuronSet`, a mapping or a file; by default those of the
            adapter and the model's `trained_neurons`. If they are unknown, the manifest says `unverified`.
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
            write_merged(temporary, trained, dtype)
        elif to == "lora":
            write_lora(temporary, trained)
        else:
            write_delta(temporary, trained)
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


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if resolved not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16) or (dtype and not resolved):
        raise UserError(f"export.dtype: {dtype!r} isn't one of float64, float32, bfloat16, float16")
    return resolved
