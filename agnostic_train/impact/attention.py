"""Impact of attention neurons (q, k, v) on the concatenated heads.

The exact form equals real deactivation: a row of q or k changes the logits by a rank-two term, because rotation mixes
the row with its partner, and the change runs through the softmax. Eq. 10 and 11 of Chen et al. 2025 are the V form and
the Q/K form without rotation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from agnostic_train.impact import kernel_trial, kernels
from agnostic_train.impact.angles import Angles
from agnostic_train.impact.row_blocks import Block, row_blocks


@dataclass(frozen=True)
class AttentionInputs:
    """One layer's attention for a batch, as it is computed: after rotation, before the softmax.

    query: (batch, query heads, length, head_dim); key, value: (batch, KV heads, length, head_dim).
    visible: (batch, 1, length, length) bool, which keys a query sees. real: (batch, length) bool, False at padding.
    scaling: the factor on the logits. softcap: their soft bound, None without one.
    Padding is cleaned on entry: its content may be NaN and reaches nothing.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    real: Tensor
    scaling: float
    softcap: float | None = None

    @classmethod
    def clean(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor,
        real: Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> "AttentionInputs":
        """Casts to at least float32, repeats KV heads per query head, zeroes padding, lets padding see itself."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        padding = ~real[:, None, :, None]
        queries_per_kv = query.shape[1] // key.shape[1]
        query = query.to(dtype).masked_fill(padding, 0)
        key, value = (_repeated(heads.to(dtype).masked_fill(padding, 0), queries_per_kv) for heads in (key, value))
        itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
        return cls(query, key, value, visible | (itself & padding), real, scaling, softcap)

    def sentences(self, part: slice) -> "AttentionInputs":
        """The same for some sentences of the batch."""
        return replace(
            self,
            query=self.query[part],
            key=self.key[part],
            value=self.value[part],
            visible=self.visible[part],
            real=self.real[part],
        )

    def products(self) -> Tensor:
        """`s q~ k~^T`, before cap and mask: (batch, query heads, length, length)."""
        return (self.query * self.scaling) @ self.key.transpose(-1, -2)

    def logits(self) -> Tensor:
        """What the softmax sees: capped, and -inf where a key isn't seen."""
        return self.finish(self.products(), self.visible)

    def output(self) -> Tensor:
        """What attention makes of the values: (batch, query heads, length, head_dim)."""
        return self.logits().softmax(-1) @ self.value

    def finish(self, products: Tensor, visible: Tensor) -> Tensor:
        """Caps and masks products, in place where that is possible."""
        if self.softcap is not None:
            products = products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products.masked_fill_(~visible, -torch.inf)

    def clean_projection(self, projected: Tensor) -> Tensor:
        """A projection's output, (batch, length, heads * head_dim), in the queries' dtype, padding zeroed."""
        return projected.to(self.query.dtype).masked_fill(~self.real.unsqueeze(-1), 0)

    def per_query_head(self, projected: Tensor) -> Tensor:
        """From (batch, length, heads * head_dim) to (batch, query heads, length, head_dim)."""
        heads = projected.unflatten(-1, (-1, self.query.shape[-1])).transpose(1, 2)
        return _repeated(heads, self.query.shape[1] // heads.shape[1])


def _repeated(heads: Tensor, times: int) -> Tensor:
    """Each KV head once for each of its query heads."""
    return heads.repeat_interleave(times, 1) if times > 1 else heads


@dataclass(frozen=True)
class LogitChange:
    """What deactivating each neuron n makes of the logits: `S_ij r_i[n] s_j[n] - a_i[n] b_j[n] - c_i[n] d_j[n]`.

    All: (batch, query heads, length, head_dim), a, c and r by query, b, d and s by key. r and s (`row_growth` and
    `column_growth`) are at least 1, and None where no norm makes anything grow.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    row_growth: Tensor | None = None
    column_growth: Tensor | None = None

    @property
    def grows(self) -> bool:
        return self.row_growth is not None or self.column_growth is not None

    def growths(self) -> list[Tensor]:
        """r and s, ones for the one that there isn't; nothing where nothing grows."""
        both = (self.row_growth, self.column_growth)
        return [torch.ones_like(self.a) if it is None else it for it in both] if self.grows else []


def value_impacts(norms: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """Impact of each row of v: the column norms of the heads' output, summed over the heads that read the row.

    Args:
        norms: `column_norms` of the concatenated heads, the input of `o_proj`, (batch, query heads * head_dim).

    Returns: (batch, KV heads * head_dim), float32.
    """
    return norms.view(len(norms), num_kv_heads, -1, head_dim).square().sum(2).sqrt().flatten(1)


def rotated_change(
    inputs: AttentionInputs,
    name: str,
    states: Tensor,
    angles: Angles,
    growth: Tensor | None = None,
) -> LogitChange:
    """The logits' change for each row of `q`, less `s q_i[n] (R_i e_n) . k~_j`, or of `k`, less `s k_j[n] (R_j e_n) . q~_i`.

    states: what the rotation makes q~ or k~ of, per query head, padding zeroed, (batch, query heads, length, head_dim).
    growth: by what the other entries grow, see `rms_norm`.
    """
    if growth is not None:
        states = states * growth
    own, other = (states * (part * inputs.scaling).unsqueeze(1) for part in (angles.own, angles.other))
    partner = angles.rotation.partner
    if name == "q":
        return LogitChange(own, inputs.key, other, inputs.key[..., partner], row_growth=growth)
    return LogitChange(inputs.query, own, inputs.query[..., partner], other, column_growth=growth)


def paper_change(inputs: AttentionInputs) -> LogitChange:
    """Eq. 11 on the rotated queries and keys: `s q~_i[n] k~_j[n]`, the same for q and k."""
    query = inputs.query * inputs.scaling
    return LogitChange(query, inputs.key, torch.zeros_like(query), inputs.key)


class OutputChange:
    """Measures `||(A - A') v||^2` over counted tokens and features, for changed attention A'.

    logits, attention: (batch * heads, length, length); value, centred_value, output: (batch * heads, length, head_dim);
    weight: (batch * heads, length), 1 at counted tokens. Neurons are taken so many at a time that the (neuron, length,
    length) tensor stays within `chunk_bytes`. softcap: bends the logits after they are changed; None where nothing does,
    or where, not `before_cap`, changes are those of capped logits.
    """

    def __init__(self, inputs: AttentionInputs, counted: Tensor, chunk_bytes: int, before_cap: bool = True):
        self.inputs = inputs
        self.softcap = inputs.softcap if before_cap else None
        self.batch, self.num_heads, self.length, self.head_dim = inputs.query.shape
        self.value = inputs.value.flatten(0, 1)
        self.logits = inputs.logits().flatten(0, 1)
        self.attention = self.logits.softmax(-1)
        self.output = self.attention @ self.value
        # Changed attention less attention sums to zero: what all values share has no part in it but its rounding.
        num_real = inputs.real.sum(-1).clamp(min=1).repeat_interleave(self.num_heads)[:, None, None]
        self.centred_value = self.value - self.value.sum(-2, keepdim=True) / num_real
        self.weight = counted.to(self.value.dtype).repeat_interleave(self.num_heads, 0)
        self._chunk_bytes = chunk_bytes

    @cached_property
    def blocks(self) -> list[Block]:
        """The rows in blocks, with the keys that these see."""
        return row_blocks(self.inputs.visible)

    def attention_in(self, block: Block) -> Tensor:
        """Of a block's rows to its keys: (batch * heads, rows, keys).

        Summed over these keys as a changed one is: a neuron that changes no logit has an impact of exactly zero.
        """
        return self.logits[:, block.rows, block.keys].softmax(-1)

    @cached_property
    def key_spans(self) -> Tensor:
        """Which keys each block of rows sees, for the kernels: (batch, blocks, 2), int32."""
        return kernels.key_spans(self.inputs.visible)

    @property
    def largest_logits(self) -> Tensor:
        """At least the largest absolute value of each head's products: (batch * heads,)."""
        query, key = (torch.linalg.vector_norm(it, dim=-1).amax(-1) for it in (self.inputs.query, self.inputs.key))
        return (query * key * abs(self.inputs.scaling)).flatten()

    @cached_property
    def longest_value(self) -> Tensor:
        """Of the real tokens' centred values, the largest norm by head: (batch * heads, 1)."""
        real = self.inputs.real.repeat_interleave(self.num_heads, 0)
        return torch.linalg.vector_norm(self.centred_value, dim=-1).masked_fill(~real, 0).amax(-1, keepdim=True)

    @cached_property
    def changed_logits(self) -> Tensor:
        """What a neuron's deactivation changes: the logits, before the `softcap` if there is one; -inf at unseen keys."""
        if self.softcap is None:
            return self.logits
        return self.inputs.products().masked_fill_(~self.inputs.visible, -torch.inf).flatten(0, 1)

    def of_logits(self, change: LogitChange) -> Tensor:
        """For every neuron of every query head: (batch, query heads, head_dim)."""
        start = self.changed_logits
        a, b, c, d = (_by_neuron(part) for part in (change.a, change.b, change.c, change.d))
        if kernel_trial.available(self.value):
            factors = [part.flatten(0, 1) for part in (a, b, c, d)]
            growths = [_by_neuron(part).flatten(0, 1) for part in change.growths()]
            squares = kernels.squared_changes(
                start, self.centred_value, self.weight, factors, self.key_spans, growths=growths, softcap=self.softcap
            )
            return squares.view(self.batch, self.num_heads, self.head_dim)
        row_growth, column_growth = (
            None if growth is None else _by_neuron(growth) for growth in (change.row_growth, change.column_growth)
        )
        visible = self._visible_by_head()
        result = start.new_zeros(len(start), self.head_dim)
        for block in self.blocks:
            rows, keys, attention = block.rows, block.keys, self.attention_in(block)
            for heads, neurons in self._chunks(block.num_rows, block.num_keys):
                left_a, left_c = a[heads, neurons, rows, None], c[heads, neurons, rows, None]
                right_b, right_d = b[heads, neurons, None, keys], d[heads, neurons, None, keys]
                changed = start[heads, None, rows, keys]
                if row_growth is not None:
                    changed = changed * row_growth[heads, neurons, rows, None]
                if column_growth is not None:
                    changed = changed * column_growth[heads, neurons, None, keys]
                changed = torch.addcmul(changed, left_a, right_b, value=-1)
                changed.addcmul_(left_c, right_d, value=-1)
                if self.softcap is not None:
                    changed = self.inputs.finish(changed, visible[heads, None, rows, keys])
                result[heads, neurons] += self._squares(heads, block, changed, attention)
        return result.view(self.batch, self.num_heads, self.head_dim)

    def replayed(self, name: str, projected: Tensor, norm: nn.Module, angles: Angles) -> Tensor:
        """With the norm and rotation of `q` or `k` done anew on a projection output without the neuron, whatever the norm.

        projected: (batch, length, neurons), padding zeroed. Returns: (batch, query heads, head_dim).
        """
        heads_of = self.inputs.per_query_head(projected).flatten(0, 1)
        query, key = self.inputs.query.flatten(0, 1), self.inputs.key.flatten(0, 1)
        visible = self._visible_by_head()
        attentions = [self.attention_in(block) for block in self.blocks]
        result = query.new_zeros(len(query), self.head_dim)
        for heads, neurons in self._chunks(self.length, self.length):
            kept = 1 - torch.eye(self.head_dim, device=query.device, dtype=query.dtype)[neurons]
            states = norm(heads_of[heads, None] * kept[None, :, None, :])
            sentence = torch.arange(len(query), device=query.device)[heads] // self.num_heads
            states = angles.rotation.apply(states, angles.cos[sentence], angles.sin[sentence])
            left, right = (states, key[heads, None]) if name == "q" else (query[heads, None], states)
            for block, attention in zip(self.blocks, attentions, strict=True):
                rows, keys = block.rows, block.keys
                products = (left[:, :, rows] @ right[:, :, keys].mT).mul_(self.inputs.scaling)
                changed = self.inputs.finish(products, visible[heads, None, rows, keys])
                result[heads, neurons] += self._squares(heads, block, changed, attention)
        return result.view(self.batch, self.num_heads, self.head_dim)

    def replayed_over_heads(
        self, name: str, projected: Tensor, norm: nn.Module, angles: Angles, marked: Tensor | None = None
    ) -> Tensor:
        """As `replayed`, for a norm over all heads: zeroing one entry rescales every head, so every head is done anew.

        Args:
            projected: (batch, length, neurons), padding zeroed.
            marked: (batch, neurons), bool, which to compute; all by default.

        Returns: (batch, neurons), the squares summed over the query heads; zero where not marked.
        """
        shape = self.inputs.query.shape
        attention, value = self.attention.view(*shape[:3], -1), self.centred_value.view(shape)
        weight = self.weight.view(shape[:3])
        result = projected.new_zeros(self.batch, projected.shape[-1])
        places = torch.ones_like(result, dtype=torch.bool) if marked is None else marked
        at_once = max(1, self._num_at_once(self.length, self.length) // self.num_heads)
        for sentences, neurons in zip(*(it.split(at_once) for it in places.nonzero().unbind(1)), strict=True):
            states = projected[sentences]
            states.scatter_(2, neurons[:, None, None].expand(-1, self.length, 1), 0)
            states = norm(states).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            states = angles.rotation.apply(states, angles.cos[sentences], angles.sin[sentences])
            states = _repeated(states, self.num_heads // states.shape[1])
            left, right = (
                (states, self.inputs.key[sentences]) if name == "q" else (self.inputs.query[sentences], states)
            )
            products = (left @ right.mT).mul_(self.inputs.scaling)
            changed = self.inputs.finish(products, self.inputs.visible[sentences])
            change = changed.softmax(-1).sub_(attention[sentences]) @ value[sentences]
            result[sentences, neurons] = (change.square_().sum(-1) * weight[sentences]).sum((1, 2))
        return result

    def _visible_by_head(self) -> Tensor:
        return self.inputs.visible.expand(-1, self.num_heads, -1, -1).flatten(0, 1)

    def _num_at_once(self, num_rows: int, num_keys: int) -> int:
        """Neurons: at the peak each has its change, its logits and its attention, and two outputs."""
        bytes_per_neuron = num_rows * (3 * num_keys + 2 * self.head_dim) * self.value.element_size()
        return max(1, self._chunk_bytes // bytes_per_neuron)

    def _chunks(self, num_rows: int, num_keys: int) -> Iterator[tuple[slice, slice]]:
        """Slices over (batch * heads) and head_dim."""
        at_once = self._num_at_once(num_rows, num_keys)
        neurons_at_once, heads_at_once = min(self.head_dim, at_once), max(1, at_once // self.head_dim)
        for head in range(0, self.batch * self.num_heads, heads_at_once):
            for neuron in range(0, self.head_dim, neurons_at_once):
                yield slice(head, head + heads_at_once), slice(neuron, neuron + neurons_at_once)

    def _squares(self, heads: slice, block: Block, logits: Tensor, attention: Tensor) -> Tensor:
        """Some heads' `squared_output_change` over a block's rows; attention: of all heads, in the block."""
        value, weight = self.centred_value[heads, block.keys], self.weight[heads, block.rows]
        return squared_output_change(logits, attention[heads], value, weight)


def squared_output_change(logits: Tensor, attention: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """What changed logits make of the output, squared and summed over features and counted rows.

    Args:
        logits: (heads, neurons, rows, keys), changed. attention: unchanged, (heads, rows, keys). value: (heads, keys,
            head_dim). weight: (heads, rows), 1 at counted rows.

    Returns: (heads, neurons).
    """
    change = logits.softmax(-1).sub_(attention.unsqueeze(1))
    # One product a head is faster than one a neuron.
    moved = torch.linalg.vector_norm(change.flatten(1, 2) @ value, dim=-1).square_()
    return moved.view(change.shape[:3]).mul_(weight.unsqueeze(1)).sum(-1)


def _by_neuron(part: Tensor) -> Tensor:
    """(batch, heads, length, head_dim) to (batch * heads, head_dim, length)."""
    return part.flatten(0, 1).mT.contiguous()


def query_impacts(squares: Tensor) -> Tensor:
    """From squared changes (batch, query heads, head_dim) to impacts (batch, q rows), float32."""
    return squares.sqrt().flatten(1).float()


def key_impacts(squares: Tensor, num_kv_heads: int) -> Tensor:
    """A k row acts through every query head of its group: (batch, query heads, head_dim) to (batch, k rows)."""
    batch, _, head_dim = squares.shape
    return squares.view(batch, num_kv_heads, -1, head_dim).sum(2).sqrt().flatten(1).float()
