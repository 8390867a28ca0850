"""Results on a GPU equal those on the CPU."""

import copy

import pytest
import torch
from conftest import UPDATES, padded_batch, tiny_llama
from transformers import PrinterCallback

from agnostic_train.detection.detect import detect_neurons
from agnostic_train.detection.self_check import verify_impacts
from agnostic_train.export.frozen_weights import check_frozen_weights
from agnostic_train.export.trained import Trained
from agnostic_train.impact.hooks import unverified_impacts
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.scores.perplexity import perplexity
from agnostic_train.training.trainer import NeuronTrainer, NeuronTrainingArguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = [1, 6, 13, 42]


@pytest.mark.parametrize("side", ["left", "right"])
def test_impacts_perplexity_and_sets_equal_those_of_the_cpu(side):
    model, batch = tiny_llama(attention_bias=True), padded_batch(LENGTHS, side)
    on_gpu = copy.deepcopy(model).cuda()
    expected = unverified_impacts(model, batch)
    for site, values in unverified_impacts(on_gpu, batch).items():
        assert values.is_cuda and values.dtype == torch.float32
        torch.testing.assert_close(values.cpu(), expected[site], rtol=0, atol=1e-3 * expected[site].max().item())
    assert perplexity(on_gpu, [batch]).nats == pytest.approx(perplexity(model, [batch]).nats, rel=1e-4)
    sets = [detect_neurons(it, {"a": [batch]}, 0.5, 0.5, progress=False).shared for it in (model, on_gpu)]
    assert len((sets[0] | sets[1]) - (sets[0] & sets[1])) <= 0.01 * len(sets[0])


def test_pruning_keeps_the_sets_and_activations_equal_those_of_the_cpu():
    """On one device, detection with and without pruning finds the same sets; activations equal the CPU's."""
    model, batch = tiny_llama(attention_bias=True), padded_batch(LENGTHS)
    on_gpu = copy.deepcopy(model).cuda()
    pruned, plain = (
        detect_neurons(on_gpu, {"a": [batch]}, 0.1, 0.5, pruning=pruning, progress=False) for pruning in (True, False)
    )
    assert pruned.shared == plain.shared and pruned.exact_share["q"] < 1
    expected = detect_neurons(model, {"a": [batch]}, 0.1, 0.5, progress=False).activations["a"]
    for site, values in pruned.activations["a"].items():
        torch.testing.assert_close(values, expected[site], rtol=1e-3, atol=1e-4)


def test_self_check_passes_in_bfloat16():
    comparisons = verify_impacts(tiny_llama().bfloat16().cuda(), padded_batch(LENGTHS))
    assert max(comparison.error for comparison in comparisons) < 1e-3


@pytest.mark.parametrize("update", UPDATES)
def test_training_moves_only_the_chosen_entries(tmp_path, update):
    model = tiny_llama()
    base = copy.deepcopy(model)
    neurons = NeuronSet({(0, "q"): [1, 17], (1, "down"): [0, 52], (1, "v"): [3]})
    rows = [{"input_ids": ids, "labels": ids} for ids in padded_batch([9] * 16)["input_ids"].tolist()]
    arguments = NeuronTrainingArguments(
        output_dir=str(tmp_path), report_to=[], max_steps=5, learning_rate=1e-2, weight_decay=0.1, bf16=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = NeuronTrainer(model, arguments, train_dataset=rows, neurons=neurons, update=update)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    check = check_frozen_weights(Trained.of(trainer.model.cpu(), base))
    assert check.status == "identical" and check.chosen_moved > 0.9
