"""A table as Markdown for readers, as CSV for spreadsheets, as JSON for programs."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict

from samrobust.experiments.reporting.notes import legend, notes, sampling_error, signed
from samrobust.experiments.reporting.table import Cell, Difference, Row, Table

__all__ = ["to_csv", "to_json", "to_markdown"]


def to_markdown(table: Table) -> str:
    """Returns the table, its notes and the differences to ST as GitHub Markdown.

    Cells are `97.4 ±0.3 (94.6)`: mean, standard deviation, the paper's number; the
    best mean of each column is bold, and a row without a run has `-`.
    """
    with_costs = any(row.cost is not None for row in table.rows)
    header = ["method", "seeds", *table.columns, *(["cost"] if with_costs else [])]
    body = []
    for row in table.rows:
        cells = [_markdown_cell(table, row, column) for column in table.columns]
        numbers = [str(len(row.seeds)), *cells, row.shown_cost()]
        body.append([row.label, *numbers][: len(header)])
    blocks = [f"### {_one_line(table.title)}", _markdown_table(header, body)]
    blocks += [table.caption] if table.caption else []
    blocks += ["\n".join(f"* {note}" for note in (legend(table), *notes(table)))]
    return "\n\n".join(blocks + _markdown_differences(table)) + "\n"


def to_csv(table: Table) -> str:
    """Returns the table in tidy form, a line for each row and column.

    The fields are row, label, column, n, mean, std and paper; what is not known is
    empty, and n counts the seeds.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "label", "column", "n", "mean", "std", "paper"])
    for row in table.rows:
        for column in table.columns:
            cell = row.cells[column]
            numbers = (len(cell.values), cell.mean, cell.std, cell.paper)
            writer.writerow([row.name, row.label, column, *numbers])
    return text.getvalue()


def to_json(table: Table) -> str:
    """Returns everything the table holds, every seed's value and provenance too.

    The keys are those of `Table`, `Row` and `Cell`, with `notes`, `missing` and
    `sampling_error` beside them. What is not known is null.
    """
    content = {
        "title": table.title,
        "caption": table.caption,
        "notes": notes(table),
        "dataset": table.dataset,
        "num_test": table.num_test,
        "sampling_error": sampling_error(table),
        "columns": table.columns,
        "rows": [_json_row(row) for row in table.rows],
        "missing": [row.name for row in table.missing],
        "runs": table.runs,
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _json_row(row: Row) -> dict[str, object]:
    """Returns a row as JSON's types."""
    cells = {}
    for column, cell in row.cells.items():
        cells[column] = asdict(cell)
        if cell.difference:
            cells[column]["difference"]["significant"] = cell.difference.significant
    return {
        "name": row.name,
        "label": row.label,
        "family": row.family,
        "n": len(row.seeds),
        "seeds": row.seeds,
        "cost": row.cost,
        "cost_spread": row.cost_spread,
        "cells": cells,
    }


def _markdown_cell(table: Table, row: Row, column: str) -> str:
    """Returns mean, spread and the paper's number of one cell."""
    cell: Cell = row.cells[column]
    parts = ["-" if cell.mean is None else f"{cell.mean:.1f}"]
    if row.name in table.best(column):
        parts = [f"**{parts[0]}**"]
    parts += [] if cell.std is None else [f"±{cell.std:.1f}"]
    parts += [] if cell.paper is None else [f"({cell.paper:.1f})"]
    return " ".join(parts)


def _markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Returns a GitHub table: first column to the left, the others to the right."""
    ruler = [":---", *["---:"] * (len(header) - 1)]
    lines = [[_one_line(cell) for cell in line] for line in (header, ruler, *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_differences(table: Table) -> list[str]:
    """Returns the differences of all rows to ST, folded away; bold where they count."""

    def shown(difference: Difference | None) -> str:
        if difference is None:
            return "-"
        mean, *error = signed(difference).split(" ", 1)
        return " ".join([f"**{mean}**" if difference.significant else mean, *error])

    rows = [r for r in table.rows if any(c.difference for c in r.cells.values())]
    if not rows:
        return []
    body = [
        [r.label, *(shown(r.cells[c].difference) for c in table.columns)] for r in rows
    ]
    return [
        "<details><summary>Difference to ST in points, paired by seed, ± one standard "
        "error; bold: beyond two</summary>",
        _markdown_table(["method", *table.columns], body),
        "</details>",
    ]


def _one_line(text: str) -> str:
    """Returns text that cannot end a cell or a line of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
