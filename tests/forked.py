"""Processes forked from one that has loaded the libraries and has no threads: they start in one second, not ten."""

import gc
import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path

import pytest

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["agnostic_train.pipeline.run", "agnostic_train.report.page"])


def started(module, function, *arguments, stdout=os.devnull, stderr=os.devnull, environment=None):
    """Start and return a process that calls a module's function, both given by name, and prints to these files.

    The process's exit status is what the function returns.
    """
    process = _context.Process(target=_call, args=(module, function, arguments, stdout, stderr, environment or {}))
    process.start()
    return process


def in_two_processes(module, function, *arguments, **environment):
    """Call a function in two processes of a group, as torchrun would; return what the first one printed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            started(
                "forked", "_in_group", module, function, arguments,
                stdout=f"{folder}/{rank}.out", stderr=f"{folder}/{rank}.err",
                environment=group | {"RANK": rank, "LOCAL_RANK": rank} | environment,
            )
            for rank in "01"
        ]  # fmt: skip
        try:
            waiting = {process.sentinel: process for process in processes}
            # Stop if one fails, because the other would wait for it.
            while waiting and not any(process.exitcode for process in processes):
                for sentinel in wait(waiting, timeout=300) or pytest.fail("two processes hang"):
                    waiting.pop(sentinel).join()
            for rank, process in enumerate(processes):
                assert not process.exitcode, Path(folder, f"{rank}.err").read_text()[-3000:]
        finally:
            for process in processes:
                process.kill()
                process.join()
        return Path(folder, "0.out").read_text()


def _in_group(module, function, arguments):
    import torch.distributed as dist

    status = getattr(importlib.import_module(module), function)(*arguments)
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    # Skip the interpreter's shutdown, which a gloo thread sometimes aborts.
    os._exit(status or 0)


def _call(module, function, arguments, stdout, stderr, environment):
    import torch

    for stream, name in ((sys.stdout, stdout), (sys.stderr, stderr)):
        with open(name, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(environment)
    gc.freeze()  # the garbage collector skips what was loaded before the fork
    torch.set_num_threads(1)  # nothing here is large, and waiting threads are costly on a busy machine
    sys.exit(getattr(importlib.import_module(module), function)(*arguments))
