"""Proof that nothing but the chosen neurons moved."""

from dataclasses import dataclass

import torch

from agnostic_train.errors import UserError
from agnostic_train.export.trained import Trained
from agnostic_train.model.weights import bit_patterns


@dataclass(frozen=True)
class FrozenWeightCheck:
    """What a comparison with the base, bit by bit, says of the weights that weren't chosen.

    status: `identical`, `changed`, or `unverified` without a base to compare with. against: what was compared with,
    `base`, or `frozen weights` where an adapter's own neighbours stand in for it. There, and where an adapter comes from a
    folder and is added to its base, the check says what the export did: an adapter has no entry that wasn't chosen.
    changed: names of the parameters with an unchosen entry that differs. chosen_moved: the part of the chosen entries that
    training moved. chosen_surviving: the part of those that still differ from the base after rounding to the checkpoint's
    dtype.
    """

    status: str
    against: str | None = None
    num_compared: int = 0
    changed: tuple[str, ...] = ()
    num_chosen: int = 0
    chosen_moved: float | None = None
    chosen_surviving: float | None = None


@torch.no_grad()
def check_frozen_weights(trained: Trained, dtype: torch.dtype | None = None) -> FrozenWeightCheck:
    """Compares every weight that wasn't chosen with the base's, bit by bit, both rounded to `dtype`.

    A base of higher precision than the trained model's frozen weights differs from these, unless `dtype` is as low.

    Args:
        dtype: of comparison; the model's own by default.

    Raises:
        UserError: a base of other shapes.
    """
    if trained.chosen is None or trained.is_quantised or (trained.base is None and not trained.adapter):
        return FrozenWeightCheck("unverified")
    dtype = dtype or trained.model.dtype
    before = trained.model if trained.base is None else trained.base
    others = {name.replace(".base_layer.", "."): value for name, value in before.named_parameters()}
    changed, num_compared, num_chosen, num_moved, num_surviving = [], 0, 0, 0, 0
    for name, weight in trained.weights(trained.model.named_parameters()):
        other = others.get(name)
        if other is None or other.shape != weight.shape:
            raise UserError(f"base: parameter {name} is missing there or has another shape; give the model's own base")
        other = other.to(weight.device)
        differs = bit_patterns(weight.to(dtype)) != bit_patterns(other.to(dtype))
        chosen = trained.chosen.get(name.removesuffix(".weight"))
        if chosen is not None:
            dim, index = chosen.dim, chosen.index.to(weight.device)
            # Counted before rounding: the question is what training moved.
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
        del weight, differs  # the next sum is made before the loop lets go of them
    return FrozenWeightCheck(
        "changed" if changed else "identical",
        "frozen weights" if trained.base is None else "base",
        num_compared,
        tuple(changed),
        num_chosen,
        num_moved / num_chosen if num_chosen else None,
        num_surviving / num_moved if num_moved else None,
    )
