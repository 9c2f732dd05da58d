"""Kinds of flags: what argparse is told of each, and which values are refused.

    add("--num-steps", **COUNT, help="of PGD; default: 20")

No JAX here: `--help` stays quick, and a bad flag is refused at once.
"""

import argparse
import functools
import inspect
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from samrobust import checks
from samrobust.system.runtime import RESUME
from samrobust.system.storage import to_path

__all__ = [
    "ANY_FIELD",
    "CHECKPOINT",
    "COLUMN",
    "CONFIG",
    "COUNT",
    "COUNTS",
    "DIRECTORY",
    "FEW",
    "FILE",
    "FOLDER",
    "LOSS",
    "MEMBERS",
    "ONE_ROW",
    "POSITIVE",
    "PRECISION",
    "REALS",
    "ROWS",
    "SEED",
    "SHARED",
    "SIZE",
    "SIZES",
    "STEP",
    "SWITCH",
    "TEXT",
    "VERSION",
    "WORKDIR",
    "build",
    "given",
    "names_of",
    "radii",
]

_Read: TypeAlias = Callable[[str], Any]
_Kind: TypeAlias = dict[str, Any]
_T = TypeVar("_T")


def _kind(read: _Read, metavar: str) -> _Kind:
    """Returns a kind whose refusals argparse shows behind the flag's name."""

    def checked(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return {"type": checked, "metavar": metavar}


def _number(convert: Callable[[str], float], rule: checks.Rule) -> _Read:
    """Returns the reader of a number that a rule accepts."""

    def read(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            fix = "Radii are in 1/255 units: 8 means 8/255." if "/255" in text else ""
            checks.check(
                False, f"a {'whole ' * (convert is int)}number", fix, value=text
            )
            raise
        rule(value=value)
        return value

    return read


def _whole(*bounds: int) -> _Read:
    return _number(int, functools.partial(checks.check_whole, *bounds))


def _real(low: float, high: float) -> _Read:
    return _number(float, functools.partial(checks.check_real, low, high))


def _each(read: _Read) -> _Read:
    """Returns the reader of one or more values, separated by commas."""

    def read_each(text: str) -> tuple[Any, ...]:
        words = text.split(",")
        checks.check(all(words), "values separated by commas", value=text)
        return tuple(read(word) for word in words)

    return read_each


def _path(text: str) -> str:
    path = os.path.expanduser(text)
    checks.check_path(value=path)
    fix = "The shell did not expand it."
    checks.check(not path.startswith(("~", "$")), "a local path", fix, value=text)
    return path


def _workdir(text: str) -> pathlib.Path:
    return to_path(text if "://" in text else _path(text))


def _name(text: str) -> str:
    """Reads the name of a row or of a config, which is looked up when it is used."""
    checks.check(bool(text.strip(" ;")) and text.isprintable(), "a name", value=text)
    return text


def names_of(*options: str) -> _Kind:
    """Returns the kind of `a,b`, read as ("a", "b"): each is one of the options."""

    def read(text: str) -> str:
        checks.check_choice(options, value=text)
        return text

    return _kind(_each(read), "NAMES")


def radii(norm: str) -> _Kind:
    """Returns the kind of `8,16`, radii in 1/255; `` is none of this norm."""
    each = _each(_number(float, functools.partial(checks.check_radius, norm)))
    return _kind(lambda text: each(text) if text else (), "E,...")


def given(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Returns those of some flags that are given; of several values a tuple."""
    found = {name: values.get(name) for name in names}
    found |= {n: tuple(value) for n, value in found.items() if isinstance(value, list)}
    return {n: value for n, value in found.items() if value is not None}


def build(make: Callable[..., _T], arguments: argparse.Namespace, **own: Any) -> _T:
    """Builds a dataclass of the flags that are given; its defaults for the rest."""
    names = inspect.signature(make).parameters
    return make(**given(vars(arguments), names) | own)


def _column(text: str) -> str:
    """Reads the name of a table's column."""
    from samrobust.experiments.reporting.names import split_column

    split_column(text)
    return text


DIRECTORY, FILE = _kind(_path, "DIR"), _kind(_path, "FILE")
FOLDER: _Kind = {**DIRECTORY, "help": "default: %(default)s"}
WORKDIR = _kind(_workdir, "DIR")  # or gs://BUCKET/FOLDER, s3://BUCKET/FOLDER
COUNT, SIZE = _kind(_whole(1), "N"), _kind(_whole(0), "N")
SEED = _kind(_whole(0, checks.LARGEST_SEED), "N")
FEW = _kind(_whole(1, 10_000), "N")  # of what is listed or started one by one
COUNTS, SIZES = _kind(_each(_whole(1)), "N,..."), _kind(_each(_whole(0)), "N,...")
POSITIVE = _kind(_real(1e-30, 1e30), "X")
REALS = _kind(_each(_real(-1e30, 1e30)), "X,...")
SWITCH: _Kind = {"action": "store_const", "const": True}  # None where it is not given
COLUMN = _kind(_column, "COLUMN")
CONFIG: _Kind = {**_kind(_name, "FILE"), "help": "default: %(default)s"}
ONE_ROW = _kind(_name, "FILE:ROW")
ROWS: _Kind = {**_kind(_name, "ROW"), "action": "append"}
TEXT = _kind(_name, "TEXT")  # on one line
CHECKPOINT: _Kind = {
    "choices": ("last", "best"),
    "help": "default: as the run; of both, last",
}
STEP: _Kind = {**SIZE, "help": "of the checkpoint; default: the newest"}
LOSS: _Kind = {"choices": ("cross_entropy", "margin")}
PRECISION: _Kind = {"choices": ("float32", "bfloat16")}
VERSION: _Kind = {
    "choices": ("standard", "rand", "custom"),
    "help": "of AutoAttack; default: the run's, else standard; rand: for random logits",
}
MEMBERS: _Kind = {
    **names_of("apgd-ce", "apgd-t", "fab-t", "square", "apgd-dlr"),
    "help": "with --version=custom: of apgd-ce, apgd-t, fab-t, square, apgd-dlr",
}
ANY_FIELD = "Any field: --config.training.epochs=2; `samrobust config` lists them."
SHARED = f"{RESUME} Several workers may share a workdir: each takes runs of its own."
