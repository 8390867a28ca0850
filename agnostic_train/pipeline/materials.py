"""The model, tokenizer and text that a recipe names, each loaded when it is first needed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from agnostic_train.corpus.encoding import Encoder
from agnostic_train.corpus.evaluation_text import read_evaluation_text, seen_in_training
from agnostic_train.corpus.purposes import Corpus, load_corpus
from agnostic_train.errors import UserError
from agnostic_train.evaluation.task_evaluation import TaskSuite, tokenizer_of_tasks
from agnostic_train.model.loading import at_checkpoint, load_config, load_model, load_tokenizer
from agnostic_train.model.reading import has_adapter, has_tokenizer, hub_commit
from agnostic_train.quickstart.tiny_model import cache_directory, quickstart_corpus, quickstart_model
from agnostic_train.recipe import EMBEDDED, CorpusSection, ModelSection, Recipe

logger = logging.get_logger(__name__)


class Materials:
    """A run's model, tokenizer, text and tasks.

    Args:
        recipe: names them.
        processes: the run's processes.
        say: receives one line for each thing that is loaded.

    Attributes:
        hashes: the SHA-256 of each text file read so far.
    """

    def __init__(self, recipe: Recipe, processes: PartialState, say: Callable[[str], None]):
        self.recipe = recipe
        self.processes = processes
        self.say = say
        self.hashes: dict[str, str] = {}
        self._told_model = False

    @cached_property
    def _model_name(self) -> str:
        """The recipe's model; for the embedded one, its folder, made at first use."""
        if self.recipe.model.name != EMBEDDED:
            return self.recipe.model.name
        if self.processes.num_processes > 1 and not cache_directory().joinpath("model").exists():
            raise UserError(f"model.name: {EMBEDDED} is made by a single process; run this once without a launcher")
        self.say("model: the embedded default (at first use it is trained from scratch, which takes a minute or more)")
        return str(quickstart_model())

    @cached_property
    def model_section(self) -> ModelSection:
        """The recipe's section, with the hub's commit as revision: a branch may move during the run."""
        section = self.recipe.model
        commit = hub_commit(self._model_name, "model.name", section.revision)
        return replace(section, name=self._model_name, revision=commit or section.revision)

    @cached_property
    def corpus_section(self) -> CorpusSection:
        """The recipe's section; for the embedded text, with its folder, made at first use."""
        section = self.recipe.corpus
        return replace(section, path=str(quickstart_corpus())) if section.path == EMBEDDED else section

    @property
    def _kept_text(self) -> Path | None:
        """The folder for streamed text, from which later commands read the same text without a network."""
        return kept_text(self.recipe) if self.recipe.corpus.dataset else None

    def _streamed_once(self) -> AbstractContextManager:
        """Lets one process per machine stream the text; the others then read what it kept."""
        return self.processes.local_main_process_first() if self._kept_text else nullcontext()

    @cached_property
    def corpus(self) -> Corpus:
        with self._streamed_once():
            shown = self.processes.is_local_main_process
            trained = self.recipe.languages_with_training_text
            corpus = load_corpus(self.corpus_section, shown, self._kept_text, trained)
        self.hashes |= corpus.hashes
        for language, text in corpus.texts.items():
            self.say(
                f"corpus: {language}  {len(text.detection)} sentences to detect on, {len(text.training)} to train on, "
                f"{len(text.validation)} for validation, {len(text.test)} to test on"
            )
        return corpus

    @property
    def training_text(self) -> dict[str, Sequence[str]]:
        """The sentences to train on, per language."""
        return {language: self.corpus.texts[language].training for language in self.recipe.training.text_languages}

    @cached_property
    def evaluation_texts(self) -> dict[str, dict[str, list[str]]]:
        """The sentences used only to measure, per kind (`test`, `parallel`) and language."""
        with self._streamed_once():
            texts, hashes = read_evaluation_text(
                self.corpus, self.corpus_section, self.recipe.evaluation, self._kept_text
            )
        self.hashes |= hashes
        measured = [*self.recipe.corpus.languages, *self.recipe.evaluation.languages]
        if "parallel" in texts and (missing := [it for it in measured if it not in texts["parallel"]]):
            self.say(f"parallel text: {self.recipe.evaluation.parallel} has no .txt of {', '.join(missing)}")
        for line in seen_in_training(texts, self.training_text):
            self.say(line)
        return texts

    @cached_property
    def detection_batches(self) -> dict[str, list]:
        return self.batches("detection")

    @cached_property
    def validation_batches(self) -> dict[str, list]:
        return self.batches("validation")

    def evaluation_batches(self) -> dict[str, dict[str, list]]:
        """The batches of `evaluation_texts`, per kind and language."""
        size = self.recipe.evaluation.batch_size
        return {kind: self.batches(kind, sentences, size) for kind, sentences in self.evaluation_texts.items()}

    @cached_property
    def task_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer for `task_suite`."""
        return tokenizer_of_tasks(self.tokenizer, self.recipe.corpus.add_bos)

    @cached_property
    def task_suite(self) -> TaskSuite | None:
        """The tasks to evaluate on, with their data; None if the recipe names none."""
        section = self.recipe.evaluation
        if not section.tasks:
            return None
        return TaskSuite(
            section.tasks,
            task_paths=section.task_paths,
            mgsm=section.mgsm,
            num_fewshot=section.num_fewshot,
            limit=section.limit,
            max_new_tokens=section.max_new_tokens,
            batch_size=section.batch_size or self.recipe.corpus.batch_size,
        )

    @cached_property
    def model(self) -> PreTrainedModel:
        # A comparison reloads the model for each training; only the first load shows progress.
        with _without_bars() if self._told_model else nullcontext():
            model = load_model(self.model_section)
        if not self._told_model:
            # ZeRO-3 partitions a weight and keeps its full size in `ds_numel`.
            millions = sum(getattr(it, "ds_numel", it.numel()) for it in model.parameters()) / 1e6
            self.say(f"model: {self.recipe.model.name}, {millions:.1f} M parameters, on {model.device}")
            self._told_model = True
        return model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model_section)

    @cached_property
    def encoder(self) -> Encoder:
        config = load_config(self.model_section)
        return Encoder.of(self.tokenizer, self.recipe.corpus, config)

    def check_trainable(self, plain: str | None) -> None:
        """Raises `UserError` for a checkpoint that a training can't start from.

        plain: what needs weights that aren't quantised; None if nothing does.
        """
        if has_adapter(self.model_section.name):
            raise UserError(
                f"model.name: {self.model_section.name} holds an adapter, too; merge it into the model (PEFT's "
                "merge_and_unload), save the result, and name that folder"
            )
        config = load_config(self.model_section)
        if plain is not None and getattr(config, "quantization_config", None) is not None:
            raise UserError(f"model.name: {plain} needs the unquantised model, not {self.recipe.model.name}; name that")

    def check_vocabularies(self, key: str, sources: Sequence[str]) -> None:
        """Raises `UserError` that names `key` for a checkpoint that needs another tokenizer than the model's.

        sources: folders, or revisions of the model's hub repository.
        """
        own = self.tokenizer.get_vocab() if sources else {}
        for source in sources:
            section = at_checkpoint(self.recipe.model, source, key)
            config = load_config(section, key)
            others = load_tokenizer(section, key).get_vocab() if has_tokenizer(source) else own
            # One of them may have further tokens, such as one to pad with.
            if not (own.items() <= others.items() or others.items() <= own.items()):
                raise UserError(
                    f"{key}: {source} has another tokenizer than model.name; name a state of the same model"
                )
            size = config.get_text_config().vocab_size
            if size < len(self.tokenizer):
                raise UserError(
                    f"{key}: {source} has a vocabulary of {size}, and the tokenizer {len(self.tokenizer)} tokens; name "
                    "another state of the model"
                )

    def batches(
        self, purpose: str, sentences: dict[str, list[str]] | None = None, batch_size: int | None = None
    ) -> dict[str, list]:
        """The batches per language of the sentences for a purpose, or of given sentences prepared in the same way."""
        if sentences is None:
            sentences = {language: getattr(text, purpose) for language, text in self.corpus.texts.items()}
        return {
            language: self.encoder.batches(
                lines,
                f"{purpose} text of {language}",
                batch_size or self.recipe.corpus.batch_size,
                skip_special_tokens=purpose == "detection" and self.recipe.detection.skip_special_tokens,
            )
            for language, lines in sentences.items()
        }

    def take_model(self) -> PreTrainedModel:
        """Returns the model and drops the reference kept here."""
        model = self.model
        self.forget_model()
        return model

    def forget_model(self) -> None:
        """Drops the model, after training has changed it or to free its memory; the next access loads it again."""
        self.__dict__.pop("model", None)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Disables transformers' progress bars inside the block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def kept_text(recipe: Recipe) -> Path:
    """The folder that keeps a recipe's streamed text."""
    return Path(recipe.output_dir) / ".corpus"
