"""Reading documents from datasets on the hub, and from local folders of the same form."""

from collections.abc import Iterable, Iterator, Sequence
from glob import escape, glob, has_magic
from pathlib import Path
from urllib.parse import quote

from datasets import IterableDataset, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from agnostic_train.corpus.documents import row_of, texts_of
from agnostic_train.corpus.local_files import can_open, lines_of
from agnostic_train.errors import UserError, in_one_line
from agnostic_train.hub_names import is_path, refusal
from agnostic_train.recipe import CorpusSection

_BUILDERS = {".jsonl": "text", ".txt": "text", ".parquet": "parquet", ".arrow": "arrow"}
"""File ending -> the builder of `datasets` that reads such files."""
_SHUFFLE_BUFFER = 10_000


def hub_documents(section: CorpusSection, language: str) -> Iterator[str]:
    """Streams a dataset's documents of one language, shuffled by `corpus.seed`.

    Raises:
        UserError: the dataset, config or column doesn't exist, or there is no document.
    """
    check_dataset(section)
    config = section.config_pattern and section.config_pattern.format(lang=language)
    files = section.data_files and section.data_files.format(lang=language)
    dataset = f"{section.dataset}" + (f", config {config}" if config else "") + (f", files {files}" if files else "")
    source = f"corpus.dataset: {dataset}"
    ending = _ending(section, files) if config is None else None
    try:
        stream = _files_of(section, files, ending) if files and ending else _dataset(section, config, files)
        stream = stream.shuffle(seed=section.seed, buffer_size=_SHUFFLE_BUFFER)
    except Exception as error:
        raise UserError(f"corpus.dataset: can't stream {dataset}: {in_one_line(error)}") from None
    rows: Iterable[dict] = stream
    if ending == ".jsonl":
        rows = (row_of(row["text"], f"{source}: {row.get('where', 'a line')}") for row in stream if row["text"].strip())
    documents = texts_of(rows, section.text_column, source)
    first = next(documents, None)
    if first is None:
        remedy = "corpus.languages must use the dataset's own names" + (", and corpus.data_files too" if files else "")
        raise UserError(f"{source} has no document of {language!r}; {remedy}")
    yield first
    yield from documents


def check_dataset(section: CorpusSection) -> None:
    """Raises `UserError` if `corpus.dataset` is no folder, or if the hub, if it can be asked, doesn't give it."""
    name = str(section.dataset)
    if Path(name).is_dir():
        return
    if is_path(name):
        raise UserError(f"corpus.dataset: no such folder {name}")
    if "/" not in name:  # a format, such as json
        return
    try:
        # `datasets` finds no file in a repository or revision that doesn't exist, and reports nothing else.
        HfApi().dataset_info(name, revision=section.revision, expand=["sha"])  # without the list of its files
        HfApi().auth_check(name, repo_type="dataset")
    except RevisionNotFoundError:
        raise UserError(f"corpus.revision: {name} has no revision {section.revision!r}") from None
    except Exception as error:
        problem = refusal(error, "dataset")
        if problem is not None:  # else such as no network: reading the text will say
            raise UserError(f"corpus.dataset: can't stream {name}: {problem}") from None


def _ending(section: CorpusSection, files: str | None) -> str | None:
    """Returns the ending in `files` that says how to read them; None to leave that to `datasets`.

    The ending counts if `files` is a URL or an absolute path, or if the dataset is a folder or a repository.
    """
    name = str(section.dataset)
    is_repository = "/" in name or Path(name).is_dir()  # otherwise a format, such as json
    if files is None or not (is_repository or _is_whole(files)):
        return None
    return next((it for it in _BUILDERS if it in Path(files).suffixes), None)


def _dataset(section: CorpusSection, config: str | None, files: str | None) -> IterableDataset:
    """Streams a dataset's rows, read as its repository defines."""
    name, revision, split = section.dataset, section.revision, section.dataset_split
    return load_dataset(name, config, data_files=files, revision=revision, split=split, streaming=True)


def _files_of(section: CorpusSection, files: str, ending: str) -> IterableDataset:
    """Streams the rows of some files of a dataset, whatever else its repository holds; a JSON line is a row's `text`.

    `datasets` refuses repositories with a loading script, such as OSCAR-2301 and MADLAD-400, but reads their files.
    JSON lines are read as text because a crawl's documents differ in their other keys, which a table's rows can't.
    """
    root, split, builder = str(section.dataset), section.dataset_split, _BUILDERS[ending]
    if not Path(root).is_dir():
        root = f"hf://datasets/{root}" + (f"@{quote(section.revision, safe='')}" if section.revision else "")
    pattern = files if _is_whole(files) else f"{root}/{files}"
    if builder != "text":
        return load_dataset(builder, data_files={split: pattern}, split=split, streaming=True)
    if "://" in pattern or not can_open(pattern):
        # The -sig drops a byte order mark, which isn't text.
        return load_dataset(builder, data_files={split: pattern}, split=split, streaming=True, encoding="utf-8-sig")
    # `datasets` reads a truncated .zst file as if it ended there.
    found = sorted(glob(files if _is_whole(files) else f"{escape(root)}/{files}", recursive=True))
    if not found and not has_magic(files):
        raise FileNotFoundError(f"no file {pattern}")
    return IterableDataset.from_generator(_lines, gen_kwargs={"files": found})


def _lines(files: Sequence[str]) -> Iterator[dict]:
    for file in files:
        for number, line in enumerate(lines_of(file), 1):
            yield {"text": line, "where": f"{file}: line {number}"}


def _is_whole(files: str) -> bool:
    return "://" in files or Path(files).is_absolute()
