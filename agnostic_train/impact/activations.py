"""Mean absolute activations of neurons, by which activation-matched random controls are drawn."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from agnostic_train.impact.tokens import without_tokens
from agnostic_train.model.decoder import Layer, Projection, Site
from agnostic_train.neurons.activity import MEASURED


class ActivationMeter:
    """Sums `|activation|` over a batch's counted tokens, by hooks, while other code runs the model.

    The activation of a q, k or v neuron is its projection's output (before norm and rotation); that of a hidden unit is
    its value in the input of `down_proj`.
    """

    def __init__(self, layers: Sequence[Layer]):
        self._layers = layers
        self._counted = torch.empty(0)
        self._sums: dict[Site, Tensor] = {}

    def begin(self, counted: Tensor) -> None:
        """Discards the previous batch's sums. counted: (batch, length), bool, the next batch's tokens that count."""
        self._counted, self._sums = counted, {}

    @property
    def sums(self) -> dict[Site, Tensor]:
        """The sums of the latest batch: (layer, one of `MEASURED`) -> (neurons,), float32, on the layer's device."""
        return self._sums

    @property
    def num_tokens(self) -> Tensor:
        """The number of counted tokens in the latest batch: int64 scalar, on the model's input device."""
        return self._counted.sum()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Measures each forward pass of the layers' model inside the `with` block."""
        with ExitStack() as stack:
            for layer in self._layers:
                for name in MEASURED:
                    projection = layer.projections[name]
                    if name == "down":
                        # Before hooks that switch columns off.
                        handle = projection.linear.register_forward_pre_hook(self._see_input(layer), prepend=True)
                    else:
                        handle = projection.linear.register_forward_hook(self._see_output(layer, projection))
                    stack.callback(handle.remove)
            yield

    def _see_input(self, layer: Layer) -> Callable:
        def see(module: nn.Module, args: tuple[Tensor]) -> None:
            self._add((layer.index, "down"), args[0])

        return see

    def _see_output(self, layer: Layer, projection: Projection) -> Callable:
        def see(module: nn.Module, args: tuple, output: Tensor) -> None:
            self._add((layer.index, projection.name), projection.output(output))

        return see

    def _add(self, site: Site, values: Tensor) -> None:
        # Padding may hold NaN.
        kept = without_tokens(values, ~self._counted.to(values.device))
        self._sums[site] = kept.abs().sum((0, 1), dtype=torch.float32)
