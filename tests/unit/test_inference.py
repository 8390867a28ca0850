"""A model that is measured is left as it was found, and so is torch."""

import pytest
import torch
from conftest import UPDATES, padded_batch, tiny_llama
from forked import started
from small_training import CHOSEN, arguments, sentences

from agnostic_train import NeuronTrainer, neuron_impacts, perplexity
from agnostic_train.model.inference import full_precision, left_as_found

SETTINGS = {
    "default": "",
    "older interface": "torch.backends.cuda.matmul.allow_tf32 = True",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "newer interface": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "every backend": "torch.backends.fp32_precision = 'tf32'",
}


def state():
    """What torch's interfaces say of TF32; one that was mixed with another refuses to say."""
    matmul = torch.backends.cuda.matmul
    found = []
    for read in (
        lambda: matmul.fp32_precision, lambda: matmul.allow_tf32, torch.get_float32_matmul_precision,
        lambda: torch.backends.fp32_precision,
    ):  # fmt: skip
        try:
            found.append(read())
        except RuntimeError:
            found.append("refused")
    return found


def turn_on_and_off(setting):
    exec(setting)
    before = state()
    with full_precision():
        assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
        assert not torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    assert state() == before, (before, state())


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_tf32_is_off_in_between_however_it_was_turned_on(setting, tmp_path):
    """In a process of its own: torch's two interfaces don't mix, and what was set through one stays."""
    process = started(__name__, "turn_on_and_off", setting, stderr=str(tmp_path / "errors"))
    process.join()
    assert process.exitcode == 0, (tmp_path / "errors").read_text()


def test_what_measures_a_model_turns_tf32_off(llama):
    torch.set_float32_matmul_precision("high")
    try:
        with left_as_found(llama):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("update", UPDATES)
def test_a_training_in_bf16_is_measured_as_its_weights_are(tmp_path, update):
    """accelerate leaves autocast around the model: nothing was learnt, so nothing may differ."""
    model, batch = tiny_llama(), padded_batch([9, 5])
    before, impacts = perplexity(model, [batch]), neuron_impacts(model, batch)
    trainer = NeuronTrainer(
        model, arguments(tmp_path, max_steps=1, learning_rate=0.0, weight_decay=0.0, bf16=True),
        train_dataset=sentences(), neurons=CHOSEN, update=update,
    )  # fmt: skip
    trainer.train()
    inside = trainer.model.forward
    assert torch.equal(perplexity(trainer.model, [batch]).sentence_nats, before.sentence_nats)
    assert trainer.model.forward is inside
    with torch.autocast("cpu", torch.bfloat16):
        for site, values in neuron_impacts(trainer.model, batch).items():
            torch.testing.assert_close(values, impacts[site])
        assert torch.is_autocast_enabled("cpu")


def test_each_module_gets_its_own_mode_back(llama):
    llama.train()
    llama.model.layers[0].eval()
    before = [it.training for it in llama.modules()]
    with left_as_found(llama):
        assert not any(it.training for it in llama.modules())
    assert [it.training for it in llama.modules()] == before


def test_random_states_are_left_as_found(llama):
    state = torch.random.get_rng_state()
    with left_as_found(llama):
        torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), state)
