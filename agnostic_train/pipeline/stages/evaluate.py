"""`evaluate`: measures every language before and after training, on text that no choice depended on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from agnostic_train.evaluation.languages import compare_languages, describe
from agnostic_train.evaluation.objective import largest_forgetting, objective, target_change
from agnostic_train.evaluation.task_evaluation import evaluate_tasks
from agnostic_train.export.checkpoint import CARD, MANIFEST
from agnostic_train.export.model_card import model_card
from agnostic_train.files import read_json, whole_file, write_json
from agnostic_train.fingerprints import file_key, hash_file
from agnostic_train.model.batches import Batch
from agnostic_train.model.loading import at_checkpoint, load_model, model_identity
from agnostic_train.pipeline.manifest import package_versions
from agnostic_train.pipeline.materials import Materials
from agnostic_train.pipeline.measured import Measured, load_by_kind, measure, save_by_kind
from agnostic_train.pipeline.stages.context import Context, StageResult
from agnostic_train.pipeline.stages.export import EXPORTS
from agnostic_train.processes import of_first_process
from agnostic_train.recipe import ModelSection
from agnostic_train.report.tables import evaluation_table, task_comparison_table, task_table
from agnostic_train.scores.perplexity import NonFiniteLossError

_KEY = "evaluation.checkpoints"


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint to evaluate.

    Attributes:
        identity: distinguishes its weights, as loaded, from others with the same base; plain JSON values.
    """

    identity: dict
    load: Callable[[], PreTrainedModel]


def check_files(materials: Materials) -> None:
    """Raises `UserError` for checkpoints of another tokenizer, and if the tasks can't follow `corpus.add_bos`."""
    if materials.recipe.evaluation.tasks:
        _ = materials.task_tokenizer
    materials.check_vocabularies(_KEY, materials.recipe.evaluation.checkpoints)


def evaluate(context: Context) -> StageResult:
    """Measures the base, the exported enhanced checkpoint and the checkpoints of the recipe, on text and on tasks."""
    recipe = context.recipe
    # Validation text is measured too, because sweeps select by it.
    batches = {**context.materials.evaluation_batches(), "validation": context.materials.validation_batches}
    checkpoints = _checkpoints(context)
    measured = {name: _measure(context, name, checkpoint, batches) for name, checkpoint in checkpoints.items()}
    before, after = measured["before"], measured["after"]
    compared = {kind: compare_languages(before[kind], after[kind]) for kind in batches}
    evaluation: dict[str, Any] = {
        "languages": compared["test"],
        "parallel": compared.get("parallel"),
        "validation": compared["validation"],
    }
    evaluation["checkpoints"] = {
        source: {
            kind: {language: describe(it) for language, it in row.items()} for kind, row in measured[source].items()
        }
        for source in recipe.evaluation.checkpoints
    }
    evaluation["pairs"] = [
        {
            "first": first,
            "second": second,
            "texts": {kind: compare_languages(one[kind], other[kind]) for kind in batches},
        }
        for (first, one), (second, other) in combinations(measured.items(), 2)
        if (first, second) != ("before", "after")
    ]
    evaluation["tasks"] = _evaluate_tasks(context, checkpoints)
    evaluation["objectives"] = objectives(evaluation, recipe.training.languages, recipe.evaluation.max_forgetting)
    cards = {to: f"{EXPORTS[to]}/{CARD}" for to in dict.fromkeys(["merged", recipe.export.to])}
    if context.processes.is_main_process:
        write_json(context.directory / "evaluation.json", evaluation)
        for to, name in cards.items():
            card = model_card(recipe, context.manifest.record("train"), to, evaluation["languages"])
            with whole_file(context.directory / name) as temporary:
                temporary.write_text(card, encoding="utf-8")
    return StageResult(["evaluation.json", *cards.values()])


def publish(context: Context) -> None:
    evaluation = read_json(context.directory / "evaluation.json")
    context.tracker.log_summary(evaluation["objectives"])
    tasks = evaluation["tasks"]
    context.publish_tables(
        {
            "evaluation": evaluation_table(evaluation),
            "tasks": None if tasks is None else task_table(tasks),
            "task_comparisons": None if tasks is None else task_comparison_table(tasks),
        }
    )


def _checkpoints(context: Context) -> dict[str, _Checkpoint]:
    """The checkpoints to evaluate, by name."""
    section = context.recipe.model
    # Loaded as users will load it: `model.dtype` could round what `export.dtype` kept.
    own_dtype = replace(section, dtype="auto")
    enhanced = context.directory / EXPORTS["merged"]
    return {
        "before": _Checkpoint({}, context.materials.take_model),
        "after": _Checkpoint(_hashes(context, enhanced), partial(load_model, replace(own_dtype, name=str(enhanced)))),
        **{source: _named(section, source) for source in context.recipe.evaluation.checkpoints},
    }


