"""Robust accuracy against every measure: a panel a measure, a dot a run.

Matplotlib is imported when the picture is drawn, and its global state is left alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from samrobust.experiments.reporting import pictures
from samrobust.experiments.reporting.names import short_label
from samrobust.studies.sharpness.findings import Explanation
from samrobust.studies.sharpness.probe import QUANTITIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_scatter"]

_COLUMNS, _ROWS = 5, 3
_DECADE = 10.0  # measures that span more are drawn on a logarithmic axis


def draw_scatter(found: Explanation, title: str) -> "Figure":
    """Draws accuracy in the spoken-of column against all measures."""
    labels = {run.row: short_label(run.label) for run in found.runs}
    legend = 0.5 + 0.16 * len(labels) / _COLUMNS
    size = (1.85 * _COLUMNS + 0.4, 1.95 * _ROWS + legend)
    figure, panels = pictures.make_panels(_COLUMNS, size, title, 120, rows=_ROWS)
    looks = {
        row: {**look, "linestyle": "none", "markersize": 4.5}
        for row, look in pictures.row_looks(run.row for run in found.runs).items()
    }
    for panel, name in zip(panels, QUANTITIES, strict=False):
        _draw(panel, found, name, looks)
    for panel in panels[len(QUANTITIES) :]:
        panel.set_axis_off()
    for panel in panels[::_COLUMNS]:
        panel.set_ylabel("accuracy in %", fontsize=pictures.SMALL)
    handles = [
        panels[0].plot([], [], **looks[row], label=pictures.in_symbols(label))[0]
        for row, label in labels.items()
    ]
    pictures.add_legend(figure, handles, "a dot a run", columns=_COLUMNS)
    return figure


def _draw(
    panel: "Axes", found: Explanation, name: str, looks: dict[str, dict[str, Any]]
) -> None:
    """Draws the runs in a panel, with their rank correlation above."""
    pairs = found.pairs(name, found.column)
    for value, accuracy, run in pairs:
        panel.plot(value, accuracy, **looks[run.row], alpha=0.8)
    _choose_scale(panel, [value for value, _, _ in pairs])
    known = found.correlations[name][found.column]
    words = f"r = {known}".replace("-", "\N{MINUS SIGN}")
    title = f"{pictures.in_symbols(QUANTITIES[name].label)}\n{words}"
    panel.set_title(title, fontsize=pictures.TEXT)
    panel.set_xlabel(QUANTITIES[name].unit, fontsize=pictures.SMALL)
    panel.tick_params(labelsize=pictures.SMALL, length=2)
    panel.grid(color=pictures.PALE, linewidth=0.6)
    panel.set_axisbelow(True)


def _choose_scale(panel: "Axes", values: Sequence[float]) -> None:
    """Makes the axis of the measure logarithmic where its values span a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    if not values or min(values) <= 0 or max(values) <= _DECADE * min(values):
        return
    panel.set_xscale("log")
    steps = (1, 2, 5) if max(values) < _DECADE**2 * min(values) else (1,)
    panel.xaxis.set_major_locator(LogLocator(subs=steps))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.minorticks_off()
