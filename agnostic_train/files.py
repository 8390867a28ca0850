"""Files and folders that are written whole or not at all."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE
from typing import Any

from filelock import FileLock, Timeout

from agnostic_train.errors import UserError

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(tmp|old)")
"""Names that `whole_file` and `whole_directory` give to unfinished files or folders (tmp) and replaced ones (old)."""


@contextmanager
def sole_user(directory: Path) -> Iterator[None]:
    """Locks a folder for this process and removes the half-written files that a killed process left in it.

    Folders of other runs inside it, which have a lock file, are left alone.

    Raises:
        UserError: another process holds the lock (a killed one no longer does), or the file system has no locks.
    """
    lock = FileLock(directory / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"output_dir: another run is writing to {directory}; wait for it, or use another folder"
        ) from None
    except OSError as error:
        raise UserError(
            f"output_dir: {directory} can't be locked ({error.strerror}); use a folder on another file system"
        ) from None
    try:
        other_runs = {it.parent for it in directory.rglob(".lock")} - {directory}
        for leftover in [*directory.rglob(".*")]:
            match = _TEMPORARY.fullmatch(leftover.name)
            if match is None or other_runs.intersection(leftover.parents):
                continue
            if not os.path.lexists(leftover):  # removed together with its folder
                continue
            if match[2] == "old" and not leftover.with_name(match[1]).exists():
                # The process was killed between moving the old folder aside and moving the new one into place.
                os.rename(leftover, leftover.with_name(match[1]))
            elif leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        yield
    finally:
        lock.release()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def share_as_usual(path: Path) -> None:
    """Gives a file, or the files below a folder, the permissions of any other new file in the same place.

    The safetensors library makes its files readable to their owner only.
    """
    if path.is_symlink():
        return
    if path.is_dir():
        for entry in path.iterdir():
            share_as_usual(entry)
        return
    if path.stat().st_mode & 0o077:  # the library didn't make it
        return
    probe = _temporary(path)
    with suppress(OSError):  # a file system without permissions
        probe.touch()
        path.chmod(S_IMODE(probe.stat().st_mode))
    probe.unlink(missing_ok=True)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; it is renamed to `path` on success and removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        share_as_usual(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path: str | Path, is_own: Callable[[Path], bool]) -> None:
    """Checks that a folder is absent, empty, or holds nothing but what this package writes there.

    Args:
        is_own: whether an entry of the folder was written by this package.

    Raises:
        UserError: `path` is a file, or holds something else, which replacing the folder would delete.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: a file, where a folder belongs; move it away")
    for entry in sorted(path.iterdir()) if path.exists() else []:
        if not is_own(entry):
            raise UserError(
                f"{path}: would be replaced, but holds {entry.name}, which this package didn't write; move that away, "
                "or use another folder"
            )


def remove_own(path: Path, is_own: Callable[[Path], bool]) -> None:
    """Deletes a file, or the entries of a folder and the folder if that leaves it empty, as far as they are our own.

    is_own: whether an entry may be deleted.
    """
    # All are asked before the first is deleted: a file may tell which others are our own.
    entries = list(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    for entry in [it for it in entries if is_own(it)]:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def _is_never_own(entry: Path) -> bool:
    return False


@contextmanager
def whole_directory(path: str | Path, is_own: Callable[[Path], bool] = _is_never_own) -> Iterator[Path]:
    """Yields a temporary directory beside `path`; it replaces `path` on success and is removed on failure.

    Args:
        is_own: whether an entry of `path` was written by this package and may be deleted; by default no entry was, so
            that only an empty folder is replaced.

    Raises:
        UserError: at the start or the end, `path` is a file or holds something else.
    """
    path = Path(path).resolve()
    check_replaceable(path, is_own)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        share_as_usual(temporary)
        check_replaceable(path, is_own)
        if path.exists():
            # A non-empty directory can't be replaced in one step, so the old one is moved aside first.
            old = temporary.with_suffix(".old")
            os.rename(path, old)
            try:
                os.rename(temporary, path)
            except BaseException:
                if not path.exists():  # an interrupt may come after the new one has moved in
                    os.rename(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as strict JSON (no NaN, no Infinity), UTF-8, indented; the file is written whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, remedy: str = "delete it and run its stage again") -> Any:
    """Reads a JSON file.

    Args:
        remedy: what the error tells the user to do with a broken file.

    Raises:
        UserError: the file, which the message names, is missing or broken.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of 5000 digits, nested too deeply
        raise UserError(f"{path}: not valid JSON ({error}); {remedy}") from None


def public_name(name: str) -> str:
    """Returns a name as it may be published: if it is an existing path, without the folders that lead to it."""
    return Path(name).resolve().name if os.path.exists(name) else name
