"""A function of a batch, over a whole split: every example exactly once.

The batch is split over the devices, the outcome is on every process, and an incomplete
last batch is padded, so that the function compiles once. The function decides what is
measured; `samrobust.evaluation.accuracy` measures accuracy.

Every random number of an evaluation is a function of the key and of the example's
position in the split: never of the batch, its padding or the number of devices.
"""

import functools
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from samrobust.attacks.losses import misclassified
from samrobust.checks import check
from samrobust.data import Split, take_batch
from samrobust.system.compiler import compiler_options
from samrobust.system.distributed import data_mesh, replicate, replicated, shard_batch
from samrobust.types import Array, LogitsFn, PyTree

__all__ = [
    "BatchFn",
    "Examples",
    "Measure",
    "OnBatch",
    "batch_program",
    "batch_size_for",
    "classifier",
    "examples_of",
    "fetch",
    "is_correct",
    "jit_for_all",
    "make_measure",
    "of_name",
    "packed",
    "to_devices",
    "usual_batch_size",
]

Measure = Callable[..., dict[str, np.ndarray]]
Examples = tuple[Array, Array, Array]

_EXAMPLES_A_DEVICE = 500  # in a batch whose size is not given
_SECONDS_UNTOLD = 0.5  # that a batch may take before `meanwhile` is called
_POLLS = (1e-4, 2e-2)  # the first and the longest pause in waiting, seconds


class OnBatch(Protocol):
    """A listener, called after every batch, and during one that takes long.

    It may raise, and so end the work.
    """

    def __call__(self, done: int, num_examples: int, doing: str = "", /) -> None:
        """Receives how many examples are done, or that share of the work.

        `doing` may name the current work.
        """
        ...


class BatchFn(Protocol):
    """A measurement: images [B, ...] and labels [B] to arrays [B, ...], by name."""

    def __call__(
        self, variables: PyTree, images: Array, labels: Array, *, key: Array
    ) -> Mapping[str, Array]:
        """Measures inside `jit`; `variables` are those that `measure` is given.

        `key` is a key array [B], one an example, as attacks take it.
        """
        ...


def make_measure(batch_fn: BatchFn, *, batch_size: int) -> Measure:
    """Builds a function that measures something on a whole split.

    Args:
      batch_fn: see there.
      batch_size: over all devices; 0: 500 for each of them. At most the number of
        examples is used, rounded up to a multiple of the devices.

    Returns:
      `measure(variables, split, key, *, on_batch=...) -> {name: values}` with NumPy
      arrays [N, ...] in the order of the split. `on_batch(done, num_examples)` is
      called after every batch, and during one that takes long. The function
      compiles once for splits of one size and may be called for many networks.

      **Guarantees.** The key of an example depends on `key` and its position in the
      split alone. Products of float32 are those of float32 on every backend.

    Raises:
      ValueError: if batch_size < 0 or, when called, the split is empty.
    """
    check(batch_size >= 0, "batch_size >= 0", batch_size=batch_size)
    of_batch = batch_program(batch_fn)

    def measure(
        variables: PyTree,
        split: Split,
        key: Array,
        *,
        on_batch: Callable[[int, int], None] = lambda *_: None,
    ) -> dict[str, np.ndarray]:
        num_examples, done = len(split), 0
        check(num_examples > 0, "a split with examples", num_examples=num_examples)
        size = batch_size_for(num_examples, batch_size)
        data = to_devices(variables, split)
        parts: list[dict[str, np.ndarray]] = []
        for indices, count in packed(np.arange(num_examples), size):
            values = fetch(of_batch(*data, indices, key), on_batch, done, num_examples)
            parts.append({name: value[:count] for name, value in values.items()})
            done += count
            on_batch(done, num_examples)
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    return measure


def batch_program(batch_fn: BatchFn) -> Callable[..., dict[str, Array]]:
    """Builds the compiled function of a batch, which it takes out of a split.

    Returns:
      `of_batch(variables, images, labels, indices, key)`, of the images and labels of
      the whole split, as `examples_of` takes them.
    """

    @jit_for_all
    def of_batch(
        variables: PyTree, images: Array, labels: Array, indices: Array, key: Array
    ) -> dict[str, Array]:
        images, labels, keys = examples_of(images, labels, indices, key)
        return dict(batch_fn(variables, images, labels, key=keys))

    return of_batch


