"""The Triton kernels on a GPU, compared with float64, with the torch form on the same GPU, and with the CPU."""

import copy

import pytest
import torch
from conftest import padded_batch
from kernel_cases import (
    assert_equals_the_reference,
    assert_heads_of_one_sentence_share_its_spans,
    assert_intervals_hold,
    assert_nan_is_not_lost,
    assert_tanh_is_close,
    intervals_of,
    random_case,
)
from test_families import family_model

from agnostic_train.detection.top_counts import TopCounts, in_top
from agnostic_train.impact import kernel_trial, kernels
from agnostic_train.impact.hooks import ImpactMeter, unverified_impacts
from agnostic_train.impact.pruning import num_top
from agnostic_train.model.inference import left_as_found

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
# Between CPU and GPU, relative to a site's largest impact: the projections round in the model's dtype, differently.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def test_kernels_are_available_for_supported_dtypes_and_sizes():
    assert kernel_trial.available(torch.zeros(1, 4, 8, device="cuda"))
    assert not kernel_trial.available(torch.zeros(1, 4, 8, device="cuda", dtype=torch.float64))
    assert not kernel_trial.available(torch.zeros(1, 4, kernels.MAX_HEAD_DIM + 1, device="cuda"))


@pytest.mark.parametrize("more", [{}, {"growth": 0.5}, {"softcap": 5.0}])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [6, 42, 64, 96, 123, 128, 256])
def test_kernel_equals_the_reference(head_dim, mask, more):
    """Accurate to float32: tensor cores with single TF32 products would be off more than ten times as much."""
    for length in (1, 6, 17, 42, 64, 123, 200, 300):
        assert_equals_the_reference(random_case(length, head_dim, mask, device="cuda", **more))


@pytest.mark.parametrize("more", [{}, {"growth": 0.3}, {"softcap": 50.0}, {"softcap": 3.0}])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [6, 42, 64, 96, 123, 128, 256])
def test_intervals_hold(head_dim, mask, more):
    for length in (1, 6, 17, 42, 64, 123, 200, 300):
        for logits, change in ((3.0, 1.0), (0.5, 0.1), (1.0, 1e-3), (3.0, 4.0)):
            assert_intervals_hold(random_case(length, head_dim, mask, logits, change, "cuda", **more))


@pytest.mark.parametrize("head_dim", [6, 64, 123, 256])
def test_intervals_are_narrow(head_dim):
    assert assert_intervals_hold(random_case(300, head_dim, change=0.5, device="cuda")) < 0.05


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("head_dim", [42, 64, 128, 256])
def test_no_change_gives_zero_and_runs_are_reproducible(head_dim, softcap):
    case = random_case(300, head_dim, device="cuda", neurons=kernels.GROUP + 3, softcap=softcap)
    results = [kernels.squared_changes(**case) for _ in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    a, b, c, d = case["factors"]
    case["factors"] = [torch.zeros_like(a), b, torch.zeros_like(c), d]
    assert not kernels.squared_changes(**case).any()


def test_heads_of_one_sentence_share_spans():
    assert_heads_of_one_sentence_share_its_spans("cuda")


def test_tanh_of_the_kernels_is_accurate():
    assert_tanh_is_close("cuda")


@pytest.mark.parametrize("where", ["logits", "a", "b", "centred_value"])
def test_nan_is_not_lost(where):
    assert_nan_is_not_lost(where, device="cuda")


def test_more_logits_than_a_32_bit_index_holds():
    length, num_heads = 4096, 130
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of the GPU's memory")
    few = random_case(length, 64, device="cuda")
    assert num_heads * length**2 > 2**31
    many = {
        name: [_last_of_many(it, num_heads) for it in part] if name == "factors" else _last_of_many(part, num_heads)
        for name, part in few.items()
    }
    expected = kernels.squared_changes(**few)[-1]
    torch.testing.assert_close(kernels.squared_changes(**many)[-1], expected, rtol=1e-6, atol=0)
    low, high = (end[-1] for end in intervals_of(many))
    assert (low <= expected).all() and (expected <= high).all()


def _last_of_many(part, num_heads):
    """Return the last head's part after copies of the first head's part."""
    return torch.cat([part[:1].repeat(num_heads - 1, *[1] * (part.dim() - 1)), part[-1:]])


@pytest.mark.parametrize("attention", ["exact", "paper"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", ["Llama with biases", "Qwen3", "Gemma 2", "Gemma 3 text"])
def test_model_impacts_equal_cpu_and_torch_form(family, dtype, side, attention, monkeypatch):
    """Impacts equal the CPU's and, much more closely, the torch form's; with pruning, the top is the same."""
    model, batch = family_model(family).to(dtype), padded_batch(LENGTHS, side)
    on_gpu = copy.deepcopy(model).cuda()
    by_cpu = unverified_impacts(model, batch, ["q", "k"], attention)
    by_kernel = unverified_impacts(on_gpu, batch, ["q", "k"], attention)
    with left_as_found(on_gpu), ImpactMeter(on_gpu, ["q", "k"], attention, top_ratio=0.1) as meter:
        pruned = meter.measure(batch)
    # With a ratio of 1, no neuron is decided by its interval, and every impact is exact.
    with left_as_found(on_gpu), ImpactMeter(on_gpu, ["q", "k"], attention, top_ratio=1.0) as meter:
        in_full = meter.measure(batch)
    monkeypatch.setattr(kernel_trial, "available", lambda *_: False)
    by_torch = unverified_impacts(on_gpu, batch, ["q", "k"], attention)
    for site, values in by_kernel.items():
        assert values.is_cuda and values.dtype == torch.float32
        largest = by_cpu[site].max().item()
        torch.testing.assert_close(values.cpu(), by_cpu[site], rtol=0, atol=TOLERANCES[dtype] * largest)
        torch.testing.assert_close(values, by_torch[site], rtol=1e-4, atol=1e-5 * largest)
        torch.testing.assert_close(in_full[site], values, rtol=1e-4, atol=1e-5 * largest)
        count = num_top(0.1, values.shape[1])
        assert torch.equal(in_top(pruned[site], count), in_top(values, count))
        # A neuron certainly in the top reports the middle of a narrow interval, or the lower end of a wide one.
        assert (pruned[site] <= 1.5 * values + 1e-5 * largest).all()


def test_detection_does_not_synchronise_with_the_device():
    """No layer of a pass reads a value back from the GPU, so the CPU can run ahead."""
    model = family_model("Llama with biases").cuda()
    batch = {name: values.cuda() for name, values in padded_batch(LENGTHS).items()}
    with left_as_found(model), ImpactMeter(model, top_ratio=0.1) as meter:
        # The first batch compiles the kernels and determines the rotation.
        meter.measure(batch)
        counts = TopCounts(0.1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            counts.add(meter.measure(batch))
        finally:
            torch.cuda.set_sync_debug_mode("default")
