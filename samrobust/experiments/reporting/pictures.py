"""Pictures of methods: a table as dots with bars, and what all such pictures share.

A color a family, from Okabe and Ito, Color Universal Design (2008), distinct for
color-blind readers. Matplotlib is imported when something is drawn, and its global
state is left alone.
"""

import collections
import io
import itertools
import pathlib
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from samrobust.experiments.reporting.names import family, short_column, split_column
from samrobust.experiments.reporting.table import Table, TableRow
from samrobust.system.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = [
    "GRAY",
    "PALE",
    "SMALL",
    "TEXT",
    "add_legend",
    "draw_table",
    "family_colors",
    "in_symbols",
    "make_panels",
    "over_seeds",
    "row_looks",
    "write_figure",
]

_COLORS = {"ST": "#000000", "SAM": "#D55E00", "AT linf": "#0072B2", "AT l2": "#009E73"}
_OTHER_COLORS = ("#CC79A7", "#E69F00", "#56B4E9")
# Methods of one family differ by these, so that a picture can be read in gray.
_STYLES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SYMBOLS = {  # script small l; Greek rho and epsilon
    "linf": "\u2113∞",
    "l2": "\u21132",
    "rho": "\u03c1",
    "eps": "ε",
    "epsilon": "ε",
}
GRAY, PALE = "#8A8A8A", "#E4E4E4"
SMALL, TEXT, _TITLE = 6.5, 7.5, 9  # points; 150 dots an inch make 14, 16, 19 pixels
_LEAST_SPAN = 4.0  # points of accuracy: a panel does not magnify the noise
_RING = {"marker": "o", "markersize": 7, "markerfacecolor": "none", "linestyle": "none"}


def family_colors(families: Iterable[str]) -> dict[str, str]:
    """Returns a color for every family, and for those that the paper has."""
    others = [f for f in dict.fromkeys(families) if f not in _COLORS]
    cycle = {f: _OTHER_COLORS[i % 3] for i, f in enumerate(others)}
    return _COLORS | cycle


def row_looks(rows: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns how the line or the dots of every row are drawn."""
    families = {row: family(row) for row in rows}
    colors, seen = family_colors(families.values()), collections.Counter()
    looks = {}
    for number, (row, own) in enumerate(families.items()):
        looks[row] = {
            "color": colors[own],
            "linestyle": _STYLES[seen[own] % len(_STYLES)],
            "linewidth": 1.2,
            "marker": _MARKS[number % len(_MARKS)],
            "markersize": 3.5,
        }
        seen[own] += 1
    return looks


def in_symbols(label: str) -> str:
    """Returns a label with symbols for norms and parameters, and without formulas."""
    words = label.replace("(", "( ").replace(",", " ,").split()
    text = " ".join(_SYMBOLS.get(word, word) for word in words)
    return text.replace("( ", "(").replace(" ,", ",").replace("$", r"\$")


def over_seeds(counts: Iterable[int]) -> str:
    """Returns over how many seeds means are: `one seed`, `3 seeds`, `up to 3 seeds`."""
    known = sorted({count for count in counts if count})
    if known[-1] == 1:
        return "one seed"
    return f"{'up to ' if len(known) > 1 else ''}{known[-1]} seeds"


def make_panels(
    count: int,
    size: tuple[float, float],
    title: str,
    line: int,
    *,
    rows: int = 1,
    sharey: bool = True,
) -> tuple["Figure", Sequence["Axes"]]:
    """Returns a figure and its panels side by side.

    Args:
      count: of the panels in a row.
      size: of the figure in inches.
      title: of all panels, plain text.
      line: characters of the title that stand beside each other.
      rows: of panels; they are returned row by row.
      sharey: whether they share the vertical axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    text = textwrap.fill(title.replace("$", r"\$"), line)
    figure.suptitle(text, fontsize=_TITLE, x=0.01, ha="left")
    panels = [*figure.subplots(rows, count, sharey=sharey, squeeze=False).flat]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def add_legend(
    figure: "Figure", handles: Sequence["Artist"], title: str, columns: int
) -> None:
    """Adds a legend below all panels."""
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        fontsize=SMALL,
        title=title,
        title_fontsize=TEXT,
        frameon=False,
    )


def write_figure(
    figure: "Figure",
    folder: pathlib.Path,
    name: str,
    suffixes: Sequence[str] = ("png", "pdf"),
) -> tuple[pathlib.Path, ...]:
    """Writes a picture in several formats, each in one step; returns the paths.

    The same numbers give the same files: they carry no date.
    """
    paths = []
    for suffix in suffixes:
        content = io.BytesIO()
        metadata = {"CreationDate": None} if suffix == "pdf" else None
        figure.savefig(content, format=suffix, metadata=metadata, facecolor="white")
        paths.append(folder / f"{name}.{suffix}")
        write_bytes(paths[-1], content.getvalue())
    return tuple(paths)


