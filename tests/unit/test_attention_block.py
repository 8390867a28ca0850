"""Powers of two give the same squared changes as a softmax, and are used only where they stay in float32's range."""

from math import e, log2

import pytest
import torch

from agnostic_train.impact.attention import LogitChange
from agnostic_train.impact.attention_block import BlockForms, bits_moved, plain_block
from agnostic_train.impact.pruning import ROUNDING_MARGIN

HEADS, NEURONS, LENGTH, SIZE = 3, 5, 21, 8


def random_case(scale, growth=None):
    """Return logits of causal attention, values, weights and neurons' changes; growth: the largest relative one."""
    torch.manual_seed(0)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    logits = (3 * torch.randn(HEADS, LENGTH, LENGTH)).masked_fill(hidden, -torch.inf)
    factors = torch.randn(4, HEADS, NEURONS, LENGTH)
    factors[0::2] *= scale
    growths = [] if growth is None else [*(1 + growth * torch.rand(2, HEADS, NEURONS, LENGTH))]
    return logits, torch.randn(HEADS, LENGTH, SIZE), torch.rand(HEADS, LENGTH).round(), factors, growths


def shaped(parts):
    """Broadcast alternately by query and by key."""
    return [part.unsqueeze(-2 if number % 2 else -1) for number, part in enumerate(parts)]


def forms_of(logits, value, weight, grows=False):
    return BlockForms(logits, logits.amax(-1, keepdim=True), value, weight, grows)


def form(name, logits, value, weight, grows):
    if name == "plain":
        return plain_block(logits, value, weight)
    return getattr(forms_of(logits, value, weight, grows), name)


def squares(name, logits, value, weight, factors, growths):
    block = form(name, logits, value, weight, bool(growths))
    return block.squares(block.changed(shaped(factors), shaped(growths)))


def reference(logits, value, weight, factors, growths):
    """Compute the squared changes in float64, as they are defined."""
    a, b, c, d = shaped(factors.double())
    grown = logits.double().unsqueeze(1)
    for growth in shaped(growths):
        grown = grown * growth.double()
    change = (grown - a * b - c * d).softmax(-1) - logits.double().softmax(-1).unsqueeze(1)
    moved = (change @ value.double().unsqueeze(1)).square().sum(-1)
    return (moved * weight.double().unsqueeze(1)).sum(-1)


@pytest.mark.parametrize("name", ["powers", "softmax", "plain"])
@pytest.mark.parametrize("growth", [None, 0.5])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 4.0])
def test_all_forms_equal_the_definition(name, growth, scale):
    case = random_case(scale, growth)
    torch.testing.assert_close(squares(name, *case).double(), reference(*case), rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["powers", "softmax", "plain"])
@pytest.mark.parametrize("growth", [None, 0.0])
def test_squares_without_a_change_are_nearly_zero(name, growth):
    """They aren't exactly zero, because the last elements of a tensor may be rounded differently."""
    assert squares(name, *random_case(0.0, growth)).max() < 1e-11


@pytest.mark.parametrize("name", ["powers", "softmax", "plain"])
def test_selected_heads_give_their_own_squares(name):
    logits, value, weight, factors, growths = random_case(1.0, 0.5)
    every = form(name, logits, value, weight, True)
    expected = every.squares(every.changed(shaped(factors), shaped(growths)))
    for heads in (slice(1, 3), torch.tensor([2, 0, 2])):
        some = every.of_heads(heads)
        parts = ([part[heads] for part in whole] for whole in (factors, growths))
        torch.testing.assert_close(some.squares(some.changed(*map(shaped, parts))), expected[heads])


