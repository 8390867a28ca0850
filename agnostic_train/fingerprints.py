"""Hashes by which results are recognised: of JSON values and of files."""

import hashlib
import json
from pathlib import Path
from typing import Any


def fingerprint(value: Any) -> str:
    """Returns the SHA-256 of a JSON value; the order of keys doesn't matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_key(value: Any) -> str:
    """Returns the start of a JSON value's fingerprint, which names the file or folder of what was made from it."""
    return fingerprint(value)[:16]


def hash_file(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
