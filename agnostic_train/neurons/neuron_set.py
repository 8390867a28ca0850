"""A set of neurons (rows and columns of projections), its files, and random sets of the same sizes."""

import json
import operator
from collections import Counter
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from agnostic_train.errors import UserError
from agnostic_train.files import read_json, whole_file, write_json
from agnostic_train.model.decoder import PROJECTIONS, Layer, Site, find_decoder
from agnostic_train.neurons.activity import Activations
from agnostic_train.neurons.random_moves import matched_moves, random_moves

FORMAT = "agnostic_train.neurons"
_METADATA = "neurons"

_PUBLISHED_KEYS = {
    "fwd_up": "up", "fwd_down": "down", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_o": "o"
}  # fmt: skip


class NeuronSet:
    """An immutable set of neurons: `{(layer, projection): indices}`.

    `a | b`, `a & b` and `a - b` are sets, `len(a)` counts neurons, `a[site]` gives a site's indices, and iteration
    yields the sites that have neurons. `==` compares only the neurons, not `sizes`. Sets can't be hashed.

    Args:
        sites: for each site, the indices of its neurons (any iterable or 1-D integer tensor). They are stored sorted
            and unique, as int64, on the CPU.
        sizes: the number of neurons at each site of the model, if known. Sets from a detection have sizes, so that they
            can't be used on a model of other shapes, or combined with a set of one.

    Raises:
        TypeError: `sites` isn't a mapping.
        ValueError: a key isn't a site, or indices aren't integers, are negative or are beyond their site's size. In
            `|`, `&` and `-`: the sets belong to models of different shapes.
    """

    def __init__(
        self, sites: Mapping[Site, Iterable[int] | Tensor] | None = None, sizes: Mapping[Site, int] | None = None
    ):
        self.sizes = None if sizes is None else dict(sizes)
        self._sites: dict[Site, Tensor] = {}
        if sites is not None and not isinstance(sites, Mapping):
            raise TypeError(f"expected {{(layer, projection): indices}}, got {type(sites).__name__}")
        for site in sites or {}:
            _check_site(site)
        for (layer, projection), indices in sorted((sites or {}).items(), key=lambda item: _order(item[0])):
            try:
                indices = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices), device="cpu")
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # text, and numbers beyond 64 bits
                raise ValueError(f"layer {layer} {projection}: expected a list of indices ({error})") from None
            if not indices.numel():
                continue
            if indices.is_floating_point() or indices.dtype == torch.bool or indices.ndim != 1:
                received = f"shape {tuple(indices.shape)} of {indices.dtype}"
                raise ValueError(f"layer {layer} {projection}: expected a list of indices, got {received}")
            indices = indices.to(torch.int64).unique()
            site = (int(layer), projection)
            if indices[0] < 0 or site[0] < 0:
                raise ValueError(f"layer {layer} {projection}: a layer or index is negative")
            if self.sizes is not None and indices[-1] >= self.sizes.get(site, 0):
                raise ValueError(f"layer {layer} {projection} has {self.sizes.get(site, 0)} neurons, not {indices[-1]}")
            self._sites[site] = indices

    @classmethod
    def of(cls, neurons: object) -> "NeuronSet":
        """Returns a `NeuronSet` as it is, and makes one from a mapping.

        Raises:
            TypeError: `neurons` is neither.
            ValueError: the mapping is invalid, as by `NeuronSet`.
        """
        if isinstance(neurons, NeuronSet):
            return neurons
        if isinstance(neurons, Mapping):
            return cls(neurons)
        raise TypeError(
            "neurons: expected a NeuronSet, such as .shared of what was detected, or {(layer, projection): indices}, "
            f"got {type(neurons).__name__}"
        )

    def __getitem__(self, site: Site) -> Tensor:
        """Returns a copy of the site's indices, sorted, int64; empty if the set has none there."""
        _check_site(site)
        return self._at(site).clone()

    def _at(self, site: Site) -> Tensor:
        return self._sites.get(site, torch.empty(0, dtype=torch.int64, device="cpu"))

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
        """Returns the sites that have neurons, ordered by layer and projection, with copies of their indices."""
        return {site: indices.clone() for site, indices in self._sites.items()}.items()

    def counts(self) -> dict[str, int]:
        """Returns the number of neurons per projection, summed over layers."""
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
        """Checks that the set fits a model's shapes.

        Args:
            model: may be on the meta device.
            source: the key or file that the error names.

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

    def random_like(
        self,
        seed: int,
        model: nn.Module,
        activations: Activations | None = None,
        excluded: "NeuronSet | None" = None,
    ) -> "NeuronSet":
        """Draws a random set with as many neurons at every site, without replacement.

        Gate, up and down of a hidden unit are drawn together, and so are v and the o columns that it feeds: one
        permutation of a layer's hidden units moves all three sets, one of its value channels moves v and o. Otherwise a
        random set could silence up to three times as many hidden units as the set that it controls for.

        Args:
            seed: the same seed gives the same set, on any device.
            model: gives the sizes and which query heads read a value channel.
            activations: mean absolute activations by (layer, `q`, `k`, `v` or `down`), (neurons,) float: one language's
                from `LanguageNeurons.activations`, or `LanguageNeurons.mean_activations`. If given, each neuron is
                replaced by one of the neurons outside the set that are nearest in activation, so that the control shows
                whether the set matters more than other neurons of similar activation.
            excluded: with `activations`, further neurons that replace none, unless too few others are left at a site.

        Raises:
            UserError: the sets or the activations can't belong to the model.
        """
        excluded = NeuronSet({}) if excluded is None else excluded
        self.check(model)
        excluded.check(model)
        generator = torch.Generator().manual_seed(operator.index(seed))
        drawn: dict[Site, Tensor] = {}
        for layer in find_decoder(model).layers:
            members, others = ({name: it[(layer.index, name)] for name in PROJECTIONS} for it in (self, excluded))
            if activations is None:
                moves = random_moves(layer, generator)
            else:
                moves = matched_moves(layer, members, others, activations, generator)
            drawn |= {(layer.index, name): move[members[name]] for name, move in moves.items()}
        return NeuronSet(drawn, find_decoder(model).sizes)

    def save(self, file: str | Path) -> None:
        """Writes a safetensors file: an int64 tensor `layers.<layer>.<projection>` per site, the sizes as metadata."""
        sizes = None if self.sizes is None else {_key(site): size for site, size in self.sizes.items()}
        # A single key: safetensors writes several in random order, and equal sets should give equal files.
        metadata = {_METADATA: json.dumps({"format": FORMAT, "version": 2, "sizes": sizes})}
        with whole_file(file) as temporary:
            save_file({_key(site): indices for site, indices in self.items()}, temporary, metadata)

    @classmethod
    def load(cls, file: str | Path) -> "NeuronSet":
        """Reads what `save` wrote; raises `UserError` that names the file if it is missing or isn't a neuron set."""
        if Path(file).is_dir():
            raise UserError(
                f"{file}: a folder, where the file of a neuron set was expected; an adapter is loaded by PEFT"
            )
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
                if str(metadata.get("version")) not in ("1", "2"):
                    raise UserError(f"{file}: written by another version of agnostic_train; update the package")
                sites = {_site(key): tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (not iterable itself)
            sizes = {_site(key): size for key, size in (metadata.get("sizes") or {}).items()}
            return cls(sites, sizes or None)
        except UserError:
            raise
        except (SafetensorError, ValueError, OSError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file}: not a readable neuron set ({error})") from None

    @classmethod
    def read(cls, file: str | Path, model: nn.Module) -> "NeuronSet":
        """Reads a `.json` file with `from_json` and any other with `load`, and checks that the set fits `model`."""
        if Path(file).suffix == ".json":
            return cls.from_json(file, model)
        neurons = cls.load(file)
        neurons.check(model, source=str(file))
        return neurons

    @classmethod
    def given(cls, neurons: object, model: nn.Module) -> "NeuronSet":
        """Returns what an argument names: the set in a file, by `read`, or else as by `of`, with the errors of both."""
        return cls.read(neurons, model) if isinstance(neurons, (str, Path)) else cls.of(neurons)

    def to_json(self, file: str | Path) -> None:
        """Writes `{"format": .., "neurons": {projection: {layer: [index, ..]}}}`, for people and other tools.

        `k` and `v` index the rows of their own weights here, unlike in the published sets that `from_json` also reads.
        """
        neurons: dict[str, dict[str, list[int]]] = {}
        for (layer, projection), indices in self.items():
            neurons.setdefault(projection, {})[str(layer)] = indices.tolist()
        write_json(file, {"format": FORMAT, "neurons": neurons})

    @classmethod
    def from_json(cls, file: str | Path, model: nn.Module) -> "NeuronSet":
        """Reads `to_json`'s format, or a set published with the paper (repository Abstract_Thought).

        In published sets, `attn_k` and `attn_v` index query-head channels: channel c of query head h is mapped to
        channel c of the KV head that serves h, and duplicates are merged. `fwd_up` is `up` alone; `gate` stays empty.

        Args:
            file: a JSON file of either format.
            model: gives the sizes and the heads; may be on the meta device.

        Raises:
            UserError: the file is missing, broken, of another format, or of another model.
        """
        content = read_json(file, "name a file that to_json wrote, or a published set")
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
                    indices = torch.tensor(values, device="cpu")
                    layer = int(key)
                    if indices.dtype == torch.bool:
                        raise UserError(f"{file}: {name} of layer {key} holds true and false, not indices")
                    if (layer, projection) in sites:
                        raise UserError(f"{file}: {name} lists layer {layer} twice")
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


def _check_site(site: object) -> None:
    if not isinstance(site, tuple) or len(site) != 2 or not isinstance(site[0], Integral):
        raise ValueError(f"a site is (layer, projection), such as (0, 'q'), not {site!r}")
    if site[1] not in PROJECTIONS:
        raise ValueError(f"unknown projection {site[1]!r}; it is one of {', '.join(PROJECTIONS)}")


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
    return layer.kv_channels(indices)
