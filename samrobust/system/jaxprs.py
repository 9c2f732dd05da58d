"""Tracing of programs, and reading of what was traced."""

from collections.abc import Iterator
from typing import Any

import jax

__all__ = ["abstract_key", "equations"]


def abstract_key() -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a key, for `jax.eval_shape`."""
    return jax.eval_shape(lambda: jax.random.key(0))


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
