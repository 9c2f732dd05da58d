"""FSAM: SAM along the weights whose squared gradients are the largest.

Reference: Zhong et al. (2022), arXiv 2210.05497, Section 3.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import check, check_strength, count, share
from samrobust.sharpness.masks import (
    is_bias,
    largest,
    live,
    masked,
    normalizations,
    nothing,
    restricted,
    size,
    where_given,
)
from samrobust.sharpness.refusals import check_ungrouped
from samrobust.sharpness.trees import norm, of_length
from samrobust.sharpness.two_pass import two_pass
from samrobust.types import Array, ArrayLike, Entry, PyTree

__all__ = ["ENTRY", "fsam"]


def fsam(
    rho: ArrayLike | optax.Schedule,
    keep_ratio: float = 0.1,
    every: int = 100,
    *,
    aux: PyTree = None,
    grouped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds FSAM: the gradient at w + m rho g / ||g||_2, m a mask of large g^2.

    m keeps the largest g_i^2 of the batch at which it is made, the empirical Fisher
    information. Biases, embeddings and normalization layers (known by a `scale`) stand
    outside: there m = 1.

    Args:
      rho: as of `sam`; the norm is that of the whole gradient, so that less of it is
        used.
      keep_ratio: in [0, 1], the fraction of the weights that m keeps; 1: SAM.
      every: >= 1, updates between two masks; the first update makes the first.
      aux: see `two_pass`.
      grouped: must be False: the mask is that of the batch.

    Returns:
      A transformation with the contract of `two_pass`, whose state holds m. Costs one
      further pass; a new mask costs a sort. **Guarantees**: `keep_ratio=1` is `sam` bit
      for bit. The metric `live` is the fraction of all weights that were perturbed.

    Raises:
      ValueError: as `two_pass`; if keep_ratio or every is out of range; in `update`,
        if there are no other weights than those outside.

    Reference: Zhong et al. (2022), arXiv 2210.05497; as `SAM_Mask` in the authors'
    code, WHU-ZQH/FSAM4PLM, for language models. *Our deviation*: no 1e-7 is added to
    the norm, zero is treated exactly instead; LayerNorm is outside as BatchNorm is. It
    is not "Friendly SAM", also called F-SAM.
    """
    share(keep_ratio=keep_ratio)
    count(every=every)
    check_ungrouped("fsam", grouped=grouped)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        outside = _outside(params)
        scores = jax.tree.map(
            lambda g, out: None if out else jnp.abs(g) ** 2, updates, outside
        )
        wanted = "weights besides biases, embeddings and normalizations, for fsam"
        check(size(scores) > 0, wanted, weights=size(scores))

        def renew() -> PyTree:
            found = largest(scores, int(keep_ratio * size(scores)))
            return where_given(
                lambda g, _, f: jnp.abs(g) >= 0 if f is None else f,
                updates,
                state,
                found,
            )

        mask = jax.lax.cond(extra_args["step"] % every == 0, renew, lambda: state)
        ascent = of_length(extra_args["rho"], updates, norm(updates))
        return masked(restricted(mask, updates), ascent), mask

    ascent = optax.GradientTransformationExtraArgs(nothing, update)
    return two_pass(rho, ascent, measure=live, aux=aux)


def _outside(params: PyTree) -> PyTree:
    """Returns which parameters the mask does not count."""

    def decide(path: Any, w: Array, normalizes: bool) -> bool:
        del w
        embeds = "embed" in jax.tree_util.keystr(path).lower()
        return normalizes or embeds or is_bias(path)

    return jax.tree_util.tree_map_with_path(decide, params, normalizations(params))


ENTRY = Entry(
    fsam,
    "FSAM (rho = {rho:g})",
    fields={
        "rho": check_strength,
        "keep_ratio": share,
        "every": count,
    },
)
