"""A recipe: what to run on what, as dataclasses with their help texts."""

import math
import os
import re
from dataclasses import asdict, field
from string import Formatter
from typing import Annotated, Any, Literal, dataclass_transform, get_args

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from agnostic_train.choices import Attention, ComparedStrategy, Exclusive, ExportTarget, Method, SetStrategy, Update


@dataclass_transform(kw_only_default=True, frozen_default=True)
def _section(cls: type) -> type:
    return dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False), frozen=True, kw_only=True)(cls)


def _as_list(value: Any) -> Any:
    """Turns a flag's value into a list: of two for `--corpus.languages=en,sw`, of one for `--comparison.seeds=0`, and
    an empty one for `--evaluation.tasks=`."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [item.strip() for item in value.split(",")]
    return [value] if isinstance(value, (int, float)) else value


def _distinct(value: list) -> list:
    duplicates = [it for index, it in enumerate(value) if it in value[:index]]
    if duplicates:
        raise ValueError(f"names {duplicates[0]} twice")
    return value


def _filled_in(value: str) -> str:
    for name in re.findall(r"\$(?:\w+|\{[^}]*\})", value, re.ASCII):
        if name.strip("${}") not in os.environ:
            raise ValueError(f"{name} isn't set in the environment")
    filled = os.path.expandvars(value)
    if "$" in filled:
        raise ValueError(f"{filled!r} has a $, which stands for the name of a variable; take it out")
    if not filled:
        raise ValueError(f"{value!r} is empty; name a folder")
    return filled


def _language(value: str) -> str:
    # The name becomes part of file names.
    if not value or re.search(r"[/\\\s]", value):
        raise ValueError(f"{value!r} isn't a language name (no spaces or slashes); separate several by commas")
    return value


def _of_language(value: str) -> str:
    try:
        names = [(name, form, conversion) for _, name, form, conversion in Formatter().parse(value) if name is not None]
    except ValueError as error:
        raise ValueError(f"{value!r} has an unmatched brace ({error}); write a literal brace twice") from None
    for name, form, conversion in names:
        if name != "lang" or form or conversion:
            raise ValueError(f"{value!r}: only {{lang}} is filled in; write any other brace twice")
    return value


# A shell doesn't expand the ~ in --output_dir=~/runs.
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
# An empty path would name the current folder.
Item = Annotated[str, Field(min_length=1)]
PathItem = Annotated[Item, AfterValidator(os.path.expanduser)]
OfLanguage = Annotated[str, AfterValidator(_of_language)]
Language = Annotated[str, AfterValidator(_language)]
Languages = Annotated[list[Language], BeforeValidator(_as_list), AfterValidator(_distinct)]

EMBEDDED = "embedded:quickstart"
"""For `model.name` and `corpus.path`: the package's own tiny model and phrasebook."""


Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(gt=0)]


@_section
class ModelSection:
    """The model to enhance."""

    name: LocalPath = Field(description=f"A local folder or a hub name; {EMBEDDED} trains the package's tiny model.")
    revision: str | None = Field(default=None, description="A hub revision.")
    checkpoints: Annotated[list[Item], BeforeValidator(_as_list)] = Field(
        default_factory=list,
        description="Earlier checkpoints to score as well: folders or hub revisions, as STEP=NAME if NAME contains no "
        "step.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32", description="Dtype of the loaded weights; 'auto' keeps the checkpoint's."
    )
    trust_remote_code: bool = Field(default=False, description="Run code that is shipped with the model.")


