"""Exported checkpoints load as any other, and say whether something moved that shouldn't have."""

import copy
import json

import pytest
import torch
from conftest import padded_batch, tiny_llama
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from agnostic_train.decoder import find_decoder
from agnostic_train.export import check_frozen_weights, export_checkpoint
from agnostic_train.files import UserError
from agnostic_train.neurons import NeuronSet
from agnostic_train.quickstart.tiny_model import build_tokenizer

CHOSEN = NeuronSet({(0, "q"): [1, 17], (1, "down"): [0, 52]})


def trained(base):
    model = copy.deepcopy(base)
    with torch.no_grad():
        decoder = find_decoder(model)
        for site, indices in CHOSEN.items():
            projection = decoder.projection(site)
            projection.linear.weight.index_fill_(projection.neuron_dim, indices, 0.5)
    model.trained_neurons = CHOSEN
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_checkpoint_loads_as_any_other(tmp_path, tied):
    base = tiny_llama(tie_word_embeddings=tied)
    model = trained(base)
    tokenizer = build_tokenizer(["a b c"], vocab_size=300)
    check = export_checkpoint(model, tmp_path / "out", base=base, tokenizer=tokenizer, model_card="# card\n")
    assert check.status == "identical" and check.chosen_moved == 1.0 and check.changed == ()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert check.num_chosen == 4 * 42 and check.num_compared == total - 4 * 42
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    batch = padded_batch([5, 9])
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids == tokenizer("a").input_ids
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (
        manifest["frozen_weights"]["status"] == "identical" and (tmp_path / "out/README.md").read_text() == "# card\n"
    )


def test_a_weight_that_moved_is_named():
    base = tiny_llama()
    model = trained(base)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[2, 3] += 1e-6
        model.model.norm.weight[0] *= -1
    check = check_frozen_weights(model, base, CHOSEN)
    assert check.status == "changed"
    assert check.changed == ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight")


def test_half_precision_export_is_checked_in_that_precision(tmp_path):
    base = tiny_llama().bfloat16()
    base.save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    check = export_checkpoint(model, tmp_path / "out", base=tmp_path / "base", dtype="bfloat16")
    assert check.status == "identical"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and model.dtype == torch.float32
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(loaded.state_dict()[name], base.state_dict()[name])


def test_tied_embeddings_are_written_once_in_another_dtype(tmp_path):
    export_checkpoint(trained(tiny_llama(tie_word_embeddings=True)), tmp_path / "out", dtype="bfloat16")
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as tensors:
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118 (not iterable itself)


def test_without_a_base_or_neurons_nothing_is_claimed(tmp_path):
    base = tiny_llama()
    assert export_checkpoint(trained(base), tmp_path / "a").status == "unverified"
    assert export_checkpoint(tiny_llama(), tmp_path / "b", base=base).status == "unverified"
    assert json.loads((tmp_path / "a/manifest.json").read_text())["frozen_weights"]["status"] == "unverified"


def test_wrong_arguments_leave_nothing_behind(tmp_path):
    model = trained(tiny_llama())
    for settings, message in (
        ({"to": "onnx"}, r"export\.to"),
        ({"dtype": "float33"}, r"export\.dtype"),
        ({"dtype": "int8"}, r"export\.dtype"),
        ({"base": tiny_llama(intermediate_size=64)}, "another shape"),
    ):
        with pytest.raises(UserError, match=message):
            export_checkpoint(model, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []
