"""Arithmetic over pytrees of gradients, float32 or wider.

Each leaf is computed in its own precision, half precisions in float32; sums over leaves
in the widest of them. Complex leaves count as pairs of real numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from samrobust.types import Array, PyTree

__all__ = ["at_least_float32", "cosine", "mean_of_groups", "norm", "width", "zeros"]


def at_least_float32(leaf: Array) -> Array:
    """Returns the leaf in float32 or complex64, or as it is if it is wider."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _reals(tree: PyTree) -> list[Array]:
    """Returns the leaves, in float32 at least; of a complex one both parts."""
    leaves = map(at_least_float32, jax.tree.leaves(tree))
    parts = [
        (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,) for leaf in leaves
    ]
    return [part for pair in parts for part in pair]


def width(tree: PyTree) -> Any:
    """Returns the real dtype for sums over all leaves, float32 at least."""
    return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in _reals(tree)))


def norm(tree: PyTree) -> Array:
    """Returns the l2 norm of all leaves; squares can neither under- nor overflow."""
    dtype, leaves = width(tree), _reals(tree)
    if not leaves:
        return jnp.zeros([], dtype)
    largest = [jnp.max(jnp.abs(leaf), initial=0.0).astype(dtype) for leaf in leaves]
    # ||x|| = s ||x / s|| with s the largest entry, as BLAS's nrm2 does.
    scale = jnp.max(jnp.stack(largest))
    safe = jnp.where(scale > 0, scale, 1.0)
    squares = [jnp.sum(jnp.square(leaf / safe.astype(leaf.dtype))) for leaf in leaves]
    squares = [square.astype(dtype) for square in squares]
    return scale * jnp.sqrt(jnp.sum(jnp.stack(squares)))


def cosine(first: PyTree, second: PyTree, norms: tuple[Array, Array]) -> Array:
    """Returns the cosine between two trees with these norms; 0 if either is zero."""
    # Each factor is divided first: the product of two norms may overflow.
    one, other = (jnp.where(norm > 0, norm, 1.0) for norm in norms)
    total = jnp.zeros_like(one)
    for a, b in zip(_reals(first), _reals(second), strict=True):
        products = (a / one.astype(a.dtype)) * (b / other.astype(b.dtype))
        total += jnp.sum(products).astype(one.dtype)
    return total


def mean_of_groups(grads: PyTree, params: PyTree = None) -> PyTree:
    """Returns the mean over the first axis of every leaf, taken in at least float32."""
    del params
    return jax.tree.map(
        lambda g: jnp.mean(at_least_float32(g), axis=0).astype(g.dtype), grads
    )


def zeros(shape: tuple[int, ...], dtype: Any, like: PyTree) -> Array:
    """Returns zeros that vary over the axes of `jax.shard_map` as `like` does.

    A loop's carry must vary from its start over what it will vary over.
    """
    start = jnp.zeros(shape, dtype)
    for leaf in jax.tree.leaves(like):
        if isinstance(leaf, Tracer):
            start += jnp.zeros_like(leaf, dtype, shape=())
    return start
