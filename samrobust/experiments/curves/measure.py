"""The accuracy of a run over a grid of radii, and what several seeds make of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from samrobust import attacks
from samrobust.attacks.losses import LOSSES
from samrobust.checks import check, check_choice
from samrobust.data import Split
from samrobust.evaluation import Evaluator, OnBatch, make_evaluator
from samrobust.experiments import building
from samrobust.types import Array, PyTree

__all__ = ["Curve", "CurveSettings", "curves_of", "make_curve_evaluator", "measure_run"]

_NORMS = ("linf", "l2")


@dataclasses.dataclass(frozen=True)
class CurveSettings:
    """Choice of how curves are measured.

    Attributes:
      radii: by norm, in 1/255, rising and > 0; radius 0 is natural accuracy.
      num_steps: of PGD; a step is a quarter of the radius, any iterate counts.
      loss: `cross_entropy` or `margin`.
      num_examples: images of the split, evenly spaced.
    """

    radii: Mapping[str, tuple[float, ...]]
    num_steps: int = 20
    loss: str = "cross_entropy"
    num_examples: int = 256

    def __post_init__(self):
        check(bool(self.radii), "radii of at least one norm", radii=self.radii)
        check_choice(tuple(LOSSES), loss=self.loss)
        check(self.num_steps >= 1, "num_steps >= 1", num_steps=self.num_steps)
        check(self.num_examples >= 1, "num_examples >= 1", examples=self.num_examples)
        for norm, radii in self.radii.items():
            check_choice(_NORMS, norm=norm)
            check(
                len(radii) > 0 and bool(np.all(np.diff([0.0, *radii]) > 0)),
                "rising radii > 0",
                norm=norm,
                radii=radii,
            )


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
            columns[f"{norm} {radius:g}/255"] = attacks.pgd(
                building.make_ball(norm, radius),
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
        names = ["natural", *(f"{norm} {radius:g}/255" for radius in radii)]
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
