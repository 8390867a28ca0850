"""Weights & Biases: a run per `output_dir` and per trial of a comparison, with fixed names for what is logged."""

import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from accelerate import PartialState

from agnostic_train.errors import UserError
from agnostic_train.files import whole_file
from agnostic_train.fingerprints import fingerprint
from agnostic_train.recipe import Recipe
from agnostic_train.report.tables import Table
from agnostic_train.scores.perplexity import Perplexity

if TYPE_CHECKING:
    import wandb


class Tracker:
    """Logs results to a run; without one, logs nothing."""

    def __init__(self, run: "wandb.Run | None"):
        self._run = run

    def log_summary(self, metrics: Mapping[str, float | None]) -> None:
        """Logs numbers that hold for the whole run, by name; None is left out."""
        if self._run is not None:
            self._run.summary.update({name: value for name, value in metrics.items() if value is not None})

    def log_perplexities(self, measured: Mapping[str, Mapping[str, Perplexity]]) -> None:
        """Logs bits per byte as `TEXT/bits_per_byte/LANGUAGE`."""
        for text, of_text in measured.items():
            self.log_summary({f"{text}/bits_per_byte/{language}": it.bits_per_byte for language, it in of_text.items()})

    def log_tables(self, tables: Mapping[str, Table]) -> None:
        """Logs tables by name."""
        if self._run is not None:
            from wandb import Table as LoggedTable

            for name, rows in tables.items():
                columns = list(dict.fromkeys(key for row in rows for key in row))
                cells = [[row.get(column) for column in columns] for row in rows]
                # A seed is a number in one row and `all` in another.
                self._run.log({f"tables/{name}": LoggedTable(columns, cells, allow_mixed_types=True)})

    def log_figures(self, folder: Path) -> None:
        """Logs every PNG of a folder as `figures/NAME`."""
        if self._run is not None:
            from wandb import Image

            self._run.log({f"figures/{file.stem}": Image(str(file)) for file in sorted(folder.glob("*.png"))})


@contextmanager
def tracked(
    recipe: Recipe,
    processes: PartialState,
    name: str | None = None,
    group: str | None = None,
    run_id: str | None = None,
    config: Mapping[str, object] | None = None,
) -> Iterator[Tracker]:
    """Starts a run in `tracking.project`, or none if `tracking.wandb` is off.

    A Trainer's own wandb callback joins the run.

    Args:
        name: the run's name; `tracking.run_name` by default.
        group: joins several runs.
        run_id: continues the run with this id, if there is one. A sweep's agent sets its own id.
        config: settings of this run besides the recipe.

    Raises:
        UserError: the run can't be started, for example without an account; `WANDB_MODE=offline` needs none.
    """
    if not recipe.tracking.wandb or not processes.is_main_process:
        yield Tracker(None)
        return
    # A run of a group is never the one that the environment names.
    if group is None and "WANDB_RUN_ID" in os.environ:
        run_id = None
    settings = {} if run_id is None else {"id": run_id, "resume": "allow"}
    try:
        import wandb  # takes a second, and most runs don't need it

        run = wandb.init(
            project=recipe.tracking.project, name=name or recipe.tracking.run_name, group=group,
            config={"recipe": recipe.to_dict(), **(config or {})},
            dir=os.environ.get("WANDB_DIR", recipe.output_dir), **settings,
        )  # fmt: skip
    except Exception as error:  # of its own types, of pydantic's for its settings, or of the network's
        is_offline = os.environ.get("WANDB_MODE") == "offline"
        remedy = "" if is_offline else "; log in (wandb login), or set WANDB_MODE=offline"
        raise UserError(f"tracking.wandb: can't start a run ({shorten(str(error), 200)}){remedy}") from None
    try:
        yield Tracker(run)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def run_id_of(directory: Path) -> str:
    """Returns the id of a folder's run, the same for every command in it; the first call makes one up and keeps it."""
    file, folder = directory / ".tracking", str(directory.resolve())
    run_id, made_in = _recorded(file)
    # A copy of the folder must not continue the original's run.
    is_copy = made_in not in ("", folder) and _recorded(Path(made_in) / file.name)[0] == run_id
    if not re.fullmatch("[0-9a-f]{8}", run_id) or is_copy:
        run_id = uuid.uuid4().hex[:8]
    with whole_file(file) as temporary:
        temporary.write_text(f"{run_id}\n{folder}\n", encoding="utf-8")
    return run_id


def run_id_within(directory: Path, part: object) -> str:
    """Returns the id of the run of a part of a folder's work, such as one trial; see `run_id_of`."""
    return fingerprint([run_id_of(directory), part])[:8]


def _recorded(file: Path) -> tuple[str, str]:
    """The run's id in a `.tracking` file, and the folder that it was made in; empty if there is none."""
    if not file.is_file():
        return "", ""
    run_id, _, made_in = file.read_text(encoding="utf-8", errors="replace").strip().partition("\n")
    return run_id, made_in
