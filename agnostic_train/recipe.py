"""A recipe: what to run on what, as dataclasses. Defaults < YAML file < flags; every unknown key is an error."""

import math
import os
from dataclasses import asdict, field, fields
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Literal, dataclass_transform, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ArgsKwargs
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from agnostic_train.files import UserError


@dataclass_transform(kw_only_default=True, frozen_default=True)
def _section(cls: type) -> type:
    return dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False), frozen=True, kw_only=True)(cls)


def _as_list(value: Any) -> Any:
    """A flag's `--corpus.languages=en,sw` is the list that it looks like, and `--comparison.seeds=0` one of one."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",")]
    return [value] if isinstance(value, (int, float)) else value


def _distinct(value: list[str]) -> list[str]:
    if len(set(value)) < len(value):
        raise ValueError("names a language twice")
    return value


def _filled_in(value: str) -> str:
    filled = os.path.expandvars(value)
    if "$" in filled:
        raise ValueError(f"{filled[filled.index('$') :].split('/')[0]} isn't set in the environment")
    return filled


# A shell leaves the ~ of --output_dir=~/runs as it is.
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
Language = Annotated[str, Field(min_length=1, pattern=r"^[^/\\\s]+$")]
Languages = Annotated[list[Language], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_distinct)]

EMBEDDED = "embedded:quickstart"
"""As `model.name` and `corpus.path`: the package's own tiny model and phrasebook."""


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
    config_pattern: str | None = Field(default=None, description="Its config for a language, such as '{lang}'.")
    data_files: str | None = Field(default=None, description="Its files for a language, with {lang}, if no config.")
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
        return self


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
    pilot_strategies: Annotated[list[SetStrategy], BeforeValidator(_as_list), Field(min_length=2)] = Field(
        default_factory=lambda: list(get_args(SetStrategy)), description="'pilot': the strategies to try."
    )
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

    strategies: Annotated[list[Trained], BeforeValidator(_as_list), Field(min_length=2)] = Field(
        default_factory=lambda: list(get_args(Trained)), description="What to compare."
    )
    seeds: Annotated[list[int], BeforeValidator(_as_list), Field(min_length=1)] = Field(
        default_factory=lambda: [0, 1, 2], description="Each is one training of every strategy."
    )
    learning_rates: Annotated[list[float], BeforeValidator(_as_list), Field(min_length=1)] | None = Field(
        default=None,
        description="Tried for every strategy with the first seed; without it, training.learning_rate and a third and "
        "three times of it. While the best is at an end, one more is tried there, twice at most.",
    )
    select_by: Literal["target", "all"] = Field(
        default="target",
        description="The best rate has the lowest bits per byte on validation text, of the enhanced languages or of all.",
    )


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
_UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")
_MOST_VALUES = 10_000
_FINITE = ConfigDict(allow_inf_nan=False)
_OWN_KEYS = {"output_dir": "output_dir", "report_to": "tracking.wandb", "run_name": "tracking.run_name"}


def training_argument_types() -> dict[str, Any]:
    """Every key of transformers' `TrainingArguments` that a recipe may set, with its type."""
    from transformers import TrainingArguments  # slow to import, and not needed to read a recipe's own keys

    hints = get_type_hints(TrainingArguments)
    return {it.name: hints[it.name] for it in fields(TrainingArguments) if it.init and it.name not in _OWN_KEYS}


def recipe_keys() -> dict[str, str]:
    """Every key of the recipe's own, as `section.key` or `output_dir`, with its help text."""
    keys = {
        f"{name}.{key}": info.description + _choices_and_default(info)
        for name, section in SECTIONS.items()
        for key, info in _infos(section).items()
        if info.description is not None
    }
    return {"output_dir": _infos(Recipe)["output_dir"].description, **keys}


def _infos(section: Any) -> dict[str, FieldInfo]:
    """What pydantic knows of a section's keys; it adds the attribute to the class, where no type checker sees it."""
    return section.__pydantic_fields__


def _choices_and_default(info: FieldInfo) -> str:
    kinds = (info.annotation, *get_args(info.annotation))
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    parts = [f"one of {', '.join(choices)}"] if choices else []
    default = info.get_default(call_default_factory=True)
    if info.is_required():
        parts.append("required")
    elif isinstance(default, list):
        parts += [f"default {', '.join(map(str, default))}"] if default else []
    elif default is not None:
        parts.append(f"default {default:.4g}" if isinstance(default, float) else f"default {default}")
    return f" ({'; '.join(parts)})" if parts else ""


