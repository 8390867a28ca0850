"""The benchmarks run where torch, transformers and PEFT are, and none of the packages that read recipes and text."""

import json
import subprocess
import sys

import pytest

ABSENT = {"datasets", "pydantic", "ruamel.yaml", "wandb"}
PROGRAM = f"""
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("imported:", *sorted({ABSENT} & sys.modules.keys()))
"""
LEAST = {
    "detection": ["--length=9", "--batch-size=1", "--rounds=1", "--device=cpu"],
    "training": ["--length=4", "--batch-size=1", "--rounds=1", "--device=cpu", "--methods", "floor", "compact"],
}


@pytest.mark.parametrize("name", LEAST)
def test_a_benchmark_needs_no_more_than_it_says(pytestconfig, tmp_path, name):
    file, results = pytestconfig.rootpath / f"scripts/benchmarks/{name}.py", tmp_path / "results.json"
    command = [sys.executable, "-c", PROGRAM, str(file), *LEAST[name], f"--output={results}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "imported:"
    found = json.loads(results.read_text())
    assert {"machine", "versions", "date"} < found.keys()
    measured = found["by_length"]["9"]["times_forward"] if name == "detection" else found["results"]["0.05"]
    assert len(measured) == {"detection": 3, "training": 2}[name]
