"""What a recipe asks of a training, made ready and checked before any work begins."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import ParallelMode
from transformers.utils import is_liger_kernel_available, logging

from agnostic_train.errors import UserError
from agnostic_train.model.loading import check_checkpoint, find_accelerator
from agnostic_train.recipe import Recipe
from agnostic_train.scores.emergence import parse_checkpoints
from agnostic_train.training.mask import OPTIMIZERS
from agnostic_train.training.strategy import BASELINES, SET_STRATEGIES, Strategy
from agnostic_train.training.trainer import NeuronTrainingArguments

logger = logging.get_logger(__name__)

# What `TrainingArguments` raises for a value that it doesn't take.
_MISTAKES = (ValueError, TypeError, ImportError, KeyError, OSError)
# Of shares of the training text: beyond it an epoch is one language's text over and over.
_MOST_TIMES = 10_000


def make_strategy(recipe: Recipe, name: str, seed: int) -> Strategy:
    """A strategy by name, with the recipe's languages and thresholds."""
    training = recipe.training
    return Strategy(name, training.languages, training.low, training.high, training.random_like, seed)


def training_arguments(recipe: Recipe, **changes) -> NeuronTrainingArguments:
    """The recipe's `TrainingArguments`, with some of them changed."""
    best = f"eval_{recipe.training.languages[0]}_loss"
    metrics = [f"eval_{language}_loss" for language in recipe.corpus.languages]
    named = recipe.training.arguments.get("metric_for_best_model")
    if named is not None and named not in [*metrics, *(it.removeprefix("eval_") for it in metrics)]:
        raise UserError(f"training.metric_for_best_model: {named!r} isn't measured; it is one of {', '.join(metrics)}")
    defaults: dict[str, Any] = (
        {"metric_for_best_model": best} if recipe.training.arguments.get("load_best_model_at_end") else {}
    )
    # On a CPU several processes need to be told so, and pinned memory warns.
    accelerator = find_accelerator() is not None
    defaults |= {"use_cpu": not accelerator, "dataloader_pin_memory": accelerator, "output_dir": recipe.output_dir}
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        # Of the launcher's mixed precision a Trainer takes note itself under every other engine.
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
        defaults |= {key: precision == key for key in ("bf16", "fp16")}
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"):
        value = recipe.training.arguments.get(key)
        # -1 is how transformers spells 'not by steps'.
        if value is not None and value <= 0 and (key, value) != ("max_steps", -1):
            raise UserError(f"training.{key}: must be above 0, not {value}")
    if recipe.training.arguments.get("resume_from_checkpoint") is not None:
        raise UserError("training.resume_from_checkpoint: an interrupted training goes on by itself; take the key out")
    for key in ("seed", "data_seed"):
        value = recipe.training.arguments.get(key)
        if value is not None and not 0 <= value < 2**32:
            raise UserError(
                f"training.{key}: must be from 0 to 2^32 - 1, not {value}"
            )  # numpy's generators take no other

    def make(**given) -> NeuronTrainingArguments:
        return NeuronTrainingArguments(
            **{**defaults, **given},
            report_to=["wandb"] if recipe.tracking.wandb else [],
            run_name=recipe.tracking.run_name,
            update=recipe.training.update,
        )

    try:
        arguments = make(**{**recipe.training.arguments, **changes})
    except _MISTAKES as error:
        raise UserError(f"{_culprit(recipe, make)}: {error}") from None
    if arguments.max_steps > 0 and {"max_steps", "num_train_epochs"} <= recipe.training.arguments.keys():
        logger.warning_once(
            f"training.max_steps: {arguments.max_steps} steps, whatever num_train_epochs says; -1 leaves it to that"
        )
    return arguments


def _culprit(recipe: Recipe, make: Callable[..., NeuronTrainingArguments]) -> str:
    """The key of `TrainingArguments` that fails on its own, or else their section."""
    for key, value in recipe.training.arguments.items():
        try:
            make(**{key: value})
        except _MISTAKES:
            return f"training.{key}"
    return "training"


