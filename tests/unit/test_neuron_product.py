"""The fused product with a weight of which some rows or columns learn, and when the plain form replaces it."""

from threading import Thread

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from agnostic_train.training.compact import NeuronLinear
from agnostic_train.training.compact.product import can_fuse

SHAPES = [(1, 1, [0]), (6, 42, [0, 5]), (123, 7, [6])]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def neuron_linear(in_features=6, out_features=5, index=(1, 3), dim=0, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False)
    layer = NeuronLinear(base, dim)
    layer.add("default", torch.as_tensor(index))
    layer.set_adapter("default")
    layer.neuron_delta["default"].data.normal_()
    return layer


def delta_of(layer):
    return layer.neuron_delta["default"]


def by_definition(layer, x):
    """Return float64 y, with the delta added to the weight, and the gradients of sum(y**2) for x and delta."""
    delta = delta_of(layer).detach().double().requires_grad_()
    x = x.detach().double().requires_grad_()
    weight = layer.base_layer.weight.double()
    place = torch.zeros(weight.shape[layer.dim], delta.shape[layer.dim], dtype=torch.float64)
    for column, neuron in enumerate(layer.neuron_index["default"].tolist()):
        place[neuron, column] = 1
    weight = weight + (place @ delta if layer.dim == 0 else delta @ place.T)
    bias = layer.base_layer.bias
    y = x @ weight.T + (0 if bias is None else bias.double())
    y.square().sum().backward()
    return y, x.grad, delta.grad


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("in_features", "out_features", "index"), SHAPES)
def test_output_and_gradients_equal_the_definition(in_features, out_features, index, batch, dim, dtype):
    sizes = (in_features, out_features) if dim == 0 else (out_features, in_features)
    layer = neuron_linear(*sizes, index if dim == 1 else [i % out_features for i in index[:1]], dim, dtype, bool(batch))
    x = torch.randn(*batch, sizes[0], dtype=dtype, requires_grad=True)
    assert can_fuse(layer.base_layer, delta_of(layer), x)
    y = layer(x)
    y.square().sum().backward()
    expected = by_definition(layer, x)
    assert y.dtype == x.grad.dtype == dtype and delta_of(layer).grad.dtype == torch.promote_types(dtype, torch.float32)
    for actual, expected_value in zip((y, x.grad, delta_of(layer).grad), expected, strict=True):
        bound = TOLERANCE[dtype] * max(1.0, float(expected_value.detach().abs().max()))
        torch.testing.assert_close(actual.double(), expected_value, rtol=0, atol=bound)


@pytest.mark.parametrize("dim", [0, 1])
def test_gradcheck(dim):
    layer = neuron_linear(dim=dim, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def output(x, delta):
        layer.neuron_delta["default"] = delta
        return layer(x)

    assert torch.autograd.gradcheck(output, (x, delta_of(layer)))


@pytest.mark.parametrize("dim", [0, 1])
def test_weight_is_unchanged_after_each_pass(dim):
    layer = neuron_linear(dim=dim)
    weight = layer.base_layer.weight
    before, version = weight.clone(), weight._version
    y = layer(torch.randn(4, 6, requires_grad=True))
    assert torch.equal(weight, before)
    y.sum().backward()
    assert torch.equal(weight, before) and weight._version == version


def test_weight_is_unchanged_after_a_failure():
    layer = neuron_linear()
    before = layer.base_layer.weight.clone()
    with pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(4, 7))
    y = layer(torch.randn(4, 6, requires_grad=True))
    with pytest.raises(RuntimeError):
        y.backward(torch.ones(4, 4))
    assert torch.equal(layer.base_layer.weight, before)


def test_other_functions_that_saved_the_weight_can_run_backward():
    layer = neuron_linear()
    x = torch.randn(4, 6, requires_grad=True)
    (F.linear(x, layer.base_layer.weight).sum() + layer(x).sum()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("dim", "expected"), [(0, 2**-8), (1, -(2**-14))])
def test_delta_below_half_precision_is_not_lost(dim, expected):
    """The products of the weights cancel, so that only a delta much smaller than their rounding remains."""
    layer = neuron_linear(64, 64, [3], dim, torch.bfloat16, bias=False)
    layer.base_layer.weight.data.fill_(1)
    x = torch.ones(64, dtype=torch.bfloat16)
    x[1::2] = -1
    delta_of(layer).data.copy_(2**-14 * (x if dim == 0 else torch.ones(64, 1)))
    assert float(layer(x)[3]) == expected


def test_backward_with_an_input_that_needs_no_gradient():
    layer = neuron_linear()
    layer(torch.randn(4, 6)).sum().backward()
    assert delta_of(layer).grad is not None


