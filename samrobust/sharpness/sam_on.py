"""SAM-ON: the normalization layers alone are perturbed.

Reference: Mueller et al. (2023), arXiv 2306.04226.
"""

from collections.abc import Callable

import jax
import optax

from samrobust.checks import check, check_strength
from samrobust.sharpness.masks import live, masked, normalizations, restricted
from samrobust.sharpness.trees import norm, of_length
from samrobust.sharpness.two_pass import two_pass
from samrobust.types import Array, ArrayLike, Entry, PyTree

__all__ = ["ENTRY", "sam_on"]


def sam_on(
    rho: ArrayLike | optax.Schedule,
    *,
    select: Callable[[PyTree], PyTree] = normalizations,
    aux: PyTree = None,
    grouped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds SAM-ON: the gradient at w + rho m g / ||m g||_2, m 1 on the selected.

    Args:
      rho: the radius in the l2 norm of the selected parameters; the authors' is 0.5 for
        this form (`elementwise` forms scale it by the weights).
      select: of the parameters, to a tree of bool, which of them are perturbed; by
        default those of normalization layers (a `scale`, and what is beside it).
      aux: see `two_pass`.
      grouped: see `two_pass`.

    Returns:
      A transformation with the contract of `two_pass`. Costs one further pass: the
      network has to be passed through either way. **Guarantees**: where all are
      selected, it is `sam` bit for bit.

    Raises:
      ValueError: as `two_pass`; in `update`, if nothing is selected.

    Reference: Mueller et al. (2023), arXiv 2306.04226; as `SAM_ON` with `only_norm` in
    the authors' code, mueller-mp/SAM-ON, where names with `norm` or `bn` are selected.
    *Our deviation*: no 1e-16 is added to the norm, zero is treated exactly instead.
    """

    def ascend(grads: PyTree, params: PyTree, rho: Array) -> PyTree:
        mask = restricted(select(params), grads)
        named = jax.tree_util.tree_leaves_with_path(params)
        check(
            any(jax.tree.leaves(mask)),
            "a network with normalization layers for SAM-ON",
            "Choose another model, or sam; or say which they are by `select`.",
            parameters=[jax.tree_util.keystr(path) for path, _ in named],
        )
        chosen = masked(mask, grads)
        return of_length(rho, chosen, norm(chosen))

    return two_pass(rho, ascend, measure=live, aux=aux, grouped=grouped)


ENTRY = Entry(sam_on, "SAM-ON (rho = {rho:g})", fields={"rho": check_strength})
