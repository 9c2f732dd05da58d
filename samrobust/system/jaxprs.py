"""Reading of traced programs."""

from collections.abc import Iterator
from typing import Any

import jax

__all__ = ["equations", "loop_depth"]


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr, each before those of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from equations(inner)


def loop_depth(jaxpr: Any) -> int:
    """Returns how many loops of a jaxpr stand in each other, at most."""

    def depth(equation: Any) -> int:
        within = max(map(loop_depth, _inner(equation)), default=0)
        return within + (equation.primitive.name in ("while", "scan"))

    return max(map(depth, jaxpr.eqns), default=0)


def _inner(equation: Any) -> Iterator[Any]:
    for value in jax.tree.leaves(list(equation.params.values())):
        inner = getattr(value, "jaxpr", value)  # of a closed one
        if hasattr(inner, "eqns"):
            yield inner
