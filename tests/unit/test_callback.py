"""`DetectionCallback`: a `NeuronTrainer` trains what it detects, a plain `Trainer` only reports it."""

from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from conftest import padded_batch, tiny_llama
from small_training import arguments, assert_only_chosen_moved, plain_weights, sentences
from transformers import Trainer, TrainerCallback, TrainingArguments

from agnostic_train.detection.detect import detect_neurons
from agnostic_train.errors import UserError
from agnostic_train.model.decoder import find_decoder
from agnostic_train.training import callbacks
from agnostic_train.training.callbacks import DetectionCallback
from agnostic_train.training.strategy import BASELINES, Strategy
from agnostic_train.training.trainer import NeuronTrainer


def corpora():
    return {language: [padded_batch([5, 9, 7], seed=seed)] for seed, language in enumerate(("en", "sw"))}


def test_neuron_trainer_trains_what_the_callback_detects(tmp_path):
    model = tiny_llama()
    before = plain_weights(model)
    callback = DetectionCallback(corpora(), strategy="related", top_ratio=0.2, consistency=0.6, progress=False)
    callback.run = Mock(wraps=callback.run)
    trainer = NeuronTrainer(model, arguments(tmp_path), train_dataset=sentences(), callbacks=[callback])
    trainer.train()
    assert callback.run.call_count == 1
    assert trainer.neurons == callback.neurons.related["en"] | callback.neurons.related["sw"]
    assert_only_chosen_moved(before, plain_weights(trainer.model), trainer.neurons)
    first = trainer.state.log_history[0]
    assert first["step"] == 0 and first["neurons/shared"] == len(callback.neurons.shared)
    assert first["agnostic_score"] == pytest.approx(callback.score.value)


def test_callback_only_reports_in_a_plain_trainer(tmp_path, capsys):
    """Because the model has dropout, the loss curve shows any change of the random state."""
    curves, callback = [], None
    for with_callback in (False, True):
        model = tiny_llama(attention_dropout=0.2)
        callback = DetectionCallback(
            corpora(), every_n_steps=3, top_ratio=0.2, consistency=0.6, progress=False, control_seeds=[1]
        )
        args = TrainingArguments(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=8, logging_steps=1, save_strategy="no",
            disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=sentences(), callbacks=[callback] if with_callback else [])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        curves.append((losses, {name: value.clone() for name, value in model.state_dict().items()}))
    assert len(curves[0][0]) == 8 and curves[0][0] == curves[1][0]
    assert all(torch.equal(curves[0][1][name], curves[1][1][name]) for name in curves[0][1])
    reports = [entry for entry in trainer.state.log_history if "neurons/shared" in entry]
    assert [(it["step"], it["epoch"]) for it in reports] == [(0, 0), (3, 1.0), (6, 2.0)]
    printed = [line for line in capsys.readouterr().out.splitlines() if "neurons/shared" in line]
    assert [f"'epoch': {it['epoch']}" in line for it, line in zip(reports, printed, strict=True)] == [True] * 3
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert find_decoder(model).sizes == callback.neurons.shared.sizes


