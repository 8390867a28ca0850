"""Impacts of all projections equal those of real deactivation, for each neuron and sentence."""

from dataclasses import replace

import pytest
import torch
from conftest import padded_batch, tiny_llama

from agnostic_train.detection.detect import detect_neurons
from agnostic_train.errors import UserError
from agnostic_train.impact import query_key
from agnostic_train.impact.attention import AttentionInputs, LogitChange
from agnostic_train.impact.attention_block import AttentionBlock, BlockForms
from agnostic_train.impact.hooks import ImpactMeter, unverified_impacts
from agnostic_train.impact.layer_attention import LayerAttention
from agnostic_train.impact.visibility import Visibility
from agnostic_train.model import batches as batches_module
from agnostic_train.model.decoder import PROJECTIONS, find_decoder
from agnostic_train.neurons.deactivation import deactivate
from agnostic_train.neurons.neuron_set import NeuronSet

LENGTHS = [1, 6, 13]


class Seen(Exception):
    """Carries the observed output and ends the forward pass."""


def observed_output(model, layer, projection, sentence):
    """Return the output whose change defines an impact, for one sentence without padding: (length, features)."""
    linears = {name: part.linear for name, part in find_decoder(model).layers[layer].projections.items()}

    def before(module, args):
        raise Seen(args[0][0])

    def after(module, args, output):
        raise Seen(output[0])

    if projection in ("q", "k", "v"):
        handle = linears["o"].register_forward_pre_hook(before)
    else:
        handle = linears["o" if projection == "o" else "down"].register_forward_hook(after)
    with torch.no_grad(), pytest.raises(Seen) as seen:
        model(input_ids=sentence[None])
    handle.remove()
    return seen.value.args[0]


def brute_force(model, sentences):
    """Compute impacts by zeroing one neuron after the other: (layer, projection) -> (sentences, neurons)."""
    impacts = {}
    for (layer, projection), size in find_decoder(model).sizes.items():
        impacts[(layer, projection)] = torch.zeros(len(sentences), size)
        for row, sentence in enumerate(sentences):
            before = observed_output(model, layer, projection, sentence)
            for neuron in range(size):
                with deactivate(model, NeuronSet({(layer, projection): [neuron]})):
                    after = observed_output(model, layer, projection, sentence)
                impacts[(layer, projection)][row, neuron] = (after - before).norm()
    return impacts


