"""Adaptive SAM as davda54's `sam.py` has it, on all parameters alike.

Reference: github.com/davda54/sam, `adaptive=True`.
"""

import optax

from samrobust.checks import check_strength
from samrobust.sharpness.asam import asam
from samrobust.types import ArrayLike, Entry, PyTree

__all__ = ["ENTRY", "asam_davda"]


def asam_davda(
    rho: ArrayLike | optax.Schedule, *, aux: PyTree = None, grouped: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Builds the gradient at w + rho w^2 g / || |w| g ||_2, biases scaled too.

    It is `asam` with T = |w| for every parameter. A weight of 0 never moves: biases and
    shifts that begin there only do once they have been trained.

    Args:
      rho: the radius in the norm ||e / w||_2, or a schedule of it; 2.0 in that
        implementation, against the 0.5 of `asam`.
      aux: see `two_pass`.
      grouped: see `two_pass`.

    Returns:
      A transformation with the contract of `two_pass`. Costs one further pass.

    Raises:
      ValueError: as `two_pass`.

    Reference: davda54/sam, `adaptive=True`; the method of Kwon et al. (2021), arXiv
    2102.11600, is `asam`. *Our deviation*: no 1e-12 is added to the norm, zero is
    treated exactly instead.
    """
    return asam(rho, eta=0.0, is_fixed=lambda _: False, aux=aux, grouped=grouped)


ENTRY = Entry(
    asam_davda,
    "ASAM (davda54, rho = {rho:g})",
    fields={"rho": check_strength},
)
