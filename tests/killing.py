"""Run the command line in a separate process that is killed (SIGKILL) at a chosen moment or finds the disk full."""

import importlib
import os
import resource
import signal
import sys

from forked import started

RENAMES = ("os.replace", "os.rename")
"""The functions that move every file and folder that the package writes to its final name."""


def run_and_kill(arguments, functions=(), call=1, seconds=None, changes=()):
    """Run the command line and kill it just before the `call`-th call of these functions, or after `seconds`.

    changes: pairs of a dotted name and a value, set before the run.

    Returns the exit status, -9 if the process was killed.
    """
    process = started("killing", "run_until", arguments, functions, call, changes)
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def run_with_full_disk(arguments, most_bytes, errors):
    """Run the command line with files limited to `most_bytes` and stderr in file `errors`; return the exit status."""
    process = started("killing", "run_on_little_disk", arguments, most_bytes, stderr=str(errors))
    process.join()
    return process.exitcode


def run_until(arguments, functions, call, changes):
    for name, value in changes:
        owner, attribute = _owner_of(name)
        setattr(owner, attribute, value)
    calls = []
    for name in functions:
        _kill_before(name, calls, call)
    _run(arguments)


def run_on_little_disk(arguments, most_bytes):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    _run(arguments)


def _run(arguments):
    from agnostic_train.cli import main

    sys.exit(main(arguments))


def _owner_of(name):
    """Return the module or class that a dotted name is an attribute of, and the attribute's name."""
    path, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(path), attribute
    except ModuleNotFoundError:
        module, _, class_name = path.rpartition(".")
        return getattr(importlib.import_module(module), class_name), attribute


def _kill_before(name, calls, call):
    owner, attribute = _owner_of(name)
    original = getattr(owner, attribute)

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, attribute, wrapped)
