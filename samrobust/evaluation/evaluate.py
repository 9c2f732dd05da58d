"""Natural and robust accuracy: every test example exactly once, whatever the batch.

The network is evaluated in inference mode (running BatchNorm statistics), in the
precision it was made with. All attacks run in one pass over the data. Accuracies are
percentages.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from samrobust.checks import check
from samrobust.data import Split, evaluation_batches, take_batch
from samrobust.parallel import data_mesh, replicate, replicated, shard_batch
from samrobust.runtime import compiler_options
from samrobust.types import Array, Attack, PyTree

__all__ = ["Evaluator", "accuracies", "divisible_batch_size", "make_evaluator"]

Evaluator = Callable[..., dict[str, np.ndarray]]


def make_evaluator(
    model: nn.Module, attacks: Mapping[str, Attack], *, batch_size: int
) -> Evaluator:
    """Builds a function that attacks a trained network on a whole split.

    Args:
      model: `apply(variables, images, train=False)` gives logits.
      attacks: by the names of the columns; `identity` gives natural accuracy.
      batch_size: over all devices; rounded up to a multiple of their number.

    Returns:
      `evaluate(variables, split, key, *, on_batch=None) -> {name: correct}` with
      `correct` bool [N] in the order of the split: whether the example is classified
      rightly after the attack. `on_batch(done, num_examples)` is called after every
      batch. The function compiles once and may be called for many networks.

      **Guarantees.** Each example is judged exactly once; an incomplete last batch is
      padded and the padding ignored. The random start of an attack depends on the key,
      the attack's name and the batch alone.

    Raises:
      ValueError: if batch_size < 1 or the split is empty.
    """
    mesh, batch_size = data_mesh(), divisible_batch_size(batch_size)

    @functools.partial(
        jax.jit,
        compiler_options=compiler_options(),
        out_shardings=replicated(mesh),  # so that every process can read it
    )
    def judge(
        variables: PyTree, images: Array, labels: Array, indices: Array, key: Array
    ) -> dict[str, Array]:
        batch = take_batch(images, labels, indices, 0, batch_size)
        batch_images, batch_labels = shard_batch(batch, mesh)

        def logits_fn(images: Array) -> Array:
            return cast(Array, model.apply(variables, images, train=False))

        correct = {}
        for name, attack in attacks.items():
            own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            attacked = attack(logits_fn, batch_images, batch_labels, key=own_key)
            predictions = jnp.argmax(logits_fn(attacked), axis=-1)
            correct[name] = predictions == batch_labels
        return correct

    def evaluate(
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
        outcome = {name: np.zeros(num_examples, bool) for name in attacks}
        done = 0
        for indices, mask in evaluation_batches(num_examples, batch_size):
            batch_key = jax.random.fold_in(key, done)
            correct = judge(variables, images, labels, indices, batch_key)
            for name, values in jax.device_get(correct).items():
                outcome[name][indices[mask]] = values[mask]
            done += int(mask.sum())
            on_batch(done, num_examples)
        return outcome

    return evaluate


def divisible_batch_size(batch_size: int) -> int:
    """`batch_size`, which must be >= 1, rounded up to a multiple of the devices."""
    check(batch_size >= 1, "batch_size >= 1", batch_size=batch_size)
    num_devices = data_mesh().devices.size
    return -(-batch_size // num_devices) * num_devices


def accuracies(outcome: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The percentage of examples classified rightly, by the attacks' names.

    >>> accuracies({"natural": np.array([True, True, False, True])})
    {'natural': 75.0}
    """
    return {name: 100 * float(np.mean(correct)) for name, correct in outcome.items()}
