"""Certified pruning in plain torch: exact q and k impacts, but only of neurons that can be in their sentence's top.

First every neuron's squared change is bounded from above. The neurons with the largest estimates are computed exactly,
and the n-th largest of their squares is the threshold. The others are computed one block of query rows at a time, early
rows first, because these see few keys and change most. A neuron is dropped as soon as its sum over the rows so far plus
the bounds of its remaining rows is below the threshold. Those left at the end have exact impacts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from agnostic_train.impact.attention import LogitChange
from agnostic_train.impact.bounds import square_bounds, value_spread
from agnostic_train.impact.layer_attention import LayerAttention, without_noise
from agnostic_train.impact.layout import QueryKeyLayout
from agnostic_train.impact.pruning import ROUNDING_MARGIN, Work, check_enclosed, num_top

# How many neurons of a head share one copy of its logits and values, when few neurons are left and when many are.
_TILE_SIZES = (8, 16)
# Number of neurons computed exactly for the threshold, as a multiple of those sought.
_FIRST = 1.5


@dataclass(frozen=True)
class _Tiles:
    """Neurons grouped into tiles; all neurons of a tile belong to one head.

    A head's last tile is padded with the head's first neuron, whose target is a place past all results.

    Attributes:
        head: (tiles,), int64.
        neuron: the neurons' indices over all heads, (tiles, size), int64.
        target: where their results go, (tiles, size), int64.
    """

    head: Tensor
    neuron: Tensor
    target: Tensor

    def chunks(self, num_tiles: int) -> Iterator["_Tiles"]:
        for parts in zip(*(it.split(num_tiles) for it in (self.head, self.neuron, self.target)), strict=True):
            yield _Tiles(*parts)


class BoundSieve:
    """Computes exact impacts of each sentence's top q and k neurons in one layer; see the module's docstring.

    Args:
        attention: the layer's attention for a batch.
        logit_changes: by `q` and `k`, or one of them, how each neuron changes the logits.
        chunk_bytes: limit on temporary memory while impacts are computed exactly.
        bound_bytes: limit on temporary memory while bounds are computed.
    """

    def __init__(
        self,
        attention: LayerAttention,
        logit_changes: Mapping[str, LogitChange],
        chunk_bytes: int,
        bound_bytes: int,
    ):
        self.attention = attention
        self.logit_changes = {name: it.centred(attention.inputs.real) for name, it in logit_changes.items()}
        self.blocks = attention.blocks
        self.layout = QueryKeyLayout(attention, self.logit_changes)
        self._forms = [attention.in_block(block, bool(self.layout.growths)) for block in self.blocks]
        self._bits = torch.cat([attention.bits_moved(it) for it in self.logit_changes.values()], 1).flatten()
        self._chunk_bytes = chunk_bytes
        self._bound_bytes = bound_bytes

    def impacts(self, top_ratio: float) -> dict[str, tuple[Tensor, Work]]:
        """Computes the exact impact of every neuron that can be in its sentence's top; zero for the others.

        Args:
            top_ratio: fraction of a site's neurons to find.

        Returns: by `q` and `k`, the impacts, (batch, neurons), float32, and the work done.
        """
        bounds, estimates = self._bounds()
        # From here on by site, q rows then k rows: (batch, neurons[, blocks]).
        bounds = self.layout.by_site(bounds)
        # Not `cumsum`, which has no deterministic form for floats on a GPU.
        rest = torch.stack([bounds[..., block:].sum(-1) for block in range(bounds.shape[-1])], -1)
        estimates = self.layout.by_site(estimates)
        counts = [num_top(top_ratio, size) for size in self.layout.sizes]
        first = torch.zeros_like(estimates, dtype=torch.bool)
        for part, estimate, count in zip(self.layout.split(first), self.layout.split(estimates), counts, strict=True):
            likely = estimate.topk(min(ceil(_FIRST * count), estimate.shape[1]), 1).indices
            part.scatter_(1, likely, True)
        tiles = self._tiles(first)
        squares = [self.layout.by_site(self._squares(tiles, number)) for number in range(len(self.blocks))]
        if bool(first.all()):
            # Nothing can be left out, as in the self-check, which thereby also checks the bounds.
            for number, exact in enumerate(squares):
                check_enclosed(exact, torch.zeros_like(exact), bounds[..., number])
        done = torch.stack(squares).sum(0)
        thresholds = [
            part.topk(count, 1).values[:, -1:] for part, count in zip(self.layout.split(done), counts, strict=True)
        ]
        threshold = torch.cat([it.expand(-1, size) for it, size in zip(thresholds, self.layout.sizes, strict=True)], 1)
        alive, num_logits = ~first, [0] * len(counts)
        for number, block in enumerate(self.blocks):
            # Negated `<` instead of `>=`, so that NaN keeps a neuron alive.
            alive &= ~((done + rest[..., number]) * (1 + ROUNDING_MARGIN) < threshold)
            tiles = self._tiles(alive)
            if not len(tiles.head):
                break
            done += self.layout.by_site(self._squares(tiles, number))
            for index, part in enumerate(self.layout.split(alive)):
                num_logits[index] += int(part.sum()) * block.num_logits
        impacts = torch.where(alive | first, done, 0).sqrt().float()
        per_neuron = sum(block.num_logits for block in self.blocks)
        works = [
            Work(
                neurons=int(part.sum() + likely.sum()),
                all_neurons=part.numel(),
                logits=logits + int(likely.sum()) * per_neuron,
                all_logits=part.numel() * self.attention.length**2,
            )
            for part, likely, logits in zip(self.layout.split(alive), self.layout.split(first), num_logits, strict=True)
        ]
        return dict(zip(self.logit_changes, zip(self.layout.split(impacts), works, strict=True), strict=True))

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """Bounds on squared changes and estimates of them.

        Returns: (batch * heads, neurons, blocks) and (batch * heads, neurons).
        """
        attention = self.attention
        entries = attention.length * (28 * attention.head_dim + 10 * attention.length)
        at_once = max(1, self._bound_bytes // (entries * attention.value.element_size()))
        parts = []
        for start in range(0, len(attention.value), at_once):
            heads = slice(start, start + at_once)
            spread = value_spread(attention, heads, self.blocks)
            pairs = [square_bounds(attention, heads, spread, x, self.blocks) for x in self.logit_changes.values()]
            parts.append([torch.cat(it, -1) for it in zip(*pairs, strict=True)])
        bounds, estimates = (torch.cat(it) for it in zip(*parts, strict=True))
        return bounds.transpose(1, 2), estimates

    def _tiles(self, by_site: Tensor) -> _Tiles:
        """Groups the marked neurons into tiles, each neuron in every head through which it acts.

        by_site: (batch, neurons of the layer), bool.
        """
        marked = self.layout.by_head(by_site)
        num_heads, num_neurons = marked.shape
        neurons = marked.flatten().nonzero().squeeze(1)
        counts = marked.sum(1)
        few, many = _TILE_SIZES
        size = many if len(neurons) >= 2 * many * num_heads else few
        num_tiles = (counts + size - 1) // size
        heads = neurons // num_neurons
        place = torch.arange(len(neurons), device=neurons.device) - (counts.cumsum(0) - counts)[heads]
        place += ((num_tiles.cumsum(0) - num_tiles) * size)[heads]
        head = torch.arange(num_heads, device=neurons.device).repeat_interleave(num_tiles)
        neuron = (head * num_neurons).repeat_interleave(size)
        target = torch.full_like(neuron, marked.numel())
        neuron[place] = target[place] = neurons
        return _Tiles(head, neuron.view(-1, size), target.view(-1, size))

    def _squares(self, tiles: _Tiles, number: int) -> Tensor:
        """Squared changes over the counted rows of block `number`.

        Returns: (batch * heads, neurons), zero for neurons in no tile.
        """
        block, forms, value = self.blocks[number], self._forms[number], self.attention.value
        rows, keys, size = block.rows, block.keys, tiles.neuron.shape[1]
        factors = [part[:, seen] for part, seen in zip(self.layout.factors, (rows, keys) * 2, strict=True)]
        growths = [part[:, seen] for part, seen in zip(self.layout.growths, (rows, keys), strict=False)]
        # Per tile: each neuron's logits, attention and output, plus copies of the head's logits, attention and values.
        entries = size * block.num_rows * (2 * block.num_keys + self.attention.head_dim)
        entries += (2 * block.num_rows + self.attention.head_dim) * block.num_keys
        at_once = max(1, self._chunk_bytes // (entries * value.element_size()))
        squares = value.new_zeros(len(self._bits) + 1)
        shapes = [(-1, size, block.num_rows, 1), (-1, size, 1, block.num_keys)] * 2
        for part in tiles.chunks(at_once):
            neurons = part.neuron.flatten()
            chosen, grown = (
                [it.index_select(0, neurons).view(shape) for it, shape in zip(parts, shapes, strict=False)]
                for parts in (factors, growths)
            )
            squares[part.target] = forms.squares(part.head, chosen, grown, self._bits[part.neuron])
        return without_noise(squares[:-1], self._bits).view(len(value), -1)
