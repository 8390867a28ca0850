"""The stages of a run in their order: a stage whose inputs are unchanged isn't run again."""

import os
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState

from agnostic_train.emergence import Checkpoint, parse_checkpoints
from agnostic_train.export import is_exported
from agnostic_train.files import UserError, check_replaceable, fingerprint, hash_file, sole_user, whole_file
from agnostic_train.loading import model_identity
from agnostic_train.manifest import Manifest, package_versions
from agnostic_train.materials import Materials
from agnostic_train.neurons import is_neuron_file
from agnostic_train.pilot import split_pilot_text
from agnostic_train.recipe import Recipe
from agnostic_train.report import is_comparison_file, is_emergence_file, is_run_figure
from agnostic_train.settings import check_inputs, check_trials, needs_neurons, training_arguments
from agnostic_train.stages import STAGE_HELP, STAGES, TO_LOWER, OutOfMemory
from agnostic_train.stages.compare import COMPARISON, compare
from agnostic_train.stages.context import Context
from agnostic_train.stages.detect import detect
from agnostic_train.stages.evaluate import evaluate
from agnostic_train.stages.export import EXPORTS, export
from agnostic_train.stages.report import report
from agnostic_train.stages.score import EMERGENCE, checkpoint_identity, score
from agnostic_train.stages.train import ADAPTER, clear_checkpoints, is_adapter_file, train
from agnostic_train.tracking import Tracker, tracked
from agnostic_train.trials import learning_arguments, result_arguments
from agnostic_train.versions import installed_version

_FUNCTIONS = {
    "detect": detect, "score": score, "train": train, "export": export, "evaluate": evaluate, "report": report,
    "compare": compare,
}  # fmt: skip
_READ_BY = {
    "low": ["auto"], "high": ["auto"], "pilot_strategies": ["pilot"], "pilot_steps": ["pilot"],
    "random_like": ["random", "lora"],
}  # fmt: skip
"""Keys of `training` that only some strategies read."""
_REMOVED_FIRST = {
    "score": ["score"], "train": ["train"], "export": ["export", "evaluate"], "compare": ["compare"],
}  # fmt: skip


