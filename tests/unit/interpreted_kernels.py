"""The kernel on a CPU. `test_kernels.py` runs this file, with Triton's interpreter switched on before Triton is loaded."""

from dataclasses import replace

import pytest
import torch
from conftest import padded_batch, tiny_llama
from kernel_cases import assert_equals_the_reference, assert_nan_is_not_lost, random_case, reference
from test_families import family_model
from test_pruning import all_bounds_hold, pruned_impacts

from agnostic_train.decoder import find_decoder
from agnostic_train.impact import kernels, neuron_impacts
from agnostic_train.impact.attention import AttentionInputs, LogitChange, OutputChange
from agnostic_train.impact.sieve import num_top
from agnostic_train.top_counts import in_top


def small_llama():
    return tiny_llama(num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)


@pytest.mark.parametrize("head_dim", [6, 42, 64, 123])
@pytest.mark.parametrize("length", [1, 6, 17, 42, 123])
def test_odd_sizes(length, head_dim):
    assert_equals_the_reference(random_case(length, head_dim))


@pytest.mark.parametrize("mask", ["sliding window", "left padding", "right padding", "full"])
@pytest.mark.parametrize("length", [17, 123])
def test_masks(length, mask):
    assert_equals_the_reference(random_case(length, 42, mask))


@pytest.mark.parametrize("mask", ["causal", "right padding"])
def test_logits_that_grow(mask):
    assert_equals_the_reference(random_case(42, 42, mask, growth=0.5))


@pytest.mark.parametrize("head_dim", [128, 256])
def test_heads_of_large_models(head_dim):
    assert_equals_the_reference(random_case(42, head_dim))


def test_large_logits():
    """Logits of hundreds, whose own rounding is what differs; a change of hundreds; all below zero."""
    assert_equals_the_reference(random_case(70, 42, logits=300.0), rtol=3e-4)
    assert_equals_the_reference(random_case(70, 42, change=20.0), rtol=3e-4)
    logits, *rest = random_case(70, 42, "sliding window")
    assert_equals_the_reference((logits - 1000, *rest), rtol=3e-4)


def test_keys_that_only_the_change_brings_up():
    """Their block has no weight before it, in the only row that is counted."""
    logits, value, weight, factors, neurons = random_case(123, 42)
    weight[:, :-1] = 0
    weight[:, -1] = 1
    logits[:, -1, 64:] -= 500
    factors[0][:, -1], factors[1][:, 64:] = -1, 600
    assert_equals_the_reference((logits, value, weight, factors, neurons), rtol=3e-4)


def test_small_changes_and_none():
    """Changes of a few ten-thousandths keep the digits that a weight has left; no change is none to the last bit."""
    assert_equals_the_reference(random_case(42, 42, change=0.02), rtol=1e-3)
    logits, value, weight, factors, neurons = random_case(70, 42)
    factors[0], factors[2] = torch.zeros_like(factors[0]), torch.zeros_like(factors[2])
    assert torch.equal(kernels.squared_changes(logits, value, weight, factors, neurons), torch.zeros(len(neurons)))


@pytest.mark.parametrize("counted", ["none", "last"])
def test_rows_that_are_not_counted(counted):
    logits, value, weight, factors, neurons = random_case(123, 42)
    weight.zero_()
    if counted == "last":
        weight[:, -1] = 1
    expected = reference(logits, value, weight, factors, neurons)
    for part in (logits, factors[0], factors[2]):
        part[:, :-1] = torch.nan
    found = kernels.squared_changes(logits, value, weight, factors, neurons)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("where", ["logits", "a", "b", "value"])
def test_what_is_not_a_number_is_not_lost(where):
    assert_nan_is_not_lost(where)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_taken_from_unseen_keys_does_not_matter():
    logits, value, weight, factors, neurons = random_case(42, 42)
    weight[:, -1] = 0
    expected = kernels.squared_changes(logits, value, weight, factors, neurons)
    factors[1][:, -1] = factors[3][:, -1] = torch.inf
    assert torch.equal(kernels.squared_changes(logits, value, weight, factors, neurons), expected)


