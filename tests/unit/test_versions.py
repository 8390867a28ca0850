"""The package also runs from a source folder, without being installed."""

import subprocess
import sys

from agnostic_train.versions import installed_version

NOT_INSTALLED = """
import importlib.metadata as metadata
original = metadata.version
def version(name):
    if name == "agnostic_train":
        raise metadata.PackageNotFoundError(name)
    return original(name)
metadata.version = version
import agnostic_train
from agnostic_train.pipeline.manifest import package_versions
print(agnostic_train.__version__, package_versions()["agnostic_train"], package_versions()["torch"])
"""


def test_package_that_is_not_installed_has_an_unknown_version():
    done = subprocess.run([sys.executable, "-c", NOT_INSTALLED], capture_output=True, text=True)
    assert done.stdout.split() == ["0+unknown", "0+unknown", installed_version("torch")], done.stderr
    assert installed_version("torch").startswith("2.")
