"""Find the neurons that carry a language in a Hugging Face model, and train only those."""

from agnostic_train.agnostic_score import AgnosticScore, language_agnostic_score
from agnostic_train.deactivation import deactivate
from agnostic_train.detection import detect_neurons
from agnostic_train.export import export_checkpoint
from agnostic_train.files import UserError
from agnostic_train.impact import neuron_impacts
from agnostic_train.neurons import LanguageNeurons, NeuronSet
from agnostic_train.perplexity import Perplexity, perplexity
from agnostic_train.strategy import Strategy
from agnostic_train.training.callbacks import DetectionCallback
from agnostic_train.training.compact import NeuronConfig
from agnostic_train.training.trainer import NeuronTrainer, NeuronTrainingArguments
from agnostic_train.versions import installed_version

__version__ = installed_version("agnostic_train")

__all__ = [
    "AgnosticScore",
    "DetectionCallback",
    "LanguageNeurons",
    "NeuronConfig",
    "NeuronSet",
    "NeuronTrainer",
    "NeuronTrainingArguments",
    "Perplexity",
    "Strategy",
    "UserError",
    "deactivate",
    "detect_neurons",
    "export_checkpoint",
    "language_agnostic_score",
    "neuron_impacts",
    "perplexity",
]
