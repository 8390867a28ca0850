"""How active each neuron is in each language on average: its file, and how like a set's activity a control's is."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agnostic_train.errors import UserError
from agnostic_train.model.decoder import FEED_FORWARD_PROJECTIONS, Layer, Site
from agnostic_train.neurons.random_moves import channels_read

MEASURED = ("q", "k", "v", "down")
"""Where activations are read: a hidden unit's at the input of `down`, a value channel's at the output of `v`. The
neurons of `gate` and `up` are those units too, and the columns of `o` read those channels."""

Activations = dict[Site, Tensor]
"""Mean absolute activations per token: (layer, one of `MEASURED`) -> (neurons,), float32, on the CPU."""


def save_activations(activations: Mapping[str, Activations], file: Path) -> None:
    """Writes safetensors: a tensor `<language>/<layer>/<projection>` for each language and site."""
    tensors = {
        f"{language}/{layer}/{projection}": values
        for language, by_site in activations.items()
        for (layer, projection), values in by_site.items()
    }
    save_file(tensors, file)


def load_activations(
    file: Path, languages: Sequence[str], sizes: Mapping[Site, int] | None
) -> dict[str, Activations] | None:
    """Reads what `save_activations` wrote; None where there is no file.

    Args:
        languages: those that it must hold.
        sizes: number of neurons by site, where known, to check the tensors by.

    Raises:
        UserError: the file can't be read, or isn't of these languages and sizes.
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
    """Every language counts alike, whatever the number of its tokens."""
    by_language = list(activations.values())
    return {site: torch.stack([it[site] for it in by_language]).mean(0) for site in by_language[0]}


def activation_ratio(
    members: Mapping[Site, Tensor],
    controls: Sequence[Mapping[Site, Tensor]],
    layers: Sequence[Layer],
    activations: Activations,
) -> dict[str, float]:
    """How active random controls are, compared with the set that they are for: 1 where they are alike.

    A set holds the most active neurons of its sites, so that none outside it may be as active: then even matched
    controls stay below 1.

    Args:
        members, controls: indices by site, as many in each control as in the set.
        layers: of the model.
        activations: what both are compared in.

    Returns: by projection, and for `all` together, the control's mean activation at a site over the set's, averaged
        over controls and sites, each as often as it has neurons: activations of different layers and projections are
        on different scales. Sites where the whole set is inactive have no ratio.
    """
    ratios: dict[str, list[Tensor]] = {}
    for (index, projection), indices in members.items():
        its = _activations_at(layers[index], projection, activations)
        if not its[indices].any():
            continue
        for control in controls:
            ratio = (its[control[(index, projection)]].mean() / its[indices].mean()).expand(len(indices))
            for name in (projection, "all"):
                ratios.setdefault(name, []).append(ratio)
    return {name: float(torch.cat(its).mean()) for name, its in ratios.items()}


def _activations_at(layer: Layer, projection: str, activations: Activations) -> Tensor:
    """(neurons,) of any projection: `gate` and `up` are hidden units, a column of `o` is the value channel it reads."""
    if projection == "o":
        return activations[(layer.index, "v")][channels_read(layer)].double()
    return activations[(layer.index, "down" if projection in FEED_FORWARD_PROJECTIONS else projection)].double()
