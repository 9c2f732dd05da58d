"""What attacks share: each example of a batch is a problem of its own."""

import jax
import jax.numpy as jnp

from samrobust.types import Array

__all__ = ["filled", "spread"]


def filled(images: Array, value: float, dtype: jnp.dtype | type | None = None) -> Array:
    """The value for each example, [B]: where a loop over the images may start from.

    It is split over devices as the images are, and in their dtype unless told.

    >>> filled(jnp.zeros([2, 4, 4, 1]), 3.0)
    Array([3., 3.], dtype=float32)
    """
    one_each = jnp.sum(images, axis=tuple(range(1, images.ndim)))
    return jnp.full_like(one_each, value, dtype=dtype)


def spread(values: Array, images: Array) -> Array:
    """Values [B], one an example, as [B, 1, ...], to meet images [B, ...].

    >>> spread(jnp.array([2.0, 3.0]), jnp.zeros([2, 4, 4, 1])).shape
    (2, 1, 1, 1)
    """
    return jax.lax.expand_dims(values, range(1, images.ndim))
