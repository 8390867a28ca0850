"""Trials: trainings that keep only their measurements, for `pilot` and `compare`."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from accelerate.utils.memory import clear_device_cache
from transformers import PrinterCallback, set_seed

from agnostic_train.corpus.encoding import Example
from agnostic_train.errors import UserError
from agnostic_train.evaluation.comparison import relative_change
from agnostic_train.files import read_json, write_json
from agnostic_train.fingerprints import file_key
from agnostic_train.model.batches import Batch
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.pipeline.fitting import make_trainer, train_to_end
from agnostic_train.pipeline.manifest import package_versions
from agnostic_train.pipeline.materials import Materials
from agnostic_train.pipeline.measured import Measured, load_by_kind, measure, save_by_kind
from agnostic_train.pipeline.settings import make_strategy, training_arguments
from agnostic_train.pipeline.tracking import Tracker, run_id_within, tracked
from agnostic_train.pipeline.training_text import training_examples
from agnostic_train.scores.perplexity import NonFiniteLossError
from agnostic_train.training.chosen import num_trainable
from agnostic_train.training.strategy import SET_STRATEGIES, Choice

SET_BY_TRIALS = {
    "data_seed": None,
    "eval_on_start": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "disable_tqdm": True,
    "include_num_input_tokens_seen": "non_padding",
}
"""TrainingArguments of every trial: nothing is saved or evaluated on the way, and each seed gives another order of the
text."""
BASE = "base"
"""Takes the place of a strategy for the model before any training."""


@dataclass(frozen=True)
class Trial:
    """One training: its strategy, seed and peak learning rate."""

    strategy: str
    seed: int = 0
    learning_rate: float | None = None

    def __str__(self) -> str:
        return (
            self.strategy
            if self.strategy == BASE
            else f"{self.strategy}, rate {self.learning_rate:.3g}, seed {self.seed}"
        )


def check_choices(key: str, strategies: Sequence[str], detected: LanguageNeurons, materials: Materials) -> None:
    """Raises `UserError` for a strategy that chooses no neuron, before others train. key: the key that lists them."""
    for name in strategies:
        try:
            _choose(Trial(name), detected, materials)
        except UserError as error:
            raise UserError(f"{key}: {str(error).removeprefix('training.strategy: ')}, or leave it out") from None


def _choose(trial: Trial, detected: LanguageNeurons, materials: Materials) -> Choice:
    strategy = make_strategy(materials.recipe, trial.strategy, trial.seed)
    return strategy.choose(detected, None, materials.model)


@dataclass(frozen=True)
class TrialResult:
    """What a trial measured.

    Attributes:
        record: the training's record, plain JSON.
        measured: None if the training diverged to a loss that isn't finite.
        kept: whether the result comes from an earlier run's files.
    """

    record: dict
    measured: Measured | None
    kept: bool

    def changes(self, base: Measured) -> dict[str, float] | None:
        """Each language's change on validation text, the only text that may select; None if the training diverged."""
        if self.measured is None:
            return None
        before = base["validation"]
        return {language: relative_change(before[language], it) for language, it in self.measured["validation"].items()}


