"""The Triton kernel on a GPU: against float64, against the torch form on the same GPU, and against the CPU."""

import copy

import pytest
import torch
from conftest import padded_batch
from kernel_cases import HEADS, NEURONS, assert_equals_the_reference, assert_nan_is_not_lost, random_case
from test_families import family_model

from agnostic_train.impact import ImpactMeter, kernels, neuron_impacts
from agnostic_train.impact.sieve import num_top
from agnostic_train.inference import left_as_found
from agnostic_train.top_counts import in_top

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(kernels.triton is None, reason="needs triton"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs an Ampere GPU or later"
    ),
]
MASKS = ["causal", "sliding window", "left padding", "right padding", "full"]
LENGTHS = [1, 6, 17, 42]
# Of a site's largest impact, between the CPU and the GPU: the projections round in the model's type, and differently.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def test_it_is_used():
    assert kernels.available(torch.zeros(1, 4, 8, device="cuda"))
    assert not kernels.available(torch.zeros(1, 4, 8, device="cuda", dtype=torch.float64))
    assert not kernels.available(torch.zeros(1, 4, kernels.LARGEST_HEAD + 1, device="cuda"))


@pytest.mark.parametrize("growth", [0.0, 0.5])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [6, 42, 64, 96, 123, 128, 256])
def test_equals_the_reference(head_dim, mask, growth):
    """As exact as float32: tensor cores that multiplied in one part would be ten times off and more."""
    for length in (1, 6, 17, 42, 64, 123, 300):
        assert_equals_the_reference(random_case(length, head_dim, mask, device="cuda", growth=growth))


@pytest.mark.parametrize("head_dim", [42, 64, 128, 256])
def test_no_change_is_none_and_every_run_the_same(head_dim):
    logits, value, weight, factors, neurons = random_case(300, head_dim, device="cuda")
    found = [kernels.squared_changes(logits, value, weight, factors, neurons) for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    factors[0], factors[2] = torch.zeros_like(factors[0]), torch.zeros_like(factors[2])
    assert not kernels.squared_changes(logits, value, weight, factors, neurons).any()


@pytest.mark.parametrize("where", ["logits", "a", "b", "value"])
def test_what_is_not_a_number_is_not_lost(where):
    assert_nan_is_not_lost(where, device="cuda")


def test_more_logits_than_32_bits_count():
    length, num_heads = 4096, 130
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of the GPU's memory")
    logits, *rest = random_case(length, 64, device="cuda")
    assert num_heads * length**2 > 2**31 and HEADS == 3
    expected = kernels.squared_changes(logits, *rest)[-NEURONS:]
    many = torch.full((num_heads, length, length), -torch.inf, device="cuda")
    many[-1] = logits[-1]
    value, weight, factors, _ = rest
    value, weight = (torch.cat([it[:1].expand(num_heads - 1, *it.shape[1:]), it[-1:]]) for it in (value, weight))
    factors = [torch.cat([it[:1].expand((num_heads - 1) * NEURONS, -1), it[-NEURONS:]]) for it in factors]
    neurons = torch.arange((num_heads - 1) * NEURONS, num_heads * NEURONS, device="cuda")
    assert torch.equal(kernels.squared_changes(many, value, weight, factors, neurons), expected)


@pytest.mark.parametrize("attention", ["exact", "paper"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", ["Llama with biases", "Qwen3", "Gemma 3 text"])
def test_models(family, dtype, side, attention, monkeypatch):
    """The impacts are the CPU's and, much more closely, the torch form's; pruned, the top is the same."""
    model, batch = family_model(family).to(dtype), padded_batch(LENGTHS, side)
    on_gpu = copy.deepcopy(model).cuda()
    by_cpu = neuron_impacts(model, batch, ["q", "k"], attention)
    by_kernel = neuron_impacts(on_gpu, batch, ["q", "k"], attention)
    with left_as_found(on_gpu), ImpactMeter(on_gpu, ["q", "k"], attention, top_ratio=0.1) as meter:
        pruned = meter.measure(batch)
    monkeypatch.setattr(kernels, "available", lambda value: False)
    by_torch = neuron_impacts(on_gpu, batch, ["q", "k"], attention)
    for site, values in by_kernel.items():
        assert values.is_cuda and values.dtype == torch.float32
        largest = by_cpu[site].max().item()
        torch.testing.assert_close(values.cpu(), by_cpu[site], rtol=0, atol=TOLERANCES[dtype] * largest)
        torch.testing.assert_close(values, by_torch[site], rtol=1e-4, atol=1e-5 * largest)
        count = num_top(0.1, values.shape[1])
        assert torch.equal(in_top(pruned[site], count), in_top(values, count))
        kept = torch.where(pruned[site] > 0, values, 0)
        torch.testing.assert_close(pruned[site], kept, rtol=1e-3, atol=1e-5 * largest)
