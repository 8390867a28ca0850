"""`update="mask"`: the chosen entries learn as in full training with masked gradients, nothing else moves."""

import copy

import pytest
import torch
from conftest import tiny_llama
from transformers import TrainerCallback

from agnostic_train.files import UserError
from agnostic_train.neurons import NeuronSet
from agnostic_train.training.mask import GradientMask
from agnostic_train.training.trainer import NeuronTrainer, NeuronTrainingArguments

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


def chosen_entries(model, neurons):
    """name -> bool, the shape of the parameter: True where it may learn. Written from the definition."""
    masks = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in model.named_parameters()}
    for (layer, projection), indices in neurons.items():
        block = "self_attn" if projection in "qkvo" else "mlp"
        mask = masks[f"model.layers.{layer}.{block}.{projection}_proj.weight"]
        if projection in ("o", "down"):
            mask[:, indices] = True
        else:
            mask[indices] = True
    return masks


def assert_only_chosen_moved(before, model, neurons):
    moved = 0
    for name, mask in chosen_entries(model, neurons).items():
        value, old = dict(model.named_parameters())[name], before[name]
        assert torch.equal(value[~mask], old[~mask]), name
        moved += int((value[mask] != old[mask]).sum())
    total = sum(int(mask.sum()) for mask in chosen_entries(model, neurons).values())
    assert moved > 0.99 * total


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim": "adamw_torch_fused", "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
    ],
)
def test_nothing_else_moves_and_the_chosen_follow_a_plain_masked_loop(tmp_path, settings):
    model = tiny_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    reference, before = copy.deepcopy(model), copy.deepcopy(dict(model.named_parameters()))
    data = sentences(160)
    trainer = NeuronTrainer(
        model,
        arguments(tmp_path, lr_scheduler_type="constant", train_sampling_strategy="sequential", **settings),
        train_dataset=data,
        neurons=CHOSEN,
    )
    trainer.train()
    assert_only_chosen_moved(before, model, CHOSEN)

    accumulation = settings.get("gradient_accumulation_steps", 1)
    masks = chosen_entries(reference, CHOSEN)
    decaying = [p for name, p in reference.named_parameters() if masks[name].any()]
    if settings.get("optim") == "sgd":
        optimizer = torch.optim.SGD(decaying, lr=1e-2, weight_decay=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(decaying, lr=1e-2, weight_decay=0.1)
    reference.train()
    for step in range(20):
        for part in range(accumulation):
            start = (step * accumulation + part) * 4
            ids = torch.stack([row["input_ids"] for row in data[start : start + 4]])
            (reference(input_ids=ids, labels=ids).loss / accumulation).backward()
        for name, parameter in reference.named_parameters():
            parameter.grad *= masks[name]
        torch.nn.utils.clip_grad_norm_(decaying, settings.get("max_grad_norm", 1.0))
        optimizer.step()
        reference.zero_grad()
        with torch.no_grad():  # the reference's decay moves all entries: those that may not learn are put back
            for name, parameter in reference.named_parameters():
                parameter.copy_(torch.where(masks[name], parameter, before[name]))
    for name, mask in masks.items():
        torch.testing.assert_close(
            dict(model.named_parameters())[name][mask], dict(reference.named_parameters())[name][mask],
            rtol=1e-4, atol=2e-6,
        )  # fmt: skip


def test_parameters_without_a_chosen_entry_do_not_require_grad(tmp_path):
    model = tiny_llama()
    trainer = NeuronTrainer(model, arguments(tmp_path), train_dataset=sentences(), neurons=CHOSEN)
    trainer.train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, mask in chosen_entries(model, CHOSEN).items() if mask.any()}
    assert len(trainer.optimizer.param_groups[0]["params"]) == len(trainable)


