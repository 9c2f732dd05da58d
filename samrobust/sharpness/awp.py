"""Adversarial weight perturbation: each weight tensor moves in proportion to its norm.

Reference: Wu, Xia and Wang (2020), arXiv 2004.05884, equations (8) and (9).
"""

from typing import Any

import jax
import optax

from samrobust.checks import (
    BATCH_STATS,
    LARGEST_REAL,
    check_real,
    check_strength,
    one_of,
)
from samrobust.sharpness.trees import norm, of_length, zeros_as
from samrobust.sharpness.two_pass import Combine, two_pass
from samrobust.types import Array, ArrayLike, Entry, Field, PyTree

__all__ = ["ENTRY", "FIELDS", "awp", "decay_at_the_moved"]


def awp(
    gamma: ArrayLike | optax.Schedule,
    weight_decay: float = 0.0,
    *,
    aux: PyTree = None,
    grouped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds AWP: the gradient at w + v with v_l = gamma ||w_l|| g_l / ||g_l||.

    l runs over the weight tensors of two dimensions and more; biases and the parameters
    of normalization layers stay. Norms are those of one tensor.

    Args:
      gamma: length of v_l relative to w_l, >= 0, or a schedule of it; the authors' is
        0.01 with adversarial training and 0.005 with TRADES.
      weight_decay: >= 0; `weight_decay * v` is added, so that with
        `optax.add_decayed_weights(weight_decay)` behind it decay acts at w + v, as in
        the authors' code.
      aux: see `two_pass`.
      grouped: see `two_pass`.

    Returns:
      A transformation with the contract of `two_pass`. Costs one further pass.

    Raises:
      ValueError: as `two_pass`; if weight_decay is negative or not finite.

    Reference: Wu, Xia and Wang (2020), arXiv 2004.05884, as their code,
    csdongxian/AWP. *Our deviation*: no 1e-20 is added to the norm of a step, zero is
    treated exactly instead; no third forward pass on clean images, which their
    code makes for its log and which moves BatchNorm's statistics too.

    >>> import jax.numpy as jnp
    >>> tx = optax.chain(awp(gamma=0.5), optax.sgd(0.1))
    >>> w = jnp.array([[3.0, 4.0]])
    >>> gradient = jax.grad(lambda w: 0.5 * jnp.sum(w**2))
    >>> updates, _ = tx.update(gradient(w), tx.init(w), w, grad_fn=gradient)
    >>> updates
    Array([[-0.45000002, -0.6       ]], dtype=float32)
    """
    check_real(0, LARGEST_REAL, weight_decay=weight_decay)

    def ascend(grads: PyTree, params: PyTree, gamma: Array) -> PyTree:
        def move(g: Array, w: Array) -> Array:
            if g.ndim <= 1:
                return zeros_as(g)
            # v_l = gamma ||w_l|| g_l / ||g_l||: each tensor by its own norms.
            return of_length(gamma * norm(w), g, norm(g))

        return jax.tree.map(move, grads, params)

    combine = decay_at_the_moved(weight_decay)
    return two_pass(gamma, ascend, combine=combine, aux=aux, grouped=grouped)


def decay_at_the_moved(weight_decay: float) -> Combine:
    """Returns how to combine gradients so that weight decay acts at w + v.

    Decay of w + v is decay of w, which comes behind in the chain, and of v.
    """

    def combine(first: PyTree, second: PyTree, perturbation: PyTree) -> PyTree:
        del first
        if weight_decay == 0:
            return second
        return jax.tree.map(_decayed, second, perturbation)

    def _decayed(g: Array, v: Any) -> Array:
        return g.astype(v.dtype) + weight_decay * v

    return combine


FIELDS = {
    "gamma": check_strength,
    # The authors' code throws the statistics of the first pass away.
    "batch_stats": Field("second", one_of(*BATCH_STATS)),
}
ENTRY = Entry(awp, "AWP (gamma = {gamma:g})", fields=FIELDS)
