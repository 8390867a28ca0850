"""A recipe's training settings: its strategy, its `TrainingArguments`, and what these take from the launcher."""

import os
from collections.abc import Callable
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import trainer_log_levels
from transformers.utils import logging

from agnostic_train.errors import UserError
from agnostic_train.model.loading import find_accelerator
from agnostic_train.recipe import Recipe
from agnostic_train.training.strategy import Strategy
from agnostic_train.training.trainer import NeuronTrainingArguments

logger = logging.get_logger(__name__)

SCHEDULES_BY_LOSS = ("reduce_lr_on_plateau", "greedy")
"""Learning rate schedules that follow the evaluations during training."""
_ABOVE_ZERO = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "eval_accumulation_steps", "max_steps", "num_train_epochs",
)  # fmt: skip
_NOT_NEGATIVE = (
    "weight_decay", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "eval_steps", "save_steps",
    "logging_steps",
)  # fmt: skip
_ORDERS = ("random", "sequential", "group_by_length", "batch_rebalance")
"""Values of `train_sampling_strategy`; transformers takes any other one for `random`."""

# What `TrainingArguments` raises for invalid values.
_MISTAKES = (ValueError, TypeError, ImportError, KeyError, OSError)


def make_strategy(recipe: Recipe, name: str, seed: int) -> Strategy:
    """Returns a strategy by name, with the recipe's languages and thresholds."""
    training = recipe.training
    return Strategy(name, training.languages, training.low, training.high, training.random_like, seed)


def training_arguments(recipe: Recipe, **changes) -> NeuronTrainingArguments:
    """Returns the recipe's `TrainingArguments`, with `changes`; raises `UserError` for an invalid value."""
    given = recipe.training.arguments
    _check_given(recipe)
    defaults = _defaults(recipe)

    def make(**settings) -> NeuronTrainingArguments:
        return NeuronTrainingArguments(
            **{**defaults, **settings},
            report_to=["wandb"] if recipe.tracking.wandb else [],
            run_name=recipe.tracking.run_name,
            update=recipe.training.update,
        )

    try:
        arguments = make(**{**given, **changes})
    except _MISTAKES as error:
        raise UserError(f"{_culprit(recipe, make, error)}: {error}") from None
    if arguments.max_steps > 0 and {"max_steps", "num_train_epochs"} <= given.keys():
        logger.warning_once(
            f"training.max_steps: {arguments.max_steps} steps, and num_train_epochs is ignored; with -1 it is used"
        )
    return arguments


def _check_given(recipe: Recipe) -> None:
    """Refuses what `TrainingArguments` accepts, but what wouldn't work here or means something else."""
    given = recipe.training.arguments
    metrics = [f"eval_{language}_loss" for language in recipe.corpus.languages]
    named = given.get("metric_for_best_model")
    if named is not None and named not in [*metrics, *(it.removeprefix("eval_") for it in metrics)]:
        raise UserError(f"training.metric_for_best_model: {named!r} isn't measured; it is one of {', '.join(metrics)}")
    if given.get("greater_is_better"):
        raise UserError("training.greater_is_better: the best checkpoint has the lowest loss; remove the key")
    for key in _ABOVE_ZERO:
        value = given.get(key)
        # In transformers, -1 means that epochs count, not steps.
        if value is not None and value <= 0 and (key, value) != ("max_steps", -1):
            raise UserError(f"training.{key}: must be above 0, not {value}")
    for key in _NOT_NEGATIVE:
        if given.get(key) is not None and given[key] < 0:
            raise UserError(f"training.{key}: must be at least 0, not {given[key]}")
    if given.get("label_smoothing_factor", 0) > 1:
        raise UserError(f"training.label_smoothing_factor: must be at most 1, not {given['label_smoothing_factor']}")
    for key in ("log_level", "log_level_replica"):
        if given.get(key) is not None and given[key] not in trainer_log_levels:
            raise UserError(f"training.{key}: {given[key]!r} isn't one of {', '.join(trainer_log_levels)}")
    for key in ("seed", "data_seed"):
        value = given.get(key)
        # NumPy's generators accept no other seeds.
        if value is not None and not 0 <= value < 2**32:
            raise UserError(f"training.{key}: must be from 0 to 2^32 - 1, not {value}")
    if given.get("label_names") not in (None, ["labels"]):
        raise UserError("training.label_names: the text's labels are named labels; remove the key")
    order = given.get("train_sampling_strategy", "random")
    if order not in _ORDERS:
        raise UserError(f"training.train_sampling_strategy: {order!r} isn't one of {', '.join(_ORDERS)}")
    if order == "sequential" and len(recipe.training.text_languages) > 1:
        raise UserError(
            "training.train_sampling_strategy: 'sequential' would read one language's text after the other's; remove it"
        )
    if given.get("eval_steps") and given.get("eval_strategy", "no") == "no":
        logger.warning_once("training.eval_steps: without training.eval_strategy: steps, nothing is evaluated")
    if given.get("resume_from_checkpoint") is not None:
        raise UserError("training.resume_from_checkpoint: an interrupted training resumes by itself; remove the key")
    if given.get("parallelism_config") is not None:
        raise UserError("training.parallelism_config: comes from the launcher; set it in accelerate's config")
    if given.get("push_to_hub"):
        raise UserError(
            "training.push_to_hub: would upload all of output_dir, the text included; after the export, run "
            f"hf upload NAME {os.path.join(recipe.output_dir, 'enhanced')}"
        )


def _defaults(recipe: Recipe) -> dict[str, Any]:
    """Arguments that depend on the machine, the launcher or other sections, unless the recipe sets them."""
    given = recipe.training.arguments
    # On a CPU, several processes need `use_cpu`, and pinned memory warns.
    accelerator = find_accelerator() is not None
    defaults: dict[str, Any] = {
        "use_cpu": not accelerator,
        "dataloader_pin_memory": accelerator,
        "output_dir": recipe.output_dir,
    }
    needs_metric = (
        given.get("load_best_model_at_end")
        or given.get("save_strategy") == "best"
        or given.get("lr_scheduler_type") in SCHEDULES_BY_LOSS
    )
    if needs_metric and recipe.training.languages:
        defaults["metric_for_best_model"] = f"eval_{recipe.training.languages[0]}_loss"
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        # Under every other engine, a Trainer reads the launcher's mixed precision itself.
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
        defaults |= {key: precision == key for key in ("bf16", "fp16")}
    return defaults


def _culprit(recipe: Recipe, make: Callable[..., NeuronTrainingArguments], mistake: Exception) -> str:
    """The key that by itself causes the same error, or the section `training` if none does."""
    for key, value in recipe.training.arguments.items():
        try:
            make(**{key: value})
        except _MISTAKES as error:
            if str(error) == str(mistake):
                return f"training.{key}"
    return "training"


def launch_settings(arguments: NeuronTrainingArguments) -> dict[str, object]:
    """The launcher's settings that a training depends on: trainings that are resumed or compared must agree in them."""
    return {"processes": arguments.world_size, "precision": arguments.mixed_precision}


def evaluates_during_training(arguments: NeuronTrainingArguments) -> bool:
    """Whether a training evaluates its loss on validation text."""
    return arguments.eval_strategy != IntervalStrategy.NO or bool(arguments.eval_on_start)