@pytest.mark.parametrize("sign", [1, -1])
def test_powers_are_accurate_up_to_the_limit_of_their_use(sign):
    """A row's logits all move by just under the 40 bits up to which powers are used; twice as much is too far."""
    bits = 39.9
    logits, value = torch.zeros(1, 1, 2), torch.tensor([[[1.0], [-1.0]]])
    factors = torch.tensor([sign, bits / log2(e), 0, 0]).view(4, 1, 1, 1) * torch.tensor([1.0, 1.0])
    factors[1, ..., 1] *= 0.99
    row = factors[0, ..., :1], factors[1], factors[2, ..., :1], factors[3]
    block = form("powers", logits, value, torch.ones(1, 1), False)
    actual = block.squares(block.changed(shaped(row), []))
    truth = (-(row[0].double() * row[1].double())).softmax(-1) @ torch.tensor([1.0, -1.0]).double()
    torch.testing.assert_close(actual.double().squeeze(), truth.square().squeeze(), rtol=1e-4, atol=0)
    change = LogitChange(*(part.mT.unsqueeze(0) for part in factors))
    far = LogitChange(*(part.mT.unsqueeze(0) for part in (2 * factors[0], *factors[1:])))
    assert bits_moved(change, torch.zeros(1, 1)).max() < 40 < bits_moved(far, torch.zeros(1, 1)).min()


def test_form_is_chosen_for_each_neuron_separately():
    """Neurons that move logits beyond the limit, or by NaN, take the softmax, the others the powers, bit for bit."""
    logits, value, weight, factors, growths = random_case(2.0)
    forms, parts = forms_of(logits, value, weight), shaped(factors)
    bits = torch.full((HEADS, NEURONS), 40.0)
    powers, softmax = (getattr(forms, name) for name in ("powers", "softmax"))
    powers, softmax = (block.squares(block.changed(parts, growths)) for block in (powers, softmax))
    assert torch.equal(forms.squares(slice(None), parts, growths, bits), powers)
    bits[0, 1], bits[2, 3] = 40.1, torch.nan
    actual = forms.squares(slice(None), parts, growths, bits)
    assert torch.equal(actual, torch.where(bits == 40.0, powers, softmax)) and not torch.equal(actual, powers)


def test_powers_are_accurate_for_large_logits_that_grow():
    """Powers of two with exponents of hundreds would leave float32's range."""
    logits, *case = random_case(1.0, 1e-3)
    case = 40 * logits, *case
    assert case[0].max() * log2(e) > 200
    actual, truth = squares("powers", *case).double().sqrt(), reference(*case).sqrt()
    torch.testing.assert_close(actual, truth, rtol=1e-3, atol=1e-5 * truth.max().item())


@pytest.mark.parametrize("size", [1e-12, 1e8])
def test_powers_are_accurate_for_values_of_any_size(size):
    logits, value, weight, factors, growths = random_case(3.0)
    expected = squares("softmax", logits, value, weight, factors, growths)
    actual = squares("powers", logits, size * value, weight, factors, growths)
    torch.testing.assert_close(actual / size / size, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("common", [30, 3000])
def test_powers_and_softmax_agree_where_large_logits_are_rounded(common):
    """Either form may compute a neuron, so they must differ by less than the margin that pruning adds to its bounds."""
    logits, value, weight, factors, growths = random_case(2.0)
    case = logits * (1 + common / 30), value, weight, factors, growths
    powers, softmax = squares("powers", *case).sqrt(), squares("softmax", *case).sqrt()
    torch.testing.assert_close(powers, softmax, rtol=ROUNDING_MARGIN, atol=1e-5 * softmax.max().item())


def test_bits_moved_includes_growth_and_keeps_nan():
    factors = torch.rand(4, 1, 1, 4, 3)
    factors[0::2, ..., 2] = 0
    plain, grown = (
        bits_moved(LogitChange(*factors, growth), torch.tensor([[15.0]]))
        for growth in (None, torch.tensor([1.0, 3.0, 1.0]).expand(1, 1, 4, 3))
    )
    torch.testing.assert_close(grown - plain, torch.tensor([[[0.0, 30 * log2(e), 0.0]]]))
    assert plain[..., :2].all() and plain[..., 2] == 0
    factors[1, ..., 3, 0] = torch.nan
    assert bits_moved(LogitChange(*factors), torch.zeros(1, 1))[..., 0].isnan().all()
