"""The theory in four pictures.

Matplotlib is imported when they are drawn. Colors are those of Okabe and Ito (2008),
and every curve has a line style or a mark of its own, so that the pictures can be read
in gray.
"""

import itertools
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from samrobust.experiments.reporting.pictures import write_figure
from samrobust.studies.theory import closed_forms as forms
from samrobust.studies.theory.logistic import (
    logistic_weight,
    sam_minimax_weight,
    sam_step_weight,
)
from samrobust.studies.theory.population import accuracy, adversarial, natural
from samrobust.studies.theory.report import Findings
from samrobust.studies.theory.study import Points
from samrobust.studies.theory.world import World

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_all"]

_BLACK, _GRAY = "#000000", "#8A8A8A"
_BLUE, _SKY, _RED, _ORANGE = "#0072B2", "#56B4E9", "#D55E00", "#E69F00"
_GREEN, _PINK = "#009E73", "#CC79A7"
_THIN: dict[str, Any] = {"color": _GRAY, "linewidth": 0.8}
_MARK: dict[str, Any] = {"linestyle": "none", "markersize": 5, "zorder": 4}
_HOLLOW: dict[str, Any] = {**_MARK, "marker": "o", "markerfacecolor": "none"}
_STYLE = pathlib.Path(__file__).with_suffix(".mplstyle")


