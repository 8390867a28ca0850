"""The embedded default: a phrasebook corpus in five languages, and a tiny model to train on it."""
