"""The kernels on a CPU: `test_kernels.py` runs this file with Triton's interpreter on from Triton's import."""

from dataclasses import replace
from functools import partial
from math import floor, log2

import pytest
import torch
from conftest import padded_batch, tiny_llama
from kernel_cases import (
    HEADS,
    NEURONS,
    assert_equals_the_reference,
    assert_heads_of_one_sentence_share_its_spans,
    assert_intervals_hold,
    assert_nan_is_not_lost,
    assert_tanh_is_close,
    intervals_of,
    random_case,
    reference,
    tanh,
)
from test_families import family_model
from test_pruning import pruned_impacts

from agnostic_train.detection.self_check import verify_impacts
from agnostic_train.detection.top_counts import in_top
from agnostic_train.errors import UserError
from agnostic_train.impact import kernel_trial, kernels
from agnostic_train.impact.attention import AttentionInputs, LogitChange
from agnostic_train.impact.attention_block import AttentionBlock
from agnostic_train.impact.hooks import unverified_impacts
from agnostic_train.impact.intervals import Intervals
from agnostic_train.impact.kernels import squared_changes
from agnostic_train.impact.layer_attention import LayerAttention
from agnostic_train.impact.pruning import num_top
from agnostic_train.impact.visibility import Visibility
from agnostic_train.model.decoder import find_decoder

SMALL = dict(num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)


def small_llama(head_dim=6):
    return tiny_llama(**SMALL, head_dim=head_dim)


@pytest.mark.parametrize("head_dim", [6, 42, 64, 123])
@pytest.mark.parametrize("length", [1, 6, 17, 42, 123])
def test_odd_sizes(length, head_dim):
    assert_equals_the_reference(random_case(length, head_dim))


@pytest.mark.parametrize("grows, capped", [(False, False), (True, False), (False, True), (True, True)])
def test_kernels_are_tried_before_use(monkeypatch, grows, capped):
    """Kernels that a device computes wrongly aren't used there, even if they are off by little."""
    works = partial(kernel_trial._work_on.__wrapped__, torch.device("cpu"), 10, 38, grows, capped)
    assert works()
    with monkeypatch.context() as patch:
        patch.setattr(kernel_trial, "squared_changes", lambda *args, **more: squared_changes(*args, **more) * 1.001)
        assert not works()
    for part in () if grows and capped else (0.5, 2.0):
        with monkeypatch.context() as patch:
            patch.setattr(
                Intervals,
                "around",
                lambda *args, part=part, around=Intervals.around: [it * part for it in around(*args)],
            )
            assert not works()


@pytest.mark.parametrize("mask", ["sliding window", "left padding", "right padding", "full"])
@pytest.mark.parametrize("length", [17, 123])
def test_masks(length, mask):
    assert_equals_the_reference(random_case(length, 42, mask))


@pytest.mark.parametrize("mask", ["causal", "right padding"])
def test_logits_that_grow(mask):
    assert_equals_the_reference(random_case(42, 42, mask, growth=0.5))


@pytest.mark.parametrize("mask", ["causal", "right padding"])
@pytest.mark.parametrize(("logits", "softcap"), [(3.0, 50.0), (3.0, 3.0), (60.0, 50.0)])
def test_capped_logits(logits, softcap, mask):
    assert_equals_the_reference(random_case(42, 42, mask, logits, softcap=softcap), rtol=1e-4)


def test_capped_logits_that_grow():
    assert_equals_the_reference(random_case(42, 42, growth=0.5, softcap=5.0))


def test_tanh_of_the_kernels_is_accurate():
    assert_tanh_is_close()


@pytest.mark.parametrize("head_dim", [128, 256])
def test_heads_of_large_models(head_dim):
    assert_equals_the_reference(random_case(42, head_dim))


def test_large_logits():
    """Logits of hundreds, which differ by their rounding; changes of hundreds; logits that are all below zero."""
    assert_equals_the_reference(random_case(70, 42, logits=300.0), rtol=3e-4)
    assert_equals_the_reference(random_case(70, 42, change=20.0), rtol=3e-4)
    case = random_case(70, 42, "sliding window")
    assert_equals_the_reference(case | {"logits": case["logits"] - 1000}, rtol=3e-4)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("softcap", [None, 1000.0])
def test_keys_that_only_the_change_makes_relevant(softcap):
    """Their block has no attention weight before the change in the only row that is counted."""
    case = random_case(123, 42, softcap=softcap)
    case["weight"][:, :-1] = 0
    case["weight"][:, -1] = 1
    case["logits"][:, -1, 64:] -= 500
    case["factors"][0][:, -1], case["factors"][1][:, 64:] = -1, 600
    assert_equals_the_reference(case, rtol=3e-4)
    assert_intervals_hold(case)


