"""Arguments for the kernels of q and k impacts, and reference results for them."""

import torch

from agnostic_train.impact import kernels
from agnostic_train.impact.intervals import Intervals

if kernels.triton is not None:
    import triton.language as tl

    @kernels.triton.jit
    def _tanh_of(source, target, size, BLOCK: tl.constexpr):
        places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(source + places, mask=places < size)
        tl.store(target + places, kernels.tanh(values), mask=places < size)


HEADS, NEURONS = 2, 2


def visible_keys(mask, length):
    """Return which keys each query sees, as a bool tensor of shape (heads, length, length)."""
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


def random_case(
    length, head_dim, mask="causal", logits=3.0, change=1.0, device="cpu", growth=0.0, neurons=NEURONS, softcap=None
):
    """Return keyword arguments of `squared_changes` for every neuron, some of whose rows aren't counted.

    logits, change: scales of the logits and of each factor of their changes. growth: largest relative growth.
    neurons: number per head.
    """
    torch.manual_seed(length * head_dim)
    visible = visible_keys(mask, length)
    scores = (logits * torch.randn(HEADS, length, length)).masked_fill(~visible, -torch.inf)
    value = torch.randn(HEADS, length, head_dim)
    case = {
        "logits": scores,
        "centred_value": value - value.mean(-2, keepdim=True),
        "weight": (torch.rand(HEADS, length) - 0.2).clamp(min=0),
        "factors": [change * torch.randn(HEADS, length, neurons) for _ in range(4)],
        "spans": kernels.key_spans(visible[:, None]),
    }
    if growth:
        case["growths"] = [1 + growth * torch.rand(HEADS, length, neurons) for _ in range(2)]
    case = {
        name: [it.to(device) for it in part] if isinstance(part, list) else part.to(device)
        for name, part in case.items()
    }
    return case | ({"softcap": softcap} if softcap else {})


def capped(logits, softcap):
    """Return the logits that the softmax receives; -inf stays."""
    return logits if softcap is None else (softcap * (logits / softcap).tanh()).where(logits > -torch.inf, logits)


def reference(logits, centred_value, weight, factors, spans=None, chosen=None, growths=(), softcap=None):
    """Compute the squared changes in float64, one neuron at a time, over all rows and keys: (heads, neurons)."""
    logits, value, weight = logits.double(), centred_value.double(), weight.double()
    attention = capped(logits, softcap).softmax(-1)
    squares = torch.empty_like(factors[0][:, 0], dtype=torch.float64)
    for head in range(len(squares)):
        for neuron in range(squares.shape[1]):
            a, b, c, d = (factor[head, :, neuron].double() for factor in factors)
            grown = logits[head]
            if growths:
                r, s = (growth[head, :, neuron].double() for growth in growths)
                grown = grown * r[:, None] * s
            changed = capped(grown - a[:, None] * b - c[:, None] * d, softcap)
            change = changed.softmax(-1) - attention[head]
            squares[head, neuron] = (weight[head] * (change @ value[head]).square().sum(-1)).sum()
    return squares


def assert_equals_the_reference(case, rtol=1e-5):
    """Compare impacts, with a relative tolerance and an absolute one of a millionth of the largest impact."""
    actual, expected = kernels.squared_changes(**case), reference(**case).sqrt()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double().sqrt(), expected, rtol=rtol, atol=1e-6 * expected.max().item())


def intervals_of(case):
    """Return the lower and upper ends of the intervals for the arguments of `squared_changes`."""
    logits = case["logits"]
    largest = logits.masked_fill(logits == -torch.inf, 0).abs().amax((1, 2))
    softcap = case.get("softcap")
    logits = capped(logits, softcap)
    attention = logits.softmax(-1)
    intervals = Intervals(logits, attention, case["centred_value"], case["weight"], case["spans"], largest, softcap)
    return intervals.around(case["factors"], case.get("growths", ()))


def assert_intervals_hold(case):
    """Check that intervals hold the reference and the exact kernel's result; return their mean relative width."""
    low, high = intervals_of(case)
    assert low.dtype == high.dtype == torch.float32
    truth, exact = reference(**case), kernels.squared_changes(**case)
    for squares in (truth, exact):
        assert (low <= squares * (1 + 1e-6)).all() and (squares <= high * (1 + 1e-6)).all()
    return ((high.double().sqrt() - low.double().sqrt()) / truth.sqrt()).mean().item()


def assert_heads_of_one_sentence_share_its_spans(device="cpu"):
    for length, head_dim in ((42, 10), (64, 64)):
        case = random_case(length, head_dim, device=device)
        case["spans"] = case["spans"][:1]
        assert_equals_the_reference(case)
        assert_intervals_hold(case)


def assert_nan_is_not_lost(where, device="cpu"):
    """Check that NaN in some argument of the first head, in the only counted row, appears in the results."""
    case = random_case(123, 42, "sliding window", device=device)
    case["weight"].zero_()
    case["weight"][:, 70] = 1
    part = {"a": case["factors"][0], "b": case["factors"][1]}.get(where, case.get(where))
    part[0, 70] = part[0, 70].masked_fill(part[0, 70] != -torch.inf, torch.nan)
    squares = kernels.squared_changes(**case)
    assert squares[0].isnan().all() and squares[1:].isfinite().all()
    low, high = intervals_of(case)
    assert (low[0] == 0).all() and (high[0] == torch.inf).all() and (low[1:] > 0).all() and high[1:].isfinite().all()


def tanh(z, result):
    """Write the kernels' hyperbolic tangent of each number of `z` to `result`."""
    _tanh_of[(-(-len(z) // 1024),)](z, result, len(z), BLOCK=1024)


def assert_tanh_is_close(device="cpu"):
    """Check to a few units in the last place, also near zero, because the intervals rely on it."""
    z = torch.cat([torch.logspace(-6, 2, 20_001), torch.linspace(0.3, 0.4, 20_001)])
    z = torch.cat([z, -z]).to(device)
    actual = torch.empty_like(z)
    tanh(z, actual)
    expected = z.double().tanh()
    assert ((actual - expected) / expected).abs().max() < 6 * torch.finfo(torch.float32).eps
