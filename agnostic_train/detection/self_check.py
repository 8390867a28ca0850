"""Compares a few impacts with real deactivation before a detection.

A family that computes something that the formulas don't know would give impacts that look plausible but are wrong. The
check takes single layers out of the model, in float32 so that rounding can't hide a wrong formula. It runs them on
their real inputs, with and without a neuron, through transformers' own eager attention.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from agnostic_train.errors import UserError
from agnostic_train.impact.hooks import DEFAULT_MEMORY_GB, LayerObserver, observed_attention
from agnostic_train.impact.pass_cache import PassCache
from agnostic_train.model.batches import Batch, check_tokens, model_inputs, real_and_counted
from agnostic_train.model.decoder import (
    ATTENTION_PROJECTIONS,
    PROJECTIONS,
    Layer,
    check_projections,
    find_decoder,
    float32_copy,
)
from agnostic_train.model.inference import left_as_found
from agnostic_train.neurons.deactivation import deactivated
from agnostic_train.processes import check_whole

TOLERANCE = 1e-3
"""Largest accepted difference, as a fraction of the site's largest impact in that sentence."""
ROUNDING = 16 * torch.finfo(torch.float32).eps
"""How far rounding alone may move a layer's output, as a fraction of the output's norm."""
NEURONS_PER_SITE, NUM_SENTENCES = 2, 2
MIN_VARIETY, NUM_APPENDED = 8, 16
"""A sentence with fewer different tokens is checked with this many random ones appended."""
_SEED = 0


class ImpactMismatchError(UserError):
    """The impacts of a model don't equal real deactivation.

    Args:
        message: one line.
        table: the comparisons, as lines of text.
    """

    def __init__(self, message: str, table: str):
        super().__init__(message)
        self.table = table


@dataclass(frozen=True)
class Comparison:
    """The comparison of one neuron in one sentence.

    Attributes:
        impact: computed by the formulas.
        deactivated: how far real deactivation moves the output.
        largest: the site's largest impact in that sentence.
        output: the norm of the unchanged output.
    """

    layer: int
    projection: str
    neuron: int
    impact: float
    deactivated: float
    largest: float
    output: float

    @property
    def error(self) -> float:
        """Difference beyond rounding, as a fraction of the site's largest impact; infinite if not a finite number."""
        difference = abs(self.impact - self.deactivated)
        if not math.isfinite(difference):
            return math.inf
        return max(difference - ROUNDING * self.output, 0.0) / max(self.largest, 1e-12)


