"""Loads lm-evaluation-harness tasks and their data, from local files where given, and refuses tasks that can't run.

The harness is an optional dependency and slow to import: functions import it when they need it.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict

from agnostic_train.corpus.local_files import read_text
from agnostic_train.errors import UserError, in_one_line

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

_MGSM_TASK = re.compile(r"mgsm_(?:direct|native_cot|en_cot)_([a-z]+)")


def load_task(manager: "TaskManager", name: str) -> dict:
    """Loads the harness's tasks and groups of a name, with their data.

    Tasks are third-party code: their templates, functions and data can raise any exception.

    Raises:
        UserError: the data or the task can't be loaded, or the task needs a metric from the hub.
    """
    try:
        with no_remote_metrics() as refused:
            loaded = manager.load([name])
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"evaluation.tasks: the data of {name} can't be loaded: {shorten(str(error), 300)}; fetch it once with a "
            f"network, or leave the task out"
        ) from None
    except Exception as error:
        raise UserError(f"evaluation.tasks: can't load {name}: {in_one_line(error)}") from None
    if refused:
        # The harness swallows this error, and would fail only after running the model.
        raise UserError(_remote_metric(refused[0]))
    return loaded


@contextmanager
def no_remote_metrics() -> Iterator[list[str]]:
    """Refuses metrics of the `evaluate` library, which downloads their code from the hub and runs it."""
    import evaluate

    load, refused = evaluate.load, []

    def refuse(path: str, *_: Any, **__: Any) -> None:
        refused.append(path)
        raise UserError(_remote_metric(path))

    evaluate.load = refuse
    try:
        yield refused
    finally:
        evaluate.load = load


def _remote_metric(name: str) -> str:
    return (
        f"evaluation.tasks: metric {name!r} would download and run code from the hub; leave out the task that uses it"
    )


def read_mgsm_from(manager: "TaskManager", folder: Path, task_paths: Sequence[Path]) -> None:
    """Replaces the data of the harness's own MGSM tasks by local files, in every task, tag or group that uses them."""
    for name, entry in manager.task_index.items():
        match = _MGSM_TASK.fullmatch(name)
        if match and not any(path.resolve() in entry.yaml_path.resolve().parents for path in task_paths):
            file = folder / f"{match[1]}.tsv"
            local = {"custom_dataset": partial(_mgsm_questions, file, name), "training_split": None}
            manager.task_index[name] = replace(entry, yaml_path=None, cfg={**entry.cfg, **local})


def _mgsm_questions(file: Path, task: str, **_options: Any) -> DatasetDict:
    """Returns the test questions in the format of the hub's data set: with a number, without a worked answer."""
    if not file.exists():
        raise UserError(f"evaluation.mgsm: no file {file}, which {task} needs")
    lines = read_text(file).replace("\r\n", "\n").removesuffix("\n").split("\n")
    rows: dict[str, list] = {"question": [], "answer": [], "answer_number": [], "equation_solution": []}
    for index, line in enumerate(lines):
        question, _, number = line.partition("\t")
        # A comma separates thousands, and no decimals.
        if not question.strip() or not re.fullmatch(r"-?(\d{1,18}|\d{1,3}(,\d{3}){1,5})", number):
            raise UserError(f"{file}, line {index + 1}: expected a question, a tab and a whole number")
        for key, value in zip(rows, (question, None, int(number.replace(",", "")), None), strict=True):
            rows[key].append(value)
    return DatasetDict(test=Dataset.from_dict(rows))


def explain_unknown(name: str, manager: "TaskManager", task_paths: Sequence[Path]) -> str:
    """Returns the error message for a task name that the harness doesn't know."""
    message = f"evaluation.tasks: lm-eval has no task {name!r}"
    nearest = get_close_matches(name, manager.all_tasks)
    if nearest:
        message += f"; did you mean {' or '.join(nearest)}?"
    # The harness silently skips files that it can't read.
    known = {entry.yaml_path.resolve() for entry in manager.task_index.values() if entry.yaml_path is not None}
    files = [file for folder in task_paths for file in sorted(folder.rglob("*.yaml")) if file.resolve() not in known]
    return message + (f" ({files[0]} defines no task that it can read)" if files else "")


def check_task(task: "Task", num_fewshot: int | None) -> None:
    """Raises `UserError` for a task that runs generated code, isn't text-only, or has no exemplars but test items."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"evaluation.tasks: {task.task_name} runs code that the model writes; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"evaluation.tasks: {task.task_name} needs more than text; leave it out")
    sampling = getattr(task, "fewshot_cfg", None)
    has_exemplars = (
        task.has_training_docs()
        or task.has_validation_docs()
        or (sampling is not None and (sampling.split is not None or sampling.samples is not None))
    )
    if not task.has_test_docs() and task.config.fewshot_split == task.config.validation_split:
        has_exemplars = False
    if _num_fewshot(task, num_fewshot) and not has_exemplars:
        # The harness would take exemplars from the items to be tested, possibly the item itself.
        raise UserError(f"evaluation.num_fewshot: {task.task_name} has no exemplars besides its test items; use 0")


def _num_fewshot(task: "Task", asked: int | None) -> int:
    own = task.get_config("num_fewshot")
    return own or 0 if asked is None or own == 0 else asked


def set_up(task: "Task", num_fewshot: int | None, max_new_tokens: int | None) -> None:
    task.set_config("num_fewshot", _num_fewshot(task, num_fewshot))
    if max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
        # Transformers' own limit, which counts the question, too.
        task.config.generation_kwargs.pop("max_length", None)