def test_nan_gradients_do_not_reach_frozen_entries():
    model = tiny_llama()
    mask = GradientMask(model, NeuronSet({(0, "q"): [2]}))
    weight = model.model.layers[0].self_attn.q_proj.weight
    (weight * torch.nan).sum().backward()
    assert weight.grad[2].isnan().all() and (weight.grad[3:] == 0).all()
    mask.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_nan_loss_does_not_reach_frozen_entries_through_clipping(tmp_path):
    """Clipping multiplies every gradient by a norm that is NaN, after the mask: zero times NaN is NaN."""

    class NanTrainer(NeuronTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * torch.nan

    model = tiny_llama()
    before = copy.deepcopy(dict(model.named_parameters()))
    NanTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=sentences(), neurons=CHOSEN).train()
    for name, mask in chosen_entries(model, CHOSEN).items():
        value = dict(model.named_parameters())[name]
        assert torch.equal(value[~mask], before[name][~mask]), name
        assert value[mask].isnan().all()


def test_old_momentum_and_decay_of_a_loaded_optimizer_do_not_move_frozen_entries():
    model, other = tiny_llama(), tiny_llama()
    weight, other_weight = (it.model.layers[0].self_attn.q_proj.weight for it in (model, other))
    full = torch.optim.AdamW([other_weight], lr=1e-2, weight_decay=0.5)
    other_weight.grad = torch.ones_like(other_weight)
    full.step()
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.5)
    GradientMask(model, NeuronSet({(0, "q"): [2]})).guard(optimizer)
    optimizer.load_state_dict(full.state_dict())
    for _ in range(3):
        (weight**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    frozen = torch.arange(len(weight)) != 2
    assert torch.equal(weight[frozen], before[frozen]) and not torch.equal(weight[2], before[2])


class StopAtTen(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 10


def checkpointing_trainer(model, directory, neurons=CHOSEN, callbacks=()):
    settings = arguments(directory, save_strategy="steps", save_steps=10)
    return NeuronTrainer(model, settings, train_dataset=sentences(), neurons=neurons, callbacks=list(callbacks))


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path):
    whole, resumed = tiny_llama(), tiny_llama()
    before = copy.deepcopy(dict(whole.named_parameters()))
    checkpointing_trainer(whole, tmp_path / "whole").train()
    checkpointing_trainer(tiny_llama(), tmp_path / "parts", callbacks=[StopAtTen()]).train()
    checkpointing_trainer(resumed, tmp_path / "parts").train(resume_from_checkpoint=True)
    for model in (whole, resumed):
        assert_only_chosen_moved(before, model, CHOSEN)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(UserError, match="trains other neurons"):
        checkpointing_trainer(tiny_llama(), tmp_path / "parts", NeuronSet({(0, "q"): [0]})).train(True)


@pytest.mark.parametrize("optim", ["adafactor", "rmsprop"])
def test_optimizers_that_may_mix_entries_are_refused(tmp_path, optim):
    trainer = NeuronTrainer(tiny_llama(), arguments(tmp_path, optim=optim), train_dataset=sentences(), neurons=CHOSEN)
    with pytest.raises(UserError, match="training.optim"):
        trainer.train()


def test_half_precision_is_warned_of(caplog):
    from agnostic_train.training import mask

    mask.logger.addHandler(caplog.handler)
    GradientMask(tiny_llama().bfloat16(), CHOSEN)
    mask.logger.removeHandler(caplog.handler)
    assert "load the model in float32" in caplog.text


def test_neurons_or_a_callback_are_needed(tmp_path):
    with pytest.raises(UserError, match="NeuronSet"):
        NeuronTrainer(tiny_llama(), arguments(tmp_path), train_dataset=sentences())
    with pytest.raises(UserError, match="no neuron"):
        NeuronTrainer(tiny_llama(), arguments(tmp_path), train_dataset=sentences(), neurons=NeuronSet({})).train()
    with pytest.raises(UserError, match="training.update"):
        NeuronTrainer(tiny_llama(), arguments(tmp_path), train_dataset=sentences(), neurons=CHOSEN, update="rows")


def test_training_twice_keeps_the_promise(tmp_path):
    """The second time the optimizer is there already, wrapped by accelerate."""
    model = tiny_llama()
    before = copy.deepcopy(dict(model.named_parameters()))
    trainer = NeuronTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=sentences(), neurons=CHOSEN)
    trainer.train()
    once = copy.deepcopy(model.state_dict())
    trainer.train()
    assert_only_chosen_moved(before, model, CHOSEN)
    assert any(not torch.equal(value, once[name]) for name, value in model.state_dict().items())
