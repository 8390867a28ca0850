"""How much each neuron matters to its own layer's output."""

from agnostic_train.impact.hooks import ImpactMeter, neuron_impacts

__all__ = ["ImpactMeter", "neuron_impacts"]
