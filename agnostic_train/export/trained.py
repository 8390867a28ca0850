"""A uniform view of a trained model, however it was trained: the base, and the changes made by training."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from agnostic_train.errors import UserError
from agnostic_train.model.decoder import find_decoder
from agnostic_train.model.reading import commit_of, read_model
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.processes import check_whole
from agnostic_train.training.checkpoints import NEURONS_FILE
from agnostic_train.training.chosen import ChosenEntries, chosen_entries, trained_neurons
from agnostic_train.training.compact import adapter_neurons
from agnostic_train.training.delta import Delta, adapter_deltas, add_deltas, plain_model, read_deltas, weight_deltas


@dataclass(frozen=True)
class Trained:
    """A trained model taken apart by `of`, so that later steps needn't know how it was trained.

    Attributes:
        model: the model, including adapter layers.
        adapter: the adapter's deltas by module name; empty for a model trained with masks.
        base: the model before training, or None if unknown.
        neurons: the trained neurons, or None if unknown.
        base_name: the name or path that the base was loaded from; None if unknown, or if it has been trained since.
        base_revision: the commit of the hub repository `base_name`; None if it is none or unknown.
        trained_before: whether neurons were trained before the adapter: the weights around it may not be the base's.
    """

    model: nn.Module
    adapter: Mapping[str, Delta]
    base: nn.Module | None
    neurons: NeuronSet | None
    base_name: str | None
    base_revision: str | None = None
    trained_before: bool = False

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | str | Path,
        base: PreTrainedModel | str | Path | None = None,
        neurons: NeuronSet | Mapping | str | Path | None = None,
    ) -> "Trained":
        """Takes a model apart, without changing it.

        Args:
            model: a model trained by `NeuronTrainer`, one with a neuron adapter, or the folder of such an adapter.
            base: the model before training, or its name or folder; by default, for an adapter's folder, the base that
                its config names.
            neurons: the trained neurons, or their file; by default those of the adapter and the model's
                `trained_neurons`.

        Raises:
            UserError: an adapter isn't a neuron adapter, several are active, the folder has no adapter or not the
                one that its neurons file describes, `neurons` lacks some of the adapter's, neurons were trained before
                the adapter and no base is given, weights are sharded over processes or offloaded, single layers are
                compiled, or the base is the trained model.
        """
        if isinstance(model, (str, Path)):
            return cls._in_folder(Path(model), base, neurons)
        return cls._in_memory(model, base, neurons)

    @classmethod
    def _in_folder(
        cls,
        folder: Path,
        base: PreTrainedModel | str | Path | None,
        neurons: NeuronSet | Mapping | str | Path | None,
    ) -> "Trained":
        """Reads an adapter's folder, and its base."""
        adapter, config = read_deltas(folder)
        if base is None and not config.base_model_name_or_path:
            raise UserError(f"base: {folder} doesn't name the model that it was trained on; give it as base")
        loaded = _loaded(config.base_model_name_or_path, config.revision) if base is None else _loaded(base)
        own = _neurons_at(loaded, adapter)
        if (folder / NEURONS_FILE).exists():
            _check_is_trained(folder, own, loaded)
        trained = _all_trained(own, None if neurons is None else NeuronSet.given(neurons, loaded))
        return cls(loaded, adapter, loaded, trained, *_origin_of(loaded), trained_before=trained != own)

    @classmethod
    def _in_memory(
        cls,
        model: nn.Module,
        base: PreTrainedModel | str | Path | None,
        neurons: NeuronSet | Mapping | str | Path | None,
    ) -> "Trained":
        """Takes a loaded model apart."""
        check_whole(model, "exporting")
        plain = plain_model(model)
        find_decoder(plain).check_on_devices("exporting")
        adapter, earlier = adapter_deltas(plain), trained_neurons(plain)
        named = None if neurons is None else NeuronSet.given(neurons, plain)
        trained, trained_before = earlier if named is None else named, False
        if adapter:
            own = adapter_neurons(plain)
            trained = _all_trained(own, named)
            trained_before = earlier is not None or trained != own
            if named is None and earlier is not None:
                if base is None and len(earlier - own):
                    raise UserError(
                        "base: neurons were trained before this adapter; give the model from before that training"
                    )
                trained = own | earlier
        loaded = None if base is None else _loaded(base)
        if loaded is not None and _share_weights(plain, loaded):
            raise UserError("base: it is the trained model itself; give the model from before training, or its folder")
        name, revision = plain.name_or_path or None, commit_of(plain)
        if loaded is not None or adapter:
            name, revision = _origin_of(plain if loaded is None else loaded)
        return cls(plain, adapter, loaded, trained, name, revision, trained_before)

    @property
    def is_quantised(self) -> bool:
        return getattr(self.model, "hf_quantizer", None) is not None

    @cached_property
    def chosen(self) -> Mapping[str, ChosenEntries] | None:
        """The weight entries that may differ from the base's, by module name; None if unknown."""
        return None if self.neurons is None else chosen_entries(self.model, self.neurons)

    def weights(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor, torch.dtype]]:
        """Yields the named parameters or state of the equivalent plain model, without adapters, one by one.

        A weight changed by the adapter is a new tensor, the sum in the adapter's precision. To save memory, callers
        release it before they take the next one. All other tensors are the model's own.

        Args:
            named: the model's `named_parameters()` or `state_dict().items()`.

        Yields: each weight's name, value, and dtype in the model, which is that of its frozen entries.
        """
        plain = {name.replace(".base_layer.", "."): value for name, value in named if ".neuron_" not in name}
        for name, value in add_deltas(plain, self.adapter):
            yield name, value, plain[name].dtype
            del value

    def deltas(self) -> Mapping[str, Delta]:
        """Returns the changes made by training, as rows and columns to add to the base's weights.

        Without a known base, an adapter's changes are those from the weights around it.

        Raises:
            UserError: neurons were trained before the adapter, and how they changed isn't known, or a model without an
                adapter has no known base or neurons.
        """
        if self.adapter:
            holds_all = sum(len(it.index) for it in (self.chosen or {}).values()) == sum(
                len(it.index) for it in self.adapter.values()
            )
            if not self.trained_before or (self.base is None and holds_all):
                return self.adapter
            if self.base is None or self.base is self.model or self.is_quantised:
                raise UserError(
                    "neurons: some were trained before the adapter, which doesn't hold them; give the trained model "
                    "itself, not quantised, and the model from before all training as base"
                )
        if self.base is None:
            raise UserError(
                "base: an adapter is the difference from the model before training; give that model as base"
            )
        if self.neurons is None:
            raise UserError("neurons: which were trained isn't known, so there are no rows to export; name them")
        if not len(self.neurons):
            raise UserError("neurons: the set is empty, so there are no rows to export")
        return weight_deltas(self.model, self.base, self.neurons, self.adapter)


