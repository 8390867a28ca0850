"""Which neurons to train, given what was detected and scored."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import get_args

from peft import LoraConfig
from torch import nn

from agnostic_train.choices import SetStrategy
from agnostic_train.errors import UserError
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.scores.result import SMALLEST_CHANGE, AgnosticScore
from agnostic_train.training.chosen import num_weights
from agnostic_train.training.equal_lora import equal_lora

SET_STRATEGIES = get_args(SetStrategy)
STRATEGIES = (*SET_STRATEGIES, "random", "auto")
BASELINES = ("full", "lora")


@dataclass(frozen=True)
class Choice:
    """What learns.

    strategy: that gave it (after `auto`). neurons: to train; None for a baseline, which trains `lora` or else all
    weights. reason: why, in words and numbers.
    """

    strategy: str
    neurons: NeuronSet | None
    reason: str
    lora: LoraConfig | None = None


@dataclass(frozen=True)
class Strategy:
    """How to choose the neurons that are trained.

    Attributes:
        name: one of `STRATEGIES` or `BASELINES`. `shared` trains what all languages use; `exclusive` and `related` what
            the target languages use; `random` as many random neurons at every site as `random_like` would choose;
            `auto` decides by the score: below `low` shared+exclusive, up to `high` shared, above it exclusive. The
            baseline `full` trains all weights, `lora` a LoRA with as many trainable parameters as `random_like` would
            choose.
        languages: the languages to enhance; all detected ones by default.
        low, high: thresholds of `auto` on the language-agnostic score. log 2 is where shared neurons matter as much as
            exclusive ones; the paper supports no default for `high`.
        random_like: the strategy whose numbers `random` and `lora` match.
        seed: of `random`.

    Raises:
        UserError: an unknown name, a text for languages, or thresholds that `auto` can't use.
    """

    name: str = "shared+exclusive"
    languages: Sequence[str] | None = None
    low: float = math.log(2)
    high: float | None = None
    random_like: str = "shared+exclusive"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.languages, str):  # a sequence too, of its letters
            raise UserError(f"training.languages: expected a list of languages, such as [{self.languages!r}]")
        if self.name not in (*STRATEGIES, *BASELINES):
            raise UserError(f"training.strategy: {self.name!r} isn't one of {', '.join((*STRATEGIES, *BASELINES))}")
        if self.random_like not in SET_STRATEGIES:
            raise UserError(f"training.random_like: {self.random_like!r} isn't one of {', '.join(SET_STRATEGIES)}")
        if self.name == "auto":
            if self.high is None:
                raise UserError("training.high: strategy 'auto' needs it; the paper supports no default")
            if self.high < self.low:
                raise UserError(f"training.high: {self.high} is below training.low, {self.low:.4g}")

    @property
    def needs_score(self) -> bool:
        """Whether `choose` asks for a score."""
        return self.name == "auto"

    def check_languages(self, detected: Iterable[str]) -> None:
        """Compares the languages to enhance with the detected ones.

        Raises:
            UserError: one isn't among them.
        """
        detected = list(detected)
        for language in self.languages or []:
            if language not in detected:
                raise UserError(
                    f"training.languages: {language!r} isn't among the detected languages ({', '.join(detected)}); add it "
                    "to corpus.languages"
                )

    def choose(self, found: LanguageNeurons | None, score: AgnosticScore | None, model: nn.Module) -> Choice:
        """Chooses what trains.

        Args:
            found: from `detect_neurons`; `full` alone needs none.
            score: needed by `auto` alone.
            model: gives the sizes for `random` and `lora`.

        Raises:
            UserError: no `found`, an unknown language, for `auto` a score that is undefined or clipped in every language, or an
                empty choice.
        """
        if self.name == "full":
            return Choice("full", None, "all weights")
        if found is None:
            raise UserError(f"training.strategy: {self.name!r} chooses among detected neurons, and none are given")
        self.check_languages(found.languages)
        languages = list(self.languages or found.languages)
        names = ", ".join(languages)
        if self.name == "random":
            name, neurons = "random", _chosen(self.random_like, found, languages).random_like(self.seed, model)
            reason = f"as many random neurons at every site as {self.random_like} of {names} has (seed {self.seed})"
        elif self.name == "auto":
            name, reason = self._by_score(score)
            neurons = _chosen(name, found, languages)
        else:
            name = self.random_like if self.name == "lora" else self.name
            neurons, reason = _chosen(name, found, languages), f"{name} of {names}"
        if not len(neurons):
            remedy = "lower detection.consistency or raise detection.top_ratio"
            if found.settings.get("method") == "lape":  # which finds few shared ones
                remedy = "raise detection.lape_ratio" + ("" if name == "related" else ", or train 'related'")
            raise UserError(f"training.strategy: {name!r} of {names} has no neuron to train; {remedy}")
        if self.name == "lora":
            lora, num_parameters = equal_lora(neurons, model)
            reason = (
                f"a LoRA of {num_parameters:,} parameters, beside {num_weights(neurons, model):,} of "
                f"{self.random_like} of {names}"
            )
            return Choice("lora", None, reason, lora)
        return Choice(name, neurons, reason)

    def _by_score(self, score: AgnosticScore | None) -> tuple[str, str]:
        if score is None or score.value is None:
            raise UserError(
                "training.strategy: 'auto' needs a defined language-agnostic score, and every language has an empty "
                "shared or exclusive set; lower detection.consistency or name a strategy"
            )
        clipped = [language for language in score.clipped if language not in score.undefined]
        if clipped and len(clipped) == len(score.table) - len(score.undefined):
            raise UserError(
                f"training.strategy: 'auto' needs a measured language-agnostic score, and this one is clipped in "
                f"{', '.join(clipped)}: switching a set off didn't raise perplexity (by {SMALLEST_CHANGE:g} at least), and the "
                "ratio is arbitrary; raise detection.top_ratio or name a strategy"
            )
        assert self.high is not None
        value = f"score {score.value:.3f}"
        doubts = [
            f"{what} {', '.join(it)}" for what, it in (("clipped in", clipped), ("undefined in", score.undefined)) if it
        ]
        if doubts:
            value += f" ({'; '.join(doubts)})"
        if score.value < self.low:
            return "shared+exclusive", f"{value} is below low {self.low:.3f}: the language-agnostic core is young"
        if score.value <= self.high:
            return "shared", f"{value} is between low {self.low:.3f} and high {self.high:.3f}"
        return "exclusive", f"{value} is above high {self.high:.3f}: the core is mature, the language's own part lags"


def _chosen(name: str, found: LanguageNeurons, languages: list[str]) -> NeuronSet:
    if name == "shared":
        return found.shared
    own = found.related if name == "related" else found.exclusive
    of_languages = reduce(or_, (own[language] for language in languages))
    return found.shared | of_languages if name == "shared+exclusive" else of_languages