def sentences_of(batch):
    return [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


@pytest.mark.parametrize("bias", [False, True])
def test_impacts_equal_real_deactivation(bias):
    model = tiny_llama(attention_bias=bias, mlp_bias=bias)
    expected = brute_force(model, sentences_of(padded_batch(LENGTHS)))
    for side in ("right", "left"):
        impacts = unverified_impacts(model, padded_batch(LENGTHS, side))
        assert list(impacts) == [(layer, name) for layer in range(2) for name in PROJECTIONS]
        for site, values in impacts.items():
            assert values.dtype == torch.float32 and values.shape == expected[site].shape
            torch.testing.assert_close(values, expected[site], rtol=0, atol=1e-4 * expected[site].max().item())


@pytest.mark.parametrize("heads, kv_heads", [(6, 6), (3, 1)])
def test_impacts_of_multi_head_and_multi_query_attention(heads, kv_heads):
    model = tiny_llama(num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=1)
    expected = brute_force(model, sentences_of(padded_batch([7])))
    for site, values in unverified_impacts(model, padded_batch([7])).items():
        torch.testing.assert_close(values, expected[site], rtol=0, atol=1e-4 * expected[site].max().item())


def test_batch_gives_the_impacts_of_its_single_sentences(llama):
    batch = padded_batch(LENGTHS, "left")
    together = unverified_impacts(llama, batch)
    for row, sentence in enumerate(sentences_of(batch)):
        alone = unverified_impacts(llama, {"input_ids": sentence[None]})
        for site in together:
            torch.testing.assert_close(together[site][row], alone[site][0], rtol=1e-4, atol=1e-5)


def test_padding_with_a_large_common_part_of_values_does_not_add_rounding():
    """All values share 1,000; a mean that included padding's zeros would leave much of it, and so its rounding."""
    model = tiny_llama(attention_bias=True, num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.bias.fill_(1_000)
    batch = padded_batch([5, 40])
    together = unverified_impacts(model, batch, ["q", "k"])
    alone = unverified_impacts(model, {"input_ids": sentences_of(batch)[0][None]}, ["q", "k"])
    for site, values in alone.items():
        torch.testing.assert_close(together[site][0], values[0], rtol=0, atol=3e-6 * values.max().item())


def test_nan_at_padding_does_not_matter(llama):
    batch = padded_batch(LENGTHS)
    expected = unverified_impacts(llama, batch)
    padding = ~batch["attention_mask"].bool()

    def poison(module, args, output):
        return output.masked_fill(padding.unsqueeze(-1), torch.nan)

    handle = llama.get_input_embeddings().register_forward_hook(poison)
    poisoned = unverified_impacts(llama, batch)
    handle.remove()
    for site in expected:
        torch.testing.assert_close(poisoned[site], expected[site])


def test_layers_share_what_follows_from_their_mask(llama, monkeypatch):
    """It is computed once per batch, and the parts into which little memory divides a batch are too."""
    made, init = [], Visibility.__init__

    def counted(self, visible, real):
        made.append(len(real))
        init(self, visible, real)

    monkeypatch.setattr(Visibility, "__init__", counted)
    batches = [padded_batch([5, 9, 7]), padded_batch([4, 6])]
    for memory_gb, expected in ((1.0, [3, 2]), (1e-6, [3, 1, 1, 1, 2, 1, 1])):
        made.clear()
        with torch.no_grad(), ImpactMeter(llama, ["q", "k"], memory_gb=memory_gb) as meter:
            for batch in batches:
                meter.measure(batch)
        assert made == expected
        assert len(meter._cache._visibility) == len(meter._cache._angles) == 1


def test_chunk_size_does_not_change_the_result(llama):
    batch = padded_batch(LENGTHS)
    expected = unverified_impacts(llama, batch, ["q", "k"])
    with torch.no_grad(), ImpactMeter(llama, ["q", "k"], memory_gb=1e-6) as meter:
        chunked = meter.measure(batch)
    for site in expected:
        torch.testing.assert_close(chunked[site], expected[site])


def test_sentence_with_special_tokens_alone_is_reported(llama, monkeypatch):
    warnings = []
    monkeypatch.setattr(batches_module.logger, "warning_once", warnings.append)
    batch = padded_batch([4, 2])
    for special, expected in (([[0, 0, 0, 1], [1, 0, 0, 0]], 0), ([[0, 0, 0, 0], [1, 1, 0, 0]], 1)):
        impacts = unverified_impacts(llama, batch | {"special_tokens_mask": torch.tensor(special)}, ["up"])
        assert len(warnings) == expected
    assert not impacts[(0, "up")][1].any() and "a sentence has special tokens alone" in warnings[0]


def test_special_tokens_are_left_out_of_the_norms(llama):
    batch = padded_batch([5])
    batch["special_tokens_mask"] = torch.tensor([[1, 0, 0, 0, 0]])
    linear = find_decoder(llama).layers[1].projections["down"].linear
    seen = {}
    handle = linear.register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0]))
    impacts = unverified_impacts(llama, batch)
    handle.remove()
    expected = seen["hidden"][0, 1:].norm(dim=0) * linear.weight.norm(dim=0)
    torch.testing.assert_close(impacts[(1, "up")][0], expected)


def test_paper_mode_equals_exact_mode_without_rotation(llama):
    """Paper mode is equation 11 on the rotated states: without rotation (all positions 0), both modes are equal."""
    batch = padded_batch([9])
    exact, paper = (unverified_impacts(llama, batch, ["q", "k"], attention=mode) for mode in ("exact", "paper"))
    assert not torch.allclose(exact[(0, "q")], paper[(0, "q")], rtol=1e-2)
    llama.model.rotary_emb.inv_freq.zero_()
    exact, paper = (unverified_impacts(llama, batch, ["q", "k"], attention=mode) for mode in ("exact", "paper"))
    for site in exact:
        torch.testing.assert_close(exact[site], paper[site])


