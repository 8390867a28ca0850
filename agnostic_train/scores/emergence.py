"""How a language-agnostic core emerges: sets and scores over a model's checkpoints (Chen et al. 2025, figures 2-5)."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agnostic_train.errors import UserError
from agnostic_train.files import read_json, write_json
from agnostic_train.fingerprints import file_key
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.processes import of_first_process, process_index
from agnostic_train.scores.result import AgnosticScore


@dataclass(frozen=True)
class Checkpoint:
    """One of a model's checkpoints.

    Attributes:
        source: a folder, or a revision of the model's hub repository.
        step: the training step; None if unknown.
    """

    source: str
    step: int | None

    @classmethod
    def parse(cls, entry: str) -> "Checkpoint":
        """Parses `FOLDER` or `REVISION`, optionally preceded by `STEP=`.

        Without `STEP=`, the step is the last number that follows `step` in the name, or else the last number in it that
        isn't part of a version or a size (`v1.0`, `1b`). A commit hash has none.
        """
        step, equals, source = entry.partition("=")
        if equals and step.isdecimal():
            if not source:
                raise UserError(f"model.checkpoints: {entry!r} names no checkpoint after the step")
            return cls(os.path.expanduser(source), int(step))
        name = Path(entry).name
        # A name may contain other numbers too: stage1-step596057-tokens2500B.
        numbers = re.findall(r"step[-_=]?(\d+)(?![a-zA-Z\d])", name)
        if not numbers and not re.fullmatch(r"(?=.*[a-f])[0-9a-f]{7,40}", name):
            whole = r"(?<![\d.])(?<!\de-)\d+(?![a-zA-Z\d.])"
            numbers = re.findall(rf"(?<![a-zA-Z]){whole}", name) or re.findall(whole, name)
        return cls(os.path.expanduser(entry), int(numbers[-1]) if numbers else None)

    @property
    def name(self) -> str:
        return Path(self.source).name


def emergence_row(checkpoint: Checkpoint, detected: LanguageNeurons, score: AgnosticScore) -> dict:
    """Summarises a checkpoint's neurons and score as plain JSON values."""
    return {
        "checkpoint": checkpoint.name,
        "step": checkpoint.step,
        "shared": len(detected.shared),
        "related": {language: len(neurons) for language, neurons in detected.related.items()},
        "exclusive": {language: len(neurons) for language, neurons in detected.exclusive.items()},
        "shared_ratio": detected.shared_ratio,
        "perplexity": {row.language: row.perplexity for row in score.table},
        "score": score.value,
        "interval": score.interval,
        "variants": {name: variant.value for name, variant in score.variants.items()},
        "clipped": score.clipped,
        "controls": {
            kind: [{"score": control.value, "clipped": control.clipped} for control in controls.scores.values()]
            for kind, controls in score.controls.items()
        },
    }


def follow_checkpoints(
    checkpoints: Sequence[Checkpoint],
    measure: Callable[[Checkpoint], tuple[LanguageNeurons, AgnosticScore]],
    identity: Callable[[Checkpoint], object],
    directory: Path,
) -> list[dict]:
    """Measures each checkpoint and saves its row; an interrupted run continues with the next checkpoint.

    Args:
        checkpoints: the checkpoints, in the order of the table.
        measure: detects and scores one checkpoint.
        identity: everything that a checkpoint's row depends on, as plain JSON values.
        directory: where finished rows are saved, a JSON file each.

    Returns: the rows, sorted by step if every checkpoint has one.
    """
    rows = []
    files = [directory / f"{file_key(identity(it))}.json" for it in checkpoints]
    # Measuring takes all processes, and each would look for a file at another time.
    kept = of_first_process([file.exists() for file in files])
    for checkpoint, file, is_kept in zip(checkpoints, files, kept, strict=True):
        if is_kept:
            # The same checkpoint may have had another name.
            rows.append(read_json(file) | {"checkpoint": checkpoint.name, "step": checkpoint.step})
            continue
        row = emergence_row(checkpoint, *measure(checkpoint))
        if process_index() == 0:
            write_json(file, row)
        rows.append(row)
    if all(row["step"] is not None for row in rows):
        rows.sort(key=lambda row: row["step"])
    return rows


def parse_checkpoints(entries: Sequence[str]) -> list[Checkpoint]:
    """Parses the recipe's list of checkpoints.

    Raises:
        UserError: a checkpoint is listed twice, or two have the same step.
    """
    checkpoints = [Checkpoint.parse(entry) for entry in entries]
    for index, checkpoint in enumerate(checkpoints):
        if checkpoint in checkpoints[:index]:
            raise UserError(f"model.checkpoints: {checkpoint.source} is listed twice")
        if checkpoint.step is not None and any(it.step == checkpoint.step for it in checkpoints[:index]):
            raise UserError(
                f"model.checkpoints: two have step {checkpoint.step} (one is {checkpoint.source}); "
                "write STEP= before one of them"
            )
    return checkpoints
