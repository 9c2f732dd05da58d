"""Exponential moving average of the weights.

Reference: Polyak and Juditsky (1992); for adversarial training Rebuffi et al. (2021),
arXiv 2103.01946, Section 4.
"""

import jax
import jax.numpy as jnp

from samrobust.checks import check_real
from samrobust.training.parts import Averaging
from samrobust.types import Array, Entry, Field, PyTree

__all__ = ["ENTRY", "ema"]


def _decay(**values: float) -> None:
    check_real(0, 1 - 1e-7, **values)


def ema(decay: float) -> Averaging:
    """Builds the average a <- decay a + (1 - decay) w, after each step.

    Args:
      decay: in [0, 1).

    Returns:
      An averaging of all variables, BatchNorm's running statistics too, so that it can
      be evaluated after any step. **Guarantees**: the first step copies, as
      `torch.optim.swa_utils.AveragedModel` does; `ema(0)` is the last weights bit for
      bit.

    Raises:
      ValueError: if the decay is none.

    Reference: Rebuffi et al. (2021), arXiv 2103.01946, Section 4, whose decay is 0.995.
    """
    _decay(decay=decay)

    def update(average: PyTree, variables: PyTree, step: Array) -> PyTree:
        kept = jnp.where(step == 0, 0.0, decay)

        def mix(old: Array, new: Array) -> Array:
            share = kept.astype(new.dtype)
            return jnp.where(share == 0, new, share * old + (1 - share) * new)

        return jax.tree.map(mix, average, variables)

    return Averaging(lambda variables: jax.tree.map(jnp.copy, variables), update)


ENTRY = Entry(ema, "EMA (decay = {decay:g})", fields={"decay": Field(0.0, _decay)})
