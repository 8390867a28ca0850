"""What each stage runs and publishes, which files and folders it replaces, and which keys its memory depends on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from agnostic_train.export.checkpoint import is_exported
from agnostic_train.neurons.language_neurons import is_neuron_file
from agnostic_train.pipeline.materials import Materials
from agnostic_train.pipeline.stages import compare, detect, evaluate, export, pilot, report, score, train
from agnostic_train.pipeline.stages.context import Context, StageResult
from agnostic_train.recipe import Recipe
from agnostic_train.report.page import is_comparison_file, is_emergence_file, is_run_figure
from agnostic_train.training.trainer import NeuronTrainingArguments

_Folders = dict[str, Callable[[Path], bool]]


def _is_named_as_ours(path: Path) -> bool:
    return True


@dataclass(frozen=True)
class Stage:
    """How a stage runs, and what it replaces in `output_dir`.

    Attributes:
        run: runs the stage; the first process's result is recorded.
        publish: hands the results in its files to experiment tracking and `tracking.results_dir`; None without any.
        section: the recipe's section with the stage's own keys; None without any.
        owns: which keys of the section are the stage's own.
        folders: the folders that it replaces as a whole, by recipe, each with a test for its own files.
        replaces: stages whose files, apart from those it reads, are deleted before it writes: which files they write
            depends on their options, and none of an earlier run may stay.
        optional: what it writes only with some options, as names in `output_dir`, each with a test for its own files;
            an interrupted run may have left it without a record.
        memory_keys: the keys that its memory depends on, apart from the weights.
        check_files: refuses a model or files with which the stage can't run, before any stage runs; loads no weights.
        check_text: refuses too little text, before any stage runs.
        check: refuses what the stage can't do with the results of earlier ones, before anything is replaced.
        resumes: whether it continues from the Trainer's checkpoints in `output_dir`.
    """

    run: Callable[[Context], StageResult]
    publish: Callable[[Context], None] | None
    section: str | None
    owns: Callable[[str], bool] = lambda key: True
    folders: Callable[[Recipe], _Folders] = lambda recipe: {}
    replaces: tuple[str, ...] = ()
    optional: _Folders = field(default_factory=dict)
    memory_keys: str | None = None
    check_files: Callable[[Materials], None] = lambda materials: None
    check_text: Callable[[Materials, NeuronTrainingArguments], None] = lambda materials, arguments: None
    check: Callable[[Context], None] = lambda context: None
    resumes: bool = False

    def settings(self, recipe: dict) -> dict:
        """The stage's own keys of a recipe and their values."""
        section = {} if self.section is None else recipe[self.section]
        return {key: value for key, value in section.items() if self.owns(key)}


_TRAINING_MEMORY = "training.per_device_train_batch_size (and raise training.gradient_accumulation_steps as much)"

STAGE_TABLE = {
    "detect": Stage(
        detect.detect,
        detect.publish,
        "detection",
        folders=lambda recipe: {"neurons": is_neuron_file},
        memory_keys="corpus.batch_size or detection.memory_gb",
        check=detect.check_model,
    ),
    "score": Stage(
        score.score,
        score.publish,
        "score",
        folders=lambda recipe: {score.EMERGENCE: is_emergence_file} if recipe.model.checkpoints else {},
        replaces=("score",),
        optional={"emergence.json": _is_named_as_ours, score.EMERGENCE: is_emergence_file},
        memory_keys="corpus.batch_size",
        check_files=score.check_files,
    ),
    "pilot": Stage(
        pilot.pilot,
        pilot.publish,
        "training",
        owns=pilot.is_own_key,
        optional={pilot.PILOT: _is_named_as_ours},
        memory_keys=_TRAINING_MEMORY,
        check=pilot.check_candidates,
    ),
    "train": Stage(
        train.train,
        train.publish,
        "training",
        owns=lambda key: not pilot.is_own_key(key),
        folders=lambda recipe: {train.ADAPTER: train.is_adapter_file},
        replaces=("train", "pilot"),
        optional={train.ADAPTER: train.is_adapter_file},
        memory_keys=_TRAINING_MEMORY,
        check_files=train.check_files,
        check_text=train.check_text,
        check=train.check_strategy,
        resumes=True,
    ),
    "export": Stage(
        export.export,
        None,
        "export",
        folders=lambda recipe: {export.EXPORTS[to]: is_exported for to in ("merged", recipe.export.to)},
        replaces=("export", "evaluate"),
        optional={folder: is_exported for to, folder in export.EXPORTS.items() if to != "merged"},
        check_files=export.check_files,
    ),
    "evaluate": Stage(
        evaluate.evaluate,
        evaluate.publish,
        "evaluation",
        optional={"evaluation.json": _is_named_as_ours},
        memory_keys="evaluation.batch_size",
        check_files=evaluate.check_files,
    ),
    "report": Stage(report.report, report.publish, None, folders=lambda recipe: {"figures": is_run_figure}),
    "compare": Stage(
        compare.compare,
        compare.publish,
        "comparison",
        folders=lambda recipe: {compare.COMPARISON: is_comparison_file},
        memory_keys="training.per_device_train_batch_size or evaluation.batch_size",
        check_files=compare.check_files,
        check_text=compare.check_text,
        check=compare.check_strategies,
    ),
}
