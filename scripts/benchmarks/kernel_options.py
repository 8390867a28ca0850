"""Times the Triton kernels of q and k impacts under other launch options than their own.

One layer of random attention in the shapes of Llama 3.2 1B (heads of 64) and 3.1 8B (heads of 128): the intervals of
all neurons, and a tenth of the exact impacts. Each option's results are compared with those of the kernels' own
options. Writes a JSON file with the machine, the versions and the date.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from measuring import new_report, positive, timed, write_report
from torch import Tensor

from agnostic_train.impact import intervals, kernels

OPTIONS: dict[str, dict[str, dict[str, int]]] = {
    "intervals": {
        "own": {},
        "168 registers": {"maxnreg": 168},
        "no kept keys": {"KEPT": 0},
        "no kept keys, 1 stage": {"KEPT": 0, "num_stages": 1},
        "no kept keys, 168 registers": {"KEPT": 0, "maxnreg": 168},
        "no kept keys, 8 warps": {"KEPT": 0, "num_warps": 8},
    },
    "a tenth exactly": {
        "own": {},
        "1 stage": {"num_stages": 1},
        "168 registers": {"maxnreg": 168},
        "1 stage, 168 registers": {"num_stages": 1, "maxnreg": 168},
        "8 warps, 128 registers": {"num_warps": 8, "maxnreg": 128},
    },
}
MODULES = {"intervals": intervals, "a tenth exactly": kernels}
SHAPES = {"cuda": ((64, 128), (64, 256), (64, 250), (128, 128)), "cpu": ((6, 9),)}
"""Head sizes and lengths; a CPU, with Triton's interpreter, only tries whether this file works."""
NUM_HEADS = {"cuda": 16 * 32, "cpu": 1}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=list(SHAPES))
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--output", type=Path, help="JSON file; standard output by default")
    return parser


def calls(head_dim: int, length: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """Both kernels on the q neurons of one layer."""
    torch.manual_seed(0)
    num_heads = NUM_HEADS[device]
    visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    logits = torch.randn(num_heads, length, length, device=device).masked_fill(~visible[0], -torch.inf)
    value = torch.randn(num_heads, length, head_dim, device=device)
    factors = [0.3 * torch.randn(num_heads, length, head_dim, device=device) for _ in range(4)]
    weight, largest = torch.ones(num_heads, length, device=device), torch.full((num_heads,), 8.0, device=device)
    chosen = torch.rand(num_heads, head_dim, device=device) < 0.1
    attention, spans = logits.softmax(-1), kernels.key_spans(visible)

    def rough() -> Tensor:
        return torch.stack(intervals.Intervals(logits, attention, value, weight, spans, largest).around(factors))

    return {
        "intervals": rough,
        "a tenth exactly": lambda: kernels.squared_changes(logits, value, weight, factors, spans, chosen),
    }


def milliseconds(call: Callable[[], Tensor], rounds: int, device: str) -> float:
    """The median over rounds, after one to compile."""
    times = [timed(call, device) for _ in range(rounds + 1)]
    return 1e3 * statistics.median(times[1:])


def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    what = "milliseconds of the kernels for one layer and 16 sentences, by launch options"
    report = new_report(what, options.device, ["triton"]) | {"results": {}}
    for head_dim, length in SHAPES[options.device]:
        rows: dict[str, dict] = {}
        report["results"][f"heads of {head_dim}, {length} tokens"] = rows
        for kernel, call in calls(head_dim, length, options.device).items():
            rows[kernel] = {}
            expected = call()
            own = MODULES[kernel].launch_options
            for name, changes in OPTIONS[kernel].items():
                changed = mock.patch.object(
                    MODULES[kernel], "launch_options", lambda *args, own=own, more=changes: own(*args) | more
                )
                try:
                    with changed:
                        result = call()
                        difference = (result / expected - 1).abs().where(result != expected, 0).max()
                        rows[kernel][name] = {
                            "milliseconds": milliseconds(call, options.rounds, options.device),
                            "largest_relative_difference": float(difference),
                        }
                except Exception as error:  # options that don't compile, or ask for more than the GPU has
                    rows[kernel][name] = {"error": f"{type(error).__name__}: {error}"}
                write_report(report, options.output)
    if options.output is None:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
