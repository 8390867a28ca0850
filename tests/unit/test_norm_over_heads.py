"""A norm over all heads: intervals of a neuron's effect through every head, compared with recomputing the norm."""

import pytest
import torch
from conftest import padded_batch
from test_families import family_model
from test_pruning import assert_same_top, pruned_impacts

from agnostic_train.errors import UserError
from agnostic_train.impact import norm_over_heads
from agnostic_train.impact.attention import AttentionInputs
from agnostic_train.impact.layer_attention import LayerAttention
from agnostic_train.impact.visibility import Visibility
from agnostic_train.model.decoder import find_decoder

HEADS, LENGTH, HEAD_DIM = 6, 9, 4


def olmo(scale=1.0, times=1.0):
    """Return a random OLMo 2 with its logits scaled by `scale`**2 and every tenth query and key entry by `times`."""
    model = family_model("OLMo 2")
    with torch.no_grad():
        for layer in find_decoder(model).layers:
            for name, norm in layer.norms.items():
                norm.weight.mul_(scale)
                layer.projections[name].linear.weight[3::10] *= times
    return model


def attention_of(query, key, value, real=None):
    """Return causal attention whose last token isn't counted. real: (batch, length), bool; all true by default."""
    length = query.shape[2]
    real = torch.ones(len(query), length, dtype=torch.bool) if real is None else real
    visible = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None]
    inputs = AttentionInputs.clean(query, key, value, Visibility.of(visible, real), scaling=0.6)
    counted = real.clone()
    counted[:, -1] = False
    return LayerAttention(inputs, counted, chunk_bytes=1 << 20)


def random_attention(scale=1.0):
    """Return the attention of three sentences, the last with padding on the left."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, HEADS, LENGTH, HEAD_DIM, dtype=torch.float64) for _ in range(3))
    real = torch.ones(3, LENGTH, dtype=torch.bool)
    real[2, :4] = False
    return attention_of(scale * query, key, value, real)


def intervals(attention, name, excess):
    heads = {"q": norm_over_heads._query_growth, "k": norm_over_heads._key_growth}[name](attention)
    return norm_over_heads._intervals(attention, heads, excess)


def change_of_others(attention, name, excess):
    """Compute by brute force the squared change of all heads outside a neuron's group: (batch, groups, head_dim)."""
    num_groups = excess.shape[1]
    growth = 1 + excess.repeat_interleave(HEADS // num_groups, 1)
    result = torch.zeros(attention.batch, num_groups, HEAD_DIM, dtype=excess.dtype)
    logits = attention.logits.unflatten(0, (attention.batch, HEADS))
    weight = attention.counted.unflatten(0, (attention.batch, HEADS))
    value = attention.centred_value.unflatten(0, (attention.batch, HEADS))
    for group in range(num_groups):
        for entry in range(HEAD_DIM):
            factor = growth[:, group * HEADS // num_groups, :, entry]
            factor = factor[:, None, :, None] if name == "q" else factor[:, None, None]
            output = (logits * factor).softmax(-1) @ value
            squares = ((output - logits.softmax(-1) @ value).square().sum(-1) * weight).sum(-1)
            own = torch.arange(HEADS) // (HEADS // num_groups) == group
            result[:, group, entry] = squares[:, ~own].sum(1)
    return result


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("num_groups", [6, 3, 2])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 0.1, 3.0])
def test_change_of_the_other_heads_lies_in_its_interval(name, num_groups, size):
    """The interval also narrows to the linear part's square as growth gets small, so a wrong linear part would show."""
    attention = random_attention()
    excess = size * (0.1 + torch.rand(3, num_groups, LENGTH, HEAD_DIM, dtype=torch.float64))
    excess.masked_fill_(~attention.inputs.real[:, None, :, None], 0)
    low, high = intervals(attention, name, excess)
    exact = change_of_others(attention, name, excess)
    rounding = 1e-8 * exact
    assert (exact > 0).all() and (low <= exact + rounding).all() and (exact - rounding <= high).all()
    if size < 1e-2:
        assert (high - low < 300 * size * exact).all()


