"""How the q and k neurons of one layer are laid out: by head for computing, by site for counting."""

from collections.abc import Mapping

import torch
from torch import Tensor

from agnostic_train.impact.attention import LogitChange, repeated
from agnostic_train.impact.layer_attention import LayerAttention


class QueryKeyLayout:
    """Converts between the two layouts of a layer's q and k neurons, and holds their factors.

    By head: (batch * query heads, q neurons then k neurons, ...). By site: (batch, q rows then k rows, ...).

    Args:
        attention: the layer's attention for a batch.
        logit_changes: by `q` and `k`, or one of them, how each neuron changes the logits.

    Attributes:
        sizes: number of neurons of each site in `logit_changes`.
        factors: a, b, c and d of all neurons, by head: each (batch * heads * neurons, length).
        growths: both growths likewise; an empty list if nothing grows.
    """

    def __init__(self, attention: LayerAttention, logit_changes: Mapping[str, LogitChange]):
        self._names = tuple(logit_changes)
        self._attention = attention
        self.sizes = [attention.num_own_heads(name) * attention.head_dim for name in logit_changes]
        # (batch * heads * neurons, length) each.
        by_factor = zip(*(x.factors for x in logit_changes.values()), strict=True)
        self.factors = [self._stacked(list(parts)) for parts in by_factor]
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
        """Sums over the heads through which a neuron acts, see `LayerAttention.summed_over_heads`."""
        parts = by_head.split(self._attention.head_dim, 1)
        return torch.cat([self._attention.summed_over_heads(*it) for it in zip(self._names, parts, strict=True)], 1)

    def by_head(self, by_site: Tensor) -> Tensor:
        """Gives each head the values of the neurons that act through it."""
        heads = []
        for name, part in zip(self._names, self.split(by_site), strict=True):
            num_own_heads = self._attention.num_own_heads(name)
            part = part.unflatten(1, (num_own_heads, -1))
            heads.append(repeated(part, self._attention.num_heads // num_own_heads).flatten(0, 1))
        return torch.cat(heads, 1)
