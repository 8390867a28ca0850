"""Two gloo processes train what one trains: DDP by the Trainer, FSDP2 by torch's own `fully_shard`."""

import subprocess
import sys

import pytest
import torch
from conftest import tiny_llama
from peft import PeftModel, get_peft_model
from small_training import CHOSEN, arguments, assert_only_chosen_moved, plain_weights, sentences

from agnostic_train import NeuronConfig, NeuronTrainer
from agnostic_train.training.trainer import UPDATES

SEQUENTIAL = dict(
    max_steps=6, train_sampling_strategy="sequential", weight_decay=0.0, lr_scheduler_type="constant",
    save_strategy="steps", save_steps=6,
)  # fmt: skip


def train(directory, update, per_device_batch_size):
    model = tiny_llama().double()
    settings = arguments(directory, per_device_train_batch_size=per_device_batch_size, **SEQUENTIAL)
    trainer = NeuronTrainer(model, settings, train_dataset=sentences(), neurons=CHOSEN, update=update)
    trainer.train()
    return trainer


def shard_and_train(directory):
    """Every layer and then the whole, as accelerate does it; six AdamW steps on this process' half of each batch."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

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


WORKER = """
import sys
sys.path[:0] = {paths!r}
import torch.distributed as dist
dist.init_process_group("gloo")
import test_distributed_training as it
{call}
dist.barrier()
dist.destroy_process_group()
"""


def on_two_processes(tmp_path, root, call):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(paths=[str(root / "tests"), str(root / "tests/integration")], call=call))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def loaded(directory, update):
    if update == "compact":
        return plain_weights(PeftModel.from_pretrained(tiny_llama().double(), directory))
    return plain_weights(type(tiny_llama()).from_pretrained(directory, dtype=torch.float64))


@pytest.mark.parametrize("update", UPDATES)
def test_ddp_ends_where_one_process_ends(tmp_path, pytestconfig, update):
    on_two_processes(tmp_path, pytestconfig.rootpath, f"it.train({str(tmp_path / 'two')!r}, {update!r}, 2)")
    one = plain_weights(train(tmp_path / "one", update, 4).model)
    two = loaded(tmp_path / "two/checkpoint-6", update)
    assert_only_chosen_moved(plain_weights(tiny_llama().double()), two, CHOSEN)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-9)


def test_fully_sharded_training_saves_the_adapter_of_a_plain_loop(tmp_path, pytestconfig):
    on_two_processes(tmp_path, pytestconfig.rootpath, f"it.shard_and_train({str(tmp_path / 'adapter')!r})")
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
