"""What the names of rows and columns say: families, norms, radii, short forms.

A row is `"st"`, `"sam,rho=0.2"`, `"at,norm=linf,eps=8+sam,rho=0.1"`; a column is
`"natural"` or a norm and a radius in 1/255, `"linf 1/255"`, and where there are several
attacks the name of one, `"linf 1/255 AA"`.
"""

import re

from samrobust.checks import check

__all__ = ["column_norm", "column_order", "family", "short_column", "short_label"]

_COLUMN = re.compile(r"(\w+) (\d+(?:\.\d+)?)/255(?: (\S.*))?")
_NORMS = ("natural", "linf", "l2")


def family(row: str) -> str:
    """Returns the family of methods that a row belongs to.

    >>> [family(row) for row in ("st", "sam,rho=0.2", "at,norm=linf,eps=8")]
    ['ST', 'SAM', 'AT linf']
    >>> family("at,norm=l2,eps=64+awp,gamma=0.01"), family("mine:lookahead,k=5")
    ('AT+AWP l2', 'lookahead')
    """
    names = re.findall(r"(?:^|\+)([A-Za-z_][\w.:]*)", row)
    own = [name.rpartition(":")[2] if ":" in name else name.upper() for name in names]
    return " ".join(["+".join(own), *re.findall(r"norm=(\w+)", row)])


def _parse(column: str) -> tuple[str, float, str]:
    """Returns the norm, the radius in 1/255 and the attack, if named, of a column."""
    if column == "natural":
        return column, 0.0, ""
    condition = "a column named 'natural' or '<norm> <radius>/255'"
    fix = "Name it as in 'linf 8/255', or 'linf 8/255 AA' with the attack."
    match = _COLUMN.fullmatch(column)
    check(match is not None, condition, fix, column=column)
    assert match is not None
    return match[1], float(match[2]), match[3] or ""


def column_norm(column: str) -> str:
    """Returns the group of a column: `"natural"`, or the norm of its attack.

    >>> column_norm("linf 8/255")
    'linf'
    """
    return _parse(column)[0]


def column_order(column: str) -> tuple[int, str, float, str]:
    """Returns the key that sorts columns: natural, linf, l2, others; radius; attack.

    >>> sorted(["l2 32/255", "l2 4/255 AA", "natural", "l2 4/255"], key=column_order)
    ['natural', 'l2 4/255', 'l2 4/255 AA', 'l2 32/255']

    Raises:
      ValueError: unless the column is `natural` or `<norm> <radius>/255[ <attack>]`.
    """
    norm, radius, attack = _parse(column)
    rank = _NORMS.index(norm) if norm in _NORMS else len(_NORMS)
    return rank, norm, radius, attack


def short_column(column: str) -> str:
    """Returns a column's name without the unit of its radius.

    >>> short_column("linf 8/255")
    'linf 8'
    """
    return column.replace("/255", "")


def short_label(label: str) -> str:
    """Returns a row's label without brackets, parameter names and units.

    >>> short_label("AT (linf, eps = 8/255)"), short_label("SAM (rho = 0.2)")
    ('AT linf 8', 'SAM 0.2')
    """
    label = re.sub(r"\w+ *= *", "", label.replace("/255", ""))
    return " ".join(re.sub(r"[(),]", " ", label).split())
