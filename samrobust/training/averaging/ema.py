"""Exponential moving average of the weights.

Reference: Polyak and Juditsky (1992); for adversarial training Rebuffi et al. (2021),
arXiv 2103.01946, Section 4.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from samrobust.checks import below_one
from samrobust.training.parts import Averaging
from samrobust.types import Array, Entry, PyTree

__all__ = ["ENTRY", "ema", "exact", "mix", "moving"]


def ema(decay: float) -> Averaging:
    """Builds the average a <- decay a + (1 - decay) w, after each step.

    Args:
      decay: in [0, 1).

    Returns:
      An averaging of all variables, including BatchNorm's running statistics, so that
      the average can be evaluated after any step; half precisions are averaged in
      float32, integers copied. **Guarantees**: the first step copies, as
      `torch.optim.swa_utils.AveragedModel` does; `ema(0)` is the last weights bit for
      bit.

    Raises:
      ValueError: if the decay is out of range.

    Reference: Rebuffi et al. (2021), arXiv 2103.01946, Section 4, whose decay is 0.995.
    """
    below_one(decay=decay)
    return moving(lambda step: jnp.where(step == 0, 0.0, decay))


def moving(decay: Callable[[Array], Array]) -> Averaging:
    """Builds the average of `ema` with a decay that is a function of the step."""

    def update(average: PyTree, variables: PyTree, step: Array) -> PyTree:
        return mix(average, variables, decay(step))

    return Averaging(exact, update)


def mix(average: PyTree, variables: PyTree, kept: Array) -> PyTree:
    """Returns kept a + (1 - kept) w, exactly w where kept is 0, and a where it is 1."""

    def of(old: Array, new: Array) -> Array:
        # The selects keep both ends exact, also at inf.
        new, share = exact(new), kept.astype(old.dtype)
        mixed = jnp.where(share == 0, new, share * old + (1 - share) * new)
        return jnp.where(share == 1, old, mixed)

    return jax.tree.map(of, average, variables)


def exact(tree: PyTree) -> PyTree:
    """Returns copies, half precisions in float32: in bfloat16 0.999 is 1."""

    def of(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.copy(leaf)
        return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))

    return jax.tree.map(of, tree)


ENTRY = Entry(ema, "EMA (decay = {decay:g})", fields={"decay": below_one})
