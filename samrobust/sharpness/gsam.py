"""GSAM: SAM that also narrows the gap between both losses, at no cost to the second.

Reference: Zhuang et al. (2022), arXiv 2203.08065, Algorithm 1.
"""

import jax
import optax

from samrobust.checks import amount, check_strength
from samrobust.sharpness.trees import norm, of_length, projection
from samrobust.sharpness.two_pass import second, two_pass
from samrobust.types import Array, ArrayLike, Entry, PyTree

__all__ = ["ENTRY", "gsam"]


def gsam(
    rho: ArrayLike | optax.Schedule,
    alpha: float = 0.4,
    *,
    aux: PyTree = None,
    grouped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds GSAM: g_p - alpha (g - proj_{g_p} g) with g_p = g(w + rho g / ||g||).

    Args:
      rho: as of `sam`; the authors let rho follow the learning rate, a schedule.
      alpha: >= 0, the weight of what of g is perpendicular to g_p; 0: SAM.
      aux: see `two_pass`.
      grouped: see `two_pass`.

    Returns:
      A transformation with the contract of `two_pass`. Costs one further pass.
      **Guarantees**: `alpha=0` is `sam` bit for bit.

    Raises:
      ValueError: as `two_pass`; if alpha is negative or not finite.

    Reference: Zhuang et al. (2022), arXiv 2203.08065, Algorithm 1; 0.4 as in the
    authors' code, juntang-zhuang/GSAM. *Our deviation*: no 1e-12 is added to norms and
    their product, zero is treated exactly instead; each group of `grouped` decomposes
    its own gradients, as each of their devices does, but the mean descends, not the
    sum.
    """
    amount(alpha=alpha)

    def ascend(grads: PyTree, params: PyTree, rho: Array) -> PyTree:
        del params
        return of_length(rho, grads, norm(grads))

    def combine(first: PyTree, second: PyTree, perturbation: PyTree) -> PyTree:
        del perturbation
        along = projection(first, second)
        return jax.tree.map(
            lambda g, p, a: p - (alpha * (g - a)).astype(p.dtype), first, second, along
        )

    return two_pass(
        rho, ascend, combine=combine if alpha else second, aux=aux, grouped=grouped
    )


ENTRY = Entry(
    gsam,
    "GSAM (rho = {rho:g})",
    fields={"rho": check_strength, "alpha": amount},
)
