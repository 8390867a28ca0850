"""The shipped sweeps: the commands that wandb's agent would run, and an offline run of two points of one."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import started
from ruamel.yaml import YAML
from small_run import root, run, template  # noqa: F401 (fixtures)
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from agnostic_train.files import read_json
from agnostic_train.recipe_file import load_recipe

SWEEPS = ("strategy", "learning_rate", "top_ratio")


def sweep(pytestconfig, name):
    return YAML(typ="safe").load((pytestconfig.rootpath / f"recipes/sweeps/{name}.yaml").read_text())


def commands(config):
    """Yield the command that an agent runs for each point of the grid, made by wandb's functions."""
    names = list(config["parameters"])
    for values in itertools.product(*(config["parameters"][name]["values"] for name in names)):
        chosen = {name: {"value": value} for name, value in zip(names, values, strict=True)}
        variables = {**create_sweep_command_args({"args": chosen}), "env": ["/usr/bin/env"]}
        command = []
        for part in create_sweep_command(list(config["command"])):
            command += variables[part[2:-1]] if part.startswith("${") and part.endswith("}") else [part]
        yield command


@pytest.mark.parametrize("name", SWEEPS)
def test_every_point_of_a_sweep_is_a_valid_recipe(pytestconfig, name, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    config = sweep(pytestconfig, name)
    assert config["metric"] == {"name": "objective", "goal": "minimize"} and config["method"] == "grid"
    recipes = []
    for command in commands(config):
        assert command[:4] == ["/usr/bin/env", "accelerate", "launch", "--config_file=recipes/accelerate/cpu.yaml"]
        assert command[4:7] == ["-m", "agnostic_train", "run"]
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in command[8:])
        recipes.append(load_recipe(pytestconfig.rootpath / command[7], flags))
    assert len(recipes) > 5 and len({str(recipe) for recipe in recipes}) == len(recipes)
    assert all(recipe.tracking.wandb and recipe.output_dir == f"runs/sweeps/{name}/abc" for recipe in recipes)


@pytest.mark.figures
def test_two_points_of_a_sweep_run(pytestconfig, root, monkeypatch):
    """Run the sweep's commands on the small recipe: the first as an agent would, the last in a forked process."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def by_agent(command):
        done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]

    def forked(command):
        # Its own process, because wandb reads the environment once per process.
        arguments, variables = command[command.index("agnostic_train") + 1 :], ("WANDB_MODE", "WANDB_RUN_ID")
        process = started("agnostic_train.cli", "main", arguments, environment={it: os.environ[it] for it in variables})
        process.join(300)
        assert process.exitcode == 0

    every, changes = list(commands(sweep(pytestconfig, "strategy"))), []
    for run_id, point, execute in (("first", every[0], by_agent), ("last", every[-1], forked)):
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        execute(
            [
                part.replace("recipes/real_text.yaml", str(root / "recipe.yaml")).replace("runs/", f"{root}/runs/")
                for part in point
            ]
        )
        folder = root / f"runs/sweeps/strategy/{run_id}"
        assert next((folder / "wandb").glob(f"offline-run-*{run_id}"))
        changes.append(read_json(folder / "evaluation.json")["languages"]["sw"]["bits_per_byte_change"])
    assert changes[0] != changes[1]


def test_unset_variable_in_the_output_folder_is_refused(root, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    assert run(root, "detect", f"--output_dir={root}/runs/$WANDB_RUN_ID") == 2
    assert "output_dir: $WANDB_RUN_ID isn't set in the environment" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_RUN_ID", "")
    for empty in ('""', "$WANDB_RUN_ID"):
        assert run(root, "detect", f"--output_dir={empty}") == 2
        assert "is empty; name a folder" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_RUN_ID", "a$b")
    assert run(root, "detect", f"--output_dir={root}/runs/${{WANDB_RUN_ID}}") == 2
    assert "runs/a$b' has a $, which stands for the name of a variable" in capsys.readouterr().err
