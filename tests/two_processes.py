"""Calls a function of a test module in two gloo processes: shared by the tests of distributed training."""

import os
import subprocess
import sys

# Without the interpreter's own end: in about one of ten, a thread of gloo's aborts it.
WORKER = """
import os
import sys
sys.path[:0] = {paths!r}
import torch.distributed as dist
dist.init_process_group("gloo")
import {module} as it
{call}
dist.barrier()
sys.stdout.flush()
os._exit(0)
"""


def on_two_processes(tmp_path, root, module, call, **environment):
    """root: the repository's. call: Python in which `it` is the module, one of tests/integration."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        WORKER.format(paths=[str(root), str(root / "tests"), str(root / "tests/integration")], module=module, call=call)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-3000:]
