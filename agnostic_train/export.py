"""Enhanced checkpoints, with proof that nothing but the chosen neurons moved."""

import copy
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from agnostic_train.files import UserError, whole_directory, write_json
from agnostic_train.neurons import NeuronSet
from agnostic_train.training.mask import masked_parameters

TARGETS = ("merged",)


@dataclass(frozen=True)
class FrozenWeightCheck:
    """What a comparison with the base, bit by bit, says of the weights that weren't chosen.

    status: `identical`, `changed`, or `unverified` without a base to compare with. changed: names of the parameters
    with an unchosen entry that differs. chosen_moved: the part of the chosen entries that differ from the base.
    """

    status: str
    num_compared: int = 0
    changed: tuple[str, ...] = ()
    num_chosen: int = 0
    chosen_moved: float | None = None


def export_checkpoint(
    model: PreTrainedModel,
    directory: str | Path,
    to: str = "merged",
    base: PreTrainedModel | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    neurons: NeuronSet | None = None,
    model_card: str | None = None,
) -> FrozenWeightCheck:
    """Writes a plain Hugging Face checkpoint and a `manifest.json` with the frozen-weight check, all or nothing.

    Args:
        model: a model trained by `NeuronTrainer`; left as found.
        directory: replaced if it is there.
        to: `merged`, a checkpoint that `AutoModelForCausalLM.from_pretrained` loads.
        base: the model before training, or where to load it from. None: the manifest says `unverified`.
        tokenizer: saved beside the weights.
        dtype: of the saved weights, such as `torch.float32` or "bfloat16"; the model's own by default.
        neurons: what was trained; the model's `trained_neurons` by default. Empty: everything may differ.
        model_card: the text of `README.md`.

    Raises:
        UserError: an unknown target or dtype, or a base of other shapes.
    """
    if to not in TARGETS:
        raise UserError(f"export.to: {to!r} isn't one of {', '.join(TARGETS)}")
    dtype = _dtype(dtype) or model.dtype
    neurons = neurons if neurons is not None else getattr(model, "trained_neurons", None)
    check = check_frozen_weights(model, base, neurons, dtype)
    # Cast once per storage: weights that are tied stay tied, and are written once.
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    state = {}
    for name, value in model.state_dict().items():
        rounded = value.to(dtype) if value.is_floating_point() else value
        state[name] = cast.setdefault((value.data_ptr(), value.shape), rounded)
    with whole_directory(directory) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        # save_pretrained writes the dtype that the model has in memory, not that of the weights it is given.
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if model_card is not None:
            (temporary / "README.md").write_text(model_card, encoding="utf-8")
        write_json(
            temporary / "manifest.json",
            {
                "format": to,
                "dtype": str(dtype).removeprefix("torch."),
                "frozen_weights": asdict(check),
                "neurons": None if neurons is None else neurons.counts(),
                "versions": {name: version(name) for name in ("agnostic_train", "transformers", "torch")},
            },
        )
    return check


@torch.no_grad()
def check_frozen_weights(
    model: PreTrainedModel,
    base: PreTrainedModel | str | Path | None,
    neurons: NeuronSet | None,
    dtype: torch.dtype | None = None,
) -> FrozenWeightCheck:
    """Compares every weight that wasn't chosen with the base's, bit by bit, both rounded to `dtype`.

    Args:
        model, base: of the same shapes; a path or name is loaded in its own dtype. None: `unverified`.
        neurons: the chosen ones. None: which weights were meant to move isn't known, so `unverified` too.
        dtype: the dtype of comparison; the model's own by default.
    """
    if base is None or neurons is None:
        return FrozenWeightCheck("unverified")
    if not isinstance(base, nn.Module):
        base = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    dtype = dtype or model.dtype
    chosen = {masked.name: masked for masked in masked_parameters(model, neurons)}
    base_parameters = dict(base.named_parameters())
    changed, num_compared, num_chosen, num_moved = [], 0, 0, 0
    for name, parameter in model.named_parameters():
        other = base_parameters.get(name)
        if other is None or other.shape != parameter.shape:
            raise UserError(f"base: parameter {name} is missing there or has another shape; give the model's own base")
        # Both pass through the model's dtype first: a base in bfloat16 was trained from its float32 values.
        other = other.to(parameter.device, parameter.dtype)
        differs = _bits(parameter.to(dtype)) != _bits(other.to(dtype))
        if name in chosen:
            masked = chosen[name]
            num_chosen += masked.num_chosen
            # Counted before rounding: the question is what training moved.
            moved = _bits(parameter) != _bits(other)
            num_moved += int(moved.index_select(masked.dim, masked.chosen).sum())
            differs &= masked.frozen
            num_compared += parameter.numel() - masked.num_chosen
        else:
            num_compared += parameter.numel()
        if differs.any():
            changed.append(name)
    return FrozenWeightCheck(
        "changed" if changed else "identical",
        num_compared,
        tuple(changed),
        num_chosen,
        num_moved / num_chosen if num_chosen else None,
    )


def _bits(values: Tensor) -> Tensor:
    """The bit patterns: NaN equals NaN, and 0 differs from -0."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(integers[values.element_size()])


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"export.dtype: {dtype!r} isn't a floating-point dtype of torch, such as float32 or bfloat16")
    return found
