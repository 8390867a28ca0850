"""Two gloo processes train what one trains: DDP by the Trainer, FSDP2 by torch's `fully_shard` and the Trainer."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import tiny_llama
from forked import in_two_processes
from launched import FSDP2
from peft import PeftModel, get_peft_model
from small_training import CHOSEN, arguments, assert_only_chosen_moved, plain_weights, sentences
from transformers import TrainerCallback

from agnostic_train import NeuronConfig, NeuronTrainer, detect_neurons, export_checkpoint
from agnostic_train.errors import UserError
from agnostic_train.training.equal_lora import equal_lora
from agnostic_train.training.guarded import GuardedTrainer
from agnostic_train.training.jit_checkpoint import AgreedCheckpoint

SEQUENTIAL = dict(
    max_steps=6, train_sampling_strategy="sequential", weight_decay=0.0, lr_scheduler_type="constant",
    save_strategy="steps", save_steps=3,
)  # fmt: skip


def train(directory, update, per_device_batch_size, **settings):
    model = tiny_llama().double()
    settings = arguments(directory, per_device_train_batch_size=per_device_batch_size, **SEQUENTIAL | settings)
    trainer = NeuronTrainer(model, settings, train_dataset=sentences(), neurons=CHOSEN, update=update)
    trainer.train()
    return trainer


def train_lora(directory, per_device_batch_size, **settings):
    """Train the LoRA baseline of comparisons."""
    settings = arguments(directory, per_device_train_batch_size=per_device_batch_size, **SEQUENTIAL | settings)
    torch.manual_seed(0)
    lora, _ = equal_lora(CHOSEN, tiny_llama())
    model = get_peft_model(tiny_llama().double(), lora)
    trainer = GuardedTrainer(model, settings, train_dataset=sentences())
    trainer.train()
    assert settings.ddp_find_unused_parameters is None  # the caller's settings are unchanged
    return trainer


def shard_and_train(directory):
    """Shard each layer and then the model, as accelerate does; take six AdamW steps on this process's half batches."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = get_peft_model(tiny_llama().double(), NeuronConfig(neurons=CHOSEN))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW([it for it in model.parameters() if it.requires_grad], lr=1e-2, weight_decay=0.0)
    for batch in batches_of_four():
        half = batch.chunk(2)[dist.get_rank()]
        model(input_ids=half, labels=half).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(directory, state_dict=state)


def batches_of_four():
    ids = torch.stack([row["input_ids"] for row in sentences()])
    return [ids[step * 4 : step * 4 + 4] for step in range(6)]


def loaded(directory, update):
    if update == "compact":
        return plain_weights(PeftModel.from_pretrained(tiny_llama().double(), directory))
    return plain_weights(type(tiny_llama()).from_pretrained(directory, dtype=torch.float64))


def checkpointing(use_reentrant):
    return dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


BY_DDP = {
    "compact": {}, "mask": {},
    "compact, reentrant": checkpointing(True), "compact, not reentrant": checkpointing(False),
}  # fmt: skip


def train_by_ddp(directory: Path):
    for name, settings in BY_DDP.items():
        train(directory / name, name.partition(",")[0], 2, **settings)
    train_lora(directory / "lora", 2, **checkpointing(True))


@pytest.fixture(scope="module")
def by_ddp(tmp_path_factory):
    """Return the folder of all that two processes trained, in one launch."""
    directory = tmp_path_factory.mktemp("ddp")
    in_two_processes(__name__, "train_by_ddp", directory)
    return directory


@pytest.mark.parametrize("name", BY_DDP)
def test_ddp_equals_one_process(by_ddp, tmp_path, name):
    """Also with both kinds of gradient checkpointing, with which DDP must not search for unused parameters."""
    update = name.partition(",")[0]
    one = plain_weights(train(tmp_path, update, 4, **BY_DDP[name]).model)
    two = loaded(by_ddp / name / "checkpoint-6", update)
    assert_only_chosen_moved(plain_weights(tiny_llama().double()), two, CHOSEN)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-9)


def test_ddp_of_a_lora_with_reentrant_checkpointing_equals_one_process(by_ddp, tmp_path):
    one = plain_weights(train_lora(tmp_path, 4, **checkpointing(True)).model)
    for name, value in loaded(by_ddp / "lora/checkpoint-6", "compact").items():
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-9)


class EndOfJob(TrainerCallback):
    """Sends SIGTERM to the second process alone, in the middle of its third step."""

    def __init__(self, manager):
        self.manager = manager
        manager.kill_wait = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.manager.is_checkpoint_requested:  # set by a timer
                time.sleep(0.01)


