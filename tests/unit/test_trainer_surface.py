"""What people switch on in a Trainer works in both updates, and TRL's SFTTrainer takes the mix-in."""

import shutil

import pytest
import torch
from conftest import tiny_llama
from peft import PeftModel
from small_training import CHOSEN, arguments, assert_only_chosen_moved, plain_weights, sentences
from transformers import DataCollatorWithFlattening

from agnostic_train.quickstart.tiny_model import build_tokenizer
from agnostic_train.training.trainer import UPDATES, NeuronTrainer

both_updates = pytest.mark.parametrize("update", UPDATES)


def end_of(tmp_path, update, dtype=torch.float32, collator=None, **settings):
    model = tiny_llama().to(dtype)
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
def test_gradient_checkpointing_changes_nothing(tmp_path, update, use_reentrant):
    expected = end_of(tmp_path, update)
    after = end_of(
        tmp_path, update, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=2e-5)


@both_updates
@pytest.mark.parametrize("settings", [{"bf16": True}, {"neftune_noise_alpha": 5.0}, {"max_grad_norm": 0.0}])
def test_other_switches(tmp_path, update, settings):
    end_of(tmp_path, update, **settings)


@both_updates
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_ends_where_eager_training_ends(tmp_path, update):
    """Tolerance: Adam turns rounding in gradients near zero into steps of a part of the rate, 1e-2."""
    ends = [end_of(tmp_path, update, torch.float64, torch_compile=compiled, max_steps=3) for compiled in (False, True)]
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-5)


@both_updates
def test_bf16_autocast_stays_near_float32(tmp_path, update):
    expected, after = end_of(tmp_path, update), end_of(tmp_path, update, bf16=True)
    distance = sum(float((after[name] - value).square().sum()) for name, value in expected.items()) ** 0.5
    moved = sum(float((expected[name] - value).square().sum()) for name, value in plain_weights(tiny_llama()).items())
    assert 0 < distance < 0.3 * moved**0.5


def test_packed_sentences_are_learnt_alike(tmp_path):
    """Sentences in one row without padding, told apart by their positions."""
    ends = [
        end_of(tmp_path, update, torch.float64, DataCollatorWithFlattening(), weight_decay=0.0) for update in UPDATES
    ]
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-9)


@both_updates
def test_trl(tmp_path, update):
    trl = pytest.importorskip("trl", reason="trl isn't installed; it is in the dev extra")
    from datasets import Dataset

    class NeuronSFTTrainer(NeuronTrainer, trl.SFTTrainer):
        pass

    config = trl.SFTConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=6, learning_rate=1e-2, weight_decay=0.1,
        save_strategy="steps", save_steps=3, disable_tqdm=True, bf16=False, max_length=16, logging_steps=1,
    )  # fmt: skip
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
