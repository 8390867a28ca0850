"""Weights & Biases, offline: one run per command, and one run for each training of a comparison."""

import os
import shutil
import subprocess
import sys

import pytest
import wandb
from small_run import root, run, template  # noqa: F401 (fixtures)

from agnostic_train.files import read_json
from agnostic_train.pipeline.stages.evaluate import objectives
from agnostic_train.pipeline.tracking import run_id_of


@pytest.fixture
def runs(monkeypatch):
    """Collect the name, group, id, config, summary, logged keys and training steps of every finished run, offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows, finished = {}, []
    log, finish = wandb.Run.log, wandb.Run.finish

    def spy_log(self, data, *args, **kwargs):
        rows.setdefault(id(self), []).append(dict(data))
        return log(self, data, *args, **kwargs)

    def spy_finish(self, *args, **kwargs):
        logged = rows.pop(id(self), [])
        keys = {key for row in logged for key in row}
        steps = [row["train/global_step"] for row in logged if "train/loss" in row]
        summary = {key: self.summary[key] for key in self.summary.keys()}  # noqa: SIM118 (a summary isn't iterable)
        finished.append(
            dict(name=self.name, group=self.group, id=self.id, summary=summary, history=keys, steps=steps)
            | {"config": self.config.as_dict()}
        )
        return finish(self, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", spy_log)
    monkeypatch.setattr(wandb.Run, "finish", spy_finish)
    return finished


@pytest.mark.figures
def test_run_logs_numbers_tables_and_figures_under_fixed_names(root, runs):
    assert run(root, "run", "--tracking.wandb=true", "--tracking.run_name=mine", "--tracking.project=p") == 0
    (only,) = runs
    assert only["name"] == "mine" and wandb.run is None
    evaluation, score = read_json(root / "out/evaluation.json"), read_json(root / "out/score.json")
    summary, validation = only["summary"], evaluation["validation"]
    assert summary["target_bits_per_byte"] == pytest.approx(validation["sw"]["after"]["bits_per_byte"])
    assert summary["target_change"] == pytest.approx(validation["sw"]["bits_per_byte_change"])
    assert summary["largest_forgetting"] == pytest.approx(max(0, validation["en"]["bits_per_byte_change"]))
    assert summary["objective"] == pytest.approx(summary["target_bits_per_byte"])
    assert summary["agnostic_score"] == pytest.approx(score["value"])
    assert summary["test/change/en"] == pytest.approx(evaluation["languages"]["en"]["bits_per_byte_change"])
    assert {f"tables/{name}" for name in ("neurons", "score", "ablation", "evaluation")} <= only["history"]
    assert {"figures/score", "figures/neurons", "train/loss"} <= only["history"] and only["steps"] == [2, 4, 6]
    # The same command continues the same run.
    assert run(root, "run", "--tracking.wandb=true", "--training.max_steps=4") == 0
    assert {it["id"] for it in runs} == {only["id"]}
    # A copy is another run.
    shutil.copytree(root / "out", root / "copy")
    assert run(root, "run", "--tracking.wandb=true", "--training.max_steps=4", f"--output_dir={root / 'copy'}") == 0
    assert runs[-1]["id"] != only["id"]
    # Kept results are logged too, because tracking may have been turned on after they were made.
    (root / "out/.tracking").unlink()
    assert run(root, "run", "--tracking.wandb=true", "--training.max_steps=4") == 0
    assert {"objective", "agnostic_score", "neurons/shared", "test/change/en"} <= runs[-1]["summary"].keys()
    assert {"tables/evaluation", "figures/score"} <= runs[-1]["history"] and runs[-1]["id"] != only["id"]


def test_objective_of_a_sweep_penalises_forgetting():
    def row(before, after):
        values = {"before": {"bits_per_byte": before}, "after": {"bits_per_byte": after}}
        return {**values, "bits_per_byte_change": after / before - 1}

    evaluation = {
        "languages": {"sw": row(9, 9)},
        "validation": {"sw": row(2.0, 1.8), "en": row(1.0, 1.05), "de": row(1, 0.9)},
    }
    values = objectives(evaluation, ["sw"], max_forgetting=0.03)
    assert values["target_bits_per_byte"] == 1.8 and values["target_change"] == pytest.approx(-0.1)
    assert values["largest_forgetting"] == pytest.approx(0.05) and values["objective"] == pytest.approx(1.8 * 1.2)
    assert objectives(evaluation, ["sw"], max_forgetting=0.06)["objective"] == 1.8
    evaluation["validation"]["en"] = row(1.0, 0.9)
    assert objectives(evaluation, ["sw"], max_forgetting=0.0)["largest_forgetting"] == 0


@pytest.mark.figures
def test_comparison_is_a_group_of_runs(root, runs):
    flags = ["--comparison.strategies=shared,full", "--comparison.seeds=1", "--comparison.learning_rates=[1e-2]"]
    assert run(root, "compare", *flags, "--tracking.wandb=true", "--tracking.run_name=mine") == 0
    by_name = {it["name"]: it for it in runs}
    trials = {f"{name}, rate 0.01, seed {seed}" for name in ("shared", "full") for seed in (0, 1)}
    assert by_name.keys() == trials | {"comparison"} and {it["group"] for it in runs} == {"mine"}
    assert all(
        "train/loss" in by_name[name]["history"] and "test/bits_per_byte/sw" in by_name[name]["summary"]
        for name in trials
    )
    assert {"tables/comparison", "figures/trade"} <= by_name["comparison"]["history"]
    trial = by_name["full, rate 0.01, seed 1"]["config"]["trial"]
    assert trial == {"strategy": "full", "learning_rate": 0.01, "seed": 1}
    ids = {it["name"]: it["id"] for it in runs}
    runs.clear()
    again = [*flags, "--tracking.wandb=true", "--tracking.run_name=mine", "--force"]
    assert run(root, "compare", *again) == 0
    del ids["comparison"]  # a new one
    assert ids.items() < {it["name"]: it["id"] for it in runs}.items()
    shutil.copytree(root / "out", root / "copy")
    original = runs[-1]["id"]
    assert run(root, "compare", *again[:-1], f"--output_dir={root / 'copy'}") == 0
    assert runs[-1]["name"] == "comparison" and runs[-1]["id"] != original


@pytest.mark.parametrize("mode", [None, "foo"])
def test_error_without_an_account_or_with_an_unknown_mode_names_offline_mode(root, mode):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(root)} | ({} if mode is None else {"WANDB_MODE": mode})
    command = [sys.executable, "-m", "agnostic_train", "detect", str(root / "recipe.yaml"), "--tracking.wandb=true"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("agnostic-train: error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(errors) == 1 and "tracking.wandb" in errors[0] and "WANDB_MODE=offline" in errors[0]


@pytest.mark.figures
def test_id_of_the_environment_is_only_that_of_the_whole_run(root, runs, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert run(root, "detect", "--tracking.wandb=true") == 0
    few = ["--comparison.strategies=shared,exclusive", "--comparison.seeds=1", "--comparison.learning_rates=1e-2"]
    assert run(root, "compare", "--tracking.wandb=true", "--training.max_steps=2", *few) == 0
    ids = [it["id"] for it in runs]
    # wandb reads the environment once per process, so another test may have named the first run.
    assert len(set(ids)) == len(ids) > 3 and "mine" not in ids[1:]


def test_moved_folder_keeps_its_run_and_a_damaged_record_is_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    first = run_id_of(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").mkdir()
    assert run_id_of(tmp_path / "a") != first == run_id_of(tmp_path / "b") == run_id_of(tmp_path / "b")
    (tmp_path / "a/.tracking").write_bytes(b"\xff\xfe")
    assert len(run_id_of(tmp_path / "a")) == 8
