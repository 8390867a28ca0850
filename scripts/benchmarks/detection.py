"""What detection costs, as a multiple of the model's own forward pass with logits.

Everything is measured in one process, in turns, and reported as ratios of medians: absolute times say little on shared
machines. Writes a JSON file with the machine, the versions and the date.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agnostic_train.detection import TopCounts
from agnostic_train.impact import ImpactMeter
from agnostic_train.inference import left_as_found

WITHOUT_SOFTMAX = ("gate", "up", "down", "v", "o")
SHAPES = {
    "cpu": dict(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    ),
    "cuda": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64,
    ),
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=list(SHAPES))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, nargs="+", default=[64])
    parser.add_argument("--top-ratio", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file; standard output by default")
    return parser


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: LlamaForCausalLM, batch: dict, top_ratio: float, rounds: int, device: str) -> dict:
    """Median seconds of the forward pass, and what detecting costs as multiples of it."""

    def detect(projections: tuple[str, ...] | None) -> None:
        with ImpactMeter(model, projections) as meter:
            meter.measure(batch, TopCounts(top_ratio).add)

    candidates = {
        "forward": lambda: model(**batch),
        "feed-forward, v and o": lambda: detect(WITHOUT_SOFTMAX),
        "everything, exact": lambda: detect(None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with left_as_found(model):
        for turn in range(rounds + 1):
            for name, function in candidates.items():
                taken = timed(function, device)
                if turn:  # the first turn warms up
                    seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    forward = medians.pop("forward")
    return {"forward_seconds": forward, "times_forward": {name: value / forward for name, value in medians.items()}}


def main() -> None:
    options = make_parser().parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[options.device])).to(options.device, dtype).eval()
    results = {}
    for length in options.length:
        input_ids = torch.randint(0, model.config.vocab_size, (options.batch_size, length), device=options.device)
        batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        results[str(length)] = measure(model, batch, options.top_ratio, options.rounds, options.device)
    cuda = options.device == "cuda"
    report = {
        "what": "cost of detection as a multiple of the forward pass with logits, by sentence length in tokens",
        "machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("agnostic_train", "torch", "transformers")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "shapes": SHAPES[options.device],
        "batch_size": options.batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "top_ratio": options.top_ratio,
        "rounds": options.rounds,
        "by_length": results,
    }
    text = json.dumps(report, indent=1) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
