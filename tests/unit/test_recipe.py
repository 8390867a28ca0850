"""Recipes: which of flags, file and defaults takes precedence, and a clear one-line error for every mistake."""

from dataclasses import fields
from inspect import signature

import pytest

from agnostic_train.detection.detect import detect_neurons
from agnostic_train.errors import UserError
from agnostic_train.recipe import DetectionSection
from agnostic_train.recipe_file import load_recipe, make_recipe
from agnostic_train.recipe_keys import recipe_keys, training_argument_types

BASE = """
model: {name: some/model}
corpus: {path: text, languages: [en, sw]}
detection: {top_ratio: 0.1}
training: {languages: [sw], learning_rate: 1e-3}
output_dir: out
"""


def load(tmp_path, text=BASE, **flags):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return load_recipe(file, {key.replace("__", "."): value for key, value in flags.items()})


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path):
    recipe = load(tmp_path)
    assert recipe.detection.top_ratio == 0.1 and recipe.detection.consistency == 1.0
    assert recipe.training.arguments == {"learning_rate": 1e-3}
    flags = dict(detection__top_ratio="0.2", corpus__languages="sw,no", training__max_steps="7", output_dir="there")
    recipe = load(tmp_path, **flags, export__dtype="bfloat16", training__languages="[no]")
    assert recipe.detection.top_ratio == 0.2 and recipe.corpus.languages == ["sw", "no"]
    assert recipe.training.languages == ["no"] and recipe.output_dir == "there"
    assert recipe.training.arguments == {"learning_rate": 1e-3, "max_steps": 7}


def test_detection_section_has_the_defaults_of_detect_neurons():
    parameters = signature(detect_neurons).parameters
    shared = {field.name for field in fields(DetectionSection)} & parameters.keys()
    assert {"top_ratio", "memory_gb", "verify"} < shared
    assert {name: getattr(DetectionSection(), name) for name in shared} == {
        name: parameters[name].default for name in shared
    }


def test_tilde_expands_to_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load(tmp_path, model__name="~/m", corpus__path="~/t", output_dir="~/runs", training__neurons="~/n.json")
    paths = (recipe.model.name, recipe.corpus.path, recipe.output_dir, recipe.training.neurons)
    assert paths == tuple(f"/home/someone/{name}" for name in ("m", "t", "runs", "n.json"))
    lists = load(tmp_path, evaluation__checkpoints="~/a,b", evaluation__task_paths="~/c,d").evaluation
    assert lists.checkpoints == ["/home/someone/a", "b"] and lists.task_paths == ["/home/someone/c", "d"]


@pytest.mark.parametrize(
    "text",
    ["{lang}", "{lang}_Latn", "[{lang}]", "1e5", "007", "2024-01-01", "yes: no: so", "no", "a #1", "&a b", "|"],
)
def test_text_flags_are_taken_literally(tmp_path, text):
    recipe = load(tmp_path, model__revision=text, tracking__run_name=text, output_dir=text, training__hub_token=text)
    values = (
        recipe.model.revision,
        recipe.tracking.run_name,
        recipe.output_dir,
        recipe.training.arguments["hub_token"],
    )
    assert values == (text,) * 4


def test_quotes_and_null_in_text_flags_are_yaml(tmp_path):
    recipe = load(tmp_path, model__revision="'1e5'", tracking__run_name="null", model__name='"a b"')
    assert (recipe.model.revision, recipe.tracking.run_name, recipe.model.name) == ("1e5", None, "a b")


def test_text_lists_take_numbers_as_text_and_empty_as_an_empty_list(tmp_path):
    filled = load(tmp_path, model__checkpoints="1000", evaluation__checkpoints="[a, b]", training__label_names="[a]")
    assert filled.model.checkpoints == ["1000"] and filled.evaluation.checkpoints == ["a", "b"]
    assert filled.training.arguments["label_names"] == ["a"]
    for text in (BASE + "evaluation: {tasks: [xnli]}", BASE + "evaluation:\n  tasks:\n"):
        assert load(tmp_path, text, evaluation__tasks="").evaluation.tasks == []
    assert load(tmp_path, comparison__learning_rates="").comparison.learning_rates is None


@pytest.mark.parametrize("patterns", [("{lang}", ""), ("", "{lang}/*.{{a,b}}"), ("all", "{lang}.jsonl")])
def test_lang_placeholder_tells_languages_apart(tmp_path, patterns):
    assert load(tmp_path, **streamed(*patterns)).corpus.tells_languages_apart
    alone = load(tmp_path, **streamed("en"), corpus__languages="sw")
    assert alone.corpus.languages == ["sw"] and not alone.corpus.tells_languages_apart


def test_unquoted_no_is_norwegian(tmp_path):
    assert load(tmp_path, BASE.replace("[en, sw]", "[no, sw]")).corpus.languages == ["no", "sw"]


