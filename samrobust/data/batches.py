"""Batches of a data set: which examples form one, and how it is augmented.

A data set lies on the device as uint8; a training step takes its batch out of it
inside jit with `take_batch`, along the epoch's permutation, and may cut and mirror it
at random, or change it by a function of the user's. Every choice is a pure function of
(key, epoch, step): a run that is stopped and resumed sees the same batches.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from samrobust.checks import check
from samrobust.types import Augmentation

__all__ = [
    "augmented",
    "check_padding",
    "epoch_permutation",
    "random_crop_and_flip",
    "take_batch",
]

# XLA turns a division by 255 into a multiplication by 1/255, which is off by one unit
# in the last place for 126 of the 256 values. A table is exact on every backend.
_UNIT_PIXELS = np.arange(256, dtype=np.float32) / np.float32(255)


def epoch_permutation(
    key: jax.Array, epoch: int | jax.Array, num_examples: int
) -> jax.Array:
    """Returns the order in which an epoch visits the examples.

    Args:
      key: the run's data key; the same for all epochs.
      epoch: number of the epoch, may be traced.
      num_examples: static size of the data set.

    Returns:
      int32 `[num_examples]`. **Guarantees**: a permutation of 0..num_examples - 1, and
      a pure function of (key, epoch).

    Raises:
      ValueError: if num_examples is below 1.

    >>> order = epoch_permutation(jax.random.key(0), 3, 10)
    >>> sorted(order.tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    check(num_examples >= 1, "1 <= num_examples", num_examples=num_examples)
    indices = jnp.arange(num_examples, dtype=jnp.int32)
    return jax.random.permutation(jax.random.fold_in(key, epoch), indices)


def take_batch(
    images_uint8: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    permutation: jax.Array | np.ndarray,
    start: int | jax.Array,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """Takes the examples `permutation[start : start + size]`; for the inside of jit.

    Args:
      images_uint8: uint8 `[N, H, W, C]`.
      labels: integer `[N]`.
      permutation: integer `[M]`, values in 0..N - 1.
      start: first position in the permutation, may be traced. A slice that would run
        over the end is moved back to end at M, as `jax.lax.dynamic_slice` does.
      size: static size of the batch, at most M.

    Returns:
      float32 images `[size, H, W, C]` and int32 labels `[size]`. **Guarantees**: a
      pixel of value k becomes k/255, correctly rounded, on every backend.

    Raises:
      ValueError: if the images are not uint8, or size is not in 1..M.

    >>> images = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    >>> batch, labels = take_batch(images, np.arange(4), np.array([3, 0, 2, 1]), 1, 2)
    >>> labels.tolist()
    [0, 2]
    """
    check(
        images_uint8.dtype == np.uint8,
        "images of dtype uint8",
        dtype=str(images_uint8.dtype),
    )
    length = permutation.shape[0]
    check(1 <= size <= length, f"1 <= size <= {length}", size=size)
    indices = lax.dynamic_slice(jnp.asarray(permutation), (start,), (size,))
    pixels = jnp.take(jnp.asarray(images_uint8), indices, axis=0, mode="clip")
    batch = jnp.asarray(_UNIT_PIXELS).at[pixels].get(mode="promise_in_bounds")
    chosen = jnp.take(jnp.asarray(labels), indices, axis=0, mode="clip")
    return batch, chosen.astype(jnp.int32)


def check_padding(image_shape: tuple[int, int, int], /, **values: int) -> None:
    """Refuses a padding that `random_crop_and_flip` cannot reflect into an image.

    Args:
      image_shape: height, width and channels.
      **values: the padding, by the name that a message shall give it.

    Raises:
      ValueError: unless 0 <= padding < min(height, width).

    >>> check_padding((8, 6, 1), **{"data.padding": 8})
    Traceback (most recent call last):
    samrobust.checks.CheckError: Expected 0 <= data.padding < 6, got data.padding=8. \
Images are 8x6.
    """
    height, width, _ = image_shape
    shortest = min(height, width)
    for name, padding in values.items():
        condition, fix = f"0 <= {name} < {shortest}", f"Images are {height}x{width}."
        check(0 <= padding < shortest, condition, fix, **{name: padding})


def augmented(
    images: jax.Array,
    *,
    padding: int,
    flip: bool,
    augment: Augmentation | None = None,
    key: jax.Array,
) -> jax.Array:
    """Cuts and mirrors images at random, then augments them by a function.

    Args:
      images: float32 `[B, H, W, C]`.
      padding: see `random_crop_and_flip`.
      flip: see there.
      augment: called as `augment(images, key=key)`; None: nothing more.
      key: is consumed.

    Returns:
      An array of the same shape and dtype.

    Raises:
      ValueError: if `augment` returns anything else, or as `random_crop_and_flip`.
    """
    crop_and_flip = {"padding": padding, "flip": flip}
    if augment is None:
        return random_crop_and_flip(images, **crop_and_flip, key=key)
    crop_key, own_key = jax.random.split(key)
    images = random_crop_and_flip(images, **crop_and_flip, key=crop_key)
    found = augment(images, key=own_key)
    wanted = f"the augmentation to return {images.dtype}{list(images.shape)}"
    shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", None)
    holds = (shape, dtype) == (images.shape, images.dtype)
    check(holds, wanted, dtype=str(dtype), shape=shape)
    return found


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
    count, height, width, channels = images.shape
    check_padding((height, width, channels), padding=padding)
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
