"""LookSAM: SAM at every k-th step, and between these what it found last.

Reference: Liu et al. (2022), arXiv 2203.02714, Algorithm 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import amount, check_strength, count
from samrobust.sharpness.masks import restricted, where_given
from samrobust.sharpness.refusals import (
    as_template,
    check_output,
    check_present,
    is_off,
)
from samrobust.sharpness.sam import sam
from samrobust.sharpness.state import last_metrics
from samrobust.sharpness.trees import (
    at_least_float32,
    mean_norm_of_groups,
    mean_of_groups,
    norm,
    of_length,
    projection,
)
from samrobust.types import Array, ArrayLike, Entry, PyTree

__all__ = ["ENTRY", "LookSamState", "looksam"]


class LookSamState(NamedTuple):
    """State of `looksam`.

    Attributes:
      two_pass: a `TwoPassState`, of SAM; its metrics are of the last step with two
        passes, except for the gradient's norm, which is of the last step.
      vertical: g_v, in float32 at least.
    """

    two_pass: Any
    vertical: PyTree


def looksam(
    rho: ArrayLike | optax.Schedule,
    k: int = 10,
    alpha: float = 0.7,
    *,
    aux: PyTree = None,
    grouped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds LookSAM: g + alpha ||g|| g_v / ||g_v||, and SAM's g_s every k steps.

    g_v = g_s - <g_s, g> g / ||g||^2 is what of SAM's gradient is perpendicular to that
    at w, by one projection over all parameters; it changes slowly, and is kept from the
    last step with two passes.

    Args:
      rho: as of `sam`.
      k: >= 1; the first of every k steps has two passes; 1: SAM.
      alpha: >= 0, the share of g_v.
      aux: see `two_pass`; in a step of one pass `update` wants `aux`, the auxiliary
        output of the pass that gave the gradients, and it is kept.
      grouped: see `two_pass`; g and g_s are then means over the groups.

    Returns:
      A transformation with the contract of `two_pass`. Costs 1/k of a further pass: the
      others are skipped by `lax.cond` (under `vmap` they are not). **Guarantees**:
      `k=1` is `sam` bit for bit.

    Raises:
      ValueError: as `two_pass`; if k or alpha is out of range.

    Reference: Liu et al. (2022), arXiv 2203.02714, Algorithm 1; k = 10 and alpha = 0.7
    as in the authors' README, yong-6/LookSAM. Ports that project each tensor by itself
    are another method.
    """
    count(k=k)
    amount(alpha=alpha)
    full = sam(rho, aux=aux, grouped=grouped)
    if k == 1 or is_off(rho):
        return full

    def init(params: PyTree) -> LookSamState:
        vertical = jax.tree.map(lambda w: jnp.zeros_like(at_least_float32(w)), params)
        return LookSamState(full.init(params), vertical)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        *,
        aux: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, LookSamState]:
        before = state.two_pass

        def two_passes() -> tuple[PyTree, LookSamState]:
            outcome, after = full.update(updates, before, params, **extra_args)
            g, g_s = (
                jax.tree.map(at_least_float32, tree) for tree in (mean(), outcome)
            )
            along = projection(g_s, g)
            # Where SAM did not move, the difference is rounding alone.
            moved = last_metrics(after)["applied_rho"] != 0

            def part(s: Array, old: Array, a: Array) -> Array:
                del old
                return jnp.where(moved, s - a, jnp.zeros_like(s))

            vertical = where_given(part, g_s, state.vertical, along)
            return outcome, LookSamState(after, vertical)

        if before.aux is not None:
            check_present(aux=aux)
            _, aux = check_output((updates, aux), updates, as_template(before.aux))

        def one_pass() -> tuple[PyTree, LookSamState]:
            g = mean()
            length = norm(g)
            vertical = restricted(state.vertical, g)
            added = of_length(alpha * length, vertical, norm(vertical))
            outcome = jax.tree.map(
                lambda a, b: (at_least_float32(a) + b).astype(a.dtype), g, added
            )
            # The others stay: zeros would make means over steps meaningless.
            shown = mean_norm_of_groups(updates) if grouped else length
            metrics = before.metrics._replace(gradient_norm=shown.astype(jnp.float32))
            after = before._replace(
                step=optax.safe_increment(before.step), metrics=metrics, aux=aux
            )
            return outcome, LookSamState(after, state.vertical)

        def mean() -> PyTree:
            return mean_of_groups(updates) if grouped else updates

        return jax.lax.cond(before.step % k == 0, two_passes, one_pass)

    return optax.GradientTransformationExtraArgs(init, update)


ENTRY = Entry(
    looksam,
    "LookSAM (rho = {rho:g})",
    fields={"rho": check_strength, "k": count, "alpha": amount},
    passes=lambda values: 1 / values["k"],
)
