"""The theory in four pictures."""

import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from samrobust.reporting.files import write_figure
from samrobust.theory import closed_forms as forms
from samrobust.theory.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    HOLLOW,
    MARK,
    ORANGE,
    PINK,
    RED,
    SKY,
    TEXT,
    Content,
    make_panels,
    name_of,
    set_title,
)
from samrobust.theory.experiment import Estimate
from samrobust.theory.grid import Study
from samrobust.theory.population import adversarial, natural
from samrobust.theory.weight_picture import robust_weight
from samrobust.theory.world import World

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_all"]


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
    content = Content(world, study, estimates, batch_size)
    pictures: dict[str, Callable[[Content], Figure]] = {
        "robust_weight": robust_weight,
        "equal_weight": _equal_weight,
        "all_weights": _all_weights,
        "trade_off": _trade_off,
    }
    paths = []
    for name, picture in pictures.items():
        paths += write_figure(picture(content), folder, name)
    return tuple(paths)


def _equal_weight(content: Content) -> "Figure":
    """The radii of AT and SAM that give the same w_1."""
    figure, (panel,) = make_panels(1, (5.2, 4.2))
    p, eta = float(content.world.p), float(content.world.eta)
    radii = content.study.sam.radius
    rho = np.geomspace(0.5 * radii.min(), 7 * radii.max(), 120)
    sizes = sorted(set(content.study.sam.d))
    styles = zip(_cycle(len(sizes)), itertools.cycle("os^Dv"), strict=False)
    lowest = eta
    for d, (colour, marker) in zip(sizes, styles, strict=True):
        world = World(p, eta, d)
        exact = forms.equal_attack_radius(world, forms.sam_weight(world, rho))
        lowest = min(lowest, float(exact[0]))
        panel.plot(rho, exact, color=colour)
        corrected = forms.equal_attack_radius_corrected(world, rho)
        panel.plot(rho, corrected, color=colour, linestyle=(0, (1, 2)))
        points = content.study.sam
        same = points.where((points.d == d) & (points.p == p) & (points.eta == eta))
        same = same.resolved()
        style = {**HOLLOW, "marker": marker, "color": colour}
        panel.plot(same.radius, same.attack_radius, **style)
        style["linestyle"] = "-"
        panel.plot([], [], **style, label=f"exact and direct minima, $d = {d:g}$")
    panel.plot(
        rho,
        forms.equal_attack_radius_printed(content.world, rho),
        color=BLACK,
        linestyle="--",
        label="Theorem 4.5 as printed, every $d$",
    )
    panel.plot([], [], color=GREY, linestyle=(0, (1, 2)), label="Theorem 4.5 corrected")
    panel.plot(rho, rho, color=GREY, linewidth=0.8, label="equal radii")
    panel.axhline(eta, color=GREY, linewidth=0.8, linestyle=":")
    panel.text(
        rho[-1], eta * 1.2, "$\\epsilon_{AT} = \\eta$", fontsize=TEXT - 1, ha="right"
    )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_ylim(lowest / 30, 20 * eta)
    panel.set_xlabel("$\\rho = \\epsilon_{SAM}$ on $w_1$", fontsize=TEXT)
    panel.set_ylabel("$\\epsilon_{AT}$ with the same $w_1$", fontsize=TEXT)
    panel.legend(fontsize=TEXT - 1.5, frameon=False, loc="lower right")
    set_title(
        figure, f"Radii of SAM and AT of equal $w_1$ (p = {p:g}, $\\eta$ = {eta:g})"
    )
    return figure


