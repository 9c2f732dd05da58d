"""The theory in four pictures; Matplotlib is imported when one is drawn.

Colours are those of Okabe and Ito (2008), and every curve has a line style or a mark of
its own, so that the pictures can be read in grey.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from samrobust.reporting.files import atomically
from samrobust.theory import closed_forms as forms
from samrobust.theory.experiment import Estimate
from samrobust.theory.grid import Points, Study
from samrobust.theory.logistic import SamLogistic, logistic_weight
from samrobust.theory.population import adversarial, natural
from samrobust.theory.world import World

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_all"]

_BLACK, _GREY = "#000000", "#8A8A8A"
_BLUE, _SKY, _RED, _ORANGE = "#0072B2", "#56B4E9", "#D55E00", "#E69F00"
_GREEN, _PINK = "#009E73", "#CC79A7"
_TEXT = 8
_MARK: dict[str, Any] = {"linestyle": "none", "markersize": 5, "zorder": 4}
_HOLLOW: dict[str, Any] = {**_MARK, "marker": "o", "markerfacecolor": "none"}


@dataclasses.dataclass(frozen=True)
class _Content:
    world: World
    study: Study
    estimates: Sequence[Estimate]
    batch_size: int


def draw_all(
    world: World,
    study: Study,
    estimates: Sequence[Estimate],
    batch_size: int,
    folder: pathlib.Path,
) -> tuple[pathlib.Path, ...]:
    """Draws the pictures into a folder that exists, each as .png and .pdf.

    Args:
      world: of scalars; the pictures of one world are of this one.
      study: the points.
      estimates: of the trained world; may be empty.
      batch_size: they were trained with.
      folder: where to.
    """
    content = _Content(world, study, estimates, batch_size)
    pictures: dict[str, Callable[[_Content], Figure]] = {
        "robust_weight": _robust_weight,
        "equal_weight": _equal_weight,
        "all_weights": _all_weights,
        "trade_off": _trade_off,
    }
    paths = []
    for name, picture in pictures.items():
        figure = picture(content)
        for suffix in ("png", "pdf"):
            paths.append(folder / f"{name}.{suffix}")
            # Without a date the same numbers give the same file.
            metadata = {"CreationDate": None} if suffix == "pdf" else None
            save = functools.partial(figure.savefig, metadata=metadata, facecolor="w")
            atomically(paths[-1], save)
    return tuple(paths)


def _robust_weight(content: _Content) -> "Figure":
    """w_1 against the radius: theory, direct minimum and training."""
    figure, (attack, sam) = _panels(2, (8.6, 3.9))
    _draw_attack(attack, content)
    _draw_sam(sam, content)
    _title(figure, f"The robust weight in a world of {_name(content.world)}")
    return figure


def _draw_attack(panel: "Axes", content: _Content) -> None:
    world = content.world
    eta = float(world.eta)
    radii = np.linspace(0.002, 0.72, 120) * eta
    many = World(*(np.full_like(radii, part) for part in (world.p, world.eta, world.d)))
    whole = forms.adversarial_weight_all_features(many, radii)
    own = [logistic_weight(world, e, moves_robust=True) for e in radii]
    panel.plot(
        radii,
        forms.adversarial_weight(many, radii),
        color=_BLUE,
        label="Theorem 4.2: $x_1$ left alone (0-1 and logistic loss)",
    )
    panel.plot(
        radii,
        np.where(np.isinf(whole), np.nan, whole),
        color=_RED,
        linestyle="--",
        label="eq. (9) as written, 0-1 loss: our root",
    )
    panel.plot(radii, own, color=_GREEN, linestyle="-.", label="eq. (9), logistic loss")
    for points, colour in (
        (content.study.attack, _BLUE),
        (content.study.attack_all, _RED),
    ):
        here = _here(points, world)
        here = here.where(here.radius <= radii[-1])
        panel.plot(here.radius, here.w, color=colour, **_HOLLOW)
    if np.isinf(whole).any():
        edge = float(radii[np.isinf(whole)][0])
        panel.axvline(edge, ymax=0.66, color=_RED, linewidth=0.7, linestyle=":")
        panel.text(
            edge,
            panel.get_ylim()[0],
            " beyond: $x_1$ alone,\n $w_1 = \\infty$ (0-1, eq. 9)",
            color=_RED,
            fontsize=_TEXT - 1.5,
            va="bottom",
        )
    for method, colour, marker in (
        ("at", _BLUE, "s"),
        ("at all features", _GREEN, "D"),
    ):
        _bands(panel, content.estimates, method, colour, marker, "AT, trained")
    panel.set_xlabel("radius of the attack $\\epsilon_{AT}$", fontsize=_TEXT)
    panel.set_ylabel("robust weight $w_1$ (others: 1)", fontsize=_TEXT)
    panel.plot([], [], color=_GREY, **_HOLLOW, label="direct minimum, 0-1 loss")
    panel.plot([], [], color=_GREY, marker="s", **_MARK, label="trained, 95 % band")
    panel.legend(fontsize=_TEXT - 1.5, frameon=False, loc="upper left")


def _draw_sam(panel: "Axes", content: _Content) -> None:
    world = content.world
    start = float(forms.standard_weight(world))
    here = _here(content.study.sam, world)
    rho = np.geomspace(0.7 * here.radius.min(), 1.4 * here.radius.max(), 60)
    many = World(*(np.full_like(rho, part) for part in (world.p, world.eta, world.d)))
    logistic = SamLogistic(world)
    curves = (
        (forms.sam_weight_printed(many, rho), _ORANGE, "--", "Theorem 4.4 as printed"),
        (start + rho, _GREY, ":", "bound: $\\rho$"),
        (forms.sam_weight(many, rho), _RED, "-", "exact, 0-1 loss: our fixed point"),
        (
            forms.sam_weight_corrected(many, rho),
            _BLACK,
            (0, (1, 2)),
            "Theorem 4.4 corrected: $w^* \\rho^2/(3d)$",
        ),
        (
            np.array([logistic.minimax(r) for r in rho]),
            _GREEN,
            "-.",
            "eq. (11), logistic loss",
        ),
        (
            np.array([logistic.stationary(r, content.batch_size) for r in rho]),
            _BLUE,
            (0, (5, 1)),
            f"SAM's steps, logistic loss, batch {content.batch_size}",
        ),
    )
    for values, colour, style, label in curves:
        panel.plot(rho, values - start, color=colour, linestyle=style, label=label)
    panel.plot(
        here.radius,
        here.w - start,
        color=_RED,
        **_HOLLOW,
        label="direct minimum, 0-1 loss",
    )
    _bands(panel, content.estimates, "sam", _BLUE, "s", "trained, 95 % band")
    panel.set_xscale("log")
    panel.set_yscale("log")
    lowest = np.min(logistic.minimax(float(rho[0])) - start)
    panel.set_ylim(0.3 * lowest, 4 * (rho[-1] + start * rho[-1] ** 2))
    panel.set_xlabel("radius of SAM $\\rho$ on $w_1$", fontsize=_TEXT)
    panel.set_ylabel("$w_1 - w^*$", fontsize=_TEXT)
    panel.legend(fontsize=_TEXT - 1.5, frameon=False, loc="upper left")


def _bands(
    panel: "Axes",
    estimates: Sequence[Estimate],
    method: str,
    colour: str,
    marker: str,
    label: str,
) -> None:
    """Trained weights, with the band; one that reaches below 0 has no lower end."""
    own = [estimate for estimate in estimates if estimate.method == method]
    if own:
        mean = np.array([estimate.mean for estimate in own])
        half = np.array([estimate.half_width for estimate in own])
        panel.errorbar(
            [estimate.radius for estimate in own],
            mean,
            yerr=half,
            color=colour,
            marker=marker,
            capsize=2.5,
            elinewidth=1,
            label=label if method == "sam" else None,
            **_MARK,
        )


def _equal_weight(content: _Content) -> "Figure":
    """The radii of AT and SAM that give the same w_1."""
    figure, (panel,) = _panels(1, (5.2, 4.2))
    p, eta = float(content.world.p), float(content.world.eta)
    rho = np.geomspace(0.05, 20, 120)
    sizes = sorted(set(content.study.sam.d))
    for d, colour in zip(sizes, _cycle(len(sizes)), strict=True):
        world = World(*(np.full_like(rho, part) for part in (p, eta, d)))
        exact = forms.equal_attack_radius(world, forms.sam_weight(world, rho))
        panel.plot(rho, exact, color=colour, label=f"exact, $d = {d:g}$")
        corrected = forms.equal_attack_radius_corrected(world, rho)
        panel.plot(rho, corrected, color=colour, linestyle=(0, (1, 2)))
        points = content.study.sam
        same = points.where((points.d == d) & (points.p == p) & (points.eta == eta))
        same = same.where(same.error < 1e-3 * (same.w - same.standard))
        panel.plot(same.radius, same.attack_radius, color=colour, **_HOLLOW)
    world = World(*(np.full_like(rho, part) for part in (p, eta, 1)))
    panel.plot(
        rho,
        forms.equal_attack_radius_printed(world, rho),
        color=_BLACK,
        linestyle="--",
        label="Theorem 4.5 as printed, every $d$",
    )
    panel.plot(
        [], [], color=_GREY, linestyle=(0, (1, 2)), label="Theorem 4.5 corrected"
    )
    panel.plot([], [], color=_GREY, **_HOLLOW, label="direct minima")
    panel.plot(rho, rho, color=_GREY, linewidth=0.8)
    panel.axhline(eta, color=_GREY, linewidth=0.8, linestyle=":")
    panel.text(
        20, eta * 1.2, "$\\epsilon_{AT} = \\eta$", fontsize=_TEXT - 1, ha="right"
    )
    panel.text(0.09, 0.12, "equal radii", fontsize=_TEXT - 1, rotation=32, color=_GREY)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_ylim(1e-7, 3)
    panel.set_xlabel("$\\rho = \\epsilon_{SAM}$ on $w_1$", fontsize=_TEXT)
    panel.set_ylabel("$\\epsilon_{AT}$ with the same $w_1$", fontsize=_TEXT)
    panel.legend(fontsize=_TEXT - 1.5, frameon=False, loc="lower right")
    _title(figure, f"Radii of SAM and AT of equal $w_1$ (p = {p:g}, $\\eta$ = {eta:g})")
    return figure


def _all_weights(content: _Content) -> "Figure":
    """Where SAM on all weights raises the robust one."""
    figure, (panel,) = _panels(1, (5.2, 4.0))
    points = content.study.sam_all
    points = points.where(points.error < 1e-3 * np.abs(points.w - points.standard))
    up = points.w > points.standard
    d = np.geomspace(0.7, 2000, 200)
    edge = np.sqrt(2 * d)
    low, high = 0.3, 400
    panel.fill_betweenx(d, edge, high, color=_ORANGE, alpha=0.25, linewidth=0)
    panel.fill_betweenx(d, low, edge, color=_SKY, alpha=0.25, linewidth=0)
    panel.plot(edge, d, color=_BLACK, label="$w^{*2} = 2d$: $K = 0$")
    for mask, colour, marker, word in (
        (up, _RED, "^", "raises"),
        (~up, _BLUE, "v", "lowers"),
    ):
        panel.plot(
            points.standard[mask],
            points.d[mask],
            color=colour,
            marker=marker,
            **_MARK,
            label=f"direct minimum: SAM {word} $w_1$",
        )
    panel.text(60, 1.5, "$K > 0$", fontsize=_TEXT + 1, color=_RED)
    panel.text(0.5, 500, "$K < 0$", fontsize=_TEXT + 1, color=_BLUE)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(low, high)
    panel.set_ylim(d[0], d[-1])
    panel.set_xlabel("$w^*$, the robust weight without SAM", fontsize=_TEXT)
    panel.set_ylabel("number of non-robust features $d$", fontsize=_TEXT)
    figure.legend(
        loc="outside lower center",
        fontsize=_TEXT - 1,
        frameon=False,
        ncols=3,
        columnspacing=1,
        handletextpad=0.5,
    )
    _title(figure, "SAM on all weights: the sign of its effect on $w_1$")
    return figure


def _trade_off(content: _Content) -> "Figure":
    """Natural and robust accuracy of all classifiers of the model class."""
    figure, panels = _panels(2, (8.6, 3.7))
    world = content.world
    radii = np.array([0.3, 0.6]) * float(world.eta)
    root = np.sqrt(float(world.d))
    start = float(forms.standard_weight(world))
    w = root * np.tan(np.linspace(np.arctan(start / root / 2), np.pi / 2 - 1e-3, 400))
    clean = 100 * _accuracies(natural(world), w)
    largest = float(np.max(content.study.sam.radius))
    marks = (
        ("ST", start, _BLACK, "o"),
        (
            f"SAM, $\\rho$ = {largest:g} on $w_1$",
            float(forms.sam_weight(world, largest)),
            _RED,
            "^",
        ),
        (
            "AT, $\\epsilon = 0.3\\,\\eta$",
            float(forms.adversarial_weight(world, radii[0])),
            _SKY,
            "s",
        ),
        (
            "AT, $\\epsilon = 0.6\\,\\eta$",
            float(forms.adversarial_weight(world, radii[1])),
            _BLUE,
            "D",
        ),
    )
    for panel, moves in zip(panels, (False, True), strict=True):
        for epsilon, style in zip(radii, ("-", "--"), strict=True):
            objective = adversarial(world, epsilon, moves_robust=moves)
            panel.plot(
                clean,
                100 * _accuracies(objective, w),
                color=_GREY,
                linestyle=style,
                label=f"attack of $\\epsilon = {epsilon / world.eta:.1f}\\,\\eta$",
            )
            for name, weight, colour, marker in marks:
                at = np.array([weight])
                panel.plot(
                    100 * _accuracies(natural(world), at),
                    100 * _accuracies(objective, at),
                    color=colour,
                    marker=marker,
                    **_MARK,
                    label=name if style == "-" else None,
                )
        ends = [
            100 * _accuracies(natural(world), np.array([end]))
            for end in (start / 2, 1e9)
        ]
        panel.plot([], [])
        panel.annotate(
            "$w_1 = w^*/2$", (ends[0][0], panel.get_ylim()[0]), fontsize=_TEXT - 1.5
        )
        panel.annotate(
            "$w_1 = \\infty$",
            (ends[1][0], panel.get_ylim()[1]),
            fontsize=_TEXT - 1.5,
            ha="left",
            va="top",
        )
        which = "all features attacked" if moves else "$x_1$ left alone"
        panel.set_title(which, fontsize=_TEXT, loc="left")
        panel.set_xlabel("natural accuracy in %", fontsize=_TEXT)
        panel.set_ylabel("accuracy under attack in %", fontsize=_TEXT)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize=_TEXT - 1,
        frameon=False,
    )
    _title(
        figure,
        f"What robustness costs: every $w_1$ from $w^*/2$ to $\\infty$, {_name(world)}",
    )
    return figure


def _accuracies(objective: Callable[..., Any], w: np.ndarray) -> np.ndarray:
    """Accuracies of many weights in one world."""
    return -np.expm1(objective(w).log_loss)


def _here(points: Points, world: World) -> Points:
    """The points of one world."""
    same = (points.p == world.p) & (points.eta == world.eta) & (points.d == world.d)
    return points.where(same)


def _cycle(count: int) -> list[str]:
    colours = (_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY)
    return [colours[i % len(colours)] for i in range(count)]


def _name(world: World) -> str:
    return f"p = {world.p:g}, $\\eta$ = {world.eta:g}, d = {world.d:g}"


def _panels(count: int, size: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in panels:
        panel.tick_params(labelsize=_TEXT - 1)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _title(figure: "Figure", text: str) -> None:
    figure.suptitle(text, fontsize=_TEXT + 1, x=0.01, ha="left")
