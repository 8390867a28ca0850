"""`train`: trains the weights that the strategy chooses on the training text."""

import shutil
from pathlib import Path
from statistics import fmean

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME

from agnostic_train.errors import UserError
from agnostic_train.files import public_name, share_as_usual, whole_directory, whole_file
from agnostic_train.model.loading import load_empty_model
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.pipeline.fitting import make_trainer, train_to_end
from agnostic_train.pipeline.materials import Materials
from agnostic_train.pipeline.settings import evaluates_during_training, make_strategy
from agnostic_train.pipeline.stages.context import Context, StageResult
from agnostic_train.pipeline.training_text import Sentences, count_batches, describe_text, training_examples
from agnostic_train.processes import of_first_process
from agnostic_train.scores.result import AgnosticScore
from agnostic_train.training.checkpoints import NEURONS_FILE, saved_checkpoints
from agnostic_train.training.guarded import GuardedTrainer
from agnostic_train.training.strategy import BASELINES, Choice
from agnostic_train.training.trainer import NeuronTrainingArguments

ADAPTER = "adapter"
_ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, NEURONS_FILE)


def check_files(materials: Materials) -> None:
    """Raises `UserError` if the model or the file of neurons can't be trained."""
    section = materials.recipe.training
    strategy, update = section.strategy, section.update
    plain = f"strategy {strategy!r}" if strategy in BASELINES else f"update {update!r}" if update == "mask" else None
    materials.check_trainable(plain and f"training.{plain}")
    if section.neurons is not None:
        read_neurons(section.neurons, load_empty_model(materials.model_section))


def check_text(materials: Materials, arguments: NeuronTrainingArguments) -> None:
    """Raises `UserError` if there is too little text."""
    recipe = materials.recipe
    count_batches(recipe, arguments, materials.encoder, materials.training_text, recipe.training.has_pilot)


def train(context: Context) -> StageResult:
    recipe, arguments = context.recipe, context.arguments
    training: Sentences = context.materials.training_text
    if recipe.training.has_pilot:
        # The pilot may have been launched with another number of processes, and so have read another number.
        read = context.manifest.record("pilot")["for_training"]["sentences_read"]
        training = {language: sentences[: len(sentences) - read[language]] for language, sentences in training.items()}
    choice = _choose(context)
    context.say(f"train: {choice.reason}")
    set_seed(arguments.seed)
    validation = None
    if evaluates_during_training(arguments):
        validation = {language: text.validation for language, text in context.materials.corpus.texts.items()}
    examples = training_examples(context.materials.encoder, training, recipe.training)
    trainer = make_trainer(context.materials, arguments, choice, examples, validation)
    checkpoints = saved_checkpoints(context.directory)
    if checkpoints:
        context.say(f"train: resumed from {checkpoints[-1].name}")
    train_to_end(trainer, checkpoints[-1] if checkpoints else None)
    context.materials.forget_model()
    checkpoint = _save(context, trainer)
    outputs = [checkpoint.name, TRAINER_STATE_NAME]
    adapted = choice.lora is not None or (choice.neurons is not None and recipe.training.update == "compact")
    if adapted:
        _copy_adapter(context, checkpoint)
        outputs.append(ADAPTER)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The first and the last alone are of other sentences, and would say little about each other.
    mean_loss = f", mean loss {fmean(losses):.3f}" if losses else ""
    context.say(f"train: {trainer.state.global_step} steps{mean_loss}")
    facts = {
        "checkpoint": checkpoint.name,
        "adapter": ADAPTER if adapted else None,
        "strategy": choice.strategy,
        "reason": choice.reason,
        "neurons": choice.neurons.counts() if choice.neurons else None,
        "text": describe_text(recipe.training, context.materials.encoder.max_length),
    }
    return StageResult(outputs, facts=facts)


def publish(context: Context) -> None:
    """Withdraws the ranking of an earlier pilot if this training had none."""
    if not context.recipe.training.has_pilot:
        context.publish_tables({"pilot": None})


def read_neurons(file: str, model: nn.Module) -> NeuronSet:
    """Reads the neurons of `training.neurons`; raises `UserError` if the file holds none, or another model's."""
    neurons = NeuronSet.read(file, model)
    if not len(neurons):
        raise UserError(f"training.neurons: {file} holds no neuron; name another file")
    return neurons


def check_strategy(context: Context) -> None:
    """Raises `UserError` for a strategy that chooses nothing to train, before an earlier training is replaced."""
    _choose(context)


def is_adapter_file(path: Path) -> bool:
    """Whether a path is a file of `adapter/`."""
    return path.name in _ADAPTER_FILES


def _choose(context: Context) -> Choice:
    has_pilot, file = context.recipe.training.has_pilot, context.recipe.training.neurons
    if file is not None:
        neurons = read_neurons(file, context.materials.model)
        return Choice("file", neurons, f"{len(neurons)} neurons from {public_name(file)}")
    name = context.manifest.record("pilot")["strategy"] if has_pilot else context.recipe.training.strategy
    strategy = make_strategy(context.recipe, name, context.arguments.seed)
    score = AgnosticScore.load(context.directory / "score.json") if strategy.needs_score else None
    detected = None if name == "full" else context.load_neurons()
    choice = strategy.choose(detected, score, context.materials.model)
    if choice.neurons is None:
        return choice
    # A pilot that ranks anew may list the same neurons under another name.
    reason = "the best of the pilot" if has_pilot else choice.reason
    return Choice(choice.strategy, choice.neurons, f"{len(choice.neurons)} neurons: {reason}")


def _save(context: Context, trainer: GuardedTrainer) -> Path:
    """Saves what the Trainer hasn't; returns the checkpoint that is the training's result, the best or the last one."""
    arguments, state = context.arguments, trainer.state
    checkpoint = context.directory / f"checkpoint-{state.global_step}"
    if arguments.load_best_model_at_end and state.best_model_checkpoint is not None:
        checkpoint = Path(state.best_model_checkpoint)
    # Asked by one process: saving takes all of them, and another may look when it has begun.
    is_saved = of_first_process((checkpoint / TRAINER_STATE_NAME).exists())
    if not is_saved:
        trainer.save_model(str(checkpoint))
    # Of a resumed training, the summary counts only the steps since then.
    state.log_history = [entry for entry in state.log_history if "train_runtime" not in entry]
    if context.processes.is_main_process:
        for saved in saved_checkpoints(context.directory):
            share_as_usual(saved)
    if arguments.should_save:
        # As `Trainer.save_state` does, but whole or not at all. The state in the best checkpoint ends there.
        for folder in [context.directory] if is_saved else [checkpoint, context.directory]:
            with whole_file(folder / TRAINER_STATE_NAME) as temporary:
                state.save_to_json(str(temporary))
    return checkpoint


def _copy_adapter(context: Context, checkpoint: Path) -> None:
    """Copies the trained adapter from its checkpoint to `adapter/`, without optimizer and trainer state."""
    if context.processes.is_main_process:
        with whole_directory(context.directory / ADAPTER, is_adapter_file) as temporary:
            for name in _ADAPTER_FILES:
                if (checkpoint / name).exists():  # a LoRA has no file of neurons
                    shutil.copyfile(checkpoint / name, temporary / name)
