"""Casts of parameters, out of the loops that would repeat them.

A network casts its parameters to the dtype that it computes in. XLA leaves the casts in
the body of a loop: for each layer a kernel in each step, that reads six bytes a
parameter.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from samrobust.types import Array

__all__ = ["cast_once", "split_casts"]


def cast_once(logits_fn: Callable[[Array], Array], images: Array) -> Callable:
    """Returns the classifier with the arrays that it closes over cast already.

    Args:
      logits_fn: traced once, here.
      images: that it is to be called on; shape and dtype alone count.

    Returns:
      A function of arrays like the images.
    """
    closed = jax.make_jaxpr(logits_fn)(images)
    jaxpr, casts = split_casts(closed.jaxpr, closed.jaxpr.constvars)
    consts = [closed.consts[index].astype(dtype) for index, dtype in casts]
    closed = core.ClosedJaxpr(jaxpr, [*consts, *closed.consts])
    return lambda images: core.jaxpr_as_fun(closed)(images)[0]


def split_casts(
    jaxpr: core.Jaxpr, variables: Sequence[Any]
) -> tuple[core.Jaxpr, list[tuple[int, Any]]]:
    """Takes the casts of some variables out of a jaxpr.

    Args:
      jaxpr: of whose own equations casts are taken, and not of those inside them.
      variables: of it.

    Returns:
      The jaxpr with further constants before its own, and for each of them the index of
      the variable and the dtype that it is cast to. The same cast may be there twice.
    """
    index = {variable: number for number, variable in enumerate(variables)}
    results, casts, equations = [], [], []
    for equation in jaxpr.eqns:
        source = equation.invars[0] if equation.invars else None
        is_cast = equation.primitive.name == "convert_element_type"
        if is_cast and isinstance(source, core.Var) and source in index:
            results.append(equation.outvars[0])
            casts.append((index[source], equation.params["new_dtype"]))
        else:
            equations.append(equation)
    constants = [*results, *jaxpr.constvars]
    return jaxpr.replace(constvars=constants, eqns=equations), casts
