"""What a command prints at its end: its results as a table or text, and where they are."""

import sys
from collections.abc import Callable, Collection, Iterable
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from agnostic_train.files import read_json
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.percent import percent
from agnostic_train.report.page import COMPARISON, COMPARISON_TEXT
from agnostic_train.scores.result import describe_score


def in_terminal(text: str) -> str:
    """Renders Markdown for the terminal."""
    # A file has room for the widest table.
    widest = max((len(line) for line in text.splitlines() if line.startswith("|")), default=0)
    console = Console(width=None if sys.stdout.isatty() else max(140, widest), file=StringIO())
    console.print(Markdown(text))
    return console.file.getvalue()


def print_results(directory: Path, command: str, enhanced: list[str]) -> None:
    """Prints what a command has made in its `output_dir`, also if all of it was kept."""
    if command == "compare":
        text = directory / COMPARISON / COMPARISON_TEXT
        encoding = sys.stdout.encoding or "utf-8"  # not every terminal has the lines of a table
        print(in_terminal(text.read_text(encoding="utf-8")).encode(encoding, "replace").decode(encoding))
        print(f"compare: {text}")
    if command == "run":
        _print_fitting(summary_table, directory, enhanced)
    if command == "evaluate":
        _print_fitting(changes_table, directory, enhanced)
        print(f"evaluate: {directory / 'evaluation.json'}")
    if command in ("run", "report"):
        print(f"report: {directory / 'report.html'}")


def _print_fitting(make_table: Callable[[Path, list[str], bool], Table], directory: Path, enhanced: list[str]) -> None:
    """Prints a table, without perplexities (and intervals) if the terminal has no room for them."""
    # A file has room for the widest table.
    console = Console(width=None if sys.stdout.isatty() else 1000)
    table = make_table(directory, enhanced, True)
    if console.measure(table, options=console.options.update(max_width=1000)).maximum > console.width:
        table = make_table(directory, enhanced, False)
    console.print(table)


def changes_table(directory: Path, enhanced: list[str], with_perplexity: bool = True) -> Table:
    """The table that ends an evaluation: per language, bits per byte before and after; with room, more."""
    table = Table(caption="test text; * enhanced")
    table.add_column("language", overflow="fold", min_width=4)
    _add_columns(table, (*_change_columns(with_perplexity), *(("95% interval",) if with_perplexity else ())))
    for language, row in read_json(directory / "evaluation.json")["languages"].items():
        interval = [" to ".join(map(percent, row["interval"]))] if with_perplexity else []
        table.add_row(_name(language, enhanced), *_change(row, with_perplexity), *interval)
    return table


def summary_table(directory: Path, enhanced: list[str], with_perplexity: bool = True) -> Table:
    """The table that ends a run: per language its neurons, and perplexity and bits per byte before and after."""
    detected = LanguageNeurons.load(directory / "neurons")
    evaluation = read_json(directory / "evaluation.json")["languages"]
    score = read_json(directory / "score.json")
    value = describe_score(score["value"], score["clipped"])
    table = Table(
        title=f"language-agnostic score {value}, {len(detected.shared)} shared neurons",
        caption="test text; * enhanced; exclusive: " + detected.settings["exclusive"],
    )
    table.add_column("language", overflow="fold")
    _add_columns(table, ("related", "shared", "exclusive", *_change_columns(with_perplexity)))
    for language, row in evaluation.items():
        related = detected.related.get(language)  # a language that is only measured has none
        counts = (
            ("",) * 3
            if related is None
            else (len(related), len(detected.shared & related), len(detected.exclusive[language]))
        )
        table.add_row(_name(language, enhanced), *map(str, counts), *_change(row, with_perplexity))
    return table


def _add_columns(table: Table, headers: Iterable[str]) -> None:
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)


def _name(language: str, enhanced: Collection[str]) -> str:
    return escape(language) + (" *" if language in enhanced else "")


def _change_columns(with_perplexity: bool) -> tuple[str, ...]:
    return (*(("perplexity", "after") if with_perplexity else ()), "bits/byte", "after", "change")


def _change(row: dict, with_perplexity: bool) -> list[str]:
    """The cells of a row of `evaluation.json`."""
    before, after = row["before"], row["after"]
    return [
        *([f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}"] if with_perplexity else []),
        f"{before['bits_per_byte']:.4f}",
        f"{after['bits_per_byte']:.4f}",
        percent(row["bits_per_byte_change"]),
    ]
