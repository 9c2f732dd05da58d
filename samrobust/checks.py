"""Validation of arguments: one form of message for every public function.

A message names the condition, the argument and its value, and what to do:
`Expected 0 <= rho, got rho=-0.1.` It is one line, and short whatever the value. Checks
run where a function is configured, never inside a compiled computation or a running
job.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

__all__ = [
    "BATCH_NORM",
    "BATCH_STATS",
    "LARGEST_COUNT",
    "LARGEST_REAL",
    "LARGEST_SEED",
    "NORMS",
    "CheckError",
    "Rule",
    "amount",
    "below_one",
    "check",
    "check_choice",
    "check_path",
    "check_radius",
    "check_real",
    "check_strength",
    "check_whole",
    "count",
    "each",
    "maybe",
    "naming",
    "one_of",
    "share",
    "shorten",
    "switch",
    "text",
]

# Called as `rule(**{field: value})`; raises ValueError.
Rule: TypeAlias = Callable[..., None]

LARGEST_SEED = 2**32 - 1  # JAX keeps the low 32 bits: 2**32 would be seed 0
LARGEST_COUNT = 2**31 - 1  # steps, sizes and indices are int32 on the device
LARGEST_REAL = 3e38  # finite in float32

_READABLE = 240  # characters of a value in a message

NORMS = ("linf", "l2")
BATCH_STATS = ("first", "second", "both")  # passes that update running statistics
BATCH_NORM = ("train", "eval")  # as which a network behaves that is attacked
# A ball of this radius in 1/255 units holds every image, in l2 of 2,000 x 2,000 x 3.
_WHOLE_BOX = {"linf": 255.0, "l2": 1e6}
# A smaller radius must be in another unit. An l2 ball of 1/255 moves no pixel by more
# than one of 255 levels; in linf 1/2 or 1/4 of a level occurs, 1/10 never.
_SMALLEST = {"linf": 0.1, "l2": 1.0}


class CheckError(ValueError):
    """A condition that does not hold: `Expected <condition>, got <values>. <fix>`."""

    def __init__(self, condition: str, got: str, fix: str = ""):
        super().__init__(condition, got, fix)
        self._condition, self._got, self._fix = condition, got, fix

    def __str__(self) -> str:
        return f"Expected {self._condition}, got {self._got}. {self._fix}".rstrip()

    def renamed(self, names: Mapping[str, str]) -> "CheckError":
        """Returns it with other names of arguments, such as a config's fields.

        Args:
          names: as they stand in the condition, before a value, or with it
            (`grouped=True`), to what is to stand there.
        """

        def full(text: str, end: str) -> str:
            for name, other in names.items():
                after = r"(?=, |$)" if "=" in name else end
                pattern = rf"(?<![\w.]){re.escape(name)}{after}"
                text = re.sub(pattern, lambda _, other=other: other, text)
            return text

        value = r"(?==)"  # other words of a sentence may be the same
        texts = (self._condition, r"(?=\W|$)"), (self._got, value), (self._fix, value)
        return CheckError(*(full(*text) for text in texts))


def check(holds: bool, condition: str, fix: str = "", /, **values: Any) -> None:
    """Raises `CheckError`, a `ValueError` with the usual message, unless `holds`.

    Args:
      holds: whether the condition is met.
      condition: the condition in words or symbols, as in `"0 <= rho"`.
      fix: an optional sentence that says what to do.
      **values: the arguments that the condition speaks of, by their names.

    Raises:
      ValueError: `Expected <condition>, got <name>=<value>. <fix>`

    >>> check(False, "0 <= rho", rho=-0.1)
    Traceback (most recent call last):
    samrobust.checks.CheckError: Expected 0 <= rho, got rho=-0.1.
    """
    if not holds:
        got = ", ".join(f"{name}={_show(value)}" for name, value in values.items())
        raise CheckError(condition, got, fix)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Puts a name before the message of a check that fails inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _show(value: Any) -> str:
    """Returns the value as written in Python; huge integers have no such form."""
    try:
        return shorten(repr(value))
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} of {value.bit_length()} bits"


def shorten(text: str, most: int = _READABLE) -> str:
    """Puts a text on one line and leaves out the middle of a long one.

    >>> len(shorten("x" * 10_000)) < 300
    True
    """
    line = re.sub(r"\s*[\r\n]+\s*", " ", text).strip()
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(line) <= most:
        return line
    half = most // 2
    left_out = len(line) - 2 * half
    return f"{line[:half]}...({left_out} characters)...{line[-half:]}"


def check_choice(choices: Collection[str], /, **values: Any) -> None:
    """Raises `ValueError` unless every value is one of `choices`.

    >>> check_choice(("linf", "l2"), norm="l1")
    Traceback (most recent call last):
    samrobust.checks.CheckError: Expected norm in {linf, l2}, got norm='l1'.
    """
    for name, value in values.items():
        options = ", ".join(choices)
        known = isinstance(value, str) and value in choices
        check(known, f"{name} in {{{options}}}", **{name: value})


def check_whole(low: int, high: int = LARGEST_COUNT, /, **values: Any) -> None:
    """Raises `ValueError` unless every value is an `int`, and in the range.

    >>> check_whole(1, epochs=2.5)
    Traceback (most recent call last):
    samrobust.checks.CheckError: Expected a whole number for epochs, got epochs=2.5.
    """
    for name, value in values.items():
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        fix = _as_python(name, value)
        check(is_whole, f"a whole number for {name}", fix, **{name: value})
        check(low <= value, f"{low} <= {name}", **{name: value})
        check(value <= high, f"{name} <= {high}", **{name: value})


def check_real(low: float, high: float, /, **values: Any) -> None:
    """Raises `ValueError` unless every value is a number in the range, thus finite.

    >>> check_real(0, 1, momentum=float("nan"))
    Traceback (most recent call last):
    samrobust.checks.CheckError: Expected 0 <= momentum, got momentum=nan.
    """
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fix = _as_python(name, value)
        check(is_number, f"a number for {name}", fix, **{name: value})
        check(low <= value, f"{low:g} <= {name}", **{name: value})
        check(value <= high, f"{name} <= {high:g}", **{name: value})


def _as_python(name: str, value: Any) -> str:
    """Returns how a NumPy scalar becomes a number of Python, which has no dtype."""
    return f"Give {name}.item()." if hasattr(value, "item") else ""


def check_radius(norm: str, /, **values: Any) -> None:
    """Raises `ValueError` unless every value is a radius > 0 in 1/255 units.

    Pixel units are recognized by their size, and larger ones by their digits: 0.12549
    is 32/255 written out, 0.125 an eighth of a level. A radius also names a column, so
    it may not have more digits than are printed.

    >>> check_radius("linf", epsilon=0.03137)
    Traceback (most recent call last):
    samrobust.checks.CheckError: Expected epsilon in 255ths, 0.1 or more, got \
