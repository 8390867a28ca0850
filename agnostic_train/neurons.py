"""Sets of neurons: which rows and columns of which projections, per model and per language."""

import json
import re
from collections import Counter
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from agnostic_train.activity import Activations, load_activations, mean_over_languages, save_activations
from agnostic_train.choices import Exclusive, check_choice
from agnostic_train.decoder import PROJECTIONS, Layer, Site, find_decoder
from agnostic_train.files import UserError, read_json, whole_directory, whole_file, write_json
from agnostic_train.random_moves import matched_moves, random_moves

FORMAT = "agnostic_train.neurons"
_METADATA = "neurons"
ACTIVATIONS_FILE = "activations.safetensors"
_OWN_FILES = re.compile(r"(shared|activations|(related|exclusive)\..+)\.safetensors|summary\.json")

_PUBLISHED_KEYS = {
    "fwd_up": "up", "fwd_down": "down", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_o": "o"
}  # fmt: skip


class NeuronSet:
    """An immutable set of neurons: `{(layer, projection): indices}`.

    `a | b`, `a & b` and `a - b` are sets, `len(a)` counts neurons, `a[site]` gives a site's indices, iterating gives the
    sites that have neurons, `==` compares neurons alone, whatever sizes the sets carry. Sets can't be hashed.

    Args:
        sites: for each site, the indices of its neurons (any iterable or 1-D integer tensor). They are kept sorted
            and unique, int64, on the CPU.
        sizes: how many neurons each site of the model has, where known. Sets made by detection carry them, so that a
            set can't be used on a model of other shapes, nor mixed with a set of one.

    Raises:
        ValueError: an unknown projection, a negative index, or an index beyond its site's size; in `|`, `&` and `-`,
            sets of models of different shapes.
    """

    def __init__(
        self, sites: Mapping[Site, Iterable[int] | Tensor] | None = None, sizes: Mapping[Site, int] | None = None
    ):
        self.sizes = None if sizes is None else dict(sizes)
        self._sites: dict[Site, Tensor] = {}
        for (layer, projection), indices in sorted((sites or {}).items(), key=lambda item: _order(item[0])):
            if projection not in PROJECTIONS:
                raise ValueError(f"unknown projection {projection!r}; it is one of {', '.join(PROJECTIONS)}")
            try:
                indices = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices))
            except (TypeError, RuntimeError, OverflowError) as error:  # text, and numbers beyond 64 bits
                raise ValueError(f"layer {layer} {projection}: expected a list of indices ({error})") from None
            if not indices.numel():
                continue
            if indices.is_floating_point() or indices.dtype == torch.bool or indices.ndim != 1:
                what = f"shape {tuple(indices.shape)} of {indices.dtype}"
                raise ValueError(f"layer {layer} {projection}: expected a list of indices, got {what}")
            indices = indices.to("cpu", torch.int64).unique()
            site = (int(layer), projection)
            if indices[0] < 0 or site[0] < 0:
                raise ValueError(f"layer {layer} {projection}: a layer or index is negative")
            if self.sizes is not None and indices[-1] >= self.sizes.get(site, 0):
                raise ValueError(f"layer {layer} {projection} has {self.sizes.get(site, 0)} neurons, not {indices[-1]}")
            self._sites[site] = indices

    @classmethod
    def of(cls, neurons: object) -> "NeuronSet":
        """A set as it is, or the one that a mapping makes.

        Raises:
            TypeError: neither. ValueError: of a mapping, as by `NeuronSet`.
        """
        if isinstance(neurons, NeuronSet):
            return neurons
        if isinstance(neurons, Mapping):
            return cls(neurons)
        hint = "; give one of its sets, such as .shared" if isinstance(neurons, LanguageNeurons) else ""
        raise TypeError(
            f"neurons: expected a NeuronSet or {{(layer, projection): indices}}, got {type(neurons).__name__}{hint}"
        )

    def __getitem__(self, site: Site) -> Tensor:
        """The site's indices, sorted, int64, as a tensor of the caller's own; empty where the set has none."""
        return self._at(site).clone()

    def _at(self, site: Site) -> Tensor:
        return self._sites.get(site, torch.empty(0, dtype=torch.int64))

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __contains__(self, site: object) -> bool:
        return site in self._sites

    def __len__(self) -> int:
        return sum(len(indices) for indices in self._sites.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        return self._sites.keys() == other._sites.keys() and all(
            torch.equal(indices, other._sites[site]) for site, indices in self._sites.items()
        )

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.counts().items() if count)
        return f"NeuronSet({len(self)} neurons{': ' + counts if counts else ''})"

    def items(self) -> ItemsView[Site, Tensor]:
        """The sites that have neurons, in the order of layers and projections, with their indices as by `[site]`."""
        return {site: indices.clone() for site, indices in self._sites.items()}.items()

    def counts(self) -> dict[str, int]:
        """Number of neurons per projection, all layers together."""
        totals = Counter({name: 0 for name in PROJECTIONS})
        for (_, projection), indices in self._sites.items():
            totals[projection] += len(indices)
        return dict(totals)

    def __or__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combine(other, lambda a, b: torch.cat([a, b]))

    def __and__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combine(other, lambda a, b: a[torch.isin(a, b)])

    def __sub__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combine(other, lambda a, b: a[~torch.isin(a, b)])

    def _combine(self, other: "NeuronSet", operation: Callable[[Tensor, Tensor], Tensor]) -> "NeuronSet":
        if not isinstance(other, NeuronSet):
            return NotImplemented
        if self.sizes and other.sizes and self.sizes != other.sizes:
            raise ValueError("these neuron sets belong to models of different shapes")
        sites = self._sites.keys() | other._sites.keys()
        return NeuronSet(
            {site: operation(self._at(site), other._at(site)) for site in sites}, self.sizes or other.sizes
        )

    def check(self, model: nn.Module, source: str = "neurons") -> None:
        """Compares the set with a model's shapes.

        Args:
            model: it may be on the meta device.
            source: what the error names: a key or a file.

        Raises:
            UserError: the set can't belong to the model.
        """
        sizes = find_decoder(model).sizes
        if self.sizes is not None and self.sizes != sizes:
            site = min(
                (site for site in self.sizes.keys() | sizes if self.sizes.get(site) != sizes.get(site)), key=_order
            )
            raise UserError(
                f"{source}: made for a model with {self.sizes.get(site, 0)} neurons at layer {site[0]} {site[1]}, "
                f"this model has {sizes.get(site, 0)}; detect the neurons of this model"
            )
        for (layer, projection), indices in self._sites.items():
            size = sizes.get((layer, projection), 0)
            if indices[-1] >= size:
                raise UserError(
                    f"{source}: neuron {indices[-1]} at layer {layer} {projection}, where this model has {size}; "
                    "detect the neurons of this model"
                )

    def random_like(self, seed: int, model: nn.Module, activations: Activations | None = None) -> "NeuronSet":
        """A random set with as many neurons at every site, drawn without replacement.

        Gate, up and down of a hidden unit are drawn together, likewise v with the o columns that it feeds: one
        permutation of a layer's hidden units moves all three sets, one of its value channels moves v and o. Without
        that, a random set would silence up to three times as many hidden units as the set that it controls for.

        Args:
            seed: the same seed gives the same set, on any device.
            model: gives the sizes and which query heads read a value channel.
            activations: mean absolute activations by (layer, `q`, `k`, `v` or `down`), (neurons,) float: a language's
                of `LanguageNeurons.activations`, or its `mean_activations`. With them each neuron's counterpart is, of
                those outside the set, one of the nearest in activation, so that the control answers whether a set does
                more than any neurons that are as active.

        Raises:
            UserError: the set can't belong to the model.
        """
        self.check(model)
        generator = torch.Generator().manual_seed(seed)
        drawn: dict[Site, Tensor] = {}
        for layer in find_decoder(model).layers:
            members = {name: self[(layer.index, name)] for name in PROJECTIONS}
            if activations is None:
                moves = random_moves(layer, generator)
            else:
                moves = matched_moves(layer, members, activations, generator)
            drawn |= {(layer.index, name): move[members[name]] for name, move in moves.items()}
        return NeuronSet(drawn, find_decoder(model).sizes)

    def save(self, file: str | Path) -> None:
        """Writes safetensors: an int64 tensor `layers.<layer>.<projection>` per site, the sizes as metadata."""
        sizes = None if self.sizes is None else {_key(site): size for site, size in self.sizes.items()}
        # One key: safetensors writes several in random order, and equal sets should be equal files.
        metadata = {_METADATA: json.dumps({"format": FORMAT, "version": 2, "sizes": sizes})}
        with whole_file(file) as temporary:
            save_file({_key(site): indices for site, indices in self.items()}, temporary, metadata)

    @classmethod
    def load(cls, file: str | Path) -> "NeuronSet":
        """Reads what `save` wrote; raises `UserError` that names the file if it is missing or isn't one."""
        if not Path(file).is_file():
            raise UserError(f"{file}: no such neuron file")
        try:
            with safe_open(file, framework="pt") as tensors:
                metadata = tensors.metadata() or {}
                if _METADATA in metadata:
                    metadata = json.loads(metadata[_METADATA])
                elif "sizes" in metadata:  # version 1
                    metadata = metadata | {"sizes": json.loads(metadata["sizes"])}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"{file}: a safetensors file, but not a neuron set")
                sites = {_site(key): tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (not iterable itself)
            sizes = {_site(key): size for key, size in (metadata.get("sizes") or {}).items()}
            return cls(sites, sizes or None)
        except UserError:
            raise
        except (SafetensorError, ValueError, OSError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: not a readable neuron set ({error})") from None

    @classmethod
    def read(cls, file: str | Path, model: nn.Module) -> "NeuronSet":
        """Reads either format by the file's name: `.json` by `from_json`, which needs `model`, any other by `load`."""
        if Path(file).suffix == ".json":
            return cls.from_json(file, model)
        neurons = cls.load(file)
        neurons.check(model, source=str(file))
        return neurons

    def to_json(self, file: str | Path) -> None:
        """Writes `{"format": .., "neurons": {projection: {layer: [index, ..]}}}`, for people and other tools.

        `k` and `v` count the rows of their own weights here, unlike the published sets that `from_json` reads too.
        """
        neurons: dict[str, dict[str, list[int]]] = {}
        for (layer, projection), indices in self.items():
            neurons.setdefault(projection, {})[str(layer)] = indices.tolist()
        write_json(file, {"format": FORMAT, "neurons": neurons})

    @classmethod
    def from_json(cls, file: str | Path, model: nn.Module) -> "NeuronSet":
        """Reads `to_json`'s format, or a set published with the paper (repository Abstract_Thought).

        There `attn_k` and `attn_v` count query-head channels: channel c of query head h belongs to the KV head that
        serves h, same channel, and duplicates are merged. `fwd_up` is `up` alone; `gate` stays empty.

        Args:
            file: a JSON file of either format.
            model: gives the sizes and the heads; it may be on the meta device.

        Raises:
            UserError: the file is missing, broken, of another format, or of another model.
        """
        content = read_json(file)
        if not isinstance(content, dict):
            raise UserError(f"{file}: expected a JSON object of neurons per projection")
        published = content.get("format") != FORMAT
        by_name: Any = content if published else content.get("neurons")
        names = _PUBLISHED_KEYS if published else {name: name for name in PROJECTIONS}
        decoder = find_decoder(model)
        sites: dict[Site, Tensor] = {}
        try:
            for name, by_layer in by_name.items():
                if name not in names:
                    raise UserError(f"{file}: unknown key {name!r}; expected {', '.join(names)}")
                projection = names[name]
                for key, values in by_layer.items():
                    indices = torch.tensor(values)
                    layer = int(key)
                    if published and projection in ("k", "v") and layer < len(decoder.layers):
                        indices = _kv_rows(indices, decoder.layers[layer], file)
                    sites[(layer, projection)] = indices
            neurons = cls(sites)
        except UserError:
            raise
        except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise UserError(f"{file}: not a set of neurons per projection and layer ({error})") from None
        neurons.check(model, source=str(file))
        return cls(sites, decoder.sizes)


def check_min_languages(min_languages: int | None, num_languages: int) -> None:
    """Raises `ValueError` if a shared neuron can't be related to so many languages; None means all."""
    if min_languages is not None and not 1 <= min_languages <= num_languages:
        raise ValueError(f"min_languages must be from 1 to the number of languages, {num_languages}")


@dataclass
class LanguageNeurons:
    """What detection found: each language's related neurons, and from them the shared and exclusive ones.

    Attributes:
        related: per language, the neurons that matter for (nearly) every one of its sentences.
        shared: related to every language (or at least `min_languages`).
        exclusive: per language, `complement`: related minus shared; `unique`: related minus all others' related.
        settings: how they were found (ratio, consistency, exclusive mode, sentences), plain JSON values.
        stability: how much of the sets other samples give, see `detection_stability`; None if it wasn't asked for.
        activations: per language, mean absolute activations over its sentences' tokens, by (layer, `q`, `k`, `v` or
            `down`), (neurons,) float32 on the CPU; a hidden unit's stand under `down`. None if they weren't measured.
        exact_share: the part of the q and of the k neurons, over all sentences, whose exact impact was computed before
            pruning could leave the others out; it is no property of the sets, so comparing two ignores it.
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
            related: per language.
            exclusive: `complement`, related minus shared, as in the paper's published code; or `unique`, related minus
                the union of the other languages' related.
            min_languages: shared means related to at least this many languages; all by default.
            settings: kept beside them, with `exclusive` and `min_languages` added.

        Raises:
            ValueError: an unknown `exclusive`, no language, or `min_languages` out of range.
        """
        check_choice("exclusive", exclusive, Exclusive)
        if not related:
            raise ValueError("no languages: corpora is empty")
        check_min_languages(min_languages, len(related))
        shared = _in_at_least(min_languages or len(related), related)
        if exclusive == "complement":
            exclusive_sets = {language: neurons - shared for language, neurons in related.items()}
        else:
            exclusive_sets = {
                language: _minus_all(neurons, [related[other] for other in related if other != language])
                for language, neurons in related.items()
            }
        settings = {**(settings or {}), "exclusive": exclusive, "min_languages": min_languages or len(related)}
        return cls(related, shared, exclusive_sets, settings)

    @property
    def languages(self) -> list[str]:
        """The languages, in the order of `related`."""
        return list(self.related)

    @property
    def shared_ratio(self) -> dict[str, float | None]:
        """Per language, the part of its related neurons that is shared; None where nothing is related."""
        return {
            language: len(self.shared & neurons) / len(neurons) if len(neurons) else None
            for language, neurons in self.related.items()
        }

    @property
    def mean_activations(self) -> Activations | None:
        """The activations averaged over languages; None if they weren't measured."""
        if self.activations is None:
            return None
        return mean_over_languages(self.activations)

    def save(self, directory: str | Path) -> None:
        """Writes `shared`, `related.<l>`, `exclusive.<l>` as safetensors and `summary.json`, all or nothing.

        A directory that is there is replaced.

        Raises:
            UserError: it holds something else than neurons.
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
        """Reads what `save` wrote; raises `UserError` that names the file that is missing or broken."""
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
        shared = NeuronSet.load(directory / "shared.safetensors")
        return cls(
            {language: NeuronSet.load(directory / f"related.{language}.safetensors") for language in languages},
            shared,
            {language: NeuronSet.load(directory / f"exclusive.{language}.safetensors") for language in languages},
            settings,
            summary.get("stability"),
            load_activations(directory / ACTIVATIONS_FILE, languages, shared.sizes),
            summary.get("exact_share"),
        )


def is_neuron_file(path: Path) -> bool:
    """Whether a file's name is one of those that `LanguageNeurons.save` gives."""
    return path.is_file() and _OWN_FILES.fullmatch(path.name) is not None


def _order(site: Site) -> tuple[int, int]:
    layer, projection = site
    return int(layer), PROJECTIONS.index(projection) if projection in PROJECTIONS else -1


def _key(site: Site) -> str:
    return f"layers.{site[0]}.{site[1]}"


def _site(key: str) -> Site:
    prefix, layer, projection = key.split(".")
    if prefix != "layers":
        raise ValueError(f"unexpected tensor {key!r}")
    return int(layer), projection


def _kv_rows(indices: Tensor, layer: Layer, file: str | Path) -> Tensor:
    num_channels = layer.num_query_heads * layer.head_dim
    if len(indices) and indices.max() >= num_channels:
        raise UserError(f"{file}: query-head channel {indices.max()}, where this model has {num_channels}")
    head, channel = indices // layer.head_dim, indices % layer.head_dim
    return head // layer.queries_per_kv * layer.head_dim + channel


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
