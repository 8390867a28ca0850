"""A recipe's model, text, steps and memory, resolved before any weight is loaded or any file written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil, floor
from pathlib import Path
from statistics import fmean

import torch
from accelerate import PartialState

from agnostic_train.corpus.encoding import SAMPLE
from agnostic_train.corpus.hub import check_dataset
from agnostic_train.corpus.purposes import LanguageText
from agnostic_train.corpus.streaming import wanted_sentences
from agnostic_train.errors import UserError
from agnostic_train.evaluation.task_evaluation import find_tasks
from agnostic_train.impact.pruning import num_top
from agnostic_train.model.decoder import FEED_FORWARD_PROJECTIONS, Decoder, find_decoder
from agnostic_train.model.loading import load_empty_model
from agnostic_train.model.memory import GIB, SLACK, MemoryModel
from agnostic_train.pipeline.checks import check_recipe, check_stage
from agnostic_train.pipeline.manifest import Manifest
from agnostic_train.pipeline.materials import Materials, kept_text
from agnostic_train.pipeline.settings import training_arguments
from agnostic_train.pipeline.stage_inputs import StageInputs
from agnostic_train.pipeline.stage_table import STAGE_TABLE
from agnostic_train.pipeline.stages.train import read_neurons
from agnostic_train.pipeline.training_text import count_batches
from agnostic_train.quickstart.tiny_model import cache_directory
from agnostic_train.recipe import EMBEDDED, Recipe
from agnostic_train.training.chosen import num_trainable
from agnostic_train.training.strategy import BASELINES
from agnostic_train.training.trainer import NeuronTrainingArguments

PURPOSES = [it.name for it in fields(LanguageText)]


@dataclass(frozen=True)
class Phase:
    """A stage's memory on one GPU, in bytes, by the formulas in `model/memory.py`; only `total` includes the slack."""

    name: str
    weights: int
    trainable: int = 0
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> float:
        return SLACK * (self.weights + self.trainable + self.activations + self.logits)


@dataclass(frozen=True)
class Plan:
    """The sizes that a recipe resolves to.

    Attributes:
        family: the config's `model_type`.
        num_sentences: per language and purpose.
        mean_tokens: per language, the mean length of the first detection sentences; empty for streamed text, which
            a dry run doesn't read.
        num_trainable: the largest number of weights that can learn.
        batch: sequences per optimizer step, over all processes.
        num_steps: optimizer steps; None for a stage before the training.
    """

    memory: MemoryModel
    decoder: Decoder
    model_class: str
    family: str
    dtype: str
    length: int
    num_sentences: dict[str, dict[str, int]]
    mean_tokens: dict[str, float]
    num_trainable: int
    batch: int
    num_steps: int | None
    num_processes: int
    phases: list[Phase]


