"""The q and k impacts of one layer: which form of the computation applies, and how much of it runs at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import torch
from torch import Tensor, nn

from agnostic_train.choices import Attention
from agnostic_train.impact import norm_over_heads
from agnostic_train.impact.angles import Angles
from agnostic_train.impact.attention import (
    AttentionInputs,
    LogitChange,
    paper_change,
    rotated_change,
)
from agnostic_train.impact.bound_sieve import BoundSieve
from agnostic_train.impact.interval_sieve import interval_impacts
from agnostic_train.impact.layer_attention import LayerAttention
from agnostic_train.impact.pass_cache import PassCache
from agnostic_train.impact.pruning import Work
from agnostic_train.impact.rms_norm import MAX_GROWTH, growth_without, rms_eps
from agnostic_train.model.decoder import Layer

# Temporaries that fit into a CPU's cache are several times faster than the largest that memory allows. If a layer's
# sentences take much memory, the allocator returns it to the system and gets it again page by page for the next layer.
_CPU_CHUNK_BYTES, _CPU_LAYER_BYTES = 12 << 20, 20 << 20
# If bounds leave more than `_MAX_LEFT` of the logits, computing all neurons is faster. If a norm makes logits grow,
# the limit is `_MAX_LEFT_GROWING`, because growth costs more for gathered neurons. Bounds are tried again on sentences
# that are shorter by the factor `_SHORTER`.
_MAX_LEFT, _MAX_LEFT_GROWING, _SHORTER = 0.3, 0.2, 0.7


class QueryKeyImpacts:
    """Measures the q and k impacts of one layer, batch after batch.

    Args:
        names: `q` and `k`, or one of them.
        attention, memory_gb, top_ratio: as for `ImpactMeter`.
        cache: shared by all layers.

    Attributes:
        work: by `q` and `k`, how much has been computed so far.
        unprunable: whether `top_ratio` asked for pruning but some batch needed a form that pruning doesn't cover.
    """

    def __init__(
        self,
        layer: Layer,
        names: Sequence[str],
        attention: Attention,
        memory_gb: float,
        top_ratio: float | None,
        cache: PassCache,
    ):
        self.layer = layer
        self.names = tuple(names)
        self.work = {"q": Work(), "k": Work()}
        self.unprunable = False
        self._exact = attention == "exact"
        self._half_bytes = int(memory_gb * 2**29)
        self._top_ratio = top_ratio
        self._cache = cache
        self._eps: dict[str, float | None] = {}
        self._fruitless_length: int | None = None
        self._rotates: bool | None = None  # not known yet

    def measure(
        self,
        inputs: AttentionInputs,
        counted: Tensor,
        projected: dict[str, Tensor],
        cos_sin: tuple[Tensor, Tensor],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Computes the impacts and the attention's output, a few sentences at a time.

        Args:
            counted: (batch, length), bool, the tokens whose change counts.
            projected: by name, the projection's output, (batch, length, neurons).
            cos_sin: the angles that the model passes to its attention.

        Returns: the impacts by name, (batch, neurons), float32; the output, (batch, query heads, length, head_dim).
        """
        angles = self._cache.angles(self.layer, cos_sin, len(counted), inputs.query.dtype)
        projected = {name: projected[name] for name in self.names}
        if self._exact and not self._is_rotated(inputs, projected, angles):
            angles = angles.unrotated
        at_once = self._sentences_at_once(inputs)
        if at_once == len(counted):
            return self._measure_part(inputs, counted, projected, angles)
        impacts: dict[str, list[Tensor]] = {name: [] for name in self.names}
        outputs = []
        for start in range(0, len(counted), at_once):
            part = slice(start, start + at_once)
            found, output = self._measure_part(
                inputs.sentences(part),
                counted[part],
                {name: output[part] for name, output in projected.items()},
                angles.sentences(part),
            )
            for name, values in found.items():
                impacts[name].append(values)
            outputs.append(output)
        return {name: torch.cat(values) for name, values in impacts.items()}, torch.cat(outputs)

    def _is_rotated(self, inputs: AttentionInputs, projected: dict[str, Tensor], angles: Angles) -> bool:
        """Whether this layer rotates queries and keys, which every few layers of some families (SmolLM3) don't.

        No module says so, but what attention received does. Compared once, which synchronises with the device.
        """
        if self._rotates is None:
            if not angles.sin.any():
                return True  # at position 0 both are the same, so the next batch decides
            name = self.names[0]
            output = inputs.clean_projection(projected[name])
            if (norm := self.layer.norms.get(name)) is not None:
                whole = self.layer.norm_spans_heads(name)
                output = norm(output if whole else output.unflatten(-1, (-1, self.layer.head_dim))).view_as(output)
            plain, received = inputs.per_query_head(output), inputs.query if name == "q" else inputs.key
            rotated = angles.rotation.apply(plain, angles.cos, angles.sin)
            self._rotates = not (plain - received).norm() < (rotated - received).norm()
        return self._rotates

    def _sentences_at_once(self, inputs: AttentionInputs) -> int:
        """How many sentences to measure at once: the batch is split evenly into parts that fit into half the memory.

        On a CPU, into `_CPU_LAYER_BYTES` if that is less. The other half is for the chunks of changed logits.
        """
        batch, num_heads, length, head_dim = inputs.query.shape
        # A norm over all heads needs more tensors of the logits' size.
        spanning = any(self.layer.norm_spans_heads(name) for name in self.names if name in self.layer.norms)
        entries = num_heads * length * (14 * head_dim + (14 if spanning else 4) * length)
        fitting = self._limit(inputs, _CPU_LAYER_BYTES) // (entries * inputs.query.element_size())
        num_parts = ceil(batch / max(1, fitting))
        return ceil(batch / num_parts)

    def _limit(self, inputs: AttentionInputs, on_cpu: int) -> int:
        """Half the memory in bytes; on a CPU at most `on_cpu`."""
        return min(self._half_bytes, on_cpu) if inputs.query.device.type == "cpu" else self._half_bytes

    def _measure_part(
        self, inputs: AttentionInputs, counted: Tensor, projected: dict[str, Tensor], angles: Angles
    ) -> tuple[dict[str, Tensor], Tensor]:
        projected = {name: inputs.clean_projection(output) for name, output in projected.items()}
        if self._exact:
            inputs, forms = self._forms(inputs, projected, angles)
        else:
            forms = dict.fromkeys(self.names, _Form(paper_change(inputs)))
        attention = LayerAttention(inputs, counted, self._limit(inputs, _CPU_CHUNK_BYTES), capped=self._exact)
        found: dict[str, tuple[Tensor, Work]] = {}
        if self._top_ratio is not None and attention.softcap is None:
            for name, form in forms.items():
                if form.growth is not None:
                    found[name] = self._pruned_over_heads(attention, name, form, projected[name], angles)
        rest = {name: form for name, form in forms.items() if name not in found}
        if rest and self._top_ratio is not None and (closed := self._prunable(attention, rest)):
            if all(map(attention.on_kernels, closed.values())):
                found |= interval_impacts(attention, closed, self._top_ratio)
            else:
                found |= self._bounded_impacts(attention, closed, self._top_ratio)
        else:
            for name, form in rest.items():
                found[name] = self._all_impacts(attention, name, form, projected[name], angles)
        for name, (_, done) in found.items():
            self.work[name] += done
        return {name: impacts for name, (impacts, _) in found.items()}, attention.output.view_as(inputs.query)

    def _prunable(self, attention: LayerAttention, forms: dict[str, "_Form"]) -> dict[str, LogitChange] | None:
        """Returns the forms' changes if pruning covers all of them and is worthwhile; else None."""
        closed = {name: form.of_all_heads for name, form in forms.items() if form.of_all_heads is not None}
        on_kernels = all(map(attention.on_kernels, closed.values()))
        covered = len(closed) == len(forms)
        if attention.softcap is not None:
            # The bounds don't handle a soft cap, and the intervals don't handle one together with a norm.
            covered &= on_kernels and not any(change.grows for change in closed.values())
        if not covered:
            self.unprunable = True
            return None
        return closed if on_kernels or not self._is_fruitless(attention.length) else None

    def _is_fruitless(self, length: int) -> bool:
        """Whether bounds have already been found to leave too much to compute in sentences of this length."""
        return self._fruitless_length is not None and length > _SHORTER * self._fruitless_length

    def _bounded_impacts(
        self, attention: LayerAttention, closed: dict[str, LogitChange], top_ratio: float
    ) -> dict[str, tuple[Tensor, Work]]:
        """Impacts of the neurons that bounds can't rule out, zero for the others."""
        chunk_bytes = self._limit(attention.inputs, _CPU_CHUNK_BYTES)
        sieve = BoundSieve(attention, closed, chunk_bytes, self._limit(attention.inputs, _CPU_LAYER_BYTES))
        found = sieve.impacts(top_ratio)
        total = sum((done for _, done in found.values()), Work())
        grows = any(change.grows for change in closed.values())
        if total.logits > (_MAX_LEFT_GROWING if grows else _MAX_LEFT) * total.all_logits:
            self._fruitless_length = attention.length
        return found

    def _forms(
        self, inputs: AttentionInputs, projected: dict[str, Tensor], angles: Angles
    ) -> tuple[AttentionInputs, dict[str, "_Form"]]:
        """Determines how the neurons of each projection change the logits.

        Args:
            projected: by name, (batch, length, neurons), padding zeroed.

        Returns: the inputs and the forms. Queries and keys that pass a norm are normalised and rotated anew in at least
            float32: growth would otherwise multiply the difference between a half-precision model's rounding and the
            part that is subtracted from the logits here.
        """
        states: dict[str, Tensor] = {}
        growths: dict[str, Tensor] = {}
        over_heads: dict[str, Tensor] = {}
        largest: dict[str, Tensor] = {}
        for name, output in projected.items():
            norm, states[name] = self.layer.norms.get(name), output
            if norm is None:
                continue
            spans_heads = self.layer.norm_spans_heads(name)
            entries = output if spans_heads else output.unflatten(-1, (-1, self.layer.head_dim))
            eps = self._eps_of(name, norm, entries)
            normalised = norm(entries).reshape(output.shape)
            rotated = angles.rotation.apply(inputs.per_query_head(normalised), angles.cos, angles.sin)
            inputs = replace(inputs, query=rotated) if name == "q" else replace(inputs, key=rotated)
            if eps is None:
                del states[name]
                continue
            states[name] = normalised
            if spans_heads:
                growths[name] = over_heads[name] = growth_without(entries.double(), eps)
            else:
                growths[name] = growth_without(entries, eps).flatten(2)
                largest[name] = growths[name].max()
        if largest:
            # One transfer: each `.tolist()` synchronises with the GPU.
            for name, value in zip(largest, torch.stack([*largest.values()]).tolist(), strict=True):
                if value > MAX_GROWTH:
                    del states[name]
        forms = dict.fromkeys(projected, _Form(None))
        for name, output in states.items():
            growth = growths.get(name)
            by_head = None if growth is None else inputs.per_query_head(growth.to(output.dtype))
            change = rotated_change(inputs, name, inputs.per_query_head(output), angles, by_head)
            forms[name] = _Form(change, over_heads.get(name))
        return inputs, forms

    def _eps_of(self, name: str, norm: nn.Module, entries: Tensor) -> float | None:
        if name not in self._eps:
            self._eps[name] = rms_eps(norm, entries.shape[-1], entries)
        return self._eps[name]

    def _all_impacts(
        self, attention: LayerAttention, name: str, form: "_Form", projected: Tensor, angles: Angles
    ) -> tuple[Tensor, Work]:
        """Impacts of every neuron of q or k, (sentences, neurons), float32; replayed if there is no closed form."""
        spans_heads = form.of_all_heads is None and self.layer.norm_spans_heads(name)
        if spans_heads:
            impacts = attention.replayed_over_heads(name, projected, self.layer.norms[name], angles).sqrt().float()
        else:
            squares = (
                attention.replayed(name, projected, self.layer.norms[name], angles)
                if form.of_all_heads is None
                else attention.squared_changes(form.of_all_heads)
            )
            impacts = attention.summed_over_heads(name, squares.flatten(0, 1)).sqrt().float()
        # Whole rows count: kernels skip unseen keys themselves, and a norm over all heads is replayed on whole rows.
        whole = spans_heads or (form.of_all_heads is not None and attention.on_kernels(form.of_all_heads))
        num_logits = attention.length**2 if whole else sum(block.num_logits for block in attention.blocks)
        num_neurons = impacts.numel()
        return impacts, Work(
            neurons=num_neurons,
            all_neurons=num_neurons,
            logits=num_neurons * num_logits,
            all_logits=num_neurons * attention.length**2,
        )

    def _pruned_over_heads(
        self, attention: LayerAttention, name: str, form: "_Form", projected: Tensor, angles: Angles
    ) -> tuple[Tensor, Work]:
        assert form.change is not None and form.growth is not None and self._top_ratio is not None
        replayed = partial(attention.replayed_over_heads, name, projected, self.layer.norms[name], angles)
        return norm_over_heads.pruned_impacts(name, attention, form.change, form.growth, replayed, self._top_ratio)


@dataclass(frozen=True)
class _Form:
    """How a projection's neurons change the logits.

    Attributes:
        change: the closed form for the logits of a neuron's own heads; None if the norm must be replayed.
        growth: for a norm over all heads, the factor by which the other entries grow, (batch, length, neurons),
            float64.
    """

    change: LogitChange | None
    growth: Tensor | None = None

    @property
    def of_all_heads(self) -> LogitChange | None:
        """The change in closed form if it covers all that the neuron changes; else None."""
        return self.change if self.growth is None else None
