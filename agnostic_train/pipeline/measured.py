"""A model's perplexities on several kinds of text, and the file that keeps them."""

from collections.abc import Mapping
from pathlib import Path

from agnostic_train.scores.perplexity import Perplexity, load_measured, save_measured

Measured = dict[str, dict[str, Perplexity]]
"""Perplexities by kind of text (validation, test, parallel) and language."""


def save_by_kind(measured: Mapping[str, Mapping[str, Perplexity]], file: Path) -> None:
    """Writes perplexities to a file, atomically."""
    save_measured({f"{kind}.{language}": it for kind, row in measured.items() for language, it in row.items()}, file)


def load_by_kind(file: Path) -> Measured:
    """Reads what `save_by_kind` wrote; raises a `UserError` that names the file if it is damaged."""
    measured: Measured = {}
    for key, result in load_measured(file).items():
        kind, _, language = key.partition(".")
        measured.setdefault(kind, {})[language] = result
    return measured
