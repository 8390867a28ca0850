"""A decoder with a vision tower (Gemma 3 as on the Hub): only the decoder is examined, and everything is exported."""

import pytest
import torch
from conftest import UPDATES, padded_batch
from peft import get_peft_model
from safetensors.torch import load_file
from small_training import arguments, sentences
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from agnostic_train import NeuronConfig, NeuronTrainer, export_checkpoint
from agnostic_train.detection.self_check import verify_impacts
from agnostic_train.model.decoder import find_decoder
from agnostic_train.neurons.neuron_set import NeuronSet

CHOSEN = NeuronSet({(0, "q"): [1, 17], (1, "k"): [3], (1, "o"): [5, 41], (0, "up"): [2, 52], (1, "down"): [0, 7]})


def gemma_with_images():
    torch.manual_seed(0)
    text = dict(
        vocab_size=61, hidden_size=42, intermediate_size=53, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=10, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, image_size=28, intermediate_size=20, num_attention_heads=2, num_hidden_layers=1, patch_size=14
    )
    tokens = dict(mm_tokens_per_image=4, boi_token_index=57, eoi_token_index=58, image_token_index=59)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens)).eval()


def test_impacts_of_the_text_decoder_are_verified():
    model = gemma_with_images()
    assert len(find_decoder(model).layers) == 2
    verify_impacts(model, padded_batch([5, 9, 12], vocab_size=50))


@pytest.mark.parametrize("update", UPDATES)
def test_training_and_export_keep_the_whole_model(tmp_path, update):
    """The names in the checkpoint differ from those of the modules; what is loaded is what was trained."""
    base, model = gemma_with_images(), gemma_with_images()
    settings = arguments(tmp_path / "run", update=update, max_steps=3)
    trainer = NeuronTrainer(model, settings, train_dataset=sentences(), neurons=CHOSEN)
    trainer.train()
    check = export_checkpoint(trainer.model, tmp_path / "out", base=base)
    assert check.status == "identical" and check.chosen_moved > 0.9
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(loaded) is Gemma3ForConditionalGeneration
    batch = padded_batch([5, 9], vocab_size=50)
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, base(**batch).logits, atol=1e-3)
    vision = base.model.vision_tower.state_dict()
    assert all(torch.equal(value, vision[name]) for name, value in loaded.model.vision_tower.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_export_keeps_each_weights_own_dtype(tmp_path, dtype):
    base, model = (gemma_with_images().to(dtype) for _ in range(2))
    for it in (base, model):
        it.model.language_model.norm.float()
    assert export_checkpoint(model, tmp_path / "out", base=base, neurons=CHOSEN).status == "identical"
    written = load_file(tmp_path / "out/model.safetensors")
    (norm,) = [name for name in written if name.endswith("language_model.model.norm.weight")]
    assert written.pop(norm).dtype == torch.float32 and {it.dtype for it in written.values()} == {dtype}


def test_weight_that_differs_after_writing_is_an_error(tmp_path, monkeypatch):
    original = Gemma3ForConditionalGeneration.from_pretrained.__func__

    def with_a_changed_weight(cls, *args, **kwargs):
        model = original(cls, *args, **kwargs)
        with torch.no_grad():
            model.model.language_model.norm.weight[3] += 1
        return model

    monkeypatch.setattr(Gemma3ForConditionalGeneration, "from_pretrained", classmethod(with_a_changed_weight))
    with pytest.raises(RuntimeError, match="wasn't written correctly"):
        export_checkpoint(gemma_with_images(), tmp_path / "out", base=gemma_with_images(), neurons=CHOSEN)
    assert not (tmp_path / "out").exists()


def test_files_of_the_processor_are_kept(tmp_path):
    gemma_with_images().save_pretrained(tmp_path / "base")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / "base" / name).write_text(f'{{"it": "{name}"}}')
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, NeuronConfig(neurons=CHOSEN))
    export_checkpoint(model, tmp_path / "out")
    export_checkpoint(model, tmp_path / "out")  # its own files may be replaced
    assert (tmp_path / "out/processor_config.json").read_text() == '{"it": "processor_config.json"}'
    assert (tmp_path / "out/preprocessor_config.json").exists()
    base.name_or_path = str(tmp_path / "moved")
    export_checkpoint(model, tmp_path / "without")
    assert not (tmp_path / "without/processor_config.json").exists()
