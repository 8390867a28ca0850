"""Checks that refuse an impossible run at its start, before any work begins."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin, parse_flag_from_env
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler
from transformers.training_args import ParallelMode
from transformers.utils import is_liger_kernel_available

from agnostic_train.errors import UserError
from agnostic_train.model.loading import check_checkpoint
from agnostic_train.pipeline.settings import SCHEDULES_BY_LOSS, make_strategy
from agnostic_train.recipe import Recipe
from agnostic_train.scores.emergence import parse_checkpoints
from agnostic_train.training.mask import OPTIMIZERS
from agnostic_train.training.strategy import BASELINES, SET_STRATEGIES
from agnostic_train.training.trainer import NeuronTrainingArguments, check_keeps_weights

# The largest ratio between two shares of the training text: beyond it, an epoch mostly repeats one language's text.
_MAX_SHARE_RATIO = 10_000


def check_trainer_arguments(arguments: NeuronTrainingArguments) -> None:
    """Builds the Trainer's optimizer, schedule and loader for a single weight, so that unusable arguments fail at once.

    Raises:
        UserError: the arguments don't make an optimizer, a schedule or a loader, or don't fit the number of processes.
    """
    if arguments.fsdp and arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError("training.fsdp: needs several processes; run it under accelerate launch or torchrun")
    if arguments.parallel_mode == ParallelMode.DISTRIBUTED:
        _check_batches_of_processes(arguments)
    check_keeps_weights(arguments)
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("training.use_liger_kernel: needs pip install liger-kernel")
    if arguments.learning_rate < 0:
        raise UserError(f"training.learning_rate: must be at least 0, not {arguments.learning_rate}")
    optim = _value(arguments.optim)
    probe = torch.nn.Linear(1, 1)
    with _refused(f"training.optim: {optim} can't be made of learning_rate, weight_decay, adam_* and optim_*"):
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, probe)
        # Other optimizers need the model itself, or particular modules of it.
        plain = not settings.keys() & {"params", "model", "optimizer_dict"}
        optimizer = kind([probe.weight], **settings) if plain else torch.optim.SGD([probe.weight], lr=1.0)
    if arguments.torch_compile:
        with _refused("training.torch_compile_backend: not a backend of torch.compile"):
            TorchDynamoPlugin(backend=arguments.torch_compile_backend)
        if arguments.torch_compile_mode not in (None, *torch._inductor.list_mode_options()):
            raise UserError(
                f"training.torch_compile_mode: {arguments.torch_compile_mode!r} is no mode of torch.compile"
            )
    if arguments.gradient_checkpointing:
        with _refused("training.gradient_checkpointing_kwargs: torch.utils.checkpoint doesn't take them"):
            # A Trainer itself reads the two that are left out.
            settings = {"use_reentrant": False} | (arguments.gradient_checkpointing_kwargs or {})
            settings = {key: value for key, value in settings.items() if key not in ("every_n_layers", "offload")}
            torch.utils.checkpoint.checkpoint(torch.nn.Identity(), torch.zeros(1, requires_grad=True), **settings)
    schedule = _value(arguments.lr_scheduler_type)
    key = "lr_scheduler_kwargs" if arguments.lr_scheduler_kwargs else "lr_scheduler_type"
    with _refused(f"training.{key}: {schedule} can't be made of lr_scheduler_kwargs"):
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
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
        )


def _check_batches_of_processes(arguments: NeuronTrainingArguments) -> None:
    config, problem = arguments.accelerator_config, None
    if not (config.even_batches or arguments.dataloader_drop_last):
        problem = "with even_batches false, processes get different numbers of batches and wait for each other forever"
    elif config.dispatch_batches:
        problem = "dispatch_batches needs batches of equal length, and sentences differ in theirs"
    elif config.split_batches:
        problem = "split_batches divides per_device_train_batch_size by the number of processes; lower that instead"
    if problem is not None:
        raise UserError(f"training.accelerator_config: {problem}; leave it out")


def _value(choice: Any) -> str:
    """The text of a choice: transformers makes some an enum."""
    return str(getattr(choice, "value", choice))


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Turns any exception into a `UserError` that begins with `what`."""
    try:
        yield
    except Exception as error:  # each library raises different types for invalid settings
        raise UserError(f"{what} ({type(error).__name__}: {error})") from None


