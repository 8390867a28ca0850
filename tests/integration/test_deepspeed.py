"""DeepSpeed's ZeRO on two gloo processes trains what one process trains (skipped if it isn't installed)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import tiny_llama
from forked import in_two_processes
from peft import PeftModel
from safetensors.torch import load_file
from small_run import RECIPE, root, run, template  # noqa: F401
from small_training import CHOSEN, arguments, assert_only_chosen_moved, plain_weights, sentences

from agnostic_train import NeuronTrainer, detect_neurons, export_checkpoint
from agnostic_train.cli import main  # noqa: F401 - what the processes run
from agnostic_train.errors import UserError
from agnostic_train.scores.perplexity import NonFiniteLossError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed isn't installed (pip install deepspeed)"
)
ON_A_CPU = dict(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
CONFIG = {
    # A threshold of 0 shards even small parameters, like most parameters of a real model.
    "zero_optimization": {"stage3_param_persistence_threshold": 0},
    # Use torch's AdamW, because DeepSpeed's would have to be compiled first.
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
}  # fmt: skip


def without_compiling():
    """Turn off DeepSpeed's shared-memory communication on CPUs, which takes a minute to compile; gloo replaces it."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero_trainer(directory, stage, update="compact", **changes):
    AcceleratorState._reset_state()
    config = CONFIG | {"zero_optimization": CONFIG["zero_optimization"] | {"stage": stage}}
    settings = dict(
        max_steps=6, train_sampling_strategy="sequential", weight_decay=0.0, lr_scheduler_type="constant",
        per_device_train_batch_size=2, save_strategy="steps", save_steps=3, deepspeed=config,
    )  # fmt: skip
    trainer = NeuronTrainer(
        tiny_llama(), arguments(directory, **{**settings, **changes}), train_dataset=sentences(), neurons=CHOSEN,
        update=update,
    )  # fmt: skip
    assert trainer.is_deepspeed_enabled
    return trainer


def train_by_zero(directory: Path, stage):
    trainer = zero_trainer(directory, stage)
    trainer.train()
    if stage == 3:
        assert all(parameter.numel() == 0 for parameter in trainer.model.parameters())
        with pytest.raises(UserError, match="exporting needs all weights"):
            export_checkpoint(trainer.model, directory / "exported")
        with pytest.raises(UserError, match="measure it needs all weights"):
            detect_neurons(trainer.model, {"a": [{"input_ids": sentences()[0]["input_ids"][None]}]}, progress=False)
    zero_trainer(directory / "resumed", stage).train(resume_from_checkpoint=str(directory / "checkpoint-3"))
    zero_trainer(directory / "bf16", stage, bf16=True).train()
    with pytest.raises(UserError, match="'mask' needs whole weights"):
        zero_trainer(directory / "refused", stage, "mask").train()
    with pytest.raises(NonFiniteLossError, match="isn't finite after step 1, and isn't saved"):
        zero_trainer(directory / "lost", stage, learning_rate=1e39, max_steps=1, save_steps=1).train()


def loaded(directory):
    return plain_weights(PeftModel.from_pretrained(tiny_llama(), directory))


def train_by_both(directory: Path):
    without_compiling()
    for stage in (2, 3):
        train_by_zero(directory / str(stage), stage)


@pytest.fixture(scope="module")
def by_zero(tmp_path_factory):
    """Return the folder of what two processes trained with each ZeRO stage, in one launch."""
    directory = tmp_path_factory.mktemp("zero")
    in_two_processes(__name__, "train_by_both", directory, **ON_A_CPU)
    return directory


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process(by_zero, tmp_path, stage):
    """Checkpoints hold the complete adapter, in float32 even with bf16; training resumes; unsupported uses fail."""
    base, directory = tiny_llama(), by_zero / str(stage)
    base.save_pretrained(tmp_path / "base")
    settings = arguments(
        tmp_path / "one", max_steps=6, train_sampling_strategy="sequential", weight_decay=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    one = NeuronTrainer(tiny_llama(), settings, train_dataset=sentences(), neurons=CHOSEN)
    one.train()
    two = loaded(directory / "checkpoint-6")
    assert_only_chosen_moved(plain_weights(base), two, CHOSEN)
    for name, value in plain_weights(one.model).items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)
    resumed = loaded(directory / "resumed/checkpoint-6")
    assert all(torch.equal(value, resumed[name]) for name, value in two.items())
    in_bf16 = load_file(directory / "bf16/checkpoint-6/adapter_model.safetensors")
    deltas = [value for name, value in in_bf16.items() if "delta" in name]
    assert any(not torch.equal(value, value.bfloat16().float()) for value in deltas)
    assert not (directory / "lost/checkpoint-1/adapter_model.safetensors").exists()
    check = export_checkpoint(directory / "checkpoint-6", tmp_path / "exported", base=tmp_path / "base")
    assert check.status == "identical" and check.chosen_moved > 0.99
    exported = plain_weights(type(base).from_pretrained(tmp_path / "exported"))
    assert all(torch.equal(value, exported[name]) for name, value in two.items())


def test_recipe_trains_a_model_that_is_sharded_while_loading(root, pytestconfig, capfd):
    """Run `train` with recipes/accelerate/zero3.yaml on a CPU, then `export`; `detect` is refused with ZeRO-3."""
    config = yaml.safe_load((pytestconfig.rootpath / "recipes/accelerate/zero3.yaml").read_text())
    (root / "zero3.yaml").write_text(yaml.safe_dump(config | {"use_cpu": True, "num_processes": 2}))
    recipe = str(root / "recipe.yaml")
    (root / "main.py").write_text(
        "import os, sys\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "import test_deepspeed\n"
        "test_deepspeed.without_compiling()\n"
        f"refused = test_deepspeed.main(['detect', {recipe!r}, {f'--output_dir={root}/other'!r}])\n"
        f"trained = test_deepspeed.main(['train', {recipe!r}])\n"
        "sys.stdout.flush(), sys.stderr.flush()\n"
        "os._exit(trained or refused != 2)\n"
    )
    assert run(root, "detect") == 0
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(root / "zero3.yaml"),
        str(root / "main.py"),
    ]  # fmt: skip
    done = subprocess.run(command, env=os.environ | ON_A_CPU, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "agnostic-train: error: model: running a model to measure it needs" in done.stderr
    assert "0.1 M parameters" in done.stdout
    assert run(root, "export") == 0
    assert "weights are bit-identical to the base's, 100.0% of" in capfd.readouterr().out
