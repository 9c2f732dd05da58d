"""What sharpness keeps in an optimizer's state, and how a training step reads it.

The readers find these states in a chain at any depth.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from samrobust.sharpness.refusals import is_gap
from samrobust.sharpness.trees import at_least_float32
from samrobust.types import Array, PyTree

__all__ = [
    "OffsetState",
    "TwoPassMetrics",
    "TwoPassState",
    "fresh_aux",
    "gradient_point",
    "last_aux",
    "last_metrics",
    "shifted",
]


class TwoPassMetrics(NamedTuple):
    """Measurements of the last update, float32 scalars.

    With groups all but `rho` are means over the groups.

    Attributes:
      rho: the strength used, by which the ascent's direction is multiplied; of SAM,
        the intended length of e.
      applied_rho: the length by which the parameters moved. Below rho where e rounds
        away, as in bfloat16 parameters; 0 with a zero gradient.
      gradient_norm: ||g(w)||_2.
      perturbed_gradient_norm: ||g(w + e)||_2.
      cosine: cosine of the angle between g(w) and g(w + e); 0 if either is zero.
    """

    rho: Array
    applied_rho: Array
    gradient_norm: Array
    perturbed_gradient_norm: Array
    cosine: Array


class TwoPassState(NamedTuple):
    """State of `two_pass`; holds no copy of the parameters.

    Attributes:
      step: int32 scalar, the number of updates so far (what a schedule is given).
      metrics: of the last update.
      aux: the auxiliary output of the last second pass, or None.
      ascent: of the ascent; without leaves where that has no memory.
      measured: the method's own metrics of the last update, float32 scalars by name.
    """

    step: Array
    metrics: TwoPassMetrics
    aux: PyTree
    ascent: PyTree
    measured: dict[str, Array]


class OffsetState(NamedTuple):
    """State of a method whose next gradient is wanted elsewhere than at the weights.

    Attributes:
      step: int32 scalar, the number of updates so far.
      offset: from the weights to where the gradient is wanted, in float32 at least.
      inner: of what makes the updates.
      measured: metrics of the last update, float32 scalars by name.
    """

    step: Array
    offset: PyTree
    inner: PyTree
    measured: dict[str, Array]


_Params = TypeVar("_Params")  # any tree


def last_metrics(opt_state: PyTree) -> dict[str, Array]:
    """Returns the metrics of the sharpness method in an optimizer state, or {}.

    Args:
      opt_state: the state of a chain that may hold such a method, at any depth.

    Returns:
      Float32 scalars by name: of a `two_pass` the fields of `TwoPassMetrics`, of others
      `rho` and `applied_rho` or `distance`, and what else the method measures.
    """
    if (two_pass := _find(opt_state, TwoPassState)) is not None:
        return two_pass.metrics._asdict() | two_pass.measured
    offset = _find(opt_state, OffsetState)
    return {} if offset is None else offset.measured


def last_aux(opt_state: PyTree, default: PyTree = None) -> PyTree:
    """Returns the auxiliary output of the last second pass of a `two_pass`.

    Args:
      opt_state: the state of a chain that may hold a `two_pass`, at any depth.
      default: returned where there is no `two_pass`, or one that keeps no aux.

    Returns:
      What `grad_fn` returned as its second value at w + e(w).
    """
    state = _find(opt_state, TwoPassState)
    return default if state is None or state.aux is None else state.aux


def fresh_aux(
    opt_state: PyTree, before: PyTree, traced: PyTree, default: PyTree
) -> PyTree:
    """Returns the auxiliary output of a second pass in the last update, if it took one.

    Args:
      opt_state: the state of a chain after the update.
      before: its state before.
      traced: what `grad_fn` returned as its second value when it was traced.
      default: returned where no `two_pass` took part, as under optax's
        `conditionally_transform` or `apply_if_finite`; of the structure of the output.
    """
    now, then = _find(opt_state, TwoPassState), _find(before, TwoPassState)
    if now is None or then is None or now.aux is None:
        return default
    pairs = zip(jax.tree.leaves(now.aux), jax.tree.leaves(traced), strict=True)
    if all(kept is found for kept, found in pairs):  # inside no `lax.cond`
        return now.aux
    took_part = now.step != then.step
    return jax.tree.map(lambda a, b: jnp.where(took_part, a, b), now.aux, default)


def gradient_point(params: _Params, opt_state: PyTree) -> _Params:
    """Returns the weights at which the next gradient is to be taken.

    Those of a method that looks ahead of the weights, such as `msam`; else `params`.

        grads = jax.grad(loss)(gradient_point(params, opt_state))
        updates, opt_state = tx.update(grads, opt_state, params)

    Args:
      params: the weights, of any tree. What the method knows nothing of, as inside
        `optax.masked`, and what is no array, stays as it is.
      opt_state: the state of a chain that may hold such a method, at any depth.
    """
    state = _find(opt_state, OffsetState)
    if state is None:
        return params
    offset, structure = state.offset, jax.tree.structure(params)
    leaves = jax.tree.leaves(offset)
    if len(leaves) == structure.num_leaves:  # Flax NNX has variables of its own there
        return shifted(params, jax.tree.unflatten(structure, leaves))

    def shift(e: Array | None, w: Any) -> Any:
        return w if is_gap(e) else shifted(w, e)

    return jax.tree.map(shift, offset, params, is_leaf=is_gap)


def shifted(params: _Params, offset: PyTree) -> _Params:
    """Returns the sum, rounded once to the parameters' dtypes."""
    return jax.tree.map(
        lambda w, e: (at_least_float32(w) + e).astype(w.dtype), params, offset
    )


_State = TypeVar("_State")


def _find(opt_state: PyTree, kind: type[_State]) -> _State | None:
    def is_kind(node: Any) -> bool:
        return isinstance(node, kind)

    states = filter(is_kind, jax.tree.leaves(opt_state, is_leaf=is_kind))
    return next(states, None)
