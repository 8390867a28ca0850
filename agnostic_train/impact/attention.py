"""Impact of attention neurons (q, k, v) on the concatenated heads.

The exact form equals real deactivation: deactivating a row of q or k changes the logits by a rank-two term, because
rotation mixes the row with its partner, and this change passes through the softmax. Eq. 10 and 11 of Chen et al. 2025
are the form for v and the form for q and k without rotation.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from agnostic_train.impact.angles import Angles
from agnostic_train.impact.tokens import without_tokens
from agnostic_train.impact.visibility import Visibility


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of one layer's attention for a batch, after rotation and before the softmax.

    `clean` zeroes padding, which may hold NaN, so that it affects no result.

    Attributes:
        query, key, value: (batch, query heads, length, head_dim); each KV head is repeated for its query heads.
        num_kv_heads: how many KV heads there were.
        visibility: which keys each query sees, and which tokens are real.
        scaling: the factor on the logits.
        softcap: the soft cap on the logits; None without one.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    num_kv_heads: int
    visibility: Visibility
    scaling: float
    softcap: float | None = None

    @property
    def real(self) -> Tensor:
        return self.visibility.real

    @classmethod
    def clean(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visibility: Visibility,
        scaling: float,
        softcap: float | None = None,
    ) -> "AttentionInputs":
        """Casts to at least float32, repeats KV heads per query head and zeroes padding.

        Args:
            As the class's attributes, but key and value are (batch, KV heads, length, head_dim), of any floating dtype.
        """
        dtype = torch.promote_types(query.dtype, torch.float32)
        num_kv_heads = key.shape[1]
        queries_per_kv = query.shape[1] // num_kv_heads
        query, key, value = (
            without_tokens(it.transpose(1, 2), visibility.padding).transpose(1, 2).to(dtype)
            for it in (query, key, value)
        )
        query, key, value = query.contiguous(), repeated(key, queries_per_kv), repeated(value, queries_per_kv)
        return cls(query, key, value, num_kv_heads, visibility, scaling, softcap)

    def sentences(self, part: slice) -> "AttentionInputs":
        """The inputs of the sentences in `part`."""
        return replace(
            self,
            query=self.query[part],
            key=self.key[part],
            value=self.value[part],
            visibility=self.visibility.sentences(part),
        )

    def products(self) -> Tensor:
        """Computes `s q~ k~^T`, before cap and mask: (batch, query heads, length, length)."""
        return (self.query * self.scaling) @ self.key.transpose(-1, -2)

    def logits(self) -> Tensor:
        """Computes the softmax's input: the capped logits, -inf where a query doesn't see a key."""
        return self.finish(self.products(), self.visibility.hidden)

    def output(self) -> Tensor:
        """Computes the attention's output: (batch, query heads, length, head_dim)."""
        return self.logits().softmax(-1) @ self.value

    def finish(self, products: Tensor, hidden: Tensor) -> Tensor:
        """Caps `products` and masks those of hidden keys, in place."""
        if self.softcap is not None:
            products = products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products.masked_fill_(hidden, -torch.inf)

    def clean_projection(self, projected: Tensor) -> Tensor:
        """Casts a projection's output (batch, length, features) to the queries' dtype and zeroes padding."""
        return without_tokens(projected, self.visibility.padding).to(self.query.dtype)

    def per_query_head(self, projected: Tensor) -> Tensor:
        """Converts (batch, length, heads * head_dim) to (batch, query heads, length, head_dim)."""
        heads = projected.unflatten(-1, (-1, self.query.shape[-1])).transpose(1, 2)
        return repeated(heads, self.query.shape[1] // heads.shape[1]).contiguous()


def repeated(heads: Tensor, times: int) -> Tensor:
    """Repeats each KV head (dim 1) `times` times, once for each query head that reads it."""
    return heads.repeat_interleave(times, 1) if times > 1 else heads


@dataclass(frozen=True)
class LogitChange:
    """How deactivating each neuron n changes the logit S_ij of query i and key j.

    The changed logit is `S_ij * row_growth_i[n] * column_growth_j[n] - a_i[n] * b_j[n] - c_i[n] * d_j[n]`. All are of
    shape (batch, query heads, length, head_dim). Growths are at least 1; None if no norm makes the other entries grow.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    row_growth: Tensor | None = None
    column_growth: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.a, self.b, self.c, self.d

    @cached_property
    def reach(self) -> Tensor:
        """An upper bound on the absolute value of `a_i b_j + c_i d_j`: (batch, query heads, head_dim)."""
        a, b, c, d = (it.abs().amax(-2) for it in self.factors)
        return a * b + c * d

    def centred(self, real: Tensor) -> "LogitChange":
        """Subtracts from b and d their means over the real tokens, which don't affect the softmax.

        real: (batch, length), bool.
        """
        num_real = real.sum(1).clamp(min=1)[:, None, None, None]
        centred = (it - it.sum(-2, keepdim=True) / num_real for it in (self.b, self.d))
        # Padding was zero and must stay zero.
        b, d = (without_tokens(it.transpose(1, 2), ~real).transpose(1, 2) for it in centred)
        return replace(self, b=b, d=d)

    @property
    def grows(self) -> bool:
        return self.row_growth is not None or self.column_growth is not None

    def growths(self) -> list[Tensor]:
        """Returns `row_growth` and `column_growth`, ones in place of None; an empty list if nothing grows."""
        pair = (self.row_growth, self.column_growth)
        return [torch.ones_like(self.a) if it is None else it for it in pair] if self.grows else []


def value_impacts(norms: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """Impact of each row of v: the column norm of the heads' output, over all query heads that read the row.

    Args:
        norms: `column_norms` of the concatenated heads (the input of `o_proj`), (batch, query heads * head_dim).

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
    """The change of the logits by each row of `q` or `k`, with rotation.

    Deactivating row n of `q` subtracts `s q_i[n] (R_i e_n) . k~_j`; row n of `k`, `s k_j[n] (R_j e_n) . q~_i`.

    Args:
        states: the queries or keys before rotation (after the norm, if there is one), per query head, padding zeroed,
            (batch, query heads, length, head_dim).
        growth: the factor by which the other entries grow, shaped like `states`, see `rms_norm`; None without a norm.
    """
    if growth is not None:
        states = states * growth
    own, other = (states * part.unsqueeze(1) for part in angles.scaled(inputs.scaling))
    if name == "q":
        return LogitChange(own, inputs.key, other, angles.rotation.partners(inputs.key), row_growth=growth)
    return LogitChange(inputs.query, own, angles.rotation.partners(inputs.query), other, column_growth=growth)


def paper_change(inputs: AttentionInputs) -> LogitChange:
    """The change by Eq. 11 on the rotated queries and keys, `s q~_i[n] k~_j[n]`, the same for q and k."""
    query = inputs.query * inputs.scaling
    return LogitChange(query, inputs.key, torch.zeros_like(query), inputs.key)
