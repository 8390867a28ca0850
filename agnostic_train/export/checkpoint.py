"""Enhanced checkpoints: whole ones, and adapters of a few rows and columns."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import get_args

import torch
from peft import LoraConfig, TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agnostic_train.choices import ExportTarget, check_choice
from agnostic_train.errors import UserError
from agnostic_train.export.frozen_weights import FrozenWeightCheck, check_frozen_weights
from agnostic_train.export.trained import Trained
from agnostic_train.files import check_replaceable, public_name, read_json, whole_directory, write_json
from agnostic_train.model.weights import bit_patterns
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.compact import NeuronConfig
from agnostic_train.training.delta import KEY_PREFIX, Delta
from agnostic_train.versions import installed_version

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
    neurons: NeuronSet | Mapping | None = None,
    model_card: str | None = None,
) -> FrozenWeightCheck:
    """Writes a checkpoint or an adapter, and a `manifest.json` with the frozen-weight check, all or nothing.

    Args:
        model: a model trained by `NeuronTrainer` (`trainer.model`), any model with one active neuron adapter, or the
            folder of such an adapter; left as found.
        directory: replaced if it is an earlier export.
        to: `merged`, a plain checkpoint that `AutoModelForCausalLM.from_pretrained` loads. `lora`, an adapter that
            PEFT loads without this package: R rows or columns are a LoRA of rank R with a one-hot factor. `delta`,
            the rows and columns alone, which PEFT loads once `agnostic_train` is imported.
        base: the model before training, or where to load it from. None: for an adapter, the weights that it stands
            beside (for a folder, the base that it names); for other models the manifest says `unverified`, and only
            `merged` can be had.
        tokenizer: saved beside the weights.
        dtype: of the weights of a `merged` checkpoint, such as `torch.float32` or "bfloat16"; the model's own by
            default. Each weight is rounded once, from the sum in float32. Adapters are float32, beside a float64
            model float64.
        neurons: all that was trained since `base`, as a `NeuronSet` or what makes one; by default the adapter's, and the
            model's `trained_neurons`. Where nobody knows, the manifest says `unverified`.
        model_card: the text of `README.md`.

    Returns: what the comparison with the base says; its `status` is `identical`, `changed` or `unverified`.

    Raises:
        UserError: an unknown target or dtype, a directory that holds something else than an export, a base of other
            shapes, quantised weights to merge into, or trained weights that aren't finite in `dtype`.
        TypeError: a tokenizer's name instead of the tokenizer.
    """
    check_choice("export.to", to, ExportTarget)
    if isinstance(tokenizer, (str, Path)):
        raise TypeError("tokenizer: expected a tokenizer, such as AutoTokenizer.from_pretrained gives, not its name")
    dtype = _dtype(dtype)
    check_replaceable(directory, is_exported)
    trained = Trained.of(model, base, neurons)
    if to == "merged" and trained.is_quantised:
        raise UserError(
            "export.to: 'merged' can't add float32 rows to quantised weights; export the adapter's folder with the "
            "unquantised model as base, or export to 'lora' or 'delta'"
        )
    own = trained.model.dtype
    dtype = (dtype or own) if to == "merged" else torch.promote_types(own, torch.float32)
    check = check_frozen_weights(trained, dtype)
    _check_finite(trained, dtype)
    with whole_directory(directory, is_exported) as temporary:
        if to == "merged":
            _write_merged(temporary, trained, dtype)
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
                "dtype": str(dtype).removeprefix("torch."),
                "base": trained.base_name and public_name(trained.base_name),
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
    """Whether a file or folder is part of an export, as the manifest beside it says."""
    manifest = path.with_name(MANIFEST)
    try:
        content = read_json(manifest)
    except UserError:  # none, or a broken one
        return False
    if not isinstance(content, dict) or content.get("format") not in get_args(ExportTarget):
        return False
    # A card can be written later.
    return path.name in (CARD, MANIFEST, *content.get("files", []))


def _write_merged(directory: Path, trained: Trained, dtype: torch.dtype) -> None:
    # Cast once per storage: weights that are tied stay tied, and are written once.
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    state = {}
    for name, value in trained.weights(trained.model.state_dict().items()):
        rounded = value.to(dtype) if value.is_floating_point() else value
        if name.removesuffix(".weight") in trained.adapter:
            state[name] = rounded  # the next sum may come to lie where this one was
        else:
            state[name] = cast.setdefault((value.data_ptr(), value.shape), rounded)
        del value, rounded
    model = trained.model
    try:
        with _without_native_adapter(model):
            model.save_pretrained(directory, state_dict=dict(state))  # it takes out what it has written
    except ValueError as error:
        raise UserError(f"model: transformers can't save it ({shorten(str(error), 300)})") from None
    _check_written(directory, type(model), state, dtype)
    # save_pretrained writes the dtype that the model has in memory, not that of the weights it is given.
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.save_pretrained(directory)


@contextmanager
def _without_native_adapter(model: PreTrainedModel) -> Iterator[None]:
    """Has transformers take the model for one without adapters: it would save an adapter of its own, and drop the rest."""
    changed: dict[str, object] = {}
    if getattr(model, "_hf_peft_config_loaded", False):
        changed["_hf_peft_config_loaded"] = False
    if any(KEY_PREFIX in str(it.source_patterns) for it in getattr(model, "_weight_conversions", None) or []):
        # How the adapter's names were read, by which it would write the model's; without them it takes the family's.
        changed["_weight_conversions"] = None
    found = {name: getattr(model, name) for name in changed}
    vars(model).update(changed)
    try:
        yield
    finally:
        vars(model).update(found)


def _check_written(
    directory: Path, model_class: type[PreTrainedModel], state: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Reads the files back: each weight as it was to be written, once per storage."""
    read = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            if not state.keys() >= set(names):
                # Transformers keeps some families' checkpoints (Gemma 3 with images) under other names than their modules.
                return _check_loaded(model_class.from_pretrained(directory, dtype=dtype), state)
            for name in names:
                _check_equal(name, tensors.get_tensor(name), state[name])
                read.add(state[name].data_ptr())
    lost = [name for name, value in state.items() if value.data_ptr() not in read]
    if lost:
        raise RuntimeError(f"{len(lost)} weights weren't written, such as {lost[0]}")


