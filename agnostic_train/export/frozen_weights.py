"""The check that training changed only the chosen neurons."""

from dataclasses import dataclass
from typing import Literal

import torch

from agnostic_train.errors import UserError
from agnostic_train.export.trained import Trained
from agnostic_train.model.weights import bit_patterns


@dataclass(frozen=True)
class FrozenWeightCheck:
    """The result of a bitwise comparison with the base of all weight entries that weren't chosen.

    For an adapter that is compared with its own model's frozen weights, or loaded from a folder and added to its base,
    the check verifies the export rather than the training: an adapter has no unchosen entries.

    Attributes:
        status: `identical`, `changed`, or `unverified` if there is no base to compare with.
        against: what the weights were compared with: `base`, or `frozen weights` of the model that has the adapter.
        num_compared: number of unchosen entries compared.
        changed: names of the parameters in which an unchosen entry differs.
        num_chosen: number of chosen entries.
        chosen_moved: the fraction of chosen entries that training changed.
        chosen_surviving: the fraction of changed entries that still differ from the base after rounding to the
            checkpoint's dtype.
    """

    status: Literal["identical", "changed", "unverified"]
    against: Literal["base", "frozen weights"] | None = None
    num_compared: int = 0
    changed: tuple[str, ...] = ()
    num_chosen: int = 0
    chosen_moved: float | None = None
    chosen_surviving: float | None = None


@torch.no_grad()
def check_frozen_weights(trained: Trained, dtype: torch.dtype | None = None) -> FrozenWeightCheck:
    """Compares all unchosen weight entries with the base's, bit by bit, after rounding both to one dtype.

    If the base has a higher precision than the trained model's weights, they differ unless `dtype` is as low as theirs.

    Args:
        trained: the trained model, with its base if known.
        dtype: the dtype in which to compare; by default, each of the model's weights in its own.

    Raises:
        UserError: the base lacks a parameter, or has one of another shape.
    """
    if trained.chosen is None or trained.is_quantised or (trained.base is None and not trained.adapter):
        return FrozenWeightCheck("unverified")
    before = trained.model if trained.base is None else trained.base
    others = {name.replace(".base_layer.", "."): value for name, value in before.named_parameters()}
    changed, num_compared, num_chosen, num_moved, num_surviving = [], 0, 0, 0, 0
    for name, weight, own_dtype in trained.weights(trained.model.named_parameters()):
        other = others.get(name)
        if other is None or other.shape != weight.shape:
            raise UserError(f"base: parameter {name} is missing or has another shape; give the model's own base")
        other = other.to(weight.device)
        differs = bit_patterns(weight.to(dtype or own_dtype)) != bit_patterns(other.to(dtype or own_dtype))
        chosen = trained.chosen.get(name.removesuffix(".weight"))
        if chosen is not None:
            dim, index = chosen.dim, chosen.index.to(weight.device)
            # Compared before rounding to `dtype`: this counts what training changed.
            moved = bit_patterns(weight.index_select(dim, index)) != bit_patterns(
                other.index_select(dim, index).to(weight.dtype)
            )
            num_chosen += moved.numel()
            num_moved += int(moved.sum())
            num_surviving += int((moved & differs.index_select(dim, index)).sum())
            num_compared -= moved.numel()
            differs.index_fill_(dim, index, False)
        num_compared += weight.numel()
        if differs.any():
            changed.append(name)
        del weight, differs  # free them before the loop computes the next sum
    return FrozenWeightCheck(
        "changed" if changed else "identical",
        "frozen weights" if trained.base is None else "base",
        num_compared,
        tuple(changed),
        num_chosen,
        num_moved / num_chosen if num_chosen else None,
        num_surviving / num_moved if num_moved else None,
    )
