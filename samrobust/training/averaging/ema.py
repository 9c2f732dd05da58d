"""Exponential moving average of the weights.

Reference: Polyak and Juditsky (1992); for adversarial training Rebuffi et al. (2021),
arXiv 2103.01946, Section 4.
"""

import jax
import jax.numpy as jnp

from samrobust.checks import check_real
from samrobust.training.parts import Averaging
from samrobust.types import Array, Entry, Field, PyTree

__all__ = ["ENTRY", "ema", "exact"]


def _decay(**values: float) -> None:
    check_real(0, 1 - 1e-7, **values)


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
    _decay(decay=decay)

    def update(average: PyTree, variables: PyTree, step: Array) -> PyTree:
        kept = jnp.where(step == 0, 0.0, decay)  # the first step copies

        def mix(old: Array, new: Array) -> Array:
            # a <- decay a + (1 - decay) w; the select keeps decay 0 exact, also at inf.
            new, share = exact(new), kept.astype(old.dtype)
            return jnp.where(share == 0, new, share * old + (1 - share) * new)

        return jax.tree.map(mix, average, variables)

    return Averaging(lambda variables: jax.tree.map(exact, variables), update)


def exact(leaf: Array) -> Array:
    """Returns a copy, half precisions in float32: in bfloat16 0.999 is 1."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.copy(leaf)
    return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))


ENTRY = Entry(ema, "EMA (decay = {decay:g})", fields={"decay": Field(0.0, _decay)})