def verify_impacts(
    model: nn.Module,
    batch: Batch,
    pruning: bool = True,
    projections: Sequence[str] = PROJECTIONS,
    memory_gb: float = DEFAULT_MEMORY_GB,
) -> list[Comparison]:
    """Compares impacts with real deactivation in the first, middle and last layer, and one layer of every other kind.

    The cost is one forward pass of the model on `NUM_SENTENCES` sentences and, per checked layer, one measuring pass of
    that layer and `NEURONS_PER_SITE + 2` plain ones per projection.

    Args:
        model: left as found.
        batch: real sentences, as for `neuron_impacts`; the `NUM_SENTENCES` longest are used, with random tokens
            appended to those with fewer than `MIN_VARIETY` different ones. For each projection, `NEURONS_PER_SITE`
            random neurons are checked, and the one of largest impact in the longest sentence.
        pruning: check the impacts computed with certified pruning, here for all neurons, rather than those without it.
        projections: which to check.
        memory_gb: as for `ImpactMeter`.

    Returns: all comparisons.

    Raises:
        ImpactMismatchError: an impact is off by more than `TOLERANCE` after what rounding explains is subtracted.
        UserError: the model's attention isn't supported at all, or the model computes NaN.
        ValueError: a batch of wrong shapes, or with tokens beyond the model's vocabulary.
    """
    projections = check_projections(projections, model)
    check_whole(model, "the self-check")
    find_decoder(model).check_on_devices("detection")
    inputs = model_inputs(model, batch)
    check_tokens(model, inputs["input_ids"])
    # Short sentences could hide a wrong rotation or window, so the longest are used.
    longest = inputs["attention_mask"].sum(1).cpu().argsort(descending=True)[:NUM_SENTENCES]
    parts = ("input_ids", "attention_mask", "special_tokens_mask")
    batch = {name: batch[name][longest] for name in parts if batch.get(name) is not None}
    batch = _varied(batch, model.get_input_embeddings().weight)
    try:
        with left_as_found(model):
            comparisons = []
            generator = torch.Generator().manual_seed(_SEED)
            for excerpt in _excerpts(model, batch, _layers_to_check(find_decoder(model).layers), projections):
                comparisons += _compare(excerpt, generator, pruning, memory_gb)
                del excerpt  # frees this layer before the next one is copied
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # these say nothing about the model's family
    except (RuntimeError, LookupError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(
            f"model.name: {type(model).__name__} isn't supported: its attention can't be followed "
            f"({type(error).__name__}: {error})"
        ) from error
    worst = max(comparisons, key=lambda comparison: comparison.error)
    if worst.error > TOLERANCE:
        raise ImpactMismatchError(
            f"model.name: {type(model).__name__} isn't supported: impacts don't equal real deactivation (layer "
            f"{worst.layer} {worst.projection} neuron {worst.neuron}: impact {worst.impact:.5g}, deactivated "
            f"{worst.deactivated:.5g}); use a model of another family",
            comparison_table(comparisons),
        )
    return comparisons


def _varied(batch: Batch, embeddings: Tensor) -> Batch:
    """Appends random tokens to sentences with few different ones.

    Attention over equal values, or over a single token, has no effect: any q and k impacts would pass. If a sentence is
    changed, all tokens of the batch count.
    """
    ids = batch["input_ids"]
    masks = batch.get("attention_mask", torch.ones_like(ids))
    rows = [row[mask.bool()] for row, mask in zip(ids, masks, strict=True)]
    if all(len(row.unique()) >= MIN_VARIETY for row in rows):
        return batch
    shuffled = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(_SEED), device="cpu")
    candidates = shuffled[: 2 * NUM_APPENDED].to(embeddings.device)
    # The embedding of a token that no text has may be NaN.
    appended = candidates[embeddings[candidates].isfinite().all(1)][:NUM_APPENDED]
    rows = [row if len(row.unique()) >= MIN_VARIETY else torch.cat([row, appended.to(row)]) for row in rows]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


def _compare(excerpt: "_Excerpt", generator: torch.Generator, pruning: bool, memory_gb: float) -> list[Comparison]:
    comparisons = []
    layer, impacts = excerpt.layer, excerpt.impacts(pruning, memory_gb)
    for name in excerpt.projections:
        neurons = torch.randint(impacts[name].shape[1], (NEURONS_PER_SITE,), generator=generator, device="cpu").tolist()
        neurons.append(int(impacts[name][0].argmax()))
        before = excerpt.output(name)
        if not before.isfinite().all():
            raise UserError(
                f"model.name: the model computes NaN or Inf, in layer {layer.index} at {name}; some weight up to there "
                "is broken, or model.dtype overflows (try float32)"
            )
        norms = before.flatten(1).norm(dim=1).tolist()
        for neuron in neurons:
            with deactivated([(layer.projections[name], torch.tensor([neuron], device="cpu"))]):
                change = (excerpt.output(name) - before).flatten(1).norm(dim=1)
            for sentence, real, norm in zip(impacts[name], change.tolist(), norms, strict=True):
                impact, largest = float(sentence[neuron]), float(sentence.max())
                comparisons.append(Comparison(layer.index, name, neuron, impact, real, largest, norm))
    return comparisons


