"""Switching neurons off in place, and back on bit for bit."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from agnostic_train.model.decoder import Projection, Site, find_decoder
from agnostic_train.model.inference import uncompiled
from agnostic_train.model.weights import DEACTIVATED_BY_HOOKS
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.processes import check_whole


@contextmanager
def deactivate(
    model: nn.Module, neurons: NeuronSet | Mapping[Site, Iterable[int] | torch.Tensor]
) -> Iterator[nn.Module]:
    """Sets the neurons' weights, and the bias entries of `q k v gate up`, to zero inside the block.

    Only the chosen rows and columns are copied. After the block, also if it raises, every weight is bit-identical to
    before. Blocks can be nested, but must end in reverse order. With adapters, quantised, pruned or reparametrised
    weights there is no single weight to set to zero; instead, the linear's output (for `o` and `down`, its input) is
    zeroed at the neurons, which switches off base and adapters together, and compiled modules run uncompiled. Run a
    backward pass in the same block as its forward pass.

    Args:
        model: a model that `find_decoder` supports, on any device.
        neurons: a `NeuronSet`, or a mapping that makes one.

    Raises:
        TypeError, ValueError: as by `NeuronSet.of`.
        UserError: neurons are beyond the model's shapes, weights are offloaded, or the model isn't supported. The model
            is then unchanged.
    """
    neurons = NeuronSet.of(neurons)
    neurons.check(model)
    decoder = find_decoder(model)
    decoder.check_on_devices("deactivation")
    if any(decoder.projection(site).is_plain for site, _ in neurons.items()):
        check_whole(model, "deactivation")
    with deactivated((decoder.projection(site), indices) for site, indices in neurons.items()):
        yield model


@contextmanager
def deactivated(neurons: Iterable[tuple[Projection, torch.Tensor]]) -> Iterator[None]:
    """Deactivates the given neurons of single projections inside the block."""
    saved: list[tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]] = []
    hooks = ExitStack()
    try:
        with torch.no_grad():
            for projection, indices in neurons:
                index = projection.entries(indices)
                if not projection.is_plain:
                    hooks.enter_context(_deactivated_by_hook(projection, index))
                    hooks.enter_context(uncompiled())
                    continue
                for parameter, dim in projection.parts():
                    saved.append((parameter, dim, index, parameter.index_select(dim, index)))
                    parameter.index_fill_(dim, index, 0)
        yield
    finally:
        hooks.close()
        with torch.no_grad():
            for parameter, dim, index, values in reversed(saved):
                parameter.index_copy_(dim, index, values)


@contextmanager
def _deactivated_by_hook(projection: Projection, index: torch.Tensor) -> Iterator[None]:
    linear, dim = projection.linear, projection.neuron_dim
    if dim == 0:
        handle = linear.register_forward_hook(lambda module, args, output: output.index_fill(-1, index, 0))
    else:
        handle = linear.register_forward_pre_hook(lambda module, args: (args[0].index_fill(-1, index, 0), *args[1:]))
    record = vars(linear).setdefault(DEACTIVATED_BY_HOOKS, [])
    record.append((dim, index.tolist()))
    try:
        yield
    finally:
        record.pop()
        handle.remove()
