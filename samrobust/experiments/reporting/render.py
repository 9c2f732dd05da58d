"""A table for the terminal, as Markdown, HTML, CSV and JSON, and its files.

On a terminal a row is one line, as detailed as the terminal is wide.
"""

import dataclasses
import html
import json
import os
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table as Grid
from rich.text import Text

from samrobust.experiments.reporting import names
from samrobust.experiments.reporting.notes import legend, notes, sampling_error, signed
from samrobust.experiments.reporting.pictures import draw_table, write_figure
from samrobust.experiments.reporting.prices import draw_prices, has_prices
from samrobust.experiments.reporting.table import Difference, Table, summarize
from samrobust.system.files import seal, unseal, write_text
from samrobust.system.storage import to_path
from samrobust.system.tables import TextTable, csv_text

__all__ = [
    "from_json",
    "to_csv",
    "to_html",
    "to_json",
    "to_markdown",
    "to_rich",
    "write_pictures",
    "write_table",
]


def write_table(
    table: Table, directory: str | os.PathLike[str], name: str = "table"
) -> tuple[Path, ...]:
    """Writes a table in all its forms, and makes the directory if needed.

    Returns:
      The paths of table.md, table.csv, table.json and table.png, or of files of
      another `name`; where methods cost differently also of table-cost.png.
      **Guarantees**: a reader finds each file complete, the old one or the new one, at
      any moment.
    """
    directory = to_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, render in (("md", to_markdown), ("csv", to_csv), ("json", to_json)):
        paths.append(directory / f"{name}.{suffix}")
        write_text(paths[-1], render(table))
    return (*paths, *write_pictures(table, directory, name))


def write_pictures(table: Table, directory: Path, name: str) -> tuple[Path, ...]:
    """Writes the pictures of a table alone; returns their paths."""
    paths = write_figure(draw_table(table), directory, name, ("png",))
    if has_prices(table):
        paths += write_figure(draw_prices(table), directory, f"{name}-cost", ("png",))
    else:  # of other rows
        (directory / f"{name}-cost.png").unlink(missing_ok=True)
    return paths


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Choice of what is shown: short names, std, the paper's number; the spacing."""

    short: bool = True
    std: bool = True
    paper: bool = True
    tight: bool = False
    gap: int = 2


# From the most to the least detailed; the first that fits the terminal is taken.
_LAYOUTS = (
    _Layout(short=False),
    _Layout(),
    _Layout(tight=True),
    _Layout(tight=True, gap=1),
    _Layout(std=False),
    _Layout(std=False, gap=1),
    _Layout(std=False, paper=False),
    _Layout(std=False, paper=False, gap=1),
)


def to_rich(table: Table) -> "TerminalTable":
    """Returns the table as a Rich renderable that adapts to the console's width.

    Cells are `97.4 ±0.3 (94.6)`, the paper's number dimmed, the best mean of each
    column bold; ST, SAM and AT are apart. A narrow console first gets shorter names,
    then loses the standard deviations (the notes then say the largest), then the
    paper's numbers.

    >>> from samrobust.experiments.reporting import summarize
    >>> run = {"dataset": "digits", "row": "st", "seed": 0, "num_test": 500,
    ...        "accuracy": {"natural": 99.4}}
    >>> table = summarize([run], rows=[("st", "ST")])
    >>> console = Console(width=80)
    >>> with console.capture() as capture:
    ...     console.print(to_rich(table))
    >>> "99.4" in capture.get()
    True
    """
    return TerminalTable(table)


