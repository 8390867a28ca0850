"""The package's version is that of its code, not of its installation."""

import tomllib
from importlib import import_module

import agnostic_train
from agnostic_train.pipeline.manifest import package_versions
from agnostic_train.versions import installed_version


def test_version_is_that_of_the_running_code(pytestconfig, monkeypatch):
    monkeypatch.setattr("agnostic_train.versions.version", lambda package: "0.0.1")
    assert package_versions()["agnostic_train"] == agnostic_train.__version__ != "0.0.1"
    assert package_versions()["torch"] == "0.0.1"
    project = tomllib.loads((pytestconfig.rootpath / "pyproject.toml").read_text())
    module, name = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rsplit(".", 1)
    assert getattr(import_module(module), name) == agnostic_train.__version__


def test_package_that_is_not_installed_has_an_unknown_version():
    assert installed_version("no_such_package") == "0+unknown" and installed_version("torch").startswith("2.")