@_section
class CorpusSection:
    """The text."""

    path: LocalPath | None = Field(
        default=None,
        description="A folder of {lang}.train, {lang}.valid and optionally {lang}.test files (.txt or .jsonl, "
        f"compressed or not, or .parquet); or {EMBEDDED}.",
    )
    dataset: LocalPath | None = Field(
        default=None,
        description="A hub dataset, or a folder laid out like one, to use instead of path. It is streamed once: "
        "output_dir keeps its text.",
    )
    revision: str | None = Field(
        default=None, description="The dataset's branch, tag or commit; default: its main branch."
    )
    config_pattern: OfLanguage | None = Field(
        default=None, description="The dataset's config per language, such as '{lang}'."
    )
    data_files: OfLanguage | None = Field(
        default=None, description="The dataset's files per language, with {lang}, where configs don't separate them."
    )
    dataset_split: str = Field(
        default="train",
        description="The split to stream; without effect if data_files names text, JSON lines, Parquet or Arrow files.",
    )
    text_column: str = Field(default="text", description="The column or JSON key that holds the text.")
    split_sentences: bool = Field(
        default=False,
        description="Also split after . ! ? and the stops of other scripts, such as Chinese and Devanagari, not only "
        "at line breaks. A sentence that train text shares with valid or test text, or valid with test text, is then "
        "left out of the former.",
    )
    languages: Annotated[Languages, Field(min_length=1)] = Field(
        description="All languages to detect and measure, as in the file names."
    )
    detection_sentences: int = Field(
        default=1000, ge=1, description="Training sentences per language used for detection."
    )
    training_sentences: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of further training sentences per language; default: all. Streaming needs one.",
    )
    validation_sentences: int | None = Field(
        default=None,
        ge=1,
        description="Number of validation sentences per language; default: all, or 1000 of a dataset.",
    )
    test_sentences: int | None = Field(
        default=None, ge=1, description="Number of test sentences per language; default: all, or 1000 of a dataset."
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Truncate sentences to this many tokens; default: the model's limit (packing needs a number).",
    )
    add_bos: bool | None = Field(
        default=None,
        description="Start sentences with the beginning-of-sequence token; default: as the tokenizer does.",
    )
    batch_size: int = Field(default=16, ge=1, description="Sentences per batch in detection, scores and evaluation.")
    seed: int = Field(default=0, ge=0, description="Seed for sampling sentences.")

    @model_validator(mode="after")
    def _one_source(self) -> "CorpusSection":
        if (self.path is None) == (self.dataset is None):
            given = "has both" if self.path is not None else "has neither"
            raise ValueError(f"needs path or dataset, and {given}")
        if self.dataset is not None and not (self.config_pattern or self.data_files):
            raise ValueError("dataset needs config_pattern or data_files to tell the languages apart")
        if len(self.languages) > 1 and not self.tells_languages_apart:
            raise ValueError("every language would read the same text; write {lang} in config_pattern or data_files")
        return self

    @property
    def tells_languages_apart(self) -> bool:
        """Whether two languages can have different text."""
        patterns = [it for it in (self.config_pattern, self.data_files) if it]
        return self.dataset is None or any(it.format(lang="a") != it.format(lang="b") for it in patterns)


@_section
class DetectionSection:
    """Which neurons matter for which language."""

    method: Method = Field(
        default="impact",
        description="Select neurons by impact, or 'lape': by activation probability entropy (feed-forward units only).",
    )
    lape_ratio: float = Field(default=0.01, gt=0, le=1, description="'lape': fraction of all units to select.")
    top_ratio: float = Field(
        default=0.05, gt=0, le=1, description="Fraction of a site's neurons that count as top in a sentence."
    )
    consistency: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Fraction of a language's sentences in which a related neuron must be top (paper: 1.0).",
    )
    attention: Attention = Field(
        default="exact",
        description="Impacts of q and k as in real deactivation, or 'paper': by the paper's Eq. 11.",
    )
    exclusive: Exclusive = Field(
        default="complement", description="Related minus shared, or 'unique': minus every other language's related."
    )
    min_languages: int | None = Field(
        default=None, ge=1, description="Shared means related to at least this many languages; default: all."
    )
    skip_special_tokens: bool = Field(default=False, description="Leave special tokens out of the impacts.")
    memory_gb: float = Field(default=2.0, gt=0, description="Limit on temporary memory for q and k impacts, in GiB.")
    pruning: bool = Field(
        default=True, description="Skip q and k neurons that provably can't be top: the same sets in less time."
    )
    stability: bool = Field(
        default=False,
        description="Also detect on other samples and report how well the sets agree; about 3.4 times the work.",
    )
    verify: bool = Field(
        default=True,
        description="Before detection, and again on longer sentences, compare a few impacts with real deactivation.",
    )


