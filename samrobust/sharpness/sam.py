"""Sharpness-aware minimisation as an optax gradient transformation.

It comes first in a chain and turns the gradient g(w) into g(w + e(w)), where
e(w) = rho g(w) / ||g(w)||_2. Weight decay, momentum and learning rate come after it
and act at w:

    tx = optax.chain(sam(rho=0.2), optax.add_decayed_weights(5e-4), optax.sgd(0.1))
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)

With `grouped=True` every group of examples has an ascent direction of its own
(m-sharpness): gradients then carry a leading axis of groups until SAM averages them.
Which examples make a group, and on which device, is the business of the caller and of
`grad_fn`; so is which pass updates BatchNorm's running statistics, see `last_aux`. Out
of scope: adaptive and sparse variants.

Micro-batches: `grad_fn` must span the examples that the incoming updates come from.

* SAM outside, the right order: `optax.chain(sam(rho), steps.gradient_transformation())`
  with `steps = optax.MultiSteps(sgd, k)`. `grad_fn` is over the micro-batch; each
  ascends along its own gradient, as the groups of `grouped=True` do.
* SAM inside, `optax.MultiSteps(optax.chain(sam(rho), sgd), k)`: it is given the mean
  gradient of all k micro-batches, so `grad_fn` must be the gradient over all k. Given
  the last micro-batch alone it would descend by that one, and nothing can tell.

Reference: Foret et al. (2021), arXiv 2010.01412, equations (2) and (3), and Section
4.1 for m-sharpness.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samrobust.sharpness.refusals import (
    as_template,
    check_gradients,
    check_output,
    check_present,
    check_rho,
    check_scheduled,
    is_gap,
)
from samrobust.sharpness.trees import (
    at_least_float32,
    cosine,
    mean_of_groups,
    norm,
    width,
    zeros,
)
from samrobust.types import Array, PyTree

__all__ = ["GradFn", "SamMetrics", "SamState", "last_aux", "last_metrics", "sam"]

GradFn: TypeAlias = Callable[[PyTree], Any]


class SamMetrics(NamedTuple):
    """What the last update did, each a float32 scalar: SAM that is off shows here.

    With groups all but `rho` are means over the groups.

    Attributes:
      rho: the radius used, the intended length of e.
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


class SamState(NamedTuple):
    """The state of `sam`; holds no copy of the parameters.

    Attributes:
      step: int32 scalar, the number of updates so far (what a schedule is given).
      metrics: of the last update.
      aux: the auxiliary output of the last second pass, or None.
    """

    step: Array
    metrics: SamMetrics
    aux: PyTree


