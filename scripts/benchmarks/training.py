"""What a training step costs: chosen neurons (compact, mask) compared with full fine-tuning, LoRA and SHiRA.

All methods run in one process, in turns, with the same data and optimizer, and LoRA and SHiRA with about as many
trainable parameters as compact; on a GPU, all run under bfloat16 autocast. Ratios of medians are reported, because
absolute times say little on shared machines. The floor is a forward pass and the gradients of the activations alone.
Writes a JSON file with the machine, the versions and the date, and a figure of the cost of a step against the chosen
fraction.
"""

import argparse
import gc
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from measuring import new_report, positive, timed, write_report
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from agnostic_train.model.decoder import find_decoder
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.chosen import num_trainable
from agnostic_train.training.compact import NeuronConfig
from agnostic_train.training.mask import GradientMask

SHAPES = {
    "cpu": dict(
        vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64,
    ),
    "llama-3.2-1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "llama-3.1-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    ),
}  # fmt: skip
METHODS = ["floor", "compact", "mask", "full", "lora", "shira"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=list(SHAPES), default="cpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--fraction", type=float, nargs="+", default=[0.05], help="fraction of each projection's neurons to train"
    )
    parser.add_argument("--neurons", type=Path, help="file of a neuron set for these shapes, instead of a fraction")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="one method after another instead of in turns, for large models"
    )
    parser.add_argument("--output", type=Path, help="JSON file; standard output by default")
    parser.add_argument("--figure", type=Path, help="SVG or PNG file: time and memory against --fraction")
    return parser


class Step:
    """One way to train the model; a call runs one step."""

    def __init__(self, method: str, model: nn.Module, neurons: NeuronSet, batch: dict[str, Tensor]):
        self.method, self.batch = method, batch
        rank = equal_rank(model, neurons)
        if method == "floor":
            model.requires_grad_(False)
        elif method == "compact":
            model = get_peft_model(model, NeuronConfig(neurons=neurons))
        elif method == "lora":
            model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS))
        elif method == "shira":
            config = ShiraConfig(r=rank, target_modules=LINEARS)
            config.mask_fn = random_mask
            model = get_peft_model(model, config)
        self.mask = GradientMask(model, neurons) if method == "mask" else None
        self.model = model.train()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.num_trainable = num_trainable(neurons, model) if self.mask else sum(it.numel() for it in trainable)
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-5, weight_decay=0.0, fused=True) if trainable else None
        if self.mask:
            self.mask.guard(self.optimizer)

    def __call__(self) -> None:
        batch = dict(self.batch)
        if self.method == "floor":
            embedded = self.model.get_input_embeddings()(batch.pop("input_ids"))
            batch["inputs_embeds"] = embedded.detach().requires_grad_()
        # As in the Trainer with `bf16`. Without autocast, PEFT computes a LoRA of a bfloat16 model in float32.
        with torch.autocast("cuda", torch.bfloat16, enabled=self.model.device.type == "cuda"):
            loss = self.model(**batch).loss
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def optimizer_bytes(self) -> int:
        states = self.optimizer.state.values() if self.optimizer else []
        return sum(
            value.numel() * value.element_size()
            for state in states
            for value in state.values()
            if isinstance(value, Tensor) and value.ndim
        )

    def saved_bytes(self) -> int:
        """Bytes that the forward pass keeps for the backward pass: each storage once, without parameters."""
        parameters = {it.untyped_storage().data_ptr() for it in self.model.parameters()}
        storages: dict[int, int] = {}

        def pack(saved: Tensor) -> Tensor:
            if saved.layout != torch.strided:  # SHiRA's sparse deltas have no storage of their own
                return saved
            storage = saved.untyped_storage()
            if storage.data_ptr() not in parameters:
                # Kept alive, so that no other tensor reuses the address.
                kept.append(saved)
                storages[storage.data_ptr()] = storage.nbytes()
            return saved

        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            self()
        return sum(storages.values())

    def adapter_bytes(self) -> int | None:
        """Size of the saved adapter's weights; None for a method without an adapter."""
        if self.method not in ("compact", "lora", "shira"):
            return None
        with tempfile.TemporaryDirectory() as directory:
            self.model.save_pretrained(directory)
            return (Path(directory) / "adapter_model.safetensors").stat().st_size


def linears(model: nn.Module) -> list[nn.Module]:
    """The linear layers that LoRA and SHiRA train."""
    return [module for name, module in model.named_modules() if name.endswith(tuple(LINEARS))]


def equal_rank(model: nn.Module, neurons: NeuronSet) -> int:
    """The rank at which LoRA and SHiRA train as many parameters: each rank costs in + out of them per linear layer."""
    num_entries = sum(
        len(indices) * it.linear.weight.numel() // it.num_neurons
        for site, indices in neurons.items()
        for it in [find_decoder(model).projection(site)]
    )
    return max(1, round(num_entries / sum(sum(module.weight.shape) for module in linears(model))))


def takes(method: str, model: nn.Module, neurons: NeuronSet) -> bool:
    """Whether a method can train as many parameters: SHiRA can't train more than a linear layer has."""
    rank = equal_rank(model, neurons)
    return method != "shira" or all(rank * sum(it.weight.shape) <= it.weight.numel() for it in linears(model))


