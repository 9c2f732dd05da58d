"""Random crops and flips of a batch, inside a compiled step.

The standard CIFAR augmentation: pad, cut a window of the original size at a random
place, mirror half of the images. The padding is by reflection, as in NumPy's mode
"reflect".
"""

import jax
import jax.numpy as jnp
import numpy as np

from samrobust.checks import check

__all__ = ["random_crop_and_flip"]


def random_crop_and_flip(
    images: jax.Array | np.ndarray, *, padding: int, flip: bool, key: jax.Array
) -> jax.Array:
    """Cuts a random window out of every reflect-padded image, and mirrors half of them.

    Output pixel (i, j) is input pixel (r(i + v), r(j + h)), with v and h uniform in
    -padding..padding and r the reflection into the image. The padded image is never
    built: all is one gather with computed indices, on a CPU several times faster than
    padding and `vmap(dynamic_slice)`.

    Args:
      images: `[B, H, W, C]` of any dtype.
      padding: pixels added on every side, 0 <= padding < min(H, W).
      flip: whether each image is mirrored left to right with probability 1/2.
      key: is consumed.

    Returns:
      An array of the same shape and dtype. **Guarantees**: every image is one of the
      (2 padding + 1)^2 windows of its padded self or the mirror image of one; with
      `padding=0, flip=False` the images are returned untouched.

    Raises:
      ValueError: if images is not four-dimensional or padding is out of range.

    >>> images = jnp.ones([8, 32, 32, 3])
    >>> random_crop_and_flip(images, padding=4, flip=True, key=jax.random.key(0)).shape
    (8, 32, 32, 3)
    """
    check(images.ndim == 4, "images of shape [B, H, W, C]", shape=images.shape)
    count, height, width, _ = images.shape
    shortest = min(height, width)
    check(0 <= padding < shortest, f"0 <= padding < {shortest}", padding=padding)
    if padding == 0 and not flip:
        return jnp.asarray(images)

    vertical_key, horizontal_key, flip_key = jax.random.split(key, 3)
    rows = _window(vertical_key, count, height, padding)
    columns = _window(horizontal_key, count, width, padding)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(count, 1))
        columns = jnp.where(mirrored, columns[:, ::-1], columns)
    examples = jnp.arange(count)[:, None, None]
    source = jnp.asarray(images).at[examples, rows[:, :, None], columns[:, None, :]]
    return source.get(mode="promise_in_bounds")


def _window(key: jax.Array, count: int, length: int, padding: int) -> jax.Array:
    """Returns the `[count, length]` source positions of random windows of one axis."""
    shift = jax.random.randint(key, (count, 1), -padding, padding + 1)
    before = jnp.abs(jnp.arange(length)[None, :] + shift)  # reflects at the first pixel
    return (length - 1) - jnp.abs((length - 1) - before)  # and at the last
