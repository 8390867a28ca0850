"""What the lm-evaluation-harness found on one checkpoint, and checkpoints compared on the same items."""

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
    """A task, or a group's aggregate over its tasks, on one checkpoint.

    version: the task definition's. data: a file, or the hub's name; None for a group. num_fewshot: exemplars before
    each item; None for a group whose tasks differ. num_truncated: items of which the model's maximum length cut off
    the beginning. metrics: by the harness's `metric,filter`, each `value`, `standard_error` and `higher_is_better`,
    None where there is none. items: a fingerprint of each item. scores: for metrics that are a mean over items, each
    item's score in the order of `items`.
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
    """Every checkpoint's metrics beside each other, and each two checkpoints compared on the same items.

    Args:
        results: by checkpoint and task, from the same suite.

    Returns: plain JSON values. By task: what `TaskResult` says of it, `checkpoints` with each one's metrics, and
        `comparisons`, a row for each two checkpoints and each metric that is a mean over items, as `compare_scores`.

    Raises:
        ValueError: results of different tasks or items.
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
    """A group's aggregates. Its items are its tasks' where its metric is the mean over them all."""
    metrics = _metrics(found, name)
    scores = {}
    for metric, row in metrics.items():
        if all(metric in member.scores for member in members):
            pooled = [score for member in members for score in member.scores[metric]]
            # A group can also weigh its tasks alike, whatever their sizes.
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
    """The metrics among what the harness says of a task: its other keys hold no comma."""
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
    """A number that JSON can hold; the harness says 'N/A' for a standard error that it can't give."""
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0)
