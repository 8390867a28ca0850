"""Which neuron replaces each neuron of a layer in a random control: any, or one of similar activation."""

from bisect import bisect_left
from collections.abc import Mapping

import torch
from torch import Tensor

from agnostic_train.errors import UserError
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
    layer: Layer,
    members: Mapping[str, Tensor],
    excluded: Mapping[str, Tensor],
    activations: Mapping[Site, Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Draws moves like `random_moves`, but from each member to a neuron of similar activation that isn't a member.

    Args:
        members: by projection, the neurons of the set that the control is for.
        excluded: by projection, further neurons to which no member moves.
        activations: mean absolute activations, (layer, `q`, `k`, `v` or `down`) -> (neurons,).

    Returns: int64 by projection, meaningful only at members. If members are more than half of a site, they may also
        move to members; if `excluded` leaves too few neurons, it has no effect there.
    """
    moving, closed = _drawn_together(layer, members), _drawn_together(layer, excluded)
    for name in moving:
        if len(activations.get((layer.index, name), ())) != layer.projections[name].num_neurons:
            raise UserError(f"activations: not those of layer {layer.index} {name}; they come from another model")
    drawn = {
        name: _nearest_free(activations[(layer.index, name)], indices, closed[name], generator)
        for name, indices in moving.items()
    }
    return _joint_moves(layer, drawn, generator)


def _drawn_together(layer: Layer, neurons: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The hidden units, value channels, q and k rows of a set: what `_joint_moves` moves."""
    return {
        "down": torch.cat([neurons[name] for name in FEED_FORWARD_PROJECTIONS]).unique(),
        "v": torch.cat([neurons["v"], channels_read(layer)[neurons["o"]]]).unique(),
        "q": neurons["q"],
        "k": neurons["k"],
    }


def _nearest_free(activation: Tensor, members: Tensor, excluded: Tensor, generator: torch.Generator) -> Tensor:
    """Maps all indices; each member goes to one of its `NUM_NEAREST` nearest free neurons, which is used only once."""
    free = torch.ones(len(activation), dtype=torch.bool, device="cpu")
    for taken in (members, excluded):
        fewer = free.index_fill(0, taken, False)
        free = fewer if int(fewer.sum()) >= len(members) else free
    move = torch.arange(len(activation), device="cpu")
    levels = activation.double().tolist()
    candidates = sorted((levels[index], index) for index in free.nonzero().flatten().tolist())
    # In random order, so that no member always has the first choice.
    for member in members[torch.randperm(len(members), generator=generator, device="cpu")].tolist():
        level = levels[member]
        place = bisect_left(candidates, (level, -1))
        nearby = candidates[place : place + NUM_NEAREST] + _below(candidates, place)
        nearest = sorted(nearby, key=lambda it: (abs(it[0] - level), it[1]))[:NUM_NEAREST]
        choice = nearest[int(torch.randint(len(nearest), (), generator=generator, device="cpu"))]
        move[member] = choice[1]
        candidates.pop(bisect_left(candidates, choice))
    return move


def _below(candidates: list[tuple[float, int]], place: int) -> list[tuple[float, int]]:
    """The last `NUM_NEAREST` candidates before a place; of those with equal activation, the lowest indices."""
    below: list[tuple[float, int]] = []
    while place > 0 and len(below) < NUM_NEAREST:
        start = bisect_left(candidates, (candidates[place - 1][0], -1))
        below += candidates[start : min(place, start + NUM_NEAREST)]
        place = start
    return below[:NUM_NEAREST]


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
