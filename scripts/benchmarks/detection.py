"""What detection costs, as a multiple of the model's own forward pass with logits, and how the cost grows.

Everything is measured in one process, in turns, and reported as ratios of medians: absolute times say little on shared
machines. The report also gives the arithmetic floor: the multiple for the matrix products alone, if all run equally
fast. Without `--model`, the weights are random, in the shapes of `SHAPES`; with it, a trained model reads real
sentences of `--corpus`. Writes a JSON file with the machine, the versions and the date, and a figure of the growth.
"""

import argparse
import json
import resource
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from measuring import new_report, positive, timed, write_report
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from agnostic_train.detection.top_counts import TopCounts
from agnostic_train.impact import kernel_trial
from agnostic_train.impact.hooks import ImpactMeter
from agnostic_train.impact.pruning import Work
from agnostic_train.model.decoder import find_decoder
from agnostic_train.model.inference import left_as_found

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
GROWTH_RATIOS = (0.01, 0.02, 0.05, 0.1)
GROWTH_LENGTHS = (32, 64, 128, 256, 512)
GROWTH_SENTENCES = (16, 64, 256)
TOKENS_PER_GROWTH_BATCH = 1024

Batch = dict[str, torch.Tensor]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=list(SHAPES))
    parser.add_argument("--family", default="llama", help="model_type of the random model; qwen3 normalises q and k")
    parser.add_argument("--model", help="a trained model's folder; random weights without it")
    parser.add_argument("--corpus", default="../shared/data/corpus", help="text for --model")
    parser.add_argument("--languages", nargs="+", default=["en", "zh", "sw", "de", "fr"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--batches",
        type=int,
        default=1,
        help="random batches per detection; on a CPU the first decides whether pruning pays",
    )
    parser.add_argument("--length", type=int, nargs="+", default=[64], help="tokens, for random weights")
    parser.add_argument("--top-ratio", type=float, default=0.05)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--no-unpruned", action="store_true", help="leave out the measurement without pruning")
    parser.add_argument("--growth", action="store_true", help="also measure growth, with random tokens")
    parser.add_argument("--output", type=Path, help="JSON file; standard output by default")
    parser.add_argument("--figure", type=Path, help="SVG or PNG file of the growth")
    return parser


def detect(
    model: PreTrainedModel, batches: list[Batch], top_ratio: float, projections=None, pruning: bool = True
) -> dict[str, Work]:
    """Counts each site's top neurons; returns how many q and k neurons and logits were computed exactly."""
    counts = TopCounts(top_ratio)
    with ImpactMeter(model, projections, top_ratio=top_ratio if pruning else None) as meter:
        for batch in batches:
            counts.add(meter.measure(batch))
    return meter.work


def count_operations(model: PreTrainedModel, function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in a call, which may return the work of a detection."""
    with FlopCounterMode(display=False) as counter:
        work = function()
    total = counter.get_total_flops()
    layer = find_decoder(model).layers[0]
    if isinstance(work, dict) and kernel_trial.available(torch.empty(0, 1, layer.head_dim, device=model.device)):
        # The counter doesn't see inside the kernels, which multiply each changed logit by its value vector.
        heads = {"q": 1, "k": layer.queries_per_kv}
        total += sum(2 * layer.head_dim * (it.logits + it.rough_logits) * heads[name] for name, it in work.items())
    return total


def in_turns(candidates: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each candidate, after one turn as a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, function in candidates.items():
            taken = timed(function, device)
            if turn:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(model: PreTrainedModel, batches: list[Batch], options: argparse.Namespace, top_ratio: float) -> dict:
    """Median seconds of the forward pass, and the cost of detection as multiples of it."""
    candidates: dict[str, Callable[[], object]] = {
        "forward": lambda: [model(**batch) for batch in batches],
        "feed-forward, v and o": lambda: detect(model, batches, top_ratio, WITHOUT_SOFTMAX),
        "everything, exact": lambda: detect(model, batches, top_ratio),
    }
    if not options.no_unpruned:
        candidates["everything, exact, without pruning"] = lambda: detect(model, batches, top_ratio, pruning=False)
    with left_as_found(model):
        medians = in_turns(candidates, options.rounds, options.device)
        work = detect(model, batches, top_ratio)
        operations = {name: count_operations(model, function) for name, function in candidates.items()}
    forward = medians.pop("forward")
    return {
        "forward_seconds": forward,
        "microseconds_per_token": {
            name: seconds * 1e6 / sum(int(batch["attention_mask"].sum()) for batch in batches)
            for name, seconds in medians.items()
        },
        "times_forward": {name: value / forward for name, value in medians.items()},
        "arithmetic_floor": {name: operations[name] / operations["forward"] for name in medians},
        "computed_exactly": {
            name: {"neurons": it.neurons / it.all_neurons, "logits": it.logits / it.all_logits}
            for name, it in work.items()
        },
    }


def random_batches(model: PreTrainedModel, num_sentences: int, length: int, batch_size: int) -> list[Batch]:
    device = model.device
    batches = []
    for start in range(0, num_sentences, batch_size):
        shape = (min(batch_size, num_sentences - start), length)
        input_ids = torch.randint(0, model.config.vocab_size, shape, device=device)
        batches.append({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})
    return batches


def real_batches(model: PreTrainedModel, options: argparse.Namespace) -> list[Batch]:
    """One batch of each language's training sentences."""
    # Imported here, because random weights don't need the packages that read recipes and text.
    from agnostic_train.corpus.encoding import Encoder
    from agnostic_train.corpus.purposes import load_corpus
    from agnostic_train.recipe import CorpusSection

    section = CorpusSection(
        path=options.corpus,
        languages=options.languages,
        detection_sentences=options.batch_size,
        max_length=96,
    )
    encoder = Encoder.of(AutoTokenizer.from_pretrained(options.model), section, model.config)
    batches = []
    for language, text in load_corpus(section).texts.items():
        for batch in encoder.batches(text.detection, language, batch_size=options.batch_size):
            batches.append({name: batch[name].to(options.device) for name in ("input_ids", "attention_mask")})
    return batches


def peak_memory(device: str) -> float:
    """Peak memory of the process (or the GPU's allocator) so far, in GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def growth_by_sentences(model: PreTrainedModel, options: argparse.Namespace) -> dict:
    """Cost and peak memory against the number of sentences; measured first, as a process's peak never falls."""
    length = options.length[0]
    memory = {}
    with left_as_found(model):
        # A warm-up, because kernels are compiled at their first use.
        detect(model, random_batches(model, options.batch_size, length, options.batch_size), options.top_ratio)
        for num_sentences in GROWTH_SENTENCES:
            batches = random_batches(model, num_sentences, length, options.batch_size)
            seconds = timed(partial(detect, model, batches, options.top_ratio), options.device)
            tokens = num_sentences * length
            memory[num_sentences] = {
                "microseconds_per_token": seconds * 1e6 / tokens, "peak_gib": peak_memory(options.device)
            }  # fmt: skip
    return memory


def growth_by_ratio(model: PreTrainedModel, options: argparse.Namespace) -> dict:
    """Cost against the top ratio."""
    batches = random_batches(model, options.batches * options.batch_size, options.length[0], options.batch_size)
    return {ratio: measure(model, batches, options, ratio) for ratio in GROWTH_RATIOS}


def growth_by_length(model: PreTrainedModel, options: argparse.Namespace) -> dict:
    """Cost against the number of tokens in a sentence."""
    by_length = {}
    for length in GROWTH_LENGTHS:
        size = max(1, TOKENS_PER_GROWTH_BATCH // length)
        batches = random_batches(model, options.batches * size, length, size)
        by_length[length] = measure(model, batches, options, options.top_ratio)
    return by_length


def draw(report: dict, file: Path) -> None:
    """Draws the growth in four panels, with a marker and line style for each curve."""
    growth_report = report["growth"]
    styles = {
        "feed-forward, v and o": "k:s", "everything, exact": "k-o", "everything, exact, without pruning": "k--^"
    }  # fmt: skip
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    panels = (
        (axes[0, 0], "by_length", "times_forward", "tokens per sentence", "multiple of a forward pass"),
        (axes[0, 1], "by_length", "microseconds_per_token", "tokens per sentence", "microseconds per token"),
        (axes[1, 0], "by_ratio", "times_forward", "top ratio", "multiple of a forward pass"),
    )
    for axis, part, quantity, label, unit in panels:
        for name, style in styles.items():
            points = [(float(x), it[quantity][name]) for x, it in growth_report[part].items() if name in it[quantity]]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=name, markerfacecolor="white")
        axis.set(xlabel=label, ylabel=unit, xscale="log", ylim=(0, None))
        ticks = [float(x) for x in growth_report[part]]
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
    axes[0, 0].legend(fontsize="small")
    sentences = [float(x) for x in growth_report["by_sentences"]]
    axes[1, 1].plot(
        sentences, [it["peak_gib"] for it in growth_report["by_sentences"].values()], "k-o", markerfacecolor="white"
    )
    highest = max(it["peak_gib"] for it in growth_report["by_sentences"].values())
    axes[1, 1].set(xlabel="sentences", ylabel="peak memory, GiB", ylim=(0, 1.2 * highest))
    figure.suptitle(f"Detection on {report['machine']}, {report['date']}")
    figure.savefig(file)


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    if options.figure is not None and not options.growth:
        parser.error("--figure: shows the growth, which needs --growth")
    torch.manual_seed(0)
    cuda = options.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if options.model is None:
        config = AutoConfig.for_model(options.family, **SHAPES[options.device])
        with torch.device(options.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        num_sentences = options.batches * options.batch_size
        inputs = {length: random_batches(model, num_sentences, length, options.batch_size) for length in options.length}
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device).eval()
        inputs = {"real sentences": real_batches(model, options)}
    what = "cost of detection as a multiple of the forward pass with logits, and growth"
    report = new_report(what, options.device, ["transformers"]) | {
        "model": options.model or {"model_type": options.family} | SHAPES[options.device],
        "batch_size": options.batch_size,
        "batches": None if options.model else options.batches,
        "dtype": str(dtype).removeprefix("torch."),
        "top_ratio": options.top_ratio,
        "rounds": options.rounds,
        "kernels": kernel_trial.available(
            torch.empty(0, 1, find_decoder(model).layers[0].head_dim, device=model.device)
        ),
        "by_length": {},
    }
    if options.growth:
        report["growth"] = {"by_sentences": growth_by_sentences(model, options)}
        write_report(report, options.output)
    for length, batches in inputs.items():
        report["by_length"][str(length)] = measure(model, batches, options, options.top_ratio)
        write_report(report, options.output)
    if options.growth:
        for name, grow in (("by_ratio", growth_by_ratio), ("by_length", growth_by_length)):
            report["growth"][name] = grow(model, options)
            write_report(report, options.output)
    if options.output is None:
        print(json.dumps(report, indent=1))
    if options.figure is not None:
        draw(report, options.figure)


if __name__ == "__main__":
    main()
