"""`compact`, `mask` and a plain loop give the same weights, and no other entry ever moves."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from conftest import UPDATES, padded_batch, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from small_training import CHOSEN, arguments, assert_only_chosen_moved, may_learn, plain_weights, sentences
from torch.nn.utils import prune
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from agnostic_train.errors import UserError
from agnostic_train.model.decoder import find_decoder
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.scores.perplexity import NonFiniteLossError
from agnostic_train.training import guarded
from agnostic_train.training.callbacks import DetectionCallback
from agnostic_train.training.compact import NeuronConfig
from agnostic_train.training.trainer import NEURONS_FILE, NeuronTrainer, NeuronTrainingArguments

both_updates = pytest.mark.parametrize("update", UPDATES)


def trainer_of(model, directory, update, *, data=None, neurons=CHOSEN, callbacks=(), **changes):
    return NeuronTrainer(
        model, arguments(directory, **changes), train_dataset=data or sentences(), neurons=neurons, update=update,
        callbacks=list(callbacks),
    )  # fmt: skip


THIRTY_STEPS = dict(
    max_steps=30, gradient_accumulation_steps=2, max_grad_norm=0.1, lr_scheduler_type="cosine", warmup_steps=5,
    weight_decay=0.0, learning_rate=1e-3, train_sampling_strategy="sequential",
)  # fmt: skip


def plain_loop(model, data, optimizer_class=torch.optim.AdamW, **optimizer_settings):
    """Fine-tune all weights with masked gradients and the settings of `THIRTY_STEPS`."""
    masks = may_learn(plain_weights(model), CHOSEN)
    chosen = [parameter for name, parameter in model.named_parameters() if masks[name].any()]
    optimizer = optimizer_class(chosen, lr=1e-3, weight_decay=0.0, **optimizer_settings)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=5, num_training_steps=30)
    model.train()
    for step in range(30):
        for part in range(2):
            start = (step * 2 + part) * 4
            ids = torch.stack([row["input_ids"] for row in data[start : start + 4]])
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        for name, parameter in model.named_parameters():
            parameter.grad *= masks[name]
        torch.nn.utils.clip_grad_norm_(chosen, 0.1)
        optimizer.step()
        scheduler.step()
        model.zero_grad()
    return plain_weights(model)


OPTIMIZERS = {
    "adamw_torch": (torch.optim.AdamW, {}),
    "adamw_torch_fused": (torch.optim.AdamW, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}


@both_updates
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_thirty_steps_equal_a_plain_loop(tmp_path, update, optim, dtype, tolerance):
    """`tolerance` is the largest difference of a weight; the chosen weights move by up to 2e-2 (SGD: 8e-4)."""
    model, data = tiny_llama(attention_bias=True, tie_word_embeddings=True).to(dtype), sentences(240)
    before, reference = plain_weights(model), copy.deepcopy(model)
    optim_args = {"optim_args": "momentum=0.9"} if optim == "sgd" else {}
    trainer = trainer_of(model, tmp_path, update, data=data, optim=optim, **optim_args, **THIRTY_STEPS)
    trainer.train()
    after = plain_weights(trainer.model)
    assert_only_chosen_moved(before, after, CHOSEN)
    optimizer_class, settings = OPTIMIZERS[optim]
    expected = plain_loop(reference, data, optimizer_class, **settings)
    moved = max(float((expected[name] - before[name]).abs().max()) for name in before)
    assert moved > 20 * tolerance
    for name, mask in may_learn(before, CHOSEN).items():
        torch.testing.assert_close(after[name][mask], expected[name][mask], rtol=0, atol=tolerance)


@both_updates
def test_only_batch_size_times_accumulation_matters(tmp_path, update):
    ends = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        model = tiny_llama().double()
        settings = {**THIRTY_STEPS, "per_device_train_batch_size": batch_size, "max_steps": 10}
        settings["gradient_accumulation_steps"] = accumulation
        trainer = trainer_of(model, tmp_path, update, data=sentences(80), **settings)
        trainer.train()
        ends.append(plain_weights(trainer.model))
    for other in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-9)


@both_updates
def test_rerun_is_bitwise_reproducible(tmp_path, update):
    ends = []
    for _ in range(2):
        trainer = trainer_of(tiny_llama(attention_dropout=0.2), tmp_path, update)
        trainer.train()
        ends.append(plain_weights(trainer.model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_weight_decay_shrinks_the_delta_towards_zero(tmp_path):
    """The learning rate is so small that only the decay is visible: AdamW multiplies by 1 - lr * decay."""
    model = get_peft_model(tiny_llama(), NeuronConfig(neurons=CHOSEN))
    deltas = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for delta in deltas.values():
            delta.normal_()
    before = {name: delta.clone() for name, delta in deltas.items()}
    trainer = NeuronTrainer(
        model,
        arguments(tmp_path, max_steps=1, learning_rate=1e-6, weight_decay=1e5, lr_scheduler_type="constant"),
        train_dataset=sentences(),
    )
    trainer.train()
    for name, delta in deltas.items():
        torch.testing.assert_close(delta, before[name] * 0.9, rtol=1e-5, atol=5e-6)


def test_optimizer_state_covers_only_the_chosen_entries(tmp_path):
    trainer = trainer_of(tiny_llama(), tmp_path, "compact")
    trainer.train()
    num_chosen = sum(int(mask.sum()) for mask in may_learn(plain_weights(trainer.model), CHOSEN).values())
    assert sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad) == num_chosen
    for moment in ("exp_avg", "exp_avg_sq"):
        assert sum(state[moment].numel() for state in trainer.optimizer.state.values()) == num_chosen
    assert len(trainer.optimizer.state) == sum(len(group["params"]) for group in trainer.optimizer.param_groups)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 10


class PowerCut(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 13:
            raise KeyboardInterrupt


@both_updates
@pytest.mark.parametrize("interruption", [Stop, PowerCut])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, update, interruption):
    saving = dict(save_strategy="steps", save_steps=5)
    before = plain_weights(tiny_llama())
    whole = trainer_of(tiny_llama(), tmp_path / "whole", update, **saving)
    whole.train()
    part = trainer_of(tiny_llama(), tmp_path / "parts", update, callbacks=[interruption()], **saving)
    try:
        part.train()
    except KeyboardInterrupt:
        assert interruption is PowerCut
    # An exception in mid-epoch leaves the other entries untouched too.
    assert_only_chosen_moved(before, plain_weights(part.model), CHOSEN)
    resumed = trainer_of(tiny_llama(), tmp_path / "parts", update, **saving)
    resumed.train(resume_from_checkpoint=True)
    after = plain_weights(resumed.model)
    assert_only_chosen_moved(before, after, CHOSEN)
    assert all(torch.equal(value, after[name]) for name, value in plain_weights(whole.model).items())
    with pytest.raises(UserError, match="trains other neurons"):
        trainer_of(tiny_llama(), tmp_path / "parts", update, neurons=NeuronSet({(0, "q"): [0]})).train(True)


def test_resuming_without_an_optimizer_state_is_reported(tmp_path, caplog):
    saving = dict(save_strategy="steps", save_steps=2, save_only_model=True)
    trainer_of(tiny_llama(), tmp_path, "compact", max_steps=2, **saving).train()
    guarded.logger.addHandler(caplog.handler)
    trainer_of(tiny_llama(), tmp_path, "compact", max_steps=3, **saving).train(True)
    guarded.logger.removeHandler(caplog.handler)
    assert "checkpoint-2: has no optimizer (save_only_model); training continues with a new one" in caplog.text


def test_checkpoint_without_a_trainer_state_is_refused(tmp_path):
    saving = dict(save_strategy="steps", save_steps=2)
    trainer_of(tiny_llama(), tmp_path, "compact", max_steps=2, **saving).train()
    (tmp_path / "checkpoint-2/trainer_state.json").unlink()
    with pytest.raises(UserError, match="trainer_state.json: missing, so the checkpoint is incomplete"):
        trainer_of(tiny_llama(), tmp_path, "compact", max_steps=3, **saving).train(True)


@pytest.mark.parametrize("loss", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_loss_of_a_list_batch_stops_training(tmp_path, monkeypatch, loss):
    """TRL's GRPOTrainer passes a batch as a list of rows."""
    trainer = trainer_of(tiny_llama(), tmp_path, "compact")
    monkeypatch.setattr(Trainer, "training_step", lambda self, model, inputs: torch.tensor(loss))
    with pytest.raises(NonFiniteLossError, match=f"the loss is {loss} at step 1; earlier"):
        trainer.training_step(trainer.model, [{"prompt": "a"}])


