"""Sharpness-aware minimization: the weights ascend along the gradient first.

Reference: Foret et al. (2021), arXiv 2010.01412, equations (2) and (3).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import check, check_real
from samrobust.sharpness.trees import norm
from samrobust.sharpness.two_pass import two_pass
from samrobust.types import Array, Entry, Field, PyTree

__all__ = ["ENTRY", "check_strength", "sam", "unit"]


def sam(
    rho: float | Array | optax.Schedule, *, aux: PyTree = None, grouped: bool = False
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

    >>> loss = lambda w: jnp.sum(w**2)
    >>> w = jnp.array([3.0, 4.0])
    >>> tx = optax.chain(sam(rho=0.5), optax.sgd(0.1))
    >>> updates, _ = tx.update(jax.grad(loss)(w), tx.init(w), w,
    ...                        grad_fn=jax.grad(loss))
    >>> optax.apply_updates(w, updates).round(4)
    Array([2.34, 3.12], dtype=float32)
    """
    ascent = optax.stateless(lambda grads, _: unit(grads, norm(grads)))
    return two_pass(rho, ascent, aux=aux, grouped=grouped)


def unit(tree: PyTree, length: Array) -> PyTree:
    """Returns a tree divided by a length; zeros where that is zero."""
    safe = jnp.where(length != 0, length, 1.0)

    def divide(leaf: Any) -> Array:
        scaled = leaf / safe.astype(jnp.finfo(leaf.dtype).dtype)
        return jnp.where(length != 0, scaled, jnp.zeros_like(leaf))

    return jax.tree.map(divide, tree)


def check_strength(**values: Any) -> None:
    """Refuses strengths that are lost in the rounding of float32 weights, but for 0."""
    check_real(0, 1e3, **values)
    for name, value in values.items():
        rounds_away = 0 < value < 1e-5
        check(not rounds_away, f"1e-05 <= {name}", "0 is off.", **{name: value})


ENTRY = Entry(sam, "SAM (rho = {rho:g})", fields={"rho": Field(0.0, check_strength)})
