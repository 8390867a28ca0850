"""Results of lm-evaluation-harness tasks on one checkpoint, and comparisons of checkpoints on the same items."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

from agnostic_train.evaluation.paired_comparison import compare_scores

if TYPE_CHECKING:
    from lm_eval.api.task import Task


@dataclass(frozen=True)
class TaskResult:
    """The result of a task, or of a group as an aggregate over its tasks, on one checkpoint.

    Attributes:
        version: the version of the task definition.
        data: the data's file or hub name; None for a group.
        num_fewshot: number of exemplars before each item; None for a group whose tasks differ.
        num_items: number of items.
        num_truncated: number of items whose beginning was cut off at the model's maximum length.
        metrics: by the harness's `metric,filter`: `value`, `standard_error`, `higher_is_better`, each None if unknown.
        items: a fingerprint of each item.
        scores: for metrics that are a mean over items, each item's score, in the order of `items`.
    """

    version: str | float | None
    data: str | None
    num_fewshot: int | None
    num_items: int
    num_truncated: int
    metrics: dict[str, dict[str, Any]]
    items: list[str]
    scores: dict[str, list[float]]


def compare_tasks(results: Mapping[str, Mapping[str, TaskResult]]) -> dict:
    """Collects every checkpoint's metrics, and compares every pair of checkpoints on the same items.

    Args:
        results: by checkpoint and task, from the same suite.

    Returns: plain JSON values. By task: its fields of `TaskResult`, `checkpoints` with the metrics of each, and
        `comparisons`, with the result of `compare_scores` for every pair and every metric that is a mean over items.

    Raises:
        ValueError: the results are of different tasks or items.
    """
    tables = list(results.values())
    tasks = {}
    for name in tables[0] if tables else ():
        rows = {checkpoint: table[name] for checkpoint, table in results.items() if name in table}
        first = next(iter(rows.values()))
        if len(rows) < len(tables) or any(row.items != first.items for row in rows.values()):
            raise ValueError(f"{name}: the checkpoints' results aren't of the same items")
        tasks[name] = {
            "version": first.version,
            "data": first.data,
            "num_fewshot": first.num_fewshot,
            "num_items": first.num_items,
            "checkpoints": {
                checkpoint: {"metrics": row.metrics, "num_truncated": row.num_truncated}
                for checkpoint, row in rows.items()
            },
            "comparisons": [
                {"first": one, "second": other, "metric": metric}
                | compare_scores(scores, rows[other].scores[metric], _is_better_higher(rows[one], metric))
                for one, other in combinations(rows, 2)
                for metric, scores in rows[one].scores.items()
                if metric in rows[other].scores
            ],
        }
    return tasks


def _is_better_higher(result: TaskResult, metric: str) -> bool:
    return result.metrics[metric]["higher_is_better"] is not False


def result_of_task(name: str, task: "Task", found: Mapping, num_truncated: int) -> TaskResult:
    """Extracts one task's result from `found`, the output of the harness's `evaluate`."""
    from lm_eval.api.metrics import mean

    samples = found["samples"][name]
    by_filter: dict[str, list] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    items = [sample["doc_hash"] for sample in next(iter(by_filter.values()))]
    metrics = _metrics(found, name)
    scores = {}
    for metric in metrics:
        measure, _, filter_name = metric.partition(",")
        values = [sample.get(measure) for sample in by_filter[filter_name]]
        numbers = [it for it in map(_finite, values) if it is not None]
        if task.aggregation().get(measure) is mean and len(numbers) == len(values):
            scores[metric] = numbers
    data = task.get_config("dataset_path")
    local = task.get_config("custom_dataset")
    if isinstance(local, partial):
        data = str(local.args[0])
    elif data is not None and task.get_config("dataset_name") is not None:
        data = f"{data}, {task.get_config('dataset_name')}"
    return TaskResult(
        version=found["versions"].get(name),
        data=data,
        num_fewshot=found["n-shot"].get(name),
        num_items=len(items),
        num_truncated=num_truncated,
        metrics=metrics,
        items=items,
        scores=scores,
    )


def result_of_group(name: str, members: Sequence[TaskResult], found: Mapping) -> TaskResult:
    """Extracts a group's aggregates from `found`; metrics that are the mean over all items also get per-item scores."""
    metrics = _metrics(found, name)
    scores = {}
    for metric, row in metrics.items():
        if all(metric in member.scores for member in members):
            pooled = [score for member in members for score in member.scores[metric]]
            # A group may instead average over its tasks with equal weights, whatever their sizes.
            if row["value"] is not None and math.isclose(sum(pooled) / len(pooled), row["value"], abs_tol=1e-9):
                scores[metric] = pooled
    return TaskResult(
        version=found["versions"].get(name),
        data=None,
        num_fewshot=found["n-shot"].get(name),
        num_items=sum(member.num_items for member in members),
        num_truncated=sum(member.num_truncated for member in members),
        metrics=metrics,
        items=[item for member in members for item in member.items],
        scores=scores,
    )


def _metrics(found: Mapping, name: str) -> dict[str, dict]:
    """Returns a task's metrics in the harness's output, whose keys are those with a comma."""
    row = found["results"][name]
    metrics = {}
    for key in row:
        measure, comma, filter_name = key.partition(",")
        if comma and not measure.endswith("_stderr"):
            metrics[key] = {
                "value": _finite(row[key]),
                "standard_error": _finite(row.get(f"{measure}_stderr,{filter_name}")),
                "higher_is_better": found["higher_is_better"].get(name, {}).get(measure),
            }
    return metrics


def _finite(value: Any) -> float | None:
    """Returns a finite float, or None for anything else: the harness gives 'N/A' for an unavailable standard error."""
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0)
