"""Where the seven projections are in a Hugging Face decoder, and how its attention rotates queries and keys.

Everything is read from the modules themselves (weight shapes, the family's own rotation function), never computed from
the config. A model in which something can't be found is refused, with an error that names it.
"""

import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from agnostic_train.errors import UserError

if TYPE_CHECKING:
    # Not at run time: importing PEFT also imports our tuner, which imports this file.
    from peft.tuners.tuners_utils import BaseTunerLayer

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION_PROJECTIONS = ("q", "k", "v", "o")
FEED_FORWARD_PROJECTIONS = ("gate", "up", "down")
COLUMN_PROJECTIONS = ("o", "down")

Site = tuple[int, str]

_UNIT_VECTORS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)  # == of tensors gives no single bool
class Projection:
    """One projection of one layer: an `nn.Linear` whose rows (or, for `o` and `down`, columns) are neurons.

    Attributes:
        linear: the module that the model calls; with adapters, PEFT's layer around the `nn.Linear`.
        rows: the row of each neuron, int64, if the projection shares a fused linear with others; otherwise None.
    """

    name: str
    linear: "nn.Linear | BaseTunerLayer"
    rows: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the linear applies its weight as stored: not adapted, quantised, pruned or reparametrised."""
        is_stored = isinstance(self.linear, nn.Linear) and "weight" in self.linear._parameters
        return is_stored and not is_quantised(self.linear.weight)

    @property
    def neuron_dim(self) -> int:
        """The dimension of `weight` that indexes neurons: 0 for rows, 1 for columns."""
        return 1 if self.name in COLUMN_PROJECTIONS else 0

    @property
    def num_neurons(self) -> int:
        if self.rows is not None:
            return len(self.rows)
        if self.is_plain and self.linear.weight.dim() == 2:
            return self.linear.weight.shape[self.neuron_dim]
        # The weight's shape is of no use: four-bit weights are packed, and ZeRO-3 leaves an empty 1-D tensor.
        return self.linear.in_features if self.neuron_dim else self.linear.out_features

    @property
    def entry_size(self) -> int:
        """The number of weights in a neuron's row or column."""
        return self.linear.out_features if self.neuron_dim else self.linear.in_features

    def entries(self, neurons: Tensor) -> Tensor:
        """Returns the rows or columns of `linear.weight` that hold the given neurons, on the weight's device."""
        entries = neurons if self.rows is None else self.rows[neurons]
        return entries.to(self.linear.weight.device)

    def neurons(self, entries: Tensor) -> Tensor:
        """Returns this projection's neurons among rows or columns of `linear.weight`: the inverse of `entries`."""
        return (
            entries if self.rows is None else torch.isin(self.rows, entries.to(self.rows.device)).nonzero().squeeze(1)
        )

    def effective_weight(self) -> Tensor:
        """Returns the weight that the linear applies, (out, in), including what adapters and quantisation change."""
        return self.linear.weight if self.is_plain else _weight_read_through(self.linear)

    def output(self, output: Tensor) -> Tensor:
        """Selects the projection's own part, (..., neurons), of its linear's output."""
        return output if self.rows is None else output[..., self._rows_beside_the_weight.to(output.device)]

    @cached_property
    def _rows_beside_the_weight(self) -> Tensor:
        """`rows` on the weight's device, cached because a copy in every forward pass would wait for the device."""
        assert self.rows is not None
        return self.rows.to(self.linear.weight.device)

    def parts(self) -> list[tuple[nn.Parameter, int]]:
        """Returns the parameters that deactivation zeroes if the linear is plain, each with its neuron dimension."""
        parts = [(self.linear.weight, self.neuron_dim)]
        if self.linear.bias is not None and self.neuron_dim == 0:
            parts.append((self.linear.bias, 0))
        return parts