def draw_table(table: Table) -> "Figure":
    """Draws the means of a table with their standard deviations.

    A line a method, a panel a column. A dot is a mean, its bar one standard deviation
    over the seeds, a ring the paper's number, the dotted line ST. Each panel has its
    own range of accuracies.
    """
    num_columns, heights = len(table.columns), _heights(table)
    size = (max(6.0, 1.4 + 0.85 * num_columns), 1.5 + 0.21 * heights[-1])
    figure, panels = make_panels(num_columns, size, table.title, 75)
    colors = family_colors(row.family for row in table.rows)
    for panel, column in zip(panels, table.columns, strict=True):
        _draw_panel(panel, table, column, colors)
    labels = [_row_label(row) for row in table.rows]
    panels[0].set_yticks(heights, labels, fontsize=TEXT)
    panels[0].set_ylim(heights[-1] + 0.6, -0.6)
    for tick, row in zip(panels[0].get_yticklabels(), table.rows, strict=True):
        tick.set_color(colors[row.family] if row.seeds else GRAY)
    said = "accuracy in % (each panel has its own range), higher is better"
    add_legend(figure, _marks(table), said, columns=4)
    return figure


def _draw_panel(
    panel: "Axes", table: Table, column: str, colors: dict[str, str]
) -> None:
    """Draws one column of the table."""
    marks = []
    for y, row in zip(_heights(table), table.rows, strict=True):
        cell, color = row.cells[column], colors[row.family]
        panel.axhline(y, color=PALE, linewidth=0.6, zorder=0)
        if cell.mean is not None:
            bar = {"elinewidth": 1.3, "capsize": 2, "markersize": 4, "zorder": 3}
            panel.errorbar(cell.mean, y, xerr=cell.std, fmt="o", color=color, **bar)
            marks += [cell.mean - (cell.std or 0.0), cell.mean + (cell.std or 0.0)]
            if row is table.baseline:
                dotted = {"linewidth": 0.8, "linestyle": ":", "zorder": 1}
                panel.axvline(cell.mean, color=GRAY, **dotted)
        if cell.paper is not None:
            panel.plot(cell.paper, y, **_RING, color=color, zorder=4)
            marks.append(cell.paper)
    panel.set_title(_panel_title(column), fontsize=TEXT)
    panel.set_xlim(*_limits(min(marks), max(marks)))
    panel.locator_params(axis="x", nbins=3, steps=[1, 2, 5, 10], integer=True)
    panel.tick_params(axis="x", labelsize=SMALL, length=2)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.spines["bottom"].set_color(GRAY)


def _heights(table: Table) -> list[float]:
    """Returns the place of every row, downwards, with gaps between the families."""
    heights = [0.0]
    for above, row in itertools.pairwise(table.rows):
        heights.append(heights[-1] + (1.0 if above.family == row.family else 1.5))
    return heights


def _limits(low: float, high: float) -> tuple[float, float]:
    """Returns the range of a panel: all marks, some margin, and no tiny range."""
    missing = max(0.0, _LEAST_SPAN - (high - low)) / 2
    low, high = low - missing, high + missing
    margin = 0.1 * (high - low)
    excess = max(0.0, high + margin - 101)  # what lies above 100 % is of no interest
    return low - margin - excess, high + margin - excess


def _marks(table: Table) -> list["Line2D"]:
    """Returns what the marks mean, only for those that are drawn."""
    from matplotlib.lines import Line2D

    over = over_seeds(len(row.seeds) for row in table.rows)
    mean, line = (over, "none") if over == "one seed" else (f"mean ± std, {over}", "-")
    style = {"color": GRAY, "marker": "o", "markersize": 4, "linestyle": line}
    marks = [Line2D([], [], **style, label=mean)]
    if table.has_paper:
        marks.append(Line2D([], [], color=GRAY, **_RING, label="paper"))
    if table.baseline is not None:
        marks.append(Line2D([], [], color=GRAY, linestyle=":", label="ST"))
    return marks


def _panel_title(column: str) -> str:
    """Returns a column's name in symbols, on two lines."""
    perturbation, rest = split_column(column)
    if perturbation == "natural":
        return f"{perturbation} {rest}".strip() + "\nno attack"
    norm, radius = short_column(perturbation).split(" ")
    return f"{in_symbols(norm)} {rest or 'attack'}\nε = {radius}/255"


def _row_label(row: TableRow) -> str:
    """Returns a row's label in symbols."""
    label = in_symbols(row.label)
    return label if row.seeds else f"{label}, no run yet"
