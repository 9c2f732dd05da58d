"""What the measures of all runs of a table say about their robust accuracy."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.text import Text

from samrobust.checks import check_choice
from samrobust.experiments.reporting.names import (
    column_order,
    short_column,
    short_label,
)
from samrobust.studies.sharpness.probe import KINDS, QUANTITIES, ProbeSettings
from samrobust.studies.sharpness.ranks import (
    LEAST_FOR_INTERVAL,
    RankCorrelation,
    rank_correlation,
)
from samrobust.system.tables import Sheet, TextTable, csv_text

__all__ = [
    "Explanation",
    "MeasuredRun",
    "choose_column",
    "explain",
    "to_csv",
    "to_json",
    "to_sheet",
]


class MeasuredRun(NamedTuple):
    """A finished run, its measures and its accuracies.

    Attributes:
      row, label: of the table's row.
      seed: of the run.
      values: by the names of `QUANTITIES`; None where nothing can be said.
      accuracy: in percent, by column.
    """

    row: str
    label: str
    seed: int
    values: Mapping[str, float | None]
    accuracy: Mapping[str, float]


class Explanation(NamedTuple):
    """The measures of a table's runs, held against their accuracies.

    Attributes:
      runs: all of them.
      columns: of accuracies that any run has, natural first.
      correlations: over runs, by measure and column.
      column: the one that is drawn and spoken of.
    """

    runs: Sequence[MeasuredRun]
    columns: tuple[str, ...]
    correlations: Mapping[str, Mapping[str, RankCorrelation]]
    column: str

    def pairs(self, name: str, column: str) -> list[tuple[float, float, MeasuredRun]]:
        """Returns measure and accuracy of the runs that have both."""
        return [
            (value, run.accuracy[column], run)
            for run in self.runs
            if column in run.accuracy and (value := run.values.get(name)) is not None
        ]


def choose_column(
    accuracies: Iterable[Mapping[str, float]], column: str | None = None
) -> str:
    """Returns the column to speak of: the named one, or the last of l-inf, or of all.

    Raises:
      ValueError: if no run has an accuracy in the named column.
    """
    columns = _columns(accuracies)
    linf = [name for name in columns if name.startswith("linf")]
    column = column or (linf or columns)[-1]
    check_choice(columns, column=column)
    return column


def _columns(accuracies: Iterable[Mapping[str, float]]) -> tuple[str, ...]:
    return tuple(sorted({c for own in accuracies for c in own}, key=column_order))


def explain(runs: Sequence[MeasuredRun], column: str) -> Explanation:
    """Holds the measures of all runs against their accuracies.

    Args:
      runs: at least one.
      column: the one to draw and to speak of.
    """
    columns = _columns(run.accuracy for run in runs)
    explained = Explanation(runs, columns, {}, column)

    def correlate(name: str, column: str) -> RankCorrelation:
        pairs = explained.pairs(name, column)
        values, percents, own = zip(*pairs, strict=True) if pairs else ((), (), ())
        return rank_correlation(values, percents, [run.row for run in own])

    correlations = {n: {c: correlate(n, c) for c in columns} for n in QUANTITIES}
    return explained._replace(correlations=correlations)


def to_sheet(
    found: Explanation,
    settings: ProbeSettings,
    num_images: Sequence[int],
    *,
    notes: Sequence[str] = (),
    short: bool = False,
) -> Sheet:
    """Returns tables and notes, for a console (`short`) or as Markdown.

    Args:
      found: see there.
      settings: of the measures.
      num_images: how many training images were looked at, and how many of those that
        accuracy is of.
      notes: further ones, such as on how the accuracies were measured.
      short: means alone, short names, and the correlations with one column.
    """
    rows: dict[str, list[MeasuredRun]] = {}
    for run in found.runs:
        rows.setdefault(run.row, []).append(run)

    def table(title: str, values: str, names: Mapping[str, str]) -> TextTable:
        body = []
        for own in rows.values():
            label = short_label(own[0].label) if short else own[0].label
            cells = ([getattr(run, values).get(name) for run in own] for name in names)
            shown = [_shown(cell, spread=not short) for cell in cells]
            body.append([label, str(len(own)), *shown])
        return TextTable(["method", "n", *names.values()], body, title)

    def of_kinds(*kinds: str) -> dict[str, str]:
        return {
            name: name.replace("_", "\n") if short else one.label
            for name, one in QUANTITIES.items()
            if one.kind in kinds
        }

    def correlations() -> TextTable:
        columns, body = (found.column,) if short else found.columns, []
        for name, one in QUANTITIES.items():
            own = [found.correlations[name][column] for column in columns]
            cells = [Text(str(known), "bold" if known.is_sure else "") for known in own]
            body.append([one.label, *cells])
        header = ["", *map(short_column, columns)]
        return TextTable(header, body, "Rank correlation with accuracy, over runs")

    accuracies = {column: _name(column, short=short) for column in found.columns}
    tables = [
        table("Accuracy in %, radii in 1/255", "accuracy", accuracies),
        table("Flatness: large is sharp", "values", of_kinds("flatness")),
        table("Confidence, margin", "values", of_kinds("confidence", "margin")),
        correlations(),
    ]
    told = [*_answers(found), *_notes(found, settings, num_images), *notes]
    return Sheet(tables, told)


def _name(column: str, *, short: bool) -> str:
    """Returns a column's name; in short that of the attack on a second line."""
    name = short_column(column)
    return name.replace(" AA", "\nAA") if short else name