def check_recipe(recipe: Recipe, arguments: NeuronTrainingArguments) -> None:
    """Raises `UserError` for a recipe that would fail after hours of work, or overwrite what it reads."""
    _check_not_overwritten(recipe)
    _check_languages(recipe)
    _check_checkpoints(recipe)
    _check_neuron_file(recipe)
    name = recipe.training.strategy
    if name in BASELINES and recipe.export.to != "merged":
        reason = "trains all weights" if name == "full" else "writes adapter/, which is a LoRA already"
        raise UserError(f"export.to: {recipe.export.to!r} needs neurons, and training.strategy {name!r} {reason}")
    if recipe.training.neurons is None and name != "pilot":
        make_strategy(recipe, name, arguments.seed)  # raises for missing thresholds
    if recipe.training.packing and recipe.corpus.max_length is None:
        raise UserError("corpus.max_length: training.packing joins sentences to this many tokens; set it")
    if recipe.training.has_pilot:
        check_trials(recipe, arguments, recipe.training.pilot_strategies, "training.strategy: 'pilot'")
    _check_mask(recipe, arguments, [name])
    check_trainer_arguments(arguments)
    results = recipe.tracking.results_dir
    if results is not None and Path(results).exists() and not Path(results).is_dir():
        raise UserError(f"tracking.results_dir: {results} is a file; name a folder")


def _check_languages(recipe: Recipe) -> None:
    languages = recipe.corpus.languages
    repeated = set(languages) & set(recipe.evaluation.languages)
    if repeated:
        raise UserError(
            f"evaluation.languages: {sorted(repeated)[0]!r} is in corpus.languages, and measured anyway; leave it out"
        )
    if recipe.evaluation.languages and not recipe.corpus.tells_languages_apart:
        raise UserError(
            "evaluation.languages: each would read the text of corpus.languages; write {lang} in corpus.config_pattern "
            "or corpus.data_files"
        )
    for language in recipe.training.languages:
        if language not in languages:
            raise UserError(f"training.languages: {language!r} isn't in corpus.languages ({', '.join(languages)})")
    if recipe.training.mixture is not None:
        _check_mixture(recipe, recipe.training.mixture)
    if recipe.training.needs_detection and len(languages) < 2:
        raise UserError("corpus.languages: one language shares nothing with others; name at least two")
    if (recipe.detection.min_languages or 1) > len(languages):
        raise UserError(
            f"detection.min_languages: {recipe.detection.min_languages} is more than the {len(languages)} of "
            "corpus.languages"
        )


def _check_checkpoints(recipe: Recipe) -> None:
    for checkpoint in parse_checkpoints(recipe.model.checkpoints):
        check_checkpoint(recipe.model, checkpoint.source, "model.checkpoints")
    for source in recipe.evaluation.checkpoints:
        if source in ("before", "after"):
            raise UserError(f"evaluation.checkpoints: {source!r} is a name of this run's own; write ./{source}")
        check_checkpoint(recipe.model, source, "evaluation.checkpoints")


def _check_neuron_file(recipe: Recipe) -> None:
    neurons, strategy = recipe.training.neurons, recipe.training.strategy
    if neurons is None:
        return
    if strategy not in SET_STRATEGIES:
        raise UserError(f"training.neurons: takes the place of a strategy; leave training.strategy: {strategy} out")
    if Path(neurons).is_dir():
        raise UserError(f"training.neurons: {neurons} is a folder; name a file of it, such as shared.safetensors")
    if not Path(neurons).is_file():
        raise UserError(f"training.neurons: no such file {neurons}")


