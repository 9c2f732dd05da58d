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
from typing import TYPE_CHECKING, Any, NamedTuple

from samrobust.experiments.reporting.names import column_norm, family, split_column
from samrobust.experiments.reporting.table import Table
from samrobust.system.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GRAY",
    "PALE",
    "SMALL",
    "TEXT",
    "add_legend",
    "column_in_symbols",
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
_CROSS = {"marker": "x", "markersize": 5, "linestyle": "none"}
_BASELINE = {"color": GRAY, "linewidth": 0.8, "linestyle": ":"}


def family_colors(families: Iterable[str]) -> dict[str, str]:
    """Returns a color for every family, and for those that the paper has."""
    others = [f for f in dict.fromkeys(families) if f not in _COLORS]
    return _COLORS | dict(zip(others, itertools.cycle(_OTHER_COLORS), strict=False))


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


def column_in_symbols(column: str) -> str:
    """Returns a column's ball in symbols, and its attack if it names one."""
    ball, rest = split_column(column)
    norm, _, radius = ball.partition(" ")
    attack = rest.replace("AA", "AutoAttack")
    words = (in_symbols(norm), radius and f"ε = {radius}", attack)
    return ", ".join(filter(None, words))


def over_seeds(what: str, counts: Iterable[int]) -> str:
    """Returns over how many seeds something is, such as `mean ± std`.

    >>> over_seeds("mean", [3, 3]), over_seeds("mean", [1, 3]), over_seeds("mean", [1])
    ('mean over 3 seeds', 'mean over up to 3 seeds', 'one seed')
    """
    known = sorted({count for count in counts if count})
    if known[-1] == 1:
        return "one seed"
    return f"{what} over {'up to ' if len(known) > 1 else ''}{known[-1]} seeds"


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
    figure: "Figure", handles: Sequence[Any], title: str, columns: int
) -> None:
    """Adds a legend below all panels, in so many columns or as many as fit."""
    for count in range(columns, 0, -1):
        legend = figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=count,
            fontsize=SMALL,
            title=title,
            title_fontsize=TEXT,
            frameon=False,
        )
        if count == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


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

    A line a method, a panel a ball; panels of one norm share an axis. What one ball has
    several columns for stands in one panel, below each other: AutoAttack filled and the
    attack beside it hollow, the last checkpoint a dot and the best one a diamond. The
    dotted line is ST, under AutoAttack where it was run; a cross is the paper's number.
    """
    labels = [
        in_symbols(row.label) + ("" if row.seeds else ", no run yet")
        for row in table.rows
    ]
    heights = _heights(table)
    panels_of = {
        ball: list(columns)
        for ball, columns in itertools.groupby(
            table.columns, key=lambda column: split_column(column)[0]
        )
    }
    width = 0.3 + 0.055 * max(map(len, labels)) + 1.15 * len(panels_of)
    size = (max(6.0, width), 1.5 + 0.21 * heights[-1])
    figure, panels = make_panels(len(panels_of), size, table.title, int(12.5 * size[0]))
    colors = family_colors(row.family for row in table.rows)
    limits = _limits_by_norm(table)
    for panel, (ball, columns) in zip(panels, panels_of.items(), strict=True):
        _draw_panel(panel, table, columns, colors)
        panel.set_xlim(*limits[column_norm(ball)])
        panel.set_title(column_in_symbols(ball), fontsize=TEXT)
    panels[0].set_yticks(heights, labels, fontsize=TEXT)
    panels[0].set_ylim(heights[-1] + 0.6, -0.6)
    for tick, row in zip(panels[0].get_yticklabels(), table.rows, strict=True):
        tick.set_color(colors[row.family] if row.seeds else GRAY)
    shown = over_seeds("mean ± std", (len(row.seeds) for row in table.rows))
    said = f"accuracy in % on {table.num_test:,} images, {shown}"
    add_legend(figure, _legend(panels[0], table), said, columns=4)
    return figure


def _draw_panel(
    panel: "Axes", table: Table, columns: Sequence[str], colors: dict[str, str]
) -> None:
    """Draws the columns of one ball."""
    marks = _attacks_on(columns)
    judged = next(column for column, mark in marks.items() if not mark.is_hollow)
    for y, row in zip(_heights(table), table.rows, strict=True):
        color = colors[row.family]
        panel.axhline(y, color=PALE, linewidth=0.6, zorder=0)
        for number, (column, mark) in enumerate(marks.items()):
            cell, place = row.cells[column], y + 0.3 * number - 0.15 * (len(marks) - 1)
            if cell.mean is not None:
                look = mark.look(color)
                panel.errorbar(cell.mean, place, xerr=cell.std, **look, zorder=3)
            if cell.paper is not None:
                panel.plot(cell.paper, place, **_CROSS, color=color, zorder=4)
        if row is table.baseline and (mean := row.cells[judged].mean) is not None:
            panel.axvline(mean, **_BASELINE, zorder=1)
    panel.locator_params(axis="x", nbins=3, steps=[1, 2, 5, 10], integer=True)
    panel.tick_params(axis="x", labelsize=SMALL, length=2)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.spines["bottom"].set_color(GRAY)


class _Mark(NamedTuple):
    """Mark of a column's means: what it says in words, and how it is drawn."""

    words: str
    is_hollow: bool
    is_best: bool

    def look(self, color: str) -> dict[str, Any]:
        """Returns how the marks of a row of this color are drawn, with bars."""
        return {
            "color": color,
            "marker": "D" if self.is_best else "o",
            "markersize": 4,
            "linestyle": "none",
            "elinewidth": 0.8 if self.is_hollow else 1.3,
            "capsize": 2,
            **({"markerfacecolor": "white"} if self.is_hollow else {}),
        }


