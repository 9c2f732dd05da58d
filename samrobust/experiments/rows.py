"""Rows of tables by name: parts joined by `+`, each `name,option=value`.

    st    sam,rho=0.2    at,norm=linf,eps=8    at,norm=linf,eps=8+asam,rho=0.5
    trades,norm=linf,eps=8,beta=6+awp,gamma=0.005+ema,decay=0.999

Parts stand in the order of the composition: adversary, objective (with its own
adversary, or on the images of the one before it), sharpness, averaging.
`st`, standard training, has no part. A row has one spelling, since directories are
named by it, and strengths above 0: with none it would be another row (of somebody's own
parts we know nothing). Radii (eps) are in 1/255 units. `start`, a last option of `at`,
FGSM-RS, N-FGSM and sharpness, is the fraction of the epochs after which the part is on:

    sam,rho=0.4,start=0.8    at,norm=linf,eps=8,start=0.8

Other fields of a config that a row changes stand at its end, by their full names in the
order of the alphabet; those of a part that it lacks are refused:

    st,training.epochs=40    sam,rho=0.2,sam.m=16,training.schedule=cosine
"""

import ast
import contextlib
import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from samrobust.checks import check
from samrobust.experiments import entries
from samrobust.experiments.entries import REGISTRIES, REGISTRY
from samrobust.system.fields import split_fields
from samrobust.system.resolve import is_reference
from samrobust.types import Field

__all__ = ["STANDARD", "Part", "Row", "modern_row", "parse_row"]

STANDARD = "st"
_EXAMPLES = (
    "Examples: st; sam,rho=0.2; at,norm=linf,eps=8; at,norm=l2,eps=64+sam,rho=0.1."
)


# Sections of a config that say how a table is made and judged, not what is trained.
_SHARED = ("evaluation", "checkpoint", "tracking", "paper")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a row: a name and the values of its options, in order."""

    name: str
    values: Mapping[str, Any]

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a config that the part sets, by their full names."""
        section = entries.section_of(self.name)
        fields = _options(self.name, self.values)
        return {f"{section}.{fields[key]}": value for key, value in self.values.items()}

    @property
    def spelling(self) -> str:
        """The part's one spelling: `sam,rho=0.2`."""
        options = (f"{key}={_shown(value)}" for key, value in self.values.items())
        return ",".join((self.name, *options))

    @property
    def label(self) -> str:
        """The name in tables: `SAM (rho = 0.2)`."""
        label = entries.find(self.name).label
        if label:
            late = entries.of_training(self.name, "start", self.values, 0.0)
            since = f" from {late:g} on" if late else ""
            return f"{label.format(**self.values)}{since}"
        name = self.name.rpartition(":")[2]
        options = ", ".join(f"{k} = {_shown(v)}" for k, v in self.values.items())
        return f"{name} ({options})" if options else name


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: a training method and its strengths; no part is `st`.

    Attributes:
      parts: in the order of the composition.
      others: further fields of a config that the row sets, by their full names.
    """

    parts: tuple[Part, ...] = ()
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fields(self) -> dict[str, Any]:
        """All fields of a config that the row sets, by their full names."""
        fields = dict(self.others)
        for part in self.parts:
            fields |= part.fields
        return fields

    @property
    def name(self) -> str:
        """The row's one spelling: `at,norm=linf,eps=8+sam,rho=0.2`."""
        method = "+".join(part.spelling for part in self.parts) or STANDARD
        others = (f"{name}={_shown(self.others[name])}" for name in sorted(self.others))
        return ",".join((method, *others))

    @property
    def method(self) -> str:
        """The parts' names: `at+sam`."""
        return "+".join(part.name for part in self.parts) or STANDARD

    @property
    def label(self) -> str:
        """The name in tables, as in the paper: `SAM (rho = 0.2)`."""
        label = " + ".join(part.label for part in self.parts) or "ST"
        others = [
            f"{self._in_words(name)} {_shown(value)}"
            for name, value in self.others.items()
        ]
        return f"{label} with {', '.join(others)}" if others else label

    def _in_words(self, field: str) -> str:
        """Returns the name of a field, with its section where several parts have it."""
        section, _, name = field.rpartition(".")
        having = [p for p in self.parts if name in entries.section_fields(p.name)]
        return (f"{section} {name}" if len(having) > 1 else name).replace("_", " ")


