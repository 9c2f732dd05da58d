"""The theory's outcome for people and programs: tables, JSON, Markdown."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.text import Text

from samrobust.studies.theory.experiment import Estimate
from samrobust.studies.theory.study import Grid, Points, Study
from samrobust.studies.theory.training import TrainingEffort
from samrobust.studies.theory.verdicts import Verdict
from samrobust.studies.theory.world import World
from samrobust.system.provenance import provenance
from samrobust.system.tables import Sheet, TextTable

__all__ = ["Findings", "to_json", "to_sheet"]


class Findings(NamedTuple):
    """The findings of `samrobust theory`, all of them.

    Attributes:
      grid, effort: what was asked for.
      study: every point.
      verdicts: a line a statement.
      estimates: of the trained world.
      seconds: it took.
    """

    grid: Grid
    effort: TrainingEffort
    study: Study
    verdicts: Sequence[Verdict]
    estimates: Sequence[Estimate]
    seconds: float


def to_json(report: Findings) -> dict[str, Any]:
    """Returns the whole report; what is infinite or unknown is None."""
    return {
        "grid": dataclasses.asdict(report.grid),
        "effort": dataclasses.asdict(report.effort),
        "verdicts": [dataclasses.asdict(verdict) for verdict in report.verdicts],
        "trained": [
            {
                **dataclasses.asdict(estimate),
                "zero_one": _finite(estimate.zero_one),
                "agrees": estimate.agrees,
            }
            for estimate in report.estimates
        ],
        "points": {
            name: _rows(points) for name, points in report.study._asdict().items()
        },
        "provenance": provenance() | {"seconds": round(report.seconds, 1)},
    }


def to_sheet(report: Findings) -> Sheet:
    """Returns the tables and notes, for a console and as Markdown."""
    tables = [_verdicts(report.verdicts)]
    if report.estimates:
        tables.append(_trained(report.estimates, report.grid.world))
    return Sheet(tables, _notes(report))


def _verdicts(verdicts: Sequence[Verdict]) -> TextTable:
    header = ("statement", "source", "verdict", "points", "deviation", "error")
    rows = []
    for found in verdicts:
        numbers = [
            "-" if number is None else f"{number:.1e}"
            for number in (found.deviation, found.error)
        ]
        words = (found.statement, found.source, found.verdict, str(found.points))
        rows.append(_row(*words, *numbers, stands_out=found.holds is False))
    return TextTable(header, rows, "Section 4 against direct minimization", words=3)


def _trained(estimates: Sequence[Estimate], world: World) -> TextTable:
    def shown(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.4f}" if np.isfinite(value) else "x_1 alone"

    title = "Trained with the logistic loss: "
    title += f"p = {world.p:g}, eta = {world.eta:g}, d = {world.d:g}"
    header = ("trained", "radius", "weight", "95 % band", "population", "0-1 theory")
    rows = []
    for found in estimates:
        sign = "+" if found.quantity == "shift" else ""
        rows.append(
            _row(
                *(found.method, f"{found.radius:g}", f"{found.mean:{sign}.4f}"),
                *(f"±{found.half_width:.4f}", shown(found.population)),
                *(shown(found.zero_one), found.agrees or "-"),
                stands_out=found.agrees in ("no", "not converged"),
            )
        )
    return TextTable((*header, "agrees"), rows, title)


def _row(*cells: str, stands_out: bool) -> list[Text]:
    return [Text(cell, "yellow" if stands_out else "") for cell in cells]


def _notes(report: Findings) -> list[str]:
    notes = [
        "deviation: the largest relative one, of w, or of the shift w - w* for SAM; "
        "error: that of the direct minimum, in the same unit.",
    ]
    if undecided := max(verdict.undecided for verdict in report.verdicts):
        notes.append(
            f"Up to {undecided} more points of a row are left out: the loss is so flat "
            "there that float64 cannot tell."
        )
    if report.estimates:
        effort = report.effort
        trained = {e.radius for e in report.estimates if e.method == "at"}
        radii = report.grid.attack_radii(float(report.grid.world.eta))
        if left := [f"{radius:g}" for radius in radii if radius not in trained]:
            notes.append(
                f"AT is not trained at {', '.join(left)}, beyond 0.6 min(eta, 1): "
                "near eta weights grow without bound, and from 1 on an attack can "
                "change the sign of x_1."
            )
        notes.append(
            f"trained: {effort.seeds} seeds of {effort.samples:,} fresh samples, batch "
            f"{effort.batch_size:,}; population: what the logistic loss leads to (for "
            "SAM on w_1, SAM's own steps on such batches); agrees: within one and a "
            "half bands; unresolved: these also contain 0, so a training without any "
            "effect would pass as well. With SAM weights are differences to training "
            "without it. All rows share their samples."
        )
    if any(estimate.agrees == "not converged" for estimate in report.estimates):
        notes.append(
            "not converged: training on the same samples that starts near the Bayes "
            "classifier ends elsewhere by more than half a band, or may do so and does "
            "not agree; such a weight tells how far training came, not where it leads. "
            "More --samples may help."
        )
    return notes


def _rows(points: Points) -> list[dict[str, float | None]]:
    """Returns a dictionary for each point."""
    columns = vars(points)
    return [
        {name: _finite(float(column[number])) for name, column in columns.items()}
        for number in range(len(points))
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
