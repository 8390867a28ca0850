"""Common Trainer options work with both updates, and NeuronTrainer mixes into TRL's trainers."""

import shutil

import pytest
import torch
from conftest import UPDATES, padded_batch, tiny_llama
from datasets import Dataset
from peft import PeftModel
from small_training import CHOSEN, arguments, assert_only_chosen_moved, plain_weights, sentences
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from agnostic_train.quickstart.tiny_model import build_tokenizer
from agnostic_train.training.callbacks import DetectionCallback
from agnostic_train.training.compact import NeuronConfig
from agnostic_train.training.trainer import NeuronTrainer

both_updates = pytest.mark.parametrize("update", UPDATES)


def end_of(tmp_path, update, dtype=torch.float32, collator=None, model=None, **settings):
    model = (model or tiny_llama()).to(dtype)
    before = plain_weights(model)
    trainer = NeuronTrainer(
        model, arguments(tmp_path, **{"max_steps": 8, **settings}), data_collator=collator,
        train_dataset=sentences(), neurons=CHOSEN, update=update,
    )  # fmt: skip
    trainer.train()
    after = plain_weights(trainer.model)
    assert_only_chosen_moved(before, after, CHOSEN)
    return after


@both_updates
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_does_not_change_the_result(tmp_path, update, use_reentrant):
    """Except how often a layer runs: twice per step."""
    model, calls = tiny_llama(), []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    expected = end_of(tmp_path, update)
    after = end_of(
        tmp_path, update, model=model, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )  # fmt: skip
    assert len(calls) == 16
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=2e-5)


@both_updates
@pytest.mark.parametrize("settings", [{"bf16": True}, {"neftune_noise_alpha": 5.0}, {"max_grad_norm": 0.0}])
def test_other_options_move_only_the_chosen_entries(tmp_path, update, settings):
    """The options change what is learnt, and still no other entry moves."""
    expected, after = end_of(tmp_path, update), end_of(tmp_path, update, **settings)
    assert any(not torch.equal(value, after[name]) for name, value in expected.items())


@both_updates
def test_checkpoint_holds_optimizer_and_random_state(tmp_path, update):
    """With dropout, a resumed run equals the uninterrupted one bit for bit, whatever the generator's state before."""
    saving = dict(save_strategy="steps", save_steps=5)

    def trainer():
        model = tiny_llama(attention_dropout=0.2)
        return NeuronTrainer(
            model, arguments(tmp_path, max_steps=8, **saving), train_dataset=sentences(), neurons=CHOSEN, update=update
        )

    whole = trainer()
    whole.train()
    checkpoint = tmp_path / "checkpoint-5"
    weights = "adapter_model.safetensors" if update == "compact" else "model.safetensors"
    held = {"neurons.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", weights}
    assert held <= {file.name for file in checkpoint.iterdir()}
    shutil.rmtree(tmp_path / "checkpoint-8")
    torch.manual_seed(5)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    after = plain_weights(resumed.model)
    assert all(torch.equal(value, after[name]) for name, value in plain_weights(whole.model).items())


def test_adapter_loads_onto_a_model_placed_by_device_map(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    trained = end_of(tmp_path / "out", "compact", save_strategy="steps", save_steps=8)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="auto")
    loaded = plain_weights(PeftModel.from_pretrained(placed, tmp_path / "out/checkpoint-8"))
    assert all(torch.equal(value, loaded[name]) for name, value in trained.items())


@both_updates
def test_compiled_training_equals_eager_training(tmp_path, update):
    """The `aot_eager` backend runs the graphs of torch.compile without the minute that compiling C++ would take."""
    torch._dynamo.reset()
    counters.clear()
    ends = [
        end_of(tmp_path, update, torch.float64, max_steps=3, **settings)
        for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"})
    ]
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-9)


@both_updates
def test_bf16_autocast_stays_near_float32(tmp_path, update):
    expected, after = end_of(tmp_path, update), end_of(tmp_path, update, bf16=True)
    distance = sum(float((after[name] - value).square().sum()) for name, value in expected.items()) ** 0.5
    moved = sum(float((expected[name] - value).square().sum()) for name, value in plain_weights(tiny_llama()).items())
    assert 0 < distance < 0.3 * moved**0.5


def test_packed_sentences_are_learnt_as_padded_ones(tmp_path):
    """Sentences packed into one row, separated by their positions, are learnt as if each had its own row."""
    expected = end_of(tmp_path, UPDATES[0], torch.float64, weight_decay=0.0)
    for update in UPDATES:
        after = end_of(tmp_path, update, torch.float64, DataCollatorWithFlattening(), weight_decay=0.0)
        for name, value in expected.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-9)


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="trl isn't installed; it is in the dev extra")


