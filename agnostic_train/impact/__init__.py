"""Impacts: how much each neuron changes its own layer's output."""
