"""A loop over training steps, in which the small work between two steps is joined."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.flatten_util import ravel_pytree

from samrobust.attacks.casts import split_casts
from samrobust.system.jaxprs import equations
from samrobust.types import Array

__all__ = ["repeat"]


def repeat(step: Callable[[Any], Any], carry: Any, times: int) -> Any:
    """Applies a function again and again to what it returns, in a compiled loop.

    What the loop carries is not the tree itself. Small arrays, such as BatchNorm's
    parameters, are joined to one: apart, each would be updated by a kernel of its own.
    Not where the step has a loop in it, an attack's, which wants each by itself again.
    And what a step casts, weights to bfloat16, is cast as soon as it is updated, in the
    same kernel, and not read again for that.

    Args:
      step: of a tree of arrays to one like it; traced once.
      carry: the first tree.
      times: how often.

    Returns:
      The last tree, the same as by calls of `step` up to rounding.
    """
    leaves, structure = jax.tree.flatten(carry)

    def step_of_leaves(*leaves: Array) -> list[Array]:
        return jax.tree.leaves(step(jax.tree.unflatten(structure, leaves)))

    closed = jax.make_jaxpr(step_of_leaves)(*leaves)
    names = {equation.primitive.name for equation in equations(closed.jaxpr)}
    joins = names.isdisjoint(("while", "scan"))
    small = [x for x, leaf in enumerate(leaves) if joins and _is_small(leaf)]
    large = [x for x in range(len(leaves)) if x not in small]
    _, separate = ravel_pytree([leaves[x] for x in small])
    wide = [x for x in large if jnp.issubdtype(leaves[x].dtype, jnp.floating)]
    jaxpr, casts = split_casts(closed.jaxpr, [closed.jaxpr.invars[x] for x in wide])
    distinct = list(dict.fromkeys(casts))

    def pack(leaves: Sequence[Array]) -> Any:
        joined, _ = ravel_pytree([leaves[x] for x in small])
        cast = [leaves[wide[x]].astype(dtype) for x, dtype in distinct]
        return [leaves[x] for x in large], joined, cast

    def unpack(packed: Any) -> list[Array]:
        alone, joined, _ = packed
        found = dict(zip([*large, *small], [*alone, *separate(joined)], strict=True))
        return [found[x] for x in range(len(leaves))]

    def body(packed: Any, _: None) -> tuple[Any, None]:
        consts = [packed[2][distinct.index(cast)] for cast in casts] + closed.consts
        run = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))
        return pack(run(*unpack(packed))), None

    packed, _ = jax.lax.scan(body, pack(leaves), length=times)
    return jax.tree.unflatten(structure, unpack(packed))


def _is_small(array: Array) -> bool:
    return array.ndim <= 1 and array.dtype == jnp.float32
