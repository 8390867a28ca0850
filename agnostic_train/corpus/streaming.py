"""Text streamed from a dataset of the hub, and kept: later commands do without a network, and read the same."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm
from transformers.utils import logging

from agnostic_train.corpus.documents import split_documents
from agnostic_train.corpus.hub import hub_documents
from agnostic_train.errors import UserError
from agnostic_train.files import fingerprint, read_json, write_json
from agnostic_train.recipe import CorpusSection

logger = logging.get_logger(__name__)

STREAMED_DEFAULT = 1000
"""Validation and test sentences per language of a streamed dataset, where the recipe names no number."""

_OF_THE_SOURCE = (
    "dataset", "revision", "config_pattern", "data_files", "dataset_split", "text_column", "split_sentences", "seed"
)  # fmt: skip
"""Keys of the section that say which documents of a language come in which order, and what their sentences are."""


def wanted_sentences(section: CorpusSection, with_training: bool) -> dict[str, int]:
    """How many sentences of a language are streamed for each purpose.

    Raises:
        UserError: the recipe doesn't say how many to train on.
    """
    if section.training_sentences is None:
        raise UserError("corpus.training_sentences: a streamed dataset has no end; say how many to train on")
    return {
        "test": section.test_sentences or STREAMED_DEFAULT,
        "validation": section.validation_sentences or STREAMED_DEFAULT,
        "detection": section.detection_sentences,
        "training": section.training_sentences if with_training else 0,
    }


def streamed_by_purpose(
    section: CorpusSection, language: str, with_training: bool, keep: Path | None, progress: bool
) -> dict[str, list[str]]:
    """Fills one purpose after the other from whole documents, so that no document serves two.

    Training comes last, and may get less than it was to have. Its text is kept by itself: whether a language trains, and on
    how much, changes nothing of what it is measured on.

    Raises:
        UserError: no such dataset, or too little text for another purpose.
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
    """The first `count` sentences of a language, or as many as there are; see `streamed_by_purpose`."""

    def read() -> dict:
        documents = split_documents(hub_documents(section, language), section.split_sentences)
        return {"sentences": list(islice(_unseen(documents, set()), count))}

    return _kept(keep, section, f"held-out-{language}", {"test": count}, read)["sentences"]


def _kept(
    folder: Path | None, section: CorpusSection, name: str, wanted: Mapping[str, int | str], read: Callable[[], dict]
) -> dict:
    """What `read` gives, from a file of the folder if it gave that once."""
    if folder is None:
        return read()
    source = {key: getattr(section, key) for key in _OF_THE_SOURCE}
    file = folder / f"{name}-{fingerprint([source, wanted])[:16]}.json"
    if not file.exists():
        write_json(file, read())
    return read_json(file)


def _fill(
    section: CorpusSection, language: str, wanted: dict[str, int], progress: bool, after: dict | None = None
) -> dict:
    """Streams so many `sentences` of each purpose, from the `documents` on that an earlier call ended before."""
    num_documents = after["documents"] if after else 0
    seen = {sentence for its in after["sentences"].values() for sentence in its} if after else set()
    documents = islice(hub_documents(section, language), num_documents, None)
    taken: dict[str, list[str]] = {}
    with tqdm(total=sum(wanted.values()), desc=f"read {language}", disable=not progress, leave=False) as bar:
        for purpose, count in wanted.items():
            taken[purpose] = []
            while len(taken[purpose]) < count and (document := next(documents, None)) is not None:
                num_documents += 1
                new = _unseen(split_documents([document], section.split_sentences), seen)
                found = list(islice(new, count - len(taken[purpose])))
                taken[purpose] += found
                bar.update(len(found))
            if len(taken[purpose]) == count:
                continue
            if purpose == "training":
                logger.warning(f"corpus.training_sentences: {count} asked for, {language} has {len(taken[purpose])}")
            else:
                key = f"{purpose}_sentences"
                by_default = " by default" if getattr(section, key) is None else ""
                raise UserError(
                    f"corpus.{key}: {count} asked for{by_default}, {section.dataset} has only {len(taken[purpose])} more "
                    f"of {language!r}; lower it"
                )
    return {"sentences": taken, "documents": num_documents}


def _unseen(sentences: Iterator[str], seen: set[str]) -> Iterator[str]:
    for sentence in sentences:
        if sentence not in seen:
            seen.add(sentence)
            yield sentence
