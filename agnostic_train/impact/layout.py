"""How the q and k neurons of one layer are laid out: by head for computing, by site for counting."""

from collections.abc import Mapping

import torch
from torch import Tensor

from agnostic_train.impact.attention import LogitChange
from agnostic_train.impact.layer_attention import LayerAttention


class QueryKeyLayout:
    """Converts between the two layouts of a layer's q and k neurons, and holds their factors.

    By head: (batch * query heads, q neurons then k neurons, ...). By site: (batch, q rows then k rows, ...).

    Args:
        attention: the layer's attention for a batch.
        logit_changes: by `q` and `k`, or one of them, how each neuron changes the logits.
        num_kv_heads: number of KV heads.

    Attributes:
        sizes: number of neurons of each site in `logit_changes`.
        factors: a, b, c and d of all neurons, by head: each (batch * heads * neurons, length).
        growths: both growths likewise; an empty list if nothing grows.
    """

    def __init__(self, attention: LayerAttention, logit_changes: Mapping[str, LogitChange], num_kv_heads: int):
        self._names = tuple(logit_changes)
        self._batch, self._num_heads, self._head_dim = attention.batch, attention.num_heads, attention.head_dim
        self._num_kv_heads = num_kv_heads
        rows = {"q": self._num_heads * self._head_dim, "k": num_kv_heads * self._head_dim}
        self.sizes = [rows[name] for name in logit_changes]
        # (batch * heads * neurons, length) each.
        self.factors = [self._stacked([getattr(x, part) for x in logit_changes.values()]) for part in "abcd"]
        # Both sites get growths, ones where nothing grows, because they are computed together.
        self.growths: list[Tensor] = []
        if any(x.grows for x in logit_changes.values()):
            pairs = [x.growths() or [torch.ones_like(x.a)] * 2 for x in logit_changes.values()]
            self.growths = [self._stacked(list(parts)) for parts in zip(*pairs, strict=True)]

    @staticmethod
    def _stacked(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten(0, 1).transpose(1, 2) for part in parts], 1).flatten(0, 1)

    def split(self, by_site: Tensor) -> tuple[Tensor, ...]:
        """Splits a tensor by site into one tensor per site."""
        return by_site.split(self.sizes, 1)

    def by_site(self, by_head: Tensor) -> Tensor:
        """Sums over the heads through which a neuron acts; a k row acts through all query heads of its group."""
        sites = []
        for name, part in zip(self._names, by_head.split(self._head_dim, 1), strict=True):
            part = part.unflatten(0, (self._batch, -1))
            if name == "k":
                part = part.unflatten(1, (self._num_kv_heads, -1)).sum(2)
            sites.append(part.flatten(1, 2))
        return torch.cat(sites, 1)

    def by_head(self, by_site: Tensor) -> Tensor:
        """Gives each head the values of the neurons that act through it."""
        heads = []
        for name, part in zip(self._names, self.split(by_site), strict=True):
            part = part.unflatten(1, (-1, self._head_dim))
            if name == "k":
                part = part.repeat_interleave(self._num_heads // self._num_kv_heads, 1)
            heads.append(part.flatten(0, 1))
        return torch.cat(heads, 1)
