"""Impact of attention neurons on the concatenated heads (q, k, v) and on the output projection's output (o).

The exact form equals real deactivation: a row of q or k changes the logits by a rank-two term, because rotation mixes
the row with its partner, and the change runs through the softmax. Eq. 10 and 11 of Chen et al. 2025 are the V form and
the Q/K form without rotation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from agnostic_train.decoder import Rotation
from agnostic_train.impact.feed_forward import column_norms

ATTENTION_MODES = ("exact", "paper")


@dataclass(frozen=True)
class AttentionInputs:
    """One layer's attention for a batch, as it is computed: after rotation, before the softmax.

    query: (batch, query heads, length, head_dim); key, value: (batch, KV heads, length, head_dim).
    visible: (batch, 1, length, length) bool, which keys a query sees. real: (batch, length) bool, False at padding.
    scaling: the factor on the logits.
    Padding is cleaned on entry: its content may be NaN and reaches nothing.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    real: Tensor
    scaling: float

    @classmethod
    def clean(
        cls, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, real: Tensor, scaling: float
    ) -> "AttentionInputs":
        """Casts to at least float32, repeats KV heads per query head, zeroes padding, lets padding see itself."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        padding = ~real[:, None, :, None]
        queries_per_kv = query.shape[1] // key.shape[1]
        query = query.to(dtype).masked_fill(padding, 0)
        key = key.to(dtype).masked_fill(padding, 0).repeat_interleave(queries_per_kv, 1)
        value = value.to(dtype).masked_fill(padding, 0).repeat_interleave(queries_per_kv, 1)
        itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
        return cls(query, key, value, visible | (itself & padding), real, scaling)

    def logits(self) -> Tensor:
        """(batch, query heads, length, length), -inf where a key isn't seen."""
        logits = self.query @ self.key.transpose(-1, -2) * self.scaling
        return logits.masked_fill(~self.visible, -torch.inf)


@dataclass(frozen=True)
class RankTwo:
    """What deactivating each neuron n takes from the logits: `x_ij = a_i[n] b_j[n] + c_i[n] d_j[n]`.

    All four: (batch, query heads, length, head_dim).
    """

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor


