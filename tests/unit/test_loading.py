"""The device that a model is loaded onto, its identity, and files that don't fit its config."""

import json

import pytest
import torch
from conftest import tiny_llama
from transformers import AutoModelForCausalLM

from agnostic_train.errors import UserError
from agnostic_train.files import write_json
from agnostic_train.model.loading import find_accelerator, load_config, load_model, model_identity
from agnostic_train.recipe import ModelSection


def test_model_identity_covers_custom_code_and_vocabulary(tmp_path):
    """They count whatever their file names; a model card doesn't."""
    tiny_llama().save_pretrained(tmp_path)
    identities = [model_identity(ModelSection(name="x"), tmp_path)]
    for name in ("README.md", ".gitattributes", "modeling_own.py", "own.tiktoken"):
        (tmp_path / name).write_text("some")
        identities.append(model_identity(ModelSection(name="x"), tmp_path))
    assert identities[0] == identities[1] == identities[2]
    assert identities[2] != identities[3] != identities[4]


@pytest.mark.parametrize("name, expected", [("mps", "cpu"), ("meta", "meta"), (None, "cpu")])
def test_accelerator_without_float64_is_not_used(tmp_path, monkeypatch, name, expected):
    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: name is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(name))
    assert load_model(ModelSection(name=str(tmp_path)), tmp_path).device.type == expected


@pytest.mark.parametrize("flag, expected", [("true", None), ("false", torch.device("meta"))])
def test_launcher_for_cpus_overrides_an_available_gpu(monkeypatch, flag, expected):
    monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert find_accelerator() == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"intermediate_size": 52}, "has weights of other shapes than its config.json says, such as"),
        ({"num_hidden_layers": 3}, "lacks 9 weights that its config asks for, such as model.layers.2."),
        ({"num_hidden_layers": 1}, "has 9 weights that its config has no use for, such as model.layers.1."),
    ],
)
def test_weights_that_do_not_fit_are_reported_in_one_line(tmp_path, capfd, caplog, change, message):
    tiny_llama().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    reports = []
    try:
        load_model(ModelSection(name=str(tmp_path)), tmp_path)
    except UserError as error:
        reports.append(str(error))
    reports += caplog.messages
    assert len(reports) == 1 and f"model.name: {tmp_path} {message}" in reports[0]
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "file, content",
    [
        ("config.json", '{"model_type": "llama", "num_hidden_layers": "two"}'),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}'),
        ("pytorch_model.bin", "version https://git-lfs.github.com/spec/v1"),
        ("pytorch_model.bin", ""),
    ],
)
def test_damaged_files_are_reported_in_one_line(tmp_path, file, content):
    tiny_llama().save_pretrained(tmp_path)
    if file == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=f"model.name: can't load .* of {tmp_path}"):
        load_model(ModelSection(name=str(tmp_path)), tmp_path)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_lack_of_memory_is_no_damaged_file(tmp_path, monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(type(error)):
        load_model(ModelSection(name=str(tmp_path)), tmp_path)


def test_code_that_comes_with_a_model_is_refused_by_its_key(tmp_path):
    config = {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    write_json(tmp_path / "config.json", config)
    (tmp_path / "code.py").write_text("raise SystemExit")
    with pytest.raises(
        UserError, match="it comes with code of its own; if you trust that, set model.trust_remote_code"
    ):
        load_config(ModelSection(name=str(tmp_path)), tmp_path)
