"""Maps neurons to weight entries: which rows or columns of which linear layers are trained."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agnostic_train.errors import UserError
from agnostic_train.model.decoder import Projection, find_decoder
from agnostic_train.neurons.neuron_set import NeuronSet


@dataclass(frozen=True)
class ChosenEntries:
    """The chosen rows (dim 0) or columns (dim 1) of one linear layer's weight.

    Attributes:
        index: int64, sorted, unique, on the weight's device.
    """

    linear: nn.Module
    dim: int
    index: Tensor

    def frozen(self, size: int) -> Tensor:
        """Returns a bool mask of the frozen entries that broadcasts over a weight with `size` rows (or columns)."""
        frozen = torch.ones(size, dtype=torch.bool, device=self.index.device)
        frozen[self.index] = False
        return frozen.unsqueeze(1 - self.dim)


def chosen_entries(model: nn.Module, neurons: NeuronSet) -> dict[str, ChosenEntries]:
    """Returns the linear layers that contain chosen neurons, by module name, with their chosen rows or columns.

    Sites that share a fused weight (q, k and v in Phi-3) are combined into one entry.

    Raises:
        UserError: the neurons belong to another model, weights are offloaded, or modules are compiled,
            pruned or reparametrised.
    """
    neurons.check(model)
    check_not_compiled(model)
    decoder = find_decoder(model)
    decoder.check_on_devices("training or exporting")
    names = {module: name for name, module in model.named_modules()}
    parts: dict[nn.Module, list[tuple[Projection, Tensor]]] = {}
    for site, indices in neurons.items():
        projection = decoder.projection(site)
        if "weight" not in getattr(projection.linear, "base_layer", projection.linear)._parameters:
            raise UserError(
                f"model: {names[projection.linear]} is pruned or reparametrised: each pass computes its weight anew; "
                "make that permanent (prune.remove, remove_parametrizations)"
            )
        parts.setdefault(projection.linear, []).append((projection, projection.entries(indices)))
    return {
        names[linear]: ChosenEntries(
            linear, of_linear[0][0].neuron_dim, torch.cat([entries for _, entries in of_linear]).sort().values
        )
        for linear, of_linear in parts.items()
    }


def check_not_compiled(model: nn.Module) -> None:
    """Raises `UserError` if the model or some layers were wrapped by `torch.compile`, which renames their weights."""
    if any("_orig_mod" in name for name, _ in model.named_modules()):
        raise UserError(
            "model: torch.compile has wrapped it, or layers of it, and renamed the weights; pass the plain model, and "
            "compile with torch_compile=True or in place (model.compile())"
        )


def trained_neurons(model: nn.Module) -> NeuronSet | None:
    """The neurons of a model's own weights that were trained since it was loaded; None if none were."""
    return getattr(model, "trained_neurons", None)


def record_trained(model: nn.Module, neurons: NeuronSet) -> None:
    """Adds to the model's `trained_neurons`, which `export_checkpoint` reads."""
    earlier = trained_neurons(model)
    model.trained_neurons = neurons if earlier is None else earlier | neurons


def num_trainable(neurons: NeuronSet, model: nn.Module) -> int:
    """Returns the number of weight entries in the rows and columns of a set's neurons."""
    decoder = find_decoder(model)
    return sum(len(indices) * decoder.projection(site).entry_size for site, indices in neurons.items())
