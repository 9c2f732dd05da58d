"""What the pictures of the theory share: colours, marks, panels, content.

Matplotlib is imported when one is drawn. Colours are those of Okabe and Ito (2008), and
every curve has a line style or a mark of its own, so that the pictures can be read in
grey.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from samrobust.theory.experiment import Estimate
from samrobust.theory.grid import Points, Study
from samrobust.theory.world import World

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "GREY",
    "HOLLOW",
    "MARK",
    "ORANGE",
    "PINK",
    "RED",
    "SKY",
    "TEXT",
    "Content",
    "make_panels",
    "name_of",
    "of_world",
    "set_title",
]

BLACK, GREY = "#000000", "#8A8A8A"
BLUE, SKY, RED, ORANGE = "#0072B2", "#56B4E9", "#D55E00", "#E69F00"
GREEN, PINK = "#009E73", "#CC79A7"
TEXT = 8
MARK: dict[str, Any] = {"linestyle": "none", "markersize": 5, "zorder": 4}
HOLLOW: dict[str, Any] = {**MARK, "marker": "o", "markerfacecolor": "none"}


@dataclasses.dataclass(frozen=True)
class Content:
    """What is drawn: the arguments of `samrobust.theory.figures.draw_all`."""

    world: World
    study: Study
    estimates: Sequence[Estimate]
    batch_size: int


def of_world(points: Points, world: World) -> Points:
    """The points of one world."""
    same = (points.p == world.p) & (points.eta == world.eta) & (points.d == world.d)
    return points.where(same)


def name_of(world: World) -> str:
    """The parameters of a world of scalars, as Matplotlib's mathematics."""
    return f"p = {world.p:g}, $\\eta$ = {world.eta:g}, d = {world.d:g}"


def make_panels(count: int, size: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    """A figure of `count` panels in a row; its size is in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in panels:
        panel.tick_params(labelsize=TEXT - 1)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def set_title(figure: "Figure", text: str) -> None:
    """A title at the left, above all panels."""
    figure.suptitle(text, fontsize=TEXT + 1, x=0.01, ha="left")