@both_updates
def test_training_twice_moves_only_the_chosen_entries(tmp_path, update):
    """The second time, the optimizer already exists, wrapped by accelerate."""
    trainer = trainer_of(tiny_llama(), tmp_path, update, max_steps=3)
    before = plain_weights(tiny_llama())
    trainer.train()
    once = plain_weights(trainer.model)
    trainer.train()
    after = plain_weights(trainer.model)
    assert_only_chosen_moved(before, after, CHOSEN)
    assert any(not torch.equal(value, once[name]) for name, value in after.items())


@both_updates
def test_model_created_by_model_init(tmp_path, update):
    trainer = NeuronTrainer(
        None,
        arguments(tmp_path),
        train_dataset=sentences(),
        neurons=CHOSEN,
        update=update,
        model_init=lambda: tiny_llama(),
    )
    before = plain_weights(tiny_llama())
    trainer.train()
    assert isinstance(trainer.model, PeftModel) is (update == "compact")
    assert_only_chosen_moved(before, plain_weights(trainer.model), CHOSEN)


@pytest.mark.parametrize(("update", "detects"), [("compact", True), ("mask", True), ("compact", False)])
def test_each_training_of_a_model_init_has_its_own_neurons(tmp_path, update, detects):
    """Those of its own model, which are detected or have an adapter, not those of the previous training."""
    models = [tiny_llama(), tiny_llama(initializer_range=0.5)]
    bases, trained = [plain_weights(model) for model in models], []
    if not detects:
        others = NeuronSet({(1, "q"): [0, 3]}, find_decoder(models[0]).sizes)
        models = [
            get_peft_model(models[0], NeuronConfig(neurons=CHOSEN)),
            get_peft_model(models[1], NeuronConfig(neurons=others)),
        ]
    callback = DetectionCallback(
        {"en": [padded_batch([5, 9, 7])], "sw": [padded_batch([6, 4], seed=2)]}, "related", top_ratio=0.2,
        consistency=0.6, progress=False,
    )  # fmt: skip
    queue = [models[0], *models]
    trainer = NeuronTrainer(
        None, arguments(tmp_path), train_dataset=sentences(), update=update, model_init=lambda: queue.pop(0),
        callbacks=[callback] if detects else [],
    )  # fmt: skip
    for base in bases:
        trainer.train()
        trained.append(trainer.neurons)
        assert_only_chosen_moved(base, plain_weights(trainer.model), trainer.neurons)
        if detects:
            assert trainer.neurons == callback.choice.neurons
    assert trained[0] != trained[1]
    with pytest.raises(UserError):
        trainer.train(resume_from_checkpoint="nowhere")
    assert trainer.neurons == trained[1]


