"""Fisher SAM: a ball of weights in the metric of the Fisher information.

Reference: Kim et al. (2022), arXiv 2206.04920, equations (7) to (9).
"""

import functools

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import check_real, check_strength
from samrobust.sharpness.masks import size
from samrobust.sharpness.trees import at_least_float32, norm, of_length
from samrobust.sharpness.two_pass import two_pass
from samrobust.types import Array, ArrayLike, Entry, PyTree

__all__ = ["ENTRY", "fisher_sam"]


_eta = functools.partial(check_real, 0, 1e30)


def fisher_sam(
    rho: ArrayLike | optax.Schedule,
    eta: float = 1.0,
    *,
    aux: PyTree = None,
    grouped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds Fisher SAM: the gradient at w + rho F g / sqrt(<g, F g>).

    F = diag(1 / (1 + eta g^2)) stands for the inverse of the Fisher information, of
    which the squared gradient of the batch's mean loss is the estimate.

    Args:
      rho: the radius gamma in that metric, or a schedule of it.
      eta: >= 0; 0: SAM. Gradients of a mean loss are small: with eta = 1 F is close to
        1, and the method to SAM. The metric `inverse_fisher` tells: it is the mean of
        F's diagonal.
      aux: see `two_pass`.
      grouped: see `two_pass`.

    Returns:
      A transformation with the contract of `two_pass`. Costs one further pass.
      **Guarantees**: `eta=0` is `sam` bit for bit. Unlike SAM's, its ascent depends on
      the scale of the loss.

    Raises:
      ValueError: as `two_pass`; if eta is negative or not finite.

    Reference: Kim et al. (2022), arXiv 2206.04920; there is no official code. Ports
    that divide by ||F g|| are another method.
    """
    _eta(eta=eta)

    def inverse(g: Array) -> Array:
        return 1 / (1 + eta * jnp.abs(g) ** 2)

    def ascend(grads: PyTree, params: PyTree, rho: Array) -> PyTree:
        del params
        raised = jax.tree.map(lambda g: inverse(g) * g, grads)
        # <g, F g> = ||sqrt(F) g||^2
        length = norm(jax.tree.map(lambda g: jnp.sqrt(inverse(g)) * g, grads))
        return of_length(rho, raised, length)

    def measure(grads: PyTree, perturbation: PyTree) -> dict[str, Array]:
        del perturbation
        # As the ascent takes them: in bfloat16 1 + g^2 is 1.
        exact = map(at_least_float32, jax.tree.leaves(grads))
        sums = [jnp.sum(inverse(g)) for g in exact]
        total = sum((one.astype(jnp.float32) for one in sums), jnp.zeros([]))
        return {"inverse_fisher": total / max(size(grads), 1)}

    return two_pass(rho, ascend, measure=measure, aux=aux, grouped=grouped)


ENTRY = Entry(
    fisher_sam,
    "Fisher SAM (rho = {rho:g})",
    fields={"rho": check_strength, "eta": _eta},
)
