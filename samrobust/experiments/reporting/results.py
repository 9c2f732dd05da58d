"""What a finished run reports, and which runs make one table.

A result is a dictionary, one finished run: one row of the table and one seed.

    {"dataset": "digits", "row": "sam,rho=0.2", "seed": 0, "num_test": 500,
     "accuracy": {"natural": 99.4, "linf 16/255": 89.4},    # percentages
     "step_seconds": 0.012,                   # of a training step, or None
     "training_seconds": 15.1, "provenance": {"commit": ..., ...}}    # both optional
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from samrobust.checks import check
from samrobust.experiments.comparable import check_comparable
from samrobust.experiments.reporting.names import column_order

__all__ = ["validate"]

_KEYS = ("dataset", "row", "seed", "accuracy", "num_test")


def validate(
    results: Sequence[Mapping[str, Any]],
    rows: Sequence[str],
    paper: Mapping[str, Mapping[str, float]],
) -> None:
    """Refuses results that do not make one table.

    Args:
      results: the finished runs.
      rows: the names of the table's rows.
      paper: the paper's percentages, `{row: {column: number}}`.

    Raises:
      ValueError: as `samrobust.experiments.reporting.summarise` says.
    """
    check(len(set(rows)) == len(rows), "distinct rows", rows=list(rows))
    check(bool(results), "at least one finished run", results=results)
    runs: dict[str, Mapping[str, Any]] = {}
    for result in results:
        for key in _KEYS:
            check(key in result, f"a result with the key {key!r}", keys=list(result))
        _validate_run(result, rows)
        run = f"{result['row']}/seed{result['seed']}"
        fix = "Give each finished run once."
        check(run not in runs, "one run a row and seed", fix, run=run)
        runs[run] = result
    check_comparable(runs, "Make one table for each.")
    for name, numbers in paper.items():
        for column, number in numbers.items():
            _check_percentage(number, paper=name, column=column)


def _validate_run(result: Mapping[str, Any], rows: Sequence[str]) -> None:
    """Refuses a run of no row of the table, and numbers that cannot be."""
    row, seed = result["row"], result["seed"]
    check(row in rows, f"a row of {list(rows)}", "Add it to the table's rows.", row=row)
    columns = sorted(result["accuracy"], key=column_order)
    check(bool(columns), "at least one accuracy", row=row, seed=seed, accuracy=columns)
    for column, value in result["accuracy"].items():
        _check_percentage(value, row=row, seed=seed, column=column)
    seconds = result.get("step_seconds")
    check(
        seconds is None or 0 < seconds < math.inf,
        "step_seconds to be None or 0 < step_seconds < inf",
        row=row,
        seed=seed,
        step_seconds=seconds,
    )


def _check_percentage(accuracy: float, **where: Any) -> None:
    """Refuses what is not a percentage, NaN included."""
    holds = 0 <= accuracy <= 100
    check(holds, "percentages, 0 <= accuracy <= 100", accuracy=accuracy, **where)