def sam(
    rho: float | Array | optax.Schedule, *, aux: PyTree = None, grouped: bool = False
) -> optax.GradientTransformationExtraArgs:
    """SAM: replaces the gradient at w by the gradient at w + rho g / ||g||.

    Args:
      rho: the radius in the l2 norm of all parameters together, in [0, inf), a number
        or a scalar array, also a traced one; or a schedule from the number of updates
        so far, int32, to it (negative values count as 0).
      aux: None if `grad_fn` returns gradients alone; else the structure of the second
        thing it returns (arrays or `jax.ShapeDtypeStruct`). The last value is then
        kept in the state: that is how BatchNorm statistics leave the second pass
        without a side effect. Read it with `last_aux`; zeros before the first update.
      grouped: every group of examples has a perturbation of its own. All leaves of the
        incoming updates are then [G, ...], the gradient of each group's mean loss at w;
        `grad_fn` is called once with perturbed parameters [G, ...] and returns
        gradients [G, ...] (aux has no such axis: it is kept as it comes). What goes
        down the chain is the mean over the groups, of the parameters' shapes.

    Returns:
      A transformation whose `update` takes the extra argument
      `grad_fn(params) -> grads`, or `-> (grads, aux)`: the gradient of the loss on the
      SAME examples (and the same augmentation, adversarial images, dropout key) that
      gave the incoming updates; with micro-batches see the module's docstring. It
      returns the shapes and dtypes of the updates.

      It needs all gradients: put `optax.masked`, `optax.partition` and the like after
      it. Frozen parameters stay out of the perturbation where their gradient is None or
      zero, as after `optax.masked(optax.set_to_zero(), frozen)`. Gradients of complex
      parameters come conjugated, as optax wants them.

      **Guarantees.** `sam(0)`, of a Python or NumPy number, hands the gradient (of
      groups: their mean) through bit for bit and never calls `grad_fn`. A zero gradient
      gives a zero perturbation, not NaN, group by group; a NaN among the gradients or
      from the schedule reaches the outcome. The perturbation is computed in the
      precision of each parameter, half precisions in float32, norms in the widest of
      them; gradients keep their dtypes. The state has a fixed structure and fixed
      dtypes: it works in `jit`, `vmap`, `lax.scan`, `jax.shard_map`, donation and
      checkpoints.

    Raises:
      ValueError: if rho is none of these; in `update`, if `params` or `grad_fn` is
        missing, the updates are not gradients of the parameters (of groups, with
        `grouped`), or `grad_fn` returns something else than said.

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
    check_rho(rho)
    template = as_template(aux)
    if not callable(rho) and not isinstance(rho, jax.Array) and rho == 0:
        plain = optax.stateless(mean_of_groups) if grouped else optax.identity()
        return optax.with_extra_args_support(plain)
    schedule = rho if callable(rho) else lambda _: rho
    ascend = jax.vmap(_ascend, (None, 0, None)) if grouped else _ascend
    compare = jax.vmap(_compare) if grouped else _compare

    def init(params: PyTree) -> SamState:
        def start(leaf: Any) -> Array:
            return zeros(leaf.shape, leaf.dtype, params)

        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        metrics = SamMetrics(*(start(scalar) for _ in SamMetrics._fields))
        no_aux = jax.tree.map(start, template)
        return SamState(jnp.zeros([], jnp.int32), metrics, no_aux)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SamState]:
        del extra_args
        check_present(params=params, grad_fn=grad_fn)
        assert grad_fn is not None  # for the type checker
        check_gradients(updates, params, grouped=grouped)
        updates = jax.tree.map(jnp.asarray, updates)
        scheduled = schedule(state.step)
        check_scheduled(scheduled)
        radius = jnp.maximum(jnp.asarray(scheduled, width(updates)), 0.0)
        perturbed_params, ascent = ascend(params, updates, radius)
        output = check_output(grad_fn(perturbed_params), updates, template)
        perturbed, new_aux = jax.tree.map(  # no weak types: the state's would change
            lambda leaf, like: jnp.asarray(leaf, like.dtype),
            output,
            (updates, template),
        )
        outcome, shown = compare(updates, perturbed, ascent)
        if grouped:
            outcome = mean_of_groups(outcome)
            shown = jax.tree.map(jnp.mean, shown)
        shown = (radius + jnp.zeros_like(shown[0]), *shown)  # varies as the others do
        metrics = SamMetrics(*(metric.astype(jnp.float32) for metric in shown))
        step = jnp.asarray(optax.safe_increment(state.step))
        return outcome, SamState(step, metrics, new_aux)

    return optax.GradientTransformationExtraArgs(init, update)


class _Ascent(NamedTuple):
    """Of one group: the norm of its gradient, whether it moves, and how far it did."""

    norm: Array
    moves: Array
    applied: Array


def _ascend(params: PyTree, grads: PyTree, radius: Array) -> tuple[PyTree, _Ascent]:
    """The parameters moved by `radius` along a gradient; those without one stay."""
    length = norm(grads)
    moves = (length != 0) & (radius != 0)  # NaN moves: it must not pass for "off"
    scale = jnp.where(moves, radius / jnp.where(moves, length, 1.0), 0.0)

    def move(g: Array, w: Array) -> Array:
        w = at_least_float32(w)
        return w + scale.astype(w.dtype) * g.astype(w.dtype)

    def perturb(g: Array | None, w: Any) -> Any:
        return w if g is None else move(g, jnp.asarray(w)).astype(jnp.result_type(w))

    def measure(g: Array | None, w: Any) -> Array | None:
        if g is None:
            return None
        w = jnp.asarray(w)
        return _rounded(move(g, w), w.dtype) - at_least_float32(w)

    perturbed_params, applied = (
        jax.tree.map(function, grads, params, is_leaf=is_gap)
        for function in (perturb, measure)
    )
    return perturbed_params, _Ascent(length, moves, norm(applied))


def _rounded(exact: Array, dtype: Any) -> Array:
    """What is left in `dtype`; XLA may keep more of two casts, but not of this."""
    if exact.dtype == dtype:
        return exact
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(exact, info.nexp, info.nmant)


def _compare(
    grads: PyTree, perturbed: PyTree, ascent: _Ascent
) -> tuple[PyTree, tuple[Array, ...]]:
    """The gradient to descend by, and the metrics but for rho."""
    norms = (ascent.norm, norm(perturbed))
    outcome = jax.tree.map(
        lambda g, p: jnp.where(ascent.moves, p, g).astype(g.dtype), grads, perturbed
    )
    return outcome, (ascent.applied, *norms, cosine(grads, perturbed, norms))


def last_metrics(opt_state: PyTree) -> dict[str, Array]:
    """The metrics of the `sam` in an optimizer state by name; {} if there is none."""
    state = _find(opt_state)
    return {} if state is None else state.metrics._asdict()


def last_aux(opt_state: PyTree, default: PyTree = None) -> PyTree:
    """The auxiliary output of the last second pass of the `sam` in an optimizer state.

    Args:
      opt_state: the state of a chain that may hold a `sam`, at any depth.
      default: returned where there is no `sam`, or one that keeps no aux.

    Returns:
      What `grad_fn` returned as its second value at w + e(w).
    """
    state = _find(opt_state)
    return default if state is None or state.aux is None else state.aux


def _find(opt_state: PyTree) -> SamState | None:
    def is_sam(node: Any) -> bool:
        return isinstance(node, SamState)

    states = filter(is_sam, jax.tree.leaves(opt_state, is_leaf=is_sam))
    return next(states, None)
