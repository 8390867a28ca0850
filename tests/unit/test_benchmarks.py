"""The benchmarks start where torch, transformers and PEFT are, and none of the packages that read recipes and text."""

import subprocess
import sys

import pytest

ABSENT = {"datasets", "pydantic", "ruamel.yaml", "wandb"}
PROGRAM = """
import runpy, sys
runpy.run_path(sys.argv[1], run_name="imported")
print(*sorted({absent} & sys.modules.keys()))
"""


@pytest.mark.parametrize("name", ["detection", "training"])
def test_a_benchmark_imports_no_more_than_it_needs(pytestconfig, name):
    file = pytestconfig.rootpath / f"scripts/benchmarks/{name}.py"
    command = [sys.executable, "-c", PROGRAM.format(absent=ABSENT), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
