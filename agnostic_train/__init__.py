"""Find the neurons that carry a language in a Hugging Face model, and train only those."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from agnostic_train.peft_import import register_with_peft
from agnostic_train.versions import installed_version

if TYPE_CHECKING:
    from agnostic_train.agnostic_score import AgnosticScore, language_agnostic_score
    from agnostic_train.deactivation import deactivate
    from agnostic_train.detection import detect_neurons, neuron_impacts
    from agnostic_train.encoding import batches_of
    from agnostic_train.export import export_checkpoint
    from agnostic_train.files import UserError
    from agnostic_train.neurons import LanguageNeurons, NeuronSet
    from agnostic_train.perplexity import NonFiniteLossError, Perplexity, perplexity
    from agnostic_train.self_check import ImpactMismatchError
    from agnostic_train.strategy import Strategy
    from agnostic_train.training.callbacks import DetectionCallback
    from agnostic_train.training.compact import NeuronConfig
    from agnostic_train.training.trainer import NeuronTrainer, NeuronTrainingArguments

__version__ = installed_version("agnostic_train")

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
    "AgnosticScore": "agnostic_score",
    "DetectionCallback": "training.callbacks",
    "ImpactMismatchError": "self_check",
    "LanguageNeurons": "neurons",
    "NeuronConfig": "training.compact",
    "NeuronSet": "neurons",
    "NeuronTrainer": "training.trainer",
    "NeuronTrainingArguments": "training.trainer",
    "NonFiniteLossError": "perplexity",
    "Perplexity": "perplexity",
    "Strategy": "strategy",
    "UserError": "files",
    "batches_of": "encoding",
    "deactivate": "deactivation",
    "detect_neurons": "detection",
    "export_checkpoint": "export",
    "language_agnostic_score": "agnostic_score",
    "neuron_impacts": "detection",
    "perplexity": "perplexity",
}
"""Where each public name is: its file is read when the name is first asked for, for torch and PEFT take seconds."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, in which `perplexity` stays the function when Python has read the file of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _MODULES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
register_with_peft()
