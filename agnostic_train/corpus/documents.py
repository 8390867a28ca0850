"""Reading documents from rows of files and datasets, and splitting documents into sentences."""

import json
import re
from collections.abc import Iterable, Iterator

from agnostic_train.errors import UserError, in_one_line

_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])")


def split_documents(documents: Iterable[str], split_sentences: bool) -> Iterator[str]:
    """Splits documents at line breaks and, if asked to, after `. ! ? …` and their Chinese forms; skips empty parts."""
    for document in documents:
        for line in document.split("\n"):
            for sentence in _SENTENCE_END.split(line) if split_sentences else (line,):
                if stripped := sentence.strip():
                    yield stripped


def texts_of(stream: Iterable[dict], column: str, source: str) -> Iterator[str]:
    """Yields the documents in a column of rows; rows without one are skipped.

    Raises:
        UserError: the source can't be read, lacks the column, or holds something other than text; the message names it.
    """
    rows, seen = iter(stream), False
    while True:
        try:
            row = next(rows, None)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{source}: not readable ({in_one_line(error)})") from None
        if row is None:
            return
        if column not in row and not seen:
            raise UserError(f"{source}: no column {column!r}; corpus.text_column is one of {', '.join(row)}")
        seen = True
        text = row.get(column)
        if isinstance(text, list):  # mOSCAR stores a document as a list of its parts
            parts = (part.get("text") if isinstance(part, dict) else part for part in text)
            text = "\n".join(str(part) for part in parts if part is not None)
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(
                f"{source}: column {column!r} holds {type(text).__name__}, not text; see corpus.text_column"
            )
        yield text


def row_of(line: str, where: str) -> dict:
    """Parses a JSON line into a row; raises `UserError`, starting with `where` the line is, if it isn't an object."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} isn't JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} holds {type(row).__name__}, not an object of named values")
    return row
