"""The picture of w_1 against the radii of AT and SAM: theory, minimum and training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from samrobust.theory import closed_forms as forms
from samrobust.theory.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    HOLLOW,
    MARK,
    ORANGE,
    RED,
    TEXT,
    Content,
    make_panels,
    name_of,
    of_world,
    set_title,
)
from samrobust.theory.experiment import Estimate
from samrobust.theory.logistic import SamLogistic, logistic_weight

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["robust_weight"]


def robust_weight(content: Content) -> "Figure":
    """w_1 against the radius: theory, direct minimum and training."""
    figure, (attack, sam) = make_panels(2, (8.6, 3.9))
    _draw_attack(attack, content)
    _draw_sam(sam, content)
    set_title(figure, f"The robust weight in a world of {name_of(content.world)}")
    return figure


def _draw_attack(panel: "Axes", content: Content) -> None:
    world = content.world
    eta = float(world.eta)
    radii = np.linspace(0.002, 0.72, 120) * min(eta, 1.0)
    whole = forms.adversarial_weight_all_features(world, radii)
    own = [logistic_weight(world, e, moves_robust=True) for e in radii]
    panel.plot(
        radii,
        forms.adversarial_weight(world, radii),
        color=BLUE,
        label="Theorem 4.2: $x_1$ left alone (0-1 and logistic loss)",
    )
    panel.plot(
        radii,
        np.where(np.isinf(whole), np.nan, whole),
        color=RED,
        linestyle="--",
        label="eq. (9) as written, 0-1 loss: our root",
    )
    panel.plot(radii, own, color=GREEN, linestyle="-.", label="eq. (9), logistic loss")
    for points, colour in (
        (content.study.attack, BLUE),
        (content.study.attack_all, RED),
    ):
        here = of_world(points, world)
        here = here.where(here.radius <= radii[-1])
        panel.plot(here.radius, here.w, color=colour, **HOLLOW)
    if np.isinf(whole).any():
        edge = float(radii[np.isinf(whole)][0])
        panel.axvline(edge, ymax=0.66, color=RED, linewidth=0.7, linestyle=":")
        panel.text(
            edge,
            panel.get_ylim()[0],
            " beyond: $x_1$ alone,\n $w_1 = \\infty$ (0-1, eq. 9)",
            color=RED,
            fontsize=TEXT - 1.5,
            va="bottom",
        )
    for method, colour, marker in (
        ("at", BLUE, "s"),
        ("at all features", GREEN, "D"),
    ):
        _bands(panel, content.estimates, method, colour, marker)
    panel.set_xlabel("radius of the attack $\\epsilon_{AT}$", fontsize=TEXT)
    panel.set_ylabel("robust weight $w_1$ (others: 1)", fontsize=TEXT)
    panel.plot([], [], color=GREY, **HOLLOW, label="direct minimum, 0-1 loss")
    panel.plot([], [], color=GREY, marker="s", **MARK, label="trained, 95 % band")
    panel.legend(fontsize=TEXT - 1.5, frameon=False, loc="upper left")


def _draw_sam(panel: "Axes", content: Content) -> None:
    world = content.world
    start = float(forms.standard_weight(world))
    here = of_world(content.study.sam, world)
    rho = np.geomspace(0.7 * here.radius.min(), 1.4 * here.radius.max(), 60)
    logistic = SamLogistic(world)
    curves = (
        (forms.sam_weight_printed(world, rho), ORANGE, "--", "Theorem 4.4 as printed"),
        (start + rho, GREY, ":", "bound: $\\rho$"),
        (forms.sam_weight(world, rho), RED, "-", "exact, 0-1 loss: our fixed point"),
        (
            forms.sam_weight_corrected(world, rho),
            BLACK,
            (0, (1, 2)),
            "Theorem 4.4 corrected: $w^* \\rho^2/(3d)$",
        ),
        (
            np.array([logistic.minimax(r) for r in rho]),
            GREEN,
            "-.",
            "eq. (11), logistic loss",
        ),
        (
            np.array([logistic.stationary(r, content.batch_size) for r in rho]),
            BLUE,
            (0, (5, 1)),
            f"SAM's steps, logistic loss, batch {content.batch_size}",
        ),
    )
    for values, colour, style, label in curves:
        panel.plot(rho, values - start, color=colour, linestyle=style, label=label)
    panel.plot(
        here.radius,
        here.w - start,
        color=RED,
        **HOLLOW,
        label="direct minimum, 0-1 loss",
    )
    _bands(panel, content.estimates, "sam", BLUE, "s", "trained, 95 % band")
    panel.set_xscale("log")
    panel.set_yscale("log")
    lowest = logistic.minimax(float(rho[0])) - start
    panel.set_ylim(0.3 * lowest, 4 * (rho[-1] + start * rho[-1] ** 2))
    panel.set_xlabel("radius of SAM $\\rho$ on $w_1$", fontsize=TEXT)
    panel.set_ylabel("$w_1 - w^*$", fontsize=TEXT)
    panel.legend(fontsize=TEXT - 1.5, frameon=False, loc="upper left")


def _bands(
    panel: "Axes",
    estimates: Sequence[Estimate],
    method: str,
    colour: str,
    marker: str,
    label: str | None = None,
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
            label=label,
            **MARK,
        )