def _all_weights(content: Content) -> "Figure":
    """Where SAM on all weights raises the robust one."""
    figure, (panel,) = make_panels(1, (5.2, 4.0))
    points = content.study.sam_all.resolved()
    up = points.w > points.standard
    d = np.geomspace(0.7, 2000, 200)
    edge = np.sqrt(2 * d)
    low, high = 0.3, 400
    panel.fill_betweenx(d, edge, high, color=ORANGE, alpha=0.25, linewidth=0)
    panel.fill_betweenx(d, low, edge, color=SKY, alpha=0.25, linewidth=0)
    panel.plot(edge, d, color=BLACK, label="$w^{*2} = 2d$: $K = 0$")
    for mask, colour, marker, word in (
        (up, RED, "^", "raises"),
        (~up, BLUE, "v", "lowers"),
    ):
        panel.plot(
            points.standard[mask],
            points.d[mask],
            color=colour,
            marker=marker,
            **MARK,
            label=f"direct minimum: SAM {word} $w_1$",
        )
    panel.text(60, 1.5, "$K > 0$", fontsize=TEXT + 1, color=RED)
    panel.text(0.5, 500, "$K < 0$", fontsize=TEXT + 1, color=BLUE)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(low, high)
    panel.set_ylim(d[0], d[-1])
    panel.set_xlabel("$w^*$, the robust weight without SAM", fontsize=TEXT)
    panel.set_ylabel("number of non-robust features $d$", fontsize=TEXT)
    figure.legend(
        loc="outside lower center",
        fontsize=TEXT - 1,
        frameon=False,
        ncols=3,
        columnspacing=1,
        handletextpad=0.5,
    )
    set_title(figure, "SAM on all weights: the sign of its effect on $w_1$")
    return figure


def _trade_off(content: Content) -> "Figure":
    """Natural and robust accuracy of all classifiers of the model class."""
    figure, panels = make_panels(2, (8.6, 3.7))
    world = content.world
    radii = np.array([0.3, 0.6]) * min(float(world.eta), 1.0)
    root = np.sqrt(float(world.d))
    start = float(forms.standard_weight(world))
    w = root * np.tan(np.linspace(np.arctan(start / root / 2), np.pi / 2 - 1e-3, 400))
    clean = 100 * _accuracies(natural(world), w)
    largest = float(np.max(content.study.sam.radius))
    marks = (
        ("ST", start, BLACK, "o"),
        (
            f"SAM, $\\rho$ = {largest:g} on $w_1$",
            float(forms.sam_weight(world, largest)),
            RED,
            "^",
        ),
        (
            "AT, $\\epsilon = 0.3\\,\\eta$",
            float(forms.adversarial_weight(world, radii[0])),
            SKY,
            "s",
        ),
        (
            "AT, $\\epsilon = 0.6\\,\\eta$",
            float(forms.adversarial_weight(world, radii[1])),
            BLUE,
            "D",
        ),
    )
    for panel, moves in zip(panels, (False, True), strict=True):
        for epsilon, style in zip(radii, ("-", "--"), strict=True):
            objective = adversarial(world, epsilon, moves_robust=moves)
            panel.plot(
                clean,
                100 * _accuracies(objective, w),
                color=GREY,
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
                    **MARK,
                    label=name if style == "-" else None,
                )
        ends = [
            100 * _accuracies(natural(world), np.array([end]))
            for end in (start / 2, 1e9)
        ]
        panel.annotate(
            "$w_1 = w^*/2$", (ends[0][0], panel.get_ylim()[0]), fontsize=TEXT - 1.5
        )
        panel.annotate(
            "$w_1 = \\infty$",
            (ends[1][0], panel.get_ylim()[1]),
            fontsize=TEXT - 1.5,
            ha="left",
            va="top",
        )
        which = "all features attacked" if moves else "$x_1$ left alone"
        panel.set_title(which, fontsize=TEXT, loc="left")
        panel.set_xlabel("natural accuracy in %", fontsize=TEXT)
        panel.set_ylabel("accuracy under attack in %", fontsize=TEXT)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize=TEXT - 1,
        frameon=False,
    )
    set_title(
        figure,
        f"What robustness costs: $w_1$ from $w^*/2$ to $\\infty$, {name_of(world)}",
    )
    return figure


def _accuracies(objective: Callable[..., Any], w: np.ndarray) -> np.ndarray:
    """Accuracies of many weights in one world."""
    return -np.expm1(objective(w).log_loss)


def _cycle(count: int) -> list[str]:
    colours = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
    return [colours[i % len(colours)] for i in range(count)]
