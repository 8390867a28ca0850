"""A recipe: what to run on what, as dataclasses with their help texts."""

import math
import os
from dataclasses import asdict, field, fields
from string import Formatter
from typing import Annotated, Any, Literal, NamedTuple, dataclass_transform, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo


@dataclass_transform(kw_only_default=True, frozen_default=True)
def _section(cls: type) -> type:
    return dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False), frozen=True, kw_only=True)(cls)


def _as_list(value: Any) -> Any:
    """A flag's `--corpus.languages=en,sw` is the list that it looks like, `--comparison.seeds=0` one of one, and
    `--evaluation.tasks=` the empty one."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [item.strip() for item in value.split(",")]
    return [value] if isinstance(value, (int, float)) else value


def _distinct(value: list) -> list:
    twice = [it for index, it in enumerate(value) if it in value[:index]]
    if twice:
        raise ValueError(f"names {twice[0]} twice")
    return value


def _filled_in(value: str) -> str:
    filled = os.path.expandvars(value)
    if "$" in filled:
        raise ValueError(f"{filled[filled.index('$') :].split('/')[0]} isn't set in the environment")
    return filled


def _of_language(value: str) -> str:
    try:
        names = [(name, form, conversion) for _, name, form, conversion in Formatter().parse(value) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"{value!r} has a brace without its other ({error}); a brace of its own is written twice"
        ) from None
    for name, form, conversion in names:
        if name != "lang" or form or conversion:
            raise ValueError(f"{value!r}: {{lang}} alone is filled in; any other brace is written twice")
    return value


# A shell leaves the ~ of --output_dir=~/runs as it is.
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
OfLanguage = Annotated[str, AfterValidator(_of_language)]
Language = Annotated[str, Field(min_length=1, pattern=r"^[^/\\\s]+$")]
Languages = Annotated[list[Language], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)]

EMBEDDED = "embedded:quickstart"
"""As `model.name` and `corpus.path`: the package's own tiny model and phrasebook."""


Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(gt=0)]
SetStrategy = Literal["shared", "exclusive", "related", "shared+exclusive"]
Trained = Literal["shared", "exclusive", "related", "shared+exclusive", "random", "lora", "full"]


@_section
class ModelSection:
    """The model to enhance."""

    name: LocalPath = Field(description=f"A local folder or a hub name; {EMBEDDED} trains the package's tiny model.")
    revision: str | None = Field(default=None, description="A hub revision.")
    checkpoints: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        default_factory=list,
        description="Earlier states of the model to score too: folders or hub revisions, STEP= before a name without one.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32", description="What the weights are loaded as; 'auto' is the checkpoint's own."
    )
    trust_remote_code: bool = Field(default=False, description="Run code that comes with the model.")


@_section
class CorpusSection:
    """The text."""

    path: LocalPath | None = Field(
        default=None,
        description="A folder of {lang}.train, {lang}.valid and, if there, {lang}.test as .txt, .jsonl or .parquet; "
        f"or {EMBEDDED}.",
    )
    dataset: str | None = Field(default=None, description="Instead of a folder: a dataset of the hub, streamed.")
    config_pattern: OfLanguage | None = Field(default=None, description="Its config for a language, such as '{lang}'.")
    data_files: OfLanguage | None = Field(
        default=None, description="Its files for a language, with {lang}, if no config."
    )
    dataset_split: str = Field(default="train", description="The split to stream.")
    text_column: str = Field(default="text", description="The column or JSON key that holds the text.")
    split_sentences: bool = Field(default=False, description="Split also after . ! ? and not just at line breaks.")
    languages: Languages = Field(description="Every language to look at; the names of the files.")
    detection_sentences: int = Field(default=1000, ge=1, description="Train sentences per language to detect on.")
    training_sentences: int | None = Field(
        default=None, ge=1, description="At most so many further train sentences to train on; without it, all."
    )
    validation_sentences: int | None = Field(
        default=None, ge=1, description="At most so many valid sentences; without it, all."
    )
    test_sentences: int | None = Field(
        default=None, ge=1, description="At most so many test sentences; without it, all."
    )
    max_length: int | None = Field(
        default=None, ge=2, description="Cut sentences at so many tokens; without it, at the model's limit."
    )
    add_bos: bool | None = Field(
        default=None,
        description="Begin sentences with the beginning-of-sequence token; without it, as the tokenizer does.",
    )
    batch_size: int = Field(default=16, ge=1, description="Sentences per batch in detection, scores and evaluation.")
    seed: int = Field(default=0, ge=0, description="Of the sample of sentences.")

    @model_validator(mode="after")
    def _one_source(self) -> "CorpusSection":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("needs either path or dataset")
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

    method: Literal["impact", "lape"] = Field(
        default="impact", description="By impact, or by activation probability entropy (feed-forward units alone)."
    )
    lape_ratio: float = Field(default=0.01, gt=0, le=1, description="'lape': part of all units that are selected.")
    top_ratio: float = Field(
        default=0.05, gt=0, le=1, description="Part of a site's neurons that are top in a sentence."
    )
    consistency: float = Field(default=1.0, gt=0, le=1, description="In which part of its sentences; the paper: all.")
    attention: Literal["exact", "paper"] = Field(
        default="exact", description="Real deactivation, or Eq. 11 as printed."
    )
    exclusive: Literal["complement", "unique"] = Field(
        default="complement", description="Related minus shared, or minus every other language's related."
    )
    min_languages: int | None = Field(
        default=None, ge=1, description="Shared: related to at least so many languages; without it, to all."
    )
    skip_special_tokens: bool = Field(default=False, description="Leave special tokens out of the impacts.")
    memory_gb: float = Field(default=2.0, gt=0, description="Bound on the temporaries of the q and k impacts, in GiB.")
    pruning: bool = Field(
        default=True, description="Leave out q and k neurons that certainly aren't top: the same sets in less time."
    )
    stability: bool = Field(
        default=False, description="Also detect on other samples, and say how far the sets agree; 2.4 times the work."
    )
    verify: bool = Field(default=True, description="First compare a few scores with real deactivation.")


