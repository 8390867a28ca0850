"""Runs lm-evaluation-harness tasks on several checkpoints.

The harness is an optional dependency and slow to import: functions import it when they need it.
"""

import json
import logging
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, fields
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from agnostic_train.errors import UserError, in_one_line
from agnostic_train.evaluation.task_loading import (
    check_task,
    explain_unknown,
    load_task,
    no_remote_metrics,
    read_mgsm_from,
    set_up,
)
from agnostic_train.evaluation.task_results import TaskResult, compare_tasks, result_of_group, result_of_task
from agnostic_train.files import read_json, write_json
from agnostic_train.fingerprints import file_key, fingerprint, hash_file
from agnostic_train.model.inference import left_as_found
from agnostic_train.processes import process_index

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

_SEED = 1234
_NUM_RESAMPLES = 1000


def find_tasks(names: Sequence[str], task_paths: Sequence[str | Path]) -> "TaskManager":
    """Returns the harness's task manager after checking that it knows all names; loads no task.

    Arguments are as for `TaskSuite`.

    Raises:
        UserError: lm-eval isn't installed, or a task or folder doesn't exist.
    """
    if find_spec("lm_eval") is None:
        raise UserError("evaluation.tasks: needs lm-eval; pip install 'agnostic_train[eval]'")
    folders = [Path(it) for it in task_paths]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"evaluation.task_paths: no such folder {folder}")
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=folders)
        for name in names:
            if name not in manager.task_index:
                raise UserError(explain_unknown(name, manager, folders))
    return manager


