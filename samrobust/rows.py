"""Rows of a table: a training method and its strength, as the paper's tables have them.

    st        sam,rho=0.2        at,norm=linf,eps=8        at+sam,norm=l2,eps=64,rho=0.1

A row has one spelling, since directories are named by it, and a strength above 0: with
none it would be another row. Radii (eps) are in 1/255 units.
"""

import dataclasses

from samrobust.checks import check, check_choice, check_radius, check_real

__all__ = ["Row", "parse_row"]

# Smaller perturbations round away in float32 weights: ST under the name of SAM.
_RHO = (1e-5, 1e3)

_OPTIONS = {
    "st": (),
    "sam": ("rho",),
    "at": ("norm", "eps"),
    "at+sam": ("norm", "eps", "rho"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: a training method and its strength.

    Attributes:
      method: one of st, sam, at, at+sam.
      norm: of the training attack, linf or l2; None without one.
      eps: radius of the training attack in 1/255 units; 0 without one.
      rho: SAM's radius in the l2 norm of all parameters; 0 without SAM.
    """

    method: str
    norm: str | None = None
    eps: float = 0.0
    rho: float = 0.0

    @property
    def name(self) -> str:
        """The row's one spelling: `sam,rho=0.2`."""
        values = {"norm": self.norm, "eps": f"{self.eps:g}", "rho": f"{self.rho:g}"}
        options = (f"{option}={values[option]}" for option in _OPTIONS[self.method])
        return ",".join((self.method, *options))

    @property
    def label(self) -> str:
        """The name in tables, as in the paper: `SAM (rho = 0.2)`."""
        attack = f"AT ({self.norm}, eps = {self.eps:g}/255)"
        sharpness = f"SAM (rho = {self.rho:g})"
        return {
            "st": "ST",
            "sam": sharpness,
            "at": attack,
            "at+sam": f"{attack} + {sharpness}",
        }[self.method]


def parse_row(row: str) -> Row:
    """Reads a row's name.

    Raises:
      ValueError: for an unknown method or option, a missing option, a value that is no
        number or out of range, or another spelling than `Row.name`.

    >>> parse_row("at,norm=linf,eps=8")
    Row(method='at', norm='linf', eps=8.0, rho=0.0)
    """
    check(isinstance(row, str) and row != "", "the name of a row", row=row)
    method, *items = row.split(",")
    check(method in _OPTIONS, f"method in {{{', '.join(_OPTIONS)}}}", row=row)
    options = {name: value for name, _, value in (i.partition("=") for i in items)}
    wanted = _OPTIONS[method]
    check(
        sorted(options) == sorted(wanted) and len(items) == len(wanted),
        f"the options {', '.join(wanted) or '(none)'} for the method {method}",
        "Examples: st; sam,rho=0.2; at,norm=linf,eps=8; at+sam,norm=l2,eps=64,rho=0.1.",
        row=row,
    )
    norm = options.get("norm")
    if norm is not None:
        check_choice(("linf", "l2"), norm=norm)
    eps, rho = (_number(options, name, row) for name in ("eps", "rho"))
    parsed = Row(method, norm, eps, rho)
    for name in ("eps", "rho"):
        check(
            name not in options or getattr(parsed, name) != 0,
            f"0 < {name}",
            f"With {name}=0 it is another row: {_without(parsed, name)}.",
            row=row,
        )
    if norm is not None:
        check_radius(norm, eps=eps)
    if "rho" in options:
        check_real(*_RHO, rho=rho)
    fix = "A row has one spelling: directories are named by it."
    check(row == parsed.name, f"the row {parsed.name!r}", fix, row=row)
    return parsed


def _without(row: Row, option: str) -> str:
    """The name of the row that is left when an option is 0."""
    left = [m for m in row.method.split("+") if option not in _OPTIONS[m]]
    return dataclasses.replace(row, method=left[0]).name if left else "st"


def _number(options: dict[str, str], name: str, row: str) -> float:
    try:
        return float(options.get(name, 0.0))
    except ValueError:
        check(False, f"a number for {name}", row=row)
        raise
