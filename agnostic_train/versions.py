"""Versions of installed packages, this one among them."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str:
    """A package's version; `0+unknown` where it runs from a folder on the path and isn't installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "0+unknown"
