"""The benchmarks need only torch, transformers and PEFT, and no package that reads recipes or text."""

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
def test_benchmark_runs_without_recipe_and_text_packages(pytestconfig, tmp_path, name):
    file, results = pytestconfig.rootpath / f"scripts/benchmarks/{name}.py", tmp_path / "results.json"
    command = [sys.executable, "-c", PROGRAM, str(file), *LEAST[name], f"--output={results}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "imported:"
    report = json.loads(results.read_text())
    assert {"machine", "versions", "date"} < report.keys()
    measured = report["by_length"]["9"]["times_forward"] if name == "detection" else report["results"]["0.05"]
    assert len(measured) == {"detection": 3, "training": 2}[name]
