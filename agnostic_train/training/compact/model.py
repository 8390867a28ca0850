"""The tuner that wraps every linear layer with chosen neurons in a `NeuronLinear`."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.utils import logging

from agnostic_train.errors import UserError
from agnostic_train.model.decoder import find_decoder
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.chosen import ChosenEntries, record_trained, trained_neurons
from agnostic_train.training.compact.config import NeuronConfig
from agnostic_train.training.compact.layer import NeuronLinear

logger = logging.get_logger(__name__)

NOT_LOADED = -1


class NeuronModel(BaseTuner):
    """Tuner that trains only chosen rows and columns, created by `get_peft_model(model, NeuronConfig(...))`.

    Weight decay pulls the chosen entries toward the base model's values (with `update="mask"`, toward zero).
    """

    prefix = "neuron_"
    tuner_layer_cls = NeuronLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: NeuronConfig, model_config: dict) -> NeuronConfig:
        return peft_config

    def _prepare_model(self, peft_config: NeuronConfig, model: nn.Module) -> None:
        self._chosen: dict[str, ChosenEntries] = peft_config.resolve(model)
        name = peft_config.base_model_name_or_path
        if name and trained_neurons(model) is not None and peft_config.neurons is not None:
            logger.warning(
                "the model was trained since it was loaded from %s, so a saved adapter won't name that as its base; to "
                "save one that does, save the model first, load it from there, and train that",
                name,
            )
            # Not None, which PEFT would replace by that name.
            peft_config.base_model_name_or_path = ""
        self._check_unlearnt(peft_config, model)
        modules = {name for name, _ in model.named_modules()}
        strangers = [name for name in (*peft_config.rows, *peft_config.columns) if name not in modules]
        if strangers:
            raise UserError(f"neurons: the adapter has rows of {strangers[0]}, which this model lacks")

    def _check_unlearnt(self, peft_config: NeuronConfig, model: nn.Module) -> None:
        """Refuses a second adapter from the configuration of one that is trained.

        TRL's preference trainers create their reference adapter this way, without copying the trained neuron weights.
        """
        for module in model.modules():
            for other in module.neuron_delta if isinstance(module, NeuronLinear) else []:
                if self.peft_config.get(other) is peft_config and module.neuron_delta[other].any():
                    raise UserError(
                        f"neurons: adapter {other!r} of this NeuronConfig is already trained, and a second adapter "
                        "would start from the base model; merge the first one (merge_and_unload), pass ref_model to a "
                        "trainer that needs a reference model, or create a separate NeuronConfig"
                    )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        # For tuners without support, PEFT drops `adapter_names`: every row would silently use the active adapter.
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: neuron adapters can't be mixed in a batch; use set_adapter")
        yield

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Records the neurons of merged adapters in the model's `trained_neurons`, for `export_checkpoint`."""
        names = {name for it in self.model.modules() if isinstance(it, NeuronLinear) for name in it.merged_adapters}
        if merge:
            names |= {*(adapter_names or self.active_adapters)}
        merged = adapter_neurons(self.model, names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if len(merged):
            record_trained(model, merged)
        return model

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        """Raises `NotImplementedError`, where PEFT would report a missing attribute."""
        raise NotImplementedError("neuron adapters have no weighted sums; merge one after the other (merge_and_unload)")

    @staticmethod
    def _check_target_module_exists(peft_config: NeuronConfig, key: str) -> bool:
        return key in peft_config.rows or key in peft_config.columns

    def _create_and_replace(
        self, peft_config: NeuronConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        dim = 0 if current_key in peft_config.rows else 1
        if current_key in self._chosen:
            index = self._chosen[current_key].index
        else:
            # The indices come with the saved adapter that is loaded next. Until then every forward pass fails.
            index = torch.full(((peft_config.rows if dim == 0 else peft_config.columns)[current_key],), NOT_LOADED)
        if isinstance(target, NeuronLinear):
            layer = target
        elif isinstance(target, BaseTunerLayer):
            raise UserError(f"neurons: {current_key} has {type(target).__name__} adapters already; merge them first")
        else:
            layer = NeuronLinear(target, dim)
            self._replace_module(parent, target_name, layer, target)
        layer.add(adapter_name, index)
        layer.set_adapter(self.active_adapters)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: NeuronConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Remaps names as PEFT does, and checks the indices, which otherwise would only fail later, during training."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, module in model.named_modules():
            index = remapped.get(f"{name}.neuron_index.{adapter_name}")
            if isinstance(module, NeuronLinear) and index is not None and len(index):
                size = module.out_features if module.dim == 0 else module.in_features
                if index.min() < 0 or index.max() >= size:
                    raise ValueError(
                        f"{name}: the adapter's neuron {int(index.max())} is out of range for {size} neurons; it was "
                        "trained on another model"
                    )
        return remapped


def adapter_neurons(model: nn.Module, adapter_names: Collection[str] | None = None) -> NeuronSet:
    """Returns the neurons of adapters, read from the model's layers.

    Args:
        model: a model with neuron adapters, wrapped in a `PeftModel` or not.
        adapter_names: the active ones by default.

    Raises:
        UserError: an adapter was created from a saved configuration and its weights weren't loaded.
    """
    decoder = find_decoder(model)
    sites = {}
    for site in decoder.sizes:
        projection = decoder.projection(site)
        layer = projection.linear
        if isinstance(layer, NeuronLinear):
            names = layer.active_adapters if adapter_names is None else adapter_names
            indices = [layer.neuron_index[name] for name in names if name in layer.neuron_index]
            if any((index == NOT_LOADED).any() for index in indices):
                raise UserError(
                    "neurons: the adapter's weights weren't loaded (PeftModel.from_pretrained); a new adapter needs "
                    "NeuronConfig(neurons=...)"
                )
            if indices:
                sites[site] = projection.neurons(torch.cat(indices))
    return NeuronSet(sites, decoder.sizes)
