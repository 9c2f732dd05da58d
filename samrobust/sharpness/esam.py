"""Efficient SAM: fewer weights are perturbed, and fewer examples passed through again.

Reference: Du et al. (2022), arXiv 2110.03141, Algorithm 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import check_real, check_strength
from samrobust.sharpness.masks import live, masked
from samrobust.sharpness.refusals import check_present, check_ungrouped
from samrobust.sharpness.trees import norm, of_length
from samrobust.sharpness.two_pass import two_pass
from samrobust.types import Array, ArrayLike, Entry, PyTree

__all__ = ["ENTRY", "esam"]


_fraction = functools.partial(check_real, 0.01, 1)


def esam(
    rho: ArrayLike | optax.Schedule,
    beta: float = 0.6,
    gamma: float = 0.5,
    *,
    aux: PyTree = None,
    grouped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds ESAM: the gradient over some examples at w + m rho g / (beta ||m g||_2).

    m is 1 for a parameter tensor with probability beta, else 0 (stochastic weight
    perturbation). The examples are the gamma B of the batch of B whose losses rise most
    from w to there (sharpness-sensitive data selection).

    Args:
      rho: as of `sam`.
      beta: in [0.01, 1]; 1: all tensors.
      gamma: in [0.01, 1]; 1: all examples.
      aux: see `two_pass`.
      grouped: must be False.

    Returns:
      A transformation with the contract of `two_pass`, `choose` among it: with
      gamma < 1, `update` wants `losses`, `loss_fn` and a `grad_fn` that takes examples;
      with beta < 1, a `key`. Costs gamma of a pass and a forward pass, 1/3, more than a
      plain step; masked tensors save XLA nothing. **Guarantees**: `beta=1, gamma=1` is
      `sam` bit for bit. Metrics: `live`, the fraction of the weights perturbed;
      `chosen`, the number of examples; `rise` and `chosen_rise`, the mean rise of the
      losses of all and of those.

    Raises:
      ValueError: as `two_pass`; if beta or gamma is out of range.

    Reference: Du et al. (2022), arXiv 2110.03141, Algorithm 1. *Our deviation* from the
    authors' code, dydjw9/Efficient_SAM: the int(gamma B) examples with the highest rise
    are taken, theirs takes those above the last of these, one fewer; the first update
    draws a mask as all others do; the forward pass does not move BatchNorm's running
    statistics; no 1e-7 is added to the norm, zero is treated exactly instead. With a
    mean loss in place of one an example, theirs selects nothing.
    """
    _fraction(beta=beta, gamma=gamma)
    check_ungrouped("esam", grouped=grouped)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        del params
        rho = extra_args["rho"]
        if beta == 1:
            return of_length(rho, updates, norm(updates)), state
        check_present(key=extra_args.get("key"))
        leaves, structure = jax.tree.flatten(updates)
        # float32 whatever `jax_enable_x64` says: with it, other numbers are drawn.
        drawn = jax.random.uniform(extra_args["key"], (len(leaves),), jnp.float32)
        mask = jax.tree.unflatten(structure, list(drawn < beta))
        chosen = masked(mask, updates)
        return of_length(rho / beta, chosen, norm(chosen)), state

    def choose(rises: Array) -> Array:
        return jax.lax.top_k(rises, _chosen(gamma, len(rises)))[1]

    return two_pass(
        rho,
        optax.GradientTransformationExtraArgs(optax.identity().init, update),
        choose=None if gamma == 1 else choose,
        measure=live,
        aux=aux,
        passes=1.0 if gamma == 1 else gamma + 1 / 3,
    )


def _chosen(gamma: float, batch_size: int) -> int:
    return max(1, int(gamma * batch_size))


ENTRY = Entry(
    esam,
    "ESAM (rho = {rho:g})",
    fields={
        "rho": check_strength,
        "beta": _fraction,
        "gamma": _fraction,
    },
    chosen=lambda values, size: _chosen(values["gamma"], size),
)
