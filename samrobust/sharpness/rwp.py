"""RWP: weights are perturbed for the examples alone that are learned already.

Reference: Yu et al. (2022), arXiv 2205.14826, Algorithm 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import LARGEST_REAL, amount, check_real, count
from samrobust.sharpness.awp import FIELDS, decay_at_the_moved
from samrobust.sharpness.refusals import check_present, check_ungrouped
from samrobust.sharpness.trees import norm, of_length, zeros_as
from samrobust.sharpness.two_pass import two_pass
from samrobust.types import Array, ArrayLike, Entry, PyTree

__all__ = ["ENTRY", "rwp"]


def rwp(
    gamma: ArrayLike | optax.Schedule,
    threshold: float = 1.7,
    num_steps: int = 10,
    weight_decay: float = 0.0,
    *,
    aux: PyTree = None,
    grouped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds RWP: the gradient at w + v, v the end of an ascent on small losses.

    S <- S + grad h(w + v), v <- gamma ||w|| S / ||S||, from S = v = 0, in `num_steps`
    steps, where h is the mean over the batch of the losses below c, others counting 0.
    Both norms are over all weight tensors of two dimensions and more together; biases
    and the parameters of normalization layers stay.

    Args:
      gamma: length of v relative to w, >= 0, or a schedule of it; the authors' is 0.01.
      threshold: c >= 0; the authors' is 1.7 for CIFAR-10 and 4 for CIFAR-100.
      num_steps: >= 1, of the ascent; the authors' is 10.
      weight_decay: see `samrobust.sharpness.awp`.
      aux: see `two_pass`.
      grouped: must be False.

    Returns:
      A transformation with the contract of `two_pass`; `update` also wants
      `loss_fn(params)`, the losses [B], which is differentiated. Costs `num_steps` + 1
      further passes. Where no loss is below c, v = 0. **Guarantees**: with one step and
      all losses below c, v is that of `awp` where there is one weight tensor.

    Raises:
      ValueError: as `two_pass`; if a value is out of range, or `grouped`.

    Reference: Yu et al. (2022), arXiv 2205.14826, as their code,
    ChaojianYu/Robust-Weight-Perturbation: always ten steps, and one ratio of norms over
    all tensors. *Our deviation*: the learning rate of their ascent, which the ratio
    takes out again, is left out, and no 1e-20 is added to a norm.
    """
    amount(threshold=threshold)
    count(num_steps=num_steps)
    check_real(0, LARGEST_REAL, weight_decay=weight_decay)
    check_ungrouped("rwp", grouped=grouped)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        check_present(loss_fn=extra_args.get("loss_fn"))
        length = extra_args["rho"] * norm(_of_weights(params))

        def small_losses(moves: PyTree) -> Array:
            losses = extra_args["losses_after"](moves)
            return jnp.mean(jnp.where(losses < threshold, losses, 0.0))

        def step(_: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            total, moves = carry
            # Uphill for complex weights too, of which JAX gives the conjugate.
            found = jax.tree.map(jnp.conj, jax.grad(small_losses)(moves))
            found = _of_weights(found)
            total = jax.tree.map(jnp.add, total, found)
            return total, of_length(length, total, norm(total))

        start = jax.tree.map(zeros_as, updates)
        return jax.lax.fori_loop(0, num_steps, step, (start, start))[1], state

    return two_pass(
        gamma,
        optax.GradientTransformationExtraArgs(optax.identity().init, update),
        combine=decay_at_the_moved(weight_decay),
        aux=aux,
        passes=num_steps + 1.0,
    )


def _of_weights(tree: PyTree) -> PyTree:
    """Returns a tree with zeros in place of biases and other vectors."""
    return jax.tree.map(lambda x: x if x.ndim > 1 else zeros_as(x), tree)


ENTRY = Entry(
    rwp,
    "RWP (gamma = {gamma:g})",
    fields={
        **FIELDS,
        "threshold": amount,
        "num_steps": count,
    },
)
