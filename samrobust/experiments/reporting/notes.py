"""The sentences below a table: how to read it, and how far to trust it."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from samrobust.experiments.reporting.names import column_norm
from samrobust.experiments.reporting.results import makers
from samrobust.experiments.reporting.table import LEVEL, Difference, Table

__all__ = [
    "averaging_note",
    "legend",
    "notes",
    "overfitting_note",
    "sampling_error",
    "sharpness_note",
    "signed",
    "standard_error",
]


def notes(table: Table) -> tuple[str, ...]:
    """Returns the sentences that belong to the table, most important first.

    One sentence a group of columns compares a row with ST, seed by seed, and says
    whether the difference is significant. The row is the last finished
    SAM row, or without one the last finished row: chosen by its place in the table
    and not by its result, since the best of several is too good by chance. Then: the
    sampling error of the test set, the missing rows, and what the runs ran on.
    """
    sentences = [
        *_comparisons(table),
        f"Sampling error: {table.num_test:,} images leave up to "
        f"±{sampling_error(table):.2g} points (one standard error) on a cell, however "
        "many seeds.",
    ]
    if table.missing:
        sentences.append(f"missing: {', '.join(row.label for row in table.missing)}.")
    return (*sentences, *_provenance(table))


_UNKNOWN = ", - where a part from outside samrobust does not state them"


def legend(
    table: Table, *, std: bool = True, paper: bool = True, passes: bool = True
) -> str:
    """Returns how to read a table that shows, or does not, std, paper and passes."""
    counts = sorted({len(row.seeds) for row in table.rows if row.seeds})
    seeds = _plural(counts[-1]) if len(counts) == 1 else "the seeds of a row"
    spreads = [c.std for row in table.rows for c in row.cells.values() if c.std]
    parts = [f"Accuracy in %, mean over {seeds}"]
    if counts[-1] == 1:
        parts = ["Accuracy in %, one seed"]
    elif std:
        parts = [f"Accuracy in %, mean ± standard deviation over {seeds}"]
    elif spreads:
        parts.append(f"standard deviation at most {max(spreads):.1f}")
    if table.has_paper and paper:
        parts.append("the paper's number in brackets")
    if any(row.passes is not None for row in table.rows) and passes:
        said = "passes: forward and backward passes of training, counted"
        unknown = any(row.passes is None and row.seeds for row in table.rows)
        parts.append(said + (_UNKNOWN if unknown else ""))
    if any(row.cost is not None for row in table.rows):
        parts.append(_cost_legend(table))
    return "; ".join(parts) + "."


def _cost_legend(table: Table) -> str:
    """Says what a cost is, and what a dash in its place means."""
    said = f"cost: seconds of training, {table.baseline_label} = 1"
    if any(row.cost_spread is not None for row in table.rows):
        said += ", median over seeds ± interquartile range"
    elif any(row.cost is not None and row.family != "ST" for row in table.rows):
        said += ", one run each: other work on the machine moves it"
    busy = any(row.cost is None and row.seeds for row in table.rows)
    return said + (", - where the timings cannot tell" if busy else "")


def sampling_error(table: Table) -> float:
    """Returns the largest standard error of a cell due to the finite test set."""
    cells = [row.cells[column] for row in table.rows for column in table.columns]
    means = [cell.mean for cell in cells if cell.mean is not None]
    return max(standard_error(mean, table.num_test) for mean in means)


def standard_error(accuracy: float, num_test: int) -> float:
    """Returns the standard error of an accuracy due to the finite test set, in points.

    100 sqrt(p (1 - p) / num_test), for an accuracy of 100 p percent; p is kept half an
    image away from 0 and 1, since neither is certain.
    """
    edge = 0.5 / num_test
    p = min(max(accuracy / 100, edge), 1 - edge)
    return 100 * math.sqrt(p * (1 - p) / num_test)


def signed(difference: Difference) -> str:
    """Formats a difference and its standard error, in as many digits as that needs.

    >>> signed(Difference(3, 3.61, 0.8)), signed(Difference(3, -0.001, None))
    ('+3.6 ± 0.8', '+0.0')
    >>> signed(Difference(3, 0.08, 0.03))
    '+0.08 ± 0.03'
    """
    error = difference.standard_error
    digits = 1 if error is None or error >= 0.05 else 2
    mean = f"{round(difference.mean, digits) + 0.0:+.{digits}f}"
    return mean if error is None else f"{mean} ± {error:.{digits}f}"


def _comparisons(table: Table) -> list[str]:
    """Returns a sentence for each group of columns, and one on what it is worth."""
    compared = [row for row in table.rows if row.differences]
    if not compared:
        return []
    row = ([row for row in compared if row.family == "SAM"] or compared)[-1]
    num_seeds = row.differences[table.columns[0]].num_seeds
    baseline = table.baseline
    assert baseline is not None  # whom rows are compared with
    said = f"{row.label} - {baseline.label} over {_plural(num_seeds)}: "
    sentences = [
        said + _sentence({column: row.differences[column] for column in columns})
        for _, columns in groupby(table.columns, key=column_norm)
    ]
    if num_seeds > 1:
        from scipy.special import stdtrit  # slow to load, and not for every command

        errors = stdtrit(num_seeds - 1, 1 - LEVEL / 2)
        sentences.append(
            "Differences are paired by seed, ± one standard error; significant: p < "
            f"{LEVEL:g} in a t-test, {errors:.1f} standard errors with "
            f"{num_seeds} seeds, rounding to whole images included."
        )
    return sentences


def _sentence(differences: Mapping[str, Difference]) -> str:
    """Says how far a row is from ST in a group of columns, and whether it counts."""
    shown = ", ".join(f"{c} {signed(d)}" for c, d in differences.items()) + " points"
    beyond = [column for column, d in differences.items() if d.significant]
    if any(d.significant is None for d in differences.values()):
        return f"{shown}; one seed cannot say whether that is chance."
    if len(differences) == 1:
        verdict = "significant" if beyond else "not significant"
    elif len(beyond) in (0, len(differences)):
        verdict = "all significant" if beyond else "none significant"
    else:
        verdict = f"only {', '.join(beyond)} significant"
    return f"{shown}; {verdict}."


def _provenance(table: Table) -> list[str]:
    """Says what the runs ran on, and warns when costs mix devices."""
    records = [made for run in table.runs for made in makers(run).values()]

    def values(key: str) -> list[str]:
        return sorted({str(r[key]) for r in records if r.get(key) is not None})

    words = (("at commit", "commit"), ("on", "device"), ("with jax", "jax"))
    parts = [f"{word} {', '.join(values(key))}" for word, key in words if values(key)]
    under = ""
    flags = [set((made.get("flags") or {}).items()) for made in records]
    for name, value in sorted(set().union(*flags)):
        some = "" if all((name, value) in own for own in flags) else "some "
        under += f", {some}under {name}={value}"
    said = [f"Measured {' '.join(parts)}{under}."] if parts else []
    if len(values("device")) > 1 and any(row.cost is not None for row in table.rows):
        said.append("The runs used several devices: the costs may not compare.")
    return said


def _plural(num_seeds: int) -> str:
    """Returns `1 seed`, `3 seeds`."""
    return f"{num_seeds} seed{'s' if num_seeds > 1 else ''}"


# How far gradients were taken from the weights; and what else a method tells.
_MOVES = ("applied_rho", "distance")
_TELLS = ("cosine", "live", "inverse_fisher", "chosen", "rise", "chosen_rise")


def sharpness_note(lines: Sequence[Mapping[str, Any]]) -> str:
    """Says whether a run's sharpness was on; empty for a run without.

    Args:
      lines: of `metrics.jsonl`.

    >>> sharpness_note([{"applied_rho": 0.0}, {"applied_rho": 0.2, "cosine": 0.9375}])
    'Gradients at moved weights in 1 of 2 epochs: applied_rho 0.2, cosine 0.938 in \
the last.'
    """
    moves = next((name for name in _MOVES if lines and name in lines[-1]), "")
    return _epochs_note("Gradients at moved weights", lines, moves, *_TELLS)


def averaging_note(lines: Sequence[Mapping[str, Any]]) -> str:
    """Says whether a run's average was another network; empty for a run without.

    >>> averaging_note([{"average_distance": 0.0}, {"average_distance": 0.25}])
    'Average away from the weights in 1 of 2 epochs: average_distance 0.25 in the last.'
    """
    return _epochs_note("Average away from the weights", lines, "average_distance")


def _epochs_note(
    what: str, lines: Sequence[Mapping[str, Any]], name: str, *others: str
) -> str:
    """Says in how many epochs a metric was not 0, and what it was in the last."""
    last = lines[-1] if lines else {}
    if name not in last:
        return ""
    count = sum(line.get(name, 0.0) > 0 for line in lines)
    told = (f"{n} {last[n]:.3g}" for n in (name, *others) if n in last)
    return f"{what} in {count} of {len(lines)} epochs: {', '.join(told)} in the last."


# How far robust accuracy falls within an epoch, in points, that locuslab's
# fast_adversarial calls catastrophic overfitting.
_FALL = 20.0


def overfitting_note(lines: Sequence[Mapping[str, Any]]) -> str:
    """Says in which epoch a run overfitted catastrophically; empty if in none.

    Robust accuracy on the held-out images then falls by more than 20 points from one
    epoch to the next, while accuracy under the training's own attack stays high.

    Args:
      lines: of `metrics.jsonl`.

    Reference: Wong, Rice and Kolter (2020), arXiv 2001.03994.

    >>> epochs = [(1, 41.0), (2, 0.5)]
    >>> lines = [{"epoch": e, "validation_robust": r, "accuracy": 87.0}
    ...          for e, r in epochs]
    >>> overfitting_note(lines).partition(":")[0]
    'Catastrophic overfitting in epoch 2'
    """
    judged = [line for line in lines if "validation_robust" in line]
    for before, line in pairwise(judged):
        high, low = before["validation_robust"], line["validation_robust"]
        if high - low > _FALL:
            return (
                f"Catastrophic overfitting in epoch {line['epoch']}: validation_robust "
                f"fell from {high:.1f} to {low:.1f}, accuracy under the attack of the "
                f"training is {line['accuracy']:.1f}."
            )
    return ""
