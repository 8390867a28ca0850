"""Every public name says what it takes, and which errors it raises."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import agnostic_train

PACKAGE = str(Path(agnostic_train.__file__).parent)
CLASSES = [name for name in agnostic_train.__all__ if inspect.isclass(getattr(agnostic_train, name))]
FUNCTIONS = [name for name in agnostic_train.__all__ if name not in CLASSES]


def written_here(cls):
    """(class, name, function) of what a class and its bases define in this package; of a property, its getter."""
    for base in cls.__mro__:
        for name, it in vars(base).items():
            function = getattr(it, "fget", None) or getattr(it, "func", None) or getattr(it, "__func__", it)
            # What a dataclass generates has no file.
            if inspect.isfunction(function) and function.__code__.co_filename.startswith(PACKAGE):
                yield base, name, function


def raised(function):
    """Names of the errors that a function raises itself; not those of functions within it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield ast.unparse(node.exc.func)
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            todo.extend(ast.iter_child_nodes(node))


def unnamed(names, text):
    return [name for name in names if not re.search(rf"\b{name}\b", text)]


def parameters(function):
    kinds = inspect.Parameter
    found = inspect.signature(function).parameters.values()
    return [it.name for it in found if it.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD) and it.name != "self"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_and_raises(name):
    function = inspect.unwrap(getattr(agnostic_train, name))
    text = function.__doc__ or ""
    assert not unnamed(parameters(function), text)
    assert not unnamed(raised(function), text)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_what_it_is_made_of_and_its_methods_what_they_raise(name):
    cls = getattr(agnostic_train, name)
    about = vars(cls)["__doc__"] or ""
    # A dataclass without a docstring gets its signature as one.
    assert about and not about.startswith(f"{name}(")
    if is_dataclass(cls):
        assert not unnamed(inspect.get_annotations(cls), about)
    for base, method, function in written_here(cls):
        is_constructor = method in ("__init__", "__post_init__")
        if base is cls and is_constructor:
            assert not unnamed(parameters(function), about)
        text = vars(base)["__doc__"] if is_constructor else function.__doc__
        if is_constructor or not method.startswith("_"):
            assert text, f"{base.__name__}.{method} has no docstring"
            assert not unnamed(raised(function), text), f"{base.__name__}.{method}"


def python(code):
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


SLOW = "import sys; print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"


def test_the_package_and_its_command_line_import_nothing_slow():
    assert python(f"import agnostic_train, agnostic_train.cli; dir(agnostic_train); {SLOW}") == "[]\n"


@pytest.mark.parametrize(
    "arguments, printed",
    [
        (["--help"], "usage: agnostic-train [-h]"),
        (["--version"], f"agnostic-train {agnostic_train.__version__}"),
        (["run", "--help"], "--detection.top_ratio VALUE"),
        (["nonsense"], ""),
        (["run", "nowhere.yaml"], ""),
        (["run", "recipes/quickstart.yaml", "--detection.top_ratio=7"], ""),
    ],
)
def test_help_and_a_mistake_wait_for_no_library(arguments, printed, pytestconfig):
    """A recipe with TrainingArguments is one, too."""
    arguments = [str(pytestconfig.rootpath / it) if it.startswith("recipes/") else it for it in arguments]
    code = f"""
from agnostic_train.cli import main
try:
    main({arguments})
except SystemExit:
    pass
{SLOW}"""
    out = python(code)
    assert printed in out and out.endswith("[]\n")


def test_names_are_found_when_they_are_asked_for():
    assert set(agnostic_train.__all__) <= set(dir(agnostic_train)) and agnostic_train._MODULES.keys() == set(
        agnostic_train.__all__
    )
    assert not hasattr(agnostic_train, "nothing")
    assert not set(agnostic_train.__all__) & {path.stem for path in Path(PACKAGE).iterdir()}  # modules, when imported


@pytest.mark.parametrize("first", ["import agnostic_train", "import peft, agnostic_train"])
def test_peft_knows_the_adapter(first):
    code = f"{first}; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as types; print(types['NEURON'].__name__)"
    assert python(code) == "NeuronConfig\n"


def test_what_the_adapter_rests_on_does_not_import_peft():
    """Otherwise PEFT's import, which imports the adapter, would meet it half imported."""
    rest = "agnostic_train.neurons.neuron_set, agnostic_train.training.chosen, agnostic_train.model.decoder"
    assert "peft" not in python(f"import {rest}; {SLOW}")