class StopAtTen(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 10


def test_resumed_run_logs_the_same_values(tmp_path):
    histories = []
    for interrupted in (False, True):
        settings = arguments(tmp_path / str(interrupted), save_strategy="steps", save_steps=10)

        def train(*more, settings=settings, resume=None):
            callback = DetectionCallback(corpora(), "related", 5, top_ratio=0.2, consistency=0.6, progress=False)
            trainer = NeuronTrainer(tiny_llama(), settings, train_dataset=sentences(), callbacks=[callback, *more])
            trainer.train(resume_from_checkpoint=resume)
            return [entry for entry in trainer.state.log_history if "neurons/shared" in entry]

        if interrupted:
            train(StopAtTen())
            histories.append(train(resume=True))
        else:
            histories.append(train())
    assert [entry["step"] for entry in histories[0]] == [0, 5, 10, 15, 20]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("update", ["compact", "mask"])
def test_resumed_run_detects_only_when_due(tmp_path, update):
    """No detection is due at the checkpoint of step 10; the neurons to train come from the checkpoint."""

    def train(*more, resume=None):
        callback = DetectionCallback(corpora(), "related", 7, top_ratio=0.2, consistency=0.6, progress=False)
        settings = arguments(tmp_path, save_strategy="steps", save_steps=10, max_steps=12)
        trainer = NeuronTrainer(
            tiny_llama(), settings, train_dataset=sentences(), callbacks=[callback, *more], update=update
        )
        trainer.train(resume_from_checkpoint=resume)
        return callback, trainer

    first, trainer = train(StopAtTen())
    resumed, resumed_trainer = train(resume=True)
    with pytest.raises(ValueError, match="nothing was detected so far"):
        resumed.metrics()
    assert resumed.neurons is None and resumed.score is None
    assert resumed.choice.neurons == resumed_trainer.neurons == trainer.neurons == first.choice.neurons
    assert [it["step"] for it in resumed_trainer.state.log_history if "neurons/shared" in it] == [0, 7]


def test_losses_are_still_logged_at_steps_with_a_detection(tmp_path):
    callback = DetectionCallback(corpora(), "related", 2, top_ratio=0.2, consistency=0.6, progress=False)
    settings = arguments(tmp_path, max_steps=4, logging_steps=2)
    trainer = NeuronTrainer(tiny_llama(), settings, train_dataset=sentences(), callbacks=[callback])
    trainer.train()
    for name in ("loss", "neurons/shared"):
        assert [it["step"] for it in trainer.state.log_history if name in it and it["step"]] == [2, 4]


@pytest.mark.parametrize("change", [lambda it: it[:, :20].mul_(3), lambda it: it.copy_(it.flip(1))])
def test_counts_of_other_weights_are_not_resumed(tmp_path, change):
    """A callback that detects again finds the completed counts of the first detection in its folder.

    The same weights in another order count as other weights.
    """
    callback = DetectionCallback(
        corpora(), "related", top_ratio=0.2, consistency=0.6, progress=False, resume_dir=tmp_path / "counts"
    )
    model, detected = tiny_llama(), []
    for _ in range(2):
        callback.run(model)
        detected.append(callback.neurons)
        with torch.no_grad():
            for layer in find_decoder(model).layers:
                change(layer.projections["down"].linear.weight)
    assert detected[0].related != detected[1].related


@pytest.mark.parametrize(
    "settings", [{"attention": "paper"}, {"top_ratio": 0.1}, {"projections": ["q"]}, {"activations": False}], ids=str
)
def test_counts_of_one_other_setting_are_not_resumed(tmp_path, settings):
    model, batches = tiny_llama(), [padded_batch([5, 9, 7, 4])]

    def detect(resume_dir, **changed):
        changed = {"top_ratio": 0.2, "consistency": 0.6, "progress": False} | changed
        return detect_neurons(model, {"a": batches, "b": batches}, **changed, resume_dir=resume_dir)

    for first, second in ((settings, {}), ({}, settings)):
        folder = tmp_path / str(len(first))
        detect(folder, **first)
        resumed, expected = (detect(it, **second) for it in (folder, None))
        assert resumed.related == expected.related
        assert (resumed.activations is None) == (expected.activations is None)


def test_counts_of_other_settings_or_batches_are_not_resumed(tmp_path):
    model = tiny_llama()

    def detect(batches, resume_dir, **settings):
        settings = dict(top_ratio=0.2, consistency=0.6, progress=False) | settings
        return detect_neurons(model, {"a": batches, "b": batches}, **settings, resume_dir=resume_dir)

    lengths = [5, 9, 7, 4]
    four, two = [padded_batch(lengths)], [padded_batch(lengths[:2]), padded_batch(lengths[2:])]
    shorter = [four[0] | {"attention_mask": four[0]["attention_mask"].clone()}]
    shorter[0]["attention_mask"][1, 5:] = 0
    uncounted = [four[0] | {"special_tokens_mask": torch.arange(9).expand(4, -1) < 2}]
    later = [two[0], padded_batch(lengths[2:], seed=5)]
    changes = [(it, {}) for it in (four, two, later, [*later, *later], two, shorter, uncounted)]
    for batches, settings in (*changes, (four, {"top_ratio": 0.1}), (four, {"attention": "paper"})):
        resumed, expected = (detect(batches, it, **settings) for it in (tmp_path, None))
        assert resumed.related == expected.related and resumed.settings == expected.settings
    detect(four, tmp_path / "unpruned", pruning=False)
    assert detect(four, tmp_path / "unpruned").exact_share == detect(four, None).exact_share


def test_integrations_of_a_plain_trainer_get_the_values(tmp_path, monkeypatch):
    logged, integrations = [], []

    class Integration(TrainerCallback):
        def __init__(self):
            integrations.append(self)

        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append((state.global_step, logs))

    monkeypatch.setattr(callbacks, "get_reporting_integration_callbacks", lambda report_to: [Integration])
    settings = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=4, disable_tqdm=True)
    callback = DetectionCallback(corpora(), every_n_steps=2, top_ratio=0.2, consistency=0.6, progress=False)
    Trainer(tiny_llama(), settings, train_dataset=sentences(), callbacks=[callback]).train()
    assert [step for step, _ in logged] == [0, 2, 4]
    assert logged[-1][1] == callback.metrics() | {"epoch": 4 / 3} and "agnostic_score" in logged[-1][1]
    assert len(integrations) == 1  # each further TensorBoard integration would open another file