def draw_all(found: Findings, folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Draws the pictures into a folder that exists, each as .png and .pdf.

    Args:
      found: what is drawn; the pictures of one world are of the grid's own.
      folder: where to.
    """
    from matplotlib import style

    paths = []
    for picture in (_robust_weight, _equal_weight, _all_weights, _trade_off):
        with style.context(_STYLE):
            paths += write_figure(picture(found), folder, picture.__name__[1:])
    return tuple(paths)


def _robust_weight(found: Findings) -> "Figure":
    """Draws w_1 against the radius: theory, direct minimum and training."""
    title = f"The robust weight in a world of {_name(found.grid.world)}"
    figure, (attack, sam) = _make_panels(2, (8.6, 3.9), title)
    _draw_attack(attack, found)
    _draw_sam(sam, found)
    return figure


def _draw_attack(panel: "Axes", found: Findings) -> None:
    world, study = found.grid.world, found.study
    radii = np.linspace(0.002, 0.72, 120) * min(float(world.eta), 1.0)
    printed = forms.adversarial_weight(world, radii)
    whole = forms.adversarial_weight_all_features(world, radii)
    finite = np.where(np.isinf(whole), np.nan, whole)
    logistic = [logistic_weight(world, e, moves_robust=True) for e in radii]
    label = "Theorem 4.2: $x_1$ left alone (0-1 and logistic loss)"
    panel.plot(radii, printed, color=_BLUE, label=label)
    label = "eq. (9) as written, 0-1 loss: our root"
    panel.plot(radii, finite, "--", color=_RED, label=label)
    panel.plot(radii, logistic, "-.", color=_GREEN, label="eq. (9), logistic loss")
    for points, color in ((study.attack, _BLUE), (study.attack_all, _RED)):
        here = _of_world(points, world)
        here = here.where(here.radius <= radii[-1])
        panel.plot(here.radius, here.w, color=color, **_HOLLOW)
    if np.isinf(whole).any():
        edge, low = float(radii[np.isinf(whole)][0]), panel.get_ylim()[0]
        panel.axvline(edge, ymax=0.66, color=_RED, linewidth=0.7, linestyle=":")
        words = " beyond: $x_1$ alone,\n $w_1 = \\infty$ (0-1, eq. 9)"
        panel.text(edge, low, words, color=_RED, fontsize=6.5, va="bottom")
    _draw_bands(panel, found, "at", color=_BLUE, marker="s")
    _draw_bands(panel, found, "at all features", color=_GREEN, marker="D")
    panel.plot([], [], color=_GRAY, **_HOLLOW, label="direct minimum, 0-1 loss")
    panel.plot([], [], color=_GRAY, marker="s", **_MARK, label="trained, 95 % band")
    panel.set_xlabel("radius of the attack $\\epsilon_{AT}$")
    panel.set_ylabel("robust weight $w_1$ (others: 1)")
    panel.legend(loc="upper left")


def _draw_sam(panel: "Axes", found: Findings) -> None:
    world, batch_size = found.grid.world, found.effort.batch_size
    start = float(forms.standard_weight(world))
    here = _of_world(found.study.sam, world)
    rho = np.geomspace(0.7 * here.radius.min(), 1.4 * here.radius.max(), 60)
    printed = forms.sam_weight_printed(world, rho)
    exact = forms.sam_weight(world, rho)
    corrected = forms.sam_weight_corrected(world, rho)
    minimax = sam_minimax_weight(world, rho) - start
    steps = sam_step_weight(world, rho, batch_size)
    for w, color, style, label in (
        (printed, _ORANGE, "--", "Theorem 4.4 as printed"),
        (start + rho, _GRAY, ":", "bound: $\\rho$"),
        (exact, _RED, "-", "exact, 0-1 loss: our fixed point"),
        (corrected, _BLACK, ":", "Theorem 4.4 corrected: $w^* \\rho^2/(3d)$"),
        (start + minimax, _GREEN, "-.", "eq. (11), logistic loss"),
        (steps, _BLUE, (0, (5, 1)), f"SAM's steps, logistic loss, batch {batch_size}"),
    ):
        panel.plot(rho, w - start, color=color, linestyle=style, label=label)
    label = "direct minimum, 0-1 loss"
    panel.plot(here.radius, here.w - start, color=_RED, **_HOLLOW, label=label)
    label = "trained, 95 % band"
    _draw_bands(panel, found, "sam", color=_BLUE, marker="s", label=label)
    panel.set(xscale="log", yscale="log", ylabel="$w_1 - w^*$")
    lowest = float(np.fmin(minimax, exact - start)[0])
    panel.set_ylim(0.3 * lowest, 4 * (rho[-1] + start * rho[-1] ** 2))
    panel.set_xlabel("radius of SAM $\\rho$ on $w_1$")
    panel.legend(loc="upper left")


def _equal_weight(found: Findings) -> "Figure":
    """Draws the radii of AT and SAM that give the same w_1."""
    p, eta = float(found.grid.world.p), float(found.grid.world.eta)
    title = f"Radii of SAM and AT of equal $w_1$ (p = {p:g}, $\\eta$ = {eta:g})"
    figure, (panel,) = _make_panels(1, (5.2, 4.2), title)
    sam, lowest = found.study.sam, eta
    rho = np.geomspace(0.5 * sam.radius.min(), 7 * sam.radius.max(), 120)
    colors = itertools.cycle((_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY))
    styles = zip(colors, itertools.cycle("os^Dv"), strict=False)
    for d, (color, marker) in zip(np.unique(sam.d), styles, strict=False):
        world = World(p, eta, float(d))
        exact = forms.equal_attack_radius(world, forms.sam_weight(world, rho))
        lowest = min(lowest, exact[0])
        panel.plot(rho, exact, color=color)
        corrected = forms.equal_attack_radius_corrected(world, rho)
        panel.plot(rho, corrected, ":", color=color)
        here = _of_world(sam, world).resolved()
        style = {**_HOLLOW, "marker": marker, "color": color}
        panel.plot(here.radius, here.attack_radius, **style)
        style["linestyle"] = "-"
        panel.plot([], [], **style, label=f"exact and direct minima, $d = {d:g}$")
    printed = forms.equal_attack_radius_printed(found.grid.world, rho)
    label = "Theorem 4.5 as printed, every $d$"
    panel.plot(rho, printed, "--", color=_BLACK, label=label)
    panel.plot([], [], ":", color=_GRAY, label="Theorem 4.5 corrected")
    panel.plot(rho, rho, **_THIN, label="equal radii")
    panel.axhline(eta, linestyle=":", **_THIN)
    panel.text(rho[-1], eta * 1.2, "$\\epsilon_{AT} = \\eta$", ha="right")
    panel.set(xscale="log", yscale="log", ylim=(lowest / 30, 20 * eta))
    panel.set_xlabel("$\\rho = \\epsilon_{SAM}$ on $w_1$")
    panel.set_ylabel("$\\epsilon_{AT}$ with the same $w_1$")
    panel.legend(loc="lower right")
    return figure


def _all_weights(found: Findings) -> "Figure":
    """Draws where SAM on all weights raises the robust one."""
    title = "SAM on all weights: the sign of its effect on $w_1$"
    figure, (panel,) = _make_panels(1, (5.2, 4.0), title)
    d, low, high = np.geomspace(0.7, 2000, 200), 0.3, 400
    edge = np.sqrt(2 * d)
    panel.fill_betweenx(d, edge, high, color=_ORANGE, alpha=0.25, linewidth=0)
    panel.fill_betweenx(d, low, edge, color=_SKY, alpha=0.25, linewidth=0)
    panel.plot(edge, d, color=_BLACK, label="$w^{*2} = 2d$: $K = 0$")
    points = found.study.sam_all.resolved()
    up, down = points.w > points.standard, points.w <= points.standard
    sides = (up, "raises", _RED, "^"), (down, "lowers", _BLUE, "v")
    for mask, word, color, marker in sides:
        style = {**_MARK, "color": color, "marker": marker}
        some, label = points.where(mask), f"direct minimum: SAM {word} $w_1$"
        panel.plot(some.standard, some.d, **style, label=label)
    panel.text(60, 1.5, "$K > 0$", fontsize=9, color=_RED)
    panel.text(0.5, 500, "$K < 0$", fontsize=9, color=_BLUE)
    panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(d[0], d[-1]))
    panel.set_xlabel("$w^*$, the robust weight without SAM")
    panel.set_ylabel("number of non-robust features $d$")
    _draw_legend_below(figure, panel)
    return figure


def _trade_off(found: Findings) -> "Figure":
    """Draws natural and robust accuracy of all classifiers of the model class."""
    name = _name(found.grid.world)
    title = f"What robustness costs: $w_1$ from $w^*/2$ to $\\infty$, {name}"
    figure, (alone, whole) = _make_panels(2, (8.6, 3.7), title)
    _draw_trade_off(alone, found, moves_robust=False)
    _draw_trade_off(whole, found, moves_robust=True)
    alone.set_title("$x_1$ left alone")
    whole.set_title("all features attacked")
    _draw_legend_below(figure, alone)
    return figure


def _draw_trade_off(panel: "Axes", found: Findings, *, moves_robust: bool) -> None:
    world = found.grid.world
    start, root = float(forms.standard_weight(world)), np.sqrt(world.d)
    angles = np.linspace(np.arctan(start / root / 2), np.pi / 2 - 1e-3, 400)
    rho = np.max(found.study.sam.radius)
    weak, strong = np.array([0.3, 0.6]) * min(float(world.eta), 1.0)
    words = [f"$\\epsilon = {e / world.eta:.2g}\\,\\eta$" for e in (weak, strong)]
    classifiers = (
        ("ST", start, _BLACK, "o"),
        (f"SAM, $\\rho$ = {rho:g} on $w_1$", forms.sam_weight(world, rho), _RED, "^"),
        (f"AT, {words[0]}", forms.adversarial_weight(world, weak), _SKY, "s"),
        (f"AT, {words[1]}", forms.adversarial_weight(world, strong), _BLUE, "D"),
    )

    def natural_accuracy(w: Any) -> Any:
        return 100 * accuracy(natural(world), w)

    attacks = [
        adversarial(world, epsilon, moves_robust=moves_robust)
        for epsilon in (weak, strong)
    ]
    w = root * np.tan(angles)
    for attacked, style, word in zip(attacks, ("-", "--"), words, strict=True):
        y, label = 100 * accuracy(attacked, w), f"attack of {word}"
        panel.plot(natural_accuracy(w), y, style, color=_GRAY, label=label)
    for label, w, color, marker in classifiers:
        y = [100 * accuracy(attacked, w) for attacked in attacks]
        look = {**_MARK, "color": color, "marker": marker}
        panel.plot([natural_accuracy(w)] * 2, y, **look, label=label)
    low, high = panel.get_ylim()
    panel.text(natural_accuracy(start / 2), low, "$w_1 = w^*/2$", va="bottom")
    panel.text(natural_accuracy(1e9), high, "$w_1 = \\infty$", va="top")
    panel.set_xlabel("natural accuracy in %")
    panel.set_ylabel("accuracy under attack in %")


def _make_panels(
    count: int, size: tuple[float, float], title: str
) -> "tuple[Figure, list[Axes]]":
    """Makes a figure of `count` panels in a row; its size is in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _draw_bands(panel: "Axes", found: Findings, method: str, **style: Any) -> None:
    """Draws weights that converged; a band that reaches below 0 has no lower end."""
    own = [
        estimate
        for estimate in found.estimates
        if estimate.method == method and estimate.agrees != "not converged"
    ]
    if own:
        radius, mean, band = zip(
            *((e.radius, e.mean, e.half_width) for e in own), strict=True
        )
        panel.errorbar(radius, mean, band, capsize=2.5, elinewidth=1, **_MARK, **style)


def _draw_legend_below(figure: "Figure", panel: "Axes") -> None:
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 3, "fontsize": 7}
    figure.legend(*panel.get_legend_handles_labels(), **place)


def _of_world(points: Points, world: World) -> Points:
    """Selects the points of one world."""
    same = (points.p == world.p) & (points.eta == world.eta) & (points.d == world.d)
    return points.where(same)


def _name(world: World) -> str:
    """Returns the parameters of a world of scalars, as Matplotlib's mathematics."""
    return f"p = {world.p:g}, $\\eta$ = {world.eta:g}, d = {world.d:g}"
