"""Two-pass sharpness: the gradient at w + e(w) takes the place of the gradient at w.

A `two_pass` comes first in an optax chain. Weight decay, momentum and learning rate
come after it and act at w:

    tx = optax.chain(sam(rho=0.2), optax.add_decayed_weights(5e-4), optax.sgd(0.1))
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)

A method of this family is an `ascent`, from the gradient at w to the perturbation e(w),
and a `combine`, from both gradients to the one that the optimizer descends by. SAM's
ascent is rho g / ||g||_2, and it descends by the second gradient; see
`samrobust.sharpness.sam`. A `choose` runs the second pass over some of the examples.

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

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import check
from samrobust.sharpness.refusals import (
    as_template,
    check_ascent,
    check_gradients,
    check_losses,
    check_output,
    check_present,
    check_rho,
    check_scheduled,
    is_gap,
    is_off,
)
from samrobust.sharpness.state import TwoPassMetrics, TwoPassState
from samrobust.sharpness.trees import (
    at_least_float32,
    cosine,
    mean_of_groups,
    norm,
    width,
    zeros,
)
from samrobust.types import Array, ArrayLike, PyTree

__all__ = [
    "Ascent",
    "Choose",
    "Combine",
    "GradFn",
    "TwoPass",
    "second",
    "two_pass",
]

GradFn: TypeAlias = Callable[..., Any]
Ascent: TypeAlias = Callable[[PyTree, PyTree, Array], PyTree]
Combine: TypeAlias = Callable[[PyTree, PyTree, PyTree], PyTree]
Choose: TypeAlias = Callable[[Array], Array]
Measure: TypeAlias = Callable[[PyTree, PyTree], Mapping[str, Array]]

# Metrics of a choice: the number of examples chosen, and how much the losses of all and
# of those rose on the way to w + e, on average.
_RISES = ("chosen", "rise", "chosen_rise")


def second(first: PyTree, second: PyTree, perturbation: PyTree) -> PyTree:
    """Returns the gradient at w + e(w): what SAM descends by."""
    del first, perturbation
    return second


def two_pass(
    rho: ArrayLike | optax.Schedule,
    ascent: Ascent | optax.GradientTransformationExtraArgs,
    *,
    combine: Combine = second,
    choose: Choose | None = None,
    measure: Measure = lambda *_: {},
    aux: PyTree = None,
    grouped: bool = False,
    passes: float = 1.0,
) -> "TwoPass":
    """Builds a transformation of g(w) into `combine(g(w), g(w + e), e)`.

    Args:
      rho: the strength, in [0, inf), a number or a scalar array, also a traced one; or
        a schedule from the number of updates so far, int32, to it (negative values
        count as 0).
      ascent: `(grads, params, rho) -> e`; or, with a memory, an optax transformation
        whose `update(grads, state, params, rho=..., **extra_args)` returns e. It is
        given gradients and parameters in float32 at least, None in both where
        parameters are frozen. A zero gradient or rho must give zeros. The extra
        arguments are those of this `update`, `step`, the number of updates so far, and
        `losses_after(e)`, the losses [B] at w + e, where `update` is given `loss_fn`,
        `example_grads(examples)`, the gradient at w of the mean loss over some examples
        of the batch, int [k].
      combine: of (g(w), g(w + e), e), trees of one structure, makes the gradient that
        goes down the chain; by default the second.
      choose: of l(w + e) - l(w), float [B], the rise of each example's loss, to the
        examples int [k] that the second pass is over; by default all. `update` then
        takes `losses`, l(w), and `loss_fn(params)`, and calls
        `grad_fn(params, examples)`, all of the whole batch, also in `jax.shard_map`.
      measure: of (g(w), e), to further metrics, scalars by name; with groups each is
        averaged over them.
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
      passes: over all examples, forward and backward, that `update` takes; a forward
        pass is 1/3. Nothing but a statement: `TwoPass.passes`.

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
        the parameters (of groups, with `grouped`), or `grad_fn` or `loss_fn` returns
        something else than said.
    """
    check_rho(rho)
    template = as_template(aux)
    check(
        not (grouped and choose),
        "no choice of examples within groups of examples",
        "Train with the whole batch as one group.",
        grouped=grouped,
    )
    if is_off(rho):
        plain = optax.stateless(mean_of_groups) if grouped else optax.identity()
        return _stating(0.0, optax.with_extra_args_support(plain))
    schedule = rho if callable(rho) else lambda _: rho
    climber: Any = ascent  # optax's type does not name the extra argument
    if not isinstance(ascent, optax.GradientTransformation):
        climber = _without_memory(ascent)
    check_ascent(climber, grouped=grouped)

    def climb(
        params: PyTree, grads: PyTree, state: PyTree, **extra_args: Any
    ) -> tuple["_Ascended", PyTree]:
        weights = jax.tree.map(_live, grads, params, is_leaf=is_gap)
        # e(w) is computed no coarser than in float32, whatever the parameters are.
        exact = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, weights)
        perturbation, state = climber.update(exact, state, weights, **extra_args)
        return _move(params, grads, perturbation), state

    def conclude(
        grads: PyTree, perturbed: PyTree, ascended: "_Ascended"
    ) -> tuple[PyTree, tuple[tuple[Array, ...], dict[str, Array]]]:
        combined = combine(grads, perturbed, ascended.perturbation)
        # At a zero gradient there is no direction: g(w) stands, and no NaN arises.
        outcome = jax.tree.map(
            lambda g, c: jnp.where(ascended.moves, c, g).astype(g.dtype),
            grads,
            combined,
        )
        norms = (norm(grads), norm(perturbed))
        shown = (ascended.applied, *norms, cosine(grads, perturbed, norms))
        return outcome, (shown, dict(measure(grads, ascended.perturbation)))

    # m-sharpness, Section 4.1: an ascent per group. Only this elementwise work is under
    # `vmap`, and not `grad_fn`, whose convolutions it would turn into grouped ones.
    over_groups = jax.vmap if grouped else lambda function, *_: function

    def init(params: PyTree) -> TwoPassState:
        def start(leaf: Any) -> Array:
            return zeros(leaf.shape, leaf.dtype, params)

        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        metrics = TwoPassMetrics(*(start(scalar) for _ in TwoPassMetrics._fields))
        # In the precision in which it will be given gradients: a memory keeps its.
        memory = climber.init(jax.tree.map(at_least_float32, params))
        no_aux = jax.tree.map(start, template)
        measured = jax.eval_shape(measure, params, params)
        names = (*measured, *(_RISES if choose else ()))
        measured = {name: start(scalar) for name in names}
        return TwoPassState(jnp.zeros([], jnp.int32), metrics, no_aux, memory, measured)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, TwoPassState]:
        check_present(params=params, grad_fn=grad_fn)
        assert grad_fn is not None  # for the type checker
        check_gradients(updates, params, grouped=grouped)
        updates = jax.tree.map(jnp.asarray, updates)
        loss_fn: Any = extra_args.get("loss_fn")
        scheduled = schedule(state.step)
        check_scheduled(scheduled)
        radius = jnp.maximum(jnp.asarray(scheduled, width(updates)), 0.0)

        def gradients(at: PyTree, *examples: Array) -> tuple[PyTree, PyTree]:
            output = check_output(grad_fn(at, *examples), updates, template)
            return jax.tree.map(  # no weak types: the state's would change
                lambda leaf, like: jnp.asarray(leaf, like.dtype),
                output,
                (updates, template),
            )

        def losses_after(e: PyTree) -> Array:
            losses = loss_fn(_move(params, updates, e).params)
            check_losses(loss_fn=losses)
            return losses

        extra_args |= {
            "rho": radius,
            "step": state.step,
            "example_grads": lambda examples: gradients(params, examples)[0],
            "losses_after": losses_after,
        }
        # Equation (2): w + e(w); then equation (3): the gradient there.
        climb_with = functools.partial(climb, **extra_args)
        ascend = over_groups(climb_with, (None, 0, None), (0, None))
        ascended, memory = ascend(params, updates, state.ascent)
        chosen, rises = (), {}
        if choose is not None:
            chosen, rises = _chosen(choose, ascended.params, **extra_args)
        perturbed, new_aux = gradients(ascended.params, *chosen)
        outcome, shown = over_groups(conclude)(updates, perturbed, ascended)
        if grouped:
            outcome = mean_of_groups(outcome)
            shown = jax.tree.map(jnp.mean, shown)
        shown, measured = jax.tree.map(lambda x: x.astype(jnp.float32), shown)
        rho_used = radius.astype(jnp.float32) + jnp.zeros_like(shown[0])  # varies alike
        metrics = TwoPassMetrics(rho_used, *shown)
        step = jnp.asarray(optax.safe_increment(state.step))
        return outcome, TwoPassState(step, metrics, new_aux, memory, measured | rises)

    return _stating(passes, optax.GradientTransformationExtraArgs(init, update))


class TwoPass(optax.GradientTransformationExtraArgs):
    """Transformation of `two_pass`, which says what it costs.

    Attributes:
      passes: that it takes in each `update`, over all examples.
    """

    passes: float = 1.0


def _stating(
    passes: float, transformation: optax.GradientTransformationExtraArgs
) -> TwoPass:
    stated = TwoPass(*transformation)
    stated.passes = passes
    return stated


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
    return None if g is None else at_least_float32(w)


def _without_memory(ascend: Ascent) -> optax.GradientTransformationExtraArgs:
    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, PyTree]:
        return ascend(updates, params, extra_args["rho"]), state

    return optax.GradientTransformationExtraArgs(optax.identity().init, update)


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


def _chosen(
    choose: Choose,
    params: PyTree,
    losses: Array | None = None,
    loss_fn: Callable[[PyTree], Array] | None = None,
    **extra_args: Any,
) -> tuple[tuple[Array], dict[str, Array]]:
    """Returns the examples of the second pass, and how their losses rise."""
    del extra_args
    check_present(losses=losses, loss_fn=loss_fn)
    assert losses is not None  # for the type checker
    assert loss_fn is not None
    after = loss_fn(params)
    check_losses(losses=losses, loss_fn=after)
    rises = after - losses
    chosen = choose(rises)
    count = jnp.zeros_like(rises[0]) + len(chosen)
    shown = (count, rises.mean(), rises[chosen].mean())
    shown = (value.astype(jnp.float32) for value in shown)
    return (chosen,), dict(zip(_RISES, shown, strict=True))
