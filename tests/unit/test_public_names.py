"""Every public name says what it takes, and which errors it raises."""

import ast
import inspect
import re
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
