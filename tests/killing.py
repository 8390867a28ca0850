"""The command line in a process of its own, which dies (SIGKILL) at a chosen moment or finds the disk full."""

import gc
import importlib
import multiprocessing
import os
import resource
import signal
import sys

_context = multiprocessing.get_context("forkserver")
# Forked from a process that has the libraries loaded and no threads yet: a second instead of ten.
_context.set_forkserver_preload(["agnostic_train.pipeline.run", "agnostic_train.report.page"])

RENAMES = ("os.replace", "os.rename")
"""What every file and folder of ours comes into being by."""


def run_and_kill(arguments, functions=(), call=1, seconds=None):
    """Runs the command line and kills it just before the `call`-th call of one of these functions, or after a time.

    Returns the exit status: -9 if it was killed.
    """
    process = _context.Process(target=_run, args=(arguments, functions, call))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def run_with_full_disk(arguments, most_bytes, errors):
    """Runs the command line where no file can grow beyond `most_bytes`. Returns the exit status; stderr goes to a file."""
    process = _context.Process(target=_run, args=(arguments,), kwargs=dict(most_bytes=most_bytes, errors=str(errors)))
    process.start()
    process.join()
    return process.exitcode


def _run(arguments, functions=(), call=1, most_bytes=None, errors=os.devnull):
    import torch

    sys.stdout = sys.stderr = open(errors, "w")  # noqa: SIM115 (closed by the end of the process)
    gc.freeze()  # what was loaded before the fork isn't looked through anew
    torch.set_num_threads(1)  # nothing here is large, and waiting threads cost the most on a busy machine
    if most_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    calls = []
    for name in functions:
        _kill_before(name, calls, call)
    from agnostic_train.cli import main

    sys.exit(main(arguments))


def _kill_before(name, calls, call):
    path, _, attribute = name.rpartition(".")
    try:
        owner = importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, class_name = path.rpartition(".")
        owner = getattr(importlib.import_module(module), class_name)
    original = getattr(owner, attribute)

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, attribute, wrapped)
