"""A short training of a small model and the entries that may move in it, shared by the tests of both updates."""

import copy

import torch
from peft import PeftModel

from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.trainer import NeuronTrainingArguments

CHOSEN = NeuronSet(
    {(0, "q"): [1, 17], (0, "k"): [3], (1, "v"): [0, 19], (1, "o"): [5, 41], (0, "gate"): [7], (1, "up"): [2, 52]}
    | {(0, "down"): [0, 7, 52]}
)


def sentences(count=24, seed=3):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(1, 61, (9,), generator=generator)
        rows.append({"input_ids": ids, "labels": ids.clone()})
    return rows


def arguments(tmp_path, **changes):
    settings = dict(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=20, per_device_train_batch_size=4,
        learning_rate=1e-2, weight_decay=0.1, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return NeuronTrainingArguments(**{**settings, **changes})


def plain_weights(model):
    """Return name -> value of the model's weights, with its adapter merged."""
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def may_learn(weights, neurons):
    """Return name -> bool tensor of the weight's shape, True where it may learn; written from the definition."""
    masks = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in weights.items()}
    for (layer, projection), indices in neurons.items():
        block = "self_attn" if projection in "qkvo" else "mlp"
        mask = masks[f"model.layers.{layer}.{block}.{projection}_proj.weight"]
        if projection in ("o", "down"):
            mask[:, indices] = True
        else:
            mask[indices] = True
    return masks


def assert_only_chosen_moved(before, after, neurons):
    """Check that no entries but the chosen moved, and over 99% of these did. before, after: from `plain_weights`."""
    moved, masks = 0, may_learn(before, neurons)
    assert after.keys() == before.keys()
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask]), name
        moved += int((after[name][mask] != before[name][mask]).sum())
    assert moved > 0.99 * sum(int(mask.sum()) for mask in masks.values())