def test_strategy_for_an_undetected_language_is_refused():
    with pytest.raises(UserError, match=r"training\.languages: 'zz' isn't among the detected languages"):
        DetectionCallback(corpora(), Strategy("shared", languages=["zz"]))


def test_invalid_arguments_are_refused_at_construction():
    with pytest.raises(TypeError, match="no option 'top_ration'"):
        DetectionCallback(corpora(), top_ration=0.1)
    with pytest.raises(TypeError, match="no option 'model'"):
        DetectionCallback(corpora(), model=tiny_llama())
    with pytest.raises(TypeError, match="'sw' has one batch where several were expected"):
        DetectionCallback({"sw": padded_batch([5])})
    with pytest.raises(ValueError, match="score_corpora: no corpus for sw"):
        DetectionCallback(corpora(), score_corpora={"en": []})


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_strategies_are_refused_before_detection(tmp_path, name):
    with pytest.raises(UserError, match=f"strategy: '{name}' trains no neurons; .* shared, exclusive"):
        NeuronTrainer(tiny_llama(), arguments(tmp_path), callbacks=[DetectionCallback(corpora(), name)])
    trainer = NeuronTrainer(tiny_llama(), arguments(tmp_path), train_dataset=sentences())
    trainer.add_callback(DetectionCallback(corpora(), name))
    with pytest.raises(UserError, match=f"strategy: '{name}' trains no neurons"):
        trainer.train()


def test_callback_can_be_added_after_construction(tmp_path):
    options = dict(top_ratio=0.2, consistency=0.6, progress=False)
    trainer = NeuronTrainer(tiny_llama(), arguments(tmp_path, max_steps=1), train_dataset=sentences())
    detection = DetectionCallback(corpora(), "related", **options)
    trainer.add_callback(detection)
    trainer.train()
    neurons = detection.neurons
    assert trainer.neurons == neurons.related["en"] | neurons.related["sw"] and trainer.state.global_step == 1


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("first_kind", [NeuronTrainer, Trainer])
@pytest.mark.parametrize("more", [(), (Interrupt(),)], ids=["whole", "interrupted"])
@pytest.mark.parametrize("every_n_steps", [None, 1])
def test_second_training_with_the_same_callback_detects_again(tmp_path, first_kind, more, every_n_steps):
    """Another model and kind of trainer: nothing remains of the first training, even if it was interrupted."""
    callback = DetectionCallback(corpora(), "related", every_n_steps, top_ratio=0.2, consistency=0.6, progress=False)
    settings = arguments(tmp_path, max_steps=1)
    one = first_kind(tiny_llama(), settings, train_dataset=sentences(), callbacks=[callback, *more])
    with pytest.raises(KeyboardInterrupt) if more else nullcontext():
        one.train()
    first, reports = callback.neurons, [it for it in one.state.log_history if "neurons/shared" in it]
    model = tiny_llama(initializer_range=0.1)
    expected = detect_neurons(model, corpora(), 0.2, 0.6, progress=False)
    two = Trainer(model, settings, train_dataset=sentences(), callbacks=[callback])
    two.train()
    assert callback.neurons is not first and expected.related != first.related
    assert two.state.log_history[0]["step"] == 0
    assert two.state.log_history[0]["neurons/related/en"] == len(expected.related["en"])
    assert [it for it in one.state.log_history if "neurons/shared" in it] == reports


