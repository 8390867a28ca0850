"""From a trained model to checkpoints that others load, with proof of what moved and what did not."""
