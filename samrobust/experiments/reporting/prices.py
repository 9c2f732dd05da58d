"""Picture of what robustness costs: accuracy against the passes of training.

Of each norm a panel for the smallest radius and one for the largest, under the
strongest attack. Methods of alike cost stand side by side, so their names are written
beside them, spread so that each can be read; in a crowd only the best of each family is
named.
"""

import collections
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from samrobust.experiments.reporting import pictures
from samrobust.experiments.reporting.names import column_norm, column_order, short_label
from samrobust.experiments.reporting.table import Table, TableRow
from samrobust.system.fields import split_fields

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_prices", "has_prices"]

_WIDTH, _LEAST, _LINE = 9.0, 1.8, 0.105  # inches: of a panel, and between two names
_AROUND = 0.45  # inches above and below a panel
_NEAR = 0.3  # doublings of the cost within which names stand in one column
_MARGIN = 0.06  # doublings between points and names
_LETTER = 0.0195  # doublings that a letter of a name takes
_DOT = {"marker": "o", "markersize": 3.5, "linestyle": "none", "elinewidth": 0.8}
_STAIRS = {"drawstyle": "steps-post", "color": pictures.PALE, "linewidth": 2.5}
_CROWD = 30  # names in a column, beyond which most are left out


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
    most = max(len(_named(cluster, columns[0])) for cluster in _clusters(rows))
    height = max(_LEAST, 1.25 * most * _LINE)
    size = (_WIDTH, (height + _AROUND) * len(columns) + 0.6)
    figure, panels = pictures.make_panels(
        1, size, table.title, 100, rows=len(columns), sharey=False
    )
    for panel, column in zip(panels, columns, strict=True):
        _draw_panel(panel, rows, column, height)
    words = f"passes of training, counted, {table.baseline_label} = 1"
    if any(len(cluster) > _CROWD for cluster in _clusters(rows)):
        words += f"; of more than {_CROWD} alike, the best of each family are named"
    panels[-1].set_xlabel(words, fontsize=pictures.TEXT)
    mean = pictures.over_seeds("mean ± std", (len(row.seeds) for row in rows))
    bar = {"yerr": None if mean == "one seed" else [], **_DOT}
    handles = [panels[0].errorbar([], [], color=pictures.GRAY, label=mean, **bar)]
    said = "not beaten at this cost or less"
    handles += panels[0].plot([], [], **_STAIRS, label=said)
    images = f"accuracy in % on {table.num_test:,} images"
    pictures.add_legend(figure, handles, images, columns=2)
    return figure


def _drawn(table: Table) -> list[TableRow]:
    return [row for row in table.rows if row.passes is not None and row.seeds]


def _columns(table: Table) -> list[str]:
    """Returns each norm's smallest and largest radius, under its strongest attack."""
    robust = [c for c in table.columns if column_norm(c) != "natural"]
    chosen = []
    for _, columns in itertools.groupby(robust, key=column_norm):
        by_radius = itertools.groupby(columns, key=lambda c: column_order(c)[2])
        smallest, *others = (list(each) for _, each in by_radius)
        for attacks in (smallest, *others[-1:]):
            chosen.append(min(attacks, key=lambda column: _total(table, column)))
    return chosen


def _total(table: Table, column: str) -> float:
    means = (row.cells[column].mean for row in _drawn(table))
    return sum(mean for mean in means if mean is not None)


def _draw_panel(
    panel: "Axes", rows: Sequence[TableRow], column: str, height: float
) -> None:
    colors, names = pictures.family_colors(row.family for row in rows), _names(rows)
    places = {row.name: _place(row) for row in rows}
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
    for row in rows:
        dot = {**_DOT, "color": colors[row.family], "zorder": 3}
        panel.errorbar(places[row.name], means[row.name], bars[row.name], **dot)
    clusters = _clusters(rows)
    letters = max(len(names[row.name]) for row in _named(clusters[-1], column))
    right = max(places.values()) + 2 * _MARGIN + _LETTER * letters
    front.append((right, best))
    panel.plot(*zip(*front, strict=True), **_STAIRS, zorder=0)
    for cluster in clusters:
        beside = max(places[row.name] for row in cluster) + _MARGIN
        named = _named(cluster, column)
        wanted = [means[row.name] for row in named]
        levels = _spread(wanted, (high - low) * _LINE / height, low, high)
        for row, level in zip(named, levels, strict=True):
            line = {"color": pictures.GRAY, "linewidth": 0.4, "zorder": 1}
            ends = [places[row.name], beside], [means[row.name], level]
            panel.plot(*ends, **line)
            text = pictures.in_symbols(names[row.name])
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.2}
            look = {"fontsize": pictures.SMALL, "va": "center", "bbox": behind}
            panel.text(beside + _MARGIN / 4, level, text, **look, zorder=1.5)
    doublings = range(math.floor(min(places.values())), math.floor(right) + 1)
    panel.set_xticks(list(doublings), [f"{2.0**n:g}x" for n in doublings])
    panel.set_xlim(min(places.values()) - 0.15, right)
    panel.set_title(pictures.column_in_symbols(column), fontsize=pictures.TEXT)
    panel.set_ylabel("accuracy in %", fontsize=pictures.TEXT)
    panel.tick_params(labelsize=pictures.SMALL, length=2)


def _names(rows: Sequence[TableRow]) -> dict[str, str]:
    """Returns short labels, without the other fields of a row where none needs them."""
    full = {row.name: short_label(row.label) for row in rows}
    brief = {
        name: label.rpartition(" with ")[0] if split_fields(name)[1] else label
        for name, label in full.items()
    }
    counts = collections.Counter(brief.values())
    return {
        n: brief[n] if counts[brief[n]] == 1 else label for n, label in full.items()
    }


def _place(row: TableRow) -> float:
    """Returns what a row costs, in doublings of ST."""
    return math.log2(row.passes or 1.0)


def _named(cluster: Sequence[TableRow], column: str) -> list[TableRow]:
    """Returns the rows whose names have room, the lowest accuracy first."""
    rising = sorted(cluster, key=lambda row: row.cells[column].mean or 0.0)
    if len(rising) <= _CROWD:
        return rising
    best = {row.family: row for row in rising}
    return [row for row in rising if best[row.family] is row]


def _clusters(rows: Sequence[TableRow]) -> list[list[TableRow]]:
    """Returns the rows by what they cost, those of alike cost together."""
    ordered = sorted(rows, key=_place)
    clusters = [[ordered[0]]]
    for before, row in itertools.pairwise(ordered):
        if _place(row) - _place(before) > _NEAR:
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
