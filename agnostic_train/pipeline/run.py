"""Runs a recipe's stages in order, skipping those whose inputs are unchanged."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache

from agnostic_train.errors import UserError
from agnostic_train.files import check_replaceable, remove_own, sole_user
from agnostic_train.fingerprints import fingerprint
from agnostic_train.pipeline import STAGES, OutOfMemoryError
from agnostic_train.pipeline.checks import check_recipe, check_stage
from agnostic_train.pipeline.manifest import Manifest, changed_in_words, package_versions
from agnostic_train.pipeline.materials import Materials
from agnostic_train.pipeline.resuming import check_checkpoints, clear_checkpoints
from agnostic_train.pipeline.settings import launch_settings, training_arguments
from agnostic_train.pipeline.stage_inputs import StageInputs
from agnostic_train.pipeline.stage_table import STAGE_TABLE
from agnostic_train.pipeline.stages.context import Context, StageResult
from agnostic_train.pipeline.tracking import Tracker, run_id_of, tracked
from agnostic_train.processes import of_first_process
from agnostic_train.recipe import Recipe
from agnostic_train.training.checkpoints import saved_checkpoints
from agnostic_train.training.trainer import NeuronTrainingArguments


class Pipeline:
    """One recipe's run in its `output_dir`.

    Args:
        recipe: what to run.
        force: run the asked-for stages again even if their inputs are unchanged.
        say: receives the output of the stages, one line at a time.

    Raises:
        UserError: a folder can't be written to, or the recipe's keys don't fit together.
        OutOfMemoryError: a stage needs more memory than the device has (raised by `run`).
    """

    def __init__(self, recipe: Recipe, force: bool = False, say: Callable[[str], None] = print):
        self.recipe = recipe
        self.force = force
        self.training_arguments = training_arguments(recipe)
        # Transformers initialises the processes when the device is first accessed; their state is a singleton.
        _ = self.training_arguments.device
        self.processes = PartialState()
        self._launch = launch_settings(self.training_arguments)
        self.say = say if self.processes.is_main_process else lambda line: None
        if self.processes.num_processes > 1:
            self.say(f"processes: {self.processes.num_processes}")
        self.materials = Materials(recipe, self.processes, self.say)
        self.directory = Path(recipe.output_dir)
        check_recipe(recipe, self.training_arguments)
        _make_writable("output_dir", self.directory)
        if recipe.tracking.results_dir is not None:
            self._check_results_folder(Path(recipe.tracking.results_dir))
            _make_writable("tracking.results_dir", Path(recipe.tracking.results_dir))
        self.manifest = Manifest(self.directory)
        self.inputs = StageInputs(recipe, self.training_arguments, self.materials, self.manifest)
        self._removed: set[str] = set()

    def run(self, command: str) -> None:
        """Runs a command's stage, after the stages it needs that aren't up to date; `run` is every stage in order."""
        last = "report" if command == "run" else command
        stages = [*self.inputs.needs(last), last]
        asked = {"run": stages, "train": ["pilot", "train"]}.get(command, [command])
        check_stage(self.recipe, self.training_arguments, command)
        # Missing or invalid inputs should show before anything runs, and before the record of finished stages changes.
        _ = self.materials.tokenizer
        if self.recipe.training.packing:
            self.materials.encoder.check_packing()
        forced = {name: self.force and name in asked for name in stages}
        any_runs = False
        for name in stages:
            self.inputs.of(name)
            runs = forced[name] or self.inputs.state(name) != "finished"
            any_runs |= runs
            if any_runs:  # a stage after one that runs may have to run again
                STAGE_TABLE[name].check_files(self.materials)
                STAGE_TABLE[name].check_text(self.materials, self.training_arguments)
            if runs:
                self._check_folders(name, forced[name])
        if any_runs:
            # May read text, which takes all processes if it is streamed; later only the main process asks.
            _ = self.inputs.has_comparison
        with (
            self._sole_user(),
            # Each training of a comparison is tracked as a separate run, in one group.
            nullcontext(Tracker(None)) if command == "compare" else self._tracked() as tracker,
        ):
            ran = [name for name in stages if self._run_stage(name, forced[name], tracker)]
        of_recipe = [*self.inputs.needs("report"), "report", "compare"]
        self._tell_of_older_results([name for name in of_recipe if name not in stages], ran)

    @contextmanager
    def _sole_user(self) -> Iterator[None]:
        """Locks `output_dir` in the first process; if that fails, all raise the same error."""
        with ExitStack() as stack:
            problem = None
            if self.processes.is_main_process:
                try:
                    stack.enter_context(sole_user(self.directory))
                except UserError as error:
                    problem = str(error)
            problem = of_first_process(problem)
            if problem is not None:
                raise UserError(problem)
            yield

    def _tell_of_older_results(self, stages: Sequence[str], ran: Sequence[str]) -> None:
        """Reports which other stages depend on those that ran again: their old results are kept, or were removed."""
        older = [
            name
            for name in stages
            if self.manifest.record(name).get("finished")
            and {*self.inputs.needs(name)} & {*ran}
            and self.inputs.is_outdated(name)
            # A command before this one may have removed its files.
            and (name in self._removed or all((self.directory / it).exists() for it in self.manifest.outputs(name)))
        ]
        removed = [name for name in older if name in self._removed]
        kept = [name for name in older if name not in removed]
        if removed:
            self.say(f"{', '.join(removed)}: removed, because it came from an earlier result; `run` makes it again")
        if kept:
            # `run` executes every stage except `compare`.
            commands = dict.fromkeys("`compare`" if name == "compare" else "`run`" for name in kept)
            self.say(
                f"{', '.join(kept)}: the existing result comes from an earlier run; to renew: {' and '.join(commands)}"
            )

    def _run_stage(self, stage: str, forced: bool, tracker: Tracker) -> bool:
        """Runs a stage unless its result is up to date; returns whether it ran."""
        inputs = self.inputs.whole(stage)
        state = self.manifest.state(stage, inputs)
        context = Context(stage, self.training_arguments, self.materials, self.manifest, self.inputs, tracker)
        if state == "finished" and not forced:
            self.say(f"{stage}: unchanged, kept (--force runs it again)")
            self._publish(context)
            return False
        self._check_folders(stage, forced)
        self.processes.wait_for_everyone()
        with self._enough_memory(stage):
            STAGE_TABLE[stage].check(context)
        if self.processes.is_main_process:
            self._begin(context, inputs, forced, resume=state == "started" and not forced)
        self.processes.wait_for_everyone()
        start = time.monotonic()
        with self._enough_memory(stage):
            result = STAGE_TABLE[stage].run(context)
        # Under mixed precision, accelerate puts a trained model into a reference cycle, which would keep it in memory
        # during the next stage.
        clear_device_cache(garbage_collection=True)
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            self._finish(context, result, time.monotonic() - start)
            self._publish(context)
        self.processes.wait_for_everyone()
        return True

    def _begin(self, context: Context, inputs: dict, forced: bool, resume: bool) -> None:
        """Says what a stage does, removes what it replaces, and records that it has begun; for one process only."""
        stage = context.stage
        self.say(f"{stage}: {STAGES[stage]}{self._what_is_replaced(stage, inputs, resume)}")
        # A training removes the files of an earlier pilot, but not of the one that it reads.
        read = {name for it in self.inputs.needs(stage) for name in self.manifest.outputs(it)}
        for written in STAGE_TABLE[stage].replaces:
            if self.manifest.remove_outputs(written, spared=read):
                self._removed.add(written)
            if not self.manifest.record(written).get("finished", True):
                for name, is_own in STAGE_TABLE[written].optional.items():
                    remove_own(self.directory / name, is_own)
        if forced:
            shutil.rmtree(context.work, ignore_errors=True)
        if STAGE_TABLE[stage].resumes:
            clear_checkpoints(self.directory, resume)
        self.manifest.start(stage, inputs, self._launch, self._head(stage))

    def _finish(self, context: Context, result: StageResult, seconds: float) -> None:
        """Records that a stage has finished, and removes its folder for partial results; for one process only."""
        stage = context.stage
        record = {
            **result.record(),
            "seconds": round(seconds, 1),
            "settings": STAGE_TABLE[stage].settings(self.recipe.to_dict()),
            "corpus": self.materials.hashes,
        }
        outputs = [self.directory / name for name in result.outputs]
        self.manifest.finish(stage, outputs, record, self._head(stage, result.frozen_weights))
        for folder in (context.work, context.work.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _what_is_replaced(self, stage: str, inputs: dict, resume: bool) -> str:
        """Says whether a stage replaces an earlier result and because of which keys; else an empty string."""
        if self.manifest.record(stage).get("finished"):
            replaced = "; this replaces an earlier result"
        elif STAGE_TABLE[stage].resumes and not resume and saved_checkpoints(self.directory):
            replaced = "; this deletes the checkpoints of an unfinished training with other keys, text or neurons"
        else:
            return ""
        changed = self.manifest.changed(stage, inputs)
        return f"{replaced} (changed: {changed_in_words(changed)})" if changed else replaced

    def _publish(self, context: Context) -> None:
        """Publishes a stage's result, even if it ran earlier: tracking may have been enabled since."""
        publish, tracking = STAGE_TABLE[context.stage].publish, self.recipe.tracking
        if (
            publish is not None
            and self.processes.is_main_process
            and (tracking.wandb or tracking.results_dir is not None)
        ):
            publish(context)

    def _check_folders(self, stage: str, forced: bool) -> None:
        """Refuses a stage that would delete a user's files, before its record changes or hours are spent."""
        if STAGE_TABLE[stage].resumes:
            same = self.manifest.record(stage).get("key") == fingerprint(self.inputs.whole(stage)) and not forced
            check_checkpoints(self.directory, self.manifest, same, self._launch)
        recorded = {self.directory / name for it in STAGES for name in self.manifest.outputs(it)}

        def check(folder: str, is_own: Callable[[Path], bool]) -> None:
            check_replaceable(self.directory / folder, lambda path: path in recorded or is_own(path))

        for folder, is_own in STAGE_TABLE[stage].folders(self.recipe).items():
            check(folder, is_own)

    def _check_results_folder(self, results: Path) -> None:
        """Refuses to publish into `output_dir` itself or a folder that a stage replaces, where copies would be lost."""
        if results.resolve() == self.directory.resolve():
            raise UserError("tracking.results_dir: is output_dir, which has the results already; name another folder")
        for stage, row in STAGE_TABLE.items():
            for folder in row.folders(self.recipe):
                replaced = (self.directory / folder).resolve()
                if replaced in (results.resolve(), *results.resolve().parents):
                    raise UserError(f"tracking.results_dir: {stage} replaces {replaced}; name another folder")

    @contextmanager
    def _enough_memory(self, stage: str) -> Iterator[None]:
        """Turns an out-of-memory error into one that names the keys to lower."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            # Later sentences list the memory of each process and allocator settings.
            shortage = ". ".join(str(error).split(". ")[:2]).rstrip(".")
            keys = STAGE_TABLE[stage].memory_keys
            remedies = [f"lower {keys}"] if keys else []
            if self.recipe.model.dtype == "float32":
                remedies.append("set model.dtype to bfloat16, which halves the weights")
            remedy = ", or ".join(remedies) or "use a device with more memory"
            raise OutOfMemoryError(f"{stage}: {shortage}; {remedy}") from error

    def _tracked(self) -> AbstractContextManager[Tracker]:
        """The tracked run, the same for every command in this folder."""
        tracks = self.recipe.tracking.wandb and self.processes.is_main_process
        return tracked(self.recipe, self.processes, run_id=run_id_of(self.directory) if tracks else None)

    def _head(self, stage: str, frozen_weights: Mapping[str, object] | None = None) -> dict:
        """The manifest's top-level fields: this recipe's for the running stage, for others those of their last run."""
        recipe, hashes = self.recipe.to_dict(), dict[str, str]()
        absent = {"pilot": not self.recipe.training.has_pilot, "compare": not self.inputs.has_comparison}
        for name, row in STAGE_TABLE.items():
            record = self.manifest.record(name)
            if name != stage and row.section is not None and record.get("finished") and not absent.get(name):
                recipe[row.section] |= record.get("settings", {})
                hashes |= record.get("corpus", {})
        export = self.manifest.record("export")
        if frozen_weights is None and export.get("finished"):
            # The check holds for the weights that it compared, not for those of a later training.
            same = export["key"] == fingerprint(self.inputs.whole("export"))
            frozen_weights = export.get("frozen_weights") if same else None
        return {
            "model": {
                **self.inputs.model_identity,
                "name": self.recipe.model.name,
                "revision": self.recipe.model.revision,
            },
            "corpus": hashes | self.materials.hashes,
            "recipe": recipe,
            "seeds": {
                "corpus": self.recipe.corpus.seed,
                "training": recipe["training"]["arguments"].get("seed", NeuronTrainingArguments.seed),
            },
            "versions": package_versions(),
            "frozen_weights": frozen_weights or {"status": "unverified"},
        }


def _make_writable(key: str, directory: Path) -> None:
    """Creates the folder that a key names; raises `UserError` if nothing can be written there."""
    probe = directory / f".writable.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # a process on another machine may have the same id
    except OSError as error:
        raise UserError(f"{key}: can't write to {directory} ({error.strerror})") from None
