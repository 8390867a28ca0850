"""The text to train on: whether there is enough, what a pilot gets of it, and how an epoch packs and mixes it."""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from math import ceil, floor

from agnostic_train.corpus.encoding import Encoder, Example
from agnostic_train.errors import UserError
from agnostic_train.recipe import Recipe, TrainingSection
from agnostic_train.training.trainer import NeuronTrainingArguments

Sentences = Mapping[str, Sequence[str]]
"""The sentences to train on, by language."""


def count_batches(
    recipe: Recipe,
    arguments: NeuronTrainingArguments,
    encoder: Encoder,
    training: Mapping[str, Sequence],
    has_pilot: bool,
    is_read: bool = True,
) -> int:
    """Counts the batches per process in an epoch; packed text is estimated.

    Args:
        training: per language, the sentences; without `is_read`, any sequences of these lengths.
        has_pilot: whether a pilot gets some of them.

    Raises:
        UserError: there is too little text: none of a language, less than the pilot needs, or no complete batch.
    """
    section = recipe.training
    _check_each_language(training)
    if has_pilot and (is_read or not section.packing):
        training, _ = split_pilot_text(recipe, arguments, encoder, training)
    sequences: dict[str, float] = {language: len(sentences) for language, sentences in training.items()}
    if section.packing and is_read:
        for language, sentences in training.items():
            sequences[language] /= encoder.sentences_packed(sentences, f"training text of {language}")
    in_epoch = sum(_epoch_sizes({language: ceil(number) for language, number in sequences.items()}, section).values())
    if is_read or not section.packing:
        check_batches(in_epoch, arguments)
    batch = arguments.train_batch_size * arguments.world_size
    if not arguments.dataloader_drop_last:
        return ceil(in_epoch / batch)
    # `batch_rebalance` drops incomplete optimizer steps, the others incomplete batches.
    whole = arguments.gradient_accumulation_steps if arguments.train_sampling_strategy == "batch_rebalance" else 1
    return floor(in_epoch / (batch * whole)) * whole


def split_pilot_text(
    recipe: Recipe, arguments: NeuronTrainingArguments, encoder: Encoder, training: Sentences
) -> tuple[Sentences, Sentences]:
    """Splits the training sentences: those for the main training, and as many as a pilot reads once.

    For packed text, the second number is an estimate.

    Raises:
        UserError: the pilot would take more than half of a language's sentences.
    """
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    shares = recipe.training.mixture or dict.fromkeys(training, 1.0)
    proper, pilot = {}, {}
    for language, sentences in training.items():
        num_sequences = recipe.training.pilot_steps * batch * shares[language] / sum(shares.values())
        if recipe.training.packing:
            num_sequences *= encoder.sentences_packed(sentences, f"training text of {language}")
        wanted = ceil(num_sequences)
        if 2 * wanted > len(sentences):
            raise UserError(
                f"training.pilot_steps: {recipe.training.pilot_steps} steps read {wanted} sentences of {language!r}, "
                f"more than half of its {len(sentences)}; lower it or add text"
            )
        proper[language] = sentences[: len(sentences) - wanted]
        pilot[language] = sentences[len(sentences) - wanted :]
    return proper, pilot


def training_examples(encoder: Encoder, training: Sentences, section: TrainingSection) -> list[Example]:
    """Returns an epoch's sequences, one language after the other; raises `UserError` if a language has no sentence.

    section: whether to pack sentences, and how to mix languages.
    """
    _check_each_language(training)
    make_examples = encoder.packed_examples if section.packing else encoder.examples
    examples = {it: make_examples(sentences, f"training text of {it}") for it, sentences in training.items()}
    sizes = _epoch_sizes({language: len(rows) for language, rows in examples.items()}, section)
    return [row for language, rows in examples.items() for row in islice(cycle(rows), sizes[language])]


def check_batches(num_sequences: int, arguments: NeuronTrainingArguments) -> None:
    """Raises `UserError` if incomplete batches are dropped and an epoch has no complete one."""
    batch = arguments.train_batch_size * arguments.world_size
    if arguments.train_sampling_strategy == "batch_rebalance":  # see `count_batches`
        batch *= arguments.gradient_accumulation_steps
    if arguments.dataloader_drop_last and num_sequences < batch:
        raise UserError(
            f"training.dataloader_drop_last: an epoch's {num_sequences} sequences don't fill a batch of {batch}, so "
            "nothing is left to train on; set it to false, or lower training.per_device_train_batch_size or "
            "training.gradient_accumulation_steps"
        )


def describe_text(section: TrainingSection, max_length: int | None) -> str:
    """Describes in words how the text is mixed and packed; empty if it is neither."""
    parts = []
    if section.mixture is not None:
        total = sum(section.mixture.values())
        parts.append(", ".join(f"{language} {share / total:.3g}" for language, share in section.mixture.items()))
    if section.packing:
        parts.append(f"sentences packed to {max_length} tokens")
    return "; ".join(parts)


def _check_each_language(training: Mapping[str, Sequence]) -> None:
    for language, sentences in training.items():
        if not len(sentences):
            raise UserError(
                f"corpus.detection_sentences: detection takes every train sentence of {language!r} and leaves none to "
                "train on; lower it or add text"
            )


def _epoch_sizes(available: Mapping[str, int], section: TrainingSection) -> dict[str, int]:
    """The number of sequences of each language in an epoch, given the number available."""
    mixture = section.mixture
    if mixture is None:
        return dict(available)
    per_share = max(available[language] / mixture[language] for language in section.languages)
    return {language: max(1, round(per_share * mixture[language])) for language in available}
