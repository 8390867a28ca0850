"""The LoRA baseline has as many parameters as the neurons it is compared with, and not more."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from small_training import CHOSEN, may_learn, plain_weights
from test_families import family_model

from agnostic_train.model.decoder import find_decoder
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.chosen import num_trainable
from agnostic_train.training.equal_lora import SCALING, equal_lora
from agnostic_train.training.strategy import Strategy


def test_num_weights_counts_the_entries_that_may_learn(llama):
    masks = may_learn(plain_weights(llama), CHOSEN)
    assert num_trainable(CHOSEN, llama) == sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("per_site", [1, 7, 20])
@pytest.mark.parametrize("family", ["Llama with biases", "Phi-3", "GPT-NeoX"])
def test_lora_has_as_many_parameters_as_the_neurons_have_weights(per_site, family):
    model = family_model(family)
    neurons = NeuronSet({site: range(min(per_site, size)) for site, size in find_decoder(model).sizes.items()})
    config, num_parameters = equal_lora(neurons, model)
    wrapped = get_peft_model(model, config)
    trainable = {name: it for name, it in wrapped.named_parameters() if it.requires_grad}
    assert num_parameters == sum(it.numel() for it in trainable.values())
    budget = num_trainable(neurons, model)
    # One more rank of the cheapest projection would exceed the budget.
    linears = {layer.projections[name].linear for layer in find_decoder(model).layers for name in layer.projections}
    cheapest = min(linear.in_features + linear.out_features for linear in linears)
    assert budget - cheapest < num_parameters <= budget
    scalings = {value for it in wrapped.modules() if isinstance(it, LoraLayer) for value in it.scaling.values()}
    assert scalings == {SCALING}
    ranks = {it.shape[0] for name, it in trainable.items() if "lora_A" in name}
    assert max(ranks) - min(ranks) <= 1


def test_budget_below_one_rank_gives_one_rank(llama):
    config, num_parameters = equal_lora(NeuronSet({(0, "q"): [1]}), llama)
    assert config.r == 1 and len(config.target_modules) == 1 and num_parameters > num_trainable(NeuronSet(), llama)


def test_strategies_full_and_lora(llama):
    neurons = LanguageNeurons.from_related(
        {"a": NeuronSet({(0, "up"): range(9)}), "b": NeuronSet({(0, "up"): range(5)})}
    )
    full = Strategy("full").choose(None, None, llama)
    assert full.neurons is None and full.lora is None
    lora = Strategy("lora", ["a"], random_like="related").choose(neurons, None, llama)
    assert lora.neurons is None and lora.lora.peft_type == "LORA" and "378 of related of a" in lora.reason
    torch.manual_seed(0)
    assert get_peft_model(llama, lora.lora).get_nb_trainable_parameters()[0] <= 378


def test_remaining_budget_is_spread_over_all_layers(llama):
    config, _ = equal_lora(NeuronSet({(0, "up"): range(3)}), llama)
    largest = max(config.rank_pattern.values())
    assert {name.split(".")[2] for name, rank in config.rank_pattern.items() if rank == largest} == {"0", "1"}