@dataclass(frozen=True)
class Trials:
    """Trains and measures on demand, and keeps each result: an interrupted series continues with the next trial.

    Attributes:
        materials: model and text.
        detected: the neurons from which strategies choose.
        training: per language, the sentences to train on.
        texts: per kind of text and language, the batches to measure on.
        directory: keeps the results, two files per trial, and the Trainer's own files while it runs.
        key: all that a result depends on apart from its trial and `changes`, as plain JSON values.
        changes: changes to the recipe's training arguments.
        group: the group of the trials' tracked runs; None leaves them untracked.
    """

    materials: Materials
    detected: LanguageNeurons
    training: Mapping[str, Sequence[str]]
    texts: Mapping[str, Mapping[str, Sequence[Batch]]]
    directory: Path
    key: object
    changes: Mapping[str, object] = field(default_factory=dict)
    group: str | None = None

    @cached_property
    def _examples(self) -> list[Example]:
        return training_examples(self.materials.encoder, self.training, self.materials.recipe.training)

    def choose(self, trial: Trial) -> Choice:
        """Returns what learns in a trial; raises `UserError` if its strategy chooses no neuron."""
        return _choose(trial, self.detected, self.materials)

    def twins(self, strategies: Sequence[str]) -> dict[str, str]:
        """Maps a strategy to an earlier one with the same neurons: two equal rows would seem to confirm each other."""
        twin_of: dict[str, str] = {}
        earlier: dict[str, NeuronSet] = {}
        for name in strategies:
            if name not in SET_STRATEGIES:
                continue
            neurons = self.choose(Trial(name)).neurons
            assert neurons is not None
            twin = next((it for it, others in earlier.items() if others == neurons), None)
            if twin is None:
                earlier[name] = neurons
            else:
                twin_of[name] = twin
        return twin_of

    def base(self) -> Measured:
        """The measurements of the model before any training."""
        measured = self.run(Trial(BASE)).measured
        assert measured is not None
        return measured

    def run(self, trial: Trial) -> TrialResult:
        """Returns a trial's result, from its files or by training; strategies with the same choice train once."""
        choice = None if trial.strategy == BASE else self.choose(trial)
        inputs = [self.key, self.changes, trial.seed, trial.learning_rate, what_learns(choice), package_versions()]
        name = file_key(inputs)
        record_file, file = self.directory / f"{name}.json", self.directory / f"{name}.safetensors"
        record = read_json(record_file) if record_file.exists() else None
        if record is None or not (record["diverged"] or file.exists()):
            record, measured = self._measure(trial, choice, name)
            if self.materials.processes.is_main_process:
                if measured is not None:
                    save_by_kind(measured, file)
                # Written last, so that an interrupted trial has none.
                write_json(record_file, {**asdict(trial), **record})
            self.materials.processes.wait_for_everyone()
            return TrialResult(record, measured, kept=False)
        return TrialResult(record, None if record["diverged"] else load_by_kind(file), kept=True)

    def _measure(self, trial: Trial, choice: Choice | None, name: str) -> tuple[dict, Measured | None]:
        if choice is None:
            return {"diverged": False}, measure(self.materials.model, self.texts)
        work = self.directory / f".{name}"
        arguments = training_arguments(
            self.materials.recipe,
            **SET_BY_TRIALS, **self.changes, output_dir=str(work), seed=trial.seed, learning_rate=trial.learning_rate,
        )  # fmt: skip
        if self.group is None:
            arguments.report_to = []
        with self._tracked(trial, name) as tracker:
            set_seed(arguments.seed)
            trainer = make_trainer(self.materials, arguments, choice, self._examples)
            trainer.remove_callback(PrinterCallback)  # its output would interrupt the line or two for each trial
            num_with_grad = sum(it.numel() for it in trainer.model.parameters() if it.requires_grad)
            # With masks, whole matrices require gradients.
            trainable = num_with_grad if choice.neurons is None else num_trainable(choice.neurons, trainer.model)
            try:
                train_to_end(trainer)
                measured = measure(trainer.model, self.texts)
            except NonFiniteLossError:
                measured = None
            finally:
                self.materials.forget_model()
                shutil.rmtree(work, ignore_errors=True)
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            record = {
                "diverged": measured is None,
                "trainable": trainable,
                "neurons": None if choice.neurons is None else len(choice.neurons),
                "reason": choice.reason,
                "steps": trainer.state.global_step,
                "tokens": trainer.state.num_input_tokens_seen,
                "loss": losses[-1] if losses and measured is not None else None,
            }
            tracker.log_perplexities(measured or {})
        del trainer
        clear_device_cache(garbage_collection=True)
        return record, measured

    def _tracked(self, trial: Trial, name: str) -> AbstractContextManager[Tracker]:
        """The trial's tracked run; if the trial was interrupted or is forced, the same run again."""
        recipe, processes = self.materials.recipe, self.materials.processes
        if self.group is None:
            return nullcontext(Tracker(None))
        tracks = recipe.tracking.wandb and processes.is_main_process
        run_id = run_id_within(Path(recipe.output_dir), name) if tracks else None
        return tracked(recipe, processes, str(trial), self.group, run_id, {"trial": asdict(trial)})


def what_learns(choice: Choice | None) -> object:
    """Identifies the weights that a choice trains, as plain JSON values."""
    if choice is None:
        return BASE
    if choice.neurons is not None:
        return {f"{layer}.{projection}": indices.tolist() for (layer, projection), indices in choice.neurons.items()}
    return choice.strategy if choice.lora is None else [choice.lora.rank_pattern, choice.lora.alpha_pattern]
