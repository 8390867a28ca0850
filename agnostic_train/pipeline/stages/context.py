"""The context that every stage receives, and the result that it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from agnostic_train.errors import UserError
from agnostic_train.files import read_json, whole_file, write_json
from agnostic_train.fingerprints import file_key
from agnostic_train.neurons.language_neurons import LanguageNeurons, set_hashes
from agnostic_train.pipeline.manifest import Manifest
from agnostic_train.pipeline.materials import Materials
from agnostic_train.pipeline.stage_inputs import StageInputs
from agnostic_train.pipeline.tracking import Tracker
from agnostic_train.recipe import Recipe
from agnostic_train.report.tables import Table, write_csv
from agnostic_train.training.trainer import NeuronTrainingArguments

_PUBLISHED = ".published.json"
"""In `tracking.results_dir`, which may be published: a hash of the `output_dir` that each file comes from."""


@dataclass(frozen=True)
class StageResult:
    """What the manifest records of a finished stage.

    Attributes:
        outputs: the files and folders that it wrote, as names in `output_dir`.
        rewritten: files that it wrote and a later stage may rewrite.
        for_training: what it leaves to the training, as JSON values: a training that read others runs again.
        frozen_weights: whether weights moved that weren't chosen; None if the stage doesn't compare any.
        facts: further JSON values, by name.
    """

    outputs: Sequence[str] = ()
    rewritten: Sequence[str] = ()
    for_training: Mapping[str, object] | None = None
    frozen_weights: Mapping[str, object] | None = None
    facts: Mapping[str, object] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """The fields of the stage's record, apart from its files."""
        parts = {
            "rewritten": list(self.rewritten),
            "for_training": self.for_training,
            "frozen_weights": self.frozen_weights,
        }
        return {**self.facts, **{name: part for name, part in parts.items() if part}}


@dataclass
class Context:
    """One stage of a recipe's run in its `output_dir`.

    Attributes:
        arguments: the training arguments.
        inputs: what every stage's result depends on.
    """

    stage: str
    arguments: NeuronTrainingArguments
    materials: Materials
    manifest: Manifest
    inputs: StageInputs
    tracker: Tracker

    @property
    def recipe(self) -> Recipe:
        return self.materials.recipe

    def say(self, line: str) -> None:
        """Prints a line of the stage's output, once for all processes."""
        self.materials.say(line)

    @property
    def directory(self) -> Path:
        return self.manifest.directory

    @property
    def work(self) -> Path:
        """The folder for partial results, named by hashes of their inputs, which a later run of the stage reuses."""
        return self.directory / ".work" / self.stage

    @property
    def processes(self) -> PartialState:
        return self.materials.processes

    def load_neurons(self) -> LanguageNeurons:
        """Reads the detected neurons from their files."""
        return LanguageNeurons.load(self.directory / "neurons")

    def set_hashes(self, with_activations: bool) -> dict[str, str]:
        """Hashes that identify the detected sets, and optionally the activations; see `language_neurons.set_hashes`."""
        return set_hashes(self.directory / "neurons", with_activations)

    def publish_tables(
        self, tables: Mapping[str, Table | None], files: Mapping[str, Path | None] | None = None
    ) -> None:
        """Logs tables, and writes them and `files` (by new name) to `tracking.results_dir`; for one process only.

        None stands for a result that this run doesn't have: its file there is deleted, if this `output_dir` wrote it.
        """
        self.tracker.log_tables({name: table for name, table in tables.items() if table is not None})
        if self.recipe.tracking.results_dir is None:
            return
        folder, own = Path(self.recipe.tracking.results_dir), file_key(str(self.directory.resolve()))
        record = folder / _PUBLISHED
        owners: dict[str, str] = read_json(record, "delete it") if record.exists() else {}
        if not isinstance(owners, dict):
            raise UserError(f"{record}: not a record of this package; delete it")
        # Earlier versions wrote the path itself.
        owners = {name: own if owner == str(self.directory.resolve()) else owner for name, owner in owners.items()}
        results: dict[str, Table | Path | None] = {f"{name}.csv": table for name, table in tables.items()}
        results |= files or {}
        try:
            for name, result in results.items():
                if isinstance(result, Path):
                    with whole_file(folder / name) as temporary:
                        temporary.write_bytes(result.read_bytes())
                elif result is not None:
                    write_csv(result, folder / name)
                elif owners.get(name) == own:
                    (folder / name).unlink(missing_ok=True)
                    del owners[name]
                if result is not None:
                    owners[name] = own
            write_json(record, owners)
        except OSError as error:
            error.filename = error.filename or str(folder)  # a full disk's error names no file
            raise
