"""Accuracy against the radius of the attack, for all runs of a table.

Measured over a grid of radii, summed up over seeds, and drawn: a panel a norm, a line a
method, a band over its seeds. `samrobust curves` does it all; docs/sanity.md says how
to read the picture.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import linen as nn

from samrobust import attacks
from samrobust.attacks.losses import LOSSES
from samrobust.checks import NORMS, check, check_choice, count
from samrobust.data import Split
from samrobust.evaluation import Evaluator, OnBatch, make_evaluator
from samrobust.experiments.reporting import pictures
from samrobust.experiments.reporting.names import column_of
from samrobust.training.adversaries.radii import make_ball
from samrobust.types import Array, PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Curve",
    "CurveSettings",
    "curves_of",
    "draw_curves",
    "make_curve_evaluator",
    "measure_run",
]


@dataclasses.dataclass(frozen=True)
class CurveSettings:
    """Choice of how curves are measured.

    Attributes:
      radii: by norm, in 1/255, rising and > 0; radius 0 is natural accuracy.
      num_steps: of PGD; a step is a quarter of the radius, any iterate counts.
      loss: `cross_entropy` or `margin`.
      num_examples: images of the split, evenly spread.
    """

    radii: Mapping[str, tuple[float, ...]]
    num_steps: int = 20
    loss: str = "cross_entropy"
    num_examples: int = 256

    def __post_init__(self):
        check(bool(self.radii), "radii of at least one norm", radii=self.radii)
        check_choice(tuple(LOSSES), loss=self.loss)
        count(num_steps=self.num_steps, num_examples=self.num_examples)
        for norm, radii in self.radii.items():
            check_choice(NORMS, norm=norm)
            rising = len(radii) > 0 and bool(np.all(np.diff([0.0, *radii]) > 0))
            check(rising, "rising radii > 0", norm=norm, radii=radii)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Line of accuracy in percent against the radius, over seeds.

    Attributes:
      row, label: of the table's row.
      norm: of the ball.
      radii: in 1/255, from 0.
      mean, std: over seeds; std is 0 with one.
      seeds: how many.
    """

    row: str
    label: str
    norm: str
    radii: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seeds: int


def make_curve_evaluator(
    model: nn.Module, settings: CurveSettings, *, batch_size: int
) -> Evaluator:
    """Builds the evaluator of all radii at once, for networks of one shape."""
    columns: dict[str, Any] = {"natural": attacks.identity}
    for norm, radii in settings.radii.items():
        for radius in radii:
            columns[column_of(norm, radius)] = attacks.pgd(
                make_ball(norm, radius),
                step_size=radius / 255 / 4,
                num_steps=settings.num_steps,
                loss=LOSSES[settings.loss],
                judge="any",
            )
    return make_evaluator(model, columns, batch_size=batch_size)


def measure_run(
    evaluate: Evaluator,
    variables: PyTree,
    split: Split,
    settings: CurveSettings,
    *,
    key: Array,
    on_batch: OnBatch,
) -> dict[str, list[float]]:
    """Returns the accuracies in percent of a network, by norm, from radius 0 on.

    **Guarantees.** Curves do not rise: what breaks in a ball counts as broken in every
    larger one, which holds it.

    Args:
      evaluate: from `make_curve_evaluator` with the same settings.
      variables: of the network.
      split: the images.
      settings: see there.
      key: of the random starts.
      on_batch: told of progress.
    """
    correct = evaluate(variables, split, key, on_batch=on_batch).correct
    curves = {}
    for norm, radii in settings.radii.items():
        names = ["natural", *(column_of(norm, radius) for radius in radii)]
        standing = np.logical_and.accumulate([correct[name] for name in names])
        curves[norm] = [100 * float(share) for share in standing.mean(axis=1)]
    return curves


def curves_of(
    runs: Sequence[tuple[str, str, Mapping[str, Sequence[float]]]],
    settings: CurveSettings,
) -> list[Curve]:
    """Returns the curves of all rows, in order.

    Args:
      runs: (row, label, outcome of `measure_run`) of every run.
      settings: as they were measured.
    """
    curves = []
    labels = {row: label for row, label, _ in runs}
    for norm, radii in settings.radii.items():
        for row, label in labels.items():
            values = np.array([found[norm] for name, _, found in runs if name == row])
            seeds = len(values)
            std = values.std(axis=0, ddof=1) if seeds > 1 else 0 * values[0]
            mean = tuple(values.mean(axis=0).tolist())
            grid = (0.0, *radii)
            curves.append(
                Curve(row, label, norm, grid, mean, tuple(std.tolist()), seeds)
            )
    return curves


def draw_curves(curves: Sequence[Curve], title: str) -> "Figure":
    """Draws accuracy in percent against the radius, with a title above all panels."""
    norms = list(dict.fromkeys(curve.norm for curve in curves))
    size = (1.0 + 3.6 * len(norms), 4.1)
    figure, panels = pictures.make_panels(len(norms), size, title, 45 * len(norms) + 10)
    looks = pictures.row_looks(curve.row for curve in curves)
    for panel, norm in zip(panels, norms, strict=True):
        for curve in (c for c in curves if c.norm == norm):
            look, label = looks[curve.row], pictures.in_symbols(curve.label)
            mean, std = np.array(curve.mean), np.array(curve.std)
            panel.plot(curve.radii, mean, **look, label=label)
            band = np.clip([mean - std, mean + std], 0, 100)
            color = look["color"]
            panel.fill_between(curve.radii, *band, color=color, alpha=0.15, linewidth=0)
        attack = f"{pictures.in_symbols(norm)} attack"
        panel.set_title(attack, fontsize=pictures.TEXT + 1)
        panel.set_xlabel("radius ε in 1/255", fontsize=pictures.TEXT)
        panel.set_xlim(left=0)
        panel.set_ylim(-1, 101)
        panel.tick_params(labelsize=pictures.TEXT - 1)
        panel.grid(axis="y", color=pictures.PALE, linewidth=0.6)
    panels[0].set_ylabel("accuracy in %", fontsize=pictures.TEXT)
    what = "mean and band of one standard deviation"
    over = pictures.over_seeds(what, (curve.seeds for curve in curves))
    pictures.add_legend(figure, panels[0].get_lines(), over, columns=4)
    return figure
