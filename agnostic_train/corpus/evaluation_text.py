"""Text that is used only for evaluation: test sentences of every measured language, and aligned lines."""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from agnostic_train.corpus.documents import is_visible, split_documents
from agnostic_train.corpus.local_files import find_file, local_sentences, read_text
from agnostic_train.corpus.purposes import Corpus
from agnostic_train.corpus.streaming import STREAMED_DEFAULT, streamed_test
from agnostic_train.errors import UserError
from agnostic_train.fingerprints import hash_file
from agnostic_train.recipe import CorpusSection, EvaluationSection

_PARALLEL = "evaluation.parallel"


def read_test_text(section: CorpusSection, language: str, keep: Path | None = None) -> tuple[list[str], dict]:
    """Returns the test sentences of a language that is only evaluated, and the SHA-256 of each file they came from.

    Local text needs `{lang}.test` or `{lang}.valid`; a hub dataset is streamed, as by `load_corpus`.

    Raises:
        UserError: neither file exists, or there are fewer sentences than asked for.
    """
    count = section.test_sentences
    if section.path is None:
        count = count or STREAMED_DEFAULT
        sentences, hashes, source = streamed_test(section, language, count, keep), {}, str(section.dataset)
    else:
        folder = Path(section.path)
        files = {split: find_file(folder, language, split) for split in ("test", "valid")}
        file = files["test"] or files["valid"]
        if file is None:
            missing = folder / f"{language}.test.txt"
            raise UserError(f"evaluation.languages: {language!r} has no file {missing}, nor .valid; add one")
        sentences, hashes, source = local_sentences(section, file), {file.name: hash_file(file)}, str(file)
        # The same half as for a language that is detected, since this one may become one.
        sentences = sentences if files["test"] else sentences[1::2]
    if not sentences:
        raise UserError(f"evaluation.languages: {source} has no sentence of {language!r} to test on; add text")
    if count is not None and len(sentences) < count:
        by_default = " by default" if section.test_sentences is None else ""
        raise UserError(
            f"corpus.test_sentences: {count} asked for{by_default}, {source} has {len(sentences)} of {language!r}"
        )
    return sentences[:count], hashes


def read_evaluation_text(
    corpus: Corpus, section: CorpusSection, evaluation: EvaluationSection, keep: Path | None
) -> tuple[dict[str, dict[str, list[str]]], dict[str, str]]:
    """Returns the text for evaluation, by kind (`test`, `parallel`) and language, and the SHA-256 of files read for it.

    keep: as for `load_corpus`.

    Raises:
        UserError: as by `read_test_text` and `parallel_text`.
    """
    texts = {"test": {language: text.test for language, text in corpus.texts.items()}}
    hashes: dict[str, str] = {}
    for language in evaluation.languages:
        texts["test"][language], file_hashes = read_test_text(section, language, keep)
        hashes |= file_hashes
    if evaluation.parallel is not None:
        languages = [*section.languages, *evaluation.languages]
        texts["parallel"] = parallel_text(
            evaluation.parallel, corpus, languages, evaluation.parallel_sentences, section.seed, section.split_sentences
        )
        hashes |= {f"parallel/{it}.txt": hash_file(Path(evaluation.parallel) / f"{it}.txt") for it in texts["parallel"]}
    return texts, hashes


def seen_in_training(
    texts: Mapping[str, Mapping[str, Sequence[str]]], training: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Says of which languages some text for evaluation is trained on, under the name of another language.

    Within a language that is refused; across languages, crawls and close varieties have such text.

    Args:
        texts: by kind and language, as from `read_evaluation_text`.
        training: per language that is trained on, its sentences.
    """
    trained = {language: set(sentences) for language, sentences in training.items()}
    for kind, of_kind in texts.items():
        for language, sentences in of_kind.items():
            for other, own in trained.items():
                if other != language and (seen := [it for it in sentences if it in own]):
                    yield (
                        f"{kind} text of {language}: {len(seen)} of {len(sentences)} sentences are also in the "
                        f"training text of {other}, such as {seen[0][:60]!r}"
                    )


def parallel_text(
    folder: str | Path,
    corpus: Corpus,
    languages: Sequence[str],
    count: int | None,
    seed: int,
    split_sentences: bool = False,
) -> dict:
    """Reads aligned lines from `{lang}.txt`, for the languages that have such a file: `{language: [line, ...]}`.

    Args:
        corpus: no line, nor all sentences of a line, may be in its detection, training or validation text.
        count: how many lines to draw, the same in every language; all by default.
        split_sentences: whether the corpus was also split at sentence ends.

    Raises:
        UserError: there is no folder, no file, or too few lines; the lines aren't aligned; or a line is in the
            detection, training or validation text.
    """
    lines = _aligned_lines(Path(folder), languages)
    kept = [index for index, line in enumerate(zip(*lines.values(), strict=True)) if all(line)]
    if not kept:
        raise UserError(f"{_PARALLEL}: no line of {folder} has text in all of {', '.join(lines)}")
    if count is not None:
        if len(kept) < count:
            raise UserError(f"{_PARALLEL}_sentences: {count} asked for, {folder} has {len(kept)}")
        kept = sorted(random.Random(seed).sample(kept, count))
    drawn = {language: [own[index] for index in kept] for language, own in lines.items()}
    _check_unseen(drawn, corpus, split_sentences)
    return drawn


def _aligned_lines(folder: Path, languages: Sequence[str]) -> dict[str, list[str]]:
    """Reads `{lang}.txt` of each language that has one, without the blank lines that end all of them."""
    if not folder.is_dir():
        raise UserError(f"{_PARALLEL}: {folder} isn't a folder")
    files = {language: file for language in languages if (file := folder / f"{language}.txt").exists()}
    if not files:
        raise UserError(
            f"{_PARALLEL}: {folder} has no file for any of {', '.join(languages)}, such as {languages[0]}.txt"
        )
    lines = {
        language: [it.strip() * is_visible(it) for it in read_text(file).removesuffix("\n").split("\n")]
        for language, file in files.items()
    }
    # Some files end with blank lines, which others lack.
    lengths = {language: max((n for n, it in enumerate(own, 1) if it), default=0) for language, own in lines.items()}
    longest = max(lengths, key=lambda language: lengths[language])
    for language, own in lines.items():
        if len(own) < lengths[longest]:
            raise UserError(
                f"{_PARALLEL}: {files[language]} has {len(own)} lines, {files[longest].name} {lengths[longest]}; "
                "aligned text has as many in every language"
            )
    return {language: own[: lengths[longest]] for language, own in lines.items()}


def _check_unseen(drawn: Mapping[str, Sequence[str]], corpus: Corpus, split_sentences: bool) -> None:
    """Raises `UserError` for lines that are, whole or sentence by sentence, in text that trains or selects."""
    for language, lines in drawn.items():
        text = corpus.texts.get(language)
        if text is None:  # a language that is only measured
            continue
        seen = {*text.detection, *text.training, *text.validation}
        parts = {line: [*split_documents([line], split_sentences)] for line in lines}
        repeated = [line for line in lines if parts[line] and seen.issuperset(parts[line])]
        if repeated:
            raise UserError(
                f"{_PARALLEL}: {len(repeated)} lines of {language}.txt are in the train or valid text, such as "
                f"{repeated[0][:60]!r}; take them out of one"
            )