def make_plan(recipe: Recipe, stage: str) -> Plan:
    """Resolves a recipe without loading a weight or writing a file.

    Args:
        stage: the last stage to plan for; `run` plans all.

    Raises:
        UserError: the recipe has a mistake that shows without loading the weights.
    """
    arguments = training_arguments(recipe)
    check_recipe(recipe, arguments)
    check_stage(recipe, arguments, stage)
    if recipe.evaluation.tasks and stage in ("run", "evaluate", "report"):
        find_tasks(recipe.evaluation.tasks, recipe.evaluation.task_paths)
    _check_embedded_exist(recipe)
    _ = arguments.device  # initialises the processes as the recipe asks
    materials = Materials(recipe, PartialState(), say=lambda line: None)
    texts = {} if recipe.corpus.dataset else _local_texts(materials)
    num_sentences = _count_sentences(recipe, texts)
    model = load_empty_model(materials.model_section)
    decoder = find_decoder(model)
    memory = MemoryModel.of(model, decoder)
    encoder = materials.encoder
    if recipe.training.packing:
        encoder.check_packing()
    inputs = StageInputs(recipe, arguments, materials, Manifest(Path(recipe.output_dir)))
    last = "report" if stage == "run" else stage
    for name in (*inputs.needs(last), last):
        STAGE_TABLE[name].check_files(materials)
    mean_tokens = {
        language: fmean(
            len(row["input_ids"]) for row in encoder.encode(text.detection[:SAMPLE], f"detection text of {language}")
        )
        for language, text in texts.items()
    }
    length = encoder.max_length or materials.tokenizer.model_max_length
    strategies: list[str] = [*recipe.comparison.strategies] if stage == "compare" else [recipe.training.strategy]
    trainable = {it: _most_trainable(recipe, it, decoder, memory) for it in strategies}
    if stage != "compare" and recipe.training.neurons is not None:
        trainable = dict.fromkeys(strategies, num_trainable(read_neurons(recipe.training.neurons, model), model))
    num_processes = arguments.world_size
    num_steps = None
    if stage not in ("detect", "score"):
        # Streamed sentences aren't read here; only their number is known.
        training: dict[str, Sequence] = {
            language: texts[language].training if texts else range(num_sentences[language]["training"])
            for language in recipe.training.text_languages
        }
        has_pilot = stage != "compare" and recipe.training.has_pilot
        num_batches = count_batches(recipe, arguments, encoder, training, has_pilot, is_read=bool(texts))
        epochs = arguments.num_train_epochs * ceil(num_batches / arguments.gradient_accumulation_steps)
        num_steps = arguments.max_steps if arguments.max_steps > 0 else ceil(epochs)
    return Plan(
        memory=memory,
        decoder=decoder,
        model_class=type(model).__name__,
        family=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        length=length,
        num_sentences=num_sentences,
        mean_tokens=mean_tokens,
        num_trainable=max(trainable.values()),
        batch=arguments.train_batch_size * arguments.gradient_accumulation_steps * num_processes,
        num_steps=num_steps,
        num_processes=num_processes,
        phases=_up_to(stage, _phases(recipe, memory, arguments, length, trainable, num_processes, stage)),
    )


def _check_embedded_exist(recipe: Recipe) -> None:
    """Raises `UserError` for an embedded model or text not made yet: a dry run writes nothing."""
    for key, name, folder in (
        ("model.name", recipe.model.name, "model"),
        ("corpus.path", recipe.corpus.path, "corpus"),
    ):
        if name == EMBEDDED and not (cache_directory() / folder).exists():
            raise UserError(f"{key}: {EMBEDDED} is made by its first run; run the recipe once without --dry-run")


def _local_texts(materials: Materials) -> Mapping[str, LanguageText]:
    """The text of every language; test and parallel text is read too, so that mistakes in it show."""
    _ = materials.evaluation_texts
    return materials.corpus.texts


def _count_sentences(recipe: Recipe, texts: Mapping[str, LanguageText]) -> dict[str, dict[str, int]]:
    if texts:
        return {language: {it: len(getattr(text, it)) for it in PURPOSES} for language, text in texts.items()}
    if not kept_text(recipe).exists():
        check_dataset(recipe.corpus)
    trained = recipe.languages_with_training_text
    return {it: wanted_sentences(recipe.corpus, it in trained) for it in recipe.corpus.languages}


