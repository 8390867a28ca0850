"""Call a function of a test module in processes of a launcher, for the tests of distributed training."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FSDP2 = dict(
    ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_RESHARD_AFTER_FORWARD="true", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT", FSDP_CPU_RAM_EFFICIENT_LOADING="false",
)  # fmt: skip
"""The environment that `accelerate launch` sets for recipes/accelerate/fsdp2.yaml."""

# `os._exit` skips the interpreter's shutdown, which a gloo thread sometimes aborts.
WORKER = """
import os
import sys
sys.path[:0] = {paths!r}
import {module} as it
import torch.distributed as dist
{call}
sys.stdout.flush()
if dist.is_initialized():
    dist.barrier()
os._exit(0)
"""


def launched(directory, file, call, num_processes=2, **environment):
    """Run `call`, Python in which `it` is the test module `file`; `directory` is for the worker's script."""
    paths = [str(ROOT), str(ROOT / "tests"), str(Path(file).parent)]
    worker = directory / "worker.py"
    worker.write_text(WORKER.format(paths=paths, module=Path(file).stem, call=call))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", str(worker)
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-3000:]
