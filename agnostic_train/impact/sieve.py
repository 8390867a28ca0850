"""Certified pruning: exact q and k impacts of only those neurons that can be among their sentence's largest.

Bounds on every neuron's squared change come first. The neurons that look largest are done exactly: the n-th largest of
them is a threshold. The others follow block by block of query rows, from the early ones, which see few keys and change
most, to the late ones: a neuron leaves as soon as what its rows have shown, plus the bounds of those to come, stays
below the threshold. Whatever is left at the end has its exact impact.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, floor

import torch
from torch import Tensor

from agnostic_train.impact.attention import OutputChange, RankTwo
from agnostic_train.impact.bounds import Block, row_blocks, square_bounds, value_spread

# Neurons of a head that are computed side by side on one copy of its logits and values.
_TILE = 4
# How many neurons make the first threshold, as a multiple of those that are looked for.
_FIRST = 1.5
# The exact form rounds differently in other company.
_MARGIN = 1e-4


def num_top(top_ratio: float, size: int) -> int:
    """How many of a site's neurons are top in a sentence: `max(1, floor(top_ratio * size))`."""
    # The slack keeps 0.29 of 100 neurons at 29, whatever 0.29 * 100 is in binary.
    return max(1, floor(top_ratio * size * (1 + 1e-9)))


@dataclass
class Work:
    """What pruning left to do: how many neurons and, for them, changed logits were computed, of how many."""

    neurons: int = 0
    all_neurons: int = 0
    logits: int = 0
    all_logits: int = 0


@dataclass(frozen=True)
class _Tiles:
    """Neurons of one head, a tile's worth at a time. head: (tiles,). neuron, target: (tiles, size), int64.

    The last tile of a head repeats the head's first neuron, and its target is a place behind all results.
    """

    head: Tensor
    neuron: Tensor
    target: Tensor

    def chunks(self, num_tiles: int) -> Iterator["_Tiles"]:
        for parts in zip(*(it.split(num_tiles) for it in (self.head, self.neuron, self.target)), strict=True):
            yield _Tiles(*parts)