@_section
class ScoreSection:
    """The language-agnostic score."""

    controls: int = Field(default=3, ge=0, description="Random sets of the same sizes to score beside it.")


@_section
class TrainingSection:
    """What to train, and how. Every key of transformers' TrainingArguments is a key here too."""

    languages: Languages = Field(description="The languages to enhance: whose text is trained on.")
    strategy: Literal[Trained, "auto", "pilot"] = Field(
        default="shared+exclusive",
        description="Which neurons learn. 'auto' decides by the score, 'pilot' by short trainings; 'full' trains all "
        "weights, 'lora' a LoRA of equal size, as baselines.",
    )
    update: Literal["compact", "mask"] = Field(
        default="compact",
        description="How they learn: an adapter of their rows and columns beside frozen weights, or masked gradients.",
    )
    low: float = Field(default=math.log(2), description="'auto': below this score, shared+exclusive.")
    high: float | None = Field(default=None, description="'auto': above this score, exclusive; has no default.")
    pilot_strategies: Annotated[
        list[SetStrategy], BeforeValidator(_as_list), Field(min_length=2), AfterValidator(_distinct)
    ] = Field(default_factory=lambda: list(get_args(SetStrategy)), description="'pilot': the strategies to try.")
    pilot_steps: int = Field(
        default=50, ge=1, description="'pilot': steps of each, on text that the training proper doesn't see."
    )
    random_like: SetStrategy = Field(
        default="shared+exclusive", description="'random', 'lora': the strategy whose numbers they match."
    )
    neurons: LocalPath | None = Field(
        default=None, description="Train the neurons of this file instead of a strategy's."
    )
    arguments: dict[str, Any] = field(default_factory=dict)


@_section
class EvaluationSection:
    """Before and after, on test text."""

    batch_size: int | None = Field(
        default=None, ge=1, description="Sentences per batch; without it, corpus.batch_size."
    )
    languages: Annotated[list[Language], BeforeValidator(_as_list), AfterValidator(_distinct)] = Field(
        default_factory=list,
        description="Further languages to measure, which are neither detected nor trained: what is forgotten there?",
    )
    max_forgetting: float = Field(
        default=0.03,
        ge=0,
        description="The sweeps' objective is worse where another language's bits per byte rise by more.",
    )
    parallel: LocalPath | None = Field(
        default=None,
        description="A folder of {lang}.txt, aligned line by line: measured too, as text of equal content.",
    )
    parallel_sentences: int | None = Field(
        default=None, ge=1, description="At most so many lines of it, drawn by corpus.seed; without it, all."
    )
    checkpoints: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="Other checkpoints to measure beside the base and the enhanced one."
    )
    tasks: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="Tasks of lm-evaluation-harness, by name (needs the extra 'eval')."
    )
    task_paths: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="Folders of further task files of the harness."
    )
    mgsm: LocalPath | None = Field(
        default=None, description="A folder of {lang}.tsv (question, tab, answer): what the mgsm tasks read, offline."
    )
    num_fewshot: int | None = Field(
        default=None, ge=0, description="Examples before each item; a task's own by default."
    )
    limit: int | None = Field(default=None, ge=1, description="At most so many items of each task.")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="How much the model may write in a task; without it, as each task says, or 256."
    )


