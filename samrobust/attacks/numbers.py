"""Numbers that attacks are configured with, checked and named in refusals."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from samrobust.checks import check
from samrobust.types import Array

__all__ = ["real", "real_or_each", "seen", "whole"]


def real(**one: Any) -> float:
    """Returns the one argument as a float, which promotes no dtype.

    Raises:
      ValueError: unless it is a real number, of Python or NumPy or an array of one.

    >>> real(radius="8")
    Traceback (most recent call last):
    samrobust.checks.CheckError: Expected a number for radius, got radius='8'.
    """
    ((name, value),) = one.items()
    is_real = isinstance(value, (int, float, np.integer, np.floating)) or (
        _is_floating(value) and value.ndim == 0
    )
    check(is_real and not isinstance(value, bool), f"a number for {name}", **one)
    return float(value)


def real_or_each(**one: Any) -> float | Array:
    """Returns the one argument as a float, or as the array it is: traced, or [B].

    Raises:
      ValueError: unless it is a real number, or a floating array of rank 0 or 1.
    """
    ((_, value),) = one.items()
    is_each = _is_floating(value) and value.ndim == 1
    is_traced = isinstance(value, Tracer) and value.ndim == 0
    return value if is_each or (is_traced and _is_floating(value)) else real(**one)


def whole(least: int, /, **one: Any) -> int:
    """Returns the one argument as an int.

    Raises:
      ValueError: unless it is a whole number, of Python or NumPy, and not below.

    >>> whole(1, num_steps=10.0)
    Traceback (most recent call last):
    samrobust.checks.CheckError: Expected a whole number for num_steps, got \
num_steps=10.0.
    """
    ((name, value),) = one.items()
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    check(is_whole, f"a whole number for {name}", **one)
    number = operator.index(value)
    check(number >= least, f"{name} >= {least}", **one)
    return number


def seen(value: Any) -> np.ndarray:
    """Returns the concrete numbers: all of them, or none.

    A traced array has none yet; one that spans processes has not all of them here.
    """
    is_traced = isinstance(value, Tracer)
    if is_traced or not getattr(value, "is_fully_addressable", True):
        return np.empty(0)
    return np.ravel(np.asarray(value))


def _is_floating(value: Any) -> bool:
    is_array = isinstance(value, (np.ndarray, jax.Array))
    return is_array and bool(jnp.issubdtype(value.dtype, jnp.floating))
