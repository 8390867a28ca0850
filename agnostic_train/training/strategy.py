"""Strategies: which neurons to train, given the detected neurons and the language-agnostic score."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import get_args

from peft import LoraConfig
from torch import nn

from agnostic_train.choices import Baseline, SetStrategy, StrategyName, check_choice
from agnostic_train.errors import UserError
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.scores.result import MIN_CHANGE, AgnosticScore
from agnostic_train.training.chosen import num_trainable
from agnostic_train.training.equal_lora import equal_lora

SET_STRATEGIES = get_args(SetStrategy)
STRATEGIES = (*SET_STRATEGIES, "random", "auto")
BASELINES = get_args(Baseline)


@dataclass(frozen=True)
class Choice:
    """What to train.

    Attributes:
        strategy: the strategy used; for `auto`, the one it selected.
        neurons: the neurons to train; None for the baselines, which train `lora`, if given, or all weights.
        reason: why, in words and numbers.
        lora: the configuration of the `lora` baseline.
    """

    strategy: str
    neurons: NeuronSet | None
    reason: str
    lora: LoraConfig | None = None


@dataclass(frozen=True)
class Strategy:
    """A rule for choosing the neurons to train.

    Attributes:
        name: one of `STRATEGIES` or `BASELINES`. `shared`: the neurons shared by all languages. `exclusive`, `related`:
            the exclusive or related neurons of the target languages. `shared+exclusive`: their union. `random`: as many
            random neurons at each site as `random_like` selects. `auto`: by the language-agnostic score,
            shared+exclusive below `low`, shared up to `high`, exclusive above it. Baselines: `full` trains all weights,
            `lora` a LoRA with about as many trainable parameters as the neurons of `random_like`.
        languages: the languages to enhance; all detected ones by default.
        low, high: thresholds of `auto` on the language-agnostic score. At log 2, shared neurons matter as much as
            exclusive ones; the paper supports no default for `high`.
        random_like: the strategy whose neuron counts `random` and `lora` match.
        seed: the random seed of `random`.

    Raises:
        UserError: a name is unknown, `languages` is a string, or `auto` has no valid thresholds.
    """

    name: str = "shared+exclusive"
    languages: Sequence[str] | None = None
    low: float = math.log(2)
    high: float | None = None
    random_like: str = "shared+exclusive"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.languages, str):  # a string is also a sequence, of letters
            raise UserError(f"training.languages: expected a list of languages, such as [{self.languages!r}]")
        check_choice("training.strategy", self.name, StrategyName)
        check_choice("training.random_like", self.random_like, SetStrategy)
        if self.name == "auto":
            if self.high is None:
                raise UserError("training.high: strategy 'auto' needs it; the paper supports no default")
            if self.high < self.low:
                raise UserError(f"training.high: {self.high} is below training.low, {self.low:.4g}")

    @property
    def needs_score(self) -> bool:
        """Whether `choose` needs a score."""
        return self.name == "auto"

    def check_languages(self, detected: Iterable[str]) -> None:
        """Checks that all languages to enhance were detected.

        Raises:
            UserError: one wasn't.
        """
        detected = list(detected)
        for language in self.languages or []:
            if language not in detected:
                raise UserError(
                    f"training.languages: {language!r} isn't among the detected languages ({', '.join(detected)}); "
                    "add it to corpus.languages"
                )

    def choose(self, detected: LanguageNeurons | None, score: AgnosticScore | None, model: nn.Module) -> Choice:
        """Chooses what to train.

        Args:
            detected: the result of `detect_neurons`; only `full` works without it.
            score: the language-agnostic score; only `auto` needs it.
            model: provides the sizes for `random` and `lora`.

        Raises:
            UserError: `detected` is missing, a language wasn't detected, the choice is empty, or, for `auto`, the score
                is undefined or clipped in every language.
        """
        if self.name == "full":
            return Choice("full", None, "all weights")
        if detected is None:
            raise UserError(f"training.strategy: {self.name!r} needs detected neurons, and none were given")
        self.check_languages(detected.languages)
        languages = list(self.languages or detected.languages)
        names = ", ".join(languages)
        if self.name == "random":
            name, neurons = "random", _chosen(self.random_like, detected, languages).random_like(self.seed, model)
            reason = f"as many random neurons at every site as {self.random_like} of {names} has (seed {self.seed})"
        elif self.name == "auto":
            name, reason = self._by_score(score)
            neurons = _chosen(name, detected, languages)
        else:
            name = self.random_like if self.name == "lora" else self.name
            neurons, reason = _chosen(name, detected, languages), f"{name} of {names}"
        if not len(neurons):
            remedy = "lower detection.consistency or raise detection.top_ratio"
            if detected.settings.get("method") == "lape":  # LAPE finds few shared neurons
                has_related = any(len(detected.related[it]) for it in languages)
                remedy = "raise detection.lape_ratio" + (", or train 'related'" if has_related else "")
            raise UserError(f"training.strategy: {name!r} of {names} has no neuron to train; {remedy}")
        if self.name == "lora":
            lora, num_parameters = equal_lora(neurons, model)
            reason = (
                f"a LoRA of {num_parameters:,} parameters, beside {num_trainable(neurons, model):,} of "
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
                f"{', '.join(clipped)}: switching a set off didn't raise perplexity (by {MIN_CHANGE:g} at least), "
                "and the ratio is arbitrary; raise detection.top_ratio or name a strategy"
            )
        assert self.high is not None
        value = f"score {score.value:.3f}"
        doubts = [
            f"{status} in {', '.join(languages)}"
            for status, languages in (("clipped", clipped), ("undefined", score.undefined))
            if languages
        ]
        if doubts:
            value += f" ({'; '.join(doubts)})"
        if score.value < self.low:
            return "shared+exclusive", f"{value} is below low {self.low:.3f}: the language-agnostic core is still weak"
        if score.value <= self.high:
            return "shared", f"{value} is between low {self.low:.3f} and high {self.high:.3f}"
        return (
            "exclusive",
            f"{value} is above high {self.high:.3f}: the core is strong, the language's own neurons lag behind",
        )


def _chosen(name: str, detected: LanguageNeurons, languages: list[str]) -> NeuronSet:
    if name == "shared":
        return detected.shared
    own = detected.related if name == "related" else detected.exclusive
    of_languages = reduce(or_, (own[language] for language in languages))
    return detected.shared | of_languages if name == "shared+exclusive" else of_languages