@both_updates
def test_training_after_a_resumed_one_has_its_own_neurons(tmp_path, update):
    callback = DetectionCallback(
        {"en": [padded_batch([5, 9, 7])], "sw": [padded_batch([6, 4], seed=2)]}, "related", top_ratio=0.2,
        consistency=0.6, progress=False,
    )  # fmt: skip
    sizes = [0.3, 0.3, 0.3, 0.5]
    trainer = NeuronTrainer(
        None, arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1), train_dataset=sentences(),
        update=update, model_init=lambda: tiny_llama(initializer_range=sizes.pop(0)), callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    first = trainer.neurons
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.neurons == first
    trainer.train()
    assert trainer.neurons == callback.choice.neurons != first


@both_updates
def test_best_checkpoint_is_loaded_at_the_end(tmp_path, update):
    """Memorising the training text makes other random sentences less likely, so the first checkpoint is the best."""
    trainer = NeuronTrainer(
        tiny_llama(),
        arguments(
            tmp_path, eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=5,
            load_best_model_at_end=True,
        ),
        train_dataset=sentences(), eval_dataset=sentences(8, seed=4), neurons=CHOSEN, update=update,
    )  # fmt: skip
    before = plain_weights(tiny_llama())
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1] - 0.01
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    best = plain_weights(trainer.model)
    assert_only_chosen_moved(before, best, CHOSEN)
    trainer.train()  # although PEFT froze the adapter when it loaded it
    assert_only_chosen_moved(best, plain_weights(trainer.model), CHOSEN)


