"""The device that a model is loaded onto, its identity, files that don't fit its config, and commits of the hub."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from conftest import tiny_llama
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, T5Config

from agnostic_train.errors import UserError
from agnostic_train.export.checkpoint import export_checkpoint
from agnostic_train.files import write_json
from agnostic_train.model.loading import (
    at_checkpoint,
    find_accelerator,
    load_config,
    load_model,
    load_tokenizer,
    model_identity,
)
from agnostic_train.model.reading import commit_of, hub_commit
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.pipeline.materials import Materials
from agnostic_train.recipe import ModelSection
from agnostic_train.recipe_file import make_recipe
from agnostic_train.training.compact import NeuronConfig


def test_model_identity_covers_custom_code_and_vocabulary(tmp_path):
    """They count whatever their file names; a model card doesn't."""
    tiny_llama().save_pretrained(tmp_path)
    identities = [model_identity(ModelSection(name=str(tmp_path)))]
    for name in ("README.md", ".gitattributes", "modeling_own.py", "own.tiktoken"):
        (tmp_path / name).write_text("some")
        identities.append(model_identity(ModelSection(name=str(tmp_path))))
    assert identities[0] == identities[1] == identities[2]
    assert identities[2] != identities[3] != identities[4]


@pytest.mark.parametrize("name, expected", [("mps", "cpu"), ("meta", "meta"), (None, "cpu")])
def test_accelerator_without_float64_is_not_used(tmp_path, monkeypatch, name, expected):
    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: name is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(name))
    assert load_model(ModelSection(name=str(tmp_path))).device.type == expected


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
        load_model(ModelSection(name=str(tmp_path)))
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
        load_model(ModelSection(name=str(tmp_path)))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_lack_of_memory_is_no_damaged_file(tmp_path, monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(type(error)):
        load_model(ModelSection(name=str(tmp_path)))


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
        load_config(ModelSection(name=str(tmp_path)))


def test_folders_that_hold_something_else_are_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    section = ModelSection(name=str(tmp_path))
    with pytest.raises(UserError, match=r"can't load the tokenizer .*: it has no tokenizer, such as a tokenizer.json"):
        load_tokenizer(section)
    (tmp_path / "flax_model.msgpack").write_text("version https://git-lfs.github.com/spec/v1")  # not read
    with pytest.raises(UserError, match="it has no tokenizer"):
        load_tokenizer(section)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(UserError, match=r"model.safetensors is only a pointer of Git LFS; run `git lfs pull` there"):
        load_model(section)
    with pytest.raises(UserError, match=r"model.name: .*/config.json is a file; name the folder of a checkpoint"):
        load_config(replace(section, name=str(tmp_path / "config.json")))
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match=r"model.name: .*/t5: it isn't a decoder-only language model"):
        load_model(replace(section, name=str(tmp_path / "t5")))
    (tmp_path / "t5/config.json").rename(tmp_path / "t5/small.gguf")
    with pytest.raises(UserError, match=r"has no config.json but a GGUF file, which isn't supported"):
        load_config(replace(section, name=str(tmp_path / "t5")))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache, as downloads leave it: of `me/mine`, branches `main` and `older` with different weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--me--mine"
    (repository / "refs").mkdir(parents=True)
    for branch, commit, factor in (("main", "a" * 40, 1), ("older", "b" * 40, 0.5)):
        (repository / "refs" / branch).write_text(commit)
        model = tiny_llama()
        model.lm_head.weight.data *= factor
        model.save_pretrained(repository / "snapshots" / commit)
    return repository


def test_model_of_the_hub_is_identified_by_its_commit(hub):
    section = ModelSection(name="me/mine")
    assert model_identity(section) == {"name": "me/mine", "commit": "a" * 40}
    assert model_identity(replace(section, revision="older"))["commit"] == "b" * 40
    assert model_identity(at_checkpoint(section, "older", "model.checkpoints"))["commit"] == "b" * 40
    assert hub_commit("me/mine", "model.name", "b" * 40) == "b" * 40
    assert hub_commit(hub / "snapshots" / ("a" * 40), "model.name") is None
    (hub / "refs/main").write_text("b" * 40)
    assert model_identity(section)["commit"] == "b" * 40


def test_models_of_the_hub_know_the_commit_that_they_were_loaded_from(hub, tmp_path):
    section = ModelSection(name="me/mine", dtype="float32")
    main, older = load_model(section), load_model(replace(section, revision="older"))
    assert [commit_of(it) for it in (main, older)] == ["a" * 40, "b" * 40]
    assert commit_of(load_model(replace(section, name=str(hub / "snapshots" / ("a" * 40))))) is None
    assert not torch.equal(main.lm_head.weight, older.lm_head.weight)
    # An adapter is read on the commit that it was trained on, not on that of a branch.
    chosen = NeuronSet({(0, "up"): [1]})
    get_peft_model(older, NeuronConfig(neurons=chosen, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").unload()
    assert torch.equal(
        loaded.lm_head.weight, load_model(replace(section, name=str(hub / "snapshots" / ("b" * 40)))).lm_head.weight
    )
    check = export_checkpoint(tmp_path / "adapter", tmp_path / "out")
    assert check.status == "identical" and "_commit_hash" not in (tmp_path / "out/config.json").read_text()
    assert json.loads((tmp_path / "out/manifest.json").read_text())["revision"] == "b" * 40


def test_a_run_reads_one_commit_although_a_branch_moves(hub):
    recipe = make_recipe(
        {"model": {"name": "me/mine"}, "corpus": {"path": "x", "languages": ["en"]}, "output_dir": "o"}
    )
    materials = Materials(recipe, PartialState(), say=lambda line: None)
    assert materials.model_section.revision == "a" * 40
    (hub / "refs/main").write_text("b" * 40)
    assert commit_of(materials.model) == "a" * 40


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (RevisionNotFoundError, "model.revision: me/mine has no revision 'v1'"),
        (GatedRepoError, "model.name: .* it is gated; accept its terms .* then run `hf auth login`"),
        (RepositoryNotFoundError, "model.name: .* no such folder, and no such model on the hub"),
    ],
)
def test_errors_of_the_hub_name_key_and_remedy(monkeypatch, cause, message):
    def fail(name, file, revision):
        raise OSError("a long text") from cause.__new__(cause)

    monkeypatch.setattr("agnostic_train.model.reading.cached_file", fail)
    with pytest.raises(UserError, match=message):
        hub_commit("me/mine", "model.name", "v1")
