"""Files that are there whole or not at all, and fingerprints of what a stage has read."""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from agnostic_train.errors import UserError

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(tmp|old)")
"""What `whole_file` and `whole_directory` call their files until they are whole, and what is in their place until then."""


@contextmanager
def sole_user(directory: Path) -> Iterator[None]:
    """Holds a folder for this process, and clears it of what a killed one left half-written; not folders of other runs in it.

    Raises:
        UserError: another process holds it. A killed process holds nothing.
    """
    lock = FileLock(directory / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"output_dir: another run is writing to {directory}; wait for it, or use another folder"
        ) from None
    try:
        others = {it.parent for it in directory.rglob(".lock")} - {directory}
        for leftover in [*directory.rglob(".*")]:
            name = _TEMPORARY.fullmatch(leftover.name)
            if name is None or others.intersection(leftover.parents):
                continue
            if not os.path.lexists(leftover):  # it went with the folder that it was in
                continue
            if name[2] == "old" and not leftover.with_name(name[1]).exists():
                # Killed in the moment between taking the old folder away and putting the new one there.
                os.rename(leftover, leftover.with_name(name[1]))
            elif leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        yield
    finally:
        lock.release()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, renamed to `path` on success and removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path: str | Path, is_own: Callable[[Path], bool]) -> None:
    """Lets a folder pass that is absent, empty, or holds nothing but what this package writes there.

    Args:
        is_own: whether an entry of the folder is of our writing.

    Raises:
        UserError: something else is there, which replacing the folder would delete.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: a file, where a folder belongs; move it away")
    for entry in sorted(path.iterdir()) if path.exists() else []:
        if not is_own(entry):
            raise UserError(
                f"{path}: would be replaced, but holds {entry.name}, which this package didn't write; move that away, or "
                "use another folder"
            )


def _is_never_own(entry: Path) -> bool:
    return False


@contextmanager
def whole_directory(path: str | Path, is_own: Callable[[Path], bool] = _is_never_own) -> Iterator[Path]:
    """Yields a temporary directory beside `path` that replaces `path` on success and is removed on failure.

    Args:
        is_own: whether an entry of `path` is of our writing, and may go; by default only an empty folder is replaced.

    Raises:
        UserError: at the start or the end, `path` holds something else, or is a file.
    """
    path = Path(path).resolve()
    check_replaceable(path, is_own)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        check_replaceable(path, is_own)
        if path.exists():
            # A non-empty directory can't be replaced in one step: the old one steps aside first.
            old = temporary.with_suffix(".old")
            os.rename(path, old)
            try:
                os.rename(temporary, path)
            except BaseException:
                os.rename(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes strict JSON (no NaN, no Infinity), UTF-8, indented, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, remedy: str = "delete it and run its stage again") -> Any:
    """Reads a JSON file; raises `UserError` that names the file when it is missing or broken, and what to do then."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, a number of 5000 digits, nested too deeply
        raise UserError(f"{path}: not valid JSON ({error}); {remedy}") from None


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def public_name(name: str) -> str:
    """What is published of a name that may be a path: of a file or folder its own name alone."""
    return Path(name).resolve().name if os.path.exists(name) else name


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
