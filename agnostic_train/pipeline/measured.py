"""What a model gives on several kinds of text, kept in a file."""

from collections.abc import Mapping
from pathlib import Path

from agnostic_train.scores.perplexity import Perplexity, load_measured, save_measured

Measured = dict[str, dict[str, Perplexity]]
"""Per kind of text (validation, test, parallel) and language."""


def save_by_kind(measured: Mapping[str, Mapping[str, Perplexity]], file: Path) -> None:
    """Writes perplexities, whole or not at all."""
    save_measured({f"{kind}.{language}": it for kind, its in measured.items() for language, it in its.items()}, file)


def load_by_kind(file: Path) -> Measured:
    """Reads what `save_by_kind` wrote; raises `UserError` that names the file if it is broken."""
    measured: Measured = {}
    for key, result in load_measured(file).items():
        kind, _, language = key.partition(".")
        measured.setdefault(kind, {})[language] = result
    return measured
