"""Where the seven projections live in a Hugging Face decoder, and how its attention rotates.

Everything is read from the modules themselves (weight shapes, the family's own rotation function), never from a
formula over the config. A model in which something can't be found is refused by name.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from agnostic_train.files import UserError

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION_PROJECTIONS = ("q", "k", "v", "o")
FEED_FORWARD_PROJECTIONS = ("gate", "up", "down")
COLUMN_PROJECTIONS = ("o", "down")

Site = tuple[int, str]


@dataclass(frozen=True)
class Projection:
    """One projection of one layer: an `nn.Linear` whose rows (or, for `o` and `down`, columns) are neurons."""

    name: str
    linear: nn.Linear

    @property
    def neuron_dim(self) -> int:
        """The dimension of `weight` that counts neurons: 0 for rows, 1 for columns."""
        return 1 if self.name in COLUMN_PROJECTIONS else 0

    @property
    def num_neurons(self) -> int:
        return self.linear.weight.shape[self.neuron_dim]

    def parts(self) -> list[tuple[nn.Parameter, int]]:
        """The parameters that deactivation zeroes, each with its neuron dimension."""
        parts = [(self.linear.weight, self.neuron_dim)]
        if self.linear.bias is not None and self.neuron_dim == 0:
            parts.append((self.linear.bias, 0))
        return parts


@dataclass(frozen=True)
class Rotation:
    """A family's rotary position embedding as it acts on one head.

    `apply(x, cos, sin)` rotates `x` (batch, heads, length, head_dim). `partner` (head_dim,) int64 tells which
    entry each entry mixes with, itself where the rotation leaves the entry alone.
    """

    apply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    partner: torch.Tensor

    def coefficients(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a unit vector becomes: `R_i e_n = own[i, n] e_n + other[i, n] e_partner(n)`.

        cos, sin: (batch, length, rotary_dim). Returns own, other: (batch, length, head_dim).
        """
        head_dim = len(self.partner)
        index = torch.arange(head_dim, device=self.partner.device)
        first = (index <= self.partner).to(cos.dtype)  # one of each pair, and every entry without a partner
        shape = (cos.shape[0], 1, cos.shape[1], head_dim)
        rotated_first = self.apply(first.expand(shape), cos, sin).squeeze(1)
        rotated_second = self.apply((1 - first).expand(shape), cos, sin).squeeze(1)
        is_first = first.bool()
        own = torch.where(is_first, rotated_first, rotated_second)
        other = torch.where(is_first, rotated_first[..., self.partner], rotated_second[..., self.partner])
        return own, other * (self.partner != index)


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its attention and feed-forward modules and their projections by name."""

    index: int
    attention: nn.Module
    feed_forward: nn.Module
    projections: dict[str, Projection]
    head_dim: int

    @property
    def num_query_heads(self) -> int:
        return self.projections["q"].num_neurons // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.projections["k"].num_neurons // self.head_dim

    @property
    def queries_per_kv(self) -> int:
        """How many query heads read one key-value head."""
        return self.num_query_heads // self.num_kv_heads

    def rotation(self, cos: torch.Tensor, sin: torch.Tensor) -> Rotation:
        """The rotation of this layer's family, with its pairs found by rotating each unit vector once."""
        rotate_both = getattr(sys.modules[type(self.attention).__module__], "apply_rotary_pos_emb", None)
        if rotate_both is None:
            raise UserError(
                f"model.name: {type(self.attention).__name__} has no apply_rotary_pos_emb to take its rotation "
                "from; this family isn't supported yet"
            )

        def apply(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return rotate_both(x, x, cos, sin)[0]

        # The probe takes its own angle: at position 0 the sine is zero and every entry would look unpaired.
        angle = torch.full((1, 1, cos.shape[-1]), 0.5, device=cos.device)
        basis = torch.eye(self.head_dim, device=cos.device).view(1, self.head_dim, 1, self.head_dim)
        rotated = apply(basis, angle.cos(), angle.sin())[0, :, 0]
        rotated.fill_diagonal_(0)
        index = torch.arange(self.head_dim, device=cos.device)
        partner = torch.where(rotated.abs().amax(1) > 0, rotated.abs().argmax(1), index)
        return Rotation(apply, partner)


@dataclass(frozen=True)
class Decoder:
    """The decoder inside a model: `backbone` maps tokens to hidden states, `layers` hold the projections."""

    backbone: nn.Module
    layers: list[Layer]

    @cached_property
    def sizes(self) -> dict[Site, int]:
        """Number of neurons at each site."""
        return {
            (layer.index, name): projection.num_neurons
            for layer in self.layers
            for name, projection in layer.projections.items()
        }

    def projection(self, site: Site) -> Projection:
        return self.layers[site[0]].projections[site[1]]


_LINEAR_NAMES = {name: f"{name}_proj" for name in PROJECTIONS}


def find_decoder(model: nn.Module) -> Decoder:
    """Finds the projections of a Hugging Face causal language model.

    Args:
        model: a `PreTrainedModel` of the Llama layout (`self_attn.{q,k,v,o}_proj`, `mlp.{gate,up,down}_proj`).

    Raises:
        UserError: naming the class and the projection that can't be found.
    """
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else model
    blocks = getattr(backbone, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UserError(f"model.name: {type(model).__name__} has no list of decoder layers; it isn't supported")
    return Decoder(
        backbone,
        [
            _find_layer(index, getattr(block, "self_attn", None), getattr(block, "mlp", None))
            for index, block in enumerate(blocks)
        ],
    )


def float32_copy(layer: Layer) -> Layer:
    """The layer's two modules copied and cast to float32, to be tried out alone; the model isn't touched."""
    return _find_layer(layer.index, copy.deepcopy(layer.attention).float(), copy.deepcopy(layer.feed_forward).float())


def _find_layer(index: int, attention: nn.Module | None, feed_forward: nn.Module | None) -> Layer:
    projections = {}
    for name in PROJECTIONS:
        owner = attention if name in ATTENTION_PROJECTIONS else feed_forward
        linear = getattr(owner, _LINEAR_NAMES[name], None)
        if not isinstance(linear, nn.Linear):
            raise UserError(
                f"model.name: layer {index} has no nn.Linear called {_LINEAR_NAMES[name]} in its "
                f"{type(owner).__name__}, so projection {name!r} can't be found; use a model of the Llama layout"
            )
        projections[name] = Projection(name, linear)
    for norm in ("q_norm", "k_norm"):
        if hasattr(attention, norm):
            raise UserError(
                f"model.name: {type(attention).__name__} normalises queries and keys ({norm}); "
                "the exact impact of such a family isn't supported yet"
            )
    return Layer(index, attention, feed_forward, projections, attention.head_dim)