@_section
class ScoreSection:
    """The language-agnostic score."""

    controls: int = Field(
        default=3, ge=0, description="Number of random control sets of each kind (equal size, similar activation)."
    )


@_section
class TrainingSection:
    """What to train, and how. Every key of transformers' TrainingArguments is accepted here too."""

    languages: Languages = Field(
        default_factory=list,
        description="The languages to enhance, by training on their text. Only detect and score do without.",
    )
    strategy: Literal[ComparedStrategy, "auto", "pilot"] = Field(
        default="shared+exclusive",
        description="Which neurons to train. 'auto' decides by the score, 'pilot' by short trainings. Baselines: "
        "'full' trains all weights, 'lora' a LoRA of equal size.",
    )
    update: Update = Field(
        default="compact",
        description="An adapter of the chosen rows and columns beside frozen weights, or 'mask': masked gradients of "
        "the full weights.",
    )
    low: float = Field(default=math.log(2), description="'auto': below this score, shared+exclusive.")
    high: float | None = Field(default=None, description="'auto': above this score, exclusive. Has no default.")
    pilot_strategies: Annotated[
        list[SetStrategy], BeforeValidator(_as_list), Field(min_length=2), AfterValidator(_distinct)
    ] = Field(default_factory=lambda: list(get_args(SetStrategy)), description="'pilot': the strategies to try.")
    pilot_steps: int = Field(
        default=50,
        ge=1,
        description="'pilot': training steps per strategy, on text that the main training doesn't see.",
    )
    random_like: SetStrategy = Field(
        default="shared+exclusive", description="'random', 'lora': the strategy whose size they match."
    )
    packing: bool = Field(
        default=False,
        description="Join sentences, each followed by the end-of-sequence token, into sequences of corpus.max_length "
        "tokens: no padding, and nothing is cut off. Attention also sees the earlier sentences of a sequence.",
    )
    mixture: Annotated[dict[Language, Rate], Field(min_length=1)] | None = Field(
        default=None,
        description="Each language's share of the training text, such as {sw: 4, en: 1}: for the enhanced languages, "
        "and for others that must not be forgotten. An epoch has all text of the enhanced languages; a language with "
        "too little text for its share repeats it. Default: the enhanced languages' text as it is.",
    )
    neurons: LocalPath | None = Field(
        default=None, description="Train the neurons in this file instead of a strategy's."
    )
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def text_languages(self) -> list[str]:
        """The languages whose text is trained on."""
        # Sorted, because recipes whose mixtures differ only in order count as equal.
        return self.languages if self.mixture is None else sorted(self.mixture)

    @property
    def needs_detection(self) -> bool:
        """Whether training needs detected neurons: not if they come from a file, or if all weights learn."""
        return self.neurons is None and self.strategy != "full"

    @property
    def has_pilot(self) -> bool:
        """Whether short trainings choose the strategy."""
        return self.neurons is None and self.strategy == "pilot"