@dataclasses.dataclass(frozen=True)
class TerminalTable:
    """A table that a Rich console prints; see `to_rich`."""

    table: Table

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        table, sign = self.table, "+-" if options.ascii_only else "±"
        unlimited = options.update_width(10_000)
        with_seeds = len({len(row.seeds) for row in table.rows if row.seeds}) > 1
        layout, grid = _LAYOUTS[-1], Grid()
        for layout in _LAYOUTS:
            grid = _lay_out(table, layout, sign, with_seeds).to_rich(layout.gap)
            width = Measurement.get(console, unlimited, grid).maximum
            if width <= options.max_width:
                break
        said = legend(
            table, std=layout.std, paper=layout.paper, passes=not layout.short
        )
        sentences = [*filter(None, [table.caption]), said, *notes(table)]
        title = Text(table.title, style="bold")
        if layout.short:
            title.append(", radii in 1/255", style="not bold")
        yield from (title, Text(), grid, Text())
        yield Text("\n".join(sentences).replace("±", sign), style="dim")


def to_markdown(table: Table) -> str:
    """Returns the table, its notes and the differences to ST as GitHub Markdown.

    Cells are `97.4 ±0.3 (94.6)`: mean, standard deviation, the paper's number; the
    best mean of each column is bold, and a row without a run has `-`.
    """
    blocks = [
        f"### {' '.join(table.title.split())}",
        _in_full(table).to_markdown(),
        *filter(None, [table.caption]),
        "\n".join(f"* {note}" for note in (legend(table), *notes(table))),
    ]
    if compared := _compared(table):
        blocks += [_folded(table), compared.to_markdown(), "</details>"]
    return "\n\n".join(blocks) + "\n"


def to_html(table: Table) -> str:
    """Returns what `to_markdown` does in HTML, without the title."""
    said = (f"<li>{html.escape(note)}</li>" for note in (legend(table), *notes(table)))
    caption = f"<p>{html.escape(table.caption)}</p>" if table.caption else ""
    blocks = [_in_full(table).to_html(), caption, f"<ul>{''.join(said)}</ul>"]
    if compared := _compared(table):
        blocks += [_folded(table), compared.to_html(), "</details>"]
    return "\n".join(filter(None, blocks))


def _folded(table: Table) -> str:
    said = f"Difference to {html.escape(table.baseline_label)} in points"
    told = "paired by seed, ± one standard error; bold: significant"
    return f"<details><summary>{said}, {told}</summary>"


def _in_full(table: Table) -> TextTable:
    return _lay_out(table, _LAYOUTS[0], "±", with_seeds=True)


def _compared(table: Table) -> TextTable | None:
    """Returns the differences to ST; None where no row shares a seed with it."""
    shown = [
        [row.label, *(_shown(row.differences[column]) for column in table.columns)]
        for row in table.rows
        if row.differences
    ]
    return TextTable(["method", *table.columns], shown) if shown else None


def _lay_out(table: Table, layout: _Layout, sign: str, with_seeds: bool) -> TextTable:
    """Returns the table's texts, a gap between ST, SAM and AT."""
    labels = [row.label for row in table.rows]
    columns: dict[str, list] = {
        "method": [names.short_label(x) if layout.short else x for x in labels]
    }
    if with_seeds:
        name = "n" if layout.short else "seeds"
        columns[name] = [str(len(row.seeds)) for row in table.rows]
    for column in table.columns:
        name = column
        if layout.short:  # that of attack and checkpoint on its own line
            parts = map(names.short_column, names.split_column(column))
            name = "\n".join(filter(None, parts))
        columns[name] = _cells(table, column, layout, sign)
    if not layout.short and any(row.passes is not None for row in table.rows):
        passes = [row.passes for row in table.rows]
        columns["passes"] = ["-" if x is None else f"{x:.2f}x" for x in passes]
    if any(row.cost is not None for row in table.rows):
        spread = layout.std and not layout.tight
        costs = [row.shown_cost(spread=spread) for row in table.rows]
        columns["cost"] = [cost.replace("±", sign) for cost in costs]
    rows, group = [], None
    for row, *cells in zip(table.rows, *columns.values(), strict=True):
        before, group = group, row.family.split()[0]
        rows += [()] if before not in (None, group) else []
        rows.append([Text(style="" if row.seeds else "dim") + cell for cell in cells])
    return TextTable(list(columns), rows)