def trl_settings(directory):
    return dict(
        output_dir=str(directory), report_to=[], use_cpu=True, bf16=False, learning_rate=1e-2, disable_tqdm=True,
        logging_steps=1,
    )  # fmt: skip


@both_updates
def test_trl_dpo_trainer(tmp_path, trl, update):
    """TRL's DPOTrainer has a reference model before its arguments."""

    class NeuronDPOTrainer(NeuronTrainer, trl.DPOTrainer):
        pass

    config = trl.DPOConfig(**trl_settings(tmp_path), max_steps=2, save_strategy="no")
    rows = [{"prompt": f"number {place} is", "chosen": " good", "rejected": " bad"} for place in range(8)]
    tokenizer = build_tokenizer([it["prompt"] + it["chosen"] + it["rejected"] for it in rows], vocab_size=300)
    before = plain_weights(tiny_llama(vocab_size=300))
    reference = tiny_llama(vocab_size=300)
    # Without a reference, TRL uses the model with its adapter disabled, or loads the model again by name.
    for more in [{"ref_model": reference}, {}] if update == "compact" else [{"ref_model": reference}]:
        trainer = NeuronDPOTrainer(
            tiny_llama(vocab_size=300), train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            args=config, neurons=CHOSEN, update=update, **more,
        )  # fmt: skip
        trainer.train()
        assert trainer.args is config
        losses = [it["loss"] for it in trainer.state.log_history if "loss" in it]
        assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[1] < losses[0]
        assert_only_chosen_moved(before, plain_weights(trainer.model), CHOSEN)


@both_updates
def test_trl_sft_trainer(tmp_path, trl, update):
    class NeuronSFTTrainer(NeuronTrainer, trl.SFTTrainer):
        pass

    config = trl.SFTConfig(
        **trl_settings(tmp_path), max_steps=6, weight_decay=0.1, save_strategy="steps", save_steps=3, max_length=16
    )
    text = Dataset.from_dict({"text": [f"sentence number {index} of a few" for index in range(24)]})
    tokenizer = build_tokenizer(text["text"], vocab_size=300)
    before = plain_weights(tiny_llama(vocab_size=300))

    def trainer():
        return NeuronSFTTrainer(
            tiny_llama(vocab_size=300), args=config, train_dataset=text, processing_class=tokenizer, neurons=CHOSEN,
            update=update,
        )  # fmt: skip

    whole = trainer()
    whole.train()
    assert isinstance(whole.model, PeftModel) is (update == "compact")
    after = plain_weights(whole.model)
    assert_only_chosen_moved(before, after, CHOSEN)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(value, after[name]) for name, value in plain_weights(resumed.model).items())


def test_trl_makes_the_adapter_and_keeps_its_metrics(tmp_path, trl):
    """TRL averages its metrics since it last logged the loss; a detection in between must not take them."""

    class NeuronSFTTrainer(NeuronTrainer, trl.SFTTrainer):
        pass

    settings = trl_settings(tmp_path) | {"logging_steps": 2}
    config = trl.SFTConfig(**settings, max_steps=4, save_strategy="no", max_length=16)
    text = Dataset.from_dict({"text": [f"sentence number {index} of a few" for index in range(24)]})
    tokenizer = build_tokenizer(text["text"], vocab_size=300)
    histories = []
    for every in (None, 1):
        detection = DetectionCallback({"en": [padded_batch([9, 5])]}, every_n_steps=every, verify=False)
        trainer = NeuronSFTTrainer(
            tiny_llama(vocab_size=300), args=config, train_dataset=text, processing_class=tokenizer,
            peft_config=NeuronConfig(neurons=CHOSEN, task_type="CAUSAL_LM"), callbacks=[detection],
        )  # fmt: skip
        trainer.train()
        assert trainer.neurons == CHOSEN
        histories.append([
            {name: row[name] for name in ("step", "loss", "entropy", "mean_token_accuracy", "num_tokens")}
            for row in trainer.state.log_history if "loss" in row
        ])  # fmt: skip
    assert histories[0] == histories[1]
    assert all(it.dtype == torch.float32 for it in trainer.model.parameters() if it.requires_grad)
    neuron_rows = [row for row in trainer.state.log_history if "neurons/shared" in row]
    assert len(neuron_rows) == 5 and not any("entropy" in row for row in neuron_rows)


def test_log_of_a_subclass_sees_detection(tmp_path):
    class Watched(NeuronTrainer):
        def log(self, logs, *args, **kwargs):
            seen.update(logs)
            super().log(logs, *args, **kwargs)

    seen = {}
    detection = DetectionCallback({"en": [padded_batch([9, 5])]}, verify=False)
    trainer = Watched(
        tiny_llama(), arguments(tmp_path, max_steps=1), train_dataset=sentences(), neurons=CHOSEN, callbacks=[detection]
    )
    trainer.train()
    assert "neurons/shared" in seen and "train_loss" in seen
