"""Choosing the neurons to train, training only these, and the baselines for comparison."""