def train_until_signal(directory: Path):
    settings = SEQUENTIAL | dict(per_device_train_batch_size=2, save_steps=100, enable_jit_checkpoint=True)
    for resume, last_step in ((False, 3), (True, 6)):
        model = tiny_llama().double()
        trainer = NeuronTrainer(model, arguments(directory, **settings), train_dataset=sentences(), neurons=CHOSEN)
        if not resume:
            on_signal = next(it for it in trainer.callback_handler.callbacks if isinstance(it, AgreedCheckpoint))
            trainer.add_callback(EndOfJob(on_signal.jit_manager))
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == last_step


def test_signal_to_one_process_saves_after_the_same_step_in_all(tmp_path, by_ddp):
    in_two_processes(__name__, "train_until_signal", tmp_path)
    assert sorted(it.name for it in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]
    assert not [*tmp_path.rglob("checkpoint-is-incomplete.txt")]
    whole = loaded(by_ddp / "compact/checkpoint-6", "compact")
    assert all(torch.equal(it, whole[name]) for name, it in loaded(tmp_path / "checkpoint-6", "compact").items())


def test_fully_shard_training_equals_a_plain_loop(tmp_path):
    in_two_processes(__name__, "shard_and_train", tmp_path / "adapter")
    model = get_peft_model(tiny_llama().double(), NeuronConfig(neurons=CHOSEN))
    optimizer = torch.optim.AdamW([it for it in model.parameters() if it.requires_grad], lr=1e-2, weight_decay=0.0)
    for batch in batches_of_four():
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sharded, expected = loaded(tmp_path / "adapter", "compact"), plain_weights(model)
    assert_only_chosen_moved(plain_weights(tiny_llama().double()), sharded, CHOSEN)
    for name, value in expected.items():
        torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-9)


def fsdp_trainer(directory, update="compact", **environment):
    """On a CPU, accelerate disables FSDP; with the type set to GPU processes, it runs FSDP on gloo as on GPUs."""
    os.environ.update(environment)
    AcceleratorState._reset_state()
    settings = arguments(directory, per_device_train_batch_size=2, **SEQUENTIAL)
    assert settings.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = NeuronTrainer(tiny_llama().double(), settings, train_dataset=sentences(), neurons=CHOSEN, update=update)
    assert trainer.is_fsdp_enabled
    return trainer


def train_by_fsdp(directory: Path):
    trainer = fsdp_trainer(directory)
    trainer.train()
    assert trainer.accelerator.is_fsdp2
    with pytest.raises(UserError, match="exporting needs all weights"):
        export_checkpoint(trainer.model, directory / "exported")
    with pytest.raises(UserError, match="measure it needs all weights"):
        detect_neurons(trainer.model, {"a": [{"input_ids": batches_of_four()[0]}]}, progress=False)
    trainer = fsdp_trainer(directory / "resumed")
    trainer.train(resume_from_checkpoint=str(directory / "checkpoint-3"))
    assert trainer.state.global_step == 6
    for update, environment, message in (
        ("mask", {}, "'mask' needs whole weights"),
        ("mask", {"FSDP_VERSION": "1"}, "'mask' needs whole weights"),
        ("compact", {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: "),
        ("compact", {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type: "),
    ):
        with pytest.raises(UserError, match=message):
            fsdp_trainer(directory / "refused", update, **{**FSDP2, **environment}).train()


def test_fsdp2_by_the_trainer_equals_one_process(tmp_path):
    """It saves the complete adapter, resumes and exports; unsupported uses are refused."""
    base = tiny_llama().double()
    base.save_pretrained(tmp_path / "base")
    directory = tmp_path / "two"
    in_two_processes(__name__, "train_by_fsdp", directory, **FSDP2, CUDA_VISIBLE_DEVICES="")
    one = plain_weights(train(tmp_path / "one", "compact", 4).model)
    two = loaded(directory / "checkpoint-6", "compact")
    assert_only_chosen_moved(plain_weights(base), two, CHOSEN)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-9)
    resumed = loaded(directory / "resumed/checkpoint-6", "compact")
    assert all(torch.equal(value, resumed[name]) for name, value in two.items())
    check = export_checkpoint(directory / "checkpoint-6", tmp_path / "exported", base=tmp_path / "base")
    assert check.status == "identical" and check.chosen_moved > 0.99
    exported = plain_weights(type(base).from_pretrained(tmp_path / "exported", dtype=torch.float64))
    assert all(torch.equal(value, exported[name]) for name, value in two.items())
