"""Sharpness-aware minimization: the weights ascend along the gradient first.

Reference: Foret et al. (2021), arXiv 2010.01412, equations (2) and (3).
"""

import optax

from samrobust.checks import check_strength
from samrobust.sharpness.trees import norm, of_length
from samrobust.sharpness.two_pass import two_pass
from samrobust.types import Array, ArrayLike, Entry, PyTree

__all__ = ["ENTRY", "sam"]


def sam(
    rho: ArrayLike | optax.Schedule, *, aux: PyTree = None, grouped: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Builds SAM: the gradient at w + rho g / ||g||_2 in place of the gradient g at w.

    Args:
      rho: the radius in the l2 norm of all parameters together, or a schedule of it.
      aux: see `two_pass`.
      grouped: see `two_pass`; m-sharpness.

    Returns:
      A transformation with the contract of `two_pass`, its guarantees among it. Costs
      one further pass.

    Raises:
      ValueError: as `two_pass`.

    Reference: Foret et al. (2021), arXiv 2010.01412. As in the PyTorch implementation
    the paper uses, there is one norm over all parameters and no weight decay in the
    ascent direction. *Our deviation*: no 1e-12 is added to the norm, zero is treated
    exactly instead. Their own code, google-research/sam, averages g(w + e) over devices
    as `grouped` does over groups, but has 0.5 weight_decay ||w||^2 in the loss, hence
    in both gradients, and clips the mean gradient to norm 5. `grad_fn` and the updates
    may hold that term, and `optax.clip_by_global_norm(5.0)` may follow.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> loss = lambda w: jnp.sum(w**2)
    >>> w = jnp.array([3.0, 4.0])
    >>> tx = optax.chain(sam(rho=0.5), optax.sgd(0.1))
    >>> updates, _ = tx.update(jax.grad(loss)(w), tx.init(w), w,
    ...                        grad_fn=jax.grad(loss))
    >>> optax.apply_updates(w, updates).round(4)
    Array([2.34, 3.12], dtype=float32)
    """

    def ascend(grads: PyTree, params: PyTree, rho: Array) -> PyTree:
        del params
        return of_length(rho, grads, norm(grads))

    return two_pass(rho, ascend, aux=aux, grouped=grouped)


ENTRY = Entry(sam, "SAM (rho = {rho:g})", fields={"rho": check_strength})