def test_model_is_left_unchanged(llama):
    llama.train()
    llama.model.layers[0].mlp.eval()
    state, implementation = torch.get_rng_state(), llama.config._attn_implementation
    weights = {name: value.clone() for name, value in llama.state_dict().items()}
    unverified_impacts(llama, padded_batch(LENGTHS))
    assert torch.equal(torch.get_rng_state(), state)
    assert llama.config._attn_implementation == implementation
    assert llama.training and not llama.model.layers[0].mlp.training and torch.is_grad_enabled()
    assert all(torch.equal(value, weights[name]) for name, value in llama.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_accumulate_in_float32(llama, dtype):
    batch = padded_batch(LENGTHS)
    expected = unverified_impacts(llama, batch)
    for site, values in unverified_impacts(llama.to(dtype), batch).items():
        assert values.dtype == torch.float32
        assert (values - expected[site]).abs().max() < 0.05 * expected[site].max()


def test_large_tensors_stay_within_the_memory_budget(llama, monkeypatch):
    """The peak holds the change, logits and attention of a chunk, and its two outputs."""
    sizes = []
    original = AttentionBlock.squares

    def spied(self, changed):
        sizes.append((3 * changed.numel() + 2 * changed[..., 0].numel() * 10) * changed.element_size())
        return original(self, changed)

    monkeypatch.setattr(AttentionBlock, "squares", spied)
    counts = []
    for budget in (1 << 14, 1 << 16, 1 << 20):
        sizes.clear()
        with torch.no_grad(), ImpactMeter(llama, ["q", "k"], memory_gb=budget / 2**30) as meter:
            meter.measure(padded_batch([13, 9]))
        assert max(sizes) <= budget
        counts.append(len(sizes))
    assert counts[0] > counts[1] > counts[2]


def test_nan_values_give_nan_impacts(llama):
    """In sentences of one token, q and k have no impact, but NaN values must still show."""
    with torch.no_grad():
        llama.model.layers[1].self_attn.v_proj.weight[3] = torch.nan
    impacts = unverified_impacts(llama, padded_batch([1, 1]), ["q", "k"])
    assert not impacts[(0, "q")].any() and impacts[(1, "q")].isnan().any() and impacts[(1, "k")].isnan().any()
    with pytest.raises(UserError, match="aren't finite"):
        detect_neurons(llama, {"a": [padded_batch([1, 1])]}, projections=["q", "k"], verify=False, progress=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_centring_ignores_padding(side):
    real = padded_batch([13, 5], side)["attention_mask"].bool()
    factors = [torch.randn(2, 3, 13, 4).masked_fill(~real[:, None, :, None], 0) for _ in range(4)]
    shifted = [(factor + 100).masked_fill(~real[:, None, :, None], 0) for factor in factors]
    plain, centred = LogitChange(*factors).centred(real), LogitChange(*shifted).centred(real)
    torch.testing.assert_close(centred.b, plain.b, rtol=0, atol=1e-4)
    assert (centred.d[0].mean(1).abs() < 1e-4).all() and not centred.d.masked_select(~real[:, None, :, None]).any()


def test_common_part_of_keys_does_not_change_the_result(monkeypatch):
    monkeypatch.setattr(BlockForms, "softmax", None)
    real, visible = torch.ones(2, 13, dtype=torch.bool), torch.ones(2, 1, 13, 13, dtype=torch.bool).tril()
    inputs = AttentionInputs.clean(*torch.randn(3, 2, 3, 13, 4), Visibility.of(visible, real), scaling=0.5)
    change = LogitChange(*torch.randn(4, 2, 3, 13, 4))
    shifted = replace(change, b=change.b + 1000, d=change.d - 1000)
    expected, actual = (LayerAttention(inputs, real, 1 << 20).squared_changes(it) for it in (change, shifted))
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=0)


def test_layer_splits_sentences_into_equal_parts(llama, monkeypatch):
    """Four sentences of which three fit into memory are computed two at a time."""
    sizes, original = [], query_key.QueryKeyImpacts._measure_part

    def spied(self, inputs, counted, *others):
        sizes.append(len(counted))
        return original(self, inputs, counted, *others)

    monkeypatch.setattr(query_key.QueryKeyImpacts, "_measure_part", spied)
    batch = padded_batch([13, 9, 5, 2])
    expected = unverified_impacts(llama, batch, ["q", "k"])
    monkeypatch.setattr(query_key, "_CPU_LAYER_BYTES", 3 * 4 * 6 * 13 * (14 * 10 + 4 * 13))
    impacts = unverified_impacts(llama, batch, ["q", "k"])
    assert sizes == [4, 4, 2, 2, 2, 2]
    for site, values in expected.items():
        torch.testing.assert_close(impacts[site], values)


def test_offloaded_weights_are_refused():
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(UserError, match="offloaded"):
        ImpactMeter(model)
    with pytest.raises(UserError, match="offloaded"), deactivate(model, {(0, "q"): [0]}):
        pass


def test_unknown_projections_and_attention_modes_are_refused(llama):
    with pytest.raises(ValueError, match="unknown projection 'query'"):
        unverified_impacts(llama, padded_batch([3]), ["query"])
    with pytest.raises(ValueError, match="attention"):
        unverified_impacts(llama, padded_batch([3]), attention="papers")
