"""The theory's outcome for people and programs: tables, JSON, Markdown."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from samrobust.provenance import provenance
from samrobust.theory.experiment import Effort, Estimate
from samrobust.theory.grid import Grid, Study
from samrobust.theory.verdicts import Verdict

__all__ = ["Report", "to_json", "to_markdown", "to_rich"]

_Row: TypeAlias = tuple[tuple[str, ...], str]  # cells, and a style
_Table: TypeAlias = tuple[str, tuple[str, ...], list[_Row]]  # title, header, rows
_WORDS = ("statement", "source", "verdict", "trained")  # columns of words
_HEADER = ("statement", "source", "verdict", "points", "deviation", "error")
_TRAINED = (
    "trained",
    "radius",
    "weight",
    "95 % band",
    "population",
    "0-1 theory",
    "agrees",
)


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that `samrobust theory` found.

    Attributes:
      grid, effort: what was asked for.
      study: every point.
      verdicts: a line a statement.
      estimates: of the trained world.
      seconds: it took.
      command: the command line.
    """

    grid: Grid
    effort: Effort
    study: Study
    verdicts: Sequence[Verdict]
    estimates: Sequence[Estimate]
    seconds: float
    command: str


def to_json(report: Report) -> dict[str, Any]:
    """The whole report; what is infinite or unknown is None."""
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
            field.name: getattr(report.study, field.name).rows()
            for field in dataclasses.fields(report.study)
        },
        "provenance": {
            **provenance(),
            "command": report.command,
            "seconds": round(report.seconds, 1),
        },
    }


def to_rich(report: Report) -> Group:
    """The tables and notes for a Rich console."""
    parts: list[Any] = []
    for title, header, rows in _tables(report):
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, title=title)
        table.title_justify, table.title_style = "left", "bold"
        table.padding = (0, 1, 0, 0)
        for number, name in enumerate(header):
            side = "left" if name in _WORDS else "right"
            table.add_column(name, justify=side, overflow="fold", no_wrap=number > 2)
        for row, style in rows:
            table.add_row(*map(Text, row), style=style)
        parts += [table, Text()]
    return Group(*parts, Text("\n".join(_notes(report)), style="dim"))


def to_markdown(report: Report) -> str:
    """The same in Markdown."""
    blocks = []
    for title, header, rows in _tables(report):
        lines = [f"**{title}**", "", _line(header)]
        lines.append(_line([":---" if name in _WORDS else "---:" for name in header]))
        blocks.append("\n".join([*lines, *(_line(row) for row, _ in rows)]))
    return "\n\n".join([*blocks, *_notes(report)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    # `*` and `_` would be read as emphasis.
    escaped = [
        c.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_") for c in cells
    ]
    return f"| {' | '.join(escaped)} |"


def _tables(
    report: Report,
) -> list[_Table]:
    """(title, header, rows of cells with a style) of each table."""
    grid = report.grid
    verdicts: list[_Row] = [
        (
            (
                verdict.statement,
                verdict.source,
                verdict.verdict,
                str(verdict.points),
                _digits(verdict.deviation),
                _digits(verdict.error),
            ),
            "yellow" if verdict.holds is False else "",
        )
        for verdict in report.verdicts
    ]
    tables: list[_Table] = [
        ("Section 4 against direct minimisation", _HEADER, verdicts)
    ]
    if report.estimates:
        world = f"p = {grid.p[0]:g}, eta = {grid.eta[0]:g}, d = {grid.d[0]:g}"
        title = f"Trained with the logistic loss: {world}"
        tables.append((title, _TRAINED, [_trained_row(e) for e in report.estimates]))
    return tables


def _trained_row(estimate: Estimate) -> _Row:
    def shown(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.4f}" if np.isfinite(value) else "x_1 alone"

    cells = (
        estimate.method,
        f"{estimate.radius:g}",
        format(estimate.mean, "+.4f" if estimate.quantity == "shift" else ".4f"),
        f"±{estimate.half_width:.4f}",
        shown(estimate.population),
        shown(estimate.zero_one),
        estimate.agrees or "-",
    )
    return cells, "yellow" if estimate.agrees == "no" else ""


def _notes(report: Report) -> list[str]:
    undecided = max(verdict.undecided for verdict in report.verdicts)
    notes = [
        "deviation: the largest relative one, of w, or of the shift w - w* for SAM; "
        "error: that of the direct minimum, in the same unit.",
    ]
    if undecided:
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


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
