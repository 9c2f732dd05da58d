"""A function of a batch, over a whole split: every example exactly once.

The batch is split over the devices, the outcome is on every process, and an incomplete
last batch is padded, so that the function compiles once. What is measured is left to
the function; `samrobust.evaluation.evaluate` measures accuracy.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import jax
import numpy as np
from flax import linen as nn

from samrobust.checks import check
from samrobust.data import Split, evaluation_batches, take_batch
from samrobust.parallel import data_mesh, replicate, replicated, shard_batch
from samrobust.runtime import compiler_options
from samrobust.types import Array, LogitsFn, PyTree

__all__ = [
    "BatchFn",
    "Measure",
    "classifier",
    "divisible_batch_size",
    "jit_for_all",
    "make_measure",
]

Measure = Callable[..., dict[str, np.ndarray]]


class BatchFn(Protocol):
    """What is measured: images [B, ...] and labels [B] to arrays [B, ...], by name."""

    def __call__(
        self, variables: PyTree, images: Array, labels: Array, *, key: Array
    ) -> Mapping[str, Array]:
        """Called inside `jit`; `variables` are those that `measure` is given."""
        ...


def make_measure(batch_fn: BatchFn, *, batch_size: int) -> Measure:
    """Builds a function that measures something on a whole split.

    Args:
      batch_fn: see there; the key depends on the split's key and the batch alone.
      batch_size: over all devices; rounded up to a multiple of their number.

    Returns:
      `measure(variables, split, key, *, on_batch=None) -> {name: values}` with NumPy
      arrays [N, ...] in the order of the split. `on_batch(done, num_examples)` is
      called after every batch. The function compiles once and may be called for many
      networks.

    Raises:
      ValueError: if batch_size < 1 or, when called, the split is empty.
    """
    mesh, batch_size = data_mesh(), divisible_batch_size(batch_size)

    @jit_for_all
    def of_batch(
        variables: PyTree, images: Array, labels: Array, indices: Array, key: Array
    ) -> dict[str, Array]:
        batch = take_batch(images, labels, indices, 0, batch_size)
        return dict(batch_fn(variables, *shard_batch(batch, mesh), key=key))

    def measure(
        variables: PyTree,
        split: Split,
        key: Array,
        *,
        on_batch: Callable[[int, int], None] = lambda *_: None,
    ) -> dict[str, np.ndarray]:
        num_examples = len(split)
        check(num_examples > 0, "a split with examples", num_examples=num_examples)
        data = (variables, split.images, split.labels)
        variables, images, labels = replicate(data, mesh)
        parts: list[dict[str, np.ndarray]] = []
        done = 0
        for indices, mask in evaluation_batches(num_examples, batch_size):
            batch_key = jax.random.fold_in(key, done)
            values = of_batch(variables, images, labels, indices, batch_key)
            parts.append({name: v[mask] for name, v in jax.device_get(values).items()})
            done += int(mask.sum())
            on_batch(done, num_examples)
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    return measure


def jit_for_all(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function whose outcome every process can read."""
    return jax.jit(
        function,
        compiler_options=compiler_options(),
        out_shardings=replicated(data_mesh()),
    )


def classifier(model: nn.Module, variables: PyTree) -> LogitsFn:
    """The network as it is judged: with running statistics, in its own precision."""

    def logits_fn(images: Array) -> Array:
        return cast(Array, model.apply(variables, images, train=False))

    return logits_fn


def divisible_batch_size(batch_size: int) -> int:
    """`batch_size`, which must be >= 1, rounded up to a multiple of the devices."""
    check(batch_size >= 1, "batch_size >= 1", batch_size=batch_size)
    num_devices = data_mesh().devices.size
    return -(-batch_size // num_devices) * num_devices