def launch_inputs(arguments: NeuronTrainingArguments) -> dict[str, object]:
    """What a training takes from its launcher. One that resumes, or is compared with others, must be launched as they were."""
    return {"processes": arguments.world_size, "precision": arguments.mixed_precision}


def reads_held_out_text(arguments: NeuronTrainingArguments) -> bool:
    """Whether a training follows the loss on text that it doesn't learn from."""
    return arguments.eval_strategy != IntervalStrategy.NO or bool(arguments.eval_on_start)


def check_trainer_arguments(arguments: NeuronTrainingArguments) -> None:
    """Builds the optimizer, schedule and loader that a Trainer would, for one weight: arguments that fail there fail at once.

    Raises:
        UserError: they don't make an optimizer, a schedule or a loader, or ask for FSDP in a single process.
    """
    if arguments.fsdp and arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError("training.fsdp: needs several processes; run it under accelerate launch or torchrun")
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("training.use_liger_kernel: needs pip install liger-kernel")
    if arguments.learning_rate < 0:
        raise UserError(f"training.learning_rate: must be at least 0, not {arguments.learning_rate}")
    optim = str(getattr(arguments.optim, "value", arguments.optim))
    probe = torch.nn.Linear(1, 1)
    with _refused(f"training.optim: {optim} can't be made of learning_rate, weight_decay, adam_* and optim_*"):
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, probe)
        # Others want modules of the very model, or the model itself.
        plain = not settings.keys() & {"params", "model", "optimizer_dict"}
        optimizer = kind([probe.weight], **settings) if plain else torch.optim.SGD([probe.weight], lr=1.0)
    schedule = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type))
    with _refused(f"training.lr_scheduler_type: {schedule} can't be made of lr_scheduler_kwargs"):
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
    with _refused("training.dataloader_num_workers: no loader can be made of the dataloader_* keys"):
        DataLoader(
            [0],
            num_workers=arguments.dataloader_num_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            persistent_workers=arguments.dataloader_persistent_workers,
        )


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each library has kinds of its own for a setting that it refuses
        raise UserError(f"{what} ({type(error).__name__}: {error})") from None