class TaskSuite:
    """Tasks with their data, loaded once for all checkpoints, so that all are evaluated on the same items.

    Args:
        names: the harness's tasks, groups or tags, such as `mgsm_native_cot_sw` or `mmmlu_sw_ke`.
        task_paths: folders of task files (YAML). Their tasks take precedence over the harness's tasks of the same name.
            Task files can refer to Python functions in files next to them: using a folder means running its code.
        mgsm: a folder of MGSM test questions: files `{language}.tsv` with question TAB answer. The tasks
            `mgsm_{direct,native_cot,en_cot}_{language}` then read these instead of the hub's; prompts, stop strings
            and filters remain the harness's. The files have no exemplars, so these tasks run without any, whereas the
            MGSM paper (Shi et al. 2022) uses 8 per question.
        num_fewshot: number of exemplars before each item; by default, each task's own. A task that sets 0 keeps 0.
        limit: evaluate only the first `limit` items of each task.
        max_new_tokens: the maximum number of generated tokens; by default, each task's own, or 256.
        batch_size: number of items, or of an item's choices, per forward pass.

    Raises:
        UserError: lm-eval isn't installed, a task doesn't exist, can't run or is named twice, or its data can't be
            loaded.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        task_paths: Sequence[str | Path] = (),
        mgsm: str | Path | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
    ):
        self.names = list(dict.fromkeys(names))
        self.limit = limit
        self.batch_size = batch_size
        self.folders = [Path(it) for it in task_paths]
        manager = find_tasks(self.names, self.folders)
        self.harness_version = version("lm_eval")
        with _quiet():
            if mgsm is not None:
                read_mgsm_from(manager, Path(mgsm), self.folders)
            self._loaded = {}
            for name in self.names:
                with _seeded():  # tasks may shuffle their items
                    self._loaded[name] = load_task(manager, name)
            self._check_distinct()
            for task in self._tasks():
                check_task(task, num_fewshot)
                set_up(task, num_fewshot, max_new_tokens)

    def _check_distinct(self) -> None:
        """Refuses a task named alone and in a group: the group may change its settings, and results go by its name."""
        named_by: dict[str, str] = {}
        for name, loaded in self._loaded.items():
            for task_name in loaded["tasks"]:
                other = named_by.setdefault(task_name, name)
                if other != name:
                    raise UserError(f"evaluation.tasks: {task_name} is in both {other} and {name}; leave one out")

    def _tasks(self) -> "Iterator[Task]":
        for loaded in self._loaded.values():
            yield from loaded["tasks"].values()

    def identity(self, name: str) -> str:
        """Returns a fingerprint of everything that a task's result depends on, except the checkpoint.

        It includes all code in `task_paths`, because a function's source doesn't show what it calls.
        """
        tasks = {
            task_name: {
                "config": {key: value for key, value in task.dump_config().items() if key != "custom_dataset"},
                "items": list(islice(task.eval_docs, self.limit)),
                "exemplars": list(task.fewshot_docs() or []) if task.config.num_fewshot else [],
            }
            for task_name, task in self._loaded[name]["tasks"].items()
        }
        groups = {
            group_name: [
                str(group.aggregate_metric_list),
                group.metadata,
                [it.task_name for it in group.get_all_tasks()],
            ]
            for group_name, group in self._loaded[name]["groups"].items()
        }
        # The fields of `TaskResult` are included: a cached result must have exactly these.
        shape = [it.name for it in fields(TaskResult)]
        code = sorted(hash_file(file) for folder in self.folders for file in folder.rglob("*.py"))
        content = json.dumps(
            [self.harness_version, self.batch_size, shape, tasks, groups, code], sort_keys=True, default=_named
        )
        # The harness writes a function with bound arguments as text that holds its address.
        return fingerprint(re.sub(r" at 0x[0-9a-f]+", "", content))

    def run(
        self,
        name: str,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        progress: bool = False,
    ) -> dict[str, TaskResult]:
        """Runs one task, group or tag of the suite on a model. The work isn't distributed: each process runs all of it.

        Args:
            name: one of `names`.
            model: a causal language model on its device, wrapped in a `PeftModel` or not; left as found.
            tokenizer: left as found.
            progress: show the harness's progress bars.

        Returns: the results by task, and each group's aggregates under the group's name.

        Raises:
            UserError: the model's maximum length leaves no room for questions, or the task's own code fails.
        """
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        loaded = self._loaded[name]
        tasks: dict[str, Task] = loaded["tasks"]
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            stack.enter_context(left_as_found(model))
            if not progress:
                # The harness offers no other way to disable its progress bars.
                stack.enter_context(redirect_stderr(StringIO()))
                stack.enter_context(redirect_stdout(StringIO()))
            stack.enter_context(no_remote_metrics())
            # On a copy, because the harness adds a missing padding token to the tokenizer.
            harness_model = HFLM(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=self.batch_size)
            rooms = {task_name: _room(harness_model, task) for task_name, task in tasks.items()}
            for task in tasks.values():
                # Reset before each run, so that every checkpoint gets the same exemplars.
                task.set_fewshot_seed(_SEED)
            # For tasks that sample the generated text; `left_as_found` restores torch's random state.
            torch.manual_seed(_SEED)
            stack.enter_context(_seeded())
            try:
                output = evaluate(harness_model, loaded, limit=self.limit, bootstrap_iters=_NUM_RESAMPLES)
            except (UserError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except Exception as error:  # a task's own code can raise anything
                # The harness asserts without a message that an answer to be scored fits.
                too_long = f"; the model reads {harness_model.max_length} tokens" * isinstance(error, AssertionError)
                raise UserError(
                    f"evaluation.tasks: {name} failed ({in_one_line(error)}){too_long}; leave it out"
                ) from None
            num_truncated = {it: _num_truncated(harness_model, task, rooms[it]) for it, task in tasks.items()}
        results = {
            task_name: result_of_task(task_name, task, output, num_truncated[task_name])
            for task_name, task in tasks.items()
        }
        groups = {
            group_name: result_of_group(group_name, [results[it.task_name] for it in group.get_all_tasks()], output)
            for group_name, group in loaded["groups"].items()
        }
        return {**{it: result for it, result in groups.items() if result.metrics}, **results}


def tokenizer_of_tasks(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> PreTrainedTokenizerBase:
    """Returns a copy that begins texts as `corpus.add_bos` says: the harness leaves that to the tokenizer.

    Raises:
        UserError: the tokenizer begins them otherwise, whatever it is told.
    """
    own = deepcopy(tokenizer)
    if add_bos is not None:
        own.add_bos_token = add_bos
        if (own("a")["input_ids"][:1] == [own.bos_token_id]) != add_bos:
            raise UserError(
                "corpus.add_bos: evaluation.tasks can't follow it, because this tokenizer alone decides how texts "
                "begin there; leave one of the two keys out"
            )
    return own


def evaluate_tasks(
    models: Mapping[str, nn.Module | Callable[[], nn.Module]],
    tokenizer: PreTrainedTokenizerBase,
    suite: TaskSuite,
    *,
    directory: Path | None = None,
    identity: Callable[[str], object] | None = None,
    progress: bool = True,
) -> dict:
    """Runs a suite on several checkpoints, and compares every pair of them on the same items.

    Args:
        models: per checkpoint, a model or a function that loads it. Models are loaded one at a time, and only if some
            of their results aren't cached.
        tokenizer: the tokenizer of all models.
        directory: where to cache the result of each checkpoint and task, so that an interrupted call can be resumed; no
            caching by default.
        identity: required with `directory`. Maps a checkpoint's name to everything that its results depend on besides
            the tasks (weights, dtype, tokenizer), as plain JSON values.
        progress: show progress bars.

    Returns: `tasks`, the result of `compare_tasks`, with the harness's version and the limit.

    Raises:
        UserError: a model's maximum length leaves no room for questions.
    """
    results: dict[str, dict[str, TaskResult]] = {}
    task_identities = {name: suite.identity(name) for name in suite.names} if directory is not None else {}
    with tqdm(total=len(models) * len(suite.names), desc="tasks", disable=not progress, leave=False) as bar:
        for checkpoint, source in models.items():
            model = source if isinstance(source, nn.Module) else None
            results[checkpoint] = {}
            for name in suite.names:
                file = None
                if directory is not None:
                    assert identity is not None
                    file = directory / f"{file_key([identity(checkpoint), task_identities[name]])}.json"
                if file is not None and file.exists():
                    task_results = {it: TaskResult(**row) for it, row in read_json(file).items()}
                else:
                    model = source() if model is None else model
                    task_results = suite.run(name, model, tokenizer, progress)
                    if file is not None and process_index() == 0:
                        write_json(file, {it: asdict(result) for it, result in task_results.items()})
                results[checkpoint] |= task_results
                bar.update()
            del model
    return {"harness": f"lm-eval {suite.harness_version}", "limit": suite.limit, "tasks": compare_tasks(results)}


def _room(harness_model: "HFLM", task: "Task") -> int:
    """Returns how many tokens of an item fit into the model."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        # Longer texts are scored in several windows.
        return sys.maxsize
    if task.OUTPUT_TYPE != "generate_until":
        # The last token is only predicted, never fed to the model.
        return harness_model.max_length + 1
    from lm_eval.models.utils import normalize_gen_kwargs

    settings = normalize_gen_kwargs(task.get_config("generation_kwargs"), harness_model.max_gen_toks)
    room = harness_model.max_length - settings["max_gen_toks"]
    if room <= 0:
        raise UserError(
            f"evaluation.max_new_tokens: {task.task_name} may write {settings['max_gen_toks']} tokens, which leaves no "
            f"room for a question in the model's {harness_model.max_length}; lower it"
        )
    return room


def _num_truncated(harness_model: "HFLM", task: "Task", room: int) -> int:
    if room == sys.maxsize:
        return 0
    # The arguments of a generation request are context and settings, those of others are context and continuation.
    texts = ["".join(part for part in instance.args if isinstance(part, str)) for instance in task.instances]
    lengths = map(len, harness_model.tokenizer(texts)["input_ids"])
    return len({instance.doc_id for instance, length in zip(task.instances, lengths, strict=True) if length > room})


def _named(value: Any) -> str:
    return getattr(value, "__qualname__", None) or str(value)


@contextmanager
def _seeded() -> Iterator[None]:
    """Gives the code in the block the same random numbers each time, by Python's and NumPy's own generators."""
    states = random.getstate(), np.random.get_state()
    random.seed(_SEED)
    np.random.seed(_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Shows only errors from the harness, whose many warnings don't matter here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