def random_mask(base_layer: nn.Module, r: int, **_) -> Tensor:
    """PEFT's random mask, drawn on the weight's device: on the CPU, a billion weights take half a minute."""
    weight = base_layer.weight
    chosen = torch.randperm(weight.numel(), device=weight.device)[: r * sum(weight.shape)]
    return (
        torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device).index_fill_(0, chosen, True).view_as(weight)
    )


def make_model(shapes: str, device: str) -> nn.Module:
    """A model with the same random weights at every call."""
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(**SHAPES[shapes])
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)


def measure(
    make: Callable[[], nn.Module], neurons: NeuronSet, methods: list[str], batch: dict, rounds: int, device: str
) -> dict:
    """The median step time of each method, and what it keeps in memory."""
    steps, peaks = {}, {}
    for method in methods:
        if device == "cuda":
            # A mask and its optimizer form a reference cycle, which keeps their model alive until it is collected.
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        steps[method] = Step(method, make(), neurons, batch)
        for _ in range(2):
            steps[method]()
        if device == "cuda":
            peaks[method] = torch.cuda.max_memory_allocated() - before
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(rounds):
        for method in methods:
            seconds[method].append(timed(steps[method], device))
    return {
        method: {
            "step_seconds": statistics.median(seconds[method]),
            "trainable_parameters": step.num_trainable,
            "optimizer_bytes": step.optimizer_bytes(),
            "saved_for_backward_bytes": step.saved_bytes(),
            "adapter_bytes": step.adapter_bytes(),
            "peak_bytes": peaks.get(method),
        }
        for method, step in steps.items()
    }


def draw(report: dict, file: Path) -> None:
    """Draws time and memory of a step against the chosen fraction, with a marker and line style for each method."""
    results = dict(sorted(report["results"].items(), key=lambda it: float(it[0])))
    fractions = [float(it) for it in results]
    unit = "peak_bytes" if report["settings"]["device"] == "cuda" else "saved_for_backward_bytes"
    panels = (
        ("step, multiple of the floor", lambda row, rows: row["step_seconds"] / rows["floor"]["step_seconds"]),
        (f"{unit.removesuffix('_bytes').replace('_', ' ')}, MiB", lambda row, rows: row[unit] / 2**20),
        ("optimizer state, MiB", lambda row, rows: row["optimizer_bytes"] / 2**20),
    )
    styles = {
        "floor": "k:", "compact": "k-o", "mask": "k--s", "full": "k-.^", "lora": "k--D", "shira": "k:x"
    }  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 4), layout="constrained")
    for axis, (label, value) in zip(axes, panels, strict=True):
        for method in report["settings"]["methods"]:
            points = [
                (it, value(rows[method], rows))
                for it, rows in zip(fractions, results.values(), strict=True)
                if method in rows
            ]
            if points:
                axis.plot(*zip(*points, strict=True), styles[method], label=method, markerfacecolor="white")
        axis.set(xlabel="fraction of the neurons chosen", ylabel=label, xscale="log", ylim=(0, None))
        axis.set_xticks(fractions, [f"{it:.4g}" for it in fractions])
        axis.minorticks_off()
    axes[0].legend(fontsize="small")
    figure.suptitle(f"A training step ({report['settings']['shapes']}) on {report['machine']}, {report['date']}")
    figure.savefig(file)


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.figure and "floor" not in options.methods:
        parser.error("--figure: shows multiples of the floor, which --methods must include")
    if not all(0 < it <= 1 for it in options.fraction):
        parser.error("--fraction: must be above 0 and at most 1")
    warnings.filterwarnings("ignore")

    def make() -> nn.Module:
        return make_model(options.shapes, options.device)

    ids = torch.randint(
        SHAPES[options.shapes]["vocab_size"], (options.batch_size, options.length), device=options.device
    )
    batch = {"input_ids": ids, "labels": ids}
    model = make_model(options.shapes, "meta")
    sizes = find_decoder(model).sizes
    sets = {}
    if options.neurons:
        sets[str(options.neurons)] = NeuronSet.read(options.neurons, model)
    else:
        for fraction in options.fraction:
            first = {site: range(max(1, int(size * fraction))) for site, size in sizes.items()}
            sets[str(fraction)] = NeuronSet(first, sizes).random_like(0, model)
    what = "cost of a training step by method, and what it keeps in memory"
    report = new_report(what, options.device, ["transformers", "peft"]) | {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "shapes": SHAPES[options.shapes],
        "results": {},
    }
    for name, neurons in sets.items():
        rows: dict[str, dict] = {}
        report["results"][name] = rows
        methods = [it for it in options.methods if takes(it, model, neurons)]
        for at_once in [[it] for it in methods] if options.one_at_a_time else [methods]:
            rows |= measure(make, neurons, at_once, batch, options.rounds, options.device)
            for row in rows.values():
                row["times"] = {
                    other: round(row["step_seconds"] / rows[other]["step_seconds"], 3)
                    for other in ("floor", "lora", "full")
                    if other in rows
                }
            write_report(report, options.output)
        for method, row in rows.items():
            saved, state = row["saved_for_backward_bytes"] / 2**20, row["optimizer_bytes"] / 2**20
            print(
                f"{name:>6} {method:>8} {row['trainable_parameters']:>12,} trainable  {row['step_seconds']:.3f} s  "
                f"{row['times']}  saved {saved:.1f} MiB  optimizer {state:.1f} MiB  "
                f"adapter {(row['adapter_bytes'] or 0) / 2**20:.2f} MiB"
            )
        if options.figure:
            draw(report, options.figure)
    if not options.output:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