def _attacks_on(columns: Iterable[str]) -> dict[str, _Mark]:
    """Returns the marks of the columns of one ball, or of the same in other balls."""
    words = {column: split_column(column)[1].split() for column in columns}
    several = any("AA" in own for own in words.values())
    chosen = any("best" in own for own in words.values())
    marks = {}
    for column, own in words.items():
        said = ["AutoAttack" if "AA" in own else "PGD"] if several else []
        said += ["best checkpoint" if "best" in own else "last checkpoint"] * chosen
        is_hollow = several and "AA" not in own
        marks[column] = _Mark(", ".join(said), is_hollow, "best" in own)
    return marks


def _heights(table: Table) -> list[float]:
    """Returns the place of every row, downwards, with gaps between the families."""
    heights = [0.0]
    for above, row in itertools.pairwise(table.rows):
        heights.append(heights[-1] + (1.0 if above.family == row.family else 1.5))
    return heights


def _limits_by_norm(table: Table) -> dict[str, tuple[float, float]]:
    """Returns the range of the panels of each norm: all marks, and no tiny range."""
    marks = collections.defaultdict(list)
    for row, column in itertools.product(table.rows, table.columns):
        cell = row.cells[column]
        if cell.mean is not None:
            spread = cell.std or 0.0
            marks[column_norm(column)] += [cell.mean - spread, cell.mean + spread]
        if cell.paper is not None:
            marks[column_norm(column)].append(cell.paper)
    return {norm: _limits(min(own), max(own)) for norm, own in marks.items()}


def _limits(low: float, high: float) -> tuple[float, float]:
    """Returns a range that holds both values, some margin, and no tiny range."""
    missing = max(0.0, _LEAST_SPAN - (high - low)) / 2
    low, high = low - missing, high + missing
    margin = 0.1 * (high - low)
    excess = max(0.0, high + margin - 101)  # what lies above 100 % is of no interest
    return low - margin - excess, high + margin - excess


def _legend(panel: "Axes", table: Table) -> list[Any]:
    """Returns what the marks mean, only for those that are drawn."""
    attacks = {split_column(column)[1]: column for column in table.columns}
    marks = _attacks_on(attacks.values()).values()
    spread = any(c.std is not None for row in table.rows for c in row.cells.values())
    bars = {"xerr": [] if spread else None}  # with bars in the legend, or without
    handles: list[Any] = [
        panel.errorbar(
            [], [], label=mark.words or "measured", **bars, **mark.look(GRAY)
        )
        for mark in marks
    ]
    if table.has_paper:
        handles += panel.plot([], [], color=GRAY, **_CROSS, label="the paper's")
    if table.baseline is not None:
        attack = ", AutoAttack" if any(mark.is_hollow for mark in marks) else ""
        label = f"{in_symbols(table.baseline_label)}{attack}"
        handles += panel.plot([], [], **_BASELINE, label=label)
    return handles
