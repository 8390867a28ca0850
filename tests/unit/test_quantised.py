"""A 4-bit base model is measured, deactivated, trained and exported like any other."""

import pytest
import torch
from conftest import padded_batch, tiny_llama
from datasets import Dataset
from small_training import arguments, sentences
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from agnostic_train import (
    DetectionCallback,
    NeuronConfig,
    NeuronTrainer,
    UserError,
    deactivate,
    detect_neurons,
    export_checkpoint,
    perplexity,
)
from agnostic_train.model.decoder import find_decoder
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.quickstart.tiny_model import build_tokenizer

pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")

BATCH = padded_batch([5, 9])


@pytest.fixture
def four_bits(tmp_path):
    plain = tiny_llama(hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=128)
    plain.save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map=device)


def test_sizes_scores_and_deactivation_with_packed_weights(four_bits):
    assert find_decoder(four_bits).sizes[(0, "q")] == 64 and find_decoder(four_bits).sizes[(0, "k")] == 32
    corpora = {"en": [BATCH], "sw": [padded_batch([6, 7], seed=4)]}
    neurons = detect_neurons(four_bits, corpora, 0.2, 0.5, progress=False)  # includes the self-check
    before = perplexity(four_bits, [BATCH]).value
    with deactivate(four_bits, neurons.shared):
        assert perplexity(four_bits, [BATCH]).value != pytest.approx(before, rel=1e-2)
    assert perplexity(four_bits, [BATCH]).value == before


def test_training_merging_and_export(four_bits, tmp_path):
    packed = {name: value.clone() for name, value in four_bits.state_dict().items()}
    neurons = NeuronSet({(0, "q"): [1, 60], (1, "down"): [0, 127], (1, "up"): [5]})
    with pytest.raises(ValueError, match="quantized"):  # raised by transformers
        NeuronTrainer(four_bits, arguments(tmp_path), train_dataset=sentences(), neurons=neurons, update="mask").train()
    trainer = NeuronTrainer(four_bits, arguments(tmp_path, max_steps=5), train_dataset=sentences(), neurons=neurons)
    trainer.train()
    model = trainer.model
    deltas = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(delta.dtype == torch.float32 and delta.abs().sum() > 0 for delta in deltas)
    trained = perplexity(model, [BATCH]).value
    model.merge_adapter()
    model.unmerge_adapter()
    assert perplexity(model, [BATCH]).value == trained
    state = model.get_base_model().state_dict()
    assert all(
        torch.equal(state.get(name, state.get(name.replace("_proj.", "_proj.base_layer."))), value)
        for name, value in packed.items()
        if name.endswith(".weight")
    )

    assert export_checkpoint(model, tmp_path / "delta", to="delta").status == "unverified"
    with pytest.raises(UserError, match="quantised weights"):
        export_checkpoint(model, tmp_path / "merged")
    check = export_checkpoint(tmp_path / "delta", tmp_path / "merged", base=tmp_path / "base")
    assert check.status == "identical" and check.num_chosen == 5 * 64
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(loaded, "hf_quantizer") or loaded.hf_quantizer is None


@pytest.mark.parametrize("made_by_trl", [False, True])
def test_trl_leaves_the_adapter_in_float32(four_bits, tmp_path, made_by_trl):
    trl = pytest.importorskip("trl", reason="trl isn't installed")

    class NeuronSFTTrainer(NeuronTrainer, trl.SFTTrainer):
        pass

    text = Dataset.from_dict({"text": [f"sentence number {index} of a few" for index in range(8)]})
    settings = dict(output_dir=str(tmp_path), report_to=[], use_cpu=not torch.cuda.is_available(), max_length=16)
    chosen = {"neurons": NeuronSet({(0, "q"): [1, 60]})}
    if made_by_trl:
        chosen = {"peft_config": NeuronConfig(task_type="CAUSAL_LM", **chosen)}
    trainer = NeuronSFTTrainer(
        four_bits, args=trl.SFTConfig(**settings), train_dataset=text,
        processing_class=build_tokenizer(text["text"], vocab_size=61), **chosen,
    )  # fmt: skip
    (delta,) = (it for it in trainer.model.parameters() if it.requires_grad)
    assert delta.dtype == torch.float32


def test_detection_within_a_training_is_refused_at_construction(four_bits, tmp_path):
    callback = DetectionCallback({"en": [BATCH], "sw": [padded_batch([6, 7], seed=4)]})
    with pytest.raises(UserError, match="neurons: a Trainer takes a quantised model only with an adapter"):
        NeuronTrainer(four_bits, arguments(tmp_path), train_dataset=sentences(), callbacks=[callback])
