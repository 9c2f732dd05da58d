"""Values of flags: what is read, and what is refused before any work starts."""

import argparse
import os
from collections.abc import Callable
from typing import Any

from samrobust.checks import (
    LARGEST_COUNT,
    LARGEST_SEED,
    check,
    check_choice,
    check_path,
    check_radius,
    check_real,
    check_whole,
)

__all__ = [
    "count",
    "counts",
    "few",
    "file_and_row",
    "local_path",
    "names_of",
    "positive",
    "radii",
    "reals",
    "row_names",
    "seed",
    "size",
    "sizes",
]


def _kind(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A `type` for argparse, which puts the flag's name before a refusal's reason."""

    def kind(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return kind


def _whole(low: int, high: int = LARGEST_COUNT) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = _number(int, text)
        check_whole(low, high, value=value)
        return value

    return read


def _real(low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = _number(float, text)
        check_real(low, high, value=value)
        return value

    return read


def _number(kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        check(False, "a whole number" if kind is int else "a number", value=text)
        raise


def _each(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Values separated by commas, at least one."""

    def read_each(text: str) -> tuple[Any, ...]:
        words = text.split(",")
        check(all(words), "values separated by commas", value=text)
        return tuple(read(word) for word in words)

    return read_each


def _read_path(text: str) -> str:
    path = os.path.expanduser(text)
    check_path(value=path)
    fix = "The shell has not filled it in."
    check(not path.startswith(("~", "$")), "a local path", fix, value=text)
    return path


def _read_text(text: str) -> str:
    check(bool(text.strip(" ;")) and text.isprintable(), "a name", value=text)
    return text


local_path = _kind(_read_path)
file_and_row = row_names = _kind(_read_text)  # looked up when they are needed
count = _kind(_whole(1))
size = _kind(_whole(0))
seed = _kind(_whole(0, LARGEST_SEED))
positive = _kind(_real(1e-30, 1e30))
few = _kind(_whole(1, 10_000))  # of what this process lists or starts one by one
counts = _kind(_each(_whole(1)))
sizes = _kind(_each(_whole(0)))
reals = _kind(_each(_real(-1e30, 1e30)))


def radii(norm: str) -> Callable[[str], Any]:
    """`8,16` as (8.0, 16.0), radii of balls of this norm in 1/255; `` as none."""

    def read(text: str) -> float:
        value = _number(float, text)
        check_radius(norm, value=value)
        return value

    each = _each(read)
    return _kind(lambda text: each(text) if text else ())


def names_of(*options: str) -> Callable[[str], Any]:
    """`a,b` as ("a", "b"), each of them one of the options."""

    def read(text: str) -> str:
        check_choice(options, value=text)
        return text

    return _kind(_each(read))
