"""A trained model, whichever way it was trained: its base, and what was learnt."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from agnostic_train.errors import UserError
from agnostic_train.model.completeness import check_complete
from agnostic_train.model.decoder import find_decoder
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.processes import check_whole
from agnostic_train.training.chosen import ChosenEntries, chosen_entries
from agnostic_train.training.compact import adapter_neurons
from agnostic_train.training.delta import Delta, adapter_deltas, add_deltas, plain_model, read_deltas, weight_deltas
from agnostic_train.training.trainer import NEURONS_FILE


@dataclass(frozen=True)
class Trained:
    """What `of` makes of a model, so that nobody after it has to ask how it was trained.

    Attributes:
        model: the model, with an adapter's layers still in it.
        adapter: what the adapter adds, by module name; empty for a model trained with masks.
        base: the model before training, if it is known.
        neurons: what was trained, if it is known.
        base_name: what the base was loaded from.
    """

    model: nn.Module
    adapter: Mapping[str, Delta]
    base: nn.Module | None
    neurons: NeuronSet | None
    base_name: str | None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | str | Path,
        base: PreTrainedModel | str | Path | None = None,
        neurons: NeuronSet | Mapping | None = None,
    ) -> "Trained":
        """Takes a model apart, without changing it.

        Args:
            model: a model trained by `NeuronTrainer`, one with a neuron adapter, or the folder of such an adapter.
            base: the model before training, or where to load it from; a folder's adapter names its own by default.
            neurons: what was trained; by default the adapter's, and the model's `trained_neurons`.

        Raises:
            UserError: adapters that aren't ours, several active ones, no adapter in the folder or one of other neurons than
                the folder says, neurons that leave out some of the adapter's or that were trained before it and no base,
                weights split over processes, or a base that is the trained model itself.
        """
        named = None if neurons is None else NeuronSet.of(neurons)
        if isinstance(model, (str, Path)):
            adapter, name = read_deltas(model)
            if base is None and not name:
                raise UserError(f"base: {model} doesn't name the model that it was trained on; give it as base")
            loaded = _loaded(name if base is None else base)
            own = _neurons_at(loaded, adapter)
            file = Path(model) / NEURONS_FILE
            if file.exists() and NeuronSet.load(file) != own:
                raise UserError(
                    f"{model}: its adapter isn't the one that trained; that of another name is in a subfolder"
                )
            return cls(loaded, adapter, loaded, _all_trained(own, named), loaded.name_or_path or None)
        check_whole(model, "exporting")
        adapter, plain = adapter_deltas(model), plain_model(model)
        earlier = getattr(plain, "trained_neurons", None)
        if not adapter:
            trained = earlier if named is None else named
        else:
            trained = _all_trained(adapter_neurons(plain), named)
            if named is None and earlier is not None:
                if base is None and len(earlier - trained):
                    raise UserError(
                        "base: neurons were trained before this adapter; give the model as it was before them"
                    )
                trained = trained | earlier
        loaded = None if base is None else _loaded(base)
        if loaded is not None and _share_weights(plain, loaded):
            raise UserError(
                "base: it is the trained model itself; give the model as it was before training, or its folder"
            )
        return cls(plain, adapter, loaded, trained, (plain if loaded is None else loaded).name_or_path or None)

    @property
    def is_quantised(self) -> bool:
        return getattr(self.model, "hf_quantizer", None) is not None

    @cached_property
    def chosen(self) -> Mapping[str, ChosenEntries] | None:
        """The entries of weights that may differ from the base's, by module name; None if that isn't known."""
        return None if self.neurons is None else chosen_entries(self.model, self.neurons)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear that holds a chosen neuron, by module name."""
        modules = dict(self.model.named_modules())
        return {name: (modules[name].out_features, modules[name].in_features) for name in self.chosen or {}}

    def weights(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The model's own named parameters, or state, as the plain model that it stands for has them, one by one.

        What an adapter changes is the sum in the adapter's precision, which is the caller's to drop before the next;
        all else is the same tensor.
        """
        plain = {name.replace(".base_layer.", "."): value for name, value in named if ".neuron_" not in name}
        return add_deltas(plain, self.adapter)

    def deltas(self) -> Mapping[str, Delta]:
        """What was learnt, as rows and columns to add to the base's weights.

        Raises:
            UserError: an adapter on neurons that were trained before it, or a model without adapter, of which the base or the
                neurons aren't known.
        """
        if self.adapter:
            num_chosen, num_held = (
                sum(len(it.index) for it in of.values()) for of in (self.chosen or {}, self.adapter)
            )
            if num_chosen > num_held:
                raise UserError(
                    "neurons: some were trained before the adapter, which doesn't hold them; merge it first "
                    "(merge_and_unload), or export to 'merged'"
                )
            return self.adapter
        if self.base is None:
            raise UserError("base: an adapter is the difference to the model before training; give that as base")
        if self.neurons is None:
            raise UserError("neurons: which were trained isn't known, so there are no rows to export; name them")
        if not len(self.neurons):
            raise UserError("neurons: the set is empty, so there are no rows to export")
        return weight_deltas(self.model, self.base, self.neurons)


def _all_trained(own: NeuronSet, named: NeuronSet | None) -> NeuronSet:
    """An adapter's own neurons, or all that were named."""
    if named is None:
        return own
    if len(own - named):
        raise UserError("neurons: some that the adapter trains aren't among them; name all that were trained, or none")
    return named


def _share_weights(model: nn.Module, other: nn.Module) -> bool:
    addresses = {it.data_ptr() for it in model.parameters()} - {0}
    return any(it.data_ptr() in addresses for it in other.parameters())


def _neurons_at(model: nn.Module, deltas: Mapping[str, Delta]) -> NeuronSet:
    """The neurons whose rows or columns the deltas are."""
    decoder = find_decoder(model)
    names = {module: name for name, module in model.named_modules()}
    projections = {site: decoder.projection(site) for site in decoder.sizes}
    found = {site: deltas.get(names[projection.linear]) for site, projection in projections.items()}
    return NeuronSet(
        {site: projections[site].neurons(delta.index) for site, delta in found.items() if delta is not None},
        decoder.sizes,
    )


def _loaded(base: nn.Module | str | Path) -> nn.Module:
    if isinstance(base, nn.Module):
        if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            raise UserError("base: it has adapters; give the model as it was before them")
        return base
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"base: can't load {base} ({shorten(str(error), 200)})") from None
    check_complete(info, base, "base")
    check_whole(model, "exporting")
    return model
