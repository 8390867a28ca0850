"""Text in several languages: which sentence serves which purpose. No sentence serves two."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm

from agnostic_train.encoding import Encoder
from agnostic_train.files import UserError, fingerprint, hash_file, read_json, write_json
from agnostic_train.recipe import CorpusSection, EvaluationSection
from agnostic_train.sources import find_file, hub_documents, local_sentences, read_text, split_documents

STREAMED_DEFAULT = 1000
"""Validation and test sentences per language of a streamed dataset, where the recipe names no number."""


_NOT_OF_THE_TEXT = ("path", "languages", "max_length", "add_bos", "batch_size")
"""Keys of the section on which the sentences of a streamed language don't depend."""


@dataclass(frozen=True)
class LanguageText:
    """One language's sentences by purpose; no sentence serves two.

    detection and training come from the train file, validation selects (scores, strategies), test only judges.
    """

    language: str
    detection: list[str]
    training: list[str]
    validation: list[str]
    test: list[str]


@dataclass(frozen=True)
class Corpus:
    """Every language's text, and the SHA-256 of each file that it came from."""

    texts: dict[str, LanguageText]
    hashes: dict[str, str]

    @property
    def languages(self) -> list[str]:
        return list(self.texts)


def load_corpus(
    section: CorpusSection, path: str | Path | None = None, progress: bool = False, keep: Path | None = None
) -> Corpus:
    """Reads the text of every language, from `path` or, without one, from the hub's `corpus.dataset`.

    Local text is `{lang}.train`, `{lang}.valid` and, if there, `{lang}.test` as `.txt` (a document a line), `.jsonl`
    or `.parquet`. Without a test file every second sentence of valid is the test text, and only the others ever select
    anything. Documents are split at line breaks; repeated sentences are dropped; `corpus.seed` draws the order.

    Args:
        keep: a folder for what is streamed. What is there already isn't streamed again, nor looked for on the hub.

    Raises:
        UserError: a missing, empty or unreadable file, fewer sentences than asked for, or text in two splits.
    """
    texts, hashes = {}, {}
    for language in section.languages:
        if path is None:
            parts = _kept(keep, section, language, "corpus", partial(_streamed, section, language, progress))
            texts[language] = LanguageText(language, **parts)
            content = "\n".join(sentence for part in vars(texts[language]).values() for sentence in part)
            hashes[f"{section.dataset} {language}"] = hashlib.sha256(content.encode()).hexdigest()
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


def _kept(
    folder: Path | None,
    section: CorpusSection,
    language: str,
    name: str,
    read: Callable[[], dict[str, list[str]]],
) -> dict[str, list[str]]:
    """Sentences by purpose, from a file of the folder or from `read`, which fills it."""
    if folder is None:
        return read()
    own = {key: value for key, value in asdict(section).items() if key not in _NOT_OF_THE_TEXT}
    file = folder / f"{name}-{language}-{fingerprint(own)[:16]}.json"
    if not file.exists():
        write_json(file, read())
    return read_json(file)


def _streamed(section: CorpusSection, language: str, progress: bool) -> dict[str, list[str]]:
    """Fills one purpose after the other from whole documents, so that no document serves two."""
    if section.training_sentences is None:
        raise UserError("corpus.training_sentences: a streamed dataset has no end; say how many to train on")
    wanted = {
        "test": section.test_sentences or STREAMED_DEFAULT,
        "validation": section.validation_sentences or STREAMED_DEFAULT,
        "detection": section.detection_sentences,
        "training": section.training_sentences,
    }
    documents = hub_documents(section, language)
    seen: set[str] = set()
    taken: dict[str, list[str]] = {}
    with tqdm(total=sum(wanted.values()), desc=f"read {language}", disable=not progress, leave=False) as bar:
        for purpose, count in wanted.items():
            taken[purpose] = []
            while len(taken[purpose]) < count:
                document = next(documents, None)
                if document is None:
                    raise UserError(
                        f"corpus.{purpose}_sentences: {count} asked for, {section.dataset} has only "
                        f"{len(taken[purpose])} more of {language!r}"
                    )
                new = _unseen(split_documents([document], section.split_sentences), seen)
                found = list(islice(new, count - len(taken[purpose])))
                taken[purpose] += found
                bar.update(len(found))
    return taken


def _unseen(sentences: Iterator[str], seen: set[str]) -> Iterator[str]:
    for sentence in sentences:
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


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
                f"in {path}"
            )
        taken[purpose] = sentences[:count]
    training = train[section.detection_sentences :][: section.training_sentences]
    return LanguageText(language, training=training, **taken)


def check_training_text(language: str, sentences: Sequence[str]) -> None:
    """Raises `UserError` if a language has no sentence to train on."""
    if not sentences:
        raise UserError(
            f"corpus.detection_sentences: detection takes every train sentence of {language!r} and leaves none to train "
            "on; lower it or add text"
        )


