"""Text in local files: `.txt` and `.jsonl`, compressed or not, and `.parquet`."""

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator
from glob import escape
from io import BufferedReader
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as pq

from agnostic_train.corpus.documents import row_of, split_documents, texts_of
from agnostic_train.errors import UserError, in_one_line
from agnostic_train.recipe import CorpusSection

_OPEN: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    # pyarrow's, because the zstandard package accepts a truncated file without an error.
    ".zst": lambda file: pyarrow.input_stream(str(file), compression="zstd"),
}
_ENDINGS = [f"{ending}{packed}" for ending in (".txt", ".jsonl") for packed in ("", *_OPEN)] + [".parquet"]


def find_file(folder: Path, language: str, split: str) -> Path | None:
    """Finds `{lang}.{split}` as .txt or .jsonl, compressed or not, or .parquet; returns None if there is none.

    Raises:
        UserError: there is more than one, or none but of a kind that isn't read: other text would take its place.
    """
    files = [file for ending in _ENDINGS if (file := folder / f"{language}.{split}{ending}").exists()]
    if len(files) > 1:
        raise UserError(f"{files[0]}: the folder also has {files[1].name}; keep one")
    if files:
        return files[0]
    if others := sorted(folder.glob(f"{escape(language)}.{split}.*")):
        is_broken = others[0].is_symlink() and not others[0].exists()
        problem = "a broken link" if is_broken else f"of no kind that is read ({', '.join(_ENDINGS)})"
        raise UserError(f"{others[0]}: {problem}; rename or convert it, or take it out")
    return None


def local_sentences(section: CorpusSection, file: Path) -> list[str]:
    """Reads the distinct sentences of a file, in their order.

    Raises:
        UserError: the file isn't readable, isn't UTF-8, lacks the text column, or has no sentence.
    """
    column = section.text_column
    documents = lines_of(file) if ".txt" in file.suffixes else texts_of(_rows(file, column), column, str(file))
    sentences = list(dict.fromkeys(split_documents(documents, section.split_sentences)))
    if not sentences:
        raise UserError(f"{file}: has no sentence; one sentence per line is expected")
    return sentences


def read_text(file: Path) -> str:
    """Reads a UTF-8 text file, compressed or not; raises `UserError` that names the file if it can't."""
    try:
        with _opened(file) as content:
            # The -sig drops a byte order mark, which isn't text.
            return content.read().decode("utf-8-sig")
    except IsADirectoryError:
        raise UserError(f"{file}: a folder, where a text file was expected") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; convert it, for example with iconv") from None
    except Exception as error:  # every compression format raises other errors
        raise UserError(f"{file}: not readable ({in_one_line(error)})") from None


def _opened(file: Path) -> Any:
    """Opens a file for reading its bytes; each format has its own type."""
    return _OPEN[file.suffix](file) if file.suffix in _OPEN else file.open("rb")


def _rows(file: Path, column: str) -> Iterator[dict]:
    """Reads rows of JSON lines or a table; of a table only the column, or if it lacks it, the names of the others."""
    if ".parquet" in file.suffixes:
        table = pq.ParquetFile(file)
        if column not in table.schema_arrow.names:
            yield dict.fromkeys(table.schema_arrow.names)
            return
        for batch in table.iter_batches(columns=[column]):
            yield from batch.to_pylist()
        return
    # Each line by itself: a crawl's documents differ in their other keys, which a table's rows can't.
    for number, line in enumerate(lines_of(file), 1):
        if line.strip():
            yield row_of(line, f"{file}: line {number}")


def can_open(name: str | Path) -> bool:
    """Whether `lines_of` knows how a file of this name is compressed, if it is."""
    return Path(name).suffix in (".txt", ".jsonl", *_OPEN)


def lines_of(file: str | Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 text file, compressed or not; raises `UserError` that names the file if it can't."""
    number = 0
    try:
        with BufferedReader(_opened(Path(file))) as lines:
            for line in lines:
                # The -sig drops a byte order mark, which isn't text.
                text = line.decode("utf-8" if number else "utf-8-sig")
                number += 1
                yield text
    except IsADirectoryError:
        raise UserError(f"{file}: a folder, where a text file was expected") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: line {number + 1} isn't UTF-8; convert it, for example with iconv") from None
    except Exception as error:  # every compression format raises other errors
        raise UserError(f"{file}: not readable after line {number} ({in_one_line(error)})") from None
