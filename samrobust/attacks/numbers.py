"""Numbers that attacks are configured with: what is none is refused by its name."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samrobust.checks import check

__all__ = ["real", "whole"]


def real(**one: Any) -> float:
    """The one argument as a float, which does not decide about dtypes.

    Raises:
      ValueError: unless it is a real number, of Python or NumPy or an array of one.

    >>> real(radius="8")
    Traceback (most recent call last):
    ValueError: Expected a number for radius, got radius='8'.
    """
    ((name, value),) = one.items()
    is_real = isinstance(value, (int, float, np.integer, np.floating)) or (
        isinstance(value, (np.ndarray, jax.Array))
        and value.ndim == 0
        and jnp.issubdtype(value.dtype, jnp.floating)
    )
    check(is_real and not isinstance(value, bool), f"a number for {name}", **one)
    return float(value)


def whole(**one: Any) -> int:
    """The one argument as an int.

    Raises:
      ValueError: unless it is a whole number, of Python or NumPy.

    >>> whole(num_steps=10.0)
    Traceback (most recent call last):
    ValueError: Expected a whole number for num_steps, got num_steps=10.0.
    """
    ((name, value),) = one.items()
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    check(is_whole, f"a whole number for {name}", **one)
    return operator.index(value)
