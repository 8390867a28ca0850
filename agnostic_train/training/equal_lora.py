"""The LoRA baseline, with about as many trainable parameters as a set of neurons."""

import random

from peft import LoraConfig, TaskType
from torch import nn

from agnostic_train.model.decoder import find_decoder
from agnostic_train.model.reading import commit_of
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.chosen import num_trainable

SCALING = 2.0
"""`lora_alpha / r`, the same at every rank."""


def equal_lora(neurons: NeuronSet, model: nn.Module) -> tuple[LoraConfig, int]:
    """Configures a LoRA on the model's projections with at most as many parameters as the neurons have weight entries.

    All projections get the highest common rank within the budget. What is left raises the rank of individual
    projections by one, in a fixed random order, so that no layer or projection type is favoured. If the budget is too
    small for any, the projection with the fewest parameters per rank gets rank 1 nevertheless.

    Returns: the configuration, and its number of trainable parameters.
    """
    names = {module: name for name, module in model.named_modules()}
    decoder = find_decoder(model)
    linears = dict.fromkeys(decoder.projection(site).linear for site in decoder.sizes)
    # Each additional rank adds a row of A (in_features) and a column of B (out_features).
    prices = {names[linear]: linear.in_features + linear.out_features for linear in linears}
    rank, left = divmod(num_trainable(neurons, model), sum(prices.values()))
    ranks = dict.fromkeys(prices, rank)
    for name in random.Random(0).sample(sorted(prices), len(prices)):
        if prices[name] <= left:
            ranks[name] += 1
            left -= prices[name]
    ranks = {name: rank for name, rank in ranks.items() if rank} or {min(prices, key=prices.__getitem__): 1}
    largest = max(ranks.values())
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=largest, lora_alpha=SCALING * largest, lora_dropout=0.0, rank_pattern=ranks,
        alpha_pattern={name: SCALING * rank for name, rank in ranks.items()}, target_modules=sorted(ranks),
        revision=commit_of(model),
    )  # fmt: skip
    return config, sum(rank * prices[name] for name, rank in ranks.items())
