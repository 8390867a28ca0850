"""Where text comes from: local files, or a dataset of the hub, as documents and the sentences in them."""

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import pyarrow
from datasets import IterableDataset, load_dataset

from agnostic_train.files import UserError
from agnostic_train.recipe import CorpusSection

_OPEN: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    # Of these, zstandard would take a file that is cut short for a whole one.
    ".zst": lambda file: pyarrow.input_stream(str(file), compression="zstd"),
}
_BUILDERS = {".jsonl": "text", ".txt": "text", ".parquet": "parquet", ".arrow": "arrow"}
"""By a file's ending, the builder of `datasets` that reads a dataset's files."""

_ENDINGS = [f"{ending}{packed}" for ending in (".txt", ".jsonl") for packed in ("", *_OPEN)] + [".parquet"]

_SHUFFLE_BUFFER = 10_000
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])")


def find_file(folder: Path, language: str, split: str) -> Path | None:
    """`{lang}.{split}` as .txt or .jsonl, compressed or not, or .parquet; None where there is none.

    Raises:
        UserError: two of them.
    """
    found = [file for ending in _ENDINGS if (file := folder / f"{language}.{split}{ending}").exists()]
    if len(found) > 1:
        raise UserError(f"{found[0]}: stands beside {found[1].name}; keep one")
    return found[0] if found else None


def local_sentences(section: CorpusSection, file: Path) -> list[str]:
    """The distinct sentences of a file, in its order.

    Raises:
        UserError: an unreadable file, not UTF-8, without the text column, or without a sentence.
    """
    documents = [read_text(file)] if ".txt" in file.suffixes else _column(_rows(file), section.text_column, str(file))
    sentences = list(dict.fromkeys(split_documents(documents, section.split_sentences)))
    if not sentences:
        raise UserError(f"{file}: has no sentence; a sentence a line is expected")
    return sentences


def hub_documents(section: CorpusSection, language: str) -> Iterator[str]:
    """A dataset's documents of one language, streamed and shuffled by `corpus.seed`.

    Raises:
        UserError: a dataset, config or column that isn't there.
    """
    check_dataset(section)
    config = section.config_pattern and section.config_pattern.format(lang=language)
    files = section.data_files and section.data_files.format(lang=language)
    wanted = f"{section.dataset}" + (f", config {config}" if config else "") + (f", files {files}" if files else "")
    source = f"corpus.dataset: {wanted}"
    ending = _ending(section, files) if config is None else None
    try:
        stream = _files_of(section, files, ending) if files and ending else _dataset(section, config, files)
        stream = stream.shuffle(seed=section.seed, buffer_size=_SHUFFLE_BUFFER)
    except Exception as error:
        raise UserError(f"corpus.dataset: can't stream {wanted}: {_one_line(error)}") from None
    rows: Iterable[dict] = stream
    if ending == ".jsonl":
        rows = (_object(row["text"], f"{source}: a line") for row in stream if row["text"].strip())
    documents = _column(rows, section.text_column, source)
    first = next(documents, None)
    if first is None:
        raise UserError(
            f"{source} has no document of {language!r}; look at corpus.languages, as the dataset names them"
        )
    yield first
    yield from documents


def check_dataset(section: CorpusSection) -> None:
    """Raises `UserError` if `corpus.dataset` is a folder's name, and there is none."""
    name = str(section.dataset)
    if name.startswith(("/", ".")) and not Path(name).is_dir():
        raise UserError(f"corpus.dataset: no such folder {name}")


def _ending(section: CorpusSection, files: str | None) -> str | None:
    """The ending by which files are read that are named whole, or are of a folder or repository; None for other ones."""
    name = str(section.dataset)
    is_repository = "/" in name or Path(name).is_dir()  # else a format, such as json
    if files is None or not (is_repository or _is_whole(files)):
        return None
    return next((it for it in _BUILDERS if it in Path(files).suffixes), None)


def _dataset(section: CorpusSection, config: str | None, files: str | None) -> IterableDataset:
    """A dataset's rows, as its repository says that they are read."""
    name, revision, split = section.dataset, section.revision, section.dataset_split
    return load_dataset(name, config, data_files=files, revision=revision, split=split, streaming=True)


def _files_of(section: CorpusSection, files: str, ending: str) -> IterableDataset:
    """The rows of some files of a dataset, whatever else its repository holds; of JSON lines, each line as `text`.

    A repository with a loading script is refused as a whole: OSCAR-2301's and MADLAD-400's are. And the JSON lines of a
    crawl differ in their other keys, which a table's columns may not.
    """
    root, split = str(section.dataset), section.dataset_split
    if not Path(root).is_dir():
        root = f"hf://datasets/{root}" + (f"@{quote(section.revision, safe='')}" if section.revision else "")
    pattern = files if _is_whole(files) else f"{root}/{files}"
    return load_dataset(_BUILDERS[ending], data_files={split: pattern}, split=split, streaming=True)


def _is_whole(files: str) -> bool:
    return "://" in files or Path(files).is_absolute()


def split_documents(documents: Iterable[str], split_sentences: bool) -> Iterator[str]:
    """Documents to sentences: at line breaks, and where asked for after `. ! ?` and their Chinese forms."""
    for document in documents:
        for line in document.split("\n"):
            for sentence in _SENTENCE_END.split(line) if split_sentences else (line,):
                if stripped := sentence.strip():
                    yield stripped


def read_text(file: Path) -> str:
    """A UTF-8 file's text, compressed or not; raises `UserError` that names the file if it isn't one."""
    try:
        with _opened(file) as content:
            # A byte order mark isn't text.
            return content.read().decode("utf-8-sig")
    except IsADirectoryError:
        raise UserError(f"{file}: a folder, where a text was expected") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; convert it, for example with iconv") from None
    except Exception as error:  # each way of compressing has errors of its own
        raise UserError(f"{file}: not readable ({_one_line(error)})") from None


def _opened(file: Path) -> IO[bytes]:
    return _OPEN[file.suffix](file) if file.suffix in _OPEN else file.open("rb")


def _rows(file: Path) -> Iterator[dict]:
    if ".parquet" not in file.suffixes:
        yield from _json_lines(file)
        return
    # Streamed: nothing is copied into the cache of `datasets`.
    yield from load_dataset("parquet", data_files=str(file), split="train", streaming=True)


def _json_lines(file: Path) -> Iterator[dict]:
    """Read one by one: a crawl's documents differ in their other keys, which a table's columns may not."""
    with TextIOWrapper(_opened(file), encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _object(line, f"{file}: line {number}")


def _object(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} isn't JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} holds {type(row).__name__}, not an object of named values")
    return row


def _column(stream: Iterable[dict], column: str, source: str) -> Iterator[str]:
    rows, seen = iter(stream), False
    while True:
        try:
            row = next(rows, None)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{source}: not readable ({_one_line(error)})") from None
        if row is None:
            return
        if column not in row and not seen:
            raise UserError(f"{source}: no column {column!r}; corpus.text_column is one of {', '.join(row)}")
        seen = True
        text = row.get(column)
        if isinstance(text, list):  # mOSCAR keeps a document as a list of its parts
            parts = (part.get("text") if isinstance(part, dict) else part for part in text)
            text = "\n".join(str(part) for part in parts if part is not None)
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(
                f"{source}: column {column!r} holds {type(text).__name__}, not text; see corpus.text_column"
            )
        yield text


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
