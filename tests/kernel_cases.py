"""Arguments for the kernel of q and k impacts, and what it should make of them."""

import torch

from agnostic_train.impact import kernels

HEADS, NEURONS = 3, 2


def visible_keys(mask, length):
    """Which keys each query sees, (heads, length, length)."""
    positions = torch.arange(length)
    visible = (positions[:, None] >= positions).repeat(HEADS, 1, 1)
    padding = length // 3
    if mask == "sliding window":
        visible &= positions[:, None] - positions < 5
    elif mask == "left padding":
        visible[1:, :, :padding] = False
    elif mask == "right padding":
        visible[1:, :, length - padding :] = False
    elif mask == "full":
        visible[:] = True
    return visible | torch.eye(length, dtype=torch.bool)


def random_case(length, head_dim, mask="causal", logits=3.0, change=1.0, device="cpu", growth=0.0):
    """Arguments of `squared_changes` for every neuron, with rows that aren't counted.

    logits, change: how large the logits are, and each factor of what is taken from them. growth: by how much they grow.
    """
    torch.manual_seed(length * head_dim)
    hidden = ~visible_keys(mask, length)
    scores = (logits * torch.randn(HEADS, length, length)).masked_fill(hidden, -torch.inf)
    value = torch.randn(HEADS, length, head_dim)
    weight = (torch.rand(HEADS, length) - 0.2).clamp(min=0)
    factors = [change * torch.randn(HEADS * NEURONS, length) for _ in range(4)]
    arguments = scores, value - value.mean(-2, keepdim=True), weight, factors, torch.arange(HEADS * NEURONS)
    if growth:
        growths = [1 + growth * torch.rand(HEADS * NEURONS, length) for _ in range(2)]
        arguments = (*arguments, slice(0, length), slice(0, length), growths)
    return [
        [it.to(device) for it in part]
        if isinstance(part, list)
        else part
        if isinstance(part, slice)
        else part.to(device)
        for part in arguments
    ]


def reference(logits, value, weight, factors, neurons, rows=None, keys=None, growths=()):
    """In float64, neuron by neuron, over all rows and keys."""
    logits, value, weight = logits.double(), value.double(), weight.double()
    attention, squares = logits.softmax(-1), []
    for neuron in neurons:
        a, b, c, d = (factor[neuron].double() for factor in factors)
        head = int(neuron) // NEURONS
        grown = logits[head]
        if growths:
            grown = grown * growths[0][neuron].double()[:, None] * growths[1][neuron].double()
        change = (grown - a[:, None] * b - c[:, None] * d).softmax(-1) - attention[head]
        squares.append((weight[head] * (change @ value[head]).square().sum(-1)).sum())
    return torch.stack(squares)


def assert_equals_the_reference(case, rtol=1e-5):
    """The impacts, to a part of each and a millionth of the largest."""
    found, expected = kernels.squared_changes(*case), reference(*case).sqrt()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().sqrt(), expected, rtol=rtol, atol=1e-6 * expected.max().item())


def assert_nan_is_not_lost(where, device="cpu"):
    """What isn't a number in the only row that is counted, in some argument of the first head."""
    logits, value, weight, factors, neurons = random_case(123, 42, "sliding window", device=device)
    weight.zero_()
    weight[:, 70] = 1
    part = {"logits": logits, "a": factors[0], "b": factors[1], "value": value}[where]
    part[0, 70] = part[0, 70].masked_fill(part[0, 70] != -torch.inf, torch.nan)
    found = kernels.squared_changes(logits, value, weight, factors, neurons)
    assert found[0].isnan() and found[NEURONS:].isfinite().all()
