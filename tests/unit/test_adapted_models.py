"""Detection, deactivation and scores give the same results for a model with adapters as for the merged model."""

import copy

import pytest
import torch
from conftest import padded_batch, tiny_llama
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_families import family_model
from test_tuner import adapted, some_neurons
from torch.nn.utils import prune

from agnostic_train import (
    deactivate,
    detect_neurons,
    export_checkpoint,
    language_agnostic_score,
    neuron_impacts,
    perplexity,
)
from agnostic_train.detection.lape import firing_rates
from agnostic_train.detection.self_check import verify_impacts
from agnostic_train.errors import UserError
from agnostic_train.model.decoder import find_decoder
from agnostic_train.model.weights import weights_checksum
from agnostic_train.neurons.neuron_set import NeuronSet

BATCH = padded_batch([5, 11, 8])


def with_lora(model):
    torch.manual_seed(7)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets, use_dora=True, lora_dropout=0.3))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.2)
    return wrapped


MODELS = {
    "neurons": lambda: adapted(),
    "neurons in fused weights": lambda: adapted(family_model("Phi-3")),
    "neurons by head": lambda: adapted(family_model("GPT-NeoX")),
    "DoRA, as a stranger": lambda: with_lora(tiny_llama(attention_bias=True)),
}


@pytest.fixture(params=MODELS)
def wrapped_and_merged(request):
    wrapped = MODELS[request.param]()
    return wrapped, copy.deepcopy(wrapped).merge_and_unload().eval()


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_impacts_equal_those_of_the_merged_model(wrapped_and_merged):
    wrapped, merged = wrapped_and_merged
    expected = neuron_impacts(merged, BATCH)
    impacts = neuron_impacts(wrapped, BATCH)
    assert impacts.keys() == expected.keys()
    for site, values in impacts.items():
        assert_close(values, expected[site])
    verify_impacts(wrapped, BATCH)
    corpora = {"en": [BATCH], "sw": [padded_batch([6, 9], seed=4)]}
    assert detect_neurons(wrapped, corpora, 0.2, 0.5).related == detect_neurons(merged, corpora, 0.2, 0.5).related
    wrapped.eval()
    rates = [firing_rates(model, [BATCH], "en", progress=False).rates for model in wrapped_and_merged]
    assert float((rates[0] - rates[1]).abs().max()) < 0.05  # rounding may move an output across zero


@torch.no_grad()
def test_deactivation_zeroes_base_plus_delta_and_restores_every_bit(wrapped_and_merged):
    wrapped, merged = wrapped_and_merged
    wrapped.eval()
    before = copy.deepcopy(wrapped.state_dict())
    with deactivate(merged, some_neurons(merged)):
        expected = merged(**BATCH).logits[BATCH["attention_mask"].bool()]
    plain = wrapped(**BATCH).logits
    with pytest.raises(ZeroDivisionError), deactivate(wrapped, some_neurons(wrapped)):
        assert_close(wrapped(**BATCH).logits[BATCH["attention_mask"].bool()], expected)
        raise ZeroDivisionError
    assert torch.equal(wrapped(**BATCH).logits, plain)
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())


def test_measuring_within_a_block_equals_that_of_the_merged_model(wrapped_and_merged, tmp_path):
    """Columns are as if zero in the weights: what they read, and so the impacts of v, stays."""
    wrapped, merged = wrapped_and_merged
    off = NeuronSet({(0, "o"): [0, 1, 2], (0, "down"): [4], (0, "up"): [3], (1, "q"): [2], (1, "o"): [5]})
    corpora, settings = {"a": [BATCH], "b": [padded_batch([9], seed=3)]}, {"top_ratio": 0.2, "progress": False}
    outside = detect_neurons(wrapped, corpora, resume_dir=tmp_path, **settings)
    expected = []
    for model in (merged, wrapped):
        with deactivate(model, off):
            expected.append((neuron_impacts(model, BATCH), detect_neurons(model, corpora, **settings)))
    (impacts, detected), (in_hooks, by_hooks) = expected
    for site, values in in_hooks.items():
        assert_close(values, impacts[site])
    assert by_hooks.related == detected.related != outside.related
    for language, activations in by_hooks.activations.items():
        for site, values in activations.items():
            assert_close(values, detected.activations[language][site])
    with deactivate(wrapped, off):
        assert detect_neurons(wrapped, corpora, resume_dir=tmp_path, **settings).related == detected.related
        with pytest.raises(UserError, match="switched off; end the block of `deactivate` first"):
            export_checkpoint(wrapped, tmp_path / "out")


def test_deactivation_blocks_can_be_nested(wrapped_and_merged):
    wrapped, merged = wrapped_and_merged
    sizes = find_decoder(merged).sizes
    first, second = NeuronSet({(0, "up"): [3, 4], (1, "o"): [5]}, sizes), NeuronSet({(0, "up"): [4, 7]}, sizes)
    with deactivate(merged, first | second):
        expected = perplexity(merged, [BATCH]).value
    with deactivate(wrapped, first):
        with deactivate(wrapped, second):
            assert perplexity(wrapped, [BATCH]).value == pytest.approx(expected, rel=1e-5)
        inside = perplexity(wrapped, [BATCH]).value
    with deactivate(merged, first):
        assert inside == pytest.approx(perplexity(merged, [BATCH]).value, rel=1e-5)


