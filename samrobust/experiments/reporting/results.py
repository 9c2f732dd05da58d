"""Finished runs as they are reported, and which of them make one table.

A result is a dictionary, one finished run: one row of the table and one seed.

    {"dataset": "digits", "row": "sam,rho=0.2", "seed": 0, "num_test": 500,
     "accuracy": {"natural": 99.4, "linf 16/255": 89.4},    # percentages
     "step_seconds": 0.012,                   # of a training step, or None
     "training_steps": 360,                   # optional, as are these:
     "training_seconds": 15.1, "provenance": {"commit": ..., ...},
     "column_provenance": {"linf 8/255": {"commit": ..., ...}}}    # where it differs

One table holds runs that are judged alike on the same images. They may have been
trained on other images, as their labels say.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from samrobust.checks import check
from samrobust.experiments.reporting.names import column_order
from samrobust.system.fields import differences, flatten

__all__ = [
    "attacks_version",
    "check_comparable",
    "check_results",
    "makers",
    "num_steps",
    "unlike",
]

_KEYS = ("dataset", "row", "seed", "accuracy", "num_test")
# Fields of a config, then of a result, that all runs of a table have in common, and all
# fields below them.
_COMMON = (
    *("data.name.", "data.test_size.", "evaluation.", "model.dtype."),
    *("dataset.", "num_test.", "images.", "attacks_version."),
)
# What results meant that have no such field yet.
_EARLIER = {"attacks_version": 2}


def num_steps(result: Mapping[str, Any]) -> int:
    """Returns the steps of a run's training.

    Earlier results have `step` alone: of the network judged, mostly the last.
    """
    return result.get("training_steps", result.get("step", 1))


def attacks_version(result: Mapping[str, Any]) -> int:
    """Returns the version of the attacks that a run was judged by."""
    return (_EARLIER | dict(result))["attacks_version"]


def makers(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the provenance of a run's columns, by column.

    The empty name is for all columns that are not named, `PGD` for those beside
    AutoAttack's, `best` for those of the best checkpoint.

    >>> first, second = {"commit": "a"}, {"commit": "b"}
    >>> makers({"provenance": second, "column_provenance": {"linf 8/255": first}})
    {'': {'commit': 'b'}, 'linf 8/255': {'commit': 'a'}}
    >>> list(makers({"provenance": first, "best": {"pgd_provenance": second}}))
    ['', 'best', 'PGD best']
    """
    found = {"": result.get("provenance") or {}}
    if "pgd_provenance" in result:
        found["PGD"] = result["pgd_provenance"]
    found |= result.get("column_provenance") or {}
    best = makers(result["best"]) if "best" in result else {}
    return found | {f"{name} best".strip(): made for name, made in best.items()}


def unlike(
    run: Mapping[str, Any], first: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Returns in what a run differs from another and must not, to stand beside it.

    Args:
      run: its result, or its config, nested or by dotted names.
      first: that of the other run.

    Returns:
      Both values by the dotted names of the fields; of results also the `columns` of
      their accuracies. Empty if one table may hold both.

    >>> first = {"num_test": 500, "accuracy": {"natural": 99.0}}
    >>> unlike({"num_test": 100, "accuracy": {"natural": 98.0}}, first)
    {'num_test': (100, 500)}
    """
    return differences(_common(run, first), _common(first, run))


def _common(fields: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    flat, beside = dict(flatten(fields)), dict(flatten(other))
    names = {name for name in flat if f"{name}.".startswith(_COMMON)}
    if flat.get("evaluation.split") == "validation":
        names |= {"data.validation_size", "data.split_seed"}
    if flat.get("data.test_size") is not None:
        names.add("data.split_seed")
    data = [n for n in flat if n.startswith("run.config.data.")]
    if all(flat[name] == beside.get(name) for name in data):
        names.add("run.data")  # or the images themselves are others
    found = _EARLIER | {name: flat.get(name) for name in names}
    return found | {"columns": sorted(fields.get("accuracy", ()))}


def check_comparable(runs: Mapping[str, Mapping[str, Any]], fix: str) -> None:
    """Refuses runs of which one table cannot hold all.

    Args:
      runs: their configs, or their results, by their names.
      fix: what to do about it, a sentence.

    Raises:
      ValueError: see above; names the first such run and what differs.
    """
    (name, first), *others = runs.items()
    for other, fields in others:
        found = unlike(fields, first)
        condition = f"runs of the same data that are judged alike, as {name}"
        check(not found, condition, fix, run=other, **found)


def check_results(
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
      ValueError: as `samrobust.experiments.reporting.summarize` says.
    """
    check(len(set(rows)) == len(rows), "distinct rows", rows=list(rows))
    check(bool(results), "at least one finished run", results=results)
    runs: dict[str, Mapping[str, Any]] = {}
    for result in results:
        for key in _KEYS:
            check(key in result, f"a result with the key {key!r}", keys=list(result))
        where = {"row": result["row"], "seed": result["seed"]}
        row, accuracy = result["row"], result["accuracy"]
        fix = "Add it to the table's rows."
        check(row in rows, f"a row of {list(rows)}", fix, row=row)
        condition = "at least one accuracy"
        check(bool(accuracy), condition, **where, accuracy=accuracy)
        _check_percentages(accuracy, **where)
        seconds = result.get("step_seconds")
        condition = "step_seconds to be None or 0 < step_seconds < inf"
        holds = seconds is None or 0 < seconds < math.inf
        check(holds, condition, **where, step_seconds=seconds)
        run = "{row}/seed{seed}".format_map(where)
        fix = "Give each finished run once."
        check(run not in runs, "one run a row and seed", fix, run=run)
        runs[run] = result
    check_comparable(runs, "Make one table for each.")
    for name, numbers in paper.items():
        _check_percentages(numbers, paper=name)


def _check_percentages(accuracy: Mapping[str, float], **where: Any) -> None:
    """Refuses columns of other names, and what is not a percentage, NaN included."""
    for column, value in accuracy.items():
        column_order(column)
        where["column"] = column
        condition = "percentages, 0 <= accuracy <= 100"
        check(0 <= value <= 100, condition, accuracy=value, **where)
