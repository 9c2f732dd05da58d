"""Which examples form a batch, and the batch itself.

A data set lies on the device as uint8; a training step takes its batch out of it
inside jit with `take_batch`, along the epoch's permutation. Every choice is a pure
function of (key, epoch, step): a run that is stopped and resumed sees the same batches.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from samrobust.checks import check

__all__ = ["epoch_permutation", "evaluation_batches", "take_batch"]

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


def evaluation_batches(
    num_examples: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches of one shape that visit every example exactly once.

    Args:
      num_examples: size of the data set.
      batch_size: examples in a batch.

    Returns:
      An iterator over (indices int32 `[batch_size]`, mask bool `[batch_size]`).
      **Guarantees**: the indices under the mask are 0..num_examples - 1 in order; the
      padding of the last batch repeats index 0 and is masked out.

    Raises:
      ValueError: if a size is below 1.

    >>> [(i.tolist(), m.tolist()) for i, m in evaluation_batches(3, 2)]
    [([0, 1], [True, True]), ([2, 0], [True, False])]
    """
    check(num_examples >= 1, "1 <= num_examples", num_examples=num_examples)
    check(batch_size >= 1, "1 <= batch_size", batch_size=batch_size)

    def batch(start: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(start, start + batch_size, dtype=np.int32)
        mask = positions < num_examples
        return np.where(mask, positions, np.int32(0)), mask

    return map(batch, range(0, num_examples, batch_size))