def test_bfloat16_weights_stagnate_with_mask_and_move_with_compact(tmp_path):
    """A step of 1e-5 is below half the distance between neighbouring bfloat16 numbers around 0.3."""
    moved = {}
    for update in UPDATES:
        base = tiny_llama().bfloat16()
        before = plain_weights(base)
        trainer = trainer_of(
            base, tmp_path, update, max_steps=100, learning_rate=1e-5, lr_scheduler_type="constant", weight_decay=0.0
        )
        trainer.train()
        masks = may_learn(before, CHOSEN)
        num_chosen = sum(int(mask.sum()) for mask in masks.values())
        if update == "compact":
            deltas = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
            assert all(delta.dtype == torch.float32 for delta in deltas)
            moved[update] = sum(int((delta != 0).sum()) for delta in deltas) / num_chosen
        else:
            after = plain_weights(trainer.model)
            moved[update] = sum(int((after[it] != before[it])[mask].sum()) for it, mask in masks.items()) / num_chosen
    assert moved["compact"] == 1.0 and moved["mask"] < 0.25


def test_missing_neurons_and_unknown_updates_are_refused(tmp_path):
    with pytest.raises(UserError, match="NeuronSet"):
        NeuronTrainer(tiny_llama(), arguments(tmp_path), train_dataset=sentences()).train()
    for update in UPDATES:
        with pytest.raises(UserError, match="the set is empty"):
            trainer_of(tiny_llama(), tmp_path, update, neurons=NeuronSet({})).train()
    with pytest.raises(UserError, match="training.update"):
        trainer_of(tiny_llama(), tmp_path, "rows")


def test_other_adapters_are_refused(tmp_path):
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    for update in UPDATES:
        with pytest.raises(UserError, match=r"has adapters \(LORA\)"):
            trainer_of(lora, tmp_path, update)
    ours = get_peft_model(tiny_llama(), NeuronConfig(neurons=CHOSEN))
    with pytest.raises(UserError, match="has adapters"):
        trainer_of(ours, tmp_path, "mask")
    with pytest.raises(UserError, match="adapter of other neurons"):
        trainer_of(ours, tmp_path, "compact", neurons=NeuronSet({(0, "q"): [0]}))
    ours.requires_grad_(False)
    with pytest.raises(UserError, match="is_trainable"):
        trainer_of(ours, tmp_path, "compact", neurons=None)


@both_updates
def test_compiled_models_are_refused(tmp_path, update):
    """Their weights have other names, under which neither an adapter nor a checkpoint could be loaded."""
    by_layer, with_adapter = tiny_llama(), get_peft_model(tiny_llama(), NeuronConfig(neurons=CHOSEN))
    by_layer.model.layers[1] = torch.compile(by_layer.model.layers[1], backend="eager")
    for model in (*(torch.compile(it, backend="eager") for it in (tiny_llama(), with_adapter)), by_layer):
        with pytest.raises(UserError, match="model: torch.compile has wrapped it"):
            trainer_of(model, tmp_path, update).train()


@both_updates
def test_pruned_models_are_refused(tmp_path, update):
    """Each pass would overwrite what was trained."""
    model = tiny_llama()
    for layer in model.model.layers:
        prune.identity(layer.self_attn.q_proj, "weight")
    with pytest.raises(UserError, match="q_proj is pruned or reparametrised"):
        trainer_of(model, tmp_path, update, neurons=NeuronSet({(0, "q"): [1]})).train()


@both_updates
def test_offloaded_models_are_refused(tmp_path, update):
    with pytest.raises(UserError, match="weights are offloaded or empty; training or exporting needs them"):
        trainer_of(cpu_offload(tiny_llama()), tmp_path, update).train()


