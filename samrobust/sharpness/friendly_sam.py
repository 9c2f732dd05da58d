"""Friendly SAM: the ascent leaves out what all batches have in common.

Reference: Li et al. (2024), arXiv 2403.12350, Algorithm 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import amount, check_strength, share
from samrobust.sharpness.masks import restricted, where_given
from samrobust.sharpness.refusals import check_ungrouped
from samrobust.sharpness.trees import norm, of_length
from samrobust.sharpness.two_pass import two_pass
from samrobust.types import Array, ArrayLike, Entry, PyTree

__all__ = ["ENTRY", "friendly_sam"]


def friendly_sam(
    rho: ArrayLike | optax.Schedule,
    sigma: float = 1.0,
    lmbda: float = 0.9,
    *,
    aux: PyTree = None,
    grouped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds Friendly SAM: the gradient at w + rho d / ||d||, d = g - sigma m.

    m is the average of earlier gradients, m <- lmbda m + (1 - lmbda) g, begun by the
    first of them, at which d = g.

    Args:
      rho: as of `sam`.
      sigma: >= 0, the weight of what is left out; 0: SAM.
      lmbda: in [0, 1], the decay of the average; the authors' are 0.6 to 0.95.
      aux: see `two_pass`.
      grouped: must be False: the average is that of the batches.

    Returns:
      A transformation with the contract of `two_pass`, whose state holds m. Costs one
      further pass. **Guarantees**: `sigma=0` is `sam` bit for bit.

    Raises:
      ValueError: as `two_pass`; if sigma or lmbda is out of range.

    Reference: Li et al. (2024), arXiv 2403.12350; the average as in the authors' code,
    nblt/F-SAM. *Our deviation*: no 1e-12 is added to the norm, zero is treated exactly
    instead, and where g = 0 the weights stay although m may be another.
    """
    amount(sigma=sigma)
    share(lmbda=lmbda)
    check_ungrouped("friendly_sam", grouped=grouped)

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(jnp.zeros_like, params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        del params
        is_first = extra_args["step"] == 0
        memory = restricted(state, updates)

        def mix(g: Array, m: Array) -> Array:
            return jnp.where(is_first, g, lmbda * m + (1 - lmbda) * g)

        rho = jnp.where(norm(updates) == 0, 0.0, extra_args["rho"])
        share = jnp.where(is_first, 0.0, sigma)
        direction = jax.tree.map(
            lambda g, m: g - share.astype(m.dtype) * m, updates, memory
        )
        perturbation = of_length(rho, direction, norm(direction))
        return perturbation, where_given(mix, updates, state)

    ascent = optax.GradientTransformationExtraArgs(init, update)
    return two_pass(rho, ascent, aux=aux)


ENTRY = Entry(
    friendly_sam,
    "Friendly SAM (rho = {rho:g})",
    fields={
        "rho": check_strength,
        "sigma": amount,
        "lmbda": share,
    },
)
