"""Momentum-SAM: one pass a step, at the weights moved on along the last update.

Reference: Becker, Altrock and Risse (2024), arXiv 2401.12033, Algorithm 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import check_strength
from samrobust.sharpness.refusals import (
    as_transformation,
    check_present,
    check_rho,
    check_scheduled,
    check_steps,
    check_whole_tree,
)
from samrobust.sharpness.state import OffsetState, shifted
from samrobust.sharpness.trees import at_least_float32, norm, of_length, width, zeros
from samrobust.types import ArrayLike, Entry, PyTree

__all__ = ["ENTRY", "msam"]


def msam(
    rho: ArrayLike | optax.Schedule, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Builds MSAM: the gradient at w - rho v / ||v||_2, v the momentum.

    v is read off the optimizer's last update, which is -lr v for SGD with momentum; of
    any other it is what that moves by. Weights stay w: the gradient is taken at
    `gradient_point`, and evaluation, averages and checkpoints need no way back.

        tx = msam(0.3, optax.sgd(0.1, momentum=0.9))
        grads = jax.grad(loss)(gradient_point(params, opt_state))
        updates, opt_state = tx.update(grads, opt_state, params)

    With micro-batches put MSAM inside, `optax.MultiSteps(msam(rho, sgd), k)`: all k
    gradients are taken at the same moved weights.

    Args:
      rho: the distance in the l2 norm of all parameters together, or a schedule of it;
        the authors' is 0.3, and 3 for a WideResNet.
      optimizer: makes the updates, its weight decay at the moved weights, as theirs.

    Returns:
      A transformation that wraps the optimizer and costs no further pass.
      **Guarantees**: where `rho` is 0, the updates are the optimizer's bit for bit; the
      first gradient is that at w. Metrics: `rho`, and `applied_rho`, the length of the
      next offset.

    Raises:
      ValueError: unless rho is as for `sam` and the optimizer an optax transformation;
        in `init`, if it accumulates gradients by `optax.MultiSteps`; in `update`,
        without `params`.

    Reference: Becker, Altrock and Risse (2024), arXiv 2401.12033; as the authors' code,
    MarlonBecker/MSAM, for SGD. *Our deviation*: their AdamW moves along its average of
    gradients, before it is divided by their size; after an update at a rate of 0, as
    the first of a cyclic schedule, the gradient is that at w; their weights are the
    moved ones and have to be moved back, and BatchNorm's running statistics stay those
    at the moved ones, as there; no 1e-12 is added to the norm, zero is treated exactly
    instead.
    """
    check_rho(rho)
    schedule = rho if callable(rho) else lambda _: rho
    inner = as_transformation(optimizer=optimizer)

    def init(params: PyTree) -> OffsetState:
        exact = jax.tree.map(at_least_float32, params)
        offset = jax.tree.map(lambda w: zeros(w.shape, w.dtype, w), exact)
        measured = {name: zeros((), jnp.float32, params) for name in _METRICS}
        step, state = jnp.zeros([], jnp.int32), inner.init(params)
        check_steps(state)
        return OffsetState(step, offset, state, measured)

    def update(
        updates: PyTree,
        state: OffsetState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, OffsetState]:
        check_present(params=params)
        check_whole_tree(updates, params)
        moved = shifted(params, state.offset)
        updates, after = inner.update(updates, state.inner, moved, **extra_args)
        scheduled = schedule(state.step)
        check_scheduled(scheduled)
        radius = jnp.maximum(jnp.asarray(scheduled, width(updates)), 0.0)
        exact = jax.tree.map(at_least_float32, updates)
        offset = of_length(radius, exact, norm(exact))
        shown = (radius + jnp.zeros_like(norm(offset)), norm(offset))
        shown = (value.astype(jnp.float32) for value in shown)
        measured = dict(zip(_METRICS, shown, strict=True))
        step = jnp.asarray(optax.safe_increment(state.step))
        return updates, OffsetState(step, offset, after, measured)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore


_METRICS: tuple[str, ...] = ("rho", "applied_rho")

ENTRY = Entry(msam, "MSAM (rho = {rho:g})", fields={"rho": check_strength}, passes=0.0)