def value_impacts(heads: Tensor, counted: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """Impact of each row of v: the column norms of the heads' output, summed over the heads that read the row.

    Args:
        heads: concatenated heads, the input of `o_proj`, (batch, length, query heads * head_dim).
        counted: (batch, length), bool.

    Returns: (batch, KV heads * head_dim), float32.
    """
    norms = column_norms(heads, counted)
    return norms.view(len(norms), num_kv_heads, -1, head_dim).square().sum(2).sqrt().flatten(1)


def output_impacts(heads: Tensor, weight_norms: Tensor, counted: Tensor) -> Tensor:
    """Impact of each column of o: `||heads[:, k]|| * ||W_o[:, k]||`, (batch, query heads * head_dim), float32."""
    return column_norms(heads, counted) * weight_norms


def query_change(inputs: AttentionInputs, projected: Tensor, rotation: Rotation, cos: Tensor, sin: Tensor) -> RankTwo:
    """The logits' change for each q row: `s q_i[n] (R_i e_n) . k~_j`.

    projected: `q_proj`'s output, (batch, length, query heads * head_dim); cos, sin: (batch, length, rotary_dim).
    """
    own, other = _coefficients(inputs, rotation, cos, sin)
    projected = _heads(inputs, projected) * inputs.scaling
    return RankTwo(projected * own, inputs.key, projected * other, inputs.key[..., rotation.partner])


def key_change(inputs: AttentionInputs, projected: Tensor, rotation: Rotation, cos: Tensor, sin: Tensor) -> RankTwo:
    """The logits' change for each k row, per query head that reads it: `s k_j[n] (R_j e_n) . q~_i`.

    projected: `k_proj`'s output, (batch, length, KV heads * head_dim); cos, sin: (batch, length, rotary_dim).
    """
    own, other = _coefficients(inputs, rotation, cos, sin)
    projected = _heads(inputs, projected) * inputs.scaling
    return RankTwo(inputs.query, projected * own, inputs.query[..., rotation.partner], projected * other)


def paper_change(inputs: AttentionInputs) -> RankTwo:
    """Eq. 11 on the rotated queries and keys: `s q~_i[n] k~_j[n]`, the same for q and k."""
    query = inputs.query * inputs.scaling
    return RankTwo(query, inputs.key, torch.zeros_like(query), inputs.key)


def squared_output_change(inputs: AttentionInputs, change: RankTwo, counted: Tensor, chunk_bytes: int) -> Tensor:
    """`||(A - softmax(S - x)) v||^2` over counted tokens and features, for every neuron of every query head.

    The (neuron, length, length) tensor is made for as many neurons at a time as `chunk_bytes` allows, never whole.

    Returns: (batch, query heads, head_dim), the dtype of `inputs`.
    """
    batch, num_heads, length, head_dim = inputs.query.shape
    logits = inputs.logits().flatten(0, 1)
    value = inputs.value.flatten(0, 1)
    output = logits.softmax(-1) @ value
    weight = counted.to(value.dtype).repeat_interleave(num_heads, 0)  # (batch * heads, length)
    # (batch * heads, head_dim, length, 2) and (.., 2, length): their product is x.
    left = torch.stack([change.a, change.c], -1).flatten(0, 1).transpose(1, 2)
    right = torch.stack([change.b, change.d], -1).flatten(0, 1).permute(0, 2, 3, 1)

    bytes_per_neuron = 2 * length * (length + value.shape[-1]) * value.element_size()
    num_at_once = max(1, chunk_bytes // bytes_per_neuron)
    neurons_at_once = min(head_dim, num_at_once)
    heads_at_once = max(1, num_at_once // head_dim)
    result = value.new_empty(batch * num_heads, head_dim)
    for head in range(0, batch * num_heads, heads_at_once):
        heads = slice(head, head + heads_at_once)
        for neuron in range(0, head_dim, neurons_at_once):
            neurons = slice(neuron, neuron + neurons_at_once)
            changed = logits[heads, None] - left[heads, neurons] @ right[heads, neurons]
            changed = changed.softmax(-1) @ value[heads, None]
            changed -= output[heads, None]
            result[heads, neurons] = (changed.square_().sum(-1) * weight[heads, None]).sum(-1)
    return result.view(batch, num_heads, head_dim)


def query_impacts(squares: Tensor) -> Tensor:
    """From squared changes (batch, query heads, head_dim) to impacts (batch, q rows), float32."""
    return squares.sqrt().flatten(1).float()


def key_impacts(squares: Tensor, num_kv_heads: int) -> Tensor:
    """A k row acts through every query head of its group: (batch, query heads, head_dim) to (batch, k rows)."""
    batch, _, head_dim = squares.shape
    return squares.view(batch, num_kv_heads, -1, head_dim).sum(2).sqrt().flatten(1).float()


def _heads(inputs: AttentionInputs, projected: Tensor) -> Tensor:
    """(batch, length, heads * head_dim) to (batch, query heads, length, head_dim), padding zeroed."""
    batch, num_heads, length, head_dim = inputs.query.shape
    heads = projected.view(batch, length, -1, head_dim).transpose(1, 2).to(inputs.query.dtype)
    heads = heads.repeat_interleave(num_heads // heads.shape[1], 1)
    return heads.masked_fill(~inputs.real[:, None, :, None], 0)


def _coefficients(inputs: AttentionInputs, rotation: Rotation, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    dtype = inputs.query.dtype
    own, other = rotation.coefficients(cos.to(dtype), sin.to(dtype))
    return own.unsqueeze(1), other.unsqueeze(1)