epsilon=0.03137. Radii are in 1/255 units: did you mean 8?
    """
    low, high = _SMALLEST[norm], _WHOLE_BOX[norm]
    units = "Radii are in 1/255 units:"
    for name, value in values.items():
        check_real(0, float("inf"), **{name: value})
        check(value > 0, f"0 < {name}", **{name: value})
        fix = f"{units} 8 means 8/255."
        check(value <= high, f"{name} <= {high:,.0f}", fix, **{name: value})
        fix = f"{units} did you mean {round(255 * value, 1) or 8:g}?"
        mistaken = value < low or (value < 1 and _is_written_out(value))
        check(not mistaken, f"{name} in 255ths, {low:g} or more", fix, **{name: value})
        fix = f"Write {value:g}: columns are named by it."
        is_printed = float(f"{value:g}") == value
        check(is_printed, f"six digits for {name}", fix, **{name: value})


def _is_written_out(radius: float) -> bool:
    """Tells a radius k/255 in pixel units: many digits, and whole times 255."""
    many = float(f"{radius:.3g}") != radius
    return many and abs(255 * radius - round(255 * radius)) < 0.02


def check_strength(**values: Any) -> None:
    """Refuses strengths, except 0, that are lost in float32's rounding of weights."""
    check_real(0, 1e3, **values)
    for name, value in values.items():
        rounds_away = 0 < value < 1e-5
        check(not rounds_away, f"1e-05 <= {name}", "0 is off.", **{name: value})


def check_path(**values: Any) -> None:
    """Raises `ValueError` unless every value can name a local file or folder.

    >>> check_path(workdir="")
    Traceback (most recent call last):
    samrobust.checks.CheckError: Expected a local path for workdir, got workdir=''.
    """
    for name, value in values.items():
        holds = (
            isinstance(value, str)
            and value.strip() != ""
            and value.isprintable()
            and "://" not in value
        )
        check(holds, f"a local path for {name}", **{name: value})


def one_of(*choices: str) -> Rule:
    """Returns the rule that a value is one of the choices."""
    return partial(check_choice, choices)


def maybe(rule: Rule) -> Rule:
    """Returns the rule, or None."""

    def check_maybe(**values: Any) -> None:
        rule(**{name: value for name, value in values.items() if value is not None})

    return check_maybe


def each(rule: Rule, *, least: int = 0, most: int = 100) -> Rule:
    """Returns the rule for all of a tuple, or JSON's list, of so many values."""

    def check_each(**values: Any) -> None:
        for name, value in values.items():
            holds = isinstance(value, tuple | list) and least <= len(value) <= most
            check(holds, f"a tuple of {least} to {most} values for {name}", **values)
            for item in value:
                rule(**{name: item})

    return check_each


def count(**values: Any) -> None:
    """Raises `ValueError` unless every value is a whole number, 1 at least."""
    check_whole(1, **values)


def share(**values: Any) -> None:
    """Raises `ValueError` unless every value is in [0, 1]."""
    check_real(0, 1, **values)


def below_one(**values: Any) -> None:
    """Raises `ValueError` unless every value is in [0, 1), as float32 has it."""
    check_real(0, 1, **values)
    for name, value in values.items():
        check(value <= 1 - 1e-7, f"{name} < 1", **{name: value})


def amount(**values: Any) -> None:
    """Raises `ValueError` unless every value is in [0, 1e6]."""
    check_real(0, 1e6, **values)


def text(**values: Any) -> None:
    """Raises `ValueError` unless every value is a string, and can be printed."""
    for name, value in values.items():
        holds = isinstance(value, str) and value.isprintable()
        check(holds, f"printable text for {name}", **{name: value})


def switch(**values: Any) -> None:
    """Raises `ValueError` unless every value is True or False."""
    for name, value in values.items():
        check(isinstance(value, bool), f"True or False for {name}", **{name: value})
