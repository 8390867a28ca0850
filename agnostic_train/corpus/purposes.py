"""Text in several languages: which sentence serves which purpose. No sentence serves two."""

import random
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from agnostic_train.corpus.local_files import find_file, local_sentences
from agnostic_train.corpus.streaming import streamed_by_purpose
from agnostic_train.errors import UserError
from agnostic_train.files import fingerprint, hash_file
from agnostic_train.recipe import CorpusSection


@dataclass(frozen=True)
class LanguageText:
    """One language's sentences by purpose; no sentence serves two.

    detection and training come from the train file, validation selects (scores, strategies), test only judges.
    """

    detection: list[str]
    training: list[str]
    validation: list[str]
    test: list[str]


@dataclass(frozen=True)
class Corpus:
    """Every language's text, and the SHA-256 of each file that it came from."""

    texts: dict[str, LanguageText]
    hashes: dict[str, str]


def load_corpus(
    section: CorpusSection,
    path: str | Path | None = None,
    progress: bool = False,
    keep: Path | None = None,
    trained: Container[str] | None = None,
) -> Corpus:
    """Reads the text of every language, from `path` or, without one, from the hub's `corpus.dataset`.

    Local text is `{lang}.train`, `{lang}.valid` and, if there, `{lang}.test` as `.txt` (a document a line), `.jsonl`, both
    also compressed, or `.parquet`. Without a test file every second sentence of valid is the test text, and only the others
    ever select anything. Documents are split at line breaks; repeated sentences are dropped; `corpus.seed` draws the order.

    Args:
        keep: a folder for what is streamed. What is there already isn't streamed again, nor looked for on the hub.
        trained: the languages of which training text is streamed; all by default. Local text is read whole.

    Raises:
        UserError: a missing, empty or unreadable file, fewer sentences than asked for, or text in two splits.
    """
    texts, hashes = {}, {}
    for language in section.languages:
        if path is None:
            with_training = trained is None or language in trained
            parts = streamed_by_purpose(section, language, with_training, keep, progress)
            texts[language] = LanguageText(**parts)
            hashes[f"{language}, streamed"] = fingerprint(parts)
        else:
            texts[language], files = _local(section, Path(path), language)
            hashes |= {file.name: hash_file(file) for file in files}
    return Corpus(texts, hashes)


def _local(section: CorpusSection, folder: Path, language: str) -> tuple[LanguageText, list[Path]]:
    if not folder.is_dir():
        raise UserError(f"corpus.path: {folder} isn't a folder")
    files = {split: find_file(folder, language, split) for split in ("train", "valid", "test")}
    for split in ("train", "valid"):
        if files[split] is None:
            raise UserError(
                f"corpus.languages: {language!r} has no file {folder / f'{language}.{split}.txt'} (nor .jsonl, .parquet); "
                "add it or take the language out"
            )
    splits = {split: local_sentences(section, file) for split, file in files.items() if file is not None}
    if "test" not in splits:
        if len(splits["valid"]) < 2:
            raise UserError(f"{files['valid']}: one sentence can't be shared by validation and test")
        splits["test"], splits["valid"] = splits["valid"][1::2], splits["valid"][0::2]
    _check_disjoint(language, splits, folder)
    return _by_purpose(section, language, splits, folder), [file for file in files.values() if file is not None]


def _check_disjoint(language: str, splits: dict[str, list[str]], path: Path) -> None:
    seen: dict[str, str] = {}
    shared: list[str] = []
    for split, sentences in splits.items():
        shared += [sentence for sentence in sentences if seen.setdefault(sentence, split) != split]
    if shared:
        examples = "; ".join(repr(sentence[:60]) for sentence in shared[:3])
        raise UserError(
            f"{path}: {len(shared)} sentences of {language!r} stand in two of its train, valid and test text, such as "
            f"{examples}; take them out of one"
        )


def _by_purpose(section: CorpusSection, language: str, splits: dict[str, list[str]], path: Path) -> LanguageText:
    # A generator of its own per language: adding a language doesn't change another's sample.
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


def check_training_text(language: str, sentences: Sequence[str]) -> None:
    """Raises `UserError` if a language has no sentence to train on."""
    if not sentences:
        raise UserError(
            f"corpus.detection_sentences: detection takes every train sentence of {language!r} and leaves none to train "
            "on; lower it or add text"
        )