class Pipeline:
    """One recipe's run in its `output_dir`.

    Args:
        recipe: what to run.
        force: run the asked-for stages again even if their inputs are unchanged.
        say: where a stage's result goes, a line at a time.

    Raises:
        UserError: the folder can't be written, or the training arguments don't fit together.
        OutOfMemory: while running, the device's memory doesn't suffice.
    """

    def __init__(self, recipe: Recipe, force: bool = False, say: Callable[[str], None] = print):
        self.recipe = recipe
        self.force = force
        self.training_arguments = training_arguments(recipe)
        # Transformers sets the processes up when it is first asked for the device; the state is one for all.
        assert self.training_arguments.device is not None
        self.processes = PartialState()
        self.say = say if self.processes.is_main_process else lambda line: None
        self.materials = Materials(recipe, self.processes, self.say)
        self.directory = Path(recipe.output_dir)
        check_inputs(recipe, self.training_arguments, self.directory)
        self._make_directory()
        self.manifest = Manifest(self.directory)

    def run(self, stage: str) -> None:
        """Runs a stage, and first what it needs and isn't there for this recipe; `run` is every stage in order."""
        stages = list(STAGES) if stage == "run" else [*self._needs(stage), stage]
        if stage == "compare":
            check_trials(self.recipe, self.training_arguments, self.recipe.comparison.strategies, "compare")
        # What is missing or wrong shows before anything has run, and before the record of what is finished is touched.
        assert self.materials.tokenizer is not None
        for name in stages:
            self._inputs(name)
        with sole_user(self.directory) if self.processes.is_main_process else nullcontext():
            if stage == "compare":
                # Each of its trainings is a tracked run of its own, in one group.
                for name in stages:
                    self._run_stage(name, self.force and name == stage, Tracker(None))
                return
            with tracked(self.recipe, self.processes, run_id=self._tracking_id) as tracker:
                for name in stages:
                    self._run_stage(name, self.force and stage in ("run", name), tracker)

    def _depends(self, stage: str) -> list[str]:
        """The stages whose results a stage reads."""
        return {
            "detect": [],
            "score": ["detect"],
            "train": self._training_depends,
            "export": ["train"],
            "evaluate": ["export"],
            "report": ["score", "evaluate"],
            "compare": ["detect"],
        }[stage]

    @property
    def _training_depends(self) -> list[str]:
        if not needs_neurons(self.recipe):
            return []
        return ["detect", "score"] if self.recipe.training.strategy == "auto" else ["detect"]

    def _needs(self, stage: str) -> list[str]:
        """All that a stage rests on, in order."""
        needed = set(self._depends(stage))
        for name in reversed(STAGES):
            if name in needed:
                needed.update(self._depends(name))
        return [name for name in STAGES if name in needed]

    def _run_stage(self, stage: str, forced: bool, tracker: Tracker) -> None:
        key, state = self._key(stage), self._state(stage)
        if state == "finished" and not forced:
            self.say(f"{stage}: unchanged, kept (--force runs it again)")
            return
        self._check_folders(stage)
        self.processes.wait_for_everyone()
        self.say(f"{stage}: {STAGE_HELP[stage]}")
        context = Context(
            self.recipe, self.training_arguments, self.materials, self.manifest, self._inputs, self._state, self.say,
            tracker,
        )  # fmt: skip
        if self.processes.is_main_process:
            # What these write depends on their options: nothing of other ones may stay.
            for written in _REMOVED_FIRST.get(stage, []):
                self.manifest.remove_outputs(written)
            if stage == "train":
                clear_checkpoints(context, resume=state == "started" and not forced)
            self.manifest.start(stage, key, self._head())
        self.processes.wait_for_everyone()
        start = time.monotonic()
        try:
            result = _FUNCTIONS[stage](context)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(self._what_to_lower(stage, str(error))) from error
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            result["seconds"] = round(time.monotonic() - start, 1)
            outputs = [self.directory / name for name in result.pop("outputs")]
            self.manifest.finish(stage, outputs, result, self._head(result.get("frozen_weights")))
        self.processes.wait_for_everyone()

    def _check_folders(self, stage: str) -> None:
        """Refuses a stage that would delete what isn't ours, before its record is touched or hours are spent."""
        recorded = {self.directory / name for it in STAGES for name in self.manifest.outputs(it)}
        exports: dict[str, Callable[[Path], bool]] = {
            EXPORTS[to]: is_exported for to in ("merged", self.recipe.export.to)
        }
        written: dict[str, dict[str, Callable[[Path], bool]]] = {
            "detect": {"neurons": is_neuron_file},
            "score": {EMERGENCE: is_emergence_file} if self.recipe.model.checkpoints else {},
            "train": {ADAPTER: is_adapter_file},
            "export": exports,
            "report": {"figures": is_run_figure},
            "compare": {COMPARISON: is_comparison_file},
        }

        def check(folder: str, is_own: Callable[[Path], bool]) -> None:
            check_replaceable(self.directory / folder, lambda path: path in recorded or is_own(path))

        for folder, is_own in written.get(stage, {}).items():
            check(folder, is_own)

    def _what_to_lower(self, stage: str, problem: str) -> str:
        # Further sentences say which process holds how much, and how the allocator could be set.
        what = ". ".join(problem.split(". ")[:2]).rstrip(".")
        remedies = [f"lower {TO_LOWER[stage]}"] if stage in TO_LOWER else []
        if self.recipe.model.dtype == "float32":
            remedies.append("set model.dtype to bfloat16, which halves the weights")
        return f"{stage}: {what}; {', or '.join(remedies) or 'use a device with more memory'}"

    def _make_directory(self) -> None:
        probe = self.directory / f".writable.{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"output_dir: can't write to {self.directory} ({error.strerror})") from None

    def _key(self, stage: str) -> str:
        return self.manifest.key(self._inputs(stage), self._depends(stage))

    def _state(self, stage: str) -> str:
        """Of a stage for this very recipe, see `Manifest.state`."""
        return self.manifest.state(stage, self._key(stage))

    @cached_property
    def _model_identity(self) -> dict:
        return model_identity(self.recipe.model, self.materials.model_path)

    @cached_property
    def _common_inputs(self) -> dict:
        return {
            "model": self.recipe.to_dict()["model"] | {"checkpoints": []},
            "identity": self._model_identity,
            "version": installed_version("agnostic_train"),
        }

    def _text(self, *purposes: str) -> dict:
        """The sentences that serve some purposes, and what makes batches of them: other text may change unheeded."""
        corpus = self.recipe.corpus
        return {
            "sentences": {purpose: self._sentence_hashes[purpose] for purpose in purposes},
            **{key: getattr(corpus, key) for key in ("max_length", "add_bos", "batch_size")},
        }

    @cached_property
    def _sentence_hashes(self) -> dict[str, list]:
        texts = self.materials.corpus.texts.items()
        purposes = ("detection", "training", "validation", "test")
        return {it: [[language, fingerprint(getattr(text, it))] for language, text in texts] for it in purposes}

    def _inputs(self, stage: str) -> dict:
        """What a stage's result depends on, beside the stages before it."""
        own = {
            "detect": self._detection_inputs,
            "score": self._score_inputs,
            "train": self._training_inputs,
            "export": lambda: self.recipe.to_dict()["export"],
            "evaluate": self._evaluation_inputs,
            "report": self._report_inputs,
            "compare": self._comparison_inputs,
        }
        return {**self._common_inputs, stage: own[stage]()}

    def _detection_inputs(self) -> dict:
        section = self.recipe.detection
        return {
            # How much memory it may take changes only how long it takes.
            **{key: value for key, value in asdict(section).items() if key != "memory_gb"},
            # Earlier checkpoints are detected by these inputs and scored on validation text.
            "text": self._text("detection", "validation", *(["training"] if section.stability else [])),
        }

    def _score_inputs(self) -> dict:
        checkpoints = parse_checkpoints(self.recipe.model.checkpoints)
        identities = [[it.step, checkpoint_identity(self.recipe.model, it)] for it in checkpoints]
        return {
            **self.recipe.to_dict()["score"],
            "checkpoints": identities,
            "text": self._text("detection", "validation"),
        }

    def _training_inputs(self) -> dict:
        section = self.recipe.training
        if section.strategy == "pilot" and section.neurons is None:
            texts = self.materials.corpus.texts
            training = {language: texts[language].training for language in section.languages}
            split_pilot_text(self.recipe, self.training_arguments, training)  # says if there is too little
        unread = [key for key, strategies in _READ_BY.items() if section.strategy not in strategies]
        own = {key: value for key, value in asdict(section).items() if key not in unread}
        return {
            "training": own | {"neurons": None, "arguments": learning_arguments(section.arguments)},
            "neurons": hash_file(section.neurons) if section.neurons else None,
            # With the batch per device goes the batch.
            "processes": self.processes.num_processes,
            "text": self._text("training", "validation"),
        }

    def _evaluation_inputs(self) -> dict:
        suite, named = self.materials.task_suite, self.recipe.evaluation.checkpoints
        return {
            "evaluation": self.recipe.to_dict()["evaluation"],
            "text": self._text("validation"),
            "judged": fingerprint(self.materials.judged[0]),
            "tasks": suite and {name: suite.identity(name) for name in suite.names},
            "checkpoints": [checkpoint_identity(self.recipe.model, Checkpoint(it, None)) for it in named],
        }

    def _comparison_inputs(self) -> dict:
        recipe = self.recipe.to_dict()
        return {
            "comparison": recipe["comparison"],
            "training": {key: recipe["training"][key] for key in ("languages", "update", "random_like")},
            "arguments": result_arguments(recipe["training"]["arguments"]),
            "text": self._text("training", "validation"),
            "judged": fingerprint(self.materials.judged[0]),
            "processes": self.processes.num_processes,
        }

    def _report_inputs(self) -> dict:
        shown = {"corpus": self.recipe.to_dict()["corpus"] | {"path": None}, "files": self.materials.corpus.hashes}
        if not self.manifest.record("compare"):
            return shown
        return {
            **shown,
            "comparison": self.manifest.record("compare")["run"] if self._state("compare") == "finished" else None,
        }

    @cached_property
    def _tracking_id(self) -> str | None:
        """Of the tracked run, the same whenever a command goes on in this folder."""
        if not self.recipe.tracking.wandb or not self.processes.is_main_process:
            return None
        file = self.directory / ".tracking"
        if not file.exists():
            with whole_file(file) as temporary:
                temporary.write_text(uuid.uuid4().hex[:8])
        return file.read_text().strip()

    def _head(self, frozen_weights: dict | None = None) -> dict:
        """What stands in the manifest above the stages."""
        export = self.manifest.record("export")
        if frozen_weights is None and export.get("finished"):
            # A proof holds for the weights that it was made of, not for a later training's.
            frozen_weights = export["frozen_weights"] if export["key"] == self._key("export") else None
        return {
            "model": {
                **self._model_identity,
                "name": self.recipe.model.name,
                "revision": self.recipe.model.revision,
            },
            "corpus": self.materials.corpus.hashes,
            "recipe": self.recipe.to_dict(),
            "seeds": {"corpus": self.recipe.corpus.seed, "training": self.training_arguments.seed},
            "versions": package_versions(),
            "frozen_weights": frozen_weights or {"status": "unverified"},
        }
