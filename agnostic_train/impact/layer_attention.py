"""The attention of one layer for a batch, and how far changes of its logits move its output."""

from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property

import torch
from torch import Tensor, nn

from agnostic_train.impact import kernel_trial, kernels
from agnostic_train.impact.angles import Angles
from agnostic_train.impact.attention import AttentionInputs, LogitChange, repeated
from agnostic_train.impact.attention_block import AttentionBlock, BlockForms, bits_moved, plain_block
from agnostic_train.impact.row_blocks import Block


class LayerAttention:
    """One layer's attention A for a batch; measures `||(A - A') v||^2` for changed attention A'.

    The squares are summed over counted tokens and features.

    Args:
        inputs: the inputs of the attention.
        counted: (batch, length), bool, the tokens whose change counts.
        chunk_bytes: memory limit for the (neuron, length, length) tensors of the neurons computed at once.
        capped: whether neurons change the logits before the soft cap, if there is one; if False, the capped logits.

    Attributes:
        logits, probabilities: the softmax's input and output, (batch * heads, length, length).
        value, output: (batch * heads, length, head_dim).
        counted: (batch * heads, length), floating point, 1 at counted tokens.
        softcap: the soft cap on changed logits; None without one.
    """

    def __init__(self, inputs: AttentionInputs, counted: Tensor, chunk_bytes: int, capped: bool = True):
        self.inputs = inputs
        self.softcap = inputs.softcap if capped else None
        self.batch, self.num_heads, self.length, self.head_dim = inputs.query.shape
        self.value = inputs.value.flatten(0, 1)
        self.logits = inputs.logits().flatten(0, 1)
        self.probabilities = self.logits.softmax(-1)
        self.output = self.probabilities @ self.value
        self.counted = counted.to(self.value.dtype).repeat_interleave(self.num_heads, 0)
        self._chunk_bytes = chunk_bytes

    def num_own_heads(self, name: str) -> int:
        """The number of heads of the projection `q` or `k` itself."""
        return self.num_heads if name == "q" else self.inputs.num_kv_heads

    def summed_over_heads(self, name: str, by_head: Tensor) -> Tensor:
        """Sums squared changes over the heads through which a neuron acts: a k neuron acts through its whole group.

        by_head: (batch * heads, head_dim, ...). Returns: (batch, neurons of `q` or `k`, ...).
        """
        by_group = by_head.unflatten(0, (self.batch, self.num_own_heads(name), -1))
        return (by_group.sum(2) if by_group.shape[2] > 1 else by_group.squeeze(2)).flatten(1, 2)

    @cached_property
    def centred_value(self) -> Tensor:
        """The values minus their mean: A' - A sums to zero over the keys, so it would add only rounding errors."""
        num_real = self.inputs.real.sum(-1).clamp(min=1).repeat_interleave(self.num_heads)[:, None, None]
        return self.value - self.value.sum(-2, keepdim=True) / num_real

    @property
    def blocks(self) -> list[Block]:
        """The query rows in blocks, each with the keys that its rows see."""
        return self.inputs.visibility.blocks

    def in_block(self, block: Block, grows: bool) -> BlockForms:
        """The attention of a block's rows to its keys, for all heads and changes in closed form; without a cap."""
        rows, keys = block.rows, block.keys
        logits, peaks = self.logits[:, rows, keys], self._peaks[:, rows]
        return BlockForms(logits, peaks, self.centred_value[:, keys], self.counted[:, rows], grows)

    def plainly_in_block(self, block: Block) -> AttentionBlock:
        """The same for any changes of `changed_logits`, whatever their form and size."""
        rows, keys = block.rows, block.keys
        logits, start = self.logits[:, rows, keys], self.changed_logits[:, rows, keys]
        return plain_block(logits, self.centred_value[:, keys], self.counted[:, rows], start)

    def bits_moved(self, change: LogitChange) -> Tensor:
        """An upper bound on how far each neuron moves a logit, in bits: (batch * heads, head_dim)."""
        return bits_moved(change, self.largest_logits.view(self.batch, self.num_heads)).flatten(0, 1)

    @cached_property
    def largest_logits(self) -> Tensor:
        """An upper bound on the absolute value of each head's products: (batch * heads,)."""
        query, key = (torch.linalg.vector_norm(it, dim=-1).amax(-1) for it in (self.inputs.query, self.inputs.key))
        return (query * key * abs(self.inputs.scaling)).flatten()

    @cached_property
    def longest_value(self) -> Tensor:
        """The largest norm of the real tokens' centred values in each head: (batch * heads, 1)."""
        real = self.inputs.real.repeat_interleave(self.num_heads, 0)
        return torch.linalg.vector_norm(self.centred_value, dim=-1).masked_fill(~real, 0).amax(-1, keepdim=True)

    @cached_property
    def _peaks(self) -> Tensor:
        return self.logits.amax(-1, keepdim=True)

    @cached_property
    def changed_logits(self) -> Tensor:
        """The logits that a neuron's deactivation changes: before the `softcap`, if any; -inf at unseen keys."""
        if self.softcap is None:
            return self.logits
        return self.inputs.products().masked_fill_(self.inputs.visibility.hidden, -torch.inf).flatten(0, 1)

    def on_kernels(self, change: LogitChange) -> bool:
        """Whether the kernels can compute `squared_changes`."""
        return kernel_trial.available(self.value, change.grows, self.softcap is not None)

    def squared_changes(self, change: LogitChange) -> Tensor:
        """Computes `||(A - A') v||^2` for every neuron of every query head: (batch, query heads, head_dim)."""
        if self.on_kernels(change):
            squares = kernels.squared_changes(
                self.changed_logits,
                self.centred_value,
                self.counted,
                [part.flatten(0, 1) for part in change.factors],
                self.inputs.visibility.key_spans,
                growths=[part.flatten(0, 1) for part in change.growths()],
                softcap=self.softcap,
            )
        elif self.softcap is None:
            squares = self._squared_changes(change.centred(self.inputs.real))
        else:
            squares = self._squared_changes_before_cap(change)
        return squares.view(self.batch, self.num_heads, self.head_dim)

    def _squared_changes(self, change: LogitChange) -> Tensor:
        """`squared_changes` without a cap, in closed form: (batch * heads, head_dim)."""
        bits, by_neuron = self.bits_moved(change), _by_neuron(change)
        result = torch.zeros_like(bits)
        for block in self.blocks:
            attention = self.in_block(block, change.grows)
            for heads, neurons in self._chunks(block.num_rows, block.num_keys):
                factors, growths = _factors_in_block(by_neuron, heads, neurons, block)
                result[heads, neurons] += attention.squares(heads, factors, growths, bits[heads, neurons])
        return without_noise(result, bits)

    def _squared_changes_before_cap(self, change: LogitChange) -> Tensor:
        """`squared_changes` of logits that are capped afterwards: (batch * heads, head_dim)."""
        bits, by_neuron = self.bits_moved(change), _by_neuron(change)
        hidden = self._hidden_by_head()
        result = torch.zeros_like(bits)
        for block in self.blocks:
            attention = self.plainly_in_block(block)
            for heads, neurons in self._chunks(block.num_rows, block.num_keys):
                some = attention.of_heads(heads)
                changed = some.changed(*_factors_in_block(by_neuron, heads, neurons, block))
                changed = self.inputs.finish(changed, hidden[heads, None, block.rows, block.keys])
                result[heads, neurons] += some.squares(changed)
        return without_noise(result, bits)

    def replayed(self, name: str, projected: Tensor, norm: nn.Module, angles: Angles) -> Tensor:
        """`squared_changes` for any norm: applies norm and rotation of `q` or `k` to its output without each neuron.

        Args:
            projected: the projection's output, (batch, length, neurons), padding zeroed.
            norm: a norm of each head.

        Returns: (batch, query heads, head_dim).
        """
        heads_of = self.inputs.per_query_head(projected).flatten(0, 1)
        query, key = self.inputs.query.flatten(0, 1), self.inputs.key.flatten(0, 1)
        hidden = self._hidden_by_head()
        attentions = [self.plainly_in_block(block) for block in self.blocks]
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
                changed = self.inputs.finish(products, hidden[heads, None, rows, keys])
                result[heads, neurons] += attention.of_heads(heads).squares(changed)
        return result.view(self.batch, self.num_heads, self.head_dim)

    def replayed_over_heads(
        self, name: str, projected: Tensor, norm: nn.Module, angles: Angles, marked: Tensor | None = None
    ) -> Tensor:
        """`replayed` for a norm over all heads: zeroing one entry rescales every head, so every head is recomputed.

        Args:
            projected: the projection's output, (batch, length, neurons), padding zeroed.
            marked: (batch, neurons), bool, which neurons to compute; all by default.

        Returns: (batch, neurons), the squares summed over the query heads; zero where not marked.
        """
        shape = self.inputs.query.shape
        probabilities, value = self.probabilities.view(*shape[:3], -1), self.centred_value.view(shape)
        counted = self.counted.view(shape[:3])
        result = projected.new_zeros(self.batch, projected.shape[-1])
        places = torch.ones_like(result, dtype=torch.bool) if marked is None else marked
        at_once = max(1, self._num_at_once(self.length, self.length) // self.num_heads)
        for sentences, neurons in zip(*(it.split(at_once) for it in places.nonzero().unbind(1)), strict=True):
            states = projected[sentences]
            states.scatter_(2, neurons[:, None, None].expand(-1, self.length, 1), 0)
            states = norm(states).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            states = angles.rotation.apply(states, angles.cos[sentences], angles.sin[sentences])
            states = repeated(states, self.num_heads // states.shape[1])
            left, right = (
                (states, self.inputs.key[sentences]) if name == "q" else (self.inputs.query[sentences], states)
            )
            products = (left @ right.mT).mul_(self.inputs.scaling)
            changed = self.inputs.finish(products, self.inputs.visibility.hidden[sentences])
            change = changed.softmax(-1).sub_(probabilities[sentences]) @ value[sentences]
            result[sentences, neurons] = (change.square_().sum(-1) * counted[sentences]).sum((1, 2))
        return result

    def _hidden_by_head(self) -> Tensor:
        return self.inputs.visibility.hidden.expand(-1, self.num_heads, -1, -1).flatten(0, 1)

    def _num_at_once(self, num_rows: int, num_keys: int) -> int:
        """How many neurons to compute at once: at the peak each has its change, logits, attention and two outputs.

        Changes in closed form need less.
        """
        bytes_per_neuron = num_rows * (3 * num_keys + 2 * self.head_dim) * self.value.element_size()
        return max(1, self._chunk_bytes // bytes_per_neuron)

    def _chunks(self, num_rows: int, num_keys: int) -> Iterator[tuple[slice, slice]]:
        """Yields slices over (batch * heads) and head_dim."""
        at_once = self._num_at_once(num_rows, num_keys)
        neurons_at_once, heads_at_once = min(self.head_dim, at_once), max(1, at_once // self.head_dim)
        for head in range(0, self.batch * self.num_heads, heads_at_once):
            for neuron in range(0, self.head_dim, neurons_at_once):
                yield slice(head, head + heads_at_once), slice(neuron, neuron + neurons_at_once)


def without_noise(squares: Tensor, bits: Tensor) -> Tensor:
    """Zeroes, in place, the squares of neurons that move no logit, unless they aren't finite.

    bits: `bits_moved`, shaped like the squares.
    """
    return squares.masked_fill_((bits == 0) & squares.isfinite(), 0)


def _by_neuron(change: LogitChange) -> LogitChange:
    """The same change with all parts transposed to (batch * heads, head_dim, length)."""
    parts = {field.name: getattr(change, field.name) for field in fields(change)}
    return LogitChange(
        **{name: part if part is None else part.flatten(0, 1).mT.contiguous() for name, part in parts.items()}
    )


def _factors_in_block(
    by_neuron: LogitChange, heads: slice, neurons: slice, block: Block
) -> tuple[list[Tensor], list[Tensor]]:
    """Factors and growths of some neurons in a block, shaped as `AttentionBlock.changed` takes them."""
    by_row, by_key = (heads, neurons, block.rows, None), (heads, neurons, None, block.keys)
    factors = [by_neuron.a[by_row], by_neuron.b[by_key], by_neuron.c[by_row], by_neuron.d[by_key]]
    growths = [] if by_neuron.row_growth is None else [by_neuron.row_growth[by_row]]
    growths += [] if by_neuron.column_growth is None else [by_neuron.column_growth[by_key]]
    return factors, growths