@_section
class ComparisonSection:
    """`compare`: strategies and baselines on the same data and budget."""

    strategies: Annotated[list[Trained], BeforeValidator(_as_list), Field(min_length=2), AfterValidator(_distinct)] = (
        Field(default_factory=lambda: list(get_args(Trained)), description="What to compare.")
    )
    seeds: Annotated[list[Seed], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)] = Field(
        default_factory=lambda: [1, 2, 3], description="Each is one training of every strategy."
    )
    tuning_seed: Seed = Field(
        default=0, description="Of the trainings that choose the learning rates; none of those that are compared."
    )
    learning_rates: (
        Annotated[list[Rate], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)] | None
    ) = Field(
        default=None,
        description="Tried for every strategy; without it, training.learning_rate and a third and three times of it. "
        "While the best is at an end, one more is tried there, twice at most.",
    )
    select_by: Literal["target", "all"] = Field(
        default="target",
        description="The best rate has the lowest bits per byte on validation text, of the enhanced languages or of all.",
    )

    @model_validator(mode="after")
    def _tuned_on_another_seed(self) -> "ComparisonSection":
        # The best of several trainings looks better than it is: it can't be one of those that are judged.
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed {self.tuning_seed} is one of seeds; choose another")
        return self


@_section
class ExportSection:
    """The enhanced checkpoint."""

    to: Literal["merged", "lora", "delta"] = Field(
        default="merged",
        description="'lora', 'delta': beside enhanced/ also an adapter folder of that name, for any PEFT or for ours.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="Of the saved weights; without it, as trained."
    )


@_section
class TrackingSection:
    """Experiment tracking."""

    wandb: bool = Field(default=False, description="Log to Weights & Biases.")
    project: str = Field(default="agnostic_train", description="The wandb project.")
    run_name: str | None = Field(default=None, description="The wandb run's name.")
    results_dir: LocalPath | None = Field(
        default=None, description="A folder that gets the tables and figures too, to be kept beside the recipe."
    )


@_section
class Recipe:
    """Everything that a run depends on."""

    model: ModelSection
    corpus: CorpusSection
    detection: DetectionSection = Field(default_factory=DetectionSection)
    score: ScoreSection = Field(default_factory=ScoreSection)
    training: TrainingSection
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    comparison: ComparisonSection = Field(default_factory=ComparisonSection)
    export: ExportSection = Field(default_factory=ExportSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    output_dir: Annotated[LocalPath, AfterValidator(_filled_in)] = Field(
        description="Where every file of the run goes; $NAME is filled in from the environment."
    )

    def to_dict(self) -> dict:
        """Plain values, JSON-serialisable."""
        return asdict(self)


SECTIONS = {it.name: it.type for it in fields(Recipe) if it.name != "output_dir"}
OWN_KEYS = {"output_dir": "output_dir", "report_to": "tracking.wandb", "run_name": "tracking.run_name"}
"""TrainingArguments that a recipe sets by a key of its own."""


def training_argument_types() -> dict[str, Any]:
    """Every key of transformers' `TrainingArguments` that a recipe may set, with its type."""
    from transformers import TrainingArguments  # slow to import, and not needed to read a recipe's own keys

    hints = get_type_hints(TrainingArguments)
    return {it.name: hints[it.name] for it in fields(TrainingArguments) if it.init and it.name not in OWN_KEYS}


class KeyRow(NamedTuple):
    """What a recipe's key says, which values it has to choose from, and its default or `required`; empty for none."""

    key: str
    description: str
    choices: str
    default: str


def own_types() -> dict[str, Any]:
    """Every key of the recipe's own, as `section.key` or `output_dir`, with its type."""
    return {key: info.annotation for key, info in _own_infos().items()}


def key_table() -> list[KeyRow]:
    """Every key of the recipe's own, as `section.key` or `output_dir`, in the order of the recipe."""
    rows = _own_infos().items()
    return [KeyRow(key, info.description or "", _choices(info), _default(info)) for key, info in rows]


def recipe_keys() -> dict[str, str]:
    """Every key of the recipe's own with its help text."""
    texts = {}
    for row in key_table():
        parts = [f"one of {row.choices}"] if row.choices else []
        if row.default:
            parts.append(row.default if row.default == "required" else f"default {row.default}")
        texts[row.key] = row.description + (f" ({'; '.join(parts)})" if parts else "")
    return texts


def _own_infos() -> dict[str, FieldInfo]:
    infos = {"output_dir": _infos(Recipe)["output_dir"]}
    for name, section in SECTIONS.items():
        infos |= {f"{name}.{key}": info for key, info in _infos(section).items() if info.description}
    return infos


def _infos(section: Any) -> dict[str, FieldInfo]:
    """What pydantic knows of a section's keys; it adds the attribute to the class, where no type checker sees it."""
    return section.__pydantic_fields__


def _choices(info: FieldInfo) -> str:
    kinds = [info.annotation, *get_args(info.annotation)]
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return ", ".join(choices)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True)
    if default is None:
        return ""
    if isinstance(default, list):
        return ", ".join(map(str, default))
    return f"{default:.4g}" if isinstance(default, float) else str(default)
