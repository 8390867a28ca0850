"""What a change of the recipe or of the text makes a stage run again, and what it leaves alone."""

import shutil

import pytest
from small_run import RECIPE, root, run, template  # noqa: F401 (fixtures)

from agnostic_train.pipeline import Pipeline
from agnostic_train.recipe_file import load_recipe
from agnostic_train.stages import STAGES

ALL = {*STAGES, "compare"}
CHANGES = [
    # Each with the stages whose own inputs it changes; those after them follow.
    ({"training.logging_steps": "5"}, set()),
    ({"training.logging_first_step": "true", "training.log_level": "error"}, set()),
    ({"training.disable_tqdm": "false", "training.include_num_input_tokens_seen": "all"}, set()),
    ({"training.low": "0.1", "training.high": "2", "training.pilot_steps": "7"}, set()),
    ({"training.pilot_strategies": "shared,related"}, set()),
    ({"detection.memory_gb": "0.5"}, set()),
    ({"tracking.run_name": "x"}, set()),
    ({"training.random_like": "shared"}, {"compare"}),
    ({"training.learning_rate": "5e-2"}, {"train"}),
    ({"training.seed": "5"}, {"train"}),
    ({"training.save_steps": "2"}, {"train"}),
    ({"training.eval_strategy": "epoch"}, {"train"}),
    ({"training.warmup_steps": "2"}, {"train", "compare"}),
    ({"training.update": "mask"}, {"train", "compare"}),
    ({"detection.top_ratio": "0.3"}, {"detect"}),
    ({"detection.verify": "false"}, {"detect"}),
    ({"score.controls": "2"}, {"score"}),
    ({"export.dtype": "bfloat16"}, {"export"}),
    ({"evaluation.max_forgetting": "0.1"}, {"evaluate"}),
    ({"evaluation.batch_size": "3"}, {"evaluate"}),
    ({"evaluation.languages": "th"}, {"evaluate", "compare"}),
    ({"corpus.test_sentences": "5"}, {"evaluate", "compare", "report"}),
    ({"corpus.training_sentences": "50"}, {"train", "compare", "report"}),
    ({"corpus.validation_sentences": "5"}, ALL - {"export"}),
    ({"corpus.detection_sentences": "30"}, ALL - {"export", "evaluate"}),
    ({"corpus.seed": "1"}, ALL - {"export", "evaluate"}),
    ({"corpus.max_length": "8"}, ALL - {"export"}),
    ({"corpus.batch_size": "8"}, ALL - {"export"}),
    ({"model.dtype": "bfloat16"}, ALL),
    ({"model.revision": "main"}, ALL),
]


def inputs(root, flags=None, **lines):
    """Per stage, what its result depends on beside the stages before it, with lines added to files of the text."""
    for name, line in lines.items():
        with (root / f"text/{name.replace('_', '.')}.txt").open("a") as file:
            file.write(f"\n{line}")
    pipeline = Pipeline(load_recipe(root / "recipe.yaml", flags), say=lambda line: None)
    return {stage: pipeline.inputs.of(stage) for stage in ALL}


@pytest.fixture(scope="module")
def unchanged(template, tmp_path_factory):
    """A folder, which no test changes, and the inputs of its stages."""
    folder = tmp_path_factory.mktemp("unchanged") / "it"
    shutil.copytree(template, folder)
    shutil.copy(folder / "text/sw.valid.txt", folder / "text/th.valid.txt")
    (folder / "recipe.yaml").write_text(RECIPE.format(root=folder))
    return folder, inputs(folder)


@pytest.mark.parametrize("flags, stages", CHANGES, ids=[next(iter(flags)) for flags, _ in CHANGES])
def test_a_key_concerns_the_stages_whose_result_it_can_change(unchanged, flags, stages):
    folder, before = unchanged
    after = inputs(folder, flags)
    assert {stage for stage in ALL if after[stage] != before[stage]} == stages


def test_text_concerns_the_stages_that_read_it(root):
    before = inputs(root)
    after = inputs(root, en_test="A sentence to test on.", sw_test="Another one.")
    # Without a test file, valid was both.
    assert {stage for stage in ALL if after[stage] != before[stage]} == ALL - {"export"}
    later = inputs(root, en_test="One more.")
    assert {stage for stage in ALL if later[stage] != after[stage]} == {"evaluate", "compare", "report"}
    stable = {"detection.stability": "true"}
    both = [inputs(root, stable | {"corpus.training_sentences": count})["detect"] for count in ("50", "60")]
    assert both[0] != both[1]


def test_stages_are_kept(root, capsys):
    assert run(root, "export") == 0
    capsys.readouterr()
    flags = ["--training.logging_steps=1", "--detection.memory_gb=1", "--evaluation.max_forgetting=0.1"]
    assert run(root, "export", *flags, "--corpus.test_sentences=5") == 0
    assert capsys.readouterr().out.count("unchanged, kept") == 3