def _named(section: ModelSection, source: str) -> _Checkpoint:
    own = at_checkpoint(section, source, _KEY)
    return _Checkpoint({"checkpoint": model_identity(own), "dtype": section.dtype}, partial(load_model, own, _KEY))


def _hashes(context: Context, enhanced: Path) -> dict[str, str]:
    """Hashes of a checkpoint's files except card and manifest, which may differ for the same weights."""
    hashes = dict[str, str]()
    if context.processes.is_main_process:
        files = [it for it in sorted(enhanced.rglob("*")) if it.is_file() and it.name not in (CARD, MANIFEST)]
        hashes = {str(file.relative_to(enhanced)): hash_file(file) for file in files}
    return of_first_process(hashes)


def _key(context: Context, checkpoint: _Checkpoint) -> list:
    """What a checkpoint's results depend on apart from the text: weights, base, tokenization and package versions."""
    inputs = context.inputs.of("evaluate")
    return [checkpoint.identity, inputs["model"], inputs["corpus"], package_versions()]


def _measure(
    context: Context, name: str, checkpoint: _Checkpoint, batches: Mapping[str, Mapping[str, Sequence[Batch]]]
) -> Measured:
    """Measures a checkpoint's perplexities, or reads them if the same weights and text were measured before.

    In the latter case the checkpoint isn't loaded.
    """
    sizes = [context.recipe.evaluation.batch_size, context.recipe.corpus.batch_size]
    key = [*_key(context, checkpoint), context.inputs.of("evaluate")["text"], sizes]
    file = context.work / f"{file_key(key)}.safetensors"
    if file.exists():
        context.say(f"evaluate: {name}: kept from an earlier measurement")
        context.materials.forget_model()  # the next model may not fit in memory beside it
        return load_by_kind(file)
    model = checkpoint.load()
    try:
        measured = measure(model, batches, label=name if context.processes.is_local_main_process else None)
    except NonFiniteLossError as error:
        if name == "before":
            raise
        where = "enhanced" if name == "after" else f"{_KEY}: {name}"
        raise NonFiniteLossError(f"{where}: {str(error).removeprefix('model.name: ')}") from None
    if context.processes.is_main_process:
        save_by_kind(measured, file)
    context.processes.wait_for_everyone()
    return measured


def _evaluate_tasks(context: Context, checkpoints: Mapping[str, _Checkpoint]) -> dict | None:
    """Evaluates the checkpoints on the harness's tasks; returns None if the recipe names no tasks."""
    suite = context.materials.task_suite
    if suite is None:
        return None
    result = evaluate_tasks(
        {name: checkpoint.load for name, checkpoint in checkpoints.items()},
        context.materials.task_tokenizer,
        suite,
        directory=context.work,
        identity=lambda name: _key(context, checkpoints[name]),
        progress=context.processes.is_local_main_process,
    )
    for name, task in result["tasks"].items():
        for metric in next(iter(task["checkpoints"].values()))["metrics"]:
            values = "  ".join(
                f"{checkpoint} {_describe_metric(row['metrics'][metric])}"
                for checkpoint, row in task["checkpoints"].items()
            )
            context.say(f"evaluate: {name} ({task['num_items']} items), {metric}: {values}")
    return result


def _describe_metric(metric: dict) -> str:
    value, error = metric["value"], metric["standard_error"]
    return "none" if value is None else f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def objectives(evaluation: dict, enhanced: list[str], max_forgetting: float) -> dict[str, float]:
    """The numbers that sweeps and dashboards rely on, by fixed names, from the content of `evaluation.json`.

    On test text, which selects nothing: `test/bits_per_byte/{before,after}/LANGUAGE`, and the relative change
    `test/change/LANGUAGE`. On validation text, by which sweeps select:
    `target_bits_per_byte`: the enhanced languages' mean after training. `target_change`: their mean relative change.
    `largest_forgetting`: the largest relative rise among the other languages, 0 if none rose.
    `objective`, to be minimised, weighs `target_bits_per_byte` against `largest_forgetting`; see
    `evaluation.objective`.
    """
    values = {}
    for language, row in evaluation["languages"].items():
        values[f"test/change/{language}"] = row["bits_per_byte_change"]
        for moment in ("before", "after"):
            values[f"test/bits_per_byte/{moment}/{language}"] = row[moment]["bits_per_byte"]
    validation = evaluation["validation"]
    after = [validation[it]["after"]["bits_per_byte"] for it in enhanced]
    changes = {language: row["bits_per_byte_change"] for language, row in validation.items()}
    largest = largest_forgetting(changes, enhanced)
    target = sum(after) / len(after)
    return {
        **values,
        "target_bits_per_byte": target,
        "target_change": target_change(changes, enhanced),
        "largest_forgetting": largest,
        "objective": objective(target, largest, max_forgetting),
    }