def _check_loaded(loaded: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    found = loaded.state_dict()
    for name, value in state.items():
        _check_equal(name, found[name], value)


def _check_equal(name: str, written: Tensor, meant: Tensor) -> None:
    # By bits: a NaN in a weight that nothing uses doesn't equal itself.
    if written.dtype != meant.dtype or not torch.equal(bit_patterns(written.cpu()), bit_patterns(meant.cpu())):
        raise RuntimeError(f"{name} wasn't written as it was")


def _check_finite(trained: Trained, dtype: torch.dtype) -> None:
    for name, chosen in (trained.chosen or {}).items():
        weight, delta = trained.model.get_submodule(name).weight, trained.adapter.get(name)
        written = []
        if weight.is_floating_point():  # a quantised weight takes no sum
            written.append(weight.index_select(chosen.dim, chosen.index.to(weight.device)))
        if delta is not None:
            values = delta.values.to(weight.device)
            own = weight.index_select(delta.dim, delta.index.to(weight.device)) if weight.is_floating_point() else 0
            written.append(own + values)
        if not all(it.to(dtype).isfinite().all() for it in written):
            raise UserError(
                f"{name}: trained weights aren't finite in {str(dtype).removeprefix('torch.')}; train with a lower "
                "learning rate, or export in a wider export.dtype"
            )


def _write_delta(directory: Path, trained: Trained) -> None:
    deltas = trained.deltas()
    sizes = [{name: len(it.index) for name, it in deltas.items() if it.dim == dim} for dim in (0, 1)]
    config = NeuronConfig(
        task_type=TaskType.CAUSAL_LM, base_model_name_or_path=trained.base_name, inference_mode=True,
        rows=sizes[0], columns=sizes[1],
    )  # fmt: skip
    tensors = {f"{name}.neuron_delta": delta.values for name, delta in deltas.items()}
    tensors |= {f"{name}.neuron_index": delta.index for name, delta in deltas.items()}
    _write_adapter(directory, config, tensors)


def _write_lora(directory: Path, trained: Trained) -> None:
    deltas, shapes = trained.deltas(), trained.shapes
    ranks = {name: len(delta.index) for name, delta in deltas.items()}
    largest = max(ranks.values())
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, base_model_name_or_path=trained.base_name, inference_mode=True,
        r=largest, lora_alpha=largest, rank_pattern=ranks, alpha_pattern=ranks, target_modules=sorted(ranks),
    )  # fmt: skip
    tensors = {}
    for name, delta in deltas.items():
        for factor, values in zip("AB", _lora_factors(delta, shapes[name]), strict=True):
            tensors[f"{name}.lora_{factor}.weight"] = values
    _write_adapter(directory, config, tensors)


def _lora_factors(delta: Delta, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with B @ A = the delta: one is its values, the other one-hot."""
    index, values = delta.index.to(delta.values.device), delta.values
    picked = torch.zeros(len(index), shape[delta.dim], dtype=values.dtype, device=values.device)
    picked.scatter_(1, index.unsqueeze(1), 1)
    return (values, picked.T) if delta.dim == 0 else (picked, values)


def _write_adapter(directory: Path, config: NeuronConfig | LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    config.save_pretrained(str(directory))
    tensors = {f"{KEY_PREFIX}{name}": values.contiguous().cpu() for name, values in tensors.items()}
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16) or (dtype and not found):
        raise UserError(f"export.dtype: {dtype!r} isn't one of float64, float32, bfloat16, float16")
    return found
