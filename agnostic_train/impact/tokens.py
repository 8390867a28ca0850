"""Leaving out tokens, such as padding, whose activations may be NaN."""

from torch import Tensor


def without_tokens(values: Tensor, left_out: Tensor) -> Tensor:
    """Zeroes the values of some tokens. On a CPU, if there are none, the result is `values` itself, not a copy.

    Args:
        values: (batch, length, ...).
        left_out: (batch, length), bool.
    """
    if values.device.type != "cpu":
        return values.masked_fill(left_out.view(*left_out.shape, *(1,) * (values.dim() - 2)), 0)
    # On a CPU, `masked_fill` by a broadcast mask takes five times as long as a copy.
    places = left_out.nonzero(as_tuple=True)
    if not len(places[0]):
        return values
    values = values.clone()
    values[places] = 0
    return values
