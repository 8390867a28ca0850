"""Counts how often each neuron is among the top of its sentence, batch by batch, on the device."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from agnostic_train.errors import UserError
from agnostic_train.files import whole_file
from agnostic_train.fingerprints import fingerprint
from agnostic_train.impact.pruning import Work, num_top
from agnostic_train.model.batches import Batch
from agnostic_train.model.decoder import Site
from agnostic_train.neurons.activity import MEASURED, Activations
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.processes import num_processes, sum_over_processes

_PROGRESS = ("num_batches", "num_sentences", "num_tokens")
_OF_TOKENS = ("input_ids", "attention_mask", "special_tokens_mask")
"""The parts of a batch that determine its counts."""


class TopCounts:
    """Running counts of a detection: how often each neuron was in the top, how active it was, over how much text.

    Attributes:
        key: distinguishes a file's counts from those of another detection.
        text: identifies the batches counted so far, see `with_batch`.
        work: by `q` and `k`, how much pruning left to compute.
    """

    def __init__(self, top_ratio: float, key: str = ""):
        self.top_ratio = top_ratio
        self.key = key
        self.text = ""
        self.num_batches = 0
        self.num_sentences = 0
        self.num_tokens: int | Tensor = 0
        self.work = {"q": Work(), "k": Work()}
        self._top = _Sums()
        self._not_finite = _Sums()
        self._activations = _Sums()

    def add(self, impacts: Mapping[Site, Tensor]) -> None:
        """Adds a batch's impacts to the counts.

        impacts: by site (sentences, neurons), floating point, of at least one site; sites may share a tensor.
        """
        self.num_batches += 1
        self.num_sentences += len(next(iter(impacts.values())))
        for sites, stack in _stacked(impacts):
            top = in_top(stack.flatten(0, 1), num_top(self.top_ratio, stack.shape[-1]))
            self._top.add(sites, top.unflatten(0, stack.shape[:2]).sum(1, dtype=torch.int32))
            self._not_finite.add(sites, (~stack.isfinite()).sum((1, 2), dtype=torch.int32))

    def add_activations(self, sums: Mapping[Site, Tensor], num_tokens: Tensor) -> None:
        """Adds a batch's absolute activations, as measured by an `ActivationMeter`.

        Args:
            sums: its `sums`.
            num_tokens: its `num_tokens`, over which they were summed.
        """
        # Kept on the device: an int would synchronise with it.
        self.num_tokens = self.num_tokens + num_tokens
        for sites, stack in _stacked(sums):
            # In float64, because the sum may run over a hundred thousand sentences.
            self._activations.add(sites, stack.double())

    def mean_activations(self) -> Activations:
        """Mean absolute activations per token, (neurons,), float32, on the CPU.

        Raises:
            UserError: some activation wasn't finite.
        """
        num_tokens = max(1, int(self.num_tokens))
        means = {site: (values.cpu() / num_tokens).float() for site, values in self._activations.by_site().items()}
        for (layer, projection), values in means.items():
            if not values.isfinite().all():
                raise UserError(
                    f"model.name: activations at layer {layer} {projection} aren't finite; the model computes NaN"
                )
        return means

    def sum_over_processes(self, sizes: Mapping[Site, int], device: torch.device) -> None:
        """Sums the counts of all processes; a process without a batch contributes zeros.

        Args:
            sizes: number of neurons of each of the model's sites.
            device: where to sum, supported by the processes' backend.
        """
        if num_processes() == 1:
            return
        totals = torch.tensor([self.num_sentences, self.num_batches, int(self.num_tokens)], device=device)
        self.num_sentences, self.num_batches, self.num_tokens = sum_over_processes(totals).tolist()
        for name, work in self.work.items():
            numbers = torch.tensor([int(it) for it in vars(work).values()], device=device)
            self.work[name] = Work(*sum_over_processes(numbers).tolist())
        own = self._top.by_site(), self._not_finite.by_site(), self._activations.by_site()
        self._top, self._not_finite, self._activations = _Sums(), _Sums(), _Sums()
        # Copied, because the sum is in place, and gate, up and down share a row.
        for site, size in sizes.items():
            empty = (torch.zeros(size, dtype=torch.int32), torch.zeros((), dtype=torch.int32))
            for sums, values, zeros in zip((self._top, self._not_finite), own[:2], empty, strict=True):
                sums.add(((site,),), sum_over_processes(values.get(site, zeros).to(device, copy=True))[None])
            if self.num_tokens and site[1] in MEASURED:
                values = own[2].get(site, torch.zeros(size, dtype=torch.float64))
                self._activations.add(((site,),), sum_over_processes(values.to(device))[None])

    def consistent(self, consistency: float, sizes: Mapping[Site, int]) -> NeuronSet:
        """Returns the neurons that were in the top in at least a fraction `consistency` of the sentences.

        Raises:
            UserError: some impact wasn't finite.
        """
        for (layer, projection), not_finite in self._not_finite.by_site().items():
            if not_finite:
                raise UserError(
                    f"model.name: impacts at layer {layer} {projection} aren't finite; the model computes NaN or Inf"
                )
        # The slack keeps a threshold such as 0.6 of 5 sentences at 3 despite floating-point error.
        least = max(1.0, consistency * self.num_sentences * (1 - 1e-9))
        counts = self._top.by_site()
        return NeuronSet({site: (count >= least).nonzero().flatten() for site, count in counts.items()}, sizes)

    def save(self, file: Path) -> None:
        """Writes the counts so far, whole or not at all."""
        kinds = {"": self._top, "not_finite.": self._not_finite, "active.": self._activations}
        tensors = {
            f"{kind}{layer}.{projection}": values.clone()
            for kind, sums in kinds.items()
            for (layer, projection), values in sums.by_site().items()
        }
        progress = {name: str(int(getattr(self, name))) for name in _PROGRESS}
        progress |= {"key": self.key, "text": self.text}
        for name, work in self.work.items():
            progress |= {f"{name}.{kind}": str(int(number)) for kind, number in vars(work).items()}
        with whole_file(file) as temporary:
            save_file(tensors, temporary, progress)

    @classmethod
    def load(cls, file: Path, top_ratio: float, device: torch.device, key: str = "") -> "TopCounts":
        """Loads counts to continue from; returns empty ones if the file doesn't exist or has another key.

        Raises:
            UserError: the file is damaged.
        """
        counts = cls(top_ratio, key)
        if not file.exists():
            return counts
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                progress = tensors.metadata() or {}
                if progress.get("key") != key:
                    return counts
                for name in tensors.keys():  # noqa: SIM118 (not iterable itself)
                    *kind, layer, projection = name.split(".")
                    sums = {"not_finite": counts._not_finite, "active": counts._activations}.get(
                        "".join(kind), counts._top
                    )
                    sums.add((((int(layer), projection),),), tensors.get_tensor(name)[None])
            for name in _PROGRESS:
                setattr(counts, name, int(progress[name]))
            counts.text = progress["text"]
            for name, work in counts.work.items():
                counts.work[name] = Work(*(int(progress[f"{name}.{kind}"]) for kind in vars(work)))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: counts that can't be read ({error}); delete it and detect again") from None
        return counts


def with_batch(text: str, batch: Batch) -> str:
    """Identifies a sequence of batches by that of all but the last (at first an empty string) and the last one."""
    return fingerprint([text, {it: batch[it].tolist() for it in _OF_TOKENS if batch.get(it) is not None}])


# The sites of each row of a stack. Sites may share a row, as gate, up and down of a layer do.
_SitesOfRows = tuple[tuple[Site, ...], ...]


class _Sums:
    """Running sums of one tensor per site. Sites of equal size are added as one stack: few operations per batch."""

    def __init__(self) -> None:
        self._stacks: dict[_SitesOfRows, Tensor] = {}

    def add(self, sites: _SitesOfRows, stack: Tensor) -> None:
        """Adds `stack`, (rows, ...), whose rows belong to `sites`."""
        total = self._stacks.get(sites)
        self._stacks[sites] = stack if total is None else total.to(stack.device) + stack

    def by_site(self) -> dict[Site, Tensor]:
        sums: dict[Site, Tensor] = {}
        for sites_of_rows, stack in self._stacks.items():
            for sites, row in zip(sites_of_rows, stack, strict=True):
                for site in sites:
                    # Loaded sums are on one device; a large model's layers may be on several.
                    sums[site] = row if site not in sums else sums[site].to(row.device) + row
        return sums


def _stacked(tensors: Mapping[Site, Tensor]) -> Iterator[tuple[_SitesOfRows, Tensor]]:
    """Yields the tensors of each shape and device as one stack, (rows, ...), with the sites of its rows."""
    sites: dict[int, list[Site]] = {}
    groups: dict[tuple, dict[int, Tensor]] = {}
    for site, tensor in tensors.items():
        sites.setdefault(id(tensor), []).append(site)
        groups.setdefault((tensor.shape, tensor.device), {})[id(tensor)] = tensor
    for group in groups.values():
        yield tuple(tuple(sites[key]) for key in group), torch.stack(list(group.values()))


def in_top(impacts: Tensor, count: int) -> Tensor:
    """Which neurons are among the `count` largest of their sentence: (sentences, neurons), bool.

    Exactly `count` per sentence, or fewer if fewer are above zero; among equal impacts the lower index wins.
    """
    threshold = impacts.topk(count, dim=1).values[:, -1:]
    above = impacts > threshold
    tied = impacts == threshold
    places = count - above.sum(1, keepdim=True)
    return (above | (tied & (tied.cumsum(1) <= places))) & (impacts > 0)