def to_devices(variables: PyTree, split: Split) -> tuple[PyTree, Array, Array]:
    """Replicates a network, images and labels over the devices."""
    return replicate((variables, split.images, split.labels), data_mesh())


def examples_of(images: Array, labels: Array, indices: Array, key: Array) -> Examples:
    """Takes examples out of a split, inside `jit`, and splits them over the devices.

    Args:
      images: uint8 [N, ...].
      labels: int [N].
      indices: positions in the split, int [B].
      key: of the evaluation.

    Returns:
      Images in [0, 1], labels and keys, all [B, ...].
    """
    batch = take_batch(images, labels, indices, 0, len(indices))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(indices))
    return shard_batch((*batch, keys), data_mesh())


def of_name(keys: Array, name: str) -> Array:
    """Returns keys [B] for what has this name, from those of the examples."""
    number = np.uint32(zlib.crc32(name.encode()))
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def is_correct(logits: Array, labels: Array) -> Array:
    """Says which examples are classified correctly, bool [B]; NaN counts as wrong.

    >>> logits = jnp.array([[2.0, 1.0], [jnp.nan, 0.0]])
    >>> is_correct(logits, jnp.array([0, 0])).tolist()
    [True, False]
    """
    return ~misclassified(logits, labels)


def fetch(values: PyTree, tell: Callable[..., None], *progress: Any) -> PyTree:
    """Brings arrays to the host; meanwhile calls the caller back, who may raise.

    Waits in Python, so that signals are handled while the device computes.

    Args:
      values: arrays, maybe not computed yet.
      tell: called as `tell(*progress)` about twice a second until they are; not in
        several processes, where the numbers of calls would differ.
      *progress: its arguments.
    """
    leaves, told, pause = jax.tree.leaves(values), time.monotonic(), _POLLS[0]
    while jax.process_count() == 1 and not all(leaf.is_ready() for leaf in leaves):
        time.sleep(pause)
        pause = min(2 * pause, _POLLS[1])
        if time.monotonic() - told > _SECONDS_UNTOLD:
            tell(*progress)
            told = time.monotonic()
    return jax.device_get(values)


def jit_for_all(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function whose outcome every process can read.

    Products of float32 are taken in float32, where GPUs and TPUs by default round their
    factors to 10 or 7 bits: a network is judged in its own precision.
    """

    @functools.wraps(function)
    def precise(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return jax.jit(
        precise,
        compiler_options=compiler_options(),
        out_shardings=replicated(data_mesh()),
    )


def classifier(model: nn.Module, variables: PyTree) -> LogitsFn:
    """Returns a network's `logits_fn`: in inference mode, in its own precision."""

    def logits_fn(images: Array) -> Array:
        return cast(Array, model.apply(variables, images, train=False))

    return logits_fn


def packed(positions: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields batches of one size, with how many of each are not padding.

    Args:
      positions: in a split, int [n].
      size: of a batch.

    >>> [(i.tolist(), n) for i, n in packed(np.arange(3), 2)]
    [([0, 1], 2), ([2, 2], 1)]
    """
    for start in range(0, len(positions), size):
        taken = positions[start : start + size]
        yield np.resize(taken, size).astype(np.int32), len(taken)


def usual_batch_size(batch_size: int, num_devices: int = 1) -> int:
    """Returns the size that is asked for, or for 0 500 examples for each device."""
    return batch_size or _EXAMPLES_A_DEVICE * num_devices


def batch_size_for(num_examples: int, batch_size: int) -> int:
    """Returns the size of a batch: no more than asked for, nor than there are examples.

    Asked for by 0 are 500 for each device. Rounded up to a multiple of the devices.
    """
    num_devices = data_mesh().devices.size
    size = min(usual_batch_size(batch_size, num_devices), max(1, num_examples))
    return -(-size // num_devices) * num_devices