def test_score_equals_that_of_the_merged_model(wrapped_and_merged):
    wrapped, merged = wrapped_and_merged
    corpora = {"en": [BATCH], "sw": [padded_batch([6, 9], seed=4)]}
    assert perplexity(wrapped, [BATCH]).value == pytest.approx(perplexity(merged, [BATCH]).value, rel=1e-5)
    neurons = detect_neurons(merged, corpora, 0.2, 0.5)
    scores = [language_agnostic_score(model, neurons, corpora) for model in (wrapped, merged)]
    assert scores[0].value == pytest.approx(scores[1].value, rel=1e-3)


def test_checksum_depends_on_the_active_adapter():
    model = adapted()
    with model.disable_adapter():
        without = weights_checksum(model)
    assert weights_checksum(model) == weights_checksum(model) != without


def test_large_bias_does_not_round_the_effective_weight():
    model = family_model("GPT-NeoX").bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dense_4h_to_h.bias"):
                parameter.normal_(std=10)
    adapter = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["dense_4h_to_h"]))
    plain_weight, adapted_weight = (
        find_decoder(it).projection((0, "down")).effective_weight() for it in (model, adapter)
    )
    assert torch.equal(adapted_weight, plain_weight)


COMPILED = {
    "the model": lambda model: torch.compile(model, backend="eager"),
    "the model in place": lambda model: model.compile(backend="eager") or model,
    "layers": lambda model: [it.compile(backend="eager") for it in layers_of(model)],
    "feed-forwards": lambda model: [it.mlp.compile(backend="eager") for it in layers_of(model)],
}


def layers_of(model):
    return model.get_decoder().layers


@pytest.mark.parametrize("part", COMPILED)
@pytest.mark.parametrize("method", ["impact", "lape"])
def test_compiled_models_are_measured_like_others(part, method):
    """Compiled modules ignore later hooks: without them, a set that is off would change nothing."""
    torch._dynamo.reset()
    wrapped = adapted()
    corpora = {"en": [BATCH], "sw": [padded_batch([6, 9], seed=4)]}
    settings = dict(top_ratio=0.2, consistency=0.5, method=method, lape_ratio=0.3, progress=False)
    expected = detect_neurons(wrapped, corpora, **settings)
    score = language_agnostic_score(wrapped, expected, corpora, control_seeds=[]).value
    compiled = copy.deepcopy(wrapped)
    changed = COMPILED[part](compiled)
    compiled = changed if isinstance(changed, torch.nn.Module) else compiled
    with torch.no_grad():
        compiled(**BATCH)
    found = detect_neurons(compiled, corpora, **settings)
    assert found.related == expected.related
    # LAPE finds no shared units here, so its score is undefined.
    found_score = language_agnostic_score(compiled, found, corpora, control_seeds=[]).value
    assert found_score == (score and pytest.approx(score, rel=1e-4)) and (score is None) == (method == "lape")
    off = expected.related["en"]
    with torch.no_grad(), deactivate(wrapped, off), deactivate(compiled, off):
        assert_close(compiled(**BATCH).logits, wrapped(**BATCH).logits)


def test_weights_made_anew_in_each_pass_are_switched_off():
    """Pruned and reparametrised linears compute their weight, so that zeroing it would have no effect."""
    plain, off = tiny_llama(), {(0, "up"): [3, 7, 11], (1, "o"): [2, 5], (1, "q"): [4]}
    made = tiny_llama()
    for layer in layers_of(made):
        for linear in (layer.mlp.up_proj, layer.self_attn.q_proj):
            prune.identity(linear, "weight")
        torch.nn.utils.parametrizations.weight_norm(layer.self_attn.o_proj)
    with deactivate(plain, off), deactivate(made, off):
        assert perplexity(made, [BATCH]).value == pytest.approx(perplexity(plain, [BATCH]).value, rel=1e-5)
    expected = neuron_impacts(plain, BATCH)
    for site, values in neuron_impacts(made, BATCH).items():
        assert_close(values, expected[site])
    verify_impacts(made, BATCH)


def test_lora_with_biases_is_measured():
    torch.manual_seed(7)
    wrapped = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear", lora_bias=True))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    verify_impacts(wrapped, BATCH)


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_prompt_adapters_are_refused(config):
    wrapped = get_peft_model(tiny_llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UserError, match="its prompt or prefix adapter adds to the input"):
        neuron_impacts(wrapped, BATCH)
    wrapped.delete_adapter("default")
    assert neuron_impacts(wrapped, BATCH)


def test_shared_and_wrapped_modules_are_refused():
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(UserError, match="layers 0 and 1 share their gate projection"):
        neuron_impacts(model, BATCH)
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UserError, match="layers 0 and 1 share their up projection"):
        neuron_impacts(model, BATCH)
    model = tiny_llama()
    model.model.layers[1].experts = torch.nn.Linear(4, 4)  # as in Gemma 4, beside the layer's `mlp`
    with pytest.raises(UserError, match=r"layer 1 has weights outside its attention .* \(experts.weight\)"):
        neuron_impacts(model, BATCH)
    with pytest.raises(UserError, match=r"it is inside a DataParallel; pass the model inside \(model.module\)"):
        neuron_impacts(torch.nn.DataParallel(tiny_llama()), BATCH)
