"""LAPE compared with a loop over units, and as a detection method."""

import math

import pytest
import torch
from conftest import padded_batch, tiny_llama
from test_families import family_model

from agnostic_train.detection.detect import detect_neurons
from agnostic_train.detection.lape import firing_rates, specific_neurons
from agnostic_train.errors import UserError
from agnostic_train.model.decoder import find_decoder


def brute_force(rates, ratio):
    """Select (layer, unit) pairs for each language as the paper describes it."""
    languages = list(rates)
    layers, units = rates[languages[0]].shape
    every = sorted(float(rates[name][i, j]) for name in languages for i in range(layers) for j in range(units))
    bar = every[max(1, round(len(every) * 0.95)) - 1]
    scored = []
    for i in range(layers):
        for j in range(units):
            values = [float(rates[name][i, j]) for name in languages]
            if max(values) > bar:
                shares = [value / sum(values) for value in values]
                scored.append((-sum(share * math.log(share) for share in shares if share), i, j))
    chosen = sorted(scored)[: round(layers * units * ratio)]
    return {name: {(i, j) for _, i, j in chosen if float(rates[name][i, j]) > bar} for name in languages}


def test_selection_equals_a_loop_over_units():
    generator = torch.Generator().manual_seed(0)
    rates = {name: torch.rand(3, 40, generator=generator).double() ** 3 for name in "abc"}
    rates["a"][0, :2] = 0
    sizes = {(layer, name): 40 for layer in range(3) for name in ("gate", "up", "down")} | {(0, "q"): 8}
    selected = specific_neurons(rates, 0.1, sizes)
    for name, expected in brute_force(rates, 0.1).items():
        assert expected
        for projection in ("gate", "up", "down"):
            pairs = {(layer, int(unit)) for layer in range(3) for unit in selected[name][(layer, projection)]}
            assert pairs == expected
        assert selected[name].counts()["q"] == 0


@pytest.mark.parametrize("name", [None, "Phi-3", "GPT-NeoX"])
def test_firing_rates_are_shares_of_positive_activations(name):
    model = tiny_llama() if name is None else family_model(name)
    batches = [padded_batch([5, 9], "left"), padded_batch([4], seed=2)]
    fired, tokens = [0.0, 0.0], 0
    for batch in batches:
        seen = {}
        for layer in find_decoder(model).layers:
            projection = layer.projections.get("gate", layer.projections["up"])
            projection.linear.register_forward_hook(
                lambda module, args, output, layer=layer, projection=projection, seen=seen: seen.__setitem__(
                    layer.index, torch.nn.functional.silu(projection.output(output))
                )
            )
        with torch.no_grad():
            model(**batch)
        real = batch["attention_mask"].bool()
        tokens += int(real.sum())
        for layer in range(2):
            fired[layer] = fired[layer] + (seen[layer][real] > 0).sum(0)
    result = firing_rates(model, batches, "a", progress=False)
    assert result.num_sentences == 3
    torch.testing.assert_close(result.rates, torch.stack(fired).double() / tokens)


def test_lape_as_a_detection_method(llama):
    corpora = {name: [padded_batch([9, 12, 7], seed=seed)] for seed, name in enumerate("abc")}
    result = detect_neurons(llama, corpora, method="lape", lape_ratio=0.2, progress=False)
    assert result.settings["method"] == "lape" and any(len(it) for it in result.related.values())
    for neurons in result.related.values():
        counts = neurons.counts()
        assert counts["gate"] == counts["up"] == counts["down"] == len(neurons) / 3
    with pytest.raises(ValueError, match="method"):
        detect_neurons(llama, corpora, method="entropy")
    with pytest.raises(UserError, match="hidden units of layer 1 aren't finite; the model computes NaN"):
        broken = tiny_llama()
        with torch.no_grad():
            broken.model.layers[1].mlp.gate_proj.weight[3] = torch.nan
        detect_neurons(broken, corpora, method="lape", progress=False)
    with pytest.raises(UserError, match="hidden units of layer 0 aren't finite; the model computes NaN"):
        broken = tiny_llama()
        with torch.no_grad():
            broken.model.layers[0].mlp.up_proj.weight[3] = torch.nan  # the gate, which says what fires, is fine
        detect_neurons(broken, corpora, method="lape", progress=False)
    special = padded_batch([4]) | {"special_tokens_mask": torch.ones(1, 4)}
    with pytest.raises(UserError, match="no token of 'd' counts"):
        detect_neurons(llama, corpora | {"d": [special]}, method="lape", progress=False)
    with pytest.raises(UserError, match="'d' has no sentence"):
        detect_neurons(llama, corpora | {"d": []}, method="lape", progress=False)
