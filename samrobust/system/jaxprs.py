"""Reading of traced programs."""

from collections.abc import Iterator
from typing import Any

import jax

__all__ = ["equations"]


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr, each before those of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from equations(inner)


def _inner(equation: Any) -> Iterator[Any]:
    for value in jax.tree.leaves(list(equation.params.values())):
        inner = getattr(value, "jaxpr", value)  # of a closed one
        if hasattr(inner, "eqns"):
            yield inner
