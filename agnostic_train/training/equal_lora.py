"""The LoRA baseline: as many trainable parameters as a set of neurons has."""

import random

from peft import LoraConfig, TaskType
from torch import nn

from agnostic_train.model.decoder import find_decoder
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.chosen import num_weights

SCALING = 2.0
"""lora_alpha / r, at every rank."""


def equal_lora(neurons: NeuronSet, model: nn.Module) -> tuple[LoraConfig, int]:
    """A LoRA on the model's projections with at most as many parameters as the neurons have weights.

    All projections get the rank that the budget allows; what is left gives single projections one more, in a fixed
    random order, so that no layer or kind is preferred. A budget below one rank of one projection gets that.

    Returns: the configuration, and its number of trainable parameters.
    """
    names = {module: name for name, module in model.named_modules()}
    decoder = find_decoder(model)
    linears = dict.fromkeys(decoder.projection(site).linear for site in decoder.sizes)
    # One rank adds a column of A and a row of B.
    prices = {names[linear]: linear.in_features + linear.out_features for linear in linears}
    rank, left = divmod(num_weights(neurons, model), sum(prices.values()))
    ranks = dict.fromkeys(prices, rank)
    for name in random.Random(0).sample(sorted(prices), len(prices)):
        if prices[name] <= left:
            ranks[name] += 1
            left -= prices[name]
    ranks = {name: its for name, its in ranks.items() if its} or {min(prices, key=prices.__getitem__): 1}
    largest = max(ranks.values())
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=largest, lora_alpha=SCALING * largest, lora_dropout=0.0, rank_pattern=ranks,
        alpha_pattern={name: SCALING * its for name, its in ranks.items()}, target_modules=sorted(ranks),
    )  # fmt: skip
    return config, sum(its * prices[name] for name, its in ranks.items())