@pytest.mark.parametrize("by_trainer", [True, False])
def test_detection_without_training_is_not_reused_by_the_next_training(tmp_path, monkeypatch, by_trainer):
    """Neither if the first training found nothing to train, nor if `run` was called outside a training."""
    callback = DetectionCallback(corpora(), "related", top_ratio=0.2, consistency=0.6, progress=False)
    settings = arguments(tmp_path, max_steps=1)
    if by_trainer:
        trainer = NeuronTrainer(tiny_llama(), settings, train_dataset=sentences(), callbacks=[callback])
        with monkeypatch.context() as patch, pytest.raises(UserError, match="nothing to train"):
            patch.setattr(callback, "choose", Mock(side_effect=UserError("nothing to train")))
            trainer.train()
    else:
        callback.run(tiny_llama())
    first = callback.neurons
    two = Trainer(tiny_llama(initializer_range=0.1), settings, train_dataset=sentences(), callbacks=[callback])
    two.train()
    assert callback.neurons.related != first.related
    assert two.state.log_history[0]["neurons/shared"] == len(callback.neurons.shared)


def test_iterator_batches_are_kept_for_later_detections(tmp_path):
    batches = {language: iter(its) for language, its in corpora().items()}
    score_on = {language: iter(its) for language, its in corpora().items()}
    callback = DetectionCallback(
        batches, score_corpora=score_on, every_n_steps=1, top_ratio=0.2, consistency=0.6, progress=False
    )
    for _ in range(2):
        callback.run(tiny_llama())
    assert callback.score.value is not None


def test_training_that_begins_again_reports_the_detection_that_it_follows(tmp_path):
    """As with `auto_find_batch_size`, after the weights have moved."""
    detection = DetectionCallback(corpora(), strategy="related", top_ratio=0.2, consistency=0.6, progress=False)
    detection.run = Mock(wraps=detection.run)
    trainer = NeuronTrainer(
        tiny_llama(), arguments(tmp_path, max_steps=2, auto_find_batch_size=True), train_dataset=sentences(),
        callbacks=[detection],
    )  # fmt: skip
    step, calls = trainer.training_step, []

    def running_out_of_memory_once(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(*args, **kwargs)

    trainer.training_step = running_out_of_memory_once
    trainer.train()
    assert len(calls) > 3 and detection.run.call_count == 1
    assert trainer.neurons == detection.neurons.related["en"] | detection.neurons.related["sw"]


def test_detection_during_a_sharded_training_is_refused_at_its_start(tmp_path):
    detection = DetectionCallback(corpora(), every_n_steps=3, progress=False)
    trainer = NeuronTrainer(tiny_llama(), arguments(tmp_path), train_dataset=sentences(), callbacks=[detection])
    trainer.is_fsdp_enabled = True
    with pytest.raises(UserError, match="every_n_steps: detection needs whole weights"):
        trainer.train()


@pytest.mark.parametrize(
    "options, error",
    [({"every_n_steps": 2.5}, ValueError), ({"control_seeds": 5}, TypeError), ({"control_seeds": [0.5]}, TypeError)],
)
def test_mistakes_show_before_the_detection(options, error):
    with pytest.raises(error):
        DetectionCallback(corpora(), **options)
