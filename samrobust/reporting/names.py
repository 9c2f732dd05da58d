"""What the names of rows and columns say: families, norms, radii, short forms.

A row is `"st"`, `"sam,rho=0.2"`, `"at,norm=linf,eps=8"`; a column is `"natural"` or
a norm and a radius in 1/255, `"linf 1/255"`.
"""

import re

from samrobust.checks import check

__all__ = ["column_norm", "column_order", "family", "short_column", "short_label"]

_COLUMN = re.compile(r"\w+ \d+(\.\d+)?/255")
_NORMS = ("natural", "linf", "l2")


def family(row: str) -> str:
    """Returns the family of methods that a row belongs to.

    >>> [family(row) for row in ("st", "sam,rho=0.2", "at,norm=linf,eps=8", "awp")]
    ['ST', 'SAM', 'AT linf', 'AWP']
    """
    method, *options = row.split(",")
    norms = [o.removeprefix("norm=") for o in options if o.startswith("norm=")]
    return " ".join([method.upper(), *norms])


def _parse(column: str) -> tuple[str, float]:
    """Returns the norm and the radius, in 1/255, of a column."""
    if column == "natural":
        return column, 0.0
    condition = "a column named 'natural' or '<norm> <radius>/255'"
    fix = "Name it as in 'linf 8/255'."
    check(_COLUMN.fullmatch(column) is not None, condition, fix, column=column)
    norm, radius = column.removesuffix("/255").split()
    return norm, float(radius)


def column_norm(column: str) -> str:
    """Returns the group of a column: `"natural"`, or the norm of its attack.

    >>> column_norm("linf 8/255")
    'linf'
    """
    return _parse(column)[0]


def column_order(column: str) -> tuple[int, str, float]:
    """Returns the key that sorts columns: natural, linf, l2, others; then by radius.

    >>> sorted(["l2 32/255", "linf 8/255", "natural", "l2 4/255"], key=column_order)
    ['natural', 'linf 8/255', 'l2 4/255', 'l2 32/255']

    Raises:
      ValueError: unless the column is `natural` or `<norm> <radius>/255`.
    """
    norm, radius = _parse(column)
    rank = _NORMS.index(norm) if norm in _NORMS else len(_NORMS)
    return rank, norm, radius


def short_column(column: str) -> str:
    """Returns a column's name without the unit of its radius.

    >>> short_column("linf 8/255")
    'linf 8'
    """
    return column.removesuffix("/255")


def short_label(label: str) -> str:
    """Returns a row's label without brackets, parameter names and units.

    >>> short_label("AT (linf, eps = 8/255)"), short_label("SAM (rho = 0.2)")
    ('AT linf 8', 'SAM 0.2')
    """
    label = re.sub(r"\w+ *= *", "", label.replace("/255", ""))
    return " ".join(re.sub(r"[(),]", " ", label).split())
