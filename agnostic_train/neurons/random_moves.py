"""Which neuron replaces each neuron of a layer in a random control: any, or one of similar activation."""

from bisect import bisect_left
from collections.abc import Mapping

import torch
from torch import Tensor

from agnostic_train.model.decoder import FEED_FORWARD_PROJECTIONS, Layer, Site

NUM_NEAREST = 2
"""A neuron's activation-matched counterpart is drawn from this many free neurons of nearest mean absolute activation.

Few, because the members of a set are the most active of their site: most of the nearest 16 would be far less active. A
single one would hardly be nearer, and would be the same neuron for nearly every seed."""


def random_moves(layer: Layer, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws for each projection of a layer where each neuron goes: an int64 permutation of the site's indices.

    Gate, up and down of a hidden unit move together, and so do v and the o columns that read it.
    """
    drawn = {
        name: torch.randperm(layer.projections[name].num_neurons, generator=generator, device="cpu")
        for name in ("down", "v", "q", "k")
    }
    return _joint_moves(layer, drawn, generator)


def matched_moves(
    layer: Layer, members: Mapping[str, Tensor], activations: Mapping[Site, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Draws moves like `random_moves`, but from each member to a neuron of similar activation that isn't a member.

    Args:
        members: by projection, the neurons of the set that the control is for.
        activations: mean absolute activations, (layer, `q`, `k`, `v` or `down`) -> (neurons,).

    Returns: int64 by projection, meaningful only at members. If members are more than half of a site, they may also
        move to members.
    """
    units = torch.cat([members[name] for name in FEED_FORWARD_PROJECTIONS]).unique()
    channels = torch.cat([members["v"], channels_read(layer)[members["o"]]]).unique()
    together = {"down": units, "v": channels, "q": members["q"], "k": members["k"]}
    drawn = {
        name: _nearest_free(activations[(layer.index, name)], indices, generator) for name, indices in together.items()
    }
    return _joint_moves(layer, drawn, generator)


def _nearest_free(activation: Tensor, members: Tensor, generator: torch.Generator) -> Tensor:
    """Maps all indices; each member goes to one of its `NUM_NEAREST` nearest free neurons, which is used only once."""
    free = torch.ones(len(activation), dtype=torch.bool, device="cpu")
    if 2 * len(members) <= len(activation):
        free[members] = False
    candidates = free.nonzero().flatten()
    ordered, upward = activation.double()[candidates].sort(stable=True)
    downward = activation.double()[candidates].argsort(stable=True, descending=True)
    as_active, less_active = (_Line(candidates[order].tolist()) for order in (upward, downward))
    move = torch.arange(len(activation), device="cpu")
    levels, sorted_levels = activation.double().tolist(), ordered.tolist()
    # In random order, so that no member always has the first choice.
    for member in members[torch.randperm(len(members), generator=generator, device="cpu")].tolist():
        level = levels[member]
        num_less = bisect_left(sorted_levels, level)
        nearby = as_active.first(num_less, NUM_NEAREST)
        nearby += less_active.first(len(sorted_levels) - num_less, NUM_NEAREST)
        nearest = sorted(nearby, key=lambda index: (abs(levels[index] - level), index))[:NUM_NEAREST]
        choice = nearest[int(torch.randint(len(nearest), (), generator=generator, device="cpu"))]
        move[member] = choice
        as_active.take(choice)
        less_active.take(choice)
    return move


class _Line:
    """Indices in a fixed order, some of them taken; free ones are found without visiting every taken one."""

    def __init__(self, order: list[int]):
        self._order = order
        self._place = {index: place for place, index in enumerate(order)}
        # The place at which to continue the search from each place; a free place points to itself.
        self._next = list(range(len(order) + 1))

    def first(self, place: int, count: int) -> list[int]:
        """Returns the first `count` free indices at or after a place, or all if there are fewer."""
        free: list[int] = []
        while len(free) < count and (place := self._left_from(place)) < len(self._order):
            free.append(self._order[place])
            place += 1
        return free

    def take(self, index: int) -> None:
        place = self._place[index]
        self._next[place] = place + 1

    def _left_from(self, place: int) -> int:
        while self._next[place] != place:
            # Path halving: it makes the next search shorter.
            self._next[place] = self._next[self._next[place]]
            place = self._next[place]
        return place


def channels_read(layer: Layer) -> Tensor:
    """Returns the row of v that each column of o reads."""
    return layer.kv_channels(torch.arange(layer.projections["o"].num_neurons, device="cpu"))


def _joint_moves(layer: Layer, drawn: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    channels, units = drawn["v"], drawn["down"]
    head_dim, queries_per_kv = layer.head_dim, layer.queries_per_kv
    # A column of o moves with the channel that it reads. In the new KV head's group, it takes the query head at its old
    # position in the group, shifted by a random number.
    head = torch.arange(layer.projections["o"].num_neurons, device="cpu") // head_dim
    shift = torch.randint(queries_per_kv, (len(channels),), generator=generator, device="cpu")
    source = channels_read(layer)
    target = channels[source]
    slot = (head % queries_per_kv + shift[source]) % queries_per_kv
    columns = (target // head_dim * queries_per_kv + slot) * head_dim + target % head_dim
    moves = {"q": drawn["q"], "k": drawn["k"], "v": channels, "o": columns, "down": units}
    return moves | {name: units for name in ("gate", "up") if name in layer.projections}
