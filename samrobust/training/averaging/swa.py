"""Stochastic weight averaging: the equal mean of the weights after late epochs.

Reference: Izmailov et al. (2018), arXiv 1803.05407, Algorithm 1.
"""

import jax
import jax.numpy as jnp

from samrobust.checks import below_one, count
from samrobust.training.averaging.ema import exact
from samrobust.training.parts import Averaging
from samrobust.training.phases import first_epoch
from samrobust.types import Array, Entry, Field, PyTree

__all__ = ["ENTRY", "swa"]


def swa(start: float, *, steps_per_epoch: int, total_steps: int) -> Averaging:
    """Builds the average a <- (n a + w) / (n + 1) of the weights after each epoch.

    Args:
      start: in [0, 1), the fraction of the training before the first epoch that counts,
        rounded up to whole epochs; the authors' is about 0.75.
      steps_per_epoch: >= 1.
      total_steps: >= 1, of the training.

    Returns:
      An averaging of all variables, including BatchNorm's running statistics. Before
      the first epoch that counts is over, it is the last weights. **Guarantees**:
      half precisions are averaged in float32, integers copied; the mean of one epoch is
      its weights bit for bit.

    Raises:
      ValueError: if a value is out of range.

    Reference: Izmailov et al. (2018), arXiv 1803.05407, Algorithm 1; as in their code,
    timgaripov/swa, once an epoch. *Our deviation*: the learning rate's schedule is that
    of the training, theirs ends in a constant one; statistics are averaged, theirs
    recomputed over the training data.
    """
    below_one(start=start)
    count(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    epochs = total_steps // steps_per_epoch
    first = max(0, min(first_epoch(start, epochs), epochs - 1))  # that counts

    def update(average: PyTree, variables: PyTree, step: Array) -> PyTree:
        epoch, place = step // steps_per_epoch, step % steps_per_epoch
        counts = place == steps_per_epoch - 1
        before = epoch - first  # of the epochs that count, those averaged so far
        copies = (epoch < first) | (before == 0)

        def mix(old: Array, new: Array) -> Array:
            new = exact(new)
            if not jnp.issubdtype(new.dtype, jnp.inexact):
                return new
            share = 1 / (jnp.maximum(before, 0) + 1)
            mean = old + share.astype(old.dtype) * (new - old)
            # Selects, as 0 times infinity is no number.
            return jnp.where(copies, new, jnp.where(counts, mean, old))

        return jax.tree.map(mix, average, variables)

    return Averaging(exact, update)


ENTRY = Entry(swa, "SWA (from {start:g})", fields={"start": Field(0.75, below_one)})