def check_inputs(recipe: Recipe, arguments: NeuronTrainingArguments) -> None:
    """What would fail after hours, or destroy what it reads, is refused at the start."""
    output = Path(recipe.output_dir).resolve()
    for key, name in (("model.name", recipe.model.name), ("corpus.path", recipe.corpus.path)):
        if name and Path(name).exists() and output in (Path(name).resolve(), *Path(name).resolve().parents):
            raise UserError(f"output_dir: {key} lies in it, and would be overwritten; use another folder")
    name = recipe.training.strategy
    if name in BASELINES and recipe.export.to != "merged":
        what = "trains all weights" if name == "full" else "gives adapter/, which is one already"
        raise UserError(f"export.to: {recipe.export.to!r} needs neurons, and training.strategy {name!r} {what}")
    if recipe.training.neurons is None and name != "pilot":
        make_strategy(recipe, name, arguments.seed)  # says what it lacks
    if recipe.training.neurons is not None and name not in SET_STRATEGIES:
        raise UserError(f"training.neurons: takes the place of a strategy; leave training.strategy: {name} out")
    neurons = recipe.training.neurons
    if neurons is not None and Path(neurons).is_dir():
        raise UserError(f"training.neurons: {neurons} is a folder; name a file of it, such as shared.safetensors")
    if neurons is not None and not Path(neurons).is_file():
        raise UserError(f"training.neurons: no such file {neurons}")
    results = recipe.tracking.results_dir
    if results is not None and Path(results).exists() and not Path(results).is_dir():
        raise UserError(f"tracking.results_dir: {results} is a file; name a folder")
    for checkpoint in parse_checkpoints(recipe.model.checkpoints):
        check_checkpoint(recipe.model, checkpoint.source, "model.checkpoints")
    for source in recipe.evaluation.checkpoints:
        if source in ("before", "after"):
            raise UserError(f"evaluation.checkpoints: {source!r} is what this run's own are called; write ./{source}")
        check_checkpoint(recipe.model, source, "evaluation.checkpoints")
    measured = set(recipe.corpus.languages) & set(recipe.evaluation.languages)
    if measured:
        raise UserError(f"evaluation.languages: {sorted(measured)[0]!r} is in corpus.languages, and measured as it is")
    if recipe.evaluation.languages and not recipe.corpus.tells_languages_apart:
        raise UserError(
            "evaluation.languages: each would read the text of corpus.languages; write {lang} in corpus.config_pattern "
            "or corpus.data_files"
        )
    for language in recipe.training.languages:
        if language not in recipe.corpus.languages:
            raise UserError(
                f"training.languages: {language!r} isn't in corpus.languages ({', '.join(recipe.corpus.languages)})"
            )
    if recipe.training.mixture is not None:
        _check_mixture(recipe, recipe.training.mixture)
    if recipe.training.needs_detection and len(recipe.corpus.languages) < 2:
        raise UserError("corpus.languages: one language shares nothing with others; name at least two")
    if (recipe.detection.min_languages or 1) > len(recipe.corpus.languages):
        raise UserError(
            f"detection.min_languages: {recipe.detection.min_languages} is more than the "
            f"{len(recipe.corpus.languages)} of corpus.languages"
        )
    if recipe.training.packing and recipe.corpus.max_length is None:
        raise UserError("corpus.max_length: training.packing joins sentences to so many tokens; set it")
    if recipe.training.neurons is None and name == "pilot":
        check_trials(recipe, arguments, recipe.training.pilot_strategies, "training.strategy: 'pilot'")
    _check_mask(recipe, arguments, [name])
    check_trainer_arguments(arguments)


def check_comparison(recipe: Recipe, arguments: NeuronTrainingArguments) -> None:
    """Refuses what would stop a comparison, and what it has no use for."""
    if recipe.training.neurons is not None:
        raise UserError("training.neurons: a comparison trains what its strategies choose; leave it out")
    check_trials(recipe, arguments, recipe.comparison.strategies, "compare")


def check_trials(recipe: Recipe, arguments: NeuronTrainingArguments, strategies: Sequence[str], what: str) -> None:
    """Refuses what would stop one of several trainings after others have run for hours. `what` names them in errors."""
    by_launcher = any(parse_flag_from_env(f"ACCELERATE_USE_{engine}") for engine in ("FSDP", "DEEPSPEED"))
    if arguments.fsdp or arguments.deepspeed or by_launcher:
        raise UserError(
            f"{what} measures the model between trainings, for which each process needs all of it; run it under DDP, "
            "without FSDP or DeepSpeed"
        )
    _check_mask(recipe, arguments, strategies)


def _check_mixture(recipe: Recipe, mixture: Mapping[str, float]) -> None:
    for language in mixture:
        if language not in recipe.corpus.languages:
            raise UserError(
                f"training.mixture: {language!r} isn't in corpus.languages ({', '.join(recipe.corpus.languages)})"
            )
    if max(mixture.values()) > _MOST_TIMES * min(mixture.values()):
        raise UserError(
            f"training.mixture: one share is more than {_MOST_TIMES:,} times another; leave the language out"
        )
    for language in recipe.training.languages:
        if language not in mixture:
            raise UserError(f"training.mixture: gives no share to {language!r}, which training.languages enhances")


def _check_mask(recipe: Recipe, arguments: NeuronTrainingArguments, strategies: Sequence[str]) -> None:
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    masked = recipe.training.update == "mask" and not set(strategies) <= set(BASELINES)
    if masked and optimizer not in OPTIMIZERS:
        raise UserError(
            f"training.optim: {optimizer} isn't known to treat each weight on its own, so update='mask' can't "
            f"promise that nothing else moves; use {', '.join(OPTIMIZERS)}, or update='compact'"
        )
