"""Casts of a classifier's parameters, out of the loops that call it step by step.

A network casts its parameters to the dtype that it computes in. XLA leaves the casts in
the body of an attack's loop: for each layer a kernel in each step, that reads six bytes
a parameter.
"""

from collections.abc import Callable

import jax
from jax.extend import core

from samrobust.types import Array

__all__ = ["cast_once"]


def cast_once(logits_fn: Callable[[Array], Array], images: Array) -> Callable:
    """Returns the classifier with the arrays that it closes over cast already.

    Args:
      logits_fn: traced once, here.
      images: that it is to be called on; shape and dtype alone count.

    Returns:
      A function of arrays like the images.
    """
    closed = jax.make_jaxpr(logits_fn)(images)
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    equations = []
    for equation in jaxpr.eqns:
        is_cast = equation.primitive.name == "convert_element_type"
        if is_cast and equation.invars[0] in values:
            (array,), (result,) = equation.invars, equation.outvars
            values[result] = values[array].astype(result.aval.dtype)
        else:
            equations.append(equation)
    jaxpr = jaxpr.replace(constvars=list(values), eqns=equations)
    run = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, list(values.values())))
    return lambda images: run(images)[0]
