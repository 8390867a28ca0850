"""Export of trained models as checkpoints and adapters, with a check of which weights changed and which did not."""