def without_change(case):
    a, b, c, d = case["factors"]
    return case | {"factors": [torch.zeros_like(a), b, torch.zeros_like(c), d]}


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_small_changes_and_no_change(softcap):
    """Changes of a few ten-thousandths keep the digits that float32 leaves; no change gives exactly zero.

    The intervals of no change end within rounding.
    """
    assert_equals_the_reference(random_case(42, 42, change=0.02, softcap=softcap), rtol=1e-3)
    case = without_change(random_case(70, 42, softcap=softcap))
    assert torch.equal(kernels.squared_changes(**case), torch.zeros(HEADS, NEURONS))
    low, high = intervals_of(case)
    assert not low.any() and (high < (2e-6 if softcap else 1e-6)).all()


@pytest.mark.parametrize("counted", ["none", "last"])
def test_rows_that_are_not_counted_do_not_matter(counted):
    case = random_case(123, 42)
    case["weight"].zero_()
    if counted == "last":
        case["weight"][:, -1] = 1
    expected = reference(**case)
    for part in (case["logits"], case["factors"][0], case["factors"][2]):
        part[:, :-1] = torch.nan
    actual = kernels.squared_changes(**case)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("where", ["logits", "a", "b", "centred_value"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_is_not_lost(where):
    assert_nan_is_not_lost(where)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_changes_of_unseen_keys_do_not_matter():
    case = random_case(42, 42)
    case["weight"][:, -1] = 0
    expected = kernels.squared_changes(**case)
    case["factors"][1][:, -1] = case["factors"][3][:, -1] = torch.inf
    assert torch.equal(kernels.squared_changes(**case), expected)


def test_heads_of_one_sentence_share_spans():
    assert_heads_of_one_sentence_share_its_spans()


def test_some_of_many_neurons(monkeypatch):
    """More neurons than one program takes, with the last program not full; any strides; neurons not chosen are zero."""
    monkeypatch.setattr(kernels, "GROUP", 4)
    case = random_case(42, 10, neurons=kernels.GROUP + 3)
    whole = kernels.squared_changes(**case)
    torch.testing.assert_close(whole.double(), reference(**case), rtol=1e-5, atol=0)
    assert_intervals_hold(case)
    chosen = torch.rand(whole.shape) < 0.3
    strided = {
        name: [it.mT.contiguous().mT for it in part] if isinstance(part, list) else part.mT.contiguous().mT
        for name, part in case.items()
        if name != "spans"
    }
    actual = kernels.squared_changes(**strided, spans=case["spans"], chosen=chosen)
    assert torch.equal(actual, torch.where(chosen, whole, 0))
    for actual, expected in zip(intervals_of(strided | {"spans": case["spans"]}), intervals_of(case), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


def test_values_may_have_any_strides():
    """Also if neither their length nor their size is padded, which would copy them."""
    case = random_case(64, 16)
    strided = case | {"centred_value": case["centred_value"].mT.contiguous().mT}
    for actual, expected in zip(intervals_of(strided), intervals_of(case), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("mask", ["causal", "sliding window", "left padding", "right padding", "full"])
@pytest.mark.parametrize("length", [17, 70])
def test_intervals_hold(length, mask):
    """Logits and changes have sizes as in trained models; also with growth."""
    assert_intervals_hold(random_case(length, 42, mask))
    assert_intervals_hold(random_case(length, 42, mask, logits=0.8, change=0.3, growth=0.3))


@pytest.mark.parametrize(("length", "mask"), [(130, "causal"), (250, "sliding window"), (260, "causal")])
def test_intervals_of_long_sentences_hold(length, mask):
    """The kernel keeps up to 256 keys in registers; some blocks of keys aren't seen or don't exist."""
    assert assert_intervals_hold(random_case(length, 10, mask, change=0.5)) < 0.03


@pytest.mark.parametrize(("logits", "change"), [(0.5, 0.1), (1.0, 1e-3)])
def test_intervals_of_small_changes_hold(logits, change):
    """Sizes as in early checkpoints, and within rounding noise."""
    for mask in ("causal", "left padding"):
        assert_intervals_hold(random_case(70, 42, mask, logits, change))
    for mask in ("causal", "sliding window", "left padding", "right padding", "full"):
        assert_intervals_hold(random_case(17, 42, mask, logits, change))


@pytest.mark.parametrize("mask", ["causal", "right padding"])
def test_intervals_of_capped_logits_hold(mask):
    """From a cap with hardly any effect to one that most logits reach."""
    for logits, change, softcap in ((3.0, 1.0, 50.0), (3.0, 0.1, 3.0), (3.0, 2.0, 3.0), (1.0, 1e-3, 5.0)):
        assert_intervals_hold(random_case(70, 42, mask, logits, change, softcap=softcap))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value", "ignore:divide by zero")
@pytest.mark.parametrize("softcap", [1.0, 50.0])
def test_intervals_of_logits_at_their_cap_hold(softcap):
    """Where the cap makes logits equal in float32, an interval may have no upper end."""
    case = random_case(70, 42, logits=12 * softcap, change=3.0, softcap=softcap)
    low, high = intervals_of(case)
    exact = kernels.squared_changes(**case)
    assert low.isfinite().all() and not high.isnan().any()
    assert (low <= exact * (1 + 1e-4)).all() and (exact <= high * (1 + 1e-4)).all()


@pytest.mark.parametrize(
    ("head_dim", "more"),
    [
        *((head_dim, {}) for head_dim in (6, 64, 123, 256)),
        *((42, more) for more in ({"growth": 0.2}, {"softcap": 50.0}, {"softcap": 5.0})),
        (256, {"growth": 0.2}),
        (123, {"softcap": 5.0}),
    ],
)
def test_intervals_are_narrow(head_dim, more):
    assert assert_intervals_hold(random_case(70, head_dim, change=0.5, **more)) < 0.03


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize(("common", "size", "width"), [("b", 30, 0.05), ("b", 1000, 0.1), ("value", 30, 0.05)])
def test_common_part_leaves_intervals_narrow(common, size, width):
    """The softmax ignores what all keys share, and the change of the output what all values share."""
    case = random_case(70, 42, change=0.3)
    if common == "b":
        case["factors"][1] += size
    else:
        case["centred_value"] += size
    truth = reference(**case)
    low, high = intervals_of(case)
    assert (low <= truth).all() and (truth <= high).all()
    assert ((high.sqrt() - low.sqrt()) / truth.sqrt()).mean() < width


def two_keys(logits, factors, growths=()):
    """Return a case of one head in which only the last row counts and sees two keys of opposite values."""
    visible = torch.ones(1, 1, 2, 2).tril().bool()
    return {
        "logits": torch.tensor([[[0.0, 0.0], logits]]).masked_fill(~visible[0], -torch.inf),
        "centred_value": torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]),
        "weight": torch.tensor([[0.0, 1.0]]),
        "factors": [torch.tensor(factor).unsqueeze(2) for factor in factors],
        "spans": kernels.key_spans(visible),
    } | ({"growths": [torch.tensor(growth).unsqueeze(2) for growth in growths]} if growths else {})


@pytest.mark.parametrize(
    ("logits", "lifted_by", "growths"),
    [([0.0, -88.0], 88.0, ()), ([88.0, 0.1], 0.0, ([[1.0, 1.0]], [[1.0, 880.0]]))],
)
def test_intervals_cover_a_key_without_attention_that_becomes_relevant(logits, lifted_by, growths):
    """A GPU rounds its weight to zero, so that only the bound on the change shows that the output moves."""
    none = [[0.0, 0.0]]
    case = two_keys(logits, [[[0.0, -1.0]], [[0.0, lifted_by]], none, none], growths)
    attention = case["logits"].softmax(-1)
    attention[attention < torch.finfo(torch.float32).tiny] = 0
    assert attention[0, 1].tolist() == [1, 0]
    largest = torch.tensor([max(map(abs, logits))])
    intervals = Intervals(case["logits"], attention, case["centred_value"], case["weight"], case["spans"], largest)
    low, high = intervals.around(case["factors"], case.get("growths", ()))
    truth = reference(**case)
    assert truth > 0.5 and low <= truth <= high


@pytest.mark.parametrize("logit", [30.0, 257.0, 2000.0])
@pytest.mark.parametrize("part", [0.99, 1.01])
def test_intervals_cover_the_two_roundings_of_large_logits(logit, part):
    """Two changes are each slightly below or above half a unit in the last place of the logits."""
    change = part * 2.0 ** (floor(log2(logit)) - 24)
    row, keys = [[0.0, change]], [[-1.0, 1.0]]
    assert_intervals_hold(two_keys([logit, logit], [row, keys, row, keys]))


@pytest.mark.parametrize("largest", [30.0, 257.0, 515.0])
def test_intervals_cover_the_rounding_of_growing_logits(largest):
    """The changes cancel the growth, so that only rounding moves the logits; of many random cases, take the worst."""
    generator = torch.Generator().manual_seed(0)
    row = 1 + 0.01 * torch.rand(100_000, 1, generator=generator)
    column = 1 + 1e-3 * torch.rand(100_000, 2, generator=generator)
    logits = largest + torch.rand(100_000, 2, generator=generator)
    off = (logits * row * column).double() - logits.double() * row.double() * column.double()
    worst = (off[:, 0] - off[:, 1]).abs().argmax()
    row, column, logits = row[worst], column[worst], logits[worst]
    grown = logits.double() * (row.double() * column.double() - 1)
    rest = (grown - grown.float().double()).float()
    ones = [[0.0, 1.0]]
    factors = [ones, [grown.float().tolist()], ones, [rest.tolist()]]
    assert_intervals_hold(two_keys(logits.tolist(), factors, ([[1.0, float(row)]], [column.tolist()])))


def test_intervals_cover_the_rounding_of_capped_logits():
    """A negligible change moves the rounding of the hyperbolic tangent; of many logits, it moves these two most."""
    softcap, change = 3900.0, 2.0**-13
    logits = 1400 + torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    capped = torch.empty(2, len(logits))
    for row, z in zip(capped, (logits / softcap, (logits - change) / softcap), strict=True):
        tanh(z, row)
    moved = (capped[1] * softcap).double() - (capped[0] * softcap).double()
    moved -= softcap * (((logits.double() - change) / softcap).tanh() - (logits.double() / softcap).tanh())
    worst = [float(logits[moved.argmin()]), float(logits[moved.argmax()])]
    case = two_keys(worst, [[[0.0, change]], [[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    assert_intervals_hold(case | {"softcap": softcap})


@pytest.mark.parametrize("size", [1e-20, 1e-13])
def test_intervals_have_no_upper_end_if_squares_underflow(size):
    case = two_keys([1.0, 1.0], [[[0.0, 0.01]], [[-1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    low, high = intervals_of(case | {"centred_value": size * case["centred_value"]})
    assert low == 0 and high == torch.inf


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize(("logits", "change"), [(300.0, 1.0), (3.0, 4.0), (3.0, 20.0), (300.0, 300.0)])
def test_intervals_hold_where_half_precision_overflows(logits, change):
    """Such intervals may have no upper end, which costs time but loses no neuron."""
    case = random_case(70, 42, logits=logits, change=change)
    low, high = intervals_of(case)
    exact = kernels.squared_changes(**case)
    assert low.isfinite().all() and not high.isnan().any()
    assert (low <= exact * (1 + 1e-4)).all() and (exact <= high * (1 + 1e-4)).all()


@pytest.mark.parametrize(
    ("grows", "softcap", "capped"),
    [
        (None, None, True),
        ("row_growth", None, True),
        ("column_growth", None, True),
        (None, 2.0, True),
        (None, 2.0, False),
    ],
)
@pytest.mark.parametrize("common", [0.0, 1e4])
def test_kernel_equals_the_torch_form(common, grows, softcap, capped, monkeypatch):
    """Through `LayerAttention`, with non-contiguous tensors and a common part of the values."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 21, 3, 10).transpose(1, 2) for _ in range(3))
    value += common
    real, visible = torch.ones(2, 21, dtype=torch.bool), torch.ones(2, 1, 21, 21).tril().bool()
    inputs = AttentionInputs.clean(query, key, value, Visibility.of(visible, real), 0.7, softcap)
    attention = LayerAttention(inputs, torch.rand(2, 21) < 0.8, 1 << 20, capped)
    logit_change = LogitChange(*(torch.randn(2, 21, 3, 10).transpose(1, 2) for _ in range(4)))
    if grows:
        logit_change = replace(logit_change, **{grows: 1 + torch.rand(2, 3, 21, 10)})
    expected = attention.squared_changes(logit_change)
    monkeypatch.setattr(kernel_trial, "available", lambda value, grows, capped: True)
    monkeypatch.setattr(AttentionBlock, "squares", None)
    torch.testing.assert_close(attention.squared_changes(logit_change), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("family", "side", "attention"),
    [
        ("Llama", "right", "paper"),
        ("Llama with two KV heads", "left", "exact"),
        ("Qwen3", "right", "exact"),
        ("Gemma 2", "right", "exact"),
        ("Gemma 2", "left", "paper"),
    ],
)
def test_sieve_finds_the_same_top(family, side, attention, monkeypatch):
    """With the kernels, impacts equal the torch form's, and few neurons need the exact form."""
    if family == "Llama":
        model = small_llama(head_dim=10)
    elif family == "Llama with two KV heads":
        model = tiny_llama(head_dim=10, hidden_size=40, num_attention_heads=4, num_hidden_layers=1)
    else:
        model = family_model(family, **SMALL)
    batch = padded_batch([1, 17], side)
    expected = unverified_impacts(model, batch, ["q", "k"], attention)
    monkeypatch.setattr(kernel_trial, "available", lambda value, grows, capped: True)
    unpruned = unverified_impacts(model, batch, ["q", "k"], attention)
    impacts, meter = pruned_impacts(model, batch, 0.1, attention)
    for site, values in expected.items():
        torch.testing.assert_close(unpruned[site], values, rtol=1e-4, atol=1e-5 * values.max().item())
        count = num_top(0.1, values.shape[1])
        for values_found in (unpruned[site], impacts[site]):
            assert torch.equal(in_top(values_found, count), in_top(values, count))
        kept = impacts[site] > 0
        assert (kept.sum(1) <= 2 * count + 1).all()
        torch.testing.assert_close(impacts[site][kept], values[kept], rtol=0.03, atol=0)
    for work in meter.work.values():
        # All neurons in the sentence of one token, whose impacts are all zero, and few in the other sentence.
        assert work.neurons < 0.65 * work.all_neurons and 0 < work.logits < work.rough_logits <= work.all_logits


def test_norm_over_all_heads_uses_the_kernel(monkeypatch):
    """The kernel computes the changes in the heads of each neuron."""
    model, batch = family_model("OLMo 2", num_hidden_layers=1), padded_batch([1, 17], "left")
    expected = unverified_impacts(model, batch, ["q", "k"])
    monkeypatch.setattr(kernel_trial, "available", lambda value, grows, capped: True)
    monkeypatch.setattr(AttentionBlock, "squares", None)
    for top_ratio in (0.1, 1.0):
        impacts, meter = pruned_impacts(model, batch, top_ratio)
        for site, values in expected.items():
            count = num_top(top_ratio, values.shape[1])
            assert torch.equal(in_top(impacts[site], count), in_top(values, count))
        assert not meter.unpruned


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_sieve_finds_the_same_top_at_any_scale(scale, monkeypatch):
    """With all impacts within rounding noise, and with attention on one key; also with a top ratio of 1."""
    model = small_llama()
    with torch.no_grad():
        find_decoder(model).layers[0].projections["q"].linear.weight.mul_(scale)
    batch = padded_batch([18, 9])
    expected = unverified_impacts(model, batch, ["q", "k"])
    monkeypatch.setattr(kernel_trial, "available", lambda value, grows, capped: True)
    unpruned = unverified_impacts(model, batch, ["q", "k"])
    for top_ratio in (0.1, 0.3, 1.0):
        impacts, _ = pruned_impacts(model, batch, top_ratio)
        for site, values in unpruned.items():
            count = num_top(top_ratio, values.shape[1])
            assert torch.equal(in_top(impacts[site], count), in_top(values, count))
    torch.testing.assert_close(impacts[(0, "q")], expected[(0, "q")], rtol=1e-3, atol=1e-5 * float(values.max()))


def test_neuron_in_the_top_by_its_lower_end_has_a_finite_impact(monkeypatch):
    """If one of its rows has overflowed, its interval has no upper end."""
    model, batch = small_llama(), padded_batch([26])
    monkeypatch.setattr(kernel_trial, "available", lambda value, grows, capped: True)
    expected = pruned_impacts(model, batch, 0.1)[0]

    def without_upper_end(*args, around=Intervals.around):
        low, high = around(*args)
        return low, torch.where(low == low.max(), torch.inf, high)

    monkeypatch.setattr(Intervals, "around", without_upper_end)
    for site, values in pruned_impacts(model, batch, 0.1)[0].items():
        assert values.isfinite().all()
        assert torch.equal(values > 0, expected[site] > 0)


def test_self_check_finds_intervals_that_do_not_hold(monkeypatch):
    model, batch = small_llama(), padded_batch([26, 9])
    monkeypatch.setattr(kernel_trial, "available", lambda value, grows, capped: True)
    assert verify_impacts(model, batch)

    def too_low(*args, around=Intervals.around):
        low, high = around(*args)
        return low / 2, high / 2

    monkeypatch.setattr(Intervals, "around", too_low)
    with pytest.raises(UserError, match="detection.pruning"):
        verify_impacts(model, batch)
    assert verify_impacts(model, batch, pruning=False)
