"""Two-pass sharpness: the gradient at w + e(w) takes the place of the gradient at w.

A `two_pass` comes first in an optax chain. Weight decay, momentum and learning rate
come after it and act at w:

    tx = optax.chain(sam(rho=0.2), optax.add_decayed_weights(5e-4), optax.sgd(0.1))
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)

A method of this family is an `ascent`, from the gradient at w to the perturbation e(w),
and a `combine`, from both gradients to the one that the optimizer descends by. SAM's
ascent is rho g / ||g||_2, and it descends by the second gradient; see
`samrobust.sharpness.sam`.

With `grouped=True` every group of examples has an ascent direction of its own
(m-sharpness): gradients then carry a leading axis of groups until they are averaged.
Which examples make a group, and on which device, is the business of the caller and of
`grad_fn`; so is which pass updates BatchNorm's running statistics, see `last_aux`.

Micro-batches: `grad_fn` must span the examples that the incoming updates come from.

* `two_pass` outside, the right order: `optax.chain(sam(rho),
  steps.gradient_transformation())` with `steps = optax.MultiSteps(sgd, k)`. `grad_fn`
  is over the micro-batch; each ascends along its own gradient, as the groups of
  `grouped=True` do.
* `two_pass` inside, `optax.MultiSteps(optax.chain(sam(rho), sgd), k)`: it is given the
  mean gradient of all k micro-batches, so `grad_fn` must be the gradient over all k.
  Given the last micro-batch alone it would descend by that one, and nothing can tell.

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
    check_ascent,
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

__all__ = [
    "Ascent",
    "Combine",
    "GradFn",
    "TwoPassMetrics",
    "TwoPassState",
    "last_aux",
    "last_metrics",
    "second",
    "two_pass",
]

GradFn: TypeAlias = Callable[[PyTree], Any]
Ascent: TypeAlias = Callable[[PyTree, PyTree, Array], PyTree]
Combine: TypeAlias = Callable[[PyTree, PyTree, PyTree], PyTree]


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
    """

    step: Array
    metrics: TwoPassMetrics
    aux: PyTree
    ascent: PyTree


def second(first: PyTree, second: PyTree, perturbation: PyTree) -> PyTree:
    """Returns the gradient at w + e(w): what SAM descends by."""
    del first, perturbation
    return second


