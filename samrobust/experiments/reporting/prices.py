"""Picture of what robustness costs: accuracy against the passes of training.

A panel a norm, at its smallest radius and under its strongest attack. Methods of alike
cost stand side by side, so their names are written beside them, spread so that each can
be read.
"""

import collections
import itertools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from samrobust.experiments.reporting import pictures
from samrobust.experiments.reporting.names import (
    column_norm,
    column_order,
    short_label,
)
from samrobust.experiments.reporting.table import Table, TableRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_prices", "has_prices"]

_WIDTH, _HEIGHT = 8.0, 3.6  # inches, of a panel
_NEAR = 0.3  # doublings of the cost within which names stand in one column
_MARGIN = 0.06  # doublings between points and names
_LETTER = 0.022  # doublings that a letter of a name takes
_OTHERS = re.compile(r",\w+\.\w")  # in the name of a row: other fields of its config
_DOT = {"marker": "o", "markersize": 3.5, "linestyle": "none", "elinewidth": 0.8}
_STAIRS = {"drawstyle": "steps-post", "color": pictures.PALE, "linewidth": 2.5}
_LINES = 30.0  # names that a panel has room for, one below another


def has_prices(table: Table) -> bool:
    """Returns whether methods of different cost were attacked."""
    costs = {row.passes for row in _drawn(table)}
    return len(costs) > 1 and bool(_columns(table))


def draw_prices(table: Table) -> "Figure":
    """Draws robust accuracy against the cost of training, ST = 1, doubling by doubling.

    A dot is a mean over seeds, its bar one standard deviation; the line joins what no
    method beats at that cost or less.
    """
    columns, rows = _columns(table), _drawn(table)
    size = (_WIDTH, _HEIGHT * len(columns) + 0.6)
    figure, panels = pictures.make_panels(
        1, size, table.title, 100, rows=len(columns), sharey=False
    )
    for panel, column in zip(panels, columns, strict=True):
        _draw_panel(panel, rows, column)
    panels[-1].set_xlabel("passes of training, counted, ST = 1", fontsize=pictures.TEXT)
    over = pictures.over_seeds(len(row.seeds) for row in rows)
    mean = over if over == "one seed" else f"mean ± std over {over}"
    bar = {"yerr": None if over == "one seed" else [], **_DOT}
    handles = [panels[0].errorbar([], [], color=pictures.GRAY, label=mean, **bar)]
    said = "not beaten at this cost or less"
    handles += panels[0].plot([], [], **_STAIRS, label=said)
    pictures.add_legend(figure, handles, "", columns=2)
    return figure


def _drawn(table: Table) -> list[TableRow]:
    return [row for row in table.rows if row.passes is not None and row.seeds]


def _columns(table: Table) -> list[str]:
    """Returns of each norm the smallest radius under the attack that leaves least."""
    robust = [c for c in table.columns if column_norm(c) != "natural"]
    chosen = []
    for _, columns in itertools.groupby(robust, key=column_norm):
        by_radius = itertools.groupby(columns, key=lambda c: column_order(c)[2])
        _, smallest = next(iter(by_radius))
        chosen.append(min(smallest, key=lambda column: _total(table, column)))
    return chosen


def _total(table: Table, column: str) -> float:
    means = (row.cells[column].mean for row in _drawn(table))
    return sum(mean for mean in means if mean is not None)


def _draw_panel(panel: "Axes", rows: Sequence[TableRow], column: str) -> None:
    colors, names = pictures.family_colors(row.family for row in rows), _names(rows)
    places = {row.name: math.log2(row.passes or 1.0) for row in rows}
    means = {row.name: row.cells[column].mean or 0.0 for row in rows}
    bars = {row.name: row.cells[column].std or 0.0 for row in rows}
    least = min(means[name] - bar for name, bar in bars.items())
    most = max(means[name] + bar for name, bar in bars.items())
    span = max(4.0, most - least)
    low, high = least - 0.05 * span, least + 1.05 * span
    panel.set_ylim(low, high)
    front, best = [], -math.inf
    for row in sorted(rows, key=lambda row: (places[row.name], -means[row.name])):
        if means[row.name] > best:
            best = means[row.name]
            front.append((places[row.name], best))
    clusters = _clusters(rows, places)
    letters = max(len(names[row.name]) for row in clusters[-1])
    right = max(places.values()) + 2 * _MARGIN + _LETTER * letters
    front.append((right, best))
    panel.plot(*zip(*front, strict=True), **_STAIRS, zorder=0)
    for cluster in clusters:
        beside = max(places[row.name] for row in cluster) + _MARGIN
        cluster = sorted(cluster, key=lambda row: means[row.name])
        wanted = [means[row.name] for row in cluster]
        heights = _spread(wanted, (high - low) / _LINES, low, high)
        for row, height in zip(cluster, heights, strict=True):
            x, y, color = places[row.name], means[row.name], colors[row.family]
            panel.errorbar(x, y, bars[row.name], color=color, **_DOT, zorder=3)
            line = {"color": pictures.GRAY, "linewidth": 0.4, "zorder": 1}
            panel.plot([x, beside], [y, height], **line)
            text = pictures.in_symbols(names[row.name])
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.2}
            look = {"fontsize": pictures.SMALL, "va": "center", "bbox": behind}
            panel.text(beside + _MARGIN / 4, height, text, **look, zorder=1.5)
    doublings = range(math.floor(min(places.values())), math.floor(right) + 1)
    panel.set_xticks(list(doublings), [f"{2.0**n:g}x" for n in doublings])
    panel.set_xlim(min(places.values()) - 0.15, right)
    panel.set_title(_title(column), fontsize=pictures.TEXT)
    panel.set_ylabel("accuracy in %", fontsize=pictures.TEXT)
    panel.tick_params(labelsize=pictures.SMALL, length=2)


def _names(rows: Sequence[TableRow]) -> dict[str, str]:
    """Returns short labels, without the other fields of a row where none needs them."""
    full = {row.name: short_label(row.label) for row in rows}
    brief = {
        name: label.rpartition(" with ")[0] if _OTHERS.search(name) else label
        for name, label in full.items()
    }
    counts = collections.Counter(brief.values())
    return {
        n: brief[n] if counts[brief[n]] == 1 else label for n, label in full.items()
    }


def _title(column: str) -> str:
    norm, radius, *attack = column.split(" ", 2)
    words = ["AutoAttack" if word == "AA" else word for word in attack]
    return ", ".join([pictures.in_symbols(norm), f"ε = {radius}", *words])


def _clusters(
    rows: Sequence[TableRow], places: dict[str, float]
) -> list[list[TableRow]]:
    """Returns the rows by what they cost, those of alike cost together."""
    ordered = sorted(rows, key=lambda row: places[row.name])
    clusters = [[ordered[0]]]
    for before, row in itertools.pairwise(ordered):
        if places[row.name] - places[before.name] > _NEAR:
            clusters.append([])
        clusters[-1].append(row)
    return clusters


def _spread(
    wanted: Sequence[float], gap: float, low: float, high: float
) -> list[float]:
    """Returns heights near rising ones that are wanted, `gap` apart and within a panel.

    The names that lie `gap` apart at heights y_i have nondecreasing y_i - i gap: the
    nearest ones in least squares are an isotonic regression, clipped at the panel.
    """
    from scipy.optimize import isotonic_regression  # slow to load

    steps = gap * np.arange(len(wanted))
    levels = isotonic_regression(wanted - steps).x
    return (np.clip(levels, low, high - steps[-1]) + steps).tolist()
