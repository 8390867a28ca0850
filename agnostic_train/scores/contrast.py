"""The sets of neurons that one score compares: the shared set and each language's exclusive set, or random controls."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from agnostic_train.model.decoder import find_decoder
from agnostic_train.neurons.activity import Activations, activation_ratio
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet


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

    kind: `random`, or `matched` for counterparts of similar activation.
    """
    # Matched by activations on the languages where they are scored: all for the shared set, its own for exclusive ones.
    overall = neurons.mean_activations if kind == "matched" else None
    own = neurons.activations or {} if kind == "matched" else {}
    return Contrast(
        neurons.shared.random_like(seed, model, overall),
        {language: it.random_like(seed, model, own.get(language)) for language, it in neurons.exclusive.items()},
        f"{kind} {seed}",
    )


def activation_ratios(neurons: LanguageNeurons, controls: Sequence[Contrast], model: nn.Module) -> dict | None:
    """`activation_ratio` of the shared and of each exclusive set, on the languages where they are scored.

    Returns: plain JSON values; None if the detection measured no activations.
    """
    overall = neurons.mean_activations
    if neurons.activations is None or overall is None:
        return None
    layers = find_decoder(model).layers

    def ratio(chosen: NeuronSet, drawn: Sequence[NeuronSet], activations: Activations) -> dict[str, float]:
        return activation_ratio(dict(chosen.items()), [dict(it.items()) for it in drawn], layers, activations)

    return {
        "shared": ratio(neurons.shared, [it.shared for it in controls], overall),
        "exclusive": {
            language: ratio(chosen, [it.exclusive[language] for it in controls], neurons.activations[language])
            for language, chosen in neurons.exclusive.items()
        },
    }
