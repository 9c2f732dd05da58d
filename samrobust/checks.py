"""Validation of arguments: one form of message for every public function.

A message names the condition, the argument and its value, and what to do:
`Expected 0 <= rho, got rho=-0.1.` Checks run where a function is configured,
never inside a compiled computation or a running job.
"""

from collections.abc import Collection
from typing import Any

__all__ = ["check", "check_choice"]


def check(holds: bool, condition: str, fix: str = "", /, **values: Any) -> None:
    """Raises `ValueError` with the field's usual message unless `holds`.

    Args:
      holds: whether the condition is met.
      condition: the condition in words or symbols, as in `"0 <= rho"`.
      fix: an optional sentence that says what to do.
      **values: the arguments that the condition speaks of, by their names.

    Raises:
      ValueError: `Expected <condition>, got <name>=<value>. <fix>`

    >>> check(False, "0 <= rho", rho=-0.1)
    Traceback (most recent call last):
    ValueError: Expected 0 <= rho, got rho=-0.1.
    """
    if not holds:
        got = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise ValueError(f"Expected {condition}, got {got}. {fix}".rstrip())


def check_choice(choices: Collection[str], **values: str) -> None:
    """Raises `ValueError` unless every value is one of `choices`.

    >>> check_choice(("linf", "l2"), norm="l1")
    Traceback (most recent call last):
    ValueError: Expected norm in {linf, l2}, got norm='l1'.
    """
    for name, value in values.items():
        options = ", ".join(choices)
        check(value in choices, f"{name} in {{{options}}}", **{name: value})
