"""The theory's outcome for people and programs: tables, JSON, Markdown."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from samrobust.studies.theory.experiment import Estimate
from samrobust.studies.theory.study import Grid, Points, Study
from samrobust.studies.theory.training import TrainingEffort
from samrobust.studies.theory.verdicts import Verdict
from samrobust.system.provenance import provenance

__all__ = ["Findings", "to_json", "to_markdown", "to_rich"]

_WORDS = ("statement", "source", "verdict", "trained")  # columns of words
_Row: TypeAlias = tuple[dict[str, str], bool]  # cells by column; whether it stands out


class Findings(NamedTuple):
    """The findings of `samrobust theory`, all of them.

    Attributes:
      grid, effort: what was asked for.
      study: every point.
      verdicts: a line a statement.
      estimates: of the trained world.
      seconds: it took.
      command: the command line.
    """

    grid: Grid
    effort: TrainingEffort
    study: Study
    verdicts: Sequence[Verdict]
    estimates: Sequence[Estimate]
    seconds: float
    command: str


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
        "provenance": {
            **provenance(),
            "command": report.command,
            "seconds": round(report.seconds, 1),
        },
    }


def to_rich(report: Findings) -> Group:
    """Returns the tables and notes for a Rich console."""
    parts: list[Table | Text] = []
    for title, rows in _tables(report).items():
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, title=title)
        table.title_justify, table.title_style = "left", "bold"
        table.padding = (0, 1, 0, 0)
        for number, name in enumerate(rows[0][0]):
            side = "left" if name in _WORDS else "right"
            table.add_column(name, justify=side, overflow="fold", no_wrap=number > 2)
        for cells, stands_out in rows:
            style = "yellow" if stands_out else ""
            table.add_row(*map(Text, cells.values()), style=style)
        parts += [table, Text()]
    return Group(*parts, Text("\n".join(_notes(report)), style="dim"))


def to_markdown(report: Findings) -> str:
    """Returns the same in Markdown."""
    blocks = []
    for title, rows in _tables(report).items():
        header = list(rows[0][0])
        ruler = [":---" if name in _WORDS else "---:" for name in header]
        lines = [header, ruler, *(cells.values() for cells, _ in rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        # `*` and `_` would be read as emphasis.
        table = table.replace("*", "\\*").replace("_", "\\_")
        blocks.append(f"**{title}**\n\n{table}")
    return "\n\n".join([*blocks, *_notes(report)]) + "\n"


def _tables(report: Findings) -> dict[str, list[_Row]]:
    """Returns the rows by the tables' titles."""
    verdicts = [(_verdict_row(v), v.holds is False) for v in report.verdicts]
    tables = {"Section 4 against direct minimization": verdicts}
    if report.estimates:
        world = report.grid.world
        world = f"p = {world.p:g}, eta = {world.eta:g}, d = {world.d:g}"
        trained = [(_trained_row(e), e.agrees == "no") for e in report.estimates]
        tables[f"Trained with the logistic loss: {world}"] = trained
    return tables


def _verdict_row(verdict: Verdict) -> dict[str, str]:
    deviation, error = verdict.deviation, verdict.error
    return {
        "statement": verdict.statement,
        "source": verdict.source,
        "verdict": verdict.verdict,
        "points": str(verdict.points),
        "deviation": "-" if deviation is None else f"{deviation:.1e}",
        "error": "-" if error is None else f"{error:.1e}",
    }


def _trained_row(estimate: Estimate) -> dict[str, str]:
    def shown(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.4f}" if np.isfinite(value) else "x_1 alone"

    sign = "+" if estimate.quantity == "shift" else ""
    return {
        "trained": estimate.method,
        "radius": f"{estimate.radius:g}",
        "weight": f"{estimate.mean:{sign}.4f}",
        "95 % band": f"±{estimate.half_width:.4f}",
        "population": shown(estimate.population),
        "0-1 theory": shown(estimate.zero_one),
        "agrees": estimate.agrees or "-",
    }


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
                f"AT is not trained at {', '.join(left)}: beyond 0.6 eta weights grow "
                "without bound."
            )
        notes.append(
            f"trained: {effort.seeds} seeds of {effort.samples:,} fresh samples, batch "
            f"{effort.batch_size:,}; population: what the logistic loss leads to (for "
            "SAM on w_1, SAM's own steps on such batches); agrees: within one and a "
            "half bands; unresolved: as 0 is, so that no effect would agree too. With "
            "SAM weights are differences to training without it. All rows share their "
            "samples."
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
