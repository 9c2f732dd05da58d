"""Masks of weights: trees of booleans of the parameters' structure and shapes.

A gap (None, where a parameter is frozen) stays one. `largest` sorts all entries
together, which JAX refuses of arrays that are split over an explicit mesh.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from samrobust.sharpness.trees import width, zeros
from samrobust.types import Array, PyTree

__all__ = [
    "is_bias",
    "largest",
    "live",
    "masked",
    "normalizations",
    "restricted",
    "size",
    "where_given",
]


def _names(path: Any) -> tuple[str, ...]:
    """Returns a path's keys; NNX's, which end in a variable's attribute, up to it."""
    keys = (str(getattr(k, "key", getattr(k, "name", k))) for k in path)
    return tuple(key for key in keys if key not in ("value", "raw_value"))


def is_bias(path: Any) -> bool:
    """Returns whether the last key of a parameter's path is `b` or has `bias` in it."""
    name = "".join(_names(path)[-1:]).lower()
    return name == "b" or "bias" in name


def normalizations(params: PyTree) -> PyTree:
    """Returns which parameters are a normalization's: its `scale`, and a shift beside.

    A layer with parameters of other shapes than its `scale` is no normalization.

    Returns:
      A Python bool for each parameter.
    """
    shapes: dict[tuple[str, ...], set[tuple[int, ...]]] = collections.defaultdict(set)
    named = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in named:
        shapes[_names(path)[:-1]].add(leaf.shape)
    layers = {_names(path)[:-1] for path, _ in named if _names(path)[-1:] == ("scale",)}
    layers = {layer for layer in layers if len(shapes[layer]) == 1}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _names(path)[:-1] in layers, params
    )


def masked(mask: PyTree, tree: PyTree) -> PyTree:
    """Returns a tree that is zero where the mask is not set."""
    return jax.tree.map(lambda m, x: jnp.where(m, x, jnp.zeros_like(x)), mask, tree)


def size(tree: PyTree) -> int:
    """Returns the number of entries of all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def live(grads: PyTree, perturbation: PyTree) -> dict[str, Array]:
    """Measures `live`: the fraction of the perturbation's entries that are not zero."""
    del grads
    leaves = jax.tree.leaves(perturbation)
    counts = [jnp.sum(leaf != 0, dtype=jnp.float32) for leaf in leaves]
    return {"live": sum(counts, jnp.zeros([])) / max(size(perturbation), 1)}


def nothing(params: PyTree) -> PyTree:
    """Returns the mask without any entry."""
    return jax.tree.map(lambda w: zeros(w.shape, jnp.bool, w), params)


def largest(scores: PyTree, count: int | Array) -> PyTree:
    """Returns the mask of the `count` largest of all entries.

    Args:
      scores: a tree of real numbers; NaN counts as the smallest.
      count: may be traced. Of equal entries the first are taken.
    """
    leaves, structure = jax.tree.flatten(scores)
    dtype = width(scores)
    flat = jnp.concatenate([leaf.ravel().astype(dtype) for leaf in leaves])
    order = jnp.argsort(-flat, stable=True)
    rank = (
        zeros(flat.shape, jnp.int32, flat)
        .at[order]
        .set(jnp.arange(flat.size, dtype=jnp.int32))
    )
    ends = [sum(leaf.size for leaf in leaves[: i + 1]) for i in range(len(leaves))]
    parts = jnp.split(rank < count, ends[:-1])
    parts = [p.reshape(leaf.shape) for p, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, parts)


def restricted(tree: PyTree, grads: PyTree) -> PyTree:
    """Returns a tree of the parameters with None where a gradient is."""
    return jax.tree.map(
        lambda g, x: None if g is None else x, grads, tree, is_leaf=_is_gap
    )


def where_given(
    function: Callable[..., Array], grads: PyTree, *trees: PyTree
) -> PyTree:
    """Maps over gradients and trees; the first tree stands where a gradient is None."""
    return jax.tree.map(
        lambda g, *rest: rest[0] if g is None else function(g, *rest),
        grads,
        *trees,
        is_leaf=_is_gap,
    )


def _is_gap(node: Any) -> bool:
    return node is None
