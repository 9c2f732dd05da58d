"""What attacks share: each example of a batch is a problem of its own."""

import jax.numpy as jnp

from samrobust.checks import check
from samrobust.types import Array

__all__ = ["check_images", "spread"]


def check_images(images: Array) -> None:
    """Refuses images in which a radius of 8/255 cannot be told from 9/255.

    Raises:
      ValueError: unless they are float32 or float64.
    """
    check(
        images.dtype in (jnp.float32, jnp.float64),
        "float32 images with pixels in the box",
        dtype=str(images.dtype),
    )


def spread(values: Array, images: Array) -> Array:
    """Values [B], one an example, as [B, 1, ...], to meet images [B, ...].

    >>> spread(jnp.array([2.0, 3.0]), jnp.zeros([2, 4, 4, 1])).shape
    (2, 1, 1, 1)
    """
    return values.reshape(values.shape + (1,) * (images.ndim - 1))
