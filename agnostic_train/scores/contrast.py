"""The sets of neurons that one score compares: the shared set and each language's exclusive set, or random controls."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor, nn

from agnostic_train.model.decoder import FEED_FORWARD_PROJECTIONS, Layer, find_decoder
from agnostic_train.neurons.activity import Activations
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.neurons.random_moves import channels_read


@dataclass(frozen=True)
class Contrast:
    """A shared set, and an exclusive set for each language.

    Attributes:
        name: distinguishes it from others in an ablation; empty for the detected sets.
    """

    shared: NeuronSet
    exclusive: dict[str, NeuronSet]
    name: str = ""

    @property
    def shared_name(self) -> str:
        """The shared set's name in an ablation."""
        return f"{self.name} shared".lstrip()

    def exclusive_name(self, language: str) -> str:
        """The name of a language's exclusive set in an ablation."""
        return f"{self.name} exclusive {language}".lstrip()

    def names(self, language: str) -> tuple[str, str]:
        """The names of the two sets that a language's importance compares."""
        return self.shared_name, self.exclusive_name(language)

    @property
    def sets(self) -> dict[str, NeuronSet]:
        """All sets, by their names in an ablation."""
        exclusive = {self.exclusive_name(language): neurons for language, neurons in self.exclusive.items()}
        return {self.shared_name: self.shared, **exclusive}


def detected_contrast(neurons: LanguageNeurons) -> Contrast:
    """The detected sets."""
    return Contrast(neurons.shared, neurons.exclusive)


def random_contrast(neurons: LanguageNeurons, seed: int, model: nn.Module, kind: str) -> Contrast:
    """Draws a random counterpart of each detected set, of equal size at every site; see `NeuronSet.random_like`.

    kind: `random`, or `matched` for counterparts of similar activation outside all detected sets.
    """
    # Matched by activations on the languages where they are scored: all for the shared set, its own for exclusive ones.
    overall = neurons.mean_activations if kind == "matched" else None
    own = neurons.activations or {} if kind == "matched" else {}
    detected = reduce(or_, neurons.related.values())
    return Contrast(
        neurons.shared.random_like(seed, model, overall, detected),
        {
            language: it.random_like(seed, model, own.get(language), detected)
            for language, it in neurons.exclusive.items()
        },
        f"{kind} {seed}",
    )


def activation_ratios(neurons: LanguageNeurons, controls: Sequence[Contrast], model: nn.Module) -> dict | None:
    """`activation_ratio` of the shared and of each exclusive set, on the languages where they are scored.

    Returns: plain JSON values; None if the detection measured no activations.
    """
    overall = neurons.mean_activations
    if neurons.activations is None or overall is None:
        return None
    layers, own = find_decoder(model).layers, neurons.activations
    return {
        "shared": activation_ratio(neurons.shared, [it.shared for it in controls], layers, overall),
        "exclusive": {
            language: activation_ratio(chosen, [it.exclusive[language] for it in controls], layers, own[language])
            for language, chosen in neurons.exclusive.items()
        },
    }


def activation_ratio(
    members: NeuronSet, controls: Sequence[NeuronSet], layers: Sequence[Layer], activations: Activations
) -> dict[str, float]:
    """Returns how active random controls are relative to the set that they control for; 1 means equally active.

    A set may hold the most active neurons of its sites, with none outside it that is as active: then even matched
    controls stay below 1.

    Args:
        members, controls: the set and its controls; each control has as many neurons at every site.
        layers: the model's layers.
        activations: the activations to compare by.

    Returns: by projection, and as `all` for all of them, the control's mean activation at a site divided by the set's,
        averaged over controls and sites, weighted by the set's number of neurons at the site. Ratios are taken per
        site because layers and projections differ in scale. Sites where the whole set is inactive are left out.
    """
    ratios: dict[str, list[Tensor]] = {}
    for (index, projection), indices in members.items():
        values = _activations_at(layers[index], projection, activations)
        if not values[indices].any():
            continue
        for control in controls:
            ratio = (values[control[(index, projection)]].mean() / values[indices].mean()).expand(len(indices))
            for name in (projection, "all"):
                ratios.setdefault(name, []).append(ratio)
    return {name: float(torch.cat(parts).mean()) for name, parts in ratios.items()}


def _activations_at(layer: Layer, projection: str, activations: Activations) -> Tensor:
    """Returns a projection's activations, (neurons,): `gate` and `up` as hidden units, `o` by the channels read."""
    if projection == "o":
        return activations[(layer.index, "v")][channels_read(layer)].double()
    return activations[(layer.index, "down" if projection in FEED_FORWARD_PROJECTIONS else projection)].double()
