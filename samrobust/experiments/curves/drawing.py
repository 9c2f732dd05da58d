"""The picture of the curves: a panel a norm, a line a method, a band over its seeds.

Matplotlib is imported when it is drawn, and its global state is left alone.
"""

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from samrobust.experiments.curves.measure import Curve
from samrobust.experiments.reporting.colours import (
    escape,
    family_colours,
    in_symbols,
    norm_symbol,
)
from samrobust.experiments.reporting.names import family

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_curves"]

_TEXT, _TITLE = 7.5, 9
# Methods of one family differ by these, so that the picture can be read in grey.
_STYLES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D")


def draw_curves(curves: Sequence[Curve], title: str) -> "Figure":
    """Draws accuracy in percent against the radius.

    Args:
      curves: of `curves_of`.
      title: above all panels.

    Returns:
      The figure; `savefig` writes it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    norms = list(dict.fromkeys(curve.norm for curve in curves))
    size = (1.0 + 3.6 * len(norms), 4.1)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(norms), sharey=True, squeeze=False)[0]
    looks = _looks(curve.row for curve in curves)
    for panel, norm in zip(panels, norms, strict=True):
        for curve in (c for c in curves if c.norm == norm):
            colour, style, mark = looks[curve.row]
            mean, std = np.array(curve.mean), np.array(curve.std)
            panel.plot(
                curve.radii,
                mean,
                color=colour,
                linestyle=style,
                linewidth=1.2,
                marker=mark,
                markersize=3.5,
                label=in_symbols(curve.label),
            )
            low, high = np.clip(mean - std, 0, 100), np.clip(mean + std, 0, 100)
            panel.fill_between(
                curve.radii, low, high, color=colour, alpha=0.15, linewidth=0
            )
        panel.set_title(f"{norm_symbol(norm)} attack", fontsize=_TEXT + 1)
        panel.set_xlabel("radius ε in 1/255", fontsize=_TEXT)
        panel.set_xlim(left=0)
        panel.set_ylim(-1, 101)
        panel.tick_params(labelsize=_TEXT - 1)
        panel.grid(axis="y", color="#E4E4E4", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy in %", fontsize=_TEXT)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize=_TEXT - 0.5,
        title=_legend_title(curves),
        title_fontsize=_TEXT - 0.5,
        frameon=False,
    )
    text = textwrap.fill(escape(title), 45 * len(norms) + 10)
    figure.suptitle(text, fontsize=_TITLE, x=0.01, ha="left")
    return figure


def _looks(rows: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Returns color, line style and mark of every row."""
    names = list(dict.fromkeys(rows))
    colours = family_colours(map(family, names))
    looks, seen = {}, dict.fromkeys(map(family, names), 0)
    for number, name in enumerate(names):
        own = family(name)
        style = _STYLES[seen[own] % len(_STYLES)]
        looks[name] = (colours[own], style, _MARKS[number % len(_MARKS)])
        seen[own] += 1
    return looks


def _legend_title(curves: Sequence[Curve]) -> str:
    counts = sorted({curve.seeds for curve in curves})
    if counts[-1] == 1:
        return "one seed"
    over = f"{counts[0]}" if len(counts) == 1 else f"up to {counts[-1]}"
    return f"mean and band of one standard deviation over {over} seeds"
