"""Sets of neurons, and what can be done with them without training."""
