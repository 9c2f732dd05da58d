"""Arithmetic over pytrees of gradients, float32 or wider.

Sums over leaves are taken in the widest of their precisions, in float32 at least.
Complex leaves count as pairs of real numbers.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import PartitionSpec

from samrobust.types import Array, PyTree

__all__ = [
    "at_least_float32",
    "cosine",
    "mean_norm_of_groups",
    "mean_of_groups",
    "norm",
    "normal_like",
    "of_length",
    "projection",
    "width",
    "zeros",
    "zeros_as",
]


def at_least_float32(leaf: Array) -> Array:
    """Returns the leaf in float32 or complex64, or as it is if it is wider."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _reals(tree: PyTree) -> list[Array]:
    """Returns the leaves, in float32 at least; of a complex one both parts."""
    leaves = map(at_least_float32, jax.tree.leaves(tree))
    parts = [
        (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,) for leaf in leaves
    ]
    return [part for pair in parts for part in pair]


def normal_like(tree: PyTree, key: Array) -> PyTree:
    """Returns standard normal numbers in the shapes and dtypes of a tree."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def width(tree: PyTree) -> Any:
    """Returns the real dtype for sums over all leaves, float32 at least."""
    return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in _reals(tree)))


def norm(tree: PyTree) -> Array:
    """Returns the l2 norm of all leaves; squares can neither under- nor overflow.

    In one pass over the leaves, where a scaling by the largest entry takes two: small,
    medium and large entries have a sum of squares each, scaled by its own power of two.

    Reference: Blue (1978), with the thresholds and scales of Anderson (2017), "Safe
    Scaling in the Level 1 BLAS".
    """
    dtype = width(tree)
    sizes = [jnp.abs(leaf.astype(dtype)) for leaf in _reals(tree)]
    info = jnp.finfo(dtype)
    low, high = (
        2.0 ** math.ceil(info.minexp / 2),
        2.0 ** math.floor((info.maxexp - info.nmant) / 2),
    )
    up, down = (
        2.0 ** -math.floor((info.minexp - info.nmant) / 2),
        2.0 ** -math.ceil((info.maxexp + info.nmant) / 2),
    )

    def total(part: Callable[[Array], Array]) -> Array:
        return _total([jnp.square(part(size)) for size in sizes], dtype)

    small = total(lambda size: jnp.where(size < low, size * up, 0.0))
    large = total(lambda size: jnp.where(size > high, size * down, 0.0))
    medium = total(  # and NaN
        lambda size: jnp.where((size < low) | (size > high), 0.0, size)
    )
    parts = jnp.stack([_root(small) / up, _root(medium), _root(large) / down])
    scale = jax.lax.stop_gradient(jnp.max(parts))  # of which the outcome is no function
    safe = jnp.where((scale > 0) & (scale < jnp.inf), scale, 1.0)
    return scale * _root(jnp.sum(jnp.square(parts / safe)))


def _root(square: Array) -> Array:
    """Returns the square root, whose derivative is 0 at 0."""
    is_zero = square == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))


def of_length(rho: Array, tree: PyTree, length: Array) -> PyTree:
    """Returns rho / length times a tree; zeros where the length or rho is zero."""
    moves = (length != 0) & (rho != 0)  # NaN moves: it must not pass for "off"
    scale = jnp.where(moves, rho / jnp.where(moves, length, 1.0), 0.0)
    return jax.tree.map(
        lambda leaf: scale.astype(jnp.finfo(leaf.dtype).dtype) * leaf, tree
    )


def projection(tree: PyTree, onto: PyTree) -> PyTree:
    """Returns proj_b a = ||a|| cos(a, b) b / ||b||; zeros if either is zero."""
    norms = norm(tree), norm(onto)
    return of_length(cosine(tree, onto, norms) * norms[0], onto, norms[1])


def cosine(first: PyTree, second: PyTree, norms: tuple[Array, Array]) -> Array:
    """Returns the cosine between two trees with these norms; 0 if either is zero."""
    # Each factor is divided first: the product of two norms may overflow.
    one, other = (jnp.where(norm > 0, norm, 1.0) for norm in norms)
    pairs = zip(_reals(first), _reals(second), strict=True)
    products = [
        (a / one.astype(a.dtype)) * (b / other.astype(b.dtype)) for a, b in pairs
    ]
    return _total(products, one.dtype)


def _total(leaves: list[Array], dtype: Any) -> Array:
    """Sums all entries: over columns, then over those of all leaves at once."""
    columns = [jnp.zeros([1], dtype)]
    for leaf in leaves:
        column = jnp.sum(leaf, range(leaf.ndim - 1)) if leaf.ndim > 1 else leaf.ravel()
        columns.append(_whole(column.astype(dtype)))
    # The barrier keeps XLA from adding up each column by itself, a kernel or two more.
    return jnp.sum(jax.lax.optimization_barrier(jnp.concatenate(columns)))


def _whole(column: Array) -> Array:
    """Returns the column on every device, where its type says that it is split."""
    sharding = jax.typeof(column).sharding
    if all(axis is None for axis in sharding.spec):
        return column
    return jax.sharding.reshard(column, sharding.update(spec=PartitionSpec(None)))


def mean_of_groups(grads: PyTree, params: PyTree = None) -> PyTree:
    """Returns the mean over the first axis of every leaf, taken in at least float32."""
    del params
    return jax.tree.map(
        lambda g: jnp.mean(at_least_float32(g), axis=0).astype(g.dtype), grads
    )


def mean_norm_of_groups(grads: PyTree) -> Array:
    """Returns the mean over the groups, the first axis of every leaf, of `norm`."""
    return jnp.mean(jax.vmap(norm)(grads))


def zeros_as(leaf: Array) -> Array:
    """Returns zeros that are split over groups and devices as the leaf is."""
    none = jnp.zeros_like(leaf)
    return jnp.where(leaf == 0, none, none)


def zeros(shape: tuple[int, ...], dtype: Any, like: PyTree) -> Array:
    """Returns zeros that vary over the axes of `jax.shard_map` as `like` does.

    A loop's carry must vary from its start over what it will vary over.
    """
    start = jnp.zeros(shape, dtype)
    for leaf in jax.tree.leaves(like):
        if isinstance(leaf, Tracer):
            start += jnp.zeros_like(leaf, dtype, shape=())
    return start
