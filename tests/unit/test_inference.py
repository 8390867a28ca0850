"""Measuring leaves the model and torch's global settings unchanged."""

from threading import Event, Thread

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
    "CPU": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "CPU and GPU": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'; torch.backends.cuda.matmul.allow_tf32 = True",
}


def state():
    """Return the settings of torch's interfaces; "refused" for one that raises because both were used."""
    matmul = torch.backends.cuda.matmul
    settings = []
    for read in (
        lambda: matmul.fp32_precision, lambda: matmul.allow_tf32, torch.get_float32_matmul_precision,
        lambda: torch.backends.fp32_precision, lambda: torch.backends.mkldnn.matmul.fp32_precision,
    ):  # fmt: skip
        try:
            settings.append(read())
        except RuntimeError:
            settings.append("refused")
    return settings


def turn_on_and_off(setting):
    exec(setting)
    before = state()
    with full_precision():
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert not torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    assert state() == before, (before, state())


def states_after(setting, file, measures):
    """Write the state after the setting and a later change for all backends, with or without a block in between."""
    exec(setting)
    if measures:
        with full_precision():
            pass
    torch.backends.fp32_precision = "ieee"
    file.write_text(str(state()))


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_tf32_is_off_within_the_block_however_it_was_turned_on(setting, tmp_path):
    """Use a separate process: torch's two interfaces don't mix, and a setting made through one persists."""
    process = started(__name__, "turn_on_and_off", setting, stderr=str(tmp_path / "errors"))
    process.join()
    assert process.exitcode == 0, (tmp_path / "errors").read_text()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_backends_still_follow_a_later_setting_of_all(setting, tmp_path):
    for measures in (False, True):
        file, errors = tmp_path / f"{measures}.txt", tmp_path / "errors"
        process = started(__name__, "states_after", setting, file, measures, stderr=str(errors))
        process.join()
        assert process.exitcode == 0, errors.read_text()
    assert (tmp_path / "True.txt").read_text() == (tmp_path / "False.txt").read_text()


def test_left_as_found_turns_tf32_off(llama):
    torch.set_float32_matmul_precision("high")
    try:
        with left_as_found(llama):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("update", UPDATES)
def test_measuring_after_bf16_training_ignores_autocast(tmp_path, update):
    """accelerate leaves autocast around the model's forward; the learning rate is 0, so no measurement may change."""
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


def test_each_module_gets_its_mode_back(llama):
    llama.train()
    llama.model.layers[0].eval()
    before = [it.training for it in llama.modules()]
    with left_as_found(llama):
        assert not any(it.training for it in llama.modules())
    assert [it.training for it in llama.modules()] == before


def test_random_state_is_restored(llama):
    state = torch.random.get_rng_state()
    with left_as_found(llama):
        torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dynamic_rotary_scaling_is_restored():
    """A longer sentence changes the frequencies of all that follow."""
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_llama(max_position_embeddings=8, rope_parameters=dynamic)
    first = perplexity(model, [padded_batch([10])]).value
    neuron_impacts(model, padded_batch([40]))
    assert perplexity(model, [padded_batch([10])]).value == first


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 2, 2]])}, "attention_mask: expected 0 and 1"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "position_ids: several sentences are packed into one row"),
        ({"special_tokens_mask": torch.zeros(1, 3)}, "special_tokens_mask: expected the shape of input_ids"),
    ],
)
def test_packed_and_misshapen_batches_are_refused(llama, more, message):
    with pytest.raises(ValueError, match=message):
        perplexity(llama, [{"input_ids": torch.tensor([[5, 6, 7, 8]]), **more}])


@pytest.mark.parametrize(
    ("mask", "positions"),
    [([1, 1, 1, 0], [0, 1, 2, 0]), ([0, 0, 1, 1], [1, 1, 0, 1]), ([0, 1, 1, 1], [3, 0, 1, 2])],
)
def test_positions_of_padding_do_not_matter(llama, mask, positions):
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.tensor([mask])}
    expected = perplexity(llama, [batch]).value
    assert perplexity(llama, [batch | {"position_ids": torch.tensor([positions])}]).value == expected


def test_parts_of_a_batch_may_be_none(llama):
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    expected = neuron_impacts(llama, batch)
    for site, values in neuron_impacts(llama, batch | {"attention_mask": None, "special_tokens_mask": None}).items():
        assert torch.equal(values, expected[site])


def test_threads_that_measure_leave_everything_as_found():
    """Their blocks overlap without a lock, and the last to end would restore what the first had changed."""
    torch.set_float32_matmul_precision("high")
    before, models = state(), []

    def measure(seed):
        model = tiny_llama().train()
        models.append(model)
        for _ in range(10):
            perplexity(model, [padded_batch([9, 5], seed=seed)])

    threads = [Thread(target=measure, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = state()
    torch.set_float32_matmul_precision("highest")
    assert after == before and all(model.training for model in models)


def test_threads_that_measure_the_same_model_leave_it_in_training():
    model, started, first_is_in = tiny_llama().train(), Event(), Event()

    def batches():
        first_is_in.set()
        started.wait(10)
        yield padded_batch([9, 5])

    def second():
        started.set()
        perplexity(model, [padded_batch([9, 5])])

    threads = [Thread(target=perplexity, args=(model, batches())), Thread(target=second)]
    threads[0].start()
    first_is_in.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert model.training
