"""After kill -9 at any point, the same command takes no partial file for a complete one and gives the same results."""

import json
import random
import re
import shutil

import pytest
from killing import RENAMES, run_and_kill
from small_run import RECIPE, write_inputs

from agnostic_train.files import read_json

TIMES = re.compile(rb'"(eval_)?\w*(runtime|per_second|seconds|total_flos)": [-\d.e+]+|\d{4}-\d\d-\d\d \d\d:\d\d UTC')


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a folder with inputs, and in `whole` the files of an uninterrupted run."""
    root = tmp_path_factory.mktemp("killed")
    write_inputs(root)
    # Log every step, because a resumed Trainer's first mean over several steps lacks those before the checkpoint.
    recipe = RECIPE.format(root=root).replace("logging_steps: 2", "logging_steps: 1")
    (root / "recipe.yaml").write_text(recipe)
    assert run_and_kill(["run", str(root / "recipe.yaml")]) == 0
    (root / "out").rename(root / "whole")
    return root


def contents(folder):
    """Return each file's bytes without times in them, and the manifest without what identifies a run."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop(".lock")
    manifest = json.loads(files.pop("manifest.json"))
    for record in manifest["stages"].values():
        assert record.pop("finished") and record.pop("run") and record.pop("key") and record.pop("seconds") >= 0
        record["inputs"] = {name: it for name, it in record["inputs"].items() if not name.startswith("the result of")}
    files["manifest.json"] = json.dumps(manifest, sort_keys=True).encode()
    return {name: TIMES.sub(b"", content) for name, content in files.items()}


def assert_as_if_never_killed(root):
    assert run_and_kill(["run", str(root / "recipe.yaml")]) == 0
    out, whole = contents(root / "out"), contents(root / "whole")
    assert sorted(out) == sorted(whole)
    assert [name for name in whole if out[name] != whole[name]] == []


@pytest.fixture
def command(root):
    yield lambda stage: [stage, str(root / "recipe.yaml")]
    shutil.rmtree(root / "out")


def test_kill_before_every_file_of_every_stage(root, command):
    num_kills = dict.fromkeys(("detect", "score", "train", "export", "evaluate", "report"), 0)
    for stage in num_kills:
        while (status := run_and_kill(command(stage), RENAMES, call=num_kills[stage] + 1)) != 0:
            assert status == -9
            num_kills[stage] += 1
            if (root / "out/manifest.json").exists():
                assert not read_json(root / "out/manifest.json")["stages"].get(stage, {}).get("finished")
    # Each stage writes its start to the manifest, its files, and its end; an existing folder is first moved away.
    # What the score has measured is kept from one kill to the next, two more sets each time.
    assert num_kills == {"detect": 12, "score": 6, "train": 4, "export": 5, "evaluate": 4, "report": 5}
    assert_as_if_never_killed(root)


TRAINING = [
    ("agnostic_train.training.trainer.NeuronTrainer.training_step", 2),
    ("agnostic_train.training.trainer.NeuronTrainer.training_step", 5),
    # From here on, training resumes from step 3 and is killed while it saves step 6.
    ("transformers.trainer.Trainer._save_optimizer_and_scheduler", 1),
    ("transformers.trainer.Trainer._save_rng_state", 1),
    ("transformers.trainer_callback.TrainerState.save_to_json", 1),
]


def test_kill_during_training_and_saving(root, command):
    for function, call in TRAINING:
        assert run_and_kill(command("train"), [function], call) == -9
        assert not (root / "out/adapter").exists()
    # The Trainer writes its state in place, so a kill can leave half of the file.
    (root / "out/checkpoint-6/trainer_state.json").write_text('{"best_global_step": null, "log_his')
    assert_as_if_never_killed(root)


def test_kill_at_random_moments(root, command):
    moments = random.Random(0)
    killed = [run_and_kill(command("run"), seconds=moments.uniform(0.2, 2.5)) for _ in range(6)]
    assert set(killed) <= {0, -9}
    assert_as_if_never_killed(root)
