"""What a command prints at its end: the table of a run, and a comparison's text."""

import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from agnostic_train.files import read_json
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.percent import percent
from agnostic_train.scores.result import describe_score


def in_terminal(text: str) -> str:
    """Renders Markdown for the terminal."""
    # A file has room for the widest table.
    widest = max((len(line) for line in text.splitlines() if line.startswith("|")), default=0)
    console = Console(width=None if sys.stdout.isatty() else max(140, widest), file=StringIO())
    console.print(Markdown(text))
    return console.file.getvalue()


def print_summary(directory: Path, enhanced: list[str]) -> None:
    """Prints the table that ends a run, without perplexities if the terminal has no room for them."""
    # A file has room for the widest table.
    console = Console(width=None if sys.stdout.isatty() else 1000)
    table = summary_table(directory, enhanced)
    if console.measure(table, options=console.options.update(max_width=1000)).maximum > console.width:
        table = summary_table(directory, enhanced, with_perplexity=False)
    console.print(table)


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
    perplexity = ("perplexity", "after") if with_perplexity else ()
    for header in ("related", "shared", "exclusive", *perplexity, "bits/byte", "after", "change"):
        table.add_column(header, justify="right", no_wrap=True)
    for language, row in evaluation.items():
        before, after = row["before"], row["after"]
        related = detected.related.get(language)  # a language that is only measured has none
        counts = (
            ("",) * 3
            if related is None
            else (len(related), len(detected.shared & related), len(detected.exclusive[language]))
        )
        table.add_row(
            escape(language) + (" *" if language in enhanced else ""),
            *map(str, counts),
            *([f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}"] if with_perplexity else []),
            f"{before['bits_per_byte']:.4f}",
            f"{after['bits_per_byte']:.4f}",
            percent(row["bits_per_byte_change"]),
        )
    return table
