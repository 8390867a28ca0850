"""`update="mask"`: the chosen entries learn as in full training with masked gradients, and no other entry moves."""

import copy

import pytest
import torch
from conftest import padded_batch, tiny_llama
from small_training import CHOSEN, arguments, assert_only_chosen_moved, may_learn, plain_weights, sentences

from agnostic_train.errors import UserError
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.mask import GradientMask
from agnostic_train.training.trainer import NeuronTrainer


def mask_arguments(directory, **changes):
    return arguments(directory, update="mask", **changes)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim": "adamw_torch_fused", "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
    ],
)
def test_chosen_entries_follow_a_plain_masked_loop_and_no_others_move(tmp_path, settings):
    model = tiny_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    reference, before = copy.deepcopy(model), plain_weights(model)
    data = sentences(160)
    trainer = NeuronTrainer(
        model,
        mask_arguments(tmp_path, lr_scheduler_type="constant", train_sampling_strategy="sequential", **settings),
        train_dataset=data,
        neurons=CHOSEN,
    )
    trainer.train()
    assert_only_chosen_moved(before, plain_weights(model), CHOSEN)

    accumulation = settings.get("gradient_accumulation_steps", 1)
    masks = may_learn(before, CHOSEN)
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
        with torch.no_grad():  # the reference's decay moves all entries, so reset those that may not learn
            for name, parameter in reference.named_parameters():
                parameter.copy_(torch.where(masks[name], parameter, before[name]))
    for name, mask in masks.items():
        torch.testing.assert_close(
            dict(model.named_parameters())[name][mask], dict(reference.named_parameters())[name][mask],
            rtol=1e-4, atol=2e-6,
        )  # fmt: skip


def test_parameters_without_a_chosen_entry_do_not_require_grad(tmp_path):
    model = tiny_llama()
    trainer = NeuronTrainer(model, mask_arguments(tmp_path), train_dataset=sentences(), neurons=CHOSEN)
    trainer.train()
    learning = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    trainable = {name for name, parameter in model.named_parameters() if id(parameter) in learning}
    assert trainable == {name for name, mask in may_learn(plain_weights(model), CHOSEN).items() if mask.any()}
    assert len(trainer.optimizer.param_groups[0]["params"]) == len(trainable)


def test_mask_keeps_nan_gradients_from_frozen_entries():
    model = tiny_llama()
    mask = GradientMask(model, NeuronSet({(0, "q"): [2]}))
    weight = model.model.layers[0].self_attn.q_proj.weight
    (weight * torch.nan).sum().backward()
    assert weight.grad[2].isnan().all() and (weight.grad[3:] == 0).all()
    mask.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_clipping_by_a_nan_norm_does_not_reach_frozen_entries(tmp_path):
    """Clipping multiplies every gradient by a NaN norm after the mask, and zero times NaN is NaN."""

    class NanTrainer(NeuronTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs) * 1
            loss.register_hook(lambda gradient: gradient * torch.nan)
            return loss

    model = tiny_llama()
    before = copy.deepcopy(dict(model.named_parameters()))
    NanTrainer(model, mask_arguments(tmp_path, max_steps=1), train_dataset=sentences(), neurons=CHOSEN).train()
    for name, mask in may_learn(plain_weights(model), CHOSEN).items():
        value = dict(model.named_parameters())[name]
        assert torch.equal(value[~mask], before[name][~mask]), name
        assert value[mask].isnan().all()


@pytest.mark.parametrize("is_loaded", [True, False])
def test_momentum_and_decay_of_a_used_optimizer_do_not_move_frozen_entries(is_loaded):
    model, other = tiny_llama(), tiny_llama()
    weight, other_weight = (it.model.layers[0].self_attn.q_proj.weight for it in (model, other))
    full = torch.optim.AdamW([other_weight], lr=1e-2, weight_decay=0.5)
    other_weight.grad = torch.ones_like(other_weight)
    full.step()
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.5)
    mask = GradientMask(model, NeuronSet({(0, "q"): [2]}))
    if is_loaded:
        mask.guard(optimizer)
    optimizer.load_state_dict(full.state_dict())
    if not is_loaded:
        mask.guard(optimizer)
    for _ in range(3):
        (weight**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    frozen = torch.arange(len(weight)) != 2
    assert torch.equal(weight[frozen], before[frozen]) and not torch.equal(weight[2], before[2])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_decay_equals_that_of_the_unmasked_optimizer(kind, maximize):
    """Also while a schedule lowers the rate."""
    ends = []
    for masked in (False, True):
        model = tiny_llama().double()
        weight = model.model.layers[0].self_attn.q_proj.weight
        optimizer = kind([weight], lr=0.1, weight_decay=0.5, maximize=maximize)
        if masked:
            GradientMask(model, NeuronSet({(0, "q"): [2]})).guard(optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        for _ in range(3):
            (weight**2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        ends.append(weight[2].detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_step_skipped_by_a_gradient_scaler_decays_nothing(fused):
    """The scaler leaves skipping to a fused optimizer, whose hooks run nevertheless."""
    model = tiny_llama()
    mask = GradientMask(model, CHOSEN)
    optimizer = torch.optim.AdamW([it.parameter for it in mask.parameters], lr=0.1, weight_decay=0.1, fused=fused)
    mask.guard(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    batch = padded_batch([9, 9])
    moved = []
    for overflows in (True, False):
        before = [it.parameter.detach().clone() for it in mask.parameters]
        scaler.scale(model(**batch, labels=batch["input_ids"]).loss).backward()
        if overflows:
            mask.parameters[0].parameter.grad[tuple(mask.parameters[0].frozen.logical_not().nonzero()[0])] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(any(not torch.equal(it.parameter, old) for it, old in zip(mask.parameters, before, strict=True)))
    assert moved == [False, True]


@pytest.mark.parametrize("optim", ["adafactor", "rmsprop"])
def test_optimizers_that_may_mix_entries_are_refused(tmp_path, optim):
    trainer = NeuronTrainer(
        tiny_llama(), mask_arguments(tmp_path, optim=optim), train_dataset=sentences(), neurons=CHOSEN
    )
    with pytest.raises(UserError, match="training.optim"):
        trainer.train()
    assert not hasattr(trainer.model, "trained_neurons")  # because nothing was trained


def test_warning_for_half_precision_weights(caplog):
    from agnostic_train.training import mask

    mask.logger.addHandler(caplog.handler)
    GradientMask(tiny_llama().bfloat16(), CHOSEN)
    mask.logger.removeHandler(caplog.handler)
    assert "load the model in float32" in caplog.text


def test_removing_the_mask_restores_the_optimizers_decay():
    model = tiny_llama()
    mask = GradientMask(model, CHOSEN)
    optimizer = torch.optim.AdamW([it.parameter for it in mask.parameters], weight_decay=0.1)
    mask.guard(optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == 0
    mask.remove()
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
