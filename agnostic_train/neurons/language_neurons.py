"""The result of a detection: each language's related neurons, and the shared and exclusive sets derived from them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from agnostic_train.choices import Exclusive, check_choice
from agnostic_train.errors import UserError
from agnostic_train.files import read_json, whole_directory, write_json
from agnostic_train.fingerprints import hash_file
from agnostic_train.model.decoder import Site
from agnostic_train.neurons.activity import Activations, load_activations, mean_over_languages, save_activations
from agnostic_train.neurons.neuron_set import NeuronSet

ACTIVATIONS_FILE = "activations.safetensors"
_OWN_FILES = re.compile(r"(shared|activations|(related|exclusive)\..+)\.safetensors|summary\.json")


def check_languages(languages: Iterable[str]) -> None:
    """Raises `ValueError` for language names that can't be part of a file's name."""
    for language in languages:
        if not isinstance(language, str) or not re.fullmatch(r"[^/\\\0\n]+", language):
            raise ValueError(f"languages: {language!r} can't be part of a file's name; leave slashes out")


def check_min_languages(min_languages: int | None, num_languages: int) -> None:
    """Raises `ValueError` unless `min_languages` is from 1 to the number of languages, or None, which means all."""
    if min_languages is not None and not 1 <= min_languages <= num_languages:
        raise ValueError(f"min_languages must be from 1 to the number of languages, {num_languages}")


@dataclass
class LanguageNeurons:
    """The result of a detection: each language's related neurons, and the shared and exclusive sets derived from them.

    Attributes:
        related: per language, the neurons that matter for (nearly) every one of its sentences.
        shared: the neurons related to every language (or to at least `min_languages`).
        exclusive: per language, `complement`: related minus shared; `unique`: related minus all others' related.
        settings: how the sets were detected (ratio, consistency, exclusive mode, sentences), as plain JSON values.
        stability: overlaps with the sets from other samples, see `detection_stability`; None if it wasn't asked for.
        activations: per language, mean absolute activations over its sentences' tokens, by (layer, `q`, `k`, `v` or
            `down`), (neurons,) float32 on the CPU; those of hidden units are under `down`. None if not measured.
        exact_share: the shares of q and of k neurons, over all sentences, whose exact impact was computed; pruning left
            out the others. Comparisons ignore it, since it isn't a property of the sets.
    """

    related: dict[str, NeuronSet]
    shared: NeuronSet
    exclusive: dict[str, NeuronSet]
    settings: dict = field(default_factory=dict)
    stability: dict | None = None
    activations: dict[str, Activations] | None = field(default=None, compare=False, repr=False)
    exact_share: dict[str, float] | None = field(default=None, compare=False)

    @classmethod
    def from_related(
        cls,
        related: dict[str, NeuronSet],
        exclusive: Exclusive = "complement",
        min_languages: int | None = None,
        settings: dict | None = None,
    ) -> "LanguageNeurons":
        """Derives the shared and exclusive sets from each language's related neurons (Chen et al. 2025, section 2).

        Args:
            related: the related neurons by language.
            exclusive: `complement`, related minus shared, as in the paper's published code; or `unique`, related minus
                the union of the other languages' related.
            min_languages: shared means related to at least this many languages; all by default.
            settings: stored with the sets; `exclusive` and `min_languages` are added.

        Raises:
            ValueError: `exclusive` is unknown, there is no language, a language can't be part of a file's name, or
                `min_languages` is out of range.
        """
        check_choice("exclusive", exclusive, Exclusive)
        if not related:
            raise ValueError("no languages: corpora is empty")
        check_languages(related)
        check_min_languages(min_languages, len(related))
        shared = _in_at_least(min_languages or len(related), related)
        if exclusive == "complement":
            exclusive_sets = {language: neurons - shared for language, neurons in related.items()}
        else:
            exclusive_sets = {
                language: _minus_all(neurons, [related[other] for other in related if other != language])
                for language, neurons in related.items()
            }
        settings = {**(settings or {}), "exclusive": exclusive, "min_languages": int(min_languages or len(related))}
        return cls(related, shared, exclusive_sets, settings)

    @property
    def languages(self) -> list[str]:
        """The languages, in the order of `related`."""
        return list(self.related)

    @property
    def shared_ratio(self) -> dict[str, float | None]:
        """Per language, the share of its related neurons that is shared; None if it has no related neurons."""
        return {
            language: len(self.shared & neurons) / len(neurons) if len(neurons) else None
            for language, neurons in self.related.items()
        }

    def metrics(self) -> dict[str, float | None]:
        """Returns numbers to log, under fixed names.

        `neurons/shared`, `neurons/related/<l>` and `neurons/exclusive/<l>` are numbers of neurons;
        `neurons/shared_ratio/<l>` is as `shared_ratio`.
        """
        values: dict[str, float | None] = {"neurons/shared": len(self.shared)}
        for language in self.languages:
            values[f"neurons/related/{language}"] = len(self.related[language])
            values[f"neurons/exclusive/{language}"] = len(self.exclusive[language])
            values[f"neurons/shared_ratio/{language}"] = self.shared_ratio[language]
        return values

    @property
    def mean_activations(self) -> Activations | None:
        """The activations averaged over languages; None if they weren't measured."""
        if self.activations is None:
            return None
        return mean_over_languages(self.activations)

    def save(self, directory: str | Path) -> None:
        """Writes `shared`, `related.<l>`, `exclusive.<l>` as safetensors and `summary.json`, all or nothing.

        Measured activations go to `activations.safetensors`. An existing directory is replaced.

        Raises:
            UserError: the existing directory holds other files than those of neurons.
        """
        summary = {
            "languages": self.languages,
            "settings": self.settings,
            "counts": {
                "shared": self.shared.counts(),
                "related": {language: neurons.counts() for language, neurons in self.related.items()},
                "exclusive": {language: neurons.counts() for language, neurons in self.exclusive.items()},
            },
            "shared_ratio": self.shared_ratio,
            "stability": self.stability,
            "exact_share": self.exact_share,
        }
        with whole_directory(directory, is_neuron_file) as temporary:
            self.shared.save(temporary / "shared.safetensors")
            for language in self.related:
                self.related[language].save(temporary / f"related.{language}.safetensors")
                self.exclusive[language].save(temporary / f"exclusive.{language}.safetensors")
            if self.activations is not None:
                save_activations(self.activations, temporary / ACTIVATIONS_FILE)
            write_json(temporary / "summary.json", summary)

    @classmethod
    def load(cls, directory: str | Path) -> "LanguageNeurons":
        """Reads what `save` wrote; raises `UserError` that names a missing or broken file, or one of another result."""
        directory = Path(directory)
        summary = read_json(directory / "summary.json")
        summary = summary if isinstance(summary, dict) else {}
        languages, settings = summary.get("languages"), summary.get("settings")
        if (
            not isinstance(settings, dict)
            or not isinstance(languages, list)
            or not all(isinstance(language, str) for language in languages)
        ):
            raise UserError(f"{directory / 'summary.json'}: not a summary of neurons; detect again")
        counts: dict = summary.get("counts", {})

        def read(kind: str, language: str | None = None) -> NeuronSet:
            file = directory / f"{'.'.join(filter(None, (kind, language)))}.safetensors"
            neurons = NeuronSet.load(file)
            try:
                expected = counts[kind] if language is None else counts[kind][language]
            except (KeyError, TypeError):
                raise UserError(f"{directory / 'summary.json'}: not a summary of neurons; detect again") from None
            if neurons.counts() != expected:
                raise UserError(f"{file}: not the set that summary.json describes; detect again")
            return neurons

        shared = read("shared")
        return cls(
            {language: read("related", language) for language in languages},
            shared,
            {language: read("exclusive", language) for language in languages},
            settings,
            summary.get("stability"),
            load_activations(directory / ACTIVATIONS_FILE, languages, shared.sizes),
            summary.get("exact_share"),
        )


def set_hashes(directory: str | Path, with_activations: bool = False) -> dict[str, str]:
    """Returns the SHA-256 of each saved set's file; equal sets have equal hashes. Empty if there are no files.

    with_activations: also that of the activations, which only random controls of a score depend on.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    return {file.name: hash_file(file) for file in files if with_activations or file.name != ACTIVATIONS_FILE}


def is_neuron_file(path: Path) -> bool:
    """Whether a path is a file with a name that `LanguageNeurons.save` gives."""
    return path.is_file() and _OWN_FILES.fullmatch(path.name) is not None


def _in_at_least(count: int, related: dict[str, NeuronSet]) -> NeuronSet:
    sets = list(related.values())
    sites: dict[Site, Tensor] = {}
    for site in {site for neurons in sets for site, _ in neurons.items()}:
        indices, languages = torch.cat([neurons[site] for neurons in sets]).unique(return_counts=True)
        sites[site] = indices[languages >= count]
    return NeuronSet(sites, sets[0].sizes)


def _minus_all(neurons: NeuronSet, others: list[NeuronSet]) -> NeuronSet:
    for other in others:
        neurons = neurons - other
    return neurons
