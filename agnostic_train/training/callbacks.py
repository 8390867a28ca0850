"""Detection inside a Trainer: the neurons and score of a model during training, on the training device."""

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from agnostic_train.detection.detect import detect_neurons
from agnostic_train.model.batches import Batch, check_corpora
from agnostic_train.neurons.language_neurons import LanguageNeurons, check_languages
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.scores.agnostic_score import language_agnostic_score
from agnostic_train.scores.result import AgnosticScore
from agnostic_train.training.strategy import Choice, Strategy

logger = logging.get_logger(__name__)


class DetectionCallback(TrainerCallback):
    """Detects language neurons and scores the model, before training and then at regular intervals.

    In a plain `Trainer`, the callback only reports: it prints the metrics, and adds them to the log history and the
    reporting integrations (`report_to`). The loss curve is bit-identical with and without it. In a `NeuronTrainer`
    without neurons, it runs inside `train()` before the optimizer is created, and its strategy chooses the neurons to
    train. Of several callbacks, it follows the first.

    Args:
        corpora: per language, batches as for `detect_neurons`; kept as lists, because they are read several times.
        strategy: a name or a `Strategy`, followed by a `NeuronTrainer`; shared+exclusive of all languages by default.
        every_n_steps: detect and score again every `every_n_steps` optimizer steps; by default only before training.
        score_corpora: per language, batches to score on; `corpora` by default.
        control_seeds: as for `language_agnostic_score`; none by default, because controls take several times as long
            as the score itself.
        detect_keywords: passed to `detect_neurons` (`top_ratio`, `consistency`, ...).

    Attributes:
        neurons: the last `LanguageNeurons`, or None; see `score`.
        score: the last `AgnosticScore`. Both are None until a detection has run, so also after a resumed training in
            which none was due: there the checkpoint has the neurons, and the log history has the score.
        choice: what a `NeuronTrainer` trains.

    Raises:
        ValueError: `every_n_steps` is below 1 or no whole number, or `score_corpora` lacks a language.
        TypeError: `corpora` aren't batches by language, `control_seeds` aren't whole numbers, or `detect_neurons`
            doesn't accept a keyword.
        UserError: the strategy is unknown or names a language that `corpora` lacks.
    """

    def __init__(
        self,
        corpora: Mapping[str, Iterable[Batch]],
        strategy: str | Strategy | None = None,
        every_n_steps: int | None = None,
        *,
        score_corpora: Mapping[str, Iterable[Batch]] | None = None,
        control_seeds: Sequence[int] = (),
        **detect_keywords,
    ):
        if every_n_steps is not None and (every_n_steps < 1 or every_n_steps != int(every_n_steps)):
            raise ValueError(f"every_n_steps must be a whole number of at least 1, not {every_n_steps}")
        unknown = detect_keywords.keys() - (inspect.signature(detect_neurons).parameters.keys() - {"model", "corpora"})
        if unknown:
            raise TypeError(f"detect_neurons has no option {sorted(unknown)[0]!r}")
        check_corpora(corpora)
        check_languages(corpora)
        self.corpora = {language: list(batches) for language, batches in corpora.items()}
        self.score_corpora = self.corpora
        if score_corpora is not None:
            check_corpora(score_corpora)
            if missing := [language for language in self.corpora if language not in score_corpora]:
                raise ValueError(f"score_corpora: no corpus for {', '.join(missing)}")
            self.score_corpora = {language: list(batches) for language, batches in score_corpora.items()}
        self.strategy = strategy if isinstance(strategy, Strategy) else Strategy(strategy or "shared+exclusive")
        if self.strategy.name != "full":
            self.strategy.check_languages(self.corpora)
        self.every_n_steps = every_n_steps
        self.control_seeds = [operator.index(seed) for seed in control_seeds]
        self.detect_keywords = detect_keywords
        self._progress = True
        self.neurons: LanguageNeurons | None = None
        self.score: AgnosticScore | None = None
        self.choice: Choice | None = None
        self._log: Callable[[dict[str, float]], None] | None = None
        self._has_run = False  # for the training that is about to start
        self._integrations: list[TrainerCallback] | None = None

    def run(self, model: nn.Module) -> None:
        """Runs `detect_neurons` and `language_agnostic_score`, whose errors it raises; leaves the model as found."""
        self.neurons = detect_neurons(model, self.corpora, **{"progress": self._progress} | self.detect_keywords)
        self.score = language_agnostic_score(model, self.neurons, self.score_corpora, control_seeds=self.control_seeds)

    def choose(self, model: nn.Module) -> Choice:
        """Applies `Strategy.choose` to the results of `run`; `model` provides the shapes."""
        self.choice = choice = self.strategy.choose(self.neurons, self.score, model)
        if choice.neurons is not None:
            logger.info(f"training {len(choice.neurons)} neurons: {choice.reason}")
        return choice

    @contextmanager
    def reporting_to(self, log: Callable[[dict[str, float]], None]) -> Iterator[None]:
        """Reports one training to a trainer's `log`; by default, results are printed, kept in the
        log history and passed to the trainer's reporting integrations.

        Results stay afterwards, and the next training, of any model or trainer, runs a new detection. A trainer that
        continues with the same model reports that detection, but trains the neurons of its first training.
        """
        self._log = log
        try:
            yield
        finally:
            self._has_run, self._log = False, None

    def find_neurons(self, model: nn.Module) -> NeuronSet:
        """Runs detection for the training that is about to start, and returns the neurons that the strategy chooses."""
        self.run(model)
        self._has_run = True
        neurons = self.choose(model).neurons
        assert neurons is not None
        return neurons

    def metrics(self) -> dict[str, float]:
        """Returns the metrics to log, under fixed names; undefined values are left out.

        Those of the neurons are as in `LanguageNeurons.metrics`; `agnostic_score/importance/<l>` and `agnostic_score`
        are as defined by `language_agnostic_score`.

        Raises:
            ValueError: before the first detection.
        """
        neurons, score = self.neurons, self.score
        if neurons is None or score is None:
            raise ValueError("nothing was detected so far: no training began, or it was resumed where none was due")
        values = neurons.metrics() | {"agnostic_score": score.value}
        values |= {f"agnostic_score/importance/{language}": value for language, value in score.importance.items()}
        return {name: value for name, value in values.items() if value is not None}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Shows progress bars if the trainer does."""
        self._progress = not args.disable_tqdm

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Detects and scores, unless a `NeuronTrainer` has just done so, and reports. Does nothing in a resumed run."""
        self._integrations = None
        if not state.global_step:
            if not self._has_run:
                self.run(kwargs["model"])
            self._report(args, state, control, kwargs)
        # A Trainer that lowers its batch size after running out of memory begins again, with weights that have moved.
        self._has_run = self._log is not None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Detects, scores and reports every `every_n_steps` steps."""
        if self.every_n_steps and state.global_step % self.every_n_steps == 0:
            self.run(kwargs["model"])
            self._report(args, state, control, kwargs)

    def _report(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, kwargs: dict) -> None:
        metrics = self.metrics()
        if self._log is not None:
            should_log = control.should_log
            self._log(metrics)
            # `log` clears this flag, but the trainer's own logging (the loss) is still due at this step.
            control.should_log = should_log
            return
        # A callback has no access to its trainer, only to the log history and the integrations.
        if state.epoch is not None:
            metrics["epoch"] = state.epoch
        state.log_history.append({**metrics, "step": state.global_step})
        if state.is_world_process_zero:
            tqdm.write(str(metrics))
            if self._integrations is None:  # created once per training: each instance opens its own files
                self._integrations = [it() for it in get_reporting_integration_callbacks(args.report_to)]
            for integration in self._integrations:
                integration.on_log(args, state, control, logs=dict(metrics), **kwargs)
