"""What each stage runs, which files and folders it replaces, and the keys on which its memory rests."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agnostic_train.export.checkpoint import is_exported
from agnostic_train.neurons.language_neurons import is_neuron_file
from agnostic_train.pipeline.stages.compare import COMPARISON, check_strategies, compare
from agnostic_train.pipeline.stages.context import Context
from agnostic_train.pipeline.stages.detect import detect
from agnostic_train.pipeline.stages.evaluate import evaluate
from agnostic_train.pipeline.stages.export import EXPORTS, export
from agnostic_train.pipeline.stages.report import report
from agnostic_train.pipeline.stages.score import EMERGENCE, score
from agnostic_train.pipeline.stages.train import ADAPTER, check_choice, is_adapter_file, train
from agnostic_train.recipe import Recipe
from agnostic_train.report.page import is_comparison_file, is_emergence_file, is_run_figure

_Folders = dict[str, Callable[[Path], bool]]


@dataclass(frozen=True)
class Stage:
    """How a stage runs, and what of its `output_dir` it replaces.

    check: refuses what it can't do, before anything is replaced. run: does it. section: of the recipe, with the stage's own keys. folders: those that a recipe makes it replace as a
    whole, and how its own files are told in them. replaces: stages whose files go before it writes, for what these write
    depends on their options, and nothing of other ones may stay. memory_keys: on which its memory rests, beside the weights.
    """

    run: Callable[[Context], dict]
    section: str | None
    folders: Callable[[Recipe], _Folders] = lambda recipe: {}
    replaces: tuple[str, ...] = ()
    memory_keys: str | None = None
    check: Callable[[Context], None] = lambda context: None


STAGE_TABLE = {
    "detect": Stage(
        detect,
        "detection",
        folders=lambda recipe: {"neurons": is_neuron_file},
        memory_keys="corpus.batch_size or detection.memory_gb",
    ),
    "score": Stage(
        score,
        "score",
        folders=lambda recipe: {EMERGENCE: is_emergence_file} if recipe.model.checkpoints else {},
        replaces=("score",),
        memory_keys="corpus.batch_size",
    ),
    "train": Stage(
        train,
        "training",
        folders=lambda recipe: {ADAPTER: is_adapter_file},
        replaces=("train",),
        memory_keys="training.per_device_train_batch_size (and raise training.gradient_accumulation_steps as much)",
        check=check_choice,
    ),
    "export": Stage(
        export,
        "export",
        folders=lambda recipe: {EXPORTS[to]: is_exported for to in ("merged", recipe.export.to)},
        replaces=("export", "evaluate"),
    ),
    "evaluate": Stage(evaluate, "evaluation", memory_keys="evaluation.batch_size"),
    "report": Stage(report, None, folders=lambda recipe: {"figures": is_run_figure}),
    "compare": Stage(
        compare,
        "comparison",
        folders=lambda recipe: {COMPARISON: is_comparison_file},
        replaces=("compare",),
        memory_keys="training.per_device_train_batch_size or evaluation.batch_size",
        check=check_strategies,
    ),
}
