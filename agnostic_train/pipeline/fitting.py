"""Trainers for a recipe: its model, its training text, and the weights that learn."""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice

from peft import get_peft_model
from transformers import PrinterCallback

from agnostic_train.corpus.encoding import Encoder, Example
from agnostic_train.corpus.purposes import check_training_text
from agnostic_train.errors import UserError
from agnostic_train.pipeline.materials import Materials
from agnostic_train.recipe import TrainingSection
from agnostic_train.training.guarded import GuardedTrainer
from agnostic_train.training.strategy import Choice
from agnostic_train.training.trainer import NeuronTrainer, NeuronTrainingArguments


def make_trainer(
    materials: Materials,
    arguments: NeuronTrainingArguments,
    choice: Choice,
    training: Mapping[str, Sequence[str]],
    validation: Mapping[str, Sequence[str]] | None = None,
) -> GuardedTrainer:
    """Returns a trainer for the recipe's model, in which the chosen weights learn.

    Args:
        training: per language, the sentences to train on.
        validation: per language, sentences to evaluate during training, as `eval_strategy` says.

    Training modifies the model in `materials`; call `Materials.forget_model` afterwards.

    Raises:
        UserError: a language has no training sentence, or an epoch no batch.
    """
    encoder = materials.encoder
    section = materials.recipe.training
    examples = training_examples(encoder, training, section)
    check_batches(len(examples), arguments)
    settings = dict(args=arguments, train_dataset=examples, data_collator=encoder.collate)
    if validation is not None:
        settings["eval_dataset"] = {
            language: encoder.examples(lines, f"validation text of {language}")
            for language, lines in validation.items()
        }
    model = materials.model
    if choice.neurons is not None:
        trainer = NeuronTrainer(model, **settings, neurons=choice.neurons, update=section.update)
    else:
        trainer = GuardedTrainer(model if choice.lora is None else get_peft_model(model, choice.lora), **settings)
    if not arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)  # the progress bar shows what it would print
    return trainer


def training_examples(
    encoder: Encoder, training: Mapping[str, Sequence[str]], section: TrainingSection
) -> list[Example]:
    """An epoch's sequences, one language after the other; raises `UserError` if a language has no sentence.

    training: per language, the sentences to train on. section: whether to pack sentences, and how to mix languages.
    """
    examples, make_examples = {}, encoder.packed_examples if section.packing else encoder.examples
    for language, sentences in training.items():
        check_training_text(language, sentences)
        examples[language] = make_examples(sentences, f"training text of {language}")
    sizes = epoch_sizes({language: len(rows) for language, rows in examples.items()}, section)
    return [row for language, rows in examples.items() for row in islice(cycle(rows), sizes[language])]


def check_batches(num_sequences: int, arguments: NeuronTrainingArguments) -> None:
    """Raises `UserError` if incomplete batches are dropped and an epoch has no complete one."""
    batch = arguments.train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and num_sequences < batch:
        raise UserError(
            f"training.dataloader_drop_last: an epoch's {num_sequences} sequences don't fill a batch of {batch}, so "
            "nothing is left to train on; set it to false, or lower training.per_device_train_batch_size"
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


def epoch_sizes(available: Mapping[str, int], section: TrainingSection) -> dict[str, int]:
    """The number of sequences of each language in an epoch, given the number available."""
    mixture = section.mixture
    if mixture is None:
        return dict(available)
    per_share = max(available[language] / mixture[language] for language in section.languages)
    return {language: max(1, round(per_share * mixture[language])) for language in available}
