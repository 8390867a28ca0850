"""What all figures share: grids, labels and marks, legible in black and white, and the files.

The files are PNG, and SVG whose text stays text, for which the browser supplies the fonts.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import ceil
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agnostic_train.report.fonts import font_families

_MARKERS = "osv^DXP*hp"
_LINES = ("-", "--", ":", "-.")
_INCHES_PER_SERIES = 0.25
_INCHES_PER_CHARACTER, _SHARE_OF_COLUMNS = 0.09, 0.8
ENDINGS = (".png", ".svg")
"""The formats in which each figure is written."""


def write_figures(folder: Path, figures: Mapping[str, Callable[[], Figure]], labels: Iterable[str] = ()) -> None:
    """Draws each figure into `folder`, as NAME.png and NAME.svg.

    Args:
        labels: texts in the figures that may be in any script, such as names of languages.
    """
    # With a fixed salt, equal figures are equal files.
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "agnostic_train", "font.family": font_families("".join(labels)),
        "text.parse_math": False,  # a name may hold dollar signs
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # `font_families` has said so, once
        for name, draw in figures.items():
            figure = draw()
            figure.savefig(folder / f"{name}.png", dpi=150)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def is_figure(path: Path, names: Collection[str]) -> bool:
    """Whether a path is a file that `write_figures` writes for a figure with one of these names."""
    return path.is_file() and path.suffix in ENDINGS and path.stem in names


def make_grid(rows: int = 1, width: float = 8, height: float = 4, **settings) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, 1, squeeze=False, **settings)[:, 0]


def line_style(index: int) -> dict:
    """Marks and lines that differ in black and white, for up to 40 series."""
    line = _LINES[(index // len(_MARKERS) + index) % len(_LINES)]
    return {"color": "black", "marker": _MARKERS[index % len(_MARKERS)], "linestyle": line}


def name_series(axis: Axes, height: float) -> None:
    """Draws the legend beside an axis of some inches, in as many columns as it needs; widens the figure for them."""
    num_columns = ceil(len(axis.get_legend_handles_labels()[1]) / max(1, int(height / _INCHES_PER_SERIES)))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), ncols=max(1, num_columns))
    figure = axis.get_figure(root=True)
    figure.set_figwidth(max(figure.get_figwidth(), 8 + 2 * (num_columns - 1)))


def width_of(num_columns: int, inches: float) -> float:
    """The width of a figure whose columns need some inches each."""
    return max(8.0, 2.0 + inches * num_columns)


def name_columns(axis: Axes, names: Sequence[str], enhanced: Collection[str] = (), width: float | None = None) -> None:
    """Labels the columns; long names are turned, so that they don't overlap.

    width: that of all columns in inches; by default most of the figure's.
    """
    width = _SHARE_OF_COLUMNS * axis.get_figure(root=True).get_figwidth() if width is None else width
    is_long = _INCHES_PER_CHARACTER * max(map(len, names), default=0) > width / max(1, len(names))
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
    labels = [name + ((" " if is_long else "\n") + "(enhanced)" if name in enhanced else "") for name in names]
    axis.set_xticks(range(len(names)), labels, **turned)


def draw_heat_map(axis: Axes, shades: np.ndarray, texts: np.ndarray, vmax: float | None = None) -> None:
    """Draws cells from white to black, with their text on them."""
    image = axis.imshow(shades, aspect="auto", cmap="Greys", vmin=min(0.0, shades.min(initial=0)), vmax=vmax)
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for (row, column), text in np.ndenumerate(texts):
        color = "white" if shades[row, column] > middle else "black"
        axis.text(column, row, str(text), ha="center", va="center", fontsize=9, color=color)