@both_updates
def test_resuming_with_another_update_is_refused(tmp_path, update):
    """Else the trained weights would be lost without a word."""
    trainer_of(tiny_llama(), tmp_path, update, save_strategy="steps", save_steps=4).train()
    (other,) = {*UPDATES} - {update}
    with pytest.raises(UserError, match=f"training.update: .*checkpoint-4 was trained with '{update}'"):
        trainer_of(tiny_llama(), tmp_path, other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(UserError, match="resume_from_checkpoint: no such folder nowhere"):
        trainer_of(tiny_llama(), tmp_path, update).train(resume_from_checkpoint="nowhere")


def test_best_checkpoint_of_a_named_adapter_is_refused(tmp_path):
    """`Trainer` would load the default adapter into it, or nothing."""
    best = dict(load_best_model_at_end=True, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    named = get_peft_model(tiny_llama(), NeuronConfig(neurons=CHOSEN), adapter_name="sw")
    two = get_peft_model(tiny_llama(), NeuronConfig(neurons=CHOSEN))
    two.add_adapter("sw", NeuronConfig(neurons=CHOSEN))
    two.set_adapter("sw")
    for model in (named, two):
        with pytest.raises(UserError, match="only an adapter named 'default', and the active one is 'sw'"):
            trainer_of(model, tmp_path, "compact", neurons=None, **best)
        trainer_of(model, tmp_path, "compact", neurons=None)


def test_existing_adapter_continues_training(tmp_path):
    ours = get_peft_model(tiny_llama(), NeuronConfig(neurons=CHOSEN))
    trainer = trainer_of(ours, tmp_path, None, neurons=None)
    trainer.train()
    assert trainer.neurons == CHOSEN
    assert_only_chosen_moved(plain_weights(tiny_llama()), plain_weights(trainer.model), CHOSEN)


def test_detection_during_training_does_not_change_the_result(tmp_path):
    """Detection runs every few steps on base plus adapter, and leaves no trace in the trained weights."""
    corpora = {language: [padded_batch([5, 9, 7], seed=seed)] for seed, language in enumerate(("en", "sw"))}
    ends = []
    for every_n_steps in (None, 4):
        callback = DetectionCallback(corpora, "related", every_n_steps, top_ratio=0.2, consistency=0.6, progress=False)
        trainer = trainer_of(tiny_llama(), tmp_path, "compact", neurons=None, callbacks=[callback])
        trainer.train()
        ends.append(plain_weights(trainer.model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert [it["step"] for it in trainer.state.log_history if "neurons/shared" in it] == [0, 4, 8, 12, 16, 20]
    assert find_decoder(trainer.model).sizes == find_decoder(tiny_llama()).sizes


def test_mask_ends_with_its_training(tmp_path):
    """Train one set, then another, then all weights: each training moves exactly the entries it should."""
    model, settings = tiny_llama(), dict(max_steps=3, weight_decay=0.0)
    for neurons in (NeuronSet({(0, "q"): [1]}), NeuronSet({(0, "q"): [5]})):
        before = plain_weights(model)
        trainer_of(model, tmp_path, "mask", neurons=neurons, **settings).train()
        assert_only_chosen_moved(before, plain_weights(model), neurons)
    assert model.trained_neurons == NeuronSet({(0, "q"): [1, 5]})
    before = plain_weights(model)
    Trainer(model, arguments(tmp_path, **settings), train_dataset=sentences()).train()
    assert all(not torch.equal(value, before[name]) for name, value in plain_weights(model).items())


def test_unfrozen_base_is_frozen_again(tmp_path):
    ours = get_peft_model(tiny_llama(), NeuronConfig(neurons=CHOSEN))
    ours.requires_grad_(True)
    trainer = trainer_of(ours, tmp_path, "compact", neurons=None)
    trainer.train()
    assert_only_chosen_moved(plain_weights(tiny_llama()), plain_weights(trainer.model), CHOSEN)


def test_optimizer_must_hold_all_that_is_trained(tmp_path):
    model = tiny_llama()
    weight = model.model.layers[0].self_attn.q_proj.weight
    settings = dict(train_dataset=sentences(), neurons=CHOSEN, update="mask")
    trainer = NeuronTrainer(
        model, arguments(tmp_path), **settings, optimizers=(torch.optim.AdamW([weight], lr=1e-2), None)
    )
    with pytest.raises(UserError, match="lacks 6 of the parameters to train, such as model.layers.0.self_attn.k_proj"):
        trainer.train()
    trainer = trainer_of(tiny_llama(), tmp_path, "mask", neurons=NeuronSet({(0, "q"): [1]}))
    trainer.train()
    trainer.neurons = {(0, "q"): [2], (1, "down"): [3]}
    with pytest.raises(UserError, match="lacks 1 .* such as model.layers.1.mlp.down_proj.weight; .* make another"):
        trainer.train()
    trainer.neurons = {(1, "down"): [3]}  # no adapter is to blame
    with pytest.raises(UserError, match="lacks 1 .* such as model.layers.1.mlp.down_proj.weight; .* make another"):
        trainer.train()


@pytest.mark.parametrize("kind", [NeuronTrainingArguments, TrainingArguments])
@pytest.mark.parametrize("key", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_that_would_round_frozen_weights_is_refused(tmp_path, kind, key):
    settings = kind(output_dir=str(tmp_path), use_cpu=True, report_to=[], **{key: True})
    with pytest.raises(UserError, match=f"training.{key}: evaluation would round all weights in place"):
        NeuronTrainer(tiny_llama(), settings, train_dataset=sentences(), neurons=CHOSEN)


def test_arguments_say_how_the_trainer_updates(tmp_path):
    given = arguments(tmp_path, update="mask")
    trainer = NeuronTrainer(tiny_llama(), given, train_dataset=sentences(), neurons=CHOSEN, update="compact")
    assert (trainer.args.update, given.update) == ("compact", "mask")


def test_setups_that_would_train_nothing_or_too_much_are_refused(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = NeuronTrainer(
        model, arguments(tmp_path), train_dataset=sentences(), neurons=CHOSEN, optimizers=(optimizer, None)
    )
    with pytest.raises(UserError, match="created before the adapter"):
        trainer.train()
    two = get_peft_model(tiny_llama(), NeuronConfig(neurons=CHOSEN))
    two.add_adapter("second", NeuronConfig(neurons=CHOSEN))
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(UserError, match="several adapters are active"):
        trainer_of(two, tmp_path, "compact", neurons=None)
    for neurons in (None, CHOSEN):
        disabled = get_peft_model(tiny_llama(), NeuronConfig(neurons=CHOSEN))
        disabled.base_model.disable_adapter_layers()
        with pytest.raises(UserError, match="its adapter is disabled; enable it first"):
            trainer_of(disabled, tmp_path, "compact", neurons=neurons)
    native = tiny_llama()
    native.add_adapter(NeuronConfig(neurons=CHOSEN))
    with pytest.raises(UserError, match="perhaps of an earlier NeuronTrainer"):
        trainer_of(native, tmp_path, "compact", neurons=None)


@both_updates
def test_neurons_can_be_a_file_or_a_dict_and_the_model_come_from_model_init(tmp_path, update):
    CHOSEN.save(tmp_path / "n.safetensors")
    settings = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    for resume in (None, True):
        trainer = NeuronTrainer(
            args=settings, train_dataset=sentences(), neurons=tmp_path / "n.safetensors", update=update,
            model_init=lambda: tiny_llama(),
        )  # fmt: skip
        trainer.train(resume)
        assert trainer.neurons == CHOSEN
    assert trainer_of(tiny_llama(), tmp_path, update, neurons={(0, "q"): [1]}).neurons == NeuronSet({(0, "q"): [1]})


def test_neurons_are_saved_before_training_too(tmp_path):
    CHOSEN.save(tmp_path / "n.safetensors")
    trainer = NeuronTrainer(
        args=arguments(tmp_path), neurons=tmp_path / "n.safetensors", model_init=lambda: tiny_llama()
    )
    trainer.save_model(str(tmp_path / "untrained"))
    assert NeuronSet.load(tmp_path / "untrained" / NEURONS_FILE) == CHOSEN


def test_arguments_are_found_in_any_position(tmp_path):
    """Preference trainers have a reference model before the arguments."""

    class WithReference(Trainer):
        def __init__(self, model, reference=None, args=None, **kwargs):
            super().__init__(model, args, **kwargs)

    class Mixed(NeuronTrainer, WithReference):
        pass

    trainer = Mixed(tiny_llama(), None, arguments(tmp_path, update="mask"), train_dataset=sentences(), neurons=CHOSEN)
    assert trainer.update == "mask"
