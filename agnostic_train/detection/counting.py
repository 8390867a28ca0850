"""Counts the top neurons of one language's text, batch by batch; an interrupted count continues from its file."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from itertools import chain, islice
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from agnostic_train.choices import Attention
from agnostic_train.detection.top_counts import TopCounts, with_batch
from agnostic_train.fingerprints import fingerprint
from agnostic_train.impact.hooks import ImpactMeter
from agnostic_train.model.batches import Batch, find_device

SECONDS_BETWEEN_CHECKPOINTS = 30.0


@dataclass(frozen=True)
class CountingOptions:
    """What is counted, and how; the fields are as for `detect_neurons`."""

    top_ratio: float
    attention: Attention
    projections: Sequence[str]
    memory_gb: float
    activations: bool
    pruning: bool
    progress: bool

    def key(self, weights: str) -> str:
        """Distinguishes counts from those of other weights or settings."""
        options = [self.top_ratio, self.attention, [*self.projections], self.activations, self.pruning]
        return fingerprint([weights, options])


def count_top_neurons(
    model: nn.Module,
    batches: Iterable[Batch],
    options: CountingOptions,
    *,
    description: str,
    num_sentences: int | None,
    file: Path | None,
    key: str,
) -> tuple[TopCounts, set[int]]:
    """Counts how often each neuron is among the top of its sentence.

    Args:
        model: inside `left_as_found`.
        batches: all batches of this process, in the same order in every run.
        description, num_sentences: for the progress bar.
        file: keeps the counts so far: it is written now and then, when interrupted, and at the end. Batches that it has
            counted already are skipped; counts of other batches are discarded.
        key: see `TopCounts.load`.

    Returns: the counts, and the indices of the layers that pruning doesn't cover.
    """
    top_ratio = options.top_ratio
    counts, remaining = TopCounts(top_ratio), iter(batches)
    if file is not None:
        counts, remaining = _resumed(TopCounts.load(file, top_ratio, find_device(model), key), remaining)
    before = counts.work
    with ExitStack() as stack:
        meter = stack.enter_context(
            ImpactMeter(
                model, options.projections, options.attention, options.memory_gb,
                top_ratio if options.pruning else None, options.activations,
            )
        )  # fmt: skip
        bar = stack.enter_context(
            tqdm(
                desc=description, unit=" sentences", total=num_sentences, initial=counts.num_sentences,
                disable=not options.progress, leave=False,
            )
        )  # fmt: skip

        def save() -> None:
            counts.work = {name: before[name] + done for name, done in meter.work.items()}
            if file is not None:
                counts.save(file)

        saved, is_whole = time.monotonic(), counts.num_batches > 0
        try:
            for batch in remaining:
                impacts = meter.measure(batch)
                is_whole = False
                counts.add(impacts)
                if meter.activations is not None:
                    counts.add_activations(meter.activations.sums, meter.activations.num_tokens)
                if file is not None:
                    counts.text = with_batch(counts.text, batch)
                is_whole = True
                bar.update(len(batch["input_ids"]))
                if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    save()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            # The saved work includes that of an interrupted batch, which is computed again on resumption.
            if is_whole:
                save()
            raise
        save()
    return counts, {layer.index for layer in meter.unpruned}


def _resumed(counts: TopCounts, batches: Iterator[Batch]) -> tuple[TopCounts, Iterator[Batch]]:
    """Returns counts to continue from and the batches still to count: empty counts if these are of other batches."""
    counted = list(islice(batches, counts.num_batches))
    if len(counted) == counts.num_batches and reduce(with_batch, counted, "") == counts.text:
        return counts, batches
    return TopCounts(counts.top_ratio, counts.key), chain(counted, batches)
