"""The command line in a process of its own, which dies (SIGKILL) at a chosen moment or finds the disk full."""

import importlib
import os
import resource
import signal
import sys

from forked import started

RENAMES = ("os.replace", "os.rename")
"""What every file and folder of ours comes into being by."""


def run_and_kill(arguments, functions=(), call=1, seconds=None, changes=()):
    """Runs the command line and kills it just before the `call`-th call of one of these functions, or after a time.

    changes: pairs of a name and its value, set before.

    Returns the exit status: -9 if it was killed.
    """
    process = started("killing", "run_until", arguments, functions, call, changes)
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def run_with_full_disk(arguments, most_bytes, errors):
    """Runs the command line where no file can grow beyond `most_bytes`. Returns the exit status; stderr goes to a file."""
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
    """The module or class that a dotted name is an attribute of, and the attribute's own name."""
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