class TopSieve:
    """The exact impacts of each sentence's top q and k neurons in one layer; see the module's docstring.

    Args:
        change: the layer's attention for a batch.
        changes: by `q` and `k`, or one of them, what each neuron takes from the logits.
        chunk_bytes: bound on the temporaries of the exact form.
        bound_bytes: bound on those of the bounds.
    """

    def __init__(
        self,
        change: OutputChange,
        changes: Mapping[str, RankTwo],
        num_kv_heads: int,
        chunk_bytes: int,
        bound_bytes: int,
    ):
        self.change = change
        self.changes = changes
        self.blocks = row_blocks(change.inputs.visible)
        self._num_kv_heads = num_kv_heads
        self._chunk_bytes = chunk_bytes
        self._bound_bytes = bound_bytes
        rows = {"q": change.num_heads * change.head_dim, "k": num_kv_heads * change.head_dim}
        self._sizes = [rows[name] for name in changes]
        # A head's neurons are those of q, then those of k: (batch * heads, neurons, length).
        self._x = [
            torch.cat([getattr(x, part).flatten(0, 1) for x in changes.values()], -1).transpose(1, 2) for part in "abcd"
        ]

    def impacts(self, top_ratio: float, work: Mapping[str, Work]) -> dict[str, Tensor]:
        """Exact impacts of every neuron that can be in its sentence's top; zero for the others.

        Args:
            top_ratio: the part of a site's neurons that is looked for.
            work: by `q` and `k`, added to.

        Returns: by `q` and `k`, (batch, neurons), float32.
        """
        bounds, estimates = self._bounds()
        # By site from here on, q's and k's neurons side by side: (batch, neurons[, blocks]).
        rest = self._by_site(bounds).flip(-1).cumsum(-1).flip(-1)
        estimates = self._by_site(estimates)
        counts = [num_top(top_ratio, size) for size in self._sizes]
        first = torch.zeros_like(estimates, dtype=torch.bool)
        for part, estimate, count in zip(self._split(first), self._split(estimates), counts, strict=True):
            likely = estimate.topk(min(ceil(_FIRST * count), estimate.shape[1]), 1).indices
            part.scatter_(1, likely, True)
        tiles = self._tiles(first)
        done = self._by_site(sum(self._squares(tiles, block) for block in self.blocks))
        thresholds = [part.topk(count, 1).values[:, -1:] for part, count in zip(self._split(done), counts, strict=True)]
        threshold = torch.cat([it.expand(-1, size) for it, size in zip(thresholds, self._sizes, strict=True)], 1)
        alive, num_logits = ~first, [0] * len(counts)
        for number, block in enumerate(self.blocks):
            # Not `>=`: what isn't a number stays.
            alive &= ~((done + rest[..., number]) * (1 + _MARGIN) < threshold)
            tiles = self._tiles(alive)
            if not len(tiles.head):
                break
            done += self._by_site(self._squares(tiles, block))
            for index, part in enumerate(self._split(alive)):
                num_logits[index] += int(part.sum()) * block.num_logits
        found = torch.where(alive | first, done, 0).sqrt().float()
        per_neuron = sum(block.num_logits for block in self.blocks)
        for name, part, likely, logits in zip(
            self.changes, self._split(alive), self._split(first), num_logits, strict=True
        ):
            work[name].neurons += int(part.sum() + likely.sum())
            work[name].all_neurons += part.numel()
            work[name].logits += logits + int(likely.sum()) * per_neuron
            work[name].all_logits += part.numel() * self.change.length**2
        return dict(zip(self.changes, self._split(found), strict=True))

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """Bounds on squared changes and estimates of them: (batch * heads, neurons, blocks), without the last."""
        change = self.change
        entries = change.length * (20 * change.head_dim + 6 * change.length)
        at_once = max(1, self._bound_bytes // (entries * change.value.element_size()))
        parts = []
        for start in range(0, len(change.value), at_once):
            heads = slice(start, start + at_once)
            spread = value_spread(change, heads)
            both = [square_bounds(change, heads, spread, x, self.blocks) for x in self.changes.values()]
            parts.append([torch.cat(it, -1) for it in zip(*both, strict=True)])
        bounds, estimates = (torch.cat(it) for it in zip(*parts, strict=True))
        return bounds.transpose(1, 2), estimates

    def _split(self, by_site: Tensor) -> tuple[Tensor, ...]:
        return by_site.split(self._sizes, 1)

    def _by_site(self, by_head: Tensor) -> Tensor:
        """(batch * heads, neurons, ...) to (batch, neurons of all heads, ...): a k row acts through a group's heads."""
        sites = []
        for name, part in zip(self.changes, by_head.split(self.change.head_dim, 1), strict=True):
            part = part.unflatten(0, (self.change.batch, -1))
            if name == "k":
                part = part.unflatten(1, (self._num_kv_heads, -1)).sum(2)
            sites.append(part.flatten(1, 2))
        return torch.cat(sites, 1)

    def _tiles(self, by_site: Tensor) -> _Tiles:
        """The neurons marked in (batch, neurons of all heads), bool, as every head that they act through sees them."""
        change, by_head = self.change, []
        for name, part in zip(self.changes, self._split(by_site), strict=True):
            part = part.unflatten(1, (-1, change.head_dim))
            if name == "k":
                part = part.repeat_interleave(change.num_heads // self._num_kv_heads, 1)
            by_head.append(part.flatten(0, 1))
        marked = torch.cat(by_head, 1)
        num_heads, num_neurons = marked.shape
        counts = marked.sum(1)
        num_tiles = (counts + _TILE - 1) // _TILE
        neurons = marked.flatten().nonzero().squeeze(1)
        heads = neurons // num_neurons
        place = torch.arange(len(neurons), device=neurons.device) - (counts.cumsum(0) - counts)[heads]
        place += ((num_tiles.cumsum(0) - num_tiles) * _TILE)[heads]
        head = torch.arange(num_heads, device=neurons.device).repeat_interleave(num_tiles)
        neuron = (head * num_neurons).repeat_interleave(_TILE)
        target = torch.full_like(neuron, marked.numel())
        neuron[place] = target[place] = neurons
        return _Tiles(head, neuron.view(-1, _TILE), target.view(-1, _TILE))

    def _squares(self, tiles: _Tiles, block: Block) -> Tensor:
        """Squared changes over a block's counted rows, (batch * heads, neurons); zero for neurons in no tile."""
        change = self.change
        logits, value = change.logits[:, block.rows, block.keys], change.value[:, block.keys]
        output, weight = change.output[:, block.rows], change.weight[:, block.rows]
        a, b, c, d = (
            part[..., seen] for part, seen in zip(self._x, (block.rows, block.keys) * 2, strict=True)
        )
        num_rows, num_keys, head_dim = *logits.shape[1:], change.head_dim
        # A tile has its logits and their change at once, later attention and output; each with a copy of the head's.
        entries = (2 * _TILE + 1) * num_rows * (num_keys + head_dim) + num_keys * head_dim
        at_once = max(1, self._chunk_bytes // (entries * value.element_size()))
        squares = value.new_zeros(a.shape[0] * a.shape[1] + 1)
        for part in tiles.chunks(at_once):
            shape = (len(part.head), _TILE, num_rows)
            places = part.neuron.flatten().div(a.shape[1], rounding_mode="floor"), part.neuron.flatten() % a.shape[1]
            left, right = torch.stack([a[places], c[places]], -1), torch.stack([b[places], d[places]], 1)
            changed = (left @ right).view(*shape, num_keys)
            torch.sub(logits.index_select(0, part.head).unsqueeze(1), changed, out=changed)
            attention = changed.softmax(-1).flatten(1, 2)
            moved = (attention @ value.index_select(0, part.head)).view(*shape, head_dim)
            moved -= output.index_select(0, part.head).unsqueeze(1)
            weights = weight.index_select(0, part.head).unsqueeze(-1)
            squares[part.target] = (moved.square_().sum(-1) @ weights).squeeze(-1)
        return squares[:-1].view(len(value), -1)
