"""The benchmarks need only torch, transformers and PEFT, and no package that reads recipes or text."""

import json
import os
import subprocess
import sys

import pytest

ABSENT = {"datasets", "pydantic", "ruamel.yaml", "wandb"}
PROGRAM = f"""
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as for a script, which may import its neighbours
runpy.run_path(sys.argv[0], run_name="__main__")
print("imported:", *sorted({ABSENT} & sys.modules.keys()))
"""
LEAST = {
    "detection": ["--length=9", "--batch-size=1", "--rounds=1", "--device=cpu"],
    "kernel_options": ["--rounds=1", "--device=cpu"],
    "training": ["--length=4", "--batch-size=1", "--rounds=1", "--device=cpu", "--methods", "floor", "compact"],
}


IS_COMPLETE = {
    "detection": lambda found: len(found["by_length"]["9"]["times_forward"]) == 3,
    "kernel_options": lambda found: len(found["results"]["heads of 6, 9 tokens"]) == 2,
    "training": lambda found: len(found["results"]["0.05"]) == 2,
}


@pytest.mark.parametrize("name", LEAST)
def test_benchmark_runs_without_recipe_and_text_packages(pytestconfig, tmp_path, name):
    file, results = pytestconfig.rootpath / f"scripts/benchmarks/{name}.py", tmp_path / "results.json"
    command = [sys.executable, "-c", PROGRAM, str(file), *LEAST[name], f"--output={results}"]
    if name == "kernel_options":
        pytest.importorskip("triton")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "imported:"
    report = json.loads(results.read_text())
    assert {"machine", "versions", "date"} < report.keys()
    assert IS_COMPLETE[name](report)
