"""The embedded default: its corpus and model are created once, from nothing but the package."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from agnostic_train.quickstart import tiny_model
from agnostic_train.recipe_file import load_recipe


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AGNOSTIC_TRAIN_CACHE", str(tmp_path))
    return tmp_path


def test_corpus_is_written_once(cache):
    directory = tiny_model.quickstart_corpus()
    assert directory.is_relative_to(cache)
    names = {
        f"{language}.{split}.txt" for language in ("en", "zh", "sw", "de", "fr") for split in ("train", "valid", "test")
    }
    assert {path.name for path in directory.iterdir()} == names
    before = (directory / "sw.test.txt").stat().st_mtime_ns
    assert (tiny_model.quickstart_corpus() / "sw.test.txt").stat().st_mtime_ns == before


def test_model_is_trained_once_and_loads(cache, monkeypatch):
    monkeypatch.setattr(tiny_model, "NUM_STEPS", 2)
    directory = tiny_model.quickstart_model()
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert 1e6 < model.num_parameters() < 3e6
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer("Mtoto anasoma kitabu.")["input_ids"], skip_special_tokens=True) == (
        "Mtoto anasoma kitabu."
    )
    monkeypatch.setattr(tiny_model, "train_model", None)
    assert tiny_model.quickstart_model() == directory


def test_cache_depends_on_package_versions(cache, monkeypatch):
    before = tiny_model.cache_directory()
    monkeypatch.setattr(tiny_model, "installed_version", lambda package: "0")
    assert tiny_model.cache_directory() != before


@pytest.mark.parametrize("name", ["quickstart", "real_text"])
def test_shipped_recipes_are_valid(name, pytestconfig):
    recipe = load_recipe(pytestconfig.rootpath / f"recipes/{name}.yaml")
    assert recipe.training.languages == ["sw"]
