"""The Trainer's engines on one GPU equal plain training, and compact training takes less memory than LoRA."""

import gc
import importlib.util

import pytest
import torch
from conftest import UPDATES, tiny_llama
from launched import FSDP2, launched
from peft import PeftModel, get_peft_model
from small_training import CHOSEN, arguments, assert_only_chosen_moved, plain_weights, sentences
from transformers import AutoModelForCausalLM

from agnostic_train import NeuronSet, NeuronTrainer, export_checkpoint
from agnostic_train.training.equal_lora import equal_lora
from agnostic_train.training.guarded import GuardedTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ZERO3 = {
    # A threshold of 0 shards even small parameters, like most parameters of a real model.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    # Use torch's AdamW, because DeepSpeed's would have to be compiled first.
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}  # fmt: skip

# SGD's steps are proportional to gradients; Adam would amplify the kernels' rounding to whole steps.
LIGER = dict(use_liger_kernel=True, optim="sgd", learning_rate=0.1, max_grad_norm=0.0)


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} isn't installed")


def settings_of(directory, **changes):
    settings = dict(
        use_cpu=False, max_steps=6, train_sampling_strategy="sequential", weight_decay=0.0,
        lr_scheduler_type="constant", save_strategy="steps", save_steps=3,
    )  # fmt: skip
    return arguments(directory, **settings | changes)


def trained(directory, update="compact", dtype=torch.float64, resume=None, **changes):
    trainer = NeuronTrainer(
        tiny_llama().to(dtype), settings_of(directory, **changes), train_dataset=sentences(), neurons=CHOSEN,
        update=update,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def end_of(directory, update="compact", **settings):
    after = plain_weights(trained(directory, update, **settings).model.cpu())
    before = plain_weights(tiny_llama().to(next(iter(after.values())).dtype))
    assert_only_chosen_moved(before, after, CHOSEN)
    return after


def assert_near(actual, expected, tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_does_not_change_the_result(tmp_path, update, use_reentrant):
    kwargs = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_near(end_of(tmp_path, update, **kwargs), end_of(tmp_path, update), 1e-9)


@pytest.mark.parametrize("update", UPDATES)
def test_compiled_training_equals_eager_training(tmp_path, update):
    """Tolerance 1e-5: Adam turns rounding of gradients near zero into steps of a fraction of the rate, 1e-2.

    transformers would turn TF32 on for compiled training without `tf32=False`.
    """
    ends = [end_of(tmp_path, update, torch_compile=it, tf32=False, max_steps=3) for it in (False, True)]
    assert_near(ends[1], ends[0], 1e-5)


def train_with_liger(directory, update):
    model = trained(directory, update, torch.float32, **LIGER).model
    torch.save(plain_weights(model.cpu()), f"{directory}/after.pt")


@needs("liger_kernel")
@pytest.mark.parametrize("update", UPDATES)
def test_training_with_liger_kernels_equals_plain_training(tmp_path, update):
    """Use a separate process: the kernels stay in transformers' modules and would be compared with themselves."""
    expected = end_of(tmp_path / "plain", update, dtype=torch.float32, **LIGER | {"use_liger_kernel": False})
    directory = tmp_path / "liger"
    launched(tmp_path, __file__, f"it.train_with_liger({str(directory)!r}, {update!r})", num_processes=1)
    after, before = torch.load(directory / "after.pt"), plain_weights(tiny_llama())
    assert_only_chosen_moved(before, after, CHOSEN)
    distance = sum(float((after[name] - value).square().sum()) for name, value in expected.items()) ** 0.5
    moved = sum(float((before[name] - value).square().sum()) for name, value in expected.items()) ** 0.5
    assert distance < 1e-3 * moved


def train_by(engine, directory):
    """Train for six steps, then repeat the last three from the checkpoint at step 3."""
    settings = dict(dtype=torch.float32, deepspeed=ZERO3) if engine == "deepspeed" else {}
    trainer = trained(directory, **settings)
    assert trainer.is_deepspeed_enabled if engine == "deepspeed" else trainer.accelerator.is_fsdp2
    resumed = trained(f"{directory}/resumed", resume=f"{directory}/checkpoint-3", **settings)
    assert resumed.state.global_step == 6


@pytest.mark.parametrize(
    ("engine", "environment", "dtype", "tolerance"),
    [
        ("fsdp", FSDP2, torch.float64, 1e-9),
        pytest.param("deepspeed", {}, torch.float32, 1e-4, marks=needs("deepspeed")),
    ],
)
def test_training_a_sharded_model_equals_plain_training(tmp_path, engine, environment, dtype, tolerance):
    """With one process on one GPU, the saved, resumed and exported adapter equals that of a plain run."""
    base, directory = tiny_llama().to(dtype), tmp_path / engine
    base.save_pretrained(tmp_path / "base")
    launched(tmp_path, __file__, f"it.train_by({engine!r}, {str(directory)!r})", num_processes=1, **environment)
    expected = end_of(tmp_path / "plain", dtype=dtype)
    for checkpoint in (directory / "checkpoint-6", directory / "resumed/checkpoint-6"):
        after = plain_weights(PeftModel.from_pretrained(tiny_llama().to(dtype), checkpoint))
        assert_only_chosen_moved(plain_weights(base), after, CHOSEN)
        assert_near(after, expected, tolerance)
    check = export_checkpoint(directory / "checkpoint-6", tmp_path / "exported", base=tmp_path / "base")
    assert check.status == "identical" and check.chosen_moved > 0.99


def test_adapter_loads_onto_a_model_placed_by_device_map(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    trainer = trained(tmp_path / "out", dtype=torch.float32)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="auto")
    model = PeftModel.from_pretrained(placed, tmp_path / "out/checkpoint-6").eval()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert {it.device.type for _, it in tensors} == {placed.device.type}
    ids = sentences()[0]["input_ids"][None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids.to(trainer.model.device)).logits
        torch.testing.assert_close(model(input_ids=ids.to(placed.device)).logits, expected, rtol=0, atol=1e-4)


def test_compact_training_takes_less_memory_than_lora_of_as_many_weights(tmp_path):
    """Peak memory of three steps on 4 x 256 tokens, with six neurons of each site."""
    sizes = dict(vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8)
    sizes |= dict(num_key_value_heads=4, head_dim=64, max_position_embeddings=256, initializer_range=0.02)
    neurons = NeuronSet(
        {(layer, name): range(0, 256, 50) for layer in range(6) for name in ("q", "k", "v", "o", "gate", "up", "down")}
    )
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 512, (12, 256), generator=generator)]

    def peak(make_trainer):
        # Don't count memory that the other training may have left.
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        make_trainer().train()
        return torch.cuda.max_memory_allocated() - before

    def compact():
        return NeuronTrainer(tiny_llama(**sizes), settings, train_dataset=rows, neurons=neurons)

    def lora():
        model = tiny_llama(**sizes)
        return GuardedTrainer(get_peft_model(model, equal_lora(neurons, model)[0]), settings, train_dataset=rows)

    settings = settings_of(tmp_path, max_steps=3, save_strategy="no", bf16=True)
    compact().train()  # the first training of a process allocates cuBLAS's workspaces
    assert peak(compact) < peak(lora)
