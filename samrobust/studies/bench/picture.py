"""A bench as a picture: how fast each method is, and what it costs relative to ST.

Matplotlib is imported when a picture is drawn, and its global state is left alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from samrobust.studies.bench.results import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

# Okabe and Ito, Color Universal Design (2008), and a shape each: distinct in grey too.
_SERIES: dict[str, dict[str, Any]] = {
    "step": {"label": "samrobust, bare step", "color": "#0072B2", "marker": "o"},
    "epoch": {"label": "samrobust, whole loop", "color": "#56B4E9", "marker": "D"},
    "reference": {
        "label": "PyTorch, as the paper's code",
        "color": "#D55E00",
        "marker": "s",
    },
    "resident": {
        "label": "PyTorch, data on device",
        "color": "#E69F00",
        "marker": "^",
    },
    "tuned": {"label": "PyTorch, tuned", "color": "#CC79A7", "marker": "v"},
    "compiled": {"label": "PyTorch, compiled", "color": "#009E73", "marker": "P"},
}
_GREY = "#777777"
_TEXT = 8


def draw(report: Report) -> "Figure":
    """Draws the picture of a report with at least one row of kind `step`.

    On the left images per second (logarithmic), with the range of all repeats; on the
    right the time of a step relative to ST, beside what the FLOPs and the paper say.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    groups = _groups(report.rows)
    figure = Figure(
        figsize=(8, 1.6 + 0.55 * len(groups)), dpi=150, layout="constrained"
    )
    speed, cost = figure.subplots(1, 2, sharey=True)
    for y, rows in enumerate(groups.values()):
        _draw_speed(speed, y, rows)
        _draw_cost(cost, y, rows)
    speed.set_yticks(range(len(groups)), list(groups), fontsize=_TEXT)
    speed.set_ylim(len(groups) - 0.5, -0.5)
    speed.set_xscale("log")
    speed.set_xlabel("images per second (log)", fontsize=_TEXT)
    cost.set_xscale("log")
    cost.set_xlabel("time of a step relative to ST (log)", fontsize=_TEXT)
    cost.set_xticks([1, 2, 5, 10])
    for panel in (speed, cost):
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.minorticks_off()
        panel.tick_params(labelsize=_TEXT, length=2)
        panel.tick_params(axis="y", length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.grid(axis="y", color="#E4E4E4", linewidth=0.6)
        panel.set_axisbelow(True)
    _ticks(speed, report.rows)
    device = report.provenance.get("device", "")
    figure.suptitle(f"Training speed, {device}", fontsize=_TEXT + 1, x=0.01, ha="left")
    handles: dict[str, Any] = {}
    for panel in (speed, cost):
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=3,
        fontsize=_TEXT - 1,
        frameon=False,
    )
    return figure


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each method and setting, by a line's name."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] in ("step", "epoch", "pytorch"):
            name = f"{row['method'].upper()}, batch {row['batch_size']}"
            name += "" if row["precision"] == "float32" else f", {row['precision']}"
            groups.setdefault(name, []).append(row)
    return groups


def _series(row: Row) -> str:
    return row["variant"] or row["kind"]


def _draw_speed(panel: "Axes", y: int, rows: Sequence[Row]) -> None:
    """Images per second of a line's rows, with the range over all repeats."""
    for row in rows:
        style = _SERIES[_series(row)]
        values = [value for repeats in row["seconds"] for value in repeats]
        rate = row["images_per_second"]
        low, high = row["batch_size"] / max(values), row["batch_size"] / min(values)
        height = y + 0.13 * (list(_SERIES).index(_series(row)) - 2.5)
        panel.errorbar(
            rate,
            height,
            xerr=[[max(0.0, rate - low)], [max(0.0, high - rate)]],
            linestyle="none",
            markersize=5,
            elinewidth=1,
            **style,
        )


def _draw_cost(panel: "Axes", y: int, rows: Sequence[Row]) -> None:
    """Time relative to ST: measured, by FLOPs, and as the paper says."""
    for row in rows:
        if "cost" in row and row["kind"] != "epoch":
            style = _SERIES[_series(row)]
            height = y + 0.13 * (list(_SERIES).index(_series(row)) - 2.5)
            panel.plot(row["cost"], height, linestyle="none", markersize=5, **style)
    for field, label, marker in (
        ("flop_cost", "by FLOPs", "|"),
        ("paper_cost", "the paper's claim", "x"),
    ):
        values = [row[field] for row in rows if row["kind"] == "step" and field in row]
        panel.plot(
            values[:1],
            [y] * len(values[:1]),
            linestyle="none",
            marker=marker,
            markersize=9,
            color=_GREY,
            label=label,
        )


def _ticks(panel: "Axes", rows: Sequence[Row]) -> None:
    """Round numbers, two a decade or more, over the range of the speeds."""
    rates = [row["images_per_second"] for row in rows if row["kind"] != "evaluation"]
    steps = [m * 10.0**e for e in range(-1, 7) for m in (1, 2, 5)]
    low = max(s for s in steps if s <= min(rates))
    high = min(s for s in steps if s >= max(rates))
    ticks = [s for s in steps if low <= s <= high]
    panel.set_xlim(low, high)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
