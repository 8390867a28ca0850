"""Reading documents from rows of files and datasets, and splitting documents into sentences."""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from agnostic_train.errors import UserError, in_one_line

_MAX_WITHOUT_COLUMN = 1000
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+")
# Stops of Chinese, Devanagari, Arabic and Urdu, Ethiopic, Burmese, Khmer, Armenian, Santali and Manipuri: they end a
# sentence even without a space. Closing quotes and brackets, and the number of a verse (॥ 12 ॥), belong to the sentence
# that they follow.
_STOPS = "。！？।॥؟۔።፧။។៕։᱾᱿꯫"
_OTHER_SENTENCE_END = re.compile(rf"[{_STOPS}](?:\s*\d+\s*॥|[{_STOPS}!?…])*[”’»」』）》】]*")
_INVISIBLE = ("Cc", "Cf", "Zs")
"""Categories of characters that show nothing, such as zero-width spaces and direction marks."""


def split_documents(documents: Iterable[str], split_sentences: bool) -> Iterator[str]:
    """Splits documents at line breaks; skips parts in which nothing is visible.

    split_sentences: split after `. ! ? …` and the stops of other scripts, too, and skip parts without a letter or
        digit.
    """
    for document in documents:
        for line in document.split("\n"):
            sentences = _sentences(line) if split_sentences else (line,)
            yield from (stripped for sentence in sentences if is_visible(stripped := sentence.strip()))


def is_visible(text: str) -> bool:
    """Whether a text shows anything; zero-width spaces and direction marks alone don't."""
    return any(unicodedata.category(character) not in _INVISIBLE for character in text)


def _sentences(line: str) -> Iterator[str]:
    for part in _OTHER_SENTENCE_END.sub("\\g<0>\n", line).split("\n"):
        for sentence in _SENTENCE_END.split(part):
            if any(character.isalnum() for character in sentence):
                yield sentence


def texts_of(stream: Iterable[dict], column: str, source: str) -> Iterator[str]:
    """Yields the documents in a column of rows; rows without one are skipped.

    Half of a surrogate pair, which crawls have where a document was cut, becomes U+FFFD: it can't be stored as UTF-8.

    Raises:
        UserError: the source can't be read, lacks the column (in its first thousand rows), or holds something other
            than text; the message names it.
    """
    rows, is_found, num_rows, columns = iter(stream), False, 0, dict[str, None]()
    while True:
        try:
            row = next(rows, None)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{source}: not readable ({in_one_line(error)})") from None
        if not is_found and num_rows and (row is None or num_rows == _MAX_WITHOUT_COLUMN):
            names = ", ".join(columns) or "none"
            raise UserError(f"{source}: no column {column!r}; corpus.text_column is one of {names}")
        if row is None:
            return
        is_found = is_found or column in row
        if not is_found:
            num_rows += 1
            columns |= dict.fromkeys(row)
        parts = [part for part in _parts(row.get(column)) if part is not None]
        for part in parts:
            if not isinstance(part, str):
                raise UserError(
                    f"{source}: column {column!r} holds {type(part).__name__}, not text; see corpus.text_column"
                )
        if parts:
            yield "\n".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parts(value: Any) -> list[Any]:
    """The parts of a document: mOSCAR stores it as a list of them, `{"text": part}` each."""
    if not isinstance(value, list):
        return [value]
    return [part.get("text") if isinstance(part, dict) else part for part in value]


def row_of(line: str, where: str) -> dict:
    """Parses a JSON line into a row; raises `UserError`, starting with `where` the line is, if it isn't an object."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} isn't JSON ({error}); correct it or take it out") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} holds {type(row).__name__}, not an object of named values")
    return row