def _answers(found: Explanation) -> list[str]:
    """Returns of each kind what goes with robustness most."""
    sentences = []
    for kind in KINDS:
        own = {
            one.label: known
            for name, one in QUANTITIES.items()
            if one.kind == kind
            and (known := found.correlations[name][found.column]).rho is not None
        }
        if not own:
            sentences.append(f"{found.column} and {kind}: nothing can be said.")
            continue
        label = max(own, key=lambda label: abs(own[label].rho or 0.0))
        sure = f"; {sum(one.is_sure for one in own.values())} of {len(own)} leave out 0"
        sentences.append(
            f"{found.column} and {kind}: {own[label]} for {label}, the strongest"
            f"{'' if own[label].interval is None else sure}."
        )
    return sentences


def _notes(
    found: Explanation, settings: ProbeSettings, num_images: Sequence[int]
) -> list[str]:
    """Returns what was measured, and how far the correlations can be believed."""
    s, count = settings, len(found.runs)
    train, test = num_images
    methods = len({run.row for run in found.runs})
    kinds = f"{count} runs of {methods} method{'s' if methods > 1 else ''}"
    notes = [
        "Cross entropy of natural images in float32, BatchNorm in evaluation mode. "
        f"Flatness on {train} training images, the rest on {test} evaluated ones; "
        "means over seeds.",
        f"worst-case: rise of the loss in {s.ascent_steps} steps within an l2 ball of "
        f"{s.rho:g}, adaptive: of {s.rho_adaptive:g} |w|; average: under noise of "
        f"deviation {s.sigma:g}, adaptive: {s.sigma_adaptive:g} |w|, {s.noise_draws} "
        f"pairs; lambda max: {s.lanczos_steps} steps of Lanczos; trace: "
        f"{s.trace_draws} draws.",
        f"linearity error: within {s.linearity_norm} {s.linearity_radius:g}/255; "
        "distance: median over correctly classified images, in 1/255, by FAB toward "
        f"{s.num_targets} classes.",
    ]
    if methods < LEAST_FOR_INTERVAL:
        notes.append(
            f"{kinds}: too few for intervals, which take {LEAST_FOR_INTERVAL} methods, "
            "and to say that anything goes with robustness."
        )
    else:
        notes.append(
            f"[low, high]: 95 %, percentile bootstrap over the methods of {kinds}, "
            "each with all its runs; bold: leaves out 0. A correlation is no cause."
        )
    known = {c: sum(c in run.accuracy for run in found.runs) for c in found.columns}
    known |= {
        one.label: sum(run.values.get(name) is not None for run in found.runs)
        for name, one in QUANTITIES.items()
    }
    fewer = ", ".join(f"{what} ({n})" for what, n in known.items() if 0 < n < count)
    if fewer:
        notes.append(
            f"Known of fewer than all {count} runs: {fewer}. Correlations are over the "
            "runs that have both."
        )
    return notes


def to_csv(found: Explanation) -> str:
    """Returns all runs, a line each: measures by name, accuracies by column."""
    header, columns = ("row", "label", "seed", *QUANTITIES), found.columns
    lines = (
        (*run[:3], *map(run.values.get, QUANTITIES), *map(run.accuracy.get, columns))
        for run in found.runs
    )
    return csv_text((*header, *columns), lines)


def to_json(found: Explanation) -> dict[str, Any]:
    """Returns what was found, without the runs themselves."""
    return {
        "column": found.column,
        "correlations": {
            name: {column: known._asdict() for column, known in own.items()}
            for name, own in found.correlations.items()
        },
        "accuracy": {f"{r.row}/seed{r.seed}": dict(r.accuracy) for r in found.runs},
    }


def _shown(values: Sequence[float | None], *, spread: bool) -> str:
    """Returns mean and standard deviation, to the digits that a reader wants."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = _digits(statistics.fmean(known), 3)
    several = spread and len(known) > 1
    return f"{mean} ±{_digits(statistics.stdev(known), 2)}" if several else mean


def _digits(value: float, count: int) -> str:
    """Returns a number with so many digits, without an exponent where that is short.

    >>> [_digits(x, 3) for x in (0.0012345, 12.3456, 123456.0, 0.0)]
    ['0.00123', '12.3', '1.23e5', '0']
    """
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if -4 <= size < 4:
        return f"{value:.{max(count - 1 - size, 0)}f}"
    mantissa, _, exponent = f"{value:.{count - 1}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