@_section
class EvaluationSection:
    """Measurement before and after training, on held-out text."""

    batch_size: int | None = Field(default=None, ge=1, description="Sentences per batch; default: corpus.batch_size.")
    languages: Languages = Field(
        default_factory=list,
        description="Further languages to measure, neither detected nor trained, to see what is forgotten.",
    )
    max_forgetting: float = Field(
        default=0.03,
        ge=0,
        description="Sweeps, pilots and comparisons penalise trainings in which the bits per byte of another of "
        "corpus.languages rise by more than this fraction.",
    )
    parallel: LocalPath | None = Field(
        default=None,
        description="A folder of {lang}.txt files aligned line by line, to measure all languages on the same content.",
    )
    parallel_sentences: int | None = Field(
        default=None, ge=1, description="Number of parallel lines, drawn with corpus.seed; default: all."
    )
    checkpoints: Annotated[list[PathItem], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="Other checkpoints to measure besides the base and the enhanced one."
    )
    tasks: Annotated[list[Item], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="Tasks of lm-evaluation-harness, by name (needs the extra 'eval')."
    )
    task_paths: Annotated[list[PathItem], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="Folders with further task files for the harness."
    )
    mgsm: LocalPath | None = Field(
        default=None,
        description="A folder of {lang}.tsv files (question, tab, answer) for the mgsm tasks to read offline.",
    )
    num_fewshot: int | None = Field(
        default=None,
        ge=0,
        description="Few-shot examples per item; default: as the task defines. A task that sets 0 keeps it.",
    )
    limit: int | None = Field(default=None, ge=1, description="Maximum number of items per task.")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="Maximum number of generated tokens; default: as the task defines, or 256."
    )


@_section
class ComparisonSection:
    """`compare`: strategies and baselines on the same data and budget."""

    strategies: Annotated[
        list[ComparedStrategy], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)
    ] = Field(
        default_factory=lambda: list(get_args(ComparedStrategy)),
        description="What to compare; random and lora have the size of random_like.",
    )
    seeds: Annotated[list[Seed], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)] = Field(
        default_factory=lambda: [1, 2, 3], description="Train every strategy once per seed."
    )
    tuning_seed: Seed = Field(default=0, description="Seed for choosing learning rates; must not be one of seeds.")
    learning_rates: (
        Annotated[list[Rate], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)] | None
    ) = Field(
        default=None,
        description="Learning rates to try for every strategy; default: training.learning_rate, a third of it and "
        "three times it. If the best one is at an end, another is tried beyond it, at most twice.",
    )
    select_by: Literal["objective", "target", "all"] = Field(
        default="objective",
        description="Choose the rate with the lowest bits per byte on validation text: 'objective', of the enhanced "
        "languages, penalised where another's rise by more than evaluation.max_forgetting; 'target', of the enhanced "
        "languages, whatever it costs; 'all', of all corpus.languages.",
    )

    @model_validator(mode="after")
    def _tuned_on_another_seed(self) -> "ComparisonSection":
        # The best of several trainings looks better than it is, so it can't be one of those compared.
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed {self.tuning_seed} is one of seeds; choose another")
        return self


@_section
class ExportSection:
    """The enhanced checkpoint."""

    to: ExportTarget = Field(
        default="merged",
        description="'lora', 'delta': also write an adapter folder of that name, for stock PEFT or for this package.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="Dtype of the saved weights; default: as trained."
    )


@_section
class TrackingSection:
    """Experiment tracking."""

    wandb: bool = Field(default=False, description="Log to Weights & Biases.")
    project: str = Field(default="agnostic_train", description="The wandb project.")
    run_name: str | None = Field(default=None, description="The wandb run's name.")
    results_dir: LocalPath | None = Field(
        default=None,
        description="A further folder for copies of the tables and figures, such as one beside the recipe.",
    )


@_section
class Recipe:
    """Everything that a run depends on."""

    model: ModelSection
    corpus: CorpusSection
    detection: DetectionSection = Field(default_factory=DetectionSection)
    score: ScoreSection = Field(default_factory=ScoreSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    comparison: ComparisonSection = Field(default_factory=ComparisonSection)
    export: ExportSection = Field(default_factory=ExportSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    output_dir: Annotated[LocalPath, AfterValidator(_filled_in)] = Field(
        description="Folder for all files of the run; inputs must lie elsewhere. $NAME is taken from the environment."
    )

    @property
    def languages_with_training_text(self) -> list[str]:
        """The languages whose training text is read: those trained on, or with `detection.stability` all."""
        return self.corpus.languages if self.detection.stability else self.training.text_languages

    def to_dict(self) -> dict:
        """Plain JSON values to write and show, without the hub token."""
        values = asdict(self)
        values["training"]["arguments"].pop("hub_token", None)
        return values
