"""Each neuron's mean activation per language, and the file that keeps it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agnostic_train.errors import UserError
from agnostic_train.model.decoder import Site

MEASURED = ("q", "k", "v", "down")
"""Projections where activations are measured: a hidden unit's at the input of `down`, a value channel's at the output
of `v`. The neurons of `gate` and `up` are the same hidden units, and the columns of `o` read the same channels."""

Activations = dict[Site, Tensor]
"""Mean absolute activations per token: (layer, one of `MEASURED`) -> (neurons,), float32, on the CPU."""


def save_activations(activations: Mapping[str, Activations], file: Path) -> None:
    """Writes a safetensors file, with a tensor `<language>/<layer>/<projection>` for each language and site."""
    tensors = {
        f"{language}/{layer}/{projection}": values
        for language, by_site in activations.items()
        for (layer, projection), values in by_site.items()
    }
    save_file(tensors, file)


def load_activations(
    file: Path, languages: Sequence[str], sizes: Mapping[Site, int] | None
) -> dict[str, Activations] | None:
    """Reads what `save_activations` wrote; returns None if there is no file.

    Args:
        languages: the languages that the file must hold.
        sizes: the number of neurons by site, which the tensors must have; None if unknown.

    Raises:
        UserError: the file can't be read, or has other languages or sizes.
    """
    if not file.exists():
        return None
    activations: dict[str, Activations] = {language: {} for language in languages}
    try:
        for key, values in load_file(file).items():
            language, layer, projection = key.rsplit("/", 2)
            activations[language][(int(layer), projection)] = values
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not readable ({error}); detect again") from None
    except (ValueError, KeyError):
        raise UserError(f"{file}: not the activations of {', '.join(languages)}; detect again") from None
    shapes = [{site: tuple(values.shape) for site, values in by_site.items()} for by_site in activations.values()]
    expected = {site: (size,) for site, size in (sizes or {}).items() if site[1] in MEASURED}
    if any(it != (expected or shapes[0]) for it in shapes):
        raise UserError(f"{file}: some activations are missing or of another model; detect again")
    return activations


def mean_over_languages(activations: Mapping[str, Activations]) -> Activations:
    """Averages activations over languages, with equal weights whatever their numbers of tokens."""
    by_language = list(activations.values())
    return {site: torch.stack([it[site] for it in by_language]).mean(0) for site in by_language[0]}