def two_pass(
    rho: float | Array | optax.Schedule,
    ascent: Ascent | optax.GradientTransformationExtraArgs,
    *,
    combine: Combine = second,
    aux: PyTree = None,
    grouped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation of g(w) into `combine(g(w), g(w + e), e)`.

    Args:
      rho: the strength, in [0, inf), a number or a scalar array, also a traced one; or
        a schedule from the number of updates so far, int32, to it (negative values
        count as 0).
      ascent: `(grads, params, rho) -> e`; or, with a memory, an optax transformation
        whose `update(grads, state, params, rho=...)` returns e. It is given gradients
        and parameters in float32 at least, None in both where parameters are frozen. A
        zero gradient or rho must give zeros.
      combine: of (g(w), g(w + e), e), trees of one structure, makes the gradient that
        goes down the chain; by default the second.
      aux: None if `grad_fn` returns gradients alone; else the structure of the second
        thing it returns (arrays or `jax.ShapeDtypeStruct`). The last value is then
        kept in the state: that is how BatchNorm statistics leave the second pass
        without a side effect. Read it with `last_aux`; zeros before the first update.
      grouped: every group of examples has a perturbation of its own. All leaves of the
        incoming updates are then [G, ...], the gradient of each group's mean loss at w;
        `grad_fn` is called once with perturbed parameters [G, ...] and returns
        gradients [G, ...] (aux has no such axis: it is kept as it comes). What goes
        down the chain is the mean over the groups, of the parameters' shapes. The
        ascent must have no memory.

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

      **Guarantees.** `rho=0`, a Python or NumPy number, passes the gradient (of groups:
      their mean) on bit for bit and never calls `grad_fn`. Where the weights do not
      move (a zero gradient, a scheduled 0), the gradient is passed on, group by group;
      a NaN among the gradients or from the schedule reaches the outcome. The
      perturbation is computed in the precision of each parameter, half precisions in
      float32, norms in the widest of them; gradients keep their dtypes. The state has a
      fixed structure and fixed dtypes: it works in `jit`, `vmap`, `lax.scan`,
      `jax.shard_map`, donation and checkpoints.

    Raises:
      ValueError: if rho is none of these, or a grouped ascent has a memory; in
        `update`, if `params` or `grad_fn` is missing, the updates are not gradients of
        the parameters (of groups, with `grouped`), or `grad_fn` returns something else
        than said.
    """
    check_rho(rho)
    template = as_template(aux)
    if not callable(rho) and not isinstance(rho, jax.Array) and rho == 0:
        plain = optax.stateless(mean_of_groups) if grouped else optax.identity()
        return optax.with_extra_args_support(plain)
    schedule = rho if callable(rho) else lambda _: rho
    climber: Any = ascent  # optax's type does not name the extra argument
    if not isinstance(ascent, optax.GradientTransformation):
        climber = _without_memory(ascent)

    def climb(
        params: PyTree, grads: PyTree, state: PyTree, radius: Array
    ) -> tuple["_Ascended", PyTree]:
        weights = jax.tree.map(_live, grads, params, is_leaf=is_gap)
        # e(w) is computed no coarser than in float32, whatever the parameters are.
        exact = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, weights)
        perturbation, state = climber.update(exact, state, weights, rho=radius)
        return _move(params, grads, perturbation), state

    def conclude(
        grads: PyTree, perturbed: PyTree, ascended: "_Ascended"
    ) -> tuple[PyTree, tuple[Array, ...]]:
        combined = combine(grads, perturbed, ascended.perturbation)
        # At a zero gradient there is no direction: g(w) stands, and no NaN arises.
        outcome = jax.tree.map(
            lambda g, c: jnp.where(ascended.moves, c, g).astype(g.dtype),
            grads,
            combined,
        )
        norms = (norm(grads), norm(perturbed))
        shown = (ascended.applied, *norms, cosine(grads, perturbed, norms))
        return outcome, shown

    # m-sharpness, Section 4.1: an ascent per group. Only this elementwise work is under
    # `vmap`, and not `grad_fn`, whose convolutions it would turn into grouped ones.
    if grouped:
        climb = jax.vmap(climb, (None, 0, None, None), (0, None))
        conclude = jax.vmap(conclude)

    def init(params: PyTree) -> TwoPassState:
        def start(leaf: Any) -> Array:
            return zeros(leaf.shape, leaf.dtype, params)

        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        metrics = TwoPassMetrics(*(start(scalar) for _ in TwoPassMetrics._fields))
        # In the precision in which it will be given gradients: a memory keeps its.
        memory = climber.init(jax.tree.map(_exact, params))
        check_ascent(memory, grouped=grouped)
        no_aux = jax.tree.map(start, template)
        return TwoPassState(jnp.zeros([], jnp.int32), metrics, no_aux, memory)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, TwoPassState]:
        del extra_args
        check_present(params=params, grad_fn=grad_fn)
        assert grad_fn is not None  # for the type checker
        check_gradients(updates, params, grouped=grouped)
        updates = jax.tree.map(jnp.asarray, updates)
        scheduled = schedule(state.step)
        check_scheduled(scheduled)
        radius = jnp.maximum(jnp.asarray(scheduled, width(updates)), 0.0)
        # Equation (2): w + e(w); then equation (3): the gradient there.
        ascended, memory = climb(params, updates, state.ascent, radius)
        output = check_output(grad_fn(ascended.params), updates, template)
        perturbed, new_aux = jax.tree.map(  # no weak types: the state's would change
            lambda leaf, like: jnp.asarray(leaf, like.dtype),
            output,
            (updates, template),
        )
        outcome, shown = conclude(updates, perturbed, ascended)
        if grouped:
            outcome = mean_of_groups(outcome)
            shown = jax.tree.map(jnp.mean, shown)
        shown = (radius + jnp.zeros_like(shown[0]), *shown)  # varies as the others do
        metrics = TwoPassMetrics(*(metric.astype(jnp.float32) for metric in shown))
        step = jnp.asarray(optax.safe_increment(state.step))
        return outcome, TwoPassState(step, metrics, new_aux, memory)

    return optax.GradientTransformationExtraArgs(init, update)


class _Ascended(NamedTuple):
    """Weights of one group after the ascent.

    Attributes:
      params: w + e(w), in the parameters' dtypes.
      perturbation: e(w), in float32 at least; None where parameters are frozen.
      applied: the length by which the parameters moved.
      moves: whether they did.
    """

    params: PyTree
    perturbation: PyTree
    applied: Array
    moves: Array


def _live(g: Array | None, w: Any) -> Array | None:
    """Returns a parameter with a gradient, in float32 at least; None without one."""
    return None if g is None else _exact(w)


def _exact(w: Any) -> Array:
    return at_least_float32(jnp.asarray(w))


def _without_memory(ascend: Ascent) -> optax.GradientTransformationExtraArgs:
    def init(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, PyTree]:
        return ascend(updates, params, extra_args["rho"]), state

    return optax.GradientTransformationExtraArgs(init, update)


def _move(params: PyTree, grads: PyTree, perturbation: PyTree) -> _Ascended:
    def move(g: Array | None, w: Any, e: Array | None) -> Any:
        if g is None or e is None:
            return w
        w = jnp.asarray(w)
        return (at_least_float32(w) + e).astype(w.dtype)

    def measure(g: Array | None, w: Any, e: Array | None) -> Array | None:
        if g is None or e is None:
            return None
        w = jnp.asarray(w)
        exact = at_least_float32(w)
        return _rounded(exact + e, w.dtype) - exact

    moved, applied = (
        jax.tree.map(function, grads, params, perturbation, is_leaf=is_gap)
        for function in (move, measure)
    )
    length = norm(applied)
    # NaN moves: it must not pass for a method that is off.
    return _Ascended(moved, perturbation, length, length != 0)


def _rounded(exact: Array, dtype: Any) -> Array:
    """Rounds to `dtype`; XLA may drop a pair of casts, but not this."""
    if exact.dtype == dtype:
        return exact
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(exact, info.nexp, info.nmant)


def last_metrics(opt_state: PyTree) -> dict[str, Array]:
    """Returns the metrics of the `two_pass` in an optimizer state by name, or {}."""
    state = _find(opt_state)
    return {} if state is None else state.metrics._asdict()


def last_aux(opt_state: PyTree, default: PyTree = None) -> PyTree:
    """Returns the auxiliary output of the last second pass of a `two_pass`.

    Args:
      opt_state: the state of a chain that may hold a `two_pass`, at any depth.
      default: returned where there is no `two_pass`, or one that keeps no aux.

    Returns:
      What `grad_fn` returned as its second value at w + e(w).
    """
    state = _find(opt_state)
    return default if state is None or state.aux is None else state.aux


def _find(opt_state: PyTree) -> TwoPassState | None:
    def is_two_pass(node: Any) -> bool:
        return isinstance(node, TwoPassState)

    states = filter(is_two_pass, jax.tree.leaves(opt_state, is_leaf=is_two_pass))
    return next(states, None)
