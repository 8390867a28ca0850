"""Language activation probability entropy (Tang et al. 2024, arXiv 2402.16438) of hidden units.

A feed-forward unit fires with some probability over each language's tokens. Units that fire for few languages have a
low entropy over languages; those of lowest entropy are language-specific.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from agnostic_train.errors import UserError
from agnostic_train.model.batches import Batch, find_device, model_inputs, own_sentences, real_and_counted
from agnostic_train.model.decoder import FEED_FORWARD_PROJECTIONS, Projection, Site, find_decoder
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.processes import own_share, sum_over_processes

QUANTILE = 0.95
"""The quantile of the firing rates of all (unit, language) pairs that a unit's rate must exceed in some language for
the unit to be kept. The unit then belongs to every language in which its rate exceeds that quantile."""


@dataclass(frozen=True)
class FiringRates:
    """How often hidden units fire on a language's tokens.

    Attributes:
        rates: the fraction of tokens on which each unit fires, (layers, units), float64, on the CPU.
        num_sentences: number of sentences over all processes.
    """

    rates: Tensor
    num_sentences: int


def firing_rates(model: nn.Module, batches: Iterable[Batch], language: str, progress: bool) -> FiringRates:
    """Counts on how many tokens each unit's activation function is above zero.

    SiLU, GELU and ReLU are above zero exactly where their input is, so the input is counted: the gate's output, or
    `up`'s in a family without a gate. Several processes share the batches.

    Raises:
        UserError: a unit's value isn't finite, or no token counts.
    """
    decoder = find_decoder(model)
    counts: dict[int, Tensor] = {}
    not_finite: dict[int, Tensor] = {}
    counted = torch.empty(0)
    device = find_device(model)
    num_tokens, num_sentences = torch.zeros((), dtype=torch.int64, device=device), 0

    def count(layer: int, projection: Projection) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            states, is_counted = projection.output(output), counted.to(output.device).unsqueeze(-1)
            fired = ((states > 0) & is_counted).sum((0, 1))
            counts[layer] = counts[layer] + fired if layer in counts else fired

        return hook

    def check(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            bad = (~args[0].isfinite() & counted.to(args[0].device).unsqueeze(-1)).sum()
            not_finite[layer] = not_finite[layer] + bad if layer in not_finite else bad

        return hook

    with (
        ExitStack() as stack,
        tqdm(
            desc=f"detect {language}",
            unit=" sentences",
            total=own_sentences(batches),
            disable=not progress,
            leave=False,
        ) as bar,
    ):
        for layer in decoder.layers:
            projection = layer.projections.get("gate", layer.projections["up"])
            stack.callback(projection.linear.register_forward_hook(count(layer.index, projection)).remove)
            down = layer.projections["down"].linear
            stack.callback(down.register_forward_pre_hook(check(layer.index), prepend=True).remove)
        for batch in own_share(batches):
            inputs = model_inputs(model, batch)
            counted = real_and_counted(inputs, batch)[1]
            decoder.backbone(**inputs)
            num_tokens += counted.sum()  # kept on the device: an int would synchronise with it
            num_sentences += len(counted)
            bar.update(len(counted))
    totals = sum_over_processes(torch.stack([num_tokens, torch.tensor(num_sentences, device=device)]))
    if totals[1] and not totals[0]:
        raise UserError(f"corpus: no token of {language!r} counts; its text consists of special tokens")
    none = torch.zeros((), dtype=torch.int64)
    units = [layer.projections["down"].num_neurons for layer in decoder.layers]
    bad = sum_over_processes(torch.stack([not_finite.get(it, none).to(device) for it in range(len(units))])).nonzero()
    if len(bad):
        raise UserError(f"model.name: hidden units of layer {int(bad[0])} aren't finite; the model computes NaN or Inf")
    fired = torch.stack([counts.get(index, none.expand(size)).to(device) for index, size in enumerate(units)])
    fired = sum_over_processes(fired)
    return FiringRates(fired.cpu().double() / int(totals[0]), int(totals[1]))


def specific_neurons(rates: Mapping[str, Tensor], ratio: float, sizes: Mapping[Site, int]) -> dict[str, NeuronSet]:
    """Selects each language's specific units, as the gate, up and down neurons of those units.

    Ties go to the lower layer and unit.

    Args:
        rates: per language (layers, units), as in `FiringRates`.
        ratio: fraction of all units that are selected, by lowest entropy (the paper: 0.01).
        sizes: number of neurons of each of the model's sites.
    """
    languages = list(rates)
    probabilities = torch.stack([rates[language] for language in languages], -1)  # (layers, units, languages)
    flat = probabilities.flatten()
    threshold = flat.kthvalue(max(1, round(len(flat) * QUANTILE))).values
    shares = probabilities / probabilities.sum(-1, keepdim=True).clamp(min=1e-300)
    entropy = torch.special.entr(shares).sum(-1)
    entropy[~(probabilities > threshold).any(-1)] = torch.inf
    order = entropy.flatten().sort(stable=True)
    chosen = order.indices[: round(entropy.numel() * ratio)]
    chosen = chosen[order.values[: len(chosen)].isfinite()]
    layers, units = chosen // entropy.shape[1], chosen % entropy.shape[1]
    related = {}
    for index, language in enumerate(languages):
        fires = probabilities[layers, units, index] > threshold
        sites = {site: units[fires & (layers == site[0])] for site in sizes if site[1] in FEED_FORWARD_PROJECTIONS}
        related[language] = NeuronSet(sites, sizes)
    return related
