"""Adaptive SAM: a ball of weights that scales with each weight.

Reference: Kwon et al. (2021), arXiv 2102.11600, Algorithm 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import amount, check, check_strength
from samrobust.sharpness.masks import is_bias
from samrobust.sharpness.trees import norm, of_length
from samrobust.sharpness.two_pass import two_pass
from samrobust.types import Array, ArrayLike, Entry, PyTree

__all__ = ["ENTRY", "asam"]


def asam(
    rho: ArrayLike | optax.Schedule,
    eta: float = 0.01,
    *,
    is_fixed: Callable[[Any], bool] = is_bias,
    aux: PyTree = None,
    grouped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds ASAM: the gradient at w + rho T^2 g / ||T g||_2, T = |w| + eta.

    Args:
      rho: the radius in the norm ||T^-1 e||_2, or a schedule of it; the authors' is 0.5
        for CIFAR-10.
      eta: >= 0, added to |w|.
      is_fixed: of the path of a parameter, whether T is 1 there; by default of biases,
        known by their name: `b`, or one with `bias` in it. Scales of normalization
        layers are adapted.
      aux: see `two_pass`.
      grouped: see `two_pass`.

    Returns:
      A transformation with the contract of `two_pass`. Costs one further pass.

    Raises:
      ValueError: as `two_pass`; if eta is negative or not finite.

    Reference: Kwon et al. (2021), arXiv 2102.11600, Algorithm 1; T as in the authors'
    code, SamsungLabs/ASAM. *Our deviation*: no 1e-16 is added to the norm, zero is
    treated exactly instead.

    >>> tx = optax.chain(asam(rho=0.5, eta=0.0), optax.sgd(0.1))
    >>> w = {"kernel": jnp.array([3.0, 4.0])}
    >>> gradient = jax.grad(lambda w: jnp.sum(w["kernel"]))
    >>> updates, _ = tx.update(gradient(w), tx.init(w), w, grad_fn=gradient)
    >>> updates["kernel"]
    Array([-0.1, -0.1], dtype=float32)
    """
    amount(eta=eta)
    check(callable(is_fixed), "is_fixed as a function of a path", is_fixed=is_fixed)

    def scale(path: Any, w: Array, g: Array) -> Array:
        return g if is_fixed(path) else (jnp.abs(w) + eta) * g  # T g

    def ascend(grads: PyTree, params: PyTree, rho: Array) -> PyTree:
        # argmax of <g, e> over ||T^-1 e|| <= rho is rho T^2 g / ||T g||.
        scaled = jax.tree_util.tree_map_with_path(scale, params, grads)
        twice = jax.tree_util.tree_map_with_path(scale, params, scaled)
        return of_length(rho, twice, norm(scaled))

    return two_pass(rho, ascend, aux=aux, grouped=grouped)


ENTRY = Entry(
    asam,
    "ASAM (rho = {rho:g})",
    fields={"rho": check_strength, "eta": amount},
)