def _options(name: str, given: Mapping[str, Any]) -> Mapping[str, str]:
    """Returns a part's options, with `start` where it is given and there is one."""
    known = entries.options(name)
    late = "start" in given and "start" in entries.section_fields(name)
    return {**known, "start": "start"} if late else known


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse_row(row: str) -> Row:
    """Reads a row's name.

    Raises:
      ValueError: for an unknown part or option, a missing option, a value that is no
        number or out of range, parts in another order, or another spelling than
        `Row.name`.

    >>> parse_row("sam,rho=0.2").parts
    (Part(name='sam', values={'rho': 0.2}),)
    """
    check(isinstance(row, str) and row != "", "the name of a row", row=row)
    modern = modern_row(row)
    check(modern == row, f"the row {modern!r}", "Each part has its options.", row=row)
    method, others = _split_others(row)
    spellings = [] if method == STANDARD else re.split(r"\+(?=\s*[A-Za-z_])", method)
    parsed = Row(tuple(_parse_part(part, row) for part in spellings), others)
    names = [part.name for part in parsed.parts]
    check(len(set(names)) == len(names), "each part once", row=row)
    ordered = (p for names in REGISTRIES for p in parsed.parts if p.name in names)
    parts = (next(ordered) if p.name in REGISTRY else p for p in parsed.parts)
    name = Row(tuple(parts), others).name  # with the parts in their order
    fix = "A row has one spelling: directories are named by it."
    check(row == name, f"the row {name!r}", fix, row=row)
    return parsed


def modern_row(row: str) -> str:
    """Returns a row's name of today for one of versions that wrote `at+sam,norm=..`.

    >>> modern_row("at+sam,norm=linf,eps=8,rho=0.1")
    'at,norm=linf,eps=8+sam,rho=0.1'
    """
    old = re.fullmatch(r"at\+sam,(norm=[^,+]*,eps=[^,+]*),(rho=[^,+]*)", row)
    return f"at,{old[1]}+sam,{old[2]}" if old else row


def _split_others(row: str) -> tuple[str, dict[str, Any]]:
    """Returns a row without its fields of a config, and these with their values."""
    method, fields = split_fields(row)
    others = {}
    for name, value in fields:
        plain = re.fullmatch(r"[\w.-]+", value) is not None
        check(plain, f"letters, digits, _, . and - for {name}", row=row)
        check(name not in others, f"{name} once", row=row)
        section = name.partition(".")[0]
        fix = "All rows of a table have these alike: set them in the config file."
        check(section not in _SHARED, f"no field of {section}", fix, row=row)
        others[name] = value
        with contextlib.suppress(ValueError, SyntaxError):  # of words
            others[name] = ast.literal_eval(value)
    return method, dict(sorted(others.items()))


def _parse_part(spelling: str, row: str) -> Part:
    name, *items = map(str.strip, spelling.split(","))
    check(name != STANDARD, "st alone, without options or parts", row=row)
    given = {key: value for key, _, value in (item.partition("=") for item in items)}
    known = f"{{{', '.join((STANDARD, *REGISTRY))}}}"
    condition = f"parts in {known} or package.module:name"
    swapped = [known for known in REGISTRY if sorted(known) == sorted(name)]
    near = swapped or difflib.get_close_matches(name, REGISTRY, 1)
    fix = f"Did you mean {near[0]}? {_EXAMPLES}" if near else _EXAMPLES
    check(name in REGISTRY or is_reference(name), condition, fix, row=row)
    fields, wanted = entries.section_fields(name), _options(name, given)
    condition = f"the options {', '.join(wanted) or '(none)'} for {name}"
    complete = sorted(given) == sorted(wanted) and len(items) == len(wanted)
    check(complete, condition, _EXAMPLES, row=row)
    values = {}
    for option, field in wanted.items():
        value = _read(given[option], fields[field], option, row)
        if name in REGISTRY:
            left = "+".join(part for part in row.split("+") if part != spelling)
            fix = f"With {option}=0 it is another row: {left or STANDARD}."
            fix = "Leave it out." if option == "start" else fix
            check(value != 0, f"0 < {option}", fix, row=row)
        with entries.renamed({field: option}):
            fields[field].rule(**{field: value})
        if isinstance(value, float):
            fix = "Directories are named by it."
            holds = float(_shown(value)) == value
            check(holds, f"six digits for {option}", fix, row=row)
        values[option] = value
    entries.find(name).check(**values)
    return Part(name, values)


def _read(given: str, field: Field, option: str, row: str) -> Any:
    """Returns an option's value, of the type of its field."""
    kind = field.kind or type(field.default)
    if kind is str:
        plain = re.fullmatch(r"[\w.-]+", given) is not None
        check(plain, f"letters, digits, _, . and - for {option}", row=row)
        return given
    if kind is bool and given in ("True", "False"):
        return given == "True"
    try:
        return int(given) if kind is int else float(given)
    except ValueError:
        fix = "Radii are in 1/255 units: 8 means 8/255." if option == "eps" else ""
        wanted = {bool: "True or False", int: "a whole number"}.get(kind, "a number")
        check(False, f"{wanted} for {option}", fix, row=row)
        raise