def _cells(table: Table, column: str, layout: _Layout, sign: str) -> list[Text]:
    """Returns a column's cells, aligned: where one part is absent others keep place."""
    best = table.best(column)
    sign = sign if layout.tight else f" {sign}"
    shown = []
    for cell in (row.cells[column] for row in table.rows):
        with_std = layout.std and cell.std is not None
        with_paper = layout.paper and cell.paper is not None
        mean = "-" if cell.mean is None else f"{cell.mean:.1f}"
        spread = f"{sign}{cell.std:.1f}" if with_std else ""
        shown.append((mean, spread, f" ({cell.paper:.1f})" if with_paper else ""))
    widths = [max(map(len, parts)) for parts in zip(*shown, strict=True)]
    return [
        Text.assemble(
            " " * (widths[0] - len(mean)),
            (mean, "bold" if row.name in best else ""),
            spread.ljust(widths[1]),
            (paper.rjust(widths[2]), "dim"),
        )
        for row, (mean, spread, paper) in zip(table.rows, shown, strict=True)
    ]


def _shown(difference: Difference) -> Text:
    """Returns a difference to ST and its standard error, bold where significant."""
    mean, *error = signed(difference).split(" ", 1)
    style = "bold" if difference.significant else ""
    return Text.assemble((mean, style), *(f" {part}" for part in error))


def to_csv(table: Table) -> str:
    """Returns the table in tidy form, a line for each row and column.

    The fields are row, label, column, n, mean, std and paper; what is not known is
    empty, and n counts the seeds.
    """
    lines = (
        (row.name, row.label, c, len(cell.values), cell.mean, cell.std, cell.paper)
        for row in table.rows
        for c in table.columns
        for cell in [row.cells[c]]
    )
    header = ("row", "label", "column", "n", "mean", "std", "paper")
    return csv_text(header, lines)


def from_json(text: str) -> Table:
    """Returns the table that `to_json` wrote, also an older version of it.

    It is made of what each seed measured, and of nothing that was derived from that.

    Raises:
      WorkdirError: if the text was changed since.
    """
    content = unseal(json.loads(text), "a table's JSON", older=True)
    runs = {(run["row"], run["seed"]): run for run in content["runs"]}
    results = [
        runs[row["name"], seed]
        | {key: content[key] for key in ("dataset", "num_test")}
        | {"accuracy": {c: row["cells"][c]["values"][i] for c in content["columns"]}}
        for row in content["rows"]
        for i, seed in enumerate(row["seeds"])
    ]
    published = {
        row["name"]: {
            c: x["paper"] for c, x in row["cells"].items() if x["paper"] is not None
        }
        for row in content["rows"]
    }
    counted = {row["name"]: row.get("passes") for row in content["rows"]}
    return summarize(
        results,
        rows=[(row["name"], row["label"]) for row in content["rows"]],
        paper=published,
        passes={name: passes for name, passes in counted.items() if passes is not None},
        title=content["title"],
        caption=content["caption"],
    )


def to_json(table: Table) -> str:
    """Returns everything the table holds, every seed's value and provenance too.

    The keys are those of `Table`, `TableRow` and `Cell`, with `notes`, `missing` and
    `sampling_error` beside them. What is not known is null.
    """
    rows = []
    for row in table.rows:
        content = dataclasses.asdict(row)
        for column, found in row.differences.items():
            content["cells"][column]["difference"] |= {
                "p_value": found.p_value,
                "significant": found.significant,
            }
        rows.append({**content, "family": row.family, "n": len(row.seeds)})
    content = {
        **vars(table),
        "rows": rows,
        "notes": notes(table),
        "sampling_error": sampling_error(table),
        "missing": [row.name for row in table.missing],
    }
    return json.dumps(seal(content), indent=2, allow_nan=False) + "\n"