def _check_not_overwritten(recipe: Recipe) -> None:
    output = Path(recipe.output_dir).resolve()
    read = [
        ("model.name", recipe.model.name),
        *(("model.checkpoints", it.source) for it in parse_checkpoints(recipe.model.checkpoints)),
        ("corpus.path", recipe.corpus.path),
        ("corpus.dataset", recipe.corpus.dataset),
        ("training.neurons", recipe.training.neurons),
        *(("evaluation.checkpoints", it) for it in recipe.evaluation.checkpoints),
        ("evaluation.parallel", recipe.evaluation.parallel),
        ("evaluation.mgsm", recipe.evaluation.mgsm),
        *(("evaluation.task_paths", it) for it in recipe.evaluation.task_paths),
    ]
    for key, name in read:
        if name and Path(name).exists() and output in (Path(name).resolve(), *Path(name).resolve().parents):
            raise UserError(f"output_dir: {key} lies in it ({name}), and could be overwritten; use another folder")


def check_stage(recipe: Recipe, arguments: NeuronTrainingArguments, stage: str) -> None:
    """Raises `UserError` for what would stop one stage, but perhaps not others."""
    if stage not in ("detect", "score") and not recipe.training.languages:
        raise UserError("training.languages: missing; name the languages to enhance")
    if stage == "compare":
        _check_comparison(recipe, arguments)


def _check_comparison(recipe: Recipe, arguments: NeuronTrainingArguments) -> None:
    """Raises `UserError` for what would stop a comparison, and for keys that it doesn't use."""
    if recipe.training.neurons is not None:
        raise UserError("training.neurons: a comparison trains what its strategies choose; leave it out")
    order = _value(arguments.train_sampling_strategy)
    if order in ("sequential", "batch_rebalance") and len(recipe.comparison.seeds) > 1:
        raise UserError(
            f"training.train_sampling_strategy: {order!r} reads the text in the same order with every seed, so "
            "comparison.seeds would repeat one training; leave it out, or name one seed"
        )
    check_trials(recipe, arguments, recipe.comparison.strategies, "compare")


def check_trials(recipe: Recipe, arguments: NeuronTrainingArguments, strategies: Sequence[str], what: str) -> None:
    """Raises `UserError` for what would stop one of several trainings after others have run for hours.

    what: names the trainings in errors.
    """
    by_launcher = any(parse_flag_from_env(f"ACCELERATE_USE_{engine}") for engine in ("FSDP", "DEEPSPEED"))
    if arguments.fsdp or arguments.deepspeed or by_launcher:
        raise UserError(
            f"{what} measures the model between trainings, for which each process needs all of it; run it under DDP, "
            "without FSDP or DeepSpeed"
        )
    schedule = _value(arguments.lr_scheduler_type)
    if schedule in SCHEDULES_BY_LOSS:
        raise UserError(
            f"training.lr_scheduler_type: {schedule} follows evaluations, and {what} trains without any; choose another"
        )
    _check_mask(recipe, arguments, strategies)


def _check_mixture(recipe: Recipe, mixture: Mapping[str, float]) -> None:
    for language in mixture:
        if language not in recipe.corpus.languages:
            raise UserError(
                f"training.mixture: {language!r} isn't in corpus.languages ({', '.join(recipe.corpus.languages)})"
            )
    if max(mixture.values()) > _MAX_SHARE_RATIO * min(mixture.values()):
        raise UserError(
            f"training.mixture: one share is more than {_MAX_SHARE_RATIO:,} times another; leave the language out"
        )
    for language in recipe.training.languages:
        if language not in mixture:
            raise UserError(f"training.mixture: gives no share to {language!r}, which training.languages enhances")


def _check_mask(recipe: Recipe, arguments: NeuronTrainingArguments, strategies: Sequence[str]) -> None:
    optimizer = _value(arguments.optim)
    masked = recipe.training.update == "mask" and not set(strategies) <= set(BASELINES)
    if masked and optimizer not in OPTIMIZERS:
        raise UserError(
            f"training.optim: {optimizer} isn't known to update each weight independently, so update='mask' can't "
            f"keep all other weights fixed; use {', '.join(OPTIMIZERS)}, or update='compact'"
        )