def training_examples(encoder: Encoder, sentences: Mapping[str, Sequence[str]]) -> list[dict[str, list[int]]]:
    """Training sentences of some languages as `input_ids`, each closed by the end-of-sequence token."""
    examples = []
    for language, lines in sentences.items():
        check_training_text(language, lines)
        rows = encoder.encode(lines, f"training text of {language}", add_eos=True)
        examples += [{"input_ids": row["input_ids"]} for row in rows]
    return examples


def held_out_text(
    section: CorpusSection, language: str, path: str | Path | None = None, keep: Path | None = None
) -> tuple[list[str], dict]:
    """The test sentences of a language that serves no other purpose, and the SHA-256 of each file they came from.

    Local text needs `{lang}.valid` or `{lang}.test`; a hub's dataset is streamed, as by `load_corpus`.

    Raises:
        UserError: neither file is there, or fewer sentences than asked for.
    """
    count = section.test_sentences
    if path is None:
        count = count or STREAMED_DEFAULT
        read = partial(_held_out, section, language, count)
        sentences, hashes = _kept(keep, section, language, "held-out", read)["test"], {}
        source = str(section.dataset)
    else:
        files = {split: find_file(Path(path), language, split) for split in ("test", "valid")}
        file = files["test"] or files["valid"]
        if file is None:
            missing = Path(path) / f"{language}.test.txt"
            raise UserError(f"evaluation.languages: {language!r} has no file {missing}, nor .valid; add one")
        sentences, hashes, source = local_sentences(section, file), {file.name: hash_file(file)}, str(file)
        # The same half as for a language that is detected: it may become one.
        sentences = sentences if files["test"] else sentences[1::2]
    if count is not None and len(sentences) < count:
        raise UserError(f"corpus.test_sentences: {count} asked for, {source} has {len(sentences)} of {language!r}")
    return sentences[:count], hashes


def _held_out(section: CorpusSection, language: str, count: int) -> dict[str, list[str]]:
    documents = split_documents(hub_documents(section, language), section.split_sentences)
    return {"test": list(islice(_unseen(documents, set()), count))}


def judging_text(
    corpus: Corpus,
    section: CorpusSection,
    evaluation: EvaluationSection,
    path: str | Path | None = None,
    keep: Path | None = None,
) -> tuple[dict[str, dict[str, list[str]]], dict[str, str]]:
    """The text that only judges, per kind (`test`, `parallel`) and language, and the SHA-256 of files read for it.

    Args:
        path, keep: as for `load_corpus`.

    Raises:
        UserError: as `held_out_text` and `parallel_text`.
    """
    texts = {"test": {language: text.test for language, text in corpus.texts.items()}}
    hashes: dict[str, str] = {}
    for language in evaluation.languages:
        texts["test"][language], found = held_out_text(section, language, path, keep)
        hashes |= found
    if evaluation.parallel is not None:
        languages = [*section.languages, *evaluation.languages]
        texts["parallel"] = parallel_text(
            evaluation.parallel, corpus, languages, evaluation.parallel_sentences, section.seed
        )
        hashes |= {f"parallel/{it}.txt": hash_file(Path(evaluation.parallel) / f"{it}.txt") for it in texts["parallel"]}
    return texts, hashes


def parallel_text(folder: str | Path, corpus: Corpus, languages: Sequence[str], count: int | None, seed: int) -> dict:
    """Aligned lines of `{lang}.txt`, for those of the languages that have a file: `{language: [line, ...]}`.

    Args:
        corpus: no line may stand in its detection, training or validation text.
        count: draw so many lines, the same in every language; all by default.

    Raises:
        UserError: no folder, no file, lines that aren't aligned, or a line that something was chosen or trained by.
    """
    key, folder = "evaluation.parallel", Path(folder)
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} isn't a folder")
    files = {language: file for language in languages if (file := folder / f"{language}.txt").exists()}
    if not files:
        raise UserError(f"{key}: {folder} has no file for any of {', '.join(languages)}, such as {languages[0]}.txt")
    lines = {language: [it.strip() for it in read_text(file).split("\n")] for language, file in files.items()}
    for language, its in lines.items():
        while its and not its[-1]:
            its.pop()
        first = next(iter(lines))
        if len(its) != len(lines[first]):
            raise UserError(
                f"{key}: {files[language]} has {len(its)} lines, {files[first].name} {len(lines[first])}; aligned "
                "text has as many in every language"
            )
    kept = [index for index, line in enumerate(zip(*lines.values(), strict=True)) if all(line)]
    if count is not None:
        if len(kept) < count:
            raise UserError(f"{key}_sentences: {count} asked for, {folder} has {len(kept)}")
        kept = sorted(random.Random(seed).sample(kept, count))
    for language, text in corpus.texts.items():
        seen = {line for line in (*text.detection, *text.training, *text.validation)}
        repeated = [lines[language][index] for index in kept if language in lines and lines[language][index] in seen]
        if repeated:
            raise UserError(
                f"{key}: {len(repeated)} lines of {files[language]} stand in the train or valid text, such as "
                f"{repeated[0][:60]!r}; take them out of one"
            )
    return {language: [its[index] for index in kept] for language, its in lines.items()}
