"""A loop over training steps, in which the small work between two steps is joined."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.flatten_util import ravel_pytree

from samrobust.attacks.casts import split_casts
from samrobust.types import Array, PyTree

__all__ = ["repeat"]


def repeat(step: Callable[[Any], Any], carry: Any, times: int) -> Any:
    """Applies a function again and again to what it returns, in a compiled loop.

    What the loop carries is not the tree itself. Small arrays, such as BatchNorm's
    parameters, are joined to one: apart, each would be updated by a kernel of its own.
    And what a step casts, weights to bfloat16, is cast as soon as it is updated, in the
    same kernel, and not read again for that.

    Args:
      step: of a tree of arrays to one like it; traced once.
      carry: the first tree.
      times: how often.

    Returns:
      The last tree, the same as by calls of `step` up to rounding.
    """
    packed, unpack = _pack(carry)
    leaves, structure = jax.tree.flatten(packed)

    def step_of_leaves(*leaves: Array) -> list[Array]:
        following = step(unpack(jax.tree.unflatten(structure, leaves)))
        return jax.tree.leaves(_pack(following)[0])

    closed = jax.make_jaxpr(step_of_leaves)(*leaves)
    real = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    variables = [closed.jaxpr.invars[i] for i in real]
    jaxpr, casts = split_casts(closed.jaxpr, variables)
    distinct = list(dict.fromkeys(casts))

    def with_casts(leaves: Sequence[Array]) -> tuple[Sequence[Array], list[Array]]:
        return leaves, [leaves[real[i]].astype(dtype) for i, dtype in distinct]

    def body(carry: Any, _: None) -> tuple[Any, None]:
        leaves, values = carry
        consts = [values[distinct.index(cast)] for cast in casts] + closed.consts
        run = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))
        return with_casts(run(*leaves)), None

    (leaves, _), _ = jax.lax.scan(body, with_casts(leaves), length=times)
    return unpack(jax.tree.unflatten(structure, leaves))


def _pack(tree: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Returns the packed tree, and the function that unpacks it."""
    leaves, structure = jax.tree.flatten(tree)
    is_small = [leaf.ndim <= 1 and leaf.dtype == jnp.float32 for leaf in leaves]

    def chosen(which: bool) -> list[Any]:
        return [x for x, small in zip(leaves, is_small, strict=True) if small == which]

    joined, separate = ravel_pytree(chosen(True))

    def unpack(packed: PyTree) -> PyTree:
        small, large = iter(separate(packed[0])), iter(packed[1])
        ordered = [next(small if is_one else large) for is_one in is_small]
        return jax.tree.unflatten(structure, ordered)

    return (joined, chosen(False)), unpack
