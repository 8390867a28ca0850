"""Every public name documents its parameters and errors, and imports stay fast."""

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
    """Yield (class, name, function) of all that a class and its bases define in this package; a property's getter."""
    for base in cls.__mro__:
        for name, attribute in vars(base).items():
            function = (
                getattr(attribute, "fget", None)
                or getattr(attribute, "func", None)
                or getattr(attribute, "__func__", attribute)
            )
            # Methods that a dataclass generates have no file.
            if inspect.isfunction(function) and function.__code__.co_filename.startswith(PACKAGE):
                yield base, name, function


def raised(function):
    """Yield the names of the errors that a function raises itself, without those of nested functions."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func)
            maker = vars(sys.modules[function.__module__]).get(name)
            # A function that makes the error says which.
            yield maker.__annotations__["return"].__name__ if inspect.isfunction(maker) else name
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            todo.extend(ast.iter_child_nodes(node))


def unnamed(names, text):
    return [name for name in names if not re.search(rf"\b{name}\b", text)]


def parameters(function):
    kinds = inspect.Parameter
    signature_parameters = inspect.signature(function).parameters.values()
    return [
        it.name
        for it in signature_parameters
        if it.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD) and it.name != "self"
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_docstring_names_parameters_and_errors(name):
    function = inspect.unwrap(getattr(agnostic_train, name))
    text = function.__doc__ or ""
    assert not unnamed(parameters(function), text)
    assert not unnamed(raised(function), text)


@pytest.mark.parametrize("name", CLASSES)
def test_class_docstring_names_fields_and_parameters_and_methods_name_errors(name):
    cls = getattr(agnostic_train, name)
    about = vars(cls)["__doc__"] or ""
    # A dataclass without a docstring gets its signature as its docstring.
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
    """Return what a fresh Python process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


SLOW = "import sys; print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"


def test_package_and_command_line_import_no_slow_library():
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
def test_help_and_errors_import_no_slow_library(arguments, printed, pytestconfig):
    """Errors include one in a recipe that has TrainingArguments."""
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


def test_public_names_resolve_lazily():
    assert set(agnostic_train.__all__) <= set(dir(agnostic_train)) and agnostic_train._MODULES.keys() == set(
        agnostic_train.__all__
    )
    assert not hasattr(agnostic_train, "nothing")
    assert not set(agnostic_train.__all__) & {
        path.stem for path in Path(PACKAGE).iterdir()
    }  # which would shadow an imported module


@pytest.mark.parametrize("first", ["import agnostic_train", "import peft, agnostic_train"])
def test_peft_registers_the_adapter_in_either_import_order(first):
    code = f"{first}; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as types; print(types['NEURON'].__name__)"
    assert python(code) == "NeuronConfig\n"


def test_modules_the_adapter_imports_do_not_import_peft():
    """Otherwise importing PEFT, which imports the adapter, would find it partially imported."""
    rest = "agnostic_train.neurons.neuron_set, agnostic_train.training.chosen, agnostic_train.model.decoder"
    assert "peft" not in python(f"import {rest}; {SLOW}")