@pytest.mark.parametrize("shift", [0.05, 6.0])
def test_interval_holds_if_the_logit_of_one_key_among_many_grows(shift):
    """Covers a remainder close to its bound, and one for which only the exponential bound holds."""
    torch.manual_seed(0)
    value = torch.randn(1, HEADS, 400, HEAD_DIM, dtype=torch.float64) * 1e-3
    query, key = torch.ones_like(value), torch.zeros_like(value)
    value[:, :, 50] += 1
    key[:, :, 50] += 0.4
    attention = attention_of(query, key, value)
    excess = torch.full_like(value, shift / attention.logits.max())
    low, high = intervals(attention, "q", excess)
    exact = change_of_others(attention, "q", excess)
    assert (low < exact).all() and (exact < high).all()


def test_interval_covers_the_rounding_of_large_terms():
    """Each query attends to one key, so its output hardly moves: the linear part's terms nearly cancel."""
    attention = random_attention(scale=30)
    single = attention_of(
        *(it.float() for it in (attention.inputs.query, attention.inputs.key, attention.inputs.value)),
        attention.inputs.real,
    )
    excess = 1e-8 * torch.rand(3, HEADS, LENGTH, HEAD_DIM, dtype=torch.float64)
    excess.masked_fill_(~attention.inputs.real[:, None, :, None], 0)
    exact = change_of_others(attention, "k", excess)
    low, high = intervals(single, "k", excess.float())
    assert (low <= exact).all() and (exact <= high).all()


def test_one_group_has_no_other_heads():
    excess = torch.rand(3, 1, LENGTH, HEAD_DIM, dtype=torch.float64)
    for end in intervals(random_attention(), "k", excess):
        assert (end == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("times", [1.0, 20.0, 1e5])
@pytest.mark.parametrize("scale", [0.01, 0.2, 1.0, 3.0])
def test_intervals_of_a_model_hold_at_any_scale(scale, times, dtype):
    """At ratio 1 every neuron is computed exactly, and compared with its interval."""
    pruned_impacts(olmo(scale, times).to(dtype), padded_batch([1, 37, 20], "left"), 1.0)


@pytest.mark.parametrize("times", [1.0, 20.0])
@pytest.mark.parametrize("scale", [0.01, 0.2, 1.0, 3.0])
def test_pruning_finds_the_same_top(scale, times):
    for side in ("left", "right"):
        meter = assert_same_top(olmo(scale, times), padded_batch([1, 37, 20], side), 0.1, values=False)
        assert not meter.unpruned


def test_pruning_leaves_few_neurons_to_compute():
    _, meter = pruned_impacts(olmo(0.2), padded_batch([37, 20]), 0.1)
    for work in meter.work.values():
        assert work.neurons < 0.2 * work.all_neurons
        assert work.neurons / work.all_neurons < work.logits / work.all_logits < 1


def test_growth_too_large_for_the_closed_form_is_recomputed(monkeypatch):
    monkeypatch.setattr(norm_over_heads, "MAX_GROWTH", 1.0)
    _, meter = pruned_impacts(olmo(0.2), padded_batch([37, 20]), 0.1)
    assert all(work.neurons == work.all_neurons for work in meter.work.values())


def test_impact_outside_its_interval_is_an_error(monkeypatch):
    original = norm_over_heads._intervals
    monkeypatch.setattr(norm_over_heads, "_intervals", lambda *inputs: [4 * it for it in original(*inputs)])
    with pytest.raises(UserError, match="outside the intervals"):
        pruned_impacts(olmo(0.2), padded_batch([37, 20]), 1.0)


def test_norm_other_than_rms_is_recomputed_for_every_neuron(monkeypatch):
    monkeypatch.setattr("agnostic_train.impact.query_key.rms_eps", lambda *_: None)
    meter = assert_same_top(olmo(), padded_batch([5, 11]), 0.1)
    assert meter.unpruned and all(it.neurons == it.all_neurons for it in meter.work.values())