def test_second_derivative_is_refused():
    layer = neuron_linear()
    x = torch.randn(4, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_fusing_leaves_other_modes_and_types_to_the_plain_form():
    x = torch.randn(4, 6)
    layer = neuron_linear()
    assert can_fuse(layer.base_layer, delta_of(layer), x)
    with torch.no_grad():
        assert not can_fuse(layer.base_layer, delta_of(layer), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_fuse(layer.base_layer, delta_of(layer), x)
        half = neuron_linear(dtype=torch.bfloat16)
        assert can_fuse(half.base_layer, delta_of(half), x)
    assert not can_fuse(layer.base_layer, delta_of(layer), x.double())
    assert not can_fuse(neuron_linear().base_layer.requires_grad_(), delta_of(layer), x)
    assert not can_fuse(nn.Bilinear(6, 6, 5), delta_of(layer), x)


@pytest.mark.parametrize("dim", [0, 1])
def test_autocast_over_half_precision_weights(dim):
    layer = neuron_linear(dim=dim, dtype=torch.bfloat16)
    x = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    expected = by_definition(layer, x)
    for actual, expected_value in zip((y, x.grad, delta_of(layer).grad), expected, strict=True):
        atol = TOLERANCE[torch.bfloat16] * float(expected_value.detach().abs().max())
        torch.testing.assert_close(actual.double(), expected_value, rtol=0, atol=atol)
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


def count(layer, register):
    """Return how often a hook added by `register` runs during one training pass."""
    calls = []
    handle = register(lambda *_: calls.append(1))
    try:
        layer(torch.randn(4, 6, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    return len(calls)


def test_hooks_of_the_base_layer_run():
    layer = neuron_linear()
    base = layer.base_layer
    for register in (
        base.register_forward_hook,
        base.register_forward_pre_hook,
        base.register_full_backward_hook,
        base.register_full_backward_pre_hook,
    ):
        assert count(layer, register) == 1
    assert count(layer, nn.modules.module.register_module_forward_hook) == 2


def test_replaced_forward_of_the_base_layer_runs():
    """accelerate replaces `forward` in models spread over devices."""
    layer = neuron_linear()
    base, calls = layer.base_layer, []
    own = base.forward
    base.forward = lambda x: calls.append(1) or own(x)
    layer(torch.randn(4, 6))
    assert calls


def test_output_equals_the_compiled_plain_form():
    layer = neuron_linear()
    x = torch.randn(4, 6)
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_function_transforms_differentiate_the_plain_form():
    layer = neuron_linear()
    x = torch.randn(4, 6, requires_grad=True)
    layer(x).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).square().sum())(x.detach()), x.grad)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


@pytest.mark.parametrize("index", [(1, 3), ()])
@pytest.mark.parametrize("dim", [0, 1])
def test_empty_input_or_neurons_give_zero_gradients(dim, index):
    layer = neuron_linear(index=torch.tensor(index, dtype=torch.int64), dim=dim)
    x = torch.randn(2, 0, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and not delta_of(layer).grad.any()


def in_threads(work, num_threads=2):
    threads = [Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("learns", [True, False])
def test_concurrent_threads_do_not_disturb_the_weight(learns):
    """Sizes are large enough for two threads' products to overlap; a frozen adapter works without `no_grad`."""
    layer = neuron_linear(512, 512, list(range(0, 512, 4)))
    delta_of(layer).requires_grad_(learns)
    before, x = layer.base_layer.weight.clone(), torch.randn(256, 512)
    expected, wrong = layer(x).detach(), []

    def work():
        for _ in range(40):
            output = layer(x).detach()
            if not torch.allclose(output, expected, rtol=1e-3, atol=1e-3):
                wrong.append(float((output - expected).abs().max()))

    in_threads(work)
    assert not wrong and torch.equal(layer.base_layer.weight, before)


def test_frozen_deltas_shared_memory_and_meta_tensors_take_the_plain_form():
    x, layer = torch.randn(4, 6), neuron_linear()
    delta_of(layer).requires_grad_(False)
    assert not can_fuse(layer.base_layer, delta_of(layer), x)
    shared = neuron_linear()
    shared.base_layer.share_memory()
    assert not can_fuse(shared.base_layer, delta_of(shared), x)
    assert neuron_linear().to("meta")(x.to("meta")).shape == (4, 5)


def test_bias_of_another_dtype_than_the_weight_under_autocast():
    """Such biases exist if a bfloat16 model's vectors are cast to float32 before training."""
    layer = neuron_linear(dtype=torch.bfloat16)
    layer.base_layer.bias.data = layer.base_layer.bias.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(4, 6)).sum().backward()
    assert delta_of(layer).grad.any()


@pytest.mark.parametrize("bias", [False, True])
def test_weight_that_also_learns_takes_the_plain_form(bias):
    layer, x = nn.Linear(6, 4, bias=bias).requires_grad_(False), torch.zeros(2, 6)
    delta = torch.zeros(2, 6, requires_grad=True)
    assert can_fuse(layer, delta, x)
    layer.weight.requires_grad_()
    assert not can_fuse(layer, delta, x)
