"""`manifest.json`: what a run was made from, and which of its stages have finished with every file in place."""

import json
import platform
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch

from agnostic_train.errors import UserError
from agnostic_train.files import read_json, write_json
from agnostic_train.fingerprints import fingerprint
from agnostic_train.versions import installed_version

State = Literal["finished", "started", "stale"]


class Manifest:
    """The record of a run's stages in its `output_dir`.

    A stage's inputs, JSON values, are all that its result depends on, including the results of earlier stages. Its key
    is the hash of its inputs.

    Only `start`, `finish` and `refuse` write to the file; with several processes, only the main one calls them.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.file = directory / "manifest.json"

    def read(self) -> dict[str, Any]:
        """Returns the current manifest; raises `UserError` if the file isn't one."""
        content = read_json(self.file) if self.file.exists() else {"stages": {}}
        stages = content.get("stages") if isinstance(content, dict) else None
        if not isinstance(stages, dict) or not all(map(_is_record, stages.values())):
            raise UserError(f"{self.file}: not a manifest of this package; delete it, or use another output_dir")
        return content

    def record(self, stage: str) -> dict[str, Any]:
        """The record of a stage; empty if the stage never started."""
        return self.read()["stages"].get(stage, {})

    def changed(self, stage: str, inputs: dict[str, Any]) -> list[str]:
        """Names the inputs (`key` or `section.key`) that differ from the stage's last run; if none, its lost files."""
        before, now = self.record(stage).get("inputs", {}), json.loads(json.dumps(inputs))
        changed: list[str] = []
        for name in now.keys() & before.keys():
            old, new = before[name], now[name]
            if isinstance(old, dict) and isinstance(new, dict):
                # A key that was read only before or only now, and is empty, isn't what the user changed.
                changed += [
                    f"{name}.{key}"
                    for key in old.keys() | new.keys()
                    if (old.get(key) or None) != (new.get(key) or None)
                ]
            elif old != new:
                changed.append(name)
        # An input that only one of them reads comes from another key's change.
        return sorted(changed) or sorted(now.keys() ^ before.keys()) or self._lost(stage)

    def state(self, stage: str, inputs: dict[str, Any]) -> State:
        """How far the stage has come with these inputs.

        `finished`: it ended, and every file is still there. `started`: it didn't end. `stale`: it never ran with these
        inputs, or has lost files.
        """
        record = self.record(stage)
        if record.get("key") != fingerprint(inputs):
            return "stale"
        if not record.get("finished"):
            return "started"
        return "stale" if self._lost(stage) else "finished"

    def _lost(self, stage: str) -> list[str]:
        """The stage's files that are missing or have changed size."""
        files = {self.directory / name: size for name, size in self.record(stage).get("files", {}).items()}
        lost = [file for file, size in files.items() if not file.is_file() or file.stat().st_size != size]
        return [str(file.relative_to(self.directory)) for file in lost]

    def outputs(self, stage: str) -> list[str]:
        """The files that the stage's last finished run wrote, including those that a later stage may rewrite."""
        record = self.record(stage)
        return [*record.get("files", {}), *record.get("rewritten", [])]

    def remove_outputs(self, stage: str, spared: Collection[str]) -> bool:
        """Deletes the files that the stage's last finished run wrote, and folders that this leaves empty.

        spared: files to keep. Returns whether any file was deleted.
        """
        names = [name for name in self.outputs(stage) if name not in spared]
        files = [file for name in names if (file := self.directory / name).exists()]
        for file in files:
            file.unlink()
        for folder in {file.parent for file in files} - {self.directory}:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        return bool(files)

    def start(self, stage: str, inputs: dict[str, Any], launch: dict[str, Any], head: dict[str, Any]) -> None:
        """Records that a run of the stage has begun.

        launch: the launcher's settings, see `launch_settings`. head: the manifest's top-level fields.
        """
        previous, key = self.record(stage), fingerprint(inputs)
        is_there = {name for name in self.outputs(stage) if (self.directory / name).exists()}
        run = previous["run"] if previous.get("key") == key and not previous.get("finished") else uuid.uuid4().hex
        # A stage before this one may have to remove what is still there of the last finished run.
        files = {
            "files": {name: size for name, size in previous.get("files", {}).items() if name in is_there},
            "rewritten": [name for name in previous.get("rewritten", []) if name in is_there],
        }
        record = {"key": key, "run": run, **launch, "finished": False, "inputs": inputs, **files}
        self._write(stage, record, head)

    def finish(self, stage: str, outputs: list[Path], result: dict[str, Any], head: dict[str, Any]) -> None:
        """Records that the stage has finished.

        outputs: its files and folders; file sizes are recorded. result: further fields of its record.
        """
        files = [path for output in outputs for path in ([output] if output.is_file() else sorted(output.rglob("*")))]
        sizes = {str(path.relative_to(self.directory)): path.stat().st_size for path in files if path.is_file()}
        started = self.record(stage)
        self._write(stage, {**started, "finished": True, **result, "files": sizes}, head)

    def refuse(self, frozen_weights: dict[str, Any]) -> None:
        """Records which frozen weights moved; the export that found them stays unfinished."""
        write_json(self.file, {**self.read(), "frozen_weights": frozen_weights})

    def _write(self, stage: str, record: dict[str, Any], head: dict[str, Any]) -> None:
        stages = self.read()["stages"] | {stage: record}
        write_json(self.file, {**head, "stages": stages})


def _is_record(value: object) -> bool:
    """Whether a value has the form of a stage's record."""
    return isinstance(value, dict) and all(isinstance(value.get(part, {}), dict) for part in ("inputs", "files"))


def changed_in_words(changed: list[str]) -> str:
    """Formats names from `Manifest.changed` for a message: keys first, at most five, and how many more."""
    # Results and `text.PURPOSE` aren't keys of a recipe.
    keys_first = sorted(changed, key=lambda it: it.startswith("the result of"))
    names = [f"{it.removeprefix('text.')} text" if it.startswith("text.") else it for it in keys_first[:5]]
    return ", ".join(names) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that matter, and the accelerator's name."""
    packages = ("agnostic_train", "torch", "transformers", "accelerate", "peft", "datasets")
    return {
        "python": platform.python_version(),
        **{name: installed_version(name) for name in packages},
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
