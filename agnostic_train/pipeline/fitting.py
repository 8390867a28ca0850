"""Training for a recipe: its model, its text, and the weights that learn."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import get_peft_model

from agnostic_train.corpus.encoding import Example
from agnostic_train.pipeline.materials import Materials
from agnostic_train.pipeline.training_text import check_batches
from agnostic_train.training.guarded import GuardedTrainer
from agnostic_train.training.strategy import Choice
from agnostic_train.training.trainer import NeuronTrainer, NeuronTrainingArguments


def make_trainer(
    materials: Materials,
    arguments: NeuronTrainingArguments,
    choice: Choice,
    examples: Sequence[Example],
    validation: Mapping[str, Sequence[str]] | None = None,
) -> GuardedTrainer:
    """Returns a trainer for the recipe's model, in which the chosen weights learn.

    Args:
        examples: what to train on.
        validation: per language, sentences to evaluate during training, as `eval_strategy` says.

    Training modifies the model in `materials`; call `Materials.forget_model` afterwards.

    Raises:
        UserError: an epoch has no batch.
    """
    encoder = materials.encoder
    check_batches(len(examples), arguments)
    settings = dict(args=arguments, train_dataset=examples, data_collator=encoder.collate)
    if validation is not None:
        settings["eval_dataset"] = {
            language: encoder.examples(lines, f"validation text of {language}")
            for language, lines in validation.items()
        }
    model = materials.model
    if choice.neurons is not None:
        return NeuronTrainer(model, **settings, neurons=choice.neurons, update=materials.recipe.training.update)
    return GuardedTrainer(model if choice.lora is None else get_peft_model(model, choice.lora), **settings)


def train_to_end(trainer: GuardedTrainer, checkpoint: Path | None = None) -> None:
    """Trains to the last step, from a checkpoint if there is one.

    Raises:
        KeyboardInterrupt: a signal ended the training early (`enable_jit_checkpoint`), so its result isn't one.
    """
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
