"""The q and k impacts of one layer: which form of the arithmetic applies, and how much of it at a time."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import ceil

import torch
from torch import Tensor, nn

from agnostic_train.choices import Attention
from agnostic_train.impact import kernel_trial, norm_over_heads
from agnostic_train.impact.angles import Angles, SharedAngles
from agnostic_train.impact.attention import (
    AttentionInputs,
    LogitChange,
    key_impacts,
    paper_change,
    query_impacts,
    rotated_change,
)
from agnostic_train.impact.bound_sieve import BoundSieve
from agnostic_train.impact.interval_sieve import interval_impacts
from agnostic_train.impact.output_change import OutputChange
from agnostic_train.impact.pruning import Work
from agnostic_train.impact.rms_norm import LARGEST_GROWTH, growth_without, rms_eps
from agnostic_train.model.decoder import Layer

# Temporaries that stay in a CPU's cache are several times faster than the largest that memory allows. What is kept for a
# layer's sentences, if it is much, the allocator returns to the system, and gets again for the next layer, page by page.
_CPU_CHUNK_BYTES, _CPU_LAYER_BYTES = 12 << 20, 20 << 20
# If bounds leave more than this part of the logits to compute, all at once are faster; and less where a norm makes them
# grow, which costs more beside gathered neurons. They are tried again on sentences that are so much shorter.
_MOST_LEFT, _MOST_LEFT_GROWING, _SHORTER = 0.3, 0.2, 0.7


class QueryKeyImpacts:
    """Measures the q and k impacts of one layer, batch after batch.

    Args:
        names: `q` and `k`, or one of them.
        attention, memory_gb, top_ratio: as for `ImpactMeter`.
        angles: shared with the other layers.

    Attributes:
        work: by `q` and `k`, how much was computed so far.
        unprunable: whether some batch had to be computed in full although `top_ratio` asked for less.
    """

    def __init__(
        self,
        layer: Layer,
        names: Sequence[str],
        attention: Attention,
        memory_gb: float,
        top_ratio: float | None,
        angles: SharedAngles,
    ):
        self.layer = layer
        self.names = tuple(names)
        self.work = {"q": Work(), "k": Work()}
        self.unprunable = False
        self._exact = attention == "exact"
        self._half_bytes = int(memory_gb * 2**29)
        self._top_ratio = top_ratio
        self._angles = angles
        self._eps: dict[str, float | None] = {}
        self._fruitless_length: int | None = None

    def measure(
        self,
        inputs: AttentionInputs,
        counted: Tensor,
        projected: dict[str, Tensor],
        cos_sin: tuple[Tensor, Tensor],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Impacts and attention's output, a few sentences at a time.

        Args:
            counted: (batch, length), bool, the tokens whose change counts.
            projected: by name, the projection's output, (batch, length, neurons).
            cos_sin: the angles that the model passes to its attention.

        Returns: by name (batch, neurons), float32; and (batch, query heads, length, head_dim).
        """
        angles = self._angles.get(self.layer, cos_sin, len(counted), inputs.query.dtype)
        impacts: dict[str, list[Tensor]] = {name: [] for name in self.names}
        outputs = []
        at_once = self._sentences_at_once(inputs)
        for start in range(0, len(counted), at_once):
            part = slice(start, start + at_once)
            found, output = self._measure_part(
                inputs.sentences(part),
                counted[part],
                {name: projected[name][part] for name in self.names},
                angles.sentences(part),
            )
            for name, values in found.items():
                impacts[name].append(values)
            outputs.append(output)
        return {name: torch.cat(values) for name, values in impacts.items()}, torch.cat(outputs)

    def _sentences_at_once(self, inputs: AttentionInputs) -> int:
        """How many sentences' logits and changes of them fit into half the memory, or a CPU's share, in parts of one size.

        The other half is for chunks.
        """
        batch, num_heads, length, head_dim = inputs.query.shape
        # A norm over all heads takes some more products of the logits.
        spanning = any(self.layer.norm_spans_heads(name) for name in self.names if name in self.layer.norms)
        entries = num_heads * length * (14 * head_dim + (14 if spanning else 4) * length)
        fitting = self._limit(inputs, _CPU_LAYER_BYTES) // (entries * inputs.query.element_size())
        num_parts = ceil(batch / max(1, fitting))
        return ceil(batch / num_parts)

    def _limit(self, inputs: AttentionInputs, on_cpu: int) -> int:
        """Bytes of half the memory, on a CPU at most `on_cpu`."""
        return min(self._half_bytes, on_cpu) if inputs.query.device.type == "cpu" else self._half_bytes

    def _measure_part(
        self, inputs: AttentionInputs, counted: Tensor, projected: dict[str, Tensor], angles: Angles
    ) -> tuple[dict[str, Tensor], Tensor]:
        chunk_bytes = self._limit(inputs, _CPU_CHUNK_BYTES)
        projected = {name: inputs.clean_projection(output) for name, output in projected.items()}
        growths: dict[str, Tensor] = {}
        if self._exact:
            inputs, changes, growths = self._closed_forms(inputs, projected, angles)
        else:
            changes = dict.fromkeys(self.names, paper_change(inputs))
        change = OutputChange(inputs, counted, chunk_bytes, before_cap=self._exact)
        impacts: dict[str, Tensor] = {}
        if self._top_ratio is not None and change.softcap is None:
            for name, growth in growths.items():
                num_groups = self.layer.num_query_heads if name == "q" else self.layer.num_kv_heads
                replayed = partial(self._replayed_over_heads, change, name, projected[name], angles)
                impacts[name] = norm_over_heads.pruned_impacts(
                    name, change, changes[name], growth, num_groups, replayed, self._top_ratio, self.work[name]
                )
        rest = [name for name in self.names if name not in impacts]
        closed = {name: changes[name] for name in rest if name in changes and name not in growths}
        on_kernels = kernel_trial.available(change.value)
        # Both other ways of pruning need changes in closed form. Of a soft cap the bounds know nothing, and the intervals not
        # beside a norm.
        covered = len(closed) == len(rest)
        if change.softcap is not None:
            covered &= on_kernels and not any(it.grows for it in closed.values())
        top_ratio = self._top_ratio if covered and closed else None
        if top_ratio is not None and on_kernels:
            impacts |= interval_impacts(change, closed, self.layer.num_kv_heads, top_ratio, self.work)
        elif top_ratio is not None and not self._is_fruitless(change.length):
            impacts |= self._bounded_impacts(change, closed, top_ratio, chunk_bytes)
        else:
            self.unprunable |= self._top_ratio is not None and not covered
            for name in rest:
                impacts[name] = self._all_impacts(change, name, closed, projected[name], angles)
                # The kernels see to unseen keys by themselves, and where a norm spans all heads their rows are whole.
                whole = on_kernels if name in closed else self.layer.norm_spans_heads(name)
                num_logits = change.length**2 if whole else sum(block.num_logits for block in change.blocks)
                self.work[name].add_all(impacts[name].numel(), num_logits, change.length)
        return impacts, change.output.view_as(inputs.query)

    def _is_fruitless(self, length: int) -> bool:
        """Whether bounds have left too much to compute in sentences about as long."""
        return self._fruitless_length is not None and length > _SHORTER * self._fruitless_length

    def _bounded_impacts(
        self, change: OutputChange, closed: dict[str, LogitChange], top_ratio: float, chunk_bytes: int
    ) -> dict[str, Tensor]:
        """The impacts that bounds can't rule out, zero for the others."""
        work = {name: Work() for name in closed}
        sieve = BoundSieve(change, closed, self.layer.num_kv_heads, chunk_bytes, self._half_bytes)
        impacts = sieve.impacts(top_ratio, work)
        left = sum(int(it.logits) for it in work.values()) / sum(it.all_logits for it in work.values())
        grows = any(it.grows for it in closed.values())
        if left > (_MOST_LEFT_GROWING if grows else _MOST_LEFT):
            self._fruitless_length = change.length
        for name, done in work.items():
            self.work[name] += done
        return impacts

    def _closed_forms(
        self, inputs: AttentionInputs, projected: dict[str, Tensor], angles: Angles
    ) -> tuple[AttentionInputs, dict[str, LogitChange], dict[str, Tensor]]:
        """What each neuron makes of the logits, for the projections where that has a closed form.

        Args:
            projected: by name, (batch, length, neurons), padding zeroed.

        Returns:
            The inputs, with queries and keys that were normalised and rotated in at least float32: growth would multiply
            the difference between a half-precision model's rounding and what is taken from the logits here.
            The changes; where a norm spans all heads, of the logits of a neuron's own heads.
            For these norms, by what the other entries grow, float64, (batch, length, neurons).
        """
        parts: dict[str, tuple[Tensor, Tensor | None]] = {}
        growths: dict[str, Tensor] = {}
        largest: dict[str, Tensor] = {}
        for name, output in projected.items():
            norm, states, growth = self.layer.norms.get(name), output, None
            if norm is not None:
                spans_heads = self.layer.norm_spans_heads(name)
                entries = output if spans_heads else output.unflatten(-1, (-1, self.layer.head_dim))
                eps = self._eps_of(name, norm, entries)
                states = norm(entries).reshape(output.shape)
                rotated = angles.rotation.apply(inputs.per_query_head(states), angles.cos, angles.sin)
                inputs = replace(inputs, query=rotated) if name == "q" else replace(inputs, key=rotated)
                if eps is None:
                    continue
                if spans_heads:
                    growths[name] = growth_without(entries.double(), eps)
                    growth = growths[name].to(states.dtype)
                else:
                    growth = growth_without(entries, eps).flatten(2)
                    largest[name] = growth.max()
                growth = inputs.per_query_head(growth)
            parts[name] = inputs.per_query_head(states), growth
        if largest:
            # Read together, for a GPU is waited for.
            for name, value in zip(largest, torch.stack([*largest.values()]).tolist(), strict=True):
                if value > LARGEST_GROWTH:
                    del parts[name]
        changes = {
            name: rotated_change(inputs, name, states, angles, growth) for name, (states, growth) in parts.items()
        }
        return inputs, changes, growths

    def _eps_of(self, name: str, norm: nn.Module, entries: Tensor) -> float | None:
        if name not in self._eps:
            self._eps[name] = rms_eps(norm, entries.shape[-1], entries)
        return self._eps[name]

    def _all_impacts(
        self, change: OutputChange, name: str, closed: dict[str, LogitChange], projected: Tensor, angles: Angles
    ) -> Tensor:
        """The impacts of every neuron of q or k, (sentences, neurons), float32; without a closed form, replayed."""
        norm = self.layer.norms.get(name)
        if name in closed:
            squares = change.of_logits(closed[name])
        elif self.layer.norm_spans_heads(name):
            return self._replayed_over_heads(change, name, projected, angles).sqrt().float()
        else:
            squares = change.replayed(name, projected, norm, angles)
        return query_impacts(squares) if name == "q" else key_impacts(squares, self.layer.num_kv_heads)

    def _replayed_over_heads(
        self, change: OutputChange, name: str, projected: Tensor, angles: Angles, marked: Tensor | None = None
    ) -> Tensor:
        norm = self.layer.norms[name]
        return change.replayed_over_heads(name, projected, norm, angles, marked)
