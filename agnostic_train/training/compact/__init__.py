"""Training with `update="compact"`: a PEFT tuner that adds float32 rows and columns to a frozen base model."""

from peft.utils import register_peft_method

from agnostic_train.training.compact.config import NeuronConfig
from agnostic_train.training.compact.layer import NeuronLinear
from agnostic_train.training.compact.model import NeuronModel, adapter_neurons
from agnostic_train.training.compact.peft_type import NEURON

register_peft_method(name=NEURON.lower(), config_cls=NeuronConfig, model_cls=NeuronModel, prefix=NeuronModel.prefix)

__all__ = ["NeuronConfig", "NeuronLinear", "NeuronModel", "adapter_neurons"]