def load_recipe(file: str | Path, flags: dict[str, str] | None = None) -> Recipe:
    """Reads a YAML recipe; flags win over it, it wins over defaults.

    Args:
        file: YAML 1.2, so that `no` is Norwegian and 1e-4 a number.
        flags: `section.key` or `output_dir` to a value, parsed as YAML.

    Raises:
        UserError: one line that names the file and the key, and says what would be right.
    """
    source = str(file)
    try:
        values = _parse_yaml(Path(file).read_text(encoding="utf-8"), source)
    except FileNotFoundError:
        raise UserError(f"{source}: no such recipe") from None
    except IsADirectoryError:
        raise UserError(f"{source}: a folder, where a recipe (YAML) was expected") from None
    except UnicodeDecodeError:
        raise UserError(f"{source}: not UTF-8 text") from None
    if values is None:
        raise UserError(f"{source}: the recipe is empty")
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected sections such as 'model:' and 'corpus:', not a {type(values).__name__}")
    for key, value in (flags or {}).items():
        section, _, name = key.partition(".")
        parsed = _parse_yaml(value, f"--{key}")
        if not name:
            values[section] = parsed
            continue
        if not isinstance(values.setdefault(section, {}), dict):
            raise UserError(f"{source}: {section} must be a section of keys")
        values[section][name] = parsed
    return make_recipe(values, source)


def make_recipe(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Builds a recipe from nested plain values; see `load_recipe`."""
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for name, section in values.items():
        for key, value in section.items() if isinstance(section, dict) else [("", section)]:
            if not isinstance(name, str) or not isinstance(key, str):
                raise UserError(f"{source}: unknown key {_short(key or name)}; a key is a word")
            _check_plain([name, key, value], f"{source}: {name}.{key}".rstrip("."))
    training = values.get("training")
    if isinstance(training, dict):
        values["training"] = _split_training(training, source)
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        # A misspelt key is missing under its right name too: the misspelling is the better message.
        errors = sorted(error.errors(), key=lambda it: it["type"] not in _UNKNOWN_KEY)
        raise UserError(f"{source}: {_explain(errors[0])}") from None


def _split_training(training: dict[str, Any], source: str) -> dict[str, Any]:
    """Moves the TrainingArguments among the keys into `arguments`, each checked against its type."""
    own = [it.name for it in fields(TrainingSection) if it.name != "arguments"]
    known = training_argument_types()
    split: dict[str, Any] = {key: value for key, value in training.items() if key in own}
    arguments = {}
    for key, value in training.items():
        if key in own:
            continue
        if key in _OWN_KEYS:
            raise UserError(f"{source}: training.{key} comes from the recipe's own key {_OWN_KEYS[key]}")
        if key not in known:
            raise UserError(f"{source}: {_unknown(f'training.{key}', [f'training.{it}' for it in (*own, *known)])}")
        try:
            arguments[key] = TypeAdapter(known[key], config=_FINITE).validate_python(value)
        except ValidationError as error:
            raise UserError(f"{source}: training.{key}: {error.errors()[0]['msg']}, not {_short(value)}") from None
    return {**split, "arguments": arguments}


def _check_plain(value: Any, where: str) -> None:
    """Refuses what a manifest (strict JSON) or a file name can't hold, such as YAML's dates and what contains itself."""
    left, num_values = [value], 0
    while left:
        it = left.pop()
        num_values += 1
        if num_values > _MOST_VALUES:
            # Aliases of aliases: a few lines of YAML can stand for billions of values, or for endless ones.
            raise UserError(f"{where}: more than {_MOST_VALUES:,} values, or it contains itself; write it out shorter")
        if isinstance(it, dict):
            left += [*it.keys(), *it.values()]
        elif isinstance(it, (list, tuple)):
            left += it
        elif isinstance(it, str):
            if "\0" in it or any("\ud800" <= character <= "\udfff" for character in it):
                raise UserError(f"{where}: {_short(it)} holds characters that no text or file name can hold")
        elif isinstance(it, int):
            if not abs(it) < 2**63:
                raise UserError(f"{where}: a whole number must be below 2^63")
        elif isinstance(it, float):
            if not math.isfinite(it):
                raise UserError(f"{where}: must be a finite number, not {it}")
        elif it is not None:
            raise UserError(f"{where}: {_short(it)} is a {type(it).__name__}; write it as text, in quotes")


def _short(value: Any) -> str:
    shortened = Repr()
    shortened.maxlevel, shortened.maxstring, shortened.maxother = 2, 100, 100
    return shortened.repr(value)


def _explain(error: dict) -> str:
    key = ".".join(str(part) for part in error["loc"] if isinstance(part, str))
    if error["type"] in _UNKNOWN_KEY:
        candidates = [*SECTIONS, *recipe_keys()] if "." not in key else list(recipe_keys())
        return _unknown(key, candidates)
    if error["type"] in ("missing", "missing_argument"):
        return f"{key} is missing"
    if error["type"] in ("dataclass_type", "dataclass_exact_type"):
        return f"{key} must be a section of keys, not {_short(error['input'])}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], (dict, ArgsKwargs)) else f", not {_short(error['input'])}"
    return f"{key}: {message[0].lower() + message[1:]}{given}"


def _unknown(key: str, candidates: list[str]) -> str:
    nearest = get_close_matches(key, candidates, n=1, cutoff=0.5)
    return f"unknown key {key}" + (f"; did you mean {nearest[0]}?" if nearest else "")


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise UserError(f"{source}: not valid YAML (nested too deeply)") from None
    except (YAMLError, ValueError, LookupError) as error:  # `!!int x` and a 99th of May are Python's own errors
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{source}: not valid YAML{where} ({problem})") from None