def _check_is_trained(checkpoint: Path, own: NeuronSet, base: nn.Module) -> None:
    """Raises `UserError` unless the adapter in a Trainer's checkpoint, and no other one there, is what was trained.

    own: the adapter's neurons.
    """
    trained = NeuronSet.load(checkpoint / NEURONS_FILE)
    if trained != own:
        raise UserError(
            f"{checkpoint}: this isn't the adapter that was trained; an adapter with another name is in a subfolder"
        )
    for folder in sorted(it.parent for it in checkpoint.glob("*/adapter_config.json")):
        if _neurons_at(base, read_deltas(folder)[0]) == trained:
            raise UserError(
                f"{checkpoint}: {folder.name}/ has another adapter of the same neurons, and either may be the one that "
                "was trained; export the model in memory, or name that subfolder"
            )


def _all_trained(own: NeuronSet, named: NeuronSet | None) -> NeuronSet:
    """Returns `named`, which must include the adapter's neurons `own`; by default, `own`."""
    if named is None:
        return own
    if len(own - named):
        raise UserError("neurons: some that the adapter trains aren't among them; name all that were trained, or none")
    return named


def _origin_of(base: nn.Module) -> tuple[str | None, str | None]:
    """The name that a base was loaded by, and its hub commit, if any; None if it has been trained since."""
    if trained_neurons(base) is not None:
        return None, None
    return base.name_or_path or None, commit_of(base)


def _share_weights(model: nn.Module, other: nn.Module) -> bool:
    addresses = {it.data_ptr() for it in model.parameters()} - {0}
    return any(it.data_ptr() in addresses for it in other.parameters())


def _neurons_at(model: nn.Module, deltas: Mapping[str, Delta]) -> NeuronSet:
    """Returns the neurons that the deltas belong to."""
    decoder = find_decoder(model)
    names = {module: name for name, module in model.named_modules()}
    projections = {site: decoder.projection(site) for site in decoder.sizes}
    by_site = {site: deltas.get(names[projection.linear]) for site, projection in projections.items()}
    return NeuronSet(
        {site: projections[site].neurons(delta.index) for site, delta in by_site.items() if delta is not None},
        decoder.sizes,
    )


def _loaded(base: nn.Module | str | Path, revision: str | None = None) -> nn.Module:
    if isinstance(base, nn.Module):
        if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            raise UserError("base: it has adapters; give the model without them")
        return base
    model = read_model(base, "base", dtype="auto", revision=revision)
    check_whole(model, "exporting")
    return model
