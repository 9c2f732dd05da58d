"""A table for the terminal, one line a row, as detailed as the terminal is wide."""

from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table as Grid
from rich.text import Text

from samrobust.experiments.reporting.names import short_column, short_label
from samrobust.experiments.reporting.notes import legend, notes
from samrobust.experiments.reporting.table import Row, Table

__all__ = ["TerminalTable", "to_rich"]


def to_rich(table: Table) -> "TerminalTable":
    """Returns the table as a Rich renderable that adapts to the console's width.

    Cells are `97.4 ±0.3 (94.6)`, the paper's number dimmed, the best mean of each
    column bold; ST, SAM and AT are apart. A narrow console first gets shorter names,
    then loses the standard deviations (the notes then say the largest), then the
    paper's numbers.

    >>> from samrobust.experiments.reporting import summarise
    >>> run = {"dataset": "digits", "row": "st", "seed": 0, "num_test": 500,
    ...        "accuracy": {"natural": 99.4}}
    >>> table = summarise([run], rows=[("st", "ST")])
    >>> console = Console(width=80)
    >>> with console.capture() as capture:
    ...     console.print(to_rich(table))
    >>> "99.4" in capture.get()
    True
    """
    return TerminalTable(table)


@dataclass(frozen=True)
class _Layout:
    """What is shown: full or short names, std, the paper's number; and the spacing."""

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


@dataclass(frozen=True)
class TerminalTable:
    """A table that a Rich console prints; see `to_rich`."""

    table: Table

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        sign = "+-" if options.ascii_only else "±"
        unlimited = options.update_width(10_000)
        layout, grid = _LAYOUTS[-1], Grid()
        for layout in _LAYOUTS:
            grid = _grid(self.table, layout, sign)
            width = Measurement.get(console, unlimited, grid).maximum
            if width <= options.max_width:
                break
        sentences = [
            *([self.table.caption] if self.table.caption else []),
            legend(self.table, std=layout.std, paper=layout.paper),
            *notes(self.table),
        ]
        title = Text(self.table.title, style="bold")
        if layout.short:
            title.append(", radii in 1/255", style="not bold")
        yield from (title, Text(), grid, Text())
        yield Text("\n".join(sentences).replace("±", sign), style="dim")


def _grid(table: Table, layout: _Layout, sign: str) -> Grid:
    """Lays the table out."""
    counts = {len(row.seeds) for row in table.rows if row.seeds}
    with_costs = any(row.cost is not None for row in table.rows)
    grid = Grid(box=box.SIMPLE, show_edge=False, pad_edge=False)
    grid.padding = (0, layout.gap - 1, 0, 0)
    grid.add_column("method", no_wrap=True)
    names = [_header(c) if layout.short else c for c in table.columns]
    headers = [*(["n"] if len(counts) > 1 else []), *names]
    for header in [*headers, *(["cost"] if with_costs else [])]:
        grid.add_column(header, justify="right", no_wrap=True)
    columns = [_column(table, column, layout, sign) for column in table.columns]
    for i, row in enumerate(table.rows):
        cells = [Text(short_label(row.label) if layout.short else row.label)]
        cells += [Text(str(len(row.seeds)))] if len(counts) > 1 else []
        cells += [column[i] for column in columns]
        cost = row.shown_cost(spread=layout.std and not layout.tight)
        cells += [Text(cost.replace("±", sign))] if with_costs else []
        following = table.rows[i + 1 : i + 2]
        ends = any(_group(row) != _group(after) for after in following)
        grid.add_row(*cells, end_section=ends, style="" if row.seeds else "dim")
    return grid


def _header(column: str) -> str:
    """A column's short name, the attack's on a line of its own."""
    words = short_column(column).split(" ", 2)
    return "\n".join([" ".join(words[:2]), *words[2:]])


def _column(table: Table, column: str, layout: _Layout, sign: str) -> list[Text]:
    """Returns a column's cells, aligned: where one part is absent others keep place."""
    cells = [row.cells[column] for row in table.rows]
    best = table.best(column)
    means = ["-" if cell.mean is None else f"{cell.mean:.1f}" for cell in cells]
    sign = sign if layout.tight else f" {sign}"
    spreads = [
        "" if cell.std is None or not layout.std else f"{sign}{cell.std:.1f}"
        for cell in cells
    ]
    papers = [
        "" if cell.paper is None or not layout.paper else f" ({cell.paper:.1f})"
        for cell in cells
    ]
    widths = [max(map(len, parts)) for parts in (means, spreads, papers)]
    return [
        Text.assemble(
            (mean.rjust(widths[0]), "bold" if row.name in best else ""),
            spread.ljust(widths[1]),
            (paper.rjust(widths[2]), "dim"),
        )
        for row, mean, spread, paper in zip(
            table.rows, means, spreads, papers, strict=True
        )
    ]


def _group(row: Row) -> str:
    """Returns what rows must share to stand together: ST, SAM, AT."""
    return row.family.split()[0]
