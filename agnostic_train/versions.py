"""Versions of this package and of installed ones."""

from importlib.metadata import PackageNotFoundError, version

VERSION = "0.18.0"
"""This package's version. Results depend on it, so it is read from the code that runs: in an editable installation, the
metadata stay those of the day it was installed."""


def installed_version(package: str) -> str:
    """Returns a package's version, or `0+unknown` if it isn't installed but lies on the path."""
    if package == "agnostic_train":
        return VERSION
    try:
        return version(package)
    except PackageNotFoundError:
        return "0+unknown"
