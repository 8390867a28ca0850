"""Reading text in several languages and dividing its sentences among the purposes that they serve."""

import random
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from agnostic_train.corpus.local_files import find_file, local_sentences
from agnostic_train.corpus.streaming import streamed_by_purpose
from agnostic_train.errors import UserError
from agnostic_train.fingerprints import fingerprint, hash_file
from agnostic_train.recipe import CorpusSection

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LanguageText:
    """One language's sentences by purpose; no sentence serves two.

    `detection` and `training` come from the train text, `validation` selects (scores, strategies), and `test` is used
    only for evaluation.
    """

    detection: list[str]
    training: list[str]
    validation: list[str]
    test: list[str]


@dataclass(frozen=True)
class Corpus:
    """Every language's text, and the SHA-256 of each file that it came from (of the sentences, if streamed)."""

    texts: dict[str, LanguageText]
    hashes: dict[str, str]


def load_corpus(
    section: CorpusSection,
    progress: bool = False,
    keep: Path | None = None,
    trained: Container[str] | None = None,
) -> Corpus:
    """Reads the text of every language from `corpus.path` or, if there is none, from the hub's `corpus.dataset`.

    Local text is `{lang}.train`, `{lang}.valid` and optionally `{lang}.test`, as `.txt` (one document per line) or
    `.jsonl`, compressed or not, or as `.parquet`. Without a test file, every second sentence of valid is test text, and
    only the others are used to select anything. Documents are split at line breaks (with `corpus.split_sentences`, also
    at sentence ends; sentences that two of the files share are then left out of train, or else of valid), repeated
    sentences are dropped, and train is shuffled by `corpus.seed`.

    Args:
        keep: a folder that stores streamed text. Text that it has is neither streamed again nor looked up on the hub.
        trained: the languages whose training text is streamed; all by default. Local text is always read whole.

    Raises:
        UserError: a file is missing, empty or unreadable, has too few sentences, or shares one with another (all, with
            `corpus.split_sentences`).
    """
    texts, hashes = {}, {}
    for language in section.languages:
        if section.path is None:
            with_training = trained is None or language in trained
            parts = streamed_by_purpose(section, language, with_training, keep, progress)
            texts[language] = LanguageText(**parts)
            hashes[f"{language}, streamed"] = fingerprint(parts)
        else:
            texts[language], files = _local(section, Path(section.path), language)
            hashes |= {file.name: hash_file(file) for file in files}
    return Corpus(texts, hashes)


def _local(section: CorpusSection, folder: Path, language: str) -> tuple[LanguageText, list[Path]]:
    if not folder.is_dir():
        raise UserError(f"corpus.path: {folder} isn't a folder")
    files = {split: find_file(folder, language, split) for split in ("train", "valid", "test")}
    for split in ("train", "valid"):
        if files[split] is None:
            raise UserError(
                f"corpus.languages: {language!r} has no file {folder / f'{language}.{split}.txt'} (nor .jsonl, "
                ".parquet); add it or take the language out"
            )
    splits = {split: local_sentences(section, file) for split, file in files.items() if file is not None}
    if "test" not in splits:
        if len(splits["valid"]) < 2:
            raise UserError(
                f"{files['valid']}: one sentence can't be shared by validation and test; add others, one per line"
            )
        splits["test"], splits["valid"] = splits["valid"][1::2], splits["valid"][0::2]
    if section.split_sentences:
        splits = _without_repetitions(language, splits, folder)
    _check_disjoint(language, splits, folder)
    return _by_purpose(section, language, splits, folder), [file for file in files.values() if file is not None]


def _without_repetitions(language: str, splits: dict[str, list[str]], folder: Path) -> dict[str, list[str]]:
    """Takes sentences out of train that are in valid or test, and out of valid those that are in test.

    Documents that differ may have some in common, such as "Thank you."; raises `UserError` if none are left of a split.
    """
    kept: dict[str, list[str]] = {}
    seen = set[str]()
    for split in ("test", "valid", "train"):
        kept[split] = [sentence for sentence in splits[split] if sentence not in seen]
        seen.update(splits[split])
        if splits[split] and not kept[split]:
            raise UserError(f"{folder}: valid or test text of {language!r} has every sentence of its {split} text")
        if num_repeated := len(splits[split]) - len(kept[split]):
            logger.warning_once(
                f"{split} text of {language}: {num_repeated} sentences are left out, which valid or test text has too"
            )
    return kept


def _check_disjoint(language: str, splits: dict[str, list[str]], path: Path) -> None:
    # Sets of held-out text alone: train text may be large.
    valid, test = set(splits["valid"]), set(splits["test"])
    repeated = [it for it in splits["train"] if it in valid or it in test]
    repeated += [it for it in splits["test"] if it in valid]
    if repeated:
        examples = "; ".join(repr(sentence[:60]) for sentence in repeated[:3])
        raise UserError(
            f"{path}: {len(repeated)} sentences of {language!r} are in two of its train, valid and test text, such as "
            f"{examples}; take them out of one"
        )


def _by_purpose(section: CorpusSection, language: str, splits: dict[str, list[str]], path: Path) -> LanguageText:
    # One generator per language, so that adding a language doesn't change the sample of another.
    train = list(splits["train"])
    random.Random(f"{section.seed} {language}").shuffle(train)
    wanted = {
        "detection": (train, section.detection_sentences, "train"),
        "validation": (splits["valid"], section.validation_sentences, "valid"),
        "test": (splits["test"], section.test_sentences, "test"),
    }
    taken = {}
    for purpose, (sentences, count, split) in wanted.items():
        if count is not None and len(sentences) < count:
            raise UserError(
                f"corpus.{purpose}_sentences: {count} asked for, {language!r} has {len(sentences)} {split} sentences "
                f"in {path}, repetitions left out; lower it or add text"
            )
        taken[purpose] = sentences[:count]
    training = train[section.detection_sentences :][: section.training_sentences]
    return LanguageText(training=training, **taken)
