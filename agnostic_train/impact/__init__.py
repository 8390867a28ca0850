"""How much each neuron matters to its own layer's output."""

from agnostic_train.impact.hooks import ImpactMeter, unverified_impacts

__all__ = ["ImpactMeter", "unverified_impacts"]
