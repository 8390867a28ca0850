"""Versions of installed packages, including this one."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str:
    """Returns a package's version, or `0+unknown` if it isn't installed but runs from a folder on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "0+unknown"
