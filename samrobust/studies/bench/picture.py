"""A bench as a picture: how fast each method is, and what it costs relative to ST.

Matplotlib is imported when a picture is drawn, and its global state is left alone.
"""

from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from samrobust.experiments.reporting import pictures
from samrobust.studies.bench.results import BenchReport, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

# Okabe and Ito, Color Universal Design (2008), and a shape each: distinct in gray too.
_SERIES = {
    "step": ("samrobust", "#0072B2", "o"),
    "reference": ("PyTorch, as the paper's code", "#D55E00", "s"),
    "resident": ("PyTorch, data on device", "#E69F00", "^"),
    "tuned": ("PyTorch, tuned", "#CC79A7", "v"),
    "graphed": ("PyTorch, one graph", "#56B4E9", "D"),
    "compiled": ("PyTorch, compiled", "#009E73", "P"),
    "autotuned": ("PyTorch, autotuned", "#F0E442", "X"),
    "pure": ("PyTorch, all in bfloat16", "#000000", "*"),
}
_CLAIMS = {
    "flop_cost": ("by FLOPs", "#777777", "|"),
    "paper_cost": ("the paper's claim", "#777777", "x"),
}
_TEXT = 8
_ROUND = np.outer(10.0 ** np.arange(-1, 7), (1, 2, 5)).ravel()


def draw(report: BenchReport) -> "Figure":
    """Draws the picture of a report with at least one row of kind `step`.

    On the left images per second (logarithmic), with the range of all repeats; on the
    right the time of a step relative to ST, beside what the FLOPs and the paper say.
    """
    groups: dict[str, list[Row]] = {}
    for row in report.rows:
        if row["kind"] in ("step", "pytorch"):
            name = f"{row['method'].upper()}, batch {row['batch_size']}"
            name += "" if row["precision"] == "float32" else f", {row['precision']}"
            groups.setdefault(name, []).append(row)
    title = f"Training speed, {report.provenance.get('device', '')}"
    size = (8, 1.6 + 0.55 * len(groups))
    figure, (speed, cost) = pictures.make_panels(2, size, title, 110)
    for y, rows in enumerate(groups.values()):
        for number, row in enumerate(rows):
            _draw_row(speed, cost, y, 0.13 * (number - (len(rows) - 1) / 2), row)
    speed.set_yticks(range(len(groups)), list(groups))
    speed.set_ylim(len(groups) - 0.5, -0.5)
    speed.set_xlabel("images per second (log)", fontsize=_TEXT)
    cost.set_xlabel("time of a step relative to ST (log)", fontsize=_TEXT)
    rates = [rate for rows in groups.values() for row in rows for rate in _rates(row)]
    first = np.searchsorted(_ROUND, min(rates), "right") - 1
    last = np.searchsorted(_ROUND, max(rates))
    ticks = _ROUND[first : last + 1]
    for panel, numbers in ((speed, ticks), (cost, (1, 2, 5, 10))):
        panel.set_xscale("log")
        panel.set_xticks(numbers, [f"{number:g}" for number in numbers])
        panel.minorticks_off()
        panel.tick_params(labelsize=_TEXT, length=2)
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
        panel.grid(axis="y", color=pictures.PALE, linewidth=0.6)
        panel.set_axisbelow(True)
    speed.set_xlim(ticks[0], ticks[-1])
    low, high = cost.get_xlim()
    cost.set_xlim(low / 1.1, high * 1.1)  # marks at the edge are drawn whole
    handles = _handles(speed) | _handles(cost)
    pictures.add_legend(figure, [*handles.values()], "", columns=3)
    return figure


def _draw_row(speed: "Axes", cost: "Axes", y: int, shift: float, row: Row) -> None:
    """Draws a row's speed with its range over all repeats, and its cost and claims.

    What is measured stands `shift` below the line of the group, claims on the line.
    """
    series = row["variant"] or row["kind"]
    height = y + shift
    style = _style(*_SERIES[series], 5)
    rate, rates = row["images_per_second"], _rates(row)
    ends = rate - min(rates), max(rates) - rate
    reach = np.maximum(0.0, ends)[:, None]
    speed.errorbar(rate, height, xerr=reach, elinewidth=1, **style)
    if "cost" in row:
        cost.plot(row["cost"], height, **style)
    for field in _CLAIMS if series == "step" else ():
        if field in row:
            cost.plot(row[field], y, **_style(*_CLAIMS[field], 9), zorder=4)


def _rates(row: Row) -> list[float]:
    """Returns the images per second of all repeats of all rounds."""
    return [row["batch_size"] / seconds for seconds in chain(*row["seconds"])]


def _style(label: str, color: str, marker: str, size: int) -> dict[str, Any]:
    style = {"label": label, "color": color, "marker": marker, "markersize": size}
    return style | {"linestyle": "none"}


def _handles(panel: "Axes") -> dict[str, Any]:
    """Returns what a legend shows of a panel, by its labels."""
    handles, labels = panel.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))
