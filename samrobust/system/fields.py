"""Fields of configs and results, by dotted names, and in which two of them differ."""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

__all__ = ["differences", "flatten", "is_among", "split_fields"]

_IN_A_ROW = re.compile(r",(\w+(?:\.\w+)+)=([^,+]*)")


def flatten(tree: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the fields of a mapping and of those within, each by its dotted name."""
    for name, value in tree.items():
        if hasattr(value, "items"):
            yield from flatten(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def differences(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the fields in which two mappings differ.

    Values are compared as JSON has them, so that a tuple equals a list.

    >>> differences({"a": {"b": (1,)}, "c": 2}, {"a": {"b": [1]}})
    {'c': (2, None)}
    """
    trees = [json.loads(json.dumps(dict(flatten(tree)))) for tree in (one, other)]
    names = sorted(trees[0].keys() | trees[1].keys())
    both = {name: tuple(tree.get(name) for tree in trees) for name in names}
    return {name: (a, b) for name, (a, b) in both.items() if a != b}


def is_among(field: str, names: Collection[str]) -> bool:
    """Returns whether a field is one of these, or below one that ends with a dot.

    >>> [is_among(f, ("seed", "paper.")) for f in ("seed", "seeds", "paper.natural")]
    [True, False, True]
    """
    return any(
        field == name or (name.endswith(".") and field.startswith(name))
        for name in names
    )


def split_fields(row: str) -> tuple[str, list[tuple[str, str]]]:
    """Returns the name of a row without its fields of a config, and these, as text.

    >>> split_fields("sam,rho=0.2,training.epochs=40")
    ('sam,rho=0.2', [('training.epochs', '40')])
    """
    return _IN_A_ROW.sub("", row), _IN_A_ROW.findall(row)