def streamed(config_pattern, data_files=""):
    source = {"corpus__path": "", "corpus__dataset": "some/data"}
    return source | {"corpus__config_pattern": config_pattern, "corpus__data_files": data_files}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"corpus__pth": "x"}, "unknown key corpus.pth; did you mean corpus.path?"),
        ({"corpsu__path": "x"}, "unknown key corpsu; did you mean corpus?"),
        ({"outptu_dir": "x"}, "unknown key outptu_dir; did you mean output_dir?"),
        ({"training__learnin_rate": "1"}, "did you mean training.learning_rate?"),
        ({"training__stategy": "1"}, "did you mean training.strategy?"),
        ({"training__arguments": "{}"}, "unknown key training.arguments"),
        ({"training__output_dir": "x"}, "own key output_dir"),
        ({"training__report_to": "x"}, "own key tracking.wandb"),
        ({"training__learning_rate": "fast"}, "training.learning_rate: "),
        ({"training__strategy": "sharde"}, "training.strategy: "),
        ({"detection__top_ratio": "0"}, "detection.top_ratio: "),
        ({"detection__consistency": "1.5"}, "detection.consistency: "),
        ({"detection__top_ratio": "[1]"}, "detection.top_ratio: "),
        ({"corpus__languages": "[]"}, "corpus.languages: "),
        ({"corpus__languages": "[en, en]"}, "corpus.languages: names en twice"),
        ({"corpus__languages": "../up"}, "corpus.languages: '../up' isn't a language name"),
        (
            {"corpus__languages": "en sw"},
            "corpus.languages: 'en sw' isn't a language name (no spaces or slashes); separate",
        ),
        ({"corpus__detection_sentences": "0"}, "corpus.detection_sentences: "),
        ({"corpus__seed": "{a: b}"}, "corpus.seed: "),
        ({"detection__top_ratio": "true"}, "detection.top_ratio: takes a number, not true"),
        ({"corpus__batch_size": "false"}, "corpus.batch_size: takes a number, not false"),
        ({"corpus__training_sentences": "true"}, "corpus.training_sentences: takes a number, not true"),
        ({"comparison__seeds": "[true, 2]"}, "comparison.seeds: takes a number, not true"),
        ({"training__max_steps": "true"}, "training.max_steps: takes a number, not true"),
        ({"training__learning_rate": "true"}, "training.learning_rate: takes a number, not true"),
        ({"corpus__path": ""}, "corpus: needs path or dataset, and has neither"),
        ({"corpus__dataset": "some/data"}, "corpus: needs path or dataset, and has both"),
        ({"corpus__dataset": "some/data", "corpus__path": ""}, "corpus: dataset needs config_pattern or data_files"),
        (streamed("{language}"), "corpus.config_pattern: '{language}': only {lang} is filled in"),
        (streamed("{}"), "corpus.config_pattern: '{}': only {lang} is filled in"),
        (streamed("{lang.x}"), "corpus.config_pattern: '{lang.x}': only {lang} is filled in"),
        (streamed("{lang!r}"), "only {lang} is filled in"),
        (streamed("{lang"), "corpus.config_pattern: '{lang' has an unmatched brace"),
        (streamed("{lang}", data_files="{x}.jsonl"), "corpus.data_files: '{x}.jsonl': only {lang} is filled in"),
        (streamed("en"), "corpus: every language would read the same text; write {lang} in config_pattern or"),
        (streamed("{{lang}}"), "corpus: every language would read the same text"),
        (streamed("", data_files="a.jsonl"), "corpus: every language would read the same text"),
        ({"corpus": "text"}, "corpus must be a section of keys"),
        ({"corpus__languages": "[unclosed"}, "--corpus.languages: not valid YAML"),
        ({"corpus__languages": ""}, "corpus.languages: "),
    ],
)
def test_errors_name_the_key(tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        load(tmp_path, **change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_mistake_in_a_flag_names_the_flag_for_any_file_name(tmp_path):
    folder = tmp_path / "two  spaces"
    folder.mkdir()
    with pytest.raises(UserError, match="^--detection.top_ratio: "):
        load(folder, detection__top_ratio="2")


def test_empty_section_takes_its_defaults(tmp_path):
    recipe = load(tmp_path, BASE + "tracking:\n  # wandb: true\n")
    assert recipe == load(tmp_path) and not recipe.tracking.wandb
    with pytest.raises(UserError, match="model.name is missing"):
        load(tmp_path, BASE.replace("{name: some/model}", ""))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the recipe is empty"),
        ("# nothing\n", "the recipe is empty"),
        ("just text", "expected sections"),
        ("model: [", "not valid YAML"),
        ("model: {name: a}\nmodel: {name: b}", "not valid YAML"),
        (BASE.replace("output_dir: out", ""), "output_dir is missing"),
        (BASE.replace("name: some/model", ""), "model.name is missing"),
        (BASE.replace("{path: text, languages: [en, sw]}", "3"), "corpus must be a section"),
        (BASE.replace("path: text", "pth: text"), "did you mean corpus.path?"),
    ],
)
def test_errors_of_broken_files_name_the_file(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value) and "recipe.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, message in (("none.yaml", "no such recipe"), ("", "a folder"), ("binary.yaml", "not UTF-8")):
        with pytest.raises(UserError, match=message):
            load_recipe(tmp_path / name)


def test_keys_have_help_and_include_training_arguments(tmp_path):
    assert all(recipe_keys().values()) and "detection.top_ratio" in recipe_keys()
    assert "learning_rate" in training_argument_types() and "output_dir" not in training_argument_types()
    values = load(tmp_path).to_dict()
    values["training"] |= values["training"].pop("arguments")
    assert make_recipe(values) == load(tmp_path)
