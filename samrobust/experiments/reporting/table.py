"""The table of an experiment: what its finished runs measured, a row a method.

Rows are compared with standard training, the row `st`, or where there is none the first
one of it with other fields, by seed: runs of one seed share their initial weights and
their batches, so the difference of two such runs varies less than the runs do.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samrobust.experiments.reporting.names import column_order, family
from samrobust.experiments.reporting.results import check_results, num_steps
from samrobust.system.fields import is_among, split_fields

__all__ = ["LEVEL", "Cell", "Difference", "Table", "TableRow", "summarize"]

LEVEL = 0.05  # of significance
_LEAST_RATIO = 0.95  # of the seconds of two steps that may be alike


@dataclass(frozen=True)
class Difference:
    """A row minus ST in one column, over the seeds that both have.

    Attributes:
      num_seeds: the number of shared seeds, at least 1.
      mean: the mean of the differences, in points of accuracy.
      standard_error: of the mean, `std(ddof=1) / sqrt(num_seeds)`; None for one seed.
      step: points that one image is worth; a difference is a multiple of it.
    """

    num_seeds: int
    mean: float
    standard_error: float | None
    step: float = 0.0

    @property
    def p_value(self) -> float | None:
        """Of a two-sided t-test of the pairs; None where one seed cannot say.

        With the variance of rounding to whole images, step^2 / 12, added to that of a
        difference: by chance, few seeds often agree to the image.

        >>> round(Difference(3, 2.0, 1.0).p_value, 3)  # 1 - 2 / sqrt(6)
        0.184
        """
        if self.standard_error is None:
            return None
        rounding = self.step / math.sqrt(12 * self.num_seeds)
        error = math.hypot(self.standard_error, rounding)
        if error == 0:
            return float(self.mean == 0)
        from scipy.special import stdtr  # slow to load, and not for every command

        return 2 * float(stdtr(self.num_seeds - 1, -abs(self.mean) / error))

    @property
    def significant(self) -> bool | None:
        """Whether chance alone goes as far in less than 5 % of cases; None as above."""
        p_value = self.p_value
        return None if p_value is None else p_value < LEVEL


@dataclass(frozen=True)
class Cell:
    """One row in one column.

    Attributes:
      values: the accuracies in percent, in the order of the row's seeds.
      mean: their mean; None when there are none.
      std: their sample standard deviation (ddof = 1); None for fewer than two.
      paper: the paper's number, if it has one.
      difference: the comparison with ST; None for ST and without shared seeds.
    """

    values: tuple[float, ...] = ()
    mean: float | None = None
    std: float | None = None
    paper: float | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class TableRow:
    """One method.

    Attributes:
      name: the row's name in its config, as in `"sam,rho=0.2"`.
      label: its name for readers, as in `"SAM (rho = 0.2)"`.
      seeds: the seeds of its finished runs, ascending.
      cells: a cell for every column of the table.
      passes: the training in forward and backward passes, counted, relative to ST;
        None when unknown.
      cost: seconds of training (those of a step times the steps) relative to ST, the
        median over the shared seeds; None when unknown, and when other work on the
        machine made it meaningless.
      cost_spread: the interquartile range of that ratio; None for one seed.
    """

    name: str
    label: str
    seeds: tuple[int, ...]
    cells: Mapping[str, Cell]
    passes: float | None = None
    cost: float | None = None
    cost_spread: float | None = None

    def shown_cost(self, *, spread: bool = True) -> str:
        """Returns the cost as it is printed, with its spread where there is one."""
        if self.cost is None:
            return "-"
        spreads = spread and bool(self.cost_spread)
        return f"{self.cost:.1f}x" + (f" ±{self.cost_spread:.1f}" if spreads else "")

    @property
    def differences(self) -> dict[str, Difference]:
        """The comparisons with ST by column; empty for ST and without shared seeds."""
        return {n: cell.difference for n, cell in self.cells.items() if cell.difference}

    @property
    def family(self) -> str:
        """The family of methods, as in `"AT linf"`."""
        return family(self.name)


@dataclass(frozen=True)
class Table:
    """A table of results, made by `summarize`.

    Attributes:
      title: one line.
      caption: what the reader should know beyond the numbers.
      dataset: the name of the data set.
      num_test: the number of images behind every accuracy.
      columns: natural first, then linf and l2, each by radius.
      rows: in the order of the config, the unfinished ones too.
      runs: of every run its row, seed, identity, step, network, images, time,
        provenance; with two checkpoints also what `best` is.
    """

    title: str
    caption: str
    dataset: str
    num_test: int
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    runs: tuple[Mapping[str, Any], ...]

    @property
    def missing(self) -> tuple[TableRow, ...]:
        """The rows without a finished run."""
        return tuple(row for row in self.rows if not row.seeds)

    @property
    def baseline(self) -> TableRow | None:
        """The row that others are compared with, if it has run."""
        name = _baseline_of([row.name for row in self.rows])
        return next((r for r in self.rows if r.name == name and r.seeds), None)

    @property
    def baseline_label(self) -> str:
        """The label of that row, for legends."""
        return self.baseline.label if self.baseline else "ST"

    @property
    def has_paper(self) -> bool:
        """Whether any cell has a number of the paper."""
        return any(c.paper is not None for row in self.rows for c in row.cells.values())

    def best(self, column: str) -> frozenset[str]:
        """Returns the rows with the column's best mean, to the digit that is shown.

        **Guarantees**: rows that tie in print are all best; of fewer than two
        finished rows none is.
        """
        means = [(row.name, row.cells[column].mean) for row in self.rows]
        shown = {name: round(mean, 1) for name, mean in means if mean is not None}
        if len(shown) < 2:
            return frozenset()
        top = max(shown.values())
        return frozenset(name for name, mean in shown.items() if mean == top)


def summarize(
    results: Sequence[Mapping[str, Any]],
    *,
    rows: Sequence[tuple[str, str]],
    paper: Mapping[str, Mapping[str, float]] | None = None,
    passes: Mapping[str, float] | None = None,
    caption: str = "",
    title: str = "",
) -> Table:
    """Summarizes finished runs: mean, spread, difference to ST and cost of each row.

    Args:
      results: the finished runs, in any order;
        `samrobust.experiments.reporting.results` has the keys.
      rows: name and label of every row that the table should have, in order.
      paper: the paper's percentages, `{row: {column: number}}`; rows and columns
        that the table lacks are left out.
      passes: what the training of each row costs, `{row: cost}` in any unit.
      caption: what the reader should know beyond the numbers.
      title: one line; the name of the data set when empty.

    Returns:
      The table. **Guarantees**: it depends on the set of results, not on their order.

    Raises:
      ValueError: if there is no result, a key is missing, a run is of another row,
        data set or number of test images, two runs have the same row and seed, the
        accuracies are of different columns, or a number is not what it should be.

    >>> runs = [
    ...     {"dataset": "digits", "row": "st", "seed": seed, "num_test": 500,
    ...      "accuracy": {"natural": natural}}
    ...     for seed, natural in enumerate((98.0, 99.0))
    ... ]
    >>> table = summarize(runs, rows=[("st", "ST"), ("sam,rho=0.1", "SAM")])
    >>> table.rows[0].cells["natural"].mean
    98.5
    >>> [row.label for row in table.missing]
    ['SAM']
    """
    paper, passes = paper or {}, passes or {}
    check_results(results, [name for name, _ in rows], paper)
    results = sorted(results, key=lambda result: result["seed"])
    runs = {name: [r for r in results if r["row"] == name] for name, _ in rows}
    columns = tuple(sorted(results[0]["accuracy"], key=column_order))
    baseline = _baseline_of([name for name, _ in rows])
    compared = {run["seed"]: run for run in runs.get(baseline, ())}

    def make_cell(name: str, column: str) -> Cell:
        number, pairs = paper.get(name, {}).get(column), []
        values = tuple(float(run["accuracy"][column]) for run in runs[name])
        for run, value in zip(runs[name], values, strict=True):
            if name != baseline and run["seed"] in compared:
                pairs.append(value - compared[run["seed"]]["accuracy"][column])
        if not values:
            return Cell(paper=number)
        difference = None
        if pairs:
            mean, std = _mean_std(pairs)
            error = None if std is None else std / math.sqrt(len(pairs))
            step = 100 / runs[name][0]["num_test"]
            difference = Difference(len(pairs), mean, error, step)
        return Cell(values, *_mean_std(values), number, difference)

    def make_row(name: str, label: str) -> TableRow:
        cells = {column: make_cell(name, column) for column in columns}
        seeds = tuple(run["seed"] for run in runs[name])
        counted = None
        if name in passes and baseline in passes:
            counted = passes[name] / passes[baseline]
        alike = _of_a_step(name) == _of_a_step(baseline)
        cost = _cost(runs[name], compared, takes_it_too=alike)
        return TableRow(name, label, seeds, cells, counted, *cost)

    kept = (
        *("row", "seed", "identity", "step", "network", "images", "attacks_version"),
        "best",
        *("training_steps", "training_seconds", "step_seconds", "provenance"),
        *("column_provenance", "pgd_provenance", "training_provenance"),
    )
    return Table(
        title=title or results[0]["dataset"],
        caption=caption,
        dataset=results[0]["dataset"],
        num_test=results[0]["num_test"],
        columns=columns,
        rows=tuple(make_row(name, label) for name, label in rows),
        runs=tuple(
            {key: run[key] for key in kept if key in run}
            for own in runs.values()
            for run in own
        ),
    )


def _baseline_of(names: Sequence[str]) -> str:
    """Returns the row that others are compared with; empty if there is no ST."""
    plain_first = sorted(names, key=lambda name: name != "st")
    return next((name for name in plain_first if family(name) == "ST"), "")


def _mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and the sample standard deviation, None for one value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), std


def _of_a_step(row: str) -> list[tuple[str, str]]:
    """Returns the fields of a row that say of what batch and network its steps are."""
    _, fields = split_fields(row)
    return [f for f in fields if is_among(f[0], ("training.batch_size", "model."))]


def _cost(
    runs: Sequence[Mapping[str, Any]],
    compared: Mapping[int, Mapping[str, Any]],
    *,
    takes_it_too: bool,
) -> tuple[float | None, float | None]:
    """Returns the cost relative to ST and its spread, over the shared seeds.

    Runs of one seed are trained one after the other, on a machine as busy; the median
    leaves a run alone that had company. No cost is better than a wrong one: where a
    step took clearly less than ST's although it takes that one, and more, as every
    method does on equal batches and networks, or half of the ratios differ by more than
    half of their median, what was timed is the machine's other work.
    """
    pairs = [(run, compared[run["seed"]]) for run in runs if run["seed"] in compared]
    timed = [pair for pair in pairs if all(run.get("step_seconds") for run in pair)]
    if not timed:
        return None, None
    ratios = [ours["step_seconds"] / st["step_seconds"] for ours, st in timed]
    steps = [num_steps(ours) / num_steps(st) for ours, st in timed]
    costs = [ratio * count for ratio, count in zip(ratios, steps, strict=True)]
    cost, spread = statistics.median(costs), None
    if len(costs) > 1:
        low, _, high = statistics.quantiles(costs, n=4, method="inclusive")
        spread = high - low
    faster = takes_it_too and statistics.median(ratios) < _LEAST_RATIO
    meaningless = faster or (spread or 0.0) > cost / 2
    return (None, None) if meaningless else (cost, spread)
