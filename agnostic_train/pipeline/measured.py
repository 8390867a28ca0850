"""A model's perplexities on several kinds of text, and the file that keeps them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from agnostic_train.model.batches import Batch
from agnostic_train.scores.perplexity import Perplexity, load_measured, perplexity, save_measured

Measured = dict[str, dict[str, Perplexity]]
"""Perplexities by kind of text (validation, test, parallel) and language."""


def measure(model: nn.Module, texts: Mapping[str, Mapping[str, Sequence[Batch]]], label: str | None = None) -> Measured:
    """Computes a model's perplexities.

    Args:
        texts: by kind of text and language, batches as for `perplexity`.
        label: the model's name in a progress bar; without one, no bar is shown.

    Raises:
        NonFiniteLossError: a sentence's loss isn't finite; names the text.
    """
    measured: Measured = {kind: {} for kind in texts}
    rows = [(kind, language, batches) for kind, of_kind in texts.items() for language, batches in of_kind.items()]
    for kind, language, batches in tqdm(rows, f"evaluate {label}", unit=" texts", disable=label is None, leave=False):
        measured[kind][language] = perplexity(model, batches, name=f"{kind} text of {language!r}")
    return measured


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
