"""Random recipes and flags give a recipe or a one-line error, never anything else."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agnostic_train.cli import main
from agnostic_train.errors import UserError
from agnostic_train.pipeline.checks import check_recipe
from agnostic_train.pipeline.settings import training_arguments
from agnostic_train.recipe_file import load_recipe
from agnostic_train.recipe_keys import recipe_keys, training_argument_types

BASE = "model: {name: m}\ncorpus: {path: text, languages: [en, sw]}\ntraining: {languages: [sw]}\noutput_dir: out\n"
ALIASES = ", ".join(f"a{i}: &a{i} [{', '.join(['x' if i == 0 else f'*a{i - 1}'] * 10)}]" for i in range(9))
"""A few hundred bytes of YAML that expand to a billion values."""

YAML_PIECES = st.sampled_from(
    ["{", "}", "[", "]", ":", ": ", ", ", "- ", "? ", "\n", "\n  ", "#", "|", ">", "&a ", "*a", "!!int ", "!!bool ",
     "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "<<: ", "---\n", "%YAML 1.1\n", "'", '"', "\\", "\t", "\0",
     "model", "name", "corpus", "training", "languages", "output_dir", "no", "~", ".nan", "1e400", "0x", "2001-99-99"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["en", "auto"]),
    lambda it: st.lists(it, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), it, max_size=2),
    max_leaves=5,
)
KEYS = st.sampled_from([*recipe_keys(), *(f"training.{key}" for key in training_argument_types())])


def assert_recipe_or_one_line(file, flags=None):
    try:
        recipe = load_recipe(file, flags)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000 and str(error).strip() == str(error) != ""
        return
    # The manifest stores this form, and stage keys are computed from it.
    json.dumps(recipe.to_dict(), allow_nan=False, ensure_ascii=False).encode()


@settings(max_examples=200)
@given(st.lists(YAML_PIECES | st.text(max_size=3), max_size=25).map("".join) | st.text())
@example("!!int x")
@example("!!int ''")
@example("!!bool x")
@example("x: ._")
@example("a: 2001-99-99")
@example("[" * 5000)
@example("{a: " * 5000)
@example("&a [*a]")
@example(f"{BASE}x: &a {{b: *a}}")
@example(f"{BASE}1: 2")
@example(f"{BASE}[1, 2]: 3")
@example(f'{BASE}"a\\nb": 3')
@example(f'{BASE}"\\uD800": 3')
@example(f"{BASE}{ALIASES.replace(', a', chr(10) + 'a')}")
def test_any_text_gives_a_recipe_or_one_line(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    assert_recipe_or_one_line(file)


@settings(max_examples=200)
@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_values_give_a_recipe_or_one_line(tmp_path, changes):
    values = {"model": {"name": "m"}, "corpus": {"path": "t", "languages": ["en"]}, "training": {"languages": ["sw"]}}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            values[section] = values.get(section, {}) | {name: value}
        else:
            values[section] = value
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(values))
    assert_recipe_or_one_line(file)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    file = tmp_path_factory.mktemp("base") / "recipe.yaml"
    file.write_text(BASE)
    return file


@settings(max_examples=200)
@given(
    st.dictionaries(
        KEYS | st.text(max_size=8), st.lists(YAML_PIECES, max_size=4).map("".join) | st.text(max_size=6), max_size=3
    )
)
@example({"training.learning_rate": ".nan"})
@example({"training.learning_rate": "'nan'"})
@example({"training.lr_scheduler_kwargs": "{a: 2001-01-01}"})
@example({"training.lr_scheduler_kwargs": "{a: .inf}"})
@example({"training.lr_scheduler_kwargs": "&a {a: *a}"})
@example({"training.lr_scheduler_kwargs": "!!set {a}"})
@example({"training.max_steps": "9" * 5000})
@example({"corpus.seed": "0x" + "f" * 5000})
@example({"corpus.seed": f"{{{ALIASES}}}"})
@example({"training.learning_rate": f"{{{ALIASES}}}"})
@example({"output_dir": '"a\\0b"'})
@example({"output_dir": "\udcff"})
def test_any_flags_give_a_recipe_or_one_line(base, flags):
    assert_recipe_or_one_line(base, flags)


@pytest.mark.parametrize("key", ["x\ny", "training.x\ny", "corpus.\0", "--", "=", ""])
def test_malformed_flags_exit_with_an_error(base, key, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", str(base), f"--{key}=3"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("agnostic-train: error: ")


@pytest.mark.parametrize("value", ["x", "''", "{}", "{a: 1}", "[a]", "-1", "0", "1e30", "true"])
def test_errors_of_training_arguments_are_one_line(base, tmp_path, value):
    """Every TrainingArguments key with each value, up to the checks that precede any work."""
    for key in training_argument_types():
        try:
            recipe = load_recipe(base, {f"training.{key}": value, "output_dir": str(tmp_path / "out")})
            arguments = training_arguments(recipe)
            check_recipe(recipe, arguments)
        except UserError as error:
            assert "training" in str(error) and "\n" not in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["seed", "data_seed"])
@pytest.mark.parametrize("value", ["-1", str(2**32)])
def test_seeds_out_of_range_are_refused_early(base, key, value):
    with pytest.raises(UserError, match=rf"training\.{key}: must be from 0"):
        training_arguments(load_recipe(base, {f"training.{key}": value}))
