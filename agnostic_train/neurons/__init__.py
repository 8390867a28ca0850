"""Sets of neurons, and the operations on them that need no training."""