def _most_trainable(recipe: Recipe, strategy: str, decoder: Decoder, memory: MemoryModel) -> int:
    """The largest number of weights that a strategy can choose.

    Over S sentences a site has n * S top places, where n is its number of top neurons, and a related neuron takes at
    least consistency * S of them, so at most n / consistency neurons are related to a language. Shared neurons are
    among these, unless `min_languages` is lower than the number of languages.
    """
    training, detection = recipe.training, recipe.detection
    if strategy == "full":
        return memory.num_parameters
    if detection.method == "lape":
        # LAPE selects among the hidden units of all layers, for all languages together.
        units = {layer: size for (layer, projection), size in decoder.sizes.items() if projection == "down"}
        of_unit = max(sum(memory.entry_sizes[layer, it] for it in FEED_FORWARD_PROJECTIONS) for layer in units)
        return round(detection.lape_ratio * sum(units.values())) * of_unit
    num_languages = len(recipe.corpus.languages)
    least = detection.min_languages or num_languages
    languages = len(training.languages) + (num_languages / least if least < num_languages else 0)
    most = {
        site: min(size, floor(languages * num_top(detection.top_ratio, size) / detection.consistency))
        for site, size in decoder.sizes.items()
    }
    return sum(number * memory.entry_sizes[site] for site, number in most.items())


def _phases(
    recipe: Recipe,
    memory: MemoryModel,
    arguments: NeuronTrainingArguments,
    length: int,
    trainable: Mapping[str, int],
    num_processes: int,
    stage: str,
) -> list[Phase]:
    """The phases in order.

    trainable: by strategy, the largest number of weights that can learn.
    """
    tokens = recipe.corpus.batch_size * length
    layer = memory.layer_activations(tokens, length)
    evaluated = (recipe.evaluation.batch_size or recipe.corpus.batch_size) * length
    detection = Phase("detect", memory.weights, activations=layer + int(recipe.detection.memory_gb * GIB))
    training = {it: _training_phase(recipe, memory, arguments, length, it, number) for it, number in trainable.items()}
    if stage == "compare":
        return [detection, replace(max(training.values(), key=lambda it: it.total), name="compare")]
    ((strategy, train),) = training.items()
    exported = recipe.export.dtype
    itemsize = memory.weight_bytes if exported is None else getattr(torch, exported).itemsize
    # A LoRA is merged in float32. An adapter is merged one float32 sum at a time, which the slack covers. The exported
    # checkpoint is put together in main memory.
    trained = 4 * memory.num_parameters if strategy == "lora" else _trains_in_place(recipe, strategy) * memory.weights
    # Models are evaluated one at a time: the base, the enhanced one and others.
    widest = replace(memory, weight_bytes=max(memory.weight_bytes, itemsize))
    phases = [
        detection,
        Phase("score", memory.weights, 0, layer, memory.scored_logits(tokens, length)),
        train,
        Phase("export", memory.weights + trained),
        Phase(
            "evaluate",
            widest.weights,
            0,
            widest.layer_activations(evaluated, length),
            widest.scored_logits(evaluated, length),
        ),
    ]
    if num_processes > 1:
        split = replace(
            train,
            name=f"train, split over {num_processes} (FSDP2, ZeRO-3)",
            # A layer's weights are gathered while it runs, and the next layer's are prefetched.
            weights=memory.weights // num_processes + 2 * memory.weights // memory.num_layers,
            trainable=train.trainable // num_processes,
        )
        phases.insert(3, split)
    return phases


def _trains_in_place(recipe: Recipe, strategy: str) -> bool:
    return strategy == "full" or (recipe.training.update == "mask" and strategy not in BASELINES)


def _training_phase(
    recipe: Recipe, memory: MemoryModel, arguments: NeuronTrainingArguments, length: int, strategy: str, trainable: int
) -> Phase:
    tokens, in_place = arguments.per_device_train_batch_size * length, _trains_in_place(recipe, strategy)
    # A mask freezes embeddings, head and norms.
    most = memory.num_parameters if strategy == "full" else memory.num_projected
    return Phase(
        "train",
        memory.weights,
        memory.state_in_place(most) if in_place else memory.adapter_state(trainable),
        memory.activations(tokens, length, arguments.gradient_checkpointing, all_weights=in_place),
        memory.trained_logits(tokens),
    )


def _up_to(stage: str, phases: list[Phase]) -> list[Phase]:
    last = [index for index, phase in enumerate(phases) if phase.name.startswith(stage)]
    return phases[: last[-1] + 1] if last else phases
