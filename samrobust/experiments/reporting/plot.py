"""A picture of a table: a line a method, a panel a column, a colour a family.

Matplotlib is imported when a plot is made, and its global state is left alone.
"""

import itertools
import os
import textwrap
from typing import TYPE_CHECKING

from samrobust.experiments.reporting.colours import (
    escape,
    family_colours,
    in_symbols,
    norm_symbol,
)
from samrobust.experiments.reporting.names import column_norm, short_column
from samrobust.experiments.reporting.table import Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

__all__ = ["plot"]

_GREY = "#8A8A8A"
_SMALL, _TEXT, _TITLE = 6.5, 7.5, 9  # points; 150 dots an inch make 14, 16, 19 pixels
_LEAST_SPAN = 4.0  # points of accuracy: a panel does not magnify the noise


def plot(table: Table, path: str | os.PathLike[str]) -> None:
    """Draws the means of a table with their standard deviations, and saves the picture.

    A dot is a mean, its bar one standard deviation over the seeds, a ring the paper's
    number, the dotted line ST. Each panel has its own range of accuracies.

    Args:
      table: the table.
      path: the file; its suffix says the format, as in table.png or table.svg.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_columns = len(table.columns)
    size = (max(6.0, 1.4 + 0.85 * num_columns), 1.5 + 0.21 * _heights(table)[-1])
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, num_columns, sharey=True, squeeze=False)[0]
    colours = family_colours(row.family for row in table.rows)
    for panel, column in zip(panels, table.columns, strict=True):
        _draw_panel(panel, table, column, colours)
    _label_rows(panels[0], table, colours)
    title = textwrap.fill(escape(table.title), 75)
    figure.suptitle(title, fontsize=_TITLE, x=0.01, ha="left")
    figure.legend(
        handles=_legend(table),
        loc="outside lower center",
        ncols=4,
        fontsize=_SMALL,
        title="accuracy in % (each panel has its own range), higher is better",
        title_fontsize=_TEXT,
        frameon=False,
    )
    figure.savefig(path, facecolor="white")


def _draw_panel(
    panel: "Axes", table: Table, column: str, colours: dict[str, str]
) -> None:
    """Draws one column of the table."""
    for y, row in zip(_heights(table), table.rows, strict=True):
        cell, colour = row.cells[column], colours[row.family]
        panel.axhline(y, color="#E4E4E4", linewidth=0.6, zorder=0)
        if cell.mean is not None:
            panel.errorbar(
                cell.mean,
                y,
                xerr=cell.std,
                fmt="o",
                color=colour,
                markersize=4,
                elinewidth=1.3,
                capsize=2,
                zorder=3,
            )
            if row.family == "ST":
                panel.axvline(
                    cell.mean, color=_GREY, linewidth=0.8, linestyle=":", zorder=1
                )
        if cell.paper is not None:
            panel.plot(cell.paper, y, **_RING, color=colour, zorder=4)
    panel.set_title(_panel_title(column), fontsize=_TEXT)
    panel.set_xlim(*_limits(table, column))
    panel.locator_params(axis="x", nbins=3, steps=[1, 2, 5, 10], integer=True)
    panel.tick_params(axis="x", labelsize=_SMALL, length=2)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(_GREY)


_RING = {"marker": "o", "markersize": 7, "markerfacecolor": "none", "linestyle": "none"}


def _label_rows(panel: "Axes", table: Table, colours: dict[str, str]) -> None:
    """Names the rows from top to bottom, in the colours of their families."""
    labels = [_row_label(row) for row in table.rows]
    heights = _heights(table)
    panel.set_yticks(heights, labels, fontsize=_TEXT)
    panel.set_ylim(heights[-1] + 0.6, -0.6)
    for tick, row in zip(panel.get_yticklabels(), table.rows, strict=True):
        tick.set_color(colours[row.family] if row.seeds else _GREY)


def _heights(table: Table) -> list[float]:
    """Returns the place of every row, downwards, with gaps between the families."""
    heights = [0.0]
    for above, row in itertools.pairwise(table.rows):
        heights.append(heights[-1] + (1.0 if above.family == row.family else 1.5))
    return heights


def _limits(table: Table, column: str) -> tuple[float, float]:
    """Returns the range of a panel: all marks, some margin, and no tiny range."""
    cells = [row.cells[column] for row in table.rows]
    marks = [cell.paper for cell in cells if cell.paper is not None]
    for cell in cells:
        if cell.mean is not None:
            spread = cell.std or 0.0
            marks += [cell.mean - spread, cell.mean + spread]
    low, high = min(marks), max(marks)
    missing = max(0.0, _LEAST_SPAN - (high - low)) / 2
    low, high = low - missing, high + missing
    margin = 0.1 * (high - low)
    excess = max(0.0, high + margin - 101)  # what lies above 100 % is of no interest
    return low - margin - excess, high + margin - excess


def _legend(table: Table) -> list["Line2D"]:
    """Returns what the marks mean, only for those that are drawn."""
    from matplotlib.lines import Line2D

    counts = sorted({len(row.seeds) for row in table.rows if row.seeds})
    over = str(counts[0]) if len(counts) == 1 else f"up to {counts[-1]}"
    mean = "one seed" if counts[-1] == 1 else f"mean ± std, {over} seeds"
    line = "none" if counts[-1] == 1 else "-"
    style = {"color": _GREY, "marker": "o", "markersize": 4, "linestyle": line}
    marks = [Line2D([], [], **style, label=mean)]
    if table.has_paper:
        marks.append(Line2D([], [], color=_GREY, **_RING, label="paper"))
    if any(row.family == "ST" and row.seeds for row in table.rows):
        marks.append(Line2D([], [], color=_GREY, linestyle=":", label="ST"))
    return marks


def _panel_title(column: str) -> str:
    """Returns a column's name in symbols, on two lines."""
    norm = column_norm(column)
    if norm == "natural":
        return "natural\nno attack"
    _, radius, *attack = short_column(column).split(" ", 2)
    return f"{norm_symbol(norm)} {' '.join(attack) or 'attack'}\nε = {radius}/255"


def _row_label(row: Row) -> str:
    """Returns a row's label in symbols."""
    label = in_symbols(row.label)
    return label if row.seeds else f"{label}, no run yet"