def test_parts_of_rows_keys_and_neurons():
    """Blocks of rows add up, whatever keys they can't see are left out; neurons in any order, or none; any strides."""
    logits, value, weight, factors, neurons = random_case(123, 42, "sliding window")
    whole = kernels.squared_changes(logits, value, weight, factors, neurons)
    blocks = [(slice(0, 31), slice(0, 31)), (slice(31, 100), slice(27, 100)), (slice(100, 123), slice(33, 123))]
    logits, value, weight, *factors = (it.mT.contiguous().mT for it in (logits, value, weight, *factors))
    chosen = torch.tensor([5, 1, 0, 1, 3, 1, 0])[::2]
    parts = [kernels.squared_changes(logits, value, weight, factors, chosen, *block) for block in blocks]
    torch.testing.assert_close(sum(parts), whole[chosen], rtol=1e-5, atol=0)
    assert kernels.squared_changes(logits, value, weight, factors, chosen[:0]).shape == (0,)


@pytest.mark.parametrize("grows", [None, "row_growth", "column_growth"])
@pytest.mark.parametrize("common", [0.0, 1e4])
def test_equals_the_torch_form(common, grows, monkeypatch):
    """Through `OutputChange`, from tensors that aren't contiguous, and whatever all values share."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 21, 3, 10).transpose(1, 2) for _ in range(3))
    value += common
    real, visible = torch.ones(2, 21, dtype=torch.bool), torch.ones(2, 1, 21, 21).tril().bool()
    inputs = AttentionInputs.clean(query, key, value, visible, real, 0.7)
    change = OutputChange(inputs, torch.rand(2, 21) < 0.8, 1 << 20)
    logit_change = LogitChange(*(torch.randn(2, 21, 3, 10).transpose(1, 2) for _ in range(4)))
    if grows:
        logit_change = replace(logit_change, **{grows: 1 + torch.rand(2, 3, 21, 10)})
    expected = change.of_logits(logit_change)
    monkeypatch.setattr(kernels, "available", lambda value: True)
    monkeypatch.setattr(OutputChange, "_squares", None)
    torch.testing.assert_close(change.of_logits(logit_change), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("family", "side", "attention"),
    [("Llama", "left", "exact"), ("Llama", "right", "paper"), ("Qwen3", "right", "exact")],
)
def test_the_sieve_finds_the_same_top(family, side, attention, monkeypatch):
    """With the kernel everywhere; all impacts are the torch form's, and pruning still leaves some out."""
    model = small_llama() if family == "Llama" else family_model(family)
    batch = padded_batch([1, 31], side)
    expected = neuron_impacts(model, batch, ["q", "k"], attention)
    monkeypatch.setattr(kernels, "available", lambda value: True)
    unpruned = neuron_impacts(model, batch, ["q", "k"], attention)
    impacts, _ = pruned_impacts(model, batch, 0.1, attention)
    for site, values in expected.items():
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * values.max().item()}
        torch.testing.assert_close(unpruned[site], values, **tolerance)
        torch.testing.assert_close(impacts[site], torch.where(impacts[site] > 0, values, 0), **tolerance)
        count = num_top(0.1, values.shape[1])
        for found in (unpruned[site], impacts[site]):
            assert torch.equal(in_top(found, count), in_top(values, count))
    assert (impacts[(0, "q")] == 0).any() and (unpruned[(0, "q")][1] > 0).all()


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_the_bounds_hold(scale, monkeypatch):
    """Where all impacts are in the noise, and where attention sees one key."""
    model = small_llama()
    with torch.no_grad():
        find_decoder(model).layers[0].projections["q"].linear.weight.mul_(scale)
    monkeypatch.setattr(kernels, "available", lambda value: True)
    assert all_bounds_hold(model, padded_batch([26]), monkeypatch) > 50
