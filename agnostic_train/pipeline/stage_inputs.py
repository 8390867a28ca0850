"""What each stage's result depends on: the keys, text and files that make it run again when they change."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path

from agnostic_train.evaluation.tuning import default_rates
from agnostic_train.fingerprints import fingerprint, hash_file
from agnostic_train.model.loading import at_checkpoint, model_identity
from agnostic_train.neurons.language_neurons import set_hashes
from agnostic_train.pipeline import STAGES
from agnostic_train.pipeline.manifest import Manifest, State
from agnostic_train.pipeline.materials import Materials
from agnostic_train.pipeline.settings import evaluates_during_training, launch_settings
from agnostic_train.pipeline.trials import SET_BY_TRIALS
from agnostic_train.recipe import Recipe
from agnostic_train.scores.emergence import parse_checkpoints
from agnostic_train.training.trainer import NeuronTrainingArguments
from agnostic_train.versions import installed_version

_READ_BY = {
    "low": ["auto"], "high": ["auto"], "pilot_strategies": [], "pilot_steps": ["pilot"],
    "random_like": ["random", "lora"],
}  # fmt: skip
"""Keys of `training` that the training itself reads only with some strategies (of a pilot's candidates, the winner)."""

_READ_BY_TASKS = ("tasks", "task_paths", "mgsm", "num_fewshot", "limit", "max_new_tokens")
"""Keys of `evaluation` without an effect if there are no tasks."""

_WITHOUT_EFFECT = (
    # logging and storage
    "logging_", "log_", "disable_tqdm", "include_num_input_tokens_seen", "hub_", "save_total_limit",
    "save_on_each_node",
    # time and memory
    "gradient_checkpointing", "activation_checkpointing", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "eval_accumulation_steps", "torch_empty_cache_steps", "skip_memory_metrics", "ddp_",
)  # fmt: skip
_WITHOUT_EFFECT_ON_THE_END = ("save_", "eval_", "per_device_eval_batch_size")
"""Prefixes of keys without an effect on the last step, for trainings that don't choose their best checkpoint."""
_WHEN_TO_SAVE = ("save_steps", "save_strategy")
"""Keys with an effect only if the best checkpoint is chosen at the end."""
_DEFAULTS = {it.name: it.default for it in fields(NeuronTrainingArguments)}
_FILES = ("deepspeed", "fsdp_config", "accelerator_config")
"""Keys that may name a file."""
_FROM_ELSEWHERE = ("bf16", "fp16", "use_cpu")
"""Keys whose default depends on the launcher or the machine."""


class StageInputs:
    """The inputs of one recipe's stages, and how far each stage has come according to the manifest.

    Args:
        arguments: the training arguments.
    """

    def __init__(self, recipe: Recipe, arguments: NeuronTrainingArguments, materials: Materials, manifest: Manifest):
        self._recipe = recipe
        self._arguments = arguments
        self._materials = materials
        self._manifest = manifest
        self._read: dict[str, dict] = {}

    def reads(self, stage: str) -> list[str]:
        """The stages whose results a stage reads."""
        return {
            "detect": [],
            "score": ["detect"],
            "pilot": ["detect"],
            "train": self._training_reads,
            "export": ["train"],
            "evaluate": ["export"],
            "report": ["detect", "score", *(["pilot"] if self._recipe.training.has_pilot else []), "evaluate"],
            "compare": ["detect"],
        }[stage]

    @property
    def _training_reads(self) -> list[str]:
        if not self._recipe.training.needs_detection:
            return []
        return ["detect", *{"auto": ["score"], "pilot": ["pilot"]}.get(self._recipe.training.strategy, [])]

    def needs(self, stage: str) -> list[str]:
        """Every stage that must have run before a stage, in order."""
        needed = set(self.reads(stage))
        for name in reversed(STAGES):
            if name in needed:
                needed.update(self.reads(name))
        return [name for name in STAGES if name in needed]

    def whole(self, stage: str) -> dict:
        """All that a stage's result depends on: `of(stage)` and the results of the stages it reads.

        A result is identified by the run that made it; a detection by its sets, because detecting again, with another
        memory limit or with `stability`, often gives the same sets; a score and a pilot by what they leave to the
        training: what `auto` looks at, the winner's neurons and the text. The report shows more of all three.
        """
        return self.of(stage) | self._results(stage)

    def _results(self, stage: str) -> dict[str, object]:
        """Identifies the results that a stage reads."""
        results = {it: self._manifest.record(it).get("run") for it in self.reads(stage)}
        if "detect" in results and stage != "report":
            # Random controls of the score also depend on the activations.
            neurons = self._manifest.directory / "neurons"
            results["detect"] = fingerprint(set_hashes(neurons, with_activations=stage == "score"))
        for name in results.keys() & {"score", "pilot"} if stage == "train" else ():
            results[name] = self._manifest.record(name).get("for_training")
        return {f"the result of {it}": result for it, result in results.items()}

    def is_outdated(self, stage: str) -> bool:
        """Whether a stage has read results that were replaced since, or read others that had."""
        inputs = self._manifest.record(stage).get("inputs", {})
        return any(inputs.get(name) != result for name, result in self._results(stage).items()) or any(
            map(self.is_outdated, self.reads(stage))
        )

    def state(self, stage: str) -> State:
        """How far a stage has come for this recipe; see `Manifest.state`."""
        return self._manifest.state(stage, self.whole(stage))

    @cached_property
    def model_identity(self) -> dict:
        """What identifies the model: its files' hashes, or its name and commit."""
        return model_identity(self._materials.model_section)

    @cached_property
    def _common_inputs(self) -> dict:
        # Identified by its commit whatever branch that is on, or by its files wherever the folder is.
        model = self._recipe.to_dict()["model"] | {"checkpoints": []} | self.model_identity
        del model["revision"]
        if Path(self._materials.model_section.name).is_dir():
            del model["name"]
        return {
            "model": model,
            "agnostic_train": installed_version("agnostic_train"),
        }

    def _text(self, *purposes: str, languages: Sequence[str] | None = None) -> dict:
        """Hashes of the sentences for some purposes, and the keys that change their tokens.

        The batch size isn't among them: it changes only the time taken, and rounding.
        """
        corpus = self._recipe.corpus
        return {
            "text": {
                purpose: [it for it in self._sentence_hashes[purpose] if languages is None or it[0] in languages]
                for purpose in purposes
            },
            "corpus": {key: getattr(corpus, key) for key in ("max_length", "add_bos")},
        }

    @cached_property
    def _sentence_hashes(self) -> dict[str, list]:
        texts = self._materials.corpus.texts.items()
        purposes = ("detection", "training", "validation")
        return {it: [[language, fingerprint(getattr(text, it))] for language, text in texts] for it in purposes}

    def of(self, stage: str) -> dict:
        """What a stage's result depends on apart from earlier stages: JSON values, under the recipe's own names."""
        if stage == "report":
            return self._common_inputs | self._report_inputs()
        if stage not in self._read:
            # Text, tasks and checkpoints are hashed once: their number may be large.
            own = {
                "detect": self._detection_inputs,
                "score": self._score_inputs,
                "pilot": self._pilot_inputs,
                "train": self._training_inputs,
                "export": lambda: {"export": self._recipe.to_dict()["export"]},
                "evaluate": self._evaluation_inputs,
                "compare": self._comparison_inputs,
            }
            self._read[stage] = self._common_inputs | own[stage]()
        return self._read[stage]

    def _detection_inputs(self) -> dict:
        section = self._recipe.detection
        return {
            # The memory limit changes only the time taken.
            "detection": {key: value for key, value in asdict(section).items() if key != "memory_gb"},
            **self._text("detection", *(["training"] if section.stability else [])),
        }

    def _score_inputs(self) -> dict:
        checkpoints = parse_checkpoints(self._recipe.model.checkpoints)
        section = self._recipe.model
        identities = [
            [it.step, it.name, model_identity(at_checkpoint(section, it.source, "model.checkpoints"))]
            for it in checkpoints
        ]
        # Keys that leave the model's own sets as they are may change those of its checkpoints.
        detection = {"detection": self.of("detect")["detection"]} if checkpoints else {}
        return {
            **detection,
            "score": self._recipe.to_dict()["score"],
            "model.checkpoints": identities,
            **self._text("detection", "validation"),
        }

    def of_trials(self, stage: str) -> dict:
        """What each trial of a pilot or comparison depends on: neither other trials nor how they are ranked."""
        # A pilot reads no evaluation text.
        return self._common_inputs | (self._pilot_trials if stage == "pilot" else self._comparison_trials)

    def _pilot_inputs(self) -> dict:
        trials = self._pilot_trials
        candidates = {"pilot_strategies": self._recipe.training.pilot_strategies}
        return {**trials, "training": trials["training"] | candidates, **self._selecting}

    @property
    def _pilot_trials(self) -> dict:
        training, arguments = self._recipe.to_dict()["training"], self._arguments
        keys = ("languages", "update", "mixture", "packing", "pilot_steps")
        own = {key: training[key] for key in keys} | result_arguments(training["arguments"])
        # A pilot has its own number of steps.
        own = {key: value for key, value in own.items() if key not in ("max_steps", "num_train_epochs")}
        own |= {"seed": arguments.seed, "learning_rate": arguments.learning_rate}
        return {"training": own, **self._training_and_validation_text}

    def _training_inputs(self) -> dict:
        section = self._recipe.training
        unread = [key for key, strategies in _READ_BY.items() if section.strategy not in strategies]
        own = {key: value for key, value in asdict(section).items() if key not in (*unread, "arguments")}
        own["neurons"] = hash_file(section.neurons) if section.neurons else None
        validates = evaluates_during_training(self._arguments)
        text = self._training_and_validation_text if validates else self._training_text
        return {"training": own | learning_arguments(section.arguments), **text}

    @property
    def _selecting(self) -> dict:
        """What the objective that selects among trainings depends on, apart from their results."""
        return {"evaluation": {"max_forgetting": self._recipe.evaluation.max_forgetting}}

    @property
    def _training_text(self) -> dict:
        return self._text("training", languages=self._recipe.training.text_languages)

    @property
    def _training_and_validation_text(self) -> dict:
        text = self._training_text
        text["text"] |= self._text("validation")["text"]
        return text

    def _evaluation_inputs(self) -> dict:
        suite, named = self._materials.task_suite, self._recipe.evaluation.checkpoints
        section = self._recipe.model
        checkpoints = [[it, model_identity(at_checkpoint(section, it, "evaluation.checkpoints"))] for it in named]
        own = self._recipe.to_dict()["evaluation"] | {"checkpoints": checkpoints}
        if suite is None:
            own = {key: value for key, value in own.items() if key not in _READ_BY_TASKS}
        else:
            own |= {"tasks": {name: suite.identity(name) for name in suite.names}}
        return {
            "evaluation": own,
            **self._evaluation_text,
        }

    @property
    def _evaluation_text(self) -> dict:
        text = self._text("validation")
        text["text"]["test"] = fingerprint(self._materials.evaluation_texts)
        return text

    def _comparison_inputs(self) -> dict:
        rates = self._recipe.comparison.learning_rates or default_rates(self._arguments.learning_rate)
        return {
            **(self._selecting if self._recipe.comparison.select_by == "objective" else {}),
            "comparison": self._recipe.to_dict()["comparison"] | {"learning_rates": rates},
            **self._comparison_trials,
        }

    @property
    def _comparison_trials(self) -> dict:
        recipe, text = self._recipe.to_dict(), self._evaluation_text
        text["text"] |= self._training_text["text"]
        return {
            "training": {
                key: recipe["training"][key] for key in ("languages", "update", "mixture", "packing", "random_like")
            }
            | result_arguments(recipe["training"]["arguments"]),
            **launch_settings(self._arguments),
            **text,
        }

    @property
    def has_comparison(self) -> bool:
        """Whether there is a comparison that a report of this recipe can show."""
        return bool(self._manifest.record("compare").get("finished")) and self.state("compare") == "finished"

    def _report_inputs(self) -> dict:
        return {
            "corpus": self._recipe.to_dict()["corpus"] | {"path": None},
            "text": self._materials.corpus.hashes,
            "comparison": self._manifest.record("compare")["run"] if self.has_comparison else None,
        }


def learning_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    """A recipe's TrainingArguments that affect the training's result; a file (an engine's config) becomes its SHA-256.

    When to evaluate is among them, because evaluations are logged with the loss. When to save is among them only if the
    best checkpoint is chosen at the end. Defaults aren't, so writing one into the recipe changes nothing.
    """
    ignored = list(_WITHOUT_EFFECT)
    if not arguments.get("load_best_model_at_end"):
        ignored += _WHEN_TO_SAVE
    if arguments.get("eval_strategy", "no") == "no" and not arguments.get("eval_on_start"):
        ignored += ["eval_", "per_device_eval_batch_size"]
    elif arguments.get("eval_strategy") == "steps" and not arguments.get("eval_steps"):
        # Transformers then evaluates every `logging_steps`; schedules and the best checkpoint may depend on it.
        arguments = {**arguments, "eval_steps": arguments.get("logging_steps", _DEFAULTS["logging_steps"])}
    max_steps = arguments.get("max_steps", -1)
    if isinstance(max_steps, int) and max_steps > 0:
        ignored.append("num_train_epochs")
    return {
        key: hash_file(it) if key in _FILES and isinstance(it, str) and os.path.isfile(it) else it
        for key, it in arguments.items()
        if not key.startswith(tuple(ignored)) and (key in _FROM_ELSEWHERE or it != _DEFAULTS.get(key))
    }


def result_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    """The TrainingArguments that a trial's result depends on, apart from those that the trial sets itself."""
    own = (*SET_BY_TRIALS, "seed", "learning_rate")
    arguments = learning_arguments(arguments)
    return {
        key: it for key, it in arguments.items() if key not in own and not key.startswith(_WITHOUT_EFFECT_ON_THE_END)
    }
