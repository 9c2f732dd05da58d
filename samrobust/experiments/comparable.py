"""Which runs may stand in one table: those of the same data that are judged alike."""

from collections.abc import Iterator, Mapping
from typing import Any

from samrobust.checks import check

__all__ = ["check_comparable", "unlike"]

# Fields that all runs of a table have in common, and all fields below them.
_OF_A_CONFIG = (
    *("data.name", "data.test_size", "data.validation_size", "data.split_seed"),
    *("evaluation", "model.dtype"),
)
_OF_A_RESULT = ("dataset", "num_test", "images", "run.data")
_COMMON = tuple(f"{name}." for name in (*_OF_A_CONFIG, *_OF_A_RESULT))


def unlike(
    run: Mapping[str, Any], first: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Returns in what a run differs from another and must not, to stand beside it.

    Args:
      run: its config, or its result, as nested dictionaries.
      first: that of the other run.

    Returns:
      Both values by the dotted names of the fields; of results also the `columns` of
      their accuracies. Empty if one table may hold both.

    >>> first = {"num_test": 500, "accuracy": {"natural": 99.0}}
    >>> unlike({"num_test": 100, "accuracy": {"natural": 98.0}}, first)
    {'num_test': (100, 500)}
    """
    own, other = (dict(_common(fields)) for fields in (run, first))
    names = sorted(own.keys() | other.keys())
    both = {name: (own.get(name), other.get(name)) for name in names}
    return {name: (a, b) for name, (a, b) in both.items() if a != b}


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


def _common(fields: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        name = f"{above}{key}"
        if name == "accuracy":
            yield "columns", sorted(value)
        elif isinstance(value, Mapping):
            yield from _common(value, f"{name}.")
        elif f"{name}.".startswith(_COMMON):
            yield name, value
