"""What the benchmarks share: timing a call, and a report that says where and when it was measured."""

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from agnostic_train.versions import installed_version


def positive(text: str) -> int:
    """A number of at least one, as an `argparse` type."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds that one call takes, until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def new_report(what: str, device: str, packages: list[str]) -> dict[str, Any]:
    """A report with the machine, the versions of this package and others, and the date."""
    processor = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "what": what,
        "machine": f"{processor}, threads: {torch.get_num_threads()}",
        "versions": {"python": platform.python_version()}
        | {name: installed_version(name) for name in ("agnostic_train", "torch", *packages)},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def write_report(report: dict[str, Any], file: Path | None) -> None:
    """Writes what was measured so far, so that nothing is lost if the machine is returned before the end."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
