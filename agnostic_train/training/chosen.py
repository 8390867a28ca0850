"""From neurons to entries of weights: which rows or columns of which linears learn."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agnostic_train.model.decoder import Projection, find_decoder
from agnostic_train.neurons.neuron_set import NeuronSet


@dataclass(frozen=True)
class ChosenEntries:
    """Rows (dim 0) or columns (dim 1) of one linear's weight.

    index: int64, sorted, unique, on the weight's device.
    """

    linear: nn.Module
    dim: int
    index: Tensor

    def frozen(self, size: int) -> Tensor:
        """Bool, True where an entry must not move, shaped to broadcast over a weight with `size` rows or columns."""
        frozen = torch.ones(size, dtype=torch.bool, device=self.index.device)
        frozen[self.index] = False
        return frozen.unsqueeze(1 - self.dim)


def chosen_entries(model: nn.Module, neurons: NeuronSet) -> dict[str, ChosenEntries]:
    """The linears that hold a chosen neuron, by module name, each with its chosen rows or columns.

    Sites that share a fused weight (Phi-3's q, k and v) become one.

    Raises:
        UserError: neurons of another model.
    """
    neurons.check(model)
    decoder = find_decoder(model)
    names = {module: name for name, module in model.named_modules()}
    parts: dict[nn.Module, list[tuple[Projection, Tensor]]] = {}
    for site, indices in neurons.items():
        projection = decoder.projection(site)
        parts.setdefault(projection.linear, []).append((projection, projection.entries(indices)))
    return {
        names[linear]: ChosenEntries(
            linear, of_linear[0][0].neuron_dim, torch.cat([entries for _, entries in of_linear]).sort().values
        )
        for linear, of_linear in parts.items()
    }


def num_weights(neurons: NeuronSet, model: nn.Module) -> int:
    """How many weights a set's rows and columns have."""
    decoder = find_decoder(model)
    return sum(len(indices) * decoder.projection(site).entry_size for site, indices in neurons.items())