@dataclass(frozen=True, eq=False)  # == of tensors gives no single bool
class Rotation:
    """A family's rotary position embedding as it acts on one head.

    Attributes:
        apply: `apply(x, cos, sin)` rotates `x` (batch, heads, length, head_dim).
        partner: (head_dim,) int64, the entry that each entry mixes with; itself if the rotation leaves it unchanged.
    """

    apply: Callable[[Tensor, Tensor, Tensor], Tensor]
    partner: Tensor

    def coefficients(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the rotated unit vectors: `R_i e_n = own[i, n] e_n + other[i, n] e_partner(n)`.

        Args:
            cos, sin: (batch, length, rotary_dim).

        Returns: own, other: both (batch, length, head_dim).
        """
        head_dim = len(self.partner)
        index = torch.arange(head_dim, device=self.partner.device)
        first = (index <= self.partner).to(cos.dtype)  # one entry of each pair, and every entry without a partner
        shape = (cos.shape[0], 1, cos.shape[1], head_dim)
        rotated_first = self.apply(first.expand(shape), cos, sin).squeeze(1)
        rotated_second = self.apply((1 - first).expand(shape), cos, sin).squeeze(1)
        is_first = first.bool()
        own = torch.where(is_first, rotated_first, rotated_second)
        other = torch.where(is_first, self.partners(rotated_first), self.partners(rotated_second))
        return own, other * (self.partner != index)

    def partners(self, values: Tensor) -> Tensor:
        """Returns each entry's partner: `values[..., partner]`. values: (..., head_dim)."""
        if self._swaps_halves:
            return values.roll(len(self.partner) // 2, -1)
        return values[..., self.partner]

    @cached_property
    def _swaps_halves(self) -> bool:
        """Whether entry n mixes with n +- head_dim / 2; False on a GPU, which would synchronise, and gathers fast."""
        partner = self.partner
        return partner.device.type == "cpu" and partner.equal(
            torch.arange(len(partner), device=partner.device).roll(len(partner) // 2)
        )


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its attention and feed-forward modules and their projections.

    Attributes:
        projections: by name; without `gate` if the feed-forward module has none.
        norms: by `q` and `k`, the modules that normalise queries and keys before rotation, if the family has them.
    """

    index: int
    attention: nn.Module
    feed_forward: nn.Module
    projections: dict[str, Projection]
    head_dim: int
    norms: dict[str, nn.Module]

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

    def kv_channels(self, query_channels: Tensor) -> Tensor:
        """The rows of k or v that channels of query heads read; query head h reads KV head `h // queries_per_kv`."""
        head, channel = query_channels // self.head_dim, query_channels % self.head_dim
        return head // self.queries_per_kv * self.head_dim + channel

    def norm_spans_heads(self, name: str) -> bool:
        """Whether the norm of `q` or `k` spans all heads (OLMo 2) rather than each head (Qwen3, Gemma 3)."""
        size = self.norms[name].weight.numel()
        if size not in (self.head_dim, self.projections[name].num_neurons):
            raise _unsupported(
                f"{type(self.attention).__name__} normalises {name} over {size} entries, neither a head "
                f"({self.head_dim}) nor all ({self.projections[name].num_neurons})"
            )
        return size != self.head_dim

    def rotation(self, cos: Tensor, sin: Tensor) -> Rotation:
        """Returns the rotation of this layer's family; its pairs are found by rotating each unit vector once."""
        rotate_both = getattr(sys.modules[type(self.attention).__module__], "apply_rotary_pos_emb", None)
        if rotate_both is None:
            raise _unsupported(f"{type(self.attention).__name__} has no apply_rotary_pos_emb to take its rotation from")

        def apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return rotate_both(x, x, cos, sin)[0]

        # The probe uses a fixed angle: at position 0 the sine is zero, and every entry would look unpaired.
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

    def check_on_devices(self, what: str) -> None:
        """Raises `UserError` if weights of projections are offloaded or empty; `what` names what needs them."""
        if any(it.linear.weight.is_meta for layer in self.layers for it in layer.projections.values()):
            raise UserError(
                f"model.name: some of the model's weights are offloaded or empty; {what} needs them all on devices"
            )


TESTED_FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2", "olmo"}
    | {"olmo2", "olmo3", "smollm3", "exaone4", "granite", "glm4", "phi3", "gpt_neox"}
)
"""The values of `config.model_type` whose impacts the tests compare with real deactivation, neuron by neuron."""


def find_decoder(model: nn.Module) -> Decoder:
    """Finds the projections of a Hugging Face causal language model.

    Three layouts are known: Llama's (a linear per projection), Phi-3's (`qkv_proj` and `gate_up_proj`), and GPT-NeoX's
    (`query_key_value`, interleaved by head, and no gate).

    Raises:
        UserError: a projection can't be found (the message names it and the class), layers share one, the model is
            inside a wrapper for data parallelism, or it has a prompt or prefix adapter.
        TypeError: `model` isn't a model.
    """
    check_model(model)
    # Not `active_peft_config`, which raises for a deleted adapter.
    configs, active = getattr(model, "peft_config", None) or {}, getattr(model, "active_adapter", None)
    if isinstance(active, str) and getattr(configs.get(active), "is_prompt_learning", False):
        raise UserError("model: its prompt or prefix adapter adds to the input, which isn't supported; unload it")
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else model
    blocks = getattr(backbone, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise _unsupported(f"{type(model).__name__} has no list of decoder layers")
    layers = []
    for index, block in enumerate(blocks):
        attention, mlp = getattr(block, "self_attn", getattr(block, "attention", None)), getattr(block, "mlp", None)
        layers.append(_find_layer(index, attention, mlp))
        _check_nothing_beside(index, block, attention, mlp)
    owners: dict[nn.Module | nn.Parameter, int] = {}
    for layer in layers:
        for name, projection in layer.projections.items():
            for part in (projection.linear, *projection.linear.parameters(recurse=False)):
                if owners.setdefault(part, layer.index) != layer.index:
                    raise _unsupported(
                        f"layers {owners[part]} and {layer.index} share their {name} projection, so it has no neurons "
                        "of its own"
                    )
    return Decoder(backbone, layers)


def _check_nothing_beside(index: int, block: nn.Module, attention: nn.Module, mlp: nn.Module) -> None:
    """Refuses a layer with matrices outside attention and feed-forward, such as Gemma 4's experts beside its `mlp`."""
    known = {*attention.parameters(), *mlp.parameters()}
    others = [name for name, it in block.named_parameters() if it.dim() > 1 and it not in known]
    if others:
        raise _unsupported(f"layer {index} has weights outside its attention and feed-forward network ({others[0]})")


def check_model(model: nn.Module) -> None:
    """Checks that an argument is a model, not its name, a part of one or a wrapper around one.

    Raises:
        UserError: the model is inside a wrapper for data parallelism.
        TypeError: `model` isn't a model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a model, such as AutoModelForCausalLM.from_pretrained gives, got {type(model).__name__}"
        )
    if not hasattr(model, "get_decoder") and isinstance(getattr(model, "module", None), nn.Module):
        raise UserError(f"model: it is inside a {type(model).__name__}; pass the model inside (model.module)")


def check_predicts_tokens(model: nn.Module) -> None:
    """Checks a model as `check_model` does, and raises `UserError` if it predicts classes or nothing, not tokens."""
    check_model(model)
    if hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is None:
        raise UserError(f"model: a {type(model).__name__} doesn't predict tokens; load it as AutoModelForCausalLM")


def check_projections(names: Iterable[str] | None, model: nn.Module) -> tuple[str, ...]:
    """Returns the named projections, each once, in the order of `PROJECTIONS`; None means all.

    Raises:
        ValueError: a name is unknown, `names` is empty or a single string.
        UserError: the model has none of the projections.
    """
    if isinstance(names, str):
        raise ValueError(f"projections: expected several names, such as [{names!r}], not one text")
    wanted = set(PROJECTIONS if names is None else names)
    if not wanted:
        raise ValueError(f"projections: name at least one of {', '.join(PROJECTIONS)}")
    for name in wanted:
        if name not in PROJECTIONS:
            raise ValueError(f"unknown projection {name!r}; it is one of {', '.join(PROJECTIONS)}")
    if not wanted & {projection for _, projection in find_decoder(model).sizes}:
        raise UserError(f"projections: {type(model).__name__} has none of {', '.join(sorted(wanted))}")
    return tuple(name for name in PROJECTIONS if name in wanted)


def float32_copy(layer: Layer) -> Layer:
    """Copies the layer's two modules and casts them to float32, to run them alone; the model isn't changed."""
    attention, feed_forward = (copy.deepcopy(module) for module in (layer.attention, layer.feed_forward))
    for module in (attention, feed_forward):
        for name, linear in list(module.named_modules()):
            # Quantised matrix products add rounding errors that depend on the batch.
            if isinstance(linear, nn.Linear) and is_quantised(linear.weight):
                module.set_submodule(name, _dequantised(linear))
    return _find_layer(layer.index, attention.float(), feed_forward.float())


def _unsupported(problem: str) -> UserError:
    return UserError(f"model.name: {problem}; such models aren't supported, those that are stand in README.md")


def _find_layer(index: int, attention: nn.Module | None, feed_forward: nn.Module | None) -> Layer:
    head_dim = getattr(attention, "head_dim", getattr(attention, "head_size", None))
    if head_dim is None:
        raise _unsupported(f"layer {index} has no attention module with a head_dim")
    projections = _attention_projections(index, attention, head_dim) | _feed_forward_projections(index, feed_forward)
    norms = {name: norm for name in ("q", "k") if (norm := getattr(attention, f"{name}_norm", None)) is not None}
    return Layer(
        index, attention, feed_forward, {name: projections[name] for name in PROJECTIONS if name in projections},
        head_dim, norms,
    )  # fmt: skip


def _attention_projections(index: int, attention: nn.Module, head_dim: int) -> dict[str, Projection]:
    if hasattr(attention, "query_key_value"):
        fused = _linear(index, attention, "query_key_value")
        by_head = torch.arange(fused.out_features, device="cpu").view(-1, 3, head_dim)
        rows = {name: by_head[:, part].flatten() for part, name in enumerate("qkv")}
        output = _linear(index, attention, "dense")
    elif hasattr(attention, "qkv_proj"):
        fused = _linear(index, attention, "qkv_proj")
        output = _linear(index, attention, "o_proj")
        num_queries = output.in_features
        sizes = [num_queries, *[(fused.out_features - num_queries) // 2] * 2]
        rows = dict(zip("qkv", torch.arange(fused.out_features, device="cpu").split(sizes), strict=True))
    else:
        return {name: Projection(name, _linear(index, attention, f"{name}_proj")) for name in ATTENTION_PROJECTIONS}
    return {name: Projection(name, fused, own_rows) for name, own_rows in rows.items()} | {"o": Projection("o", output)}


def _feed_forward_projections(index: int, feed_forward: nn.Module | None) -> dict[str, Projection]:
    if hasattr(feed_forward, "dense_h_to_4h"):
        names = {"up": "dense_h_to_4h", "down": "dense_4h_to_h"}
        return {name: Projection(name, _linear(index, feed_forward, linear)) for name, linear in names.items()}
    if hasattr(feed_forward, "gate_up_proj"):
        fused = _linear(index, feed_forward, "gate_up_proj")
        gate, up = torch.arange(fused.out_features, device="cpu").chunk(2)
        down = Projection("down", _linear(index, feed_forward, "down_proj"))
        return {"gate": Projection("gate", fused, gate), "up": Projection("up", fused, up), "down": down}
    return {name: Projection(name, _linear(index, feed_forward, f"{name}_proj")) for name in FEED_FORWARD_PROJECTIONS}


@torch.no_grad()
def _weight_read_through(linear: nn.Module) -> Tensor:
    """Computes the weight that a linear applies, (out, in), by applying it to unit vectors."""
    weight = linear.weight
    dtype = torch.float32 if is_quantised(weight) else weight.dtype
    # Biases are zeroed instead of subtracted from the output, where they would leave a rounding error.
    tensors = chain(linear.named_parameters(), linear.named_buffers())
    no_bias = {
        name: torch.zeros_like(it) for name, it in tensors if it is linear.bias or name.rpartition(".")[2] == "bias"
    }
    columns = [
        functional_call(linear, no_bias, F.one_hot(units, linear.in_features).to(dtype))
        for units in torch.arange(linear.in_features, device=weight.device).split(_UNIT_VECTORS_AT_ONCE)
    ]
    return torch.cat(columns).T


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is stored as packed integers, or as 8-bit floats that need scales."""
    return not weight.is_floating_point() or weight.element_size() < 2


def _dequantised(linear: nn.Linear) -> nn.Linear:
    plain = nn.utils.skip_init(nn.Linear, linear.in_features, linear.out_features, bias=linear.bias is not None)
    plain.weight = nn.Parameter(_weight_read_through(linear).float(), requires_grad=False)
    if linear.bias is not None:
        plain.bias = nn.Parameter(linear.bias.float(), requires_grad=False)
    return plain


def _linear(index: int, owner: nn.Module | None, name: str) -> "nn.Linear | BaseTunerLayer":
    linear = getattr(owner, name, None)
    if not isinstance(getattr(linear, "get_base_layer", lambda: linear)(), nn.Linear):
        raise _unsupported(f"layer {index} has no nn.Linear called {name} in its {type(owner).__name__}")
    return linear
