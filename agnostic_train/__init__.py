"""Find the neurons that carry a language in a Hugging Face model, and train only those."""

import importlib
from typing import TYPE_CHECKING, Any

from agnostic_train.peft_import import register_with_peft
from agnostic_train.versions import VERSION

if TYPE_CHECKING:
    from agnostic_train.corpus.encoding import batches_of
    from agnostic_train.detection.detect import detect_neurons, neuron_impacts
    from agnostic_train.detection.self_check import ImpactMismatchError
    from agnostic_train.errors import UserError
    from agnostic_train.export.checkpoint import export_checkpoint
    from agnostic_train.neurons.deactivation import deactivate
    from agnostic_train.neurons.language_neurons import LanguageNeurons
    from agnostic_train.neurons.neuron_set import NeuronSet
    from agnostic_train.scores.agnostic_score import language_agnostic_score
    from agnostic_train.scores.perplexity import NonFiniteLossError, Perplexity, perplexity
    from agnostic_train.scores.result import AgnosticScore
    from agnostic_train.training.callbacks import DetectionCallback
    from agnostic_train.training.compact import NeuronConfig
    from agnostic_train.training.strategy import Strategy
    from agnostic_train.training.trainer import NeuronTrainer, NeuronTrainingArguments

__version__ = VERSION

__all__ = [
    "AgnosticScore",
    "DetectionCallback",
    "ImpactMismatchError",
    "LanguageNeurons",
    "NeuronConfig",
    "NeuronSet",
    "NeuronTrainer",
    "NeuronTrainingArguments",
    "NonFiniteLossError",
    "Perplexity",
    "Strategy",
    "UserError",
    "batches_of",
    "deactivate",
    "detect_neurons",
    "export_checkpoint",
    "language_agnostic_score",
    "neuron_impacts",
    "perplexity",
]

_MODULES = {
    "AgnosticScore": "scores.result",
    "DetectionCallback": "training.callbacks",
    "ImpactMismatchError": "detection.self_check",
    "LanguageNeurons": "neurons.language_neurons",
    "NeuronConfig": "training.compact",
    "NeuronSet": "neurons.neuron_set",
    "NeuronTrainer": "training.trainer",
    "NeuronTrainingArguments": "training.trainer",
    "NonFiniteLossError": "scores.perplexity",
    "Perplexity": "scores.perplexity",
    "Strategy": "training.strategy",
    "UserError": "errors",
    "batches_of": "corpus.encoding",
    "deactivate": "neurons.deactivation",
    "detect_neurons": "detection.detect",
    "export_checkpoint": "export.checkpoint",
    "language_agnostic_score": "scores.agnostic_score",
    "neuron_impacts": "detection.detect",
    "perplexity": "scores.perplexity",
}
"""The module of each public name, imported when the name is first used: importing torch and PEFT takes seconds."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_peft()