def _layers_to_check(layers: list[Layer]) -> list[int]:
    """The first, the middle and the last layer, and one layer of each kind; kinds differ in a plain attribute.

    Some families mix kinds: windowed and full attention, or with and without rotation.
    """
    kinds: dict[tuple, int] = {}
    for layer in layers:
        plain = {name: it for name, it in vars(layer.attention).items() if isinstance(it, (bool, int, float, str))}
        plain.pop("layer_idx", None)
        kinds.setdefault((type(layer.attention), *sorted(plain.items())), layer.index)
    return sorted({0, len(layers) // 2, len(layers) - 1, *kinds.values()})


def comparison_table(comparisons: list[Comparison]) -> str:
    """Formats the comparisons as lines of text."""
    lines = [f"{'layer':>6} {'projection':>10} {'neuron':>7} {'impact':>12} {'deactivated':>12} {'error':>9}"]
    for c in comparisons:
        lines.append(
            f"{c.layer:>6} {c.projection:>10} {c.neuron:>7} {c.impact:>12.5g} {c.deactivated:>12.5g} {c.error:>9.1e}"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class _Excerpt:
    """One layer taken out of the model, in float32, with the inputs of its attention and feed-forward modules.

    Attributes:
        projections: those to check.
        attention, feed_forward: positional and keyword arguments of the two modules.
        real, counted: (batch, length), bool.
    """

    layer: Layer
    projections: Sequence[str]
    attention: tuple[tuple, dict]
    feed_forward: tuple[tuple, dict]
    real: Tensor
    counted: Tensor

    def impacts(self, pruning: bool, memory_gb: float) -> dict[str, Tensor]:
        """Computes the layer's impacts: projection -> (batch, neurons)."""
        observer = LayerObserver(self.layer, self.projections, "exact", memory_gb, 1.0 if pruning else None)
        observer.begin(self.real, self.counted)
        with observer.installed(), observed_attention([observer]):
            for module, (args, kwargs) in self._calls():
                module(*args, **kwargs)
        return observer.impacts

    def output(self, projection: str) -> Tensor:
        """The output whose change the projection's impact measures, zero at uncounted tokens.

        Returns: (batch, length, features).
        """
        seen: list[Tensor] = []
        if projection in ("q", "k", "v"):
            linear = self.layer.projections["o"].linear
            handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()), prepend=True)
        else:
            linear = self.layer.projections["o" if projection == "o" else "down"].linear
            handle = linear.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        attention_call, feed_forward_call = self._calls()
        module, (args, kwargs) = attention_call if projection in ATTENTION_PROJECTIONS else feed_forward_call
        if "attention_mask" in kwargs:
            module.config._attn_implementation = "eager"
            mask = torch.zeros_like(kwargs["attention_mask"], dtype=torch.float32)
            mask.masked_fill_(~kwargs["attention_mask"], torch.finfo(torch.float32).min)
            kwargs = {**kwargs, "attention_mask": mask}
        try:
            module(*args, **kwargs)
        finally:
            handle.remove()
        return seen[0].masked_fill(~self.counted.unsqueeze(-1), 0)

    def _calls(self) -> list[tuple[nn.Module, tuple[tuple, dict]]]:
        return [(self.layer.attention, self.attention), (self.layer.feed_forward, self.feed_forward)]


def _excerpts(model: nn.Module, batch: Batch, indices: list[int], projections: Sequence[str]) -> Iterator[_Excerpt]:
    """Yields one layer at a time: float32 copies of all at once could take as much memory as the model."""
    decoder = find_decoder(model)
    calls: dict[tuple[int, str], tuple[tuple, dict]] = {}

    def keep_call(key: tuple[int, str]) -> Callable:
        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls[key] = (_in_float32(args, real), _in_float32(kwargs, real))

        return keep

    inputs = model_inputs(model, batch)
    real, counted = real_and_counted(inputs, batch)
    with ExitStack() as stack:
        # The observers measure nothing; they make the model materialise its attention masks, including sliding windows.
        cache = PassCache()
        observers = [LayerObserver(layer, [], "exact", DEFAULT_MEMORY_GB, cache=cache) for layer in decoder.layers]
        for observer in observers:
            observer.begin(real, counted)
        stack.enter_context(observed_attention(observers, decoder.backbone))
        for index in indices:
            layer = decoder.layers[index]
            for name, module in (("attention", layer.attention), ("feed_forward", layer.feed_forward)):
                hook = module.register_forward_pre_hook(keep_call((index, name)), with_kwargs=True)
                stack.callback(hook.remove)
        decoder.backbone(**inputs)
    for index in indices:
        layer = float32_copy(decoder.layers[index])
        device = layer.projections["down"].linear.weight.device
        attention, feed_forward = (calls.pop((index, name)) for name in ("attention", "feed_forward"))
        present = [name for name in layer.projections if name in projections]
        yield _Excerpt(layer, present, attention, feed_forward, real.to(device), counted.to(device))
        del layer, attention, feed_forward


def _in_float32(value, real: Tensor):
    """Converts a module's arguments to float32 and zeroes padding, whose NaN would reach sums in eager attention."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        by_token = value.dim() == 3 and value.shape[:2] == real.shape
        return value.float().masked_fill(~real.to(value.device).unsqueeze(-1), 0) if by_token else value.float()
    if isinstance(value, dict):
        return {name: _in_float32(item, real) for name, item in value.items()}
    return tuple(_in_float32(item, real) for item in value) if isinstance(value, tuple) else value
