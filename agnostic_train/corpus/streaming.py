"""Text streamed from a hub dataset and stored, so that later commands read the same text without a network."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm
from transformers.utils import logging

from agnostic_train.corpus.documents import split_documents
from agnostic_train.corpus.hub import hub_documents
from agnostic_train.errors import UserError
from agnostic_train.files import read_json, write_json
from agnostic_train.fingerprints import file_key, fingerprint
from agnostic_train.recipe import CorpusSection

logger = logging.get_logger(__name__)

STREAMED_DEFAULT = 1000
"""The number of validation and of test sentences streamed per language if the recipe names none."""

_OF_THE_SOURCE = (
    "dataset", "revision", "config_pattern", "data_files", "dataset_split", "text_column", "split_sentences", "seed"
)  # fmt: skip
"""Corpus keys that determine a language's documents, their order, and how they are split into sentences."""


def wanted_sentences(section: CorpusSection, with_training: bool) -> dict[str, int]:
    """Returns how many sentences of a language are streamed for each purpose.

    Raises:
        UserError: the recipe doesn't say how many to train on.
    """
    if with_training and section.training_sentences is None:
        raise UserError("corpus.training_sentences: a streamed dataset has no end; say how many to train on")
    return {
        "test": section.test_sentences or STREAMED_DEFAULT,
        "validation": section.validation_sentences or STREAMED_DEFAULT,
        "detection": section.detection_sentences,
        "training": (section.training_sentences or 0) if with_training else 0,
    }


def streamed_by_purpose(
    section: CorpusSection, language: str, with_training: bool, keep: Path | None, progress: bool
) -> dict[str, list[str]]:
    """Streams a language's sentences for one purpose after the other; no document serves two purposes.

    Training comes last and may get fewer sentences than asked for. Its text is stored in a separate file: whether a
    language trains, and on how much text, doesn't change the text that it is measured on.

    Raises:
        UserError: there is no such dataset, or too little text for another purpose than training.
    """
    wanted = wanted_sentences(section, with_training)
    num_training = wanted.pop("training")
    measured = _kept(keep, section, f"corpus-{language}", wanted, lambda: _fill(section, language, wanted, progress))
    if not num_training:
        return measured["sentences"] | {"training": []}
    training = _kept(
        keep,
        section,
        f"training-{language}",
        wanted | {"training": num_training, "after": fingerprint(measured)},
        lambda: _fill(section, language, {"training": num_training}, progress, after=measured),
    )
    return measured["sentences"] | training["sentences"]


def streamed_test(section: CorpusSection, language: str, count: int, keep: Path | None) -> list[str]:
    """Returns a language's first `count` sentences, or all if there are fewer, streamed as by `streamed_by_purpose`."""

    def read() -> dict:
        sentences = split_documents(hub_documents(section, language), section.split_sentences)
        return {"sentences": list(islice(_unseen(sentences, set()), count))}

    return _kept(keep, section, f"held-out-{language}", {"test": count}, read)["sentences"]


def _kept(
    folder: Path | None, section: CorpusSection, name: str, wanted: Mapping[str, int | str], read: Callable[[], dict]
) -> dict:
    """Returns the result of `read`, which is stored in a file of `folder` and read from there the next time."""
    if folder is None:
        return read()
    source = {key: getattr(section, key) for key in _OF_THE_SOURCE}
    file = folder / f"{name}-{file_key([source, wanted])}.json"
    if not file.exists():
        write_json(file, read())
    return read_json(file, "delete it, and the text is streamed again")


def _fill(
    section: CorpusSection, language: str, wanted: dict[str, int], progress: bool, after: dict | None = None
) -> dict:
    """Streams the wanted number of sentences for each purpose.

    Args:
        after: the result of an earlier call; its documents and sentences aren't used again.

    Returns: `sentences`, by purpose, and `documents`, the number of documents read so far.
    """
    num_documents = after["documents"] if after else 0
    seen = {sentence for used in after["sentences"].values() for sentence in used} if after else set()
    documents = islice(hub_documents(section, language), num_documents, None)
    taken: dict[str, list[str]] = {}
    with tqdm(total=sum(wanted.values()), desc=f"read {language}", disable=not progress, leave=False) as bar:
        for purpose, count in wanted.items():
            taken[purpose] = []
            while len(taken[purpose]) < count and (document := next(documents, None)) is not None:
                num_documents += 1
                new = _unseen(split_documents([document], section.split_sentences), seen)
                added = list(islice(new, count - len(taken[purpose])))
                taken[purpose] += added
                bar.update(len(added))
            if len(taken[purpose]) == count:
                continue
            if purpose == "training":
                logger.warning(f"corpus.training_sentences: {count} asked for, {language} has {len(taken[purpose])}")
            else:
                key = f"{purpose}_sentences"
                by_default = " by default" if getattr(section, key) is None else ""
                raise UserError(
                    f"corpus.{key}: {count} asked for{by_default}, {section.dataset} has only {len(taken[purpose])} "
                    f"more of {language!r}; lower it"
                )
    return {"sentences": taken, "documents": num_documents}


def _unseen(sentences: Iterator[str], seen: set[str]) -> Iterator[str]:
    for sentence in sentences:
        if sentence not in seen:
            seen.add(sentence)
            yield sentence
