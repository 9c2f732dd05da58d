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

Reference: Foret et al. (2021), arXiv 2010.01412, equations (2) and (3), and Section
4.1 for m-sharpness.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import check
from samrobust.types import Array, PyTree

__all__ = ["GradFn", "SamMetrics", "SamState", "last_aux", "last_metrics", "sam"]

GradFn: TypeAlias = Callable[[PyTree], Any]


class SamMetrics(NamedTuple):
    """What the last update did, each a float32 scalar: SAM that is off shows here.

    With groups all but `rho` are means over the groups.

    Attributes:
      rho: the radius used.
      gradient_norm: ||g(w)||_2.
      perturbed_gradient_norm: ||g(w + e)||_2.
      cosine: cosine of the angle between g(w) and g(w + e); 0 if either is zero.
    """

    rho: Array
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
      rho: the radius in the l2 norm of all parameters together, >= 0, or a schedule
        from the number of updates so far, int32, to it (negative values count as 0).
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
      SAME batch (and the same augmentation, adversarial images, dropout key) that gave
      the incoming updates.

      It needs all gradients: put masks and per-group transformations after it.

      **Guarantees.** `sam(0.0)` hands the gradient (of groups: their mean) through bit
      for bit and never calls `grad_fn`. A zero gradient gives a zero perturbation, not
      NaN, group by group. Norms are taken in float32; gradients keep their dtypes. The
      state has a fixed structure: it works
      in `jit`, `lax.scan`, `optax.MultiSteps`, donation and checkpoints.

    Raises:
      ValueError: if rho < 0; in `update`, if `params` or `grad_fn` is missing, the
        updates have no axis of groups where they should, or `grad_fn` returns something
        else than said.

    Reference: Foret et al. (2021), arXiv 2010.01412; with the batch of a device as a
    group also their code, google-research/sam, which averages g(w + e) over devices. As
    in the PyTorch implementation the paper uses, there is one norm over all parameters
    and no weight decay in the ascent direction. *Our deviation*: no 1e-12 is added to
    the norm, zero is treated exactly instead.

    >>> loss = lambda w: jnp.sum(w**2)
    >>> w = jnp.array([3.0, 4.0])
    >>> tx = optax.chain(sam(rho=0.5), optax.sgd(0.1))
    >>> updates, _ = tx.update(jax.grad(loss)(w), tx.init(w), w,
    ...                        grad_fn=jax.grad(loss))
    >>> optax.apply_updates(w, updates).round(4)
    Array([2.34, 3.12], dtype=float32)
    """
    if isinstance(rho, int | float):  # a traced rho cannot be checked
        check(0 <= rho < float("inf"), "0 <= rho < inf", rho=rho)
        if rho == 0:
            plain = optax.stateless(_mean_of_groups) if grouped else optax.identity()
            return optax.with_extra_args_support(plain)
    schedule = rho if callable(rho) else lambda _: rho
    ascend = jax.vmap(_ascend, (None, 0, None)) if grouped else _ascend
    compare = jax.vmap(_compare) if grouped else _compare

    def init(params: PyTree) -> SamState:
        del params
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), aux)
        metrics = SamMetrics(*(jnp.zeros([], jnp.float32) for _ in SamMetrics._fields))
        return SamState(jnp.zeros([], jnp.int32), metrics, zeros)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SamState]:
        del extra_args
        _check_present(params=params, grad_fn=grad_fn)
        assert grad_fn is not None  # for the type checker
        if grouped:
            _check_groups(updates, params)
        radius = jnp.maximum(jnp.asarray(schedule(state.step), jnp.float32), 0.0)
        perturbed_params, ascent = ascend(params, updates, radius)
        perturbed, new_aux = _unpack(grad_fn(perturbed_params), updates, aux)
        outcome, shown = compare(updates, perturbed, ascent)
        if grouped:
            outcome = _mean_of_groups(outcome)
            shown = jax.tree.map(jnp.mean, shown)
        step = jnp.asarray(optax.safe_increment(state.step))
        return outcome, SamState(step, SamMetrics(radius, *shown), new_aux)

    return optax.GradientTransformationExtraArgs(init, update)


class _Ascent(NamedTuple):
    """Of one group: the norm of its gradient, and whether it is perturbed at all."""

    norm: Array
    moves: Array


def _ascend(params: PyTree, grads: PyTree, radius: Array) -> tuple[PyTree, _Ascent]:
    """The parameters moved by `radius` along a gradient."""
    norm = _norm(grads)
    moves = (norm > 0) & (radius > 0)
    scale = jnp.where(moves, radius / jnp.where(norm > 0, norm, 1.0), 0.0)
    perturbed_params = jax.tree.map(
        lambda w, g: w + (scale * g.astype(jnp.float32)).astype(w.dtype), params, grads
    )
    return perturbed_params, _Ascent(norm, moves)


def _compare(
    grads: PyTree, perturbed: PyTree, ascent: _Ascent
) -> tuple[PyTree, tuple[Array, Array, Array]]:
    """The gradient to descend by, and the metrics: both norms and the cosine."""
    norms = (ascent.norm, _norm(perturbed))
    cosine = _cosine(grads, perturbed, norms)
    outcome = jax.tree.map(
        lambda g, p: jnp.where(ascent.moves, p, g).astype(g.dtype), grads, perturbed
    )
    return outcome, (*norms, cosine)


def _mean_of_groups(grads: PyTree, params: PyTree = None) -> PyTree:
    """The mean over the first axis of every leaf, taken in float32."""
    del params
    return jax.tree.map(
        lambda g: jnp.mean(g.astype(jnp.float32), axis=0).astype(g.dtype), grads
    )


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


def _check_present(**values: Any) -> None:
    for name, value in values.items():
        check(
            value is not None,
            f"{name} in sam's update",
            "Call `tx.update(grads, opt_state, params, grad_fn=grad_fn)`.",
            **{name: value},
        )


def _check_groups(grads: PyTree, params: PyTree) -> None:
    """Refuses gradients that have no axis of groups before the parameters' axes."""
    leaves, shapes = jax.tree.leaves(grads), [w.shape for w in jax.tree.leaves(params)]
    check(
        [g.shape[1:] for g in leaves] == shapes
        and len({g.shape[:1] for g in leaves}) <= 1,
        "a gradient [G, ...] of G groups for every parameter [...] with grouped=True",
        "Stack the gradients of the groups' mean losses along a new first axis.",
        shapes=[g.shape for g in leaves],
    )


def _unpack(output: Any, grads: PyTree, aux: PyTree) -> tuple[PyTree, PyTree]:
    """The gradients and the auxiliary output that `grad_fn` returned."""
    pair = (output, None) if aux is None else output
    expected = "(grads, None)" if aux is None else "(grads, aux)"
    structure = jax.tree.structure((grads, aux))
    check(
        isinstance(pair, tuple) and jax.tree.structure(pair) == structure,
        "grad_fn to return gradients alone with sam(rho), and (gradients, aux) with "
        "sam(rho, aux=...), of the structure of the parameters and of aux",
        expected=expected,
        structure=str(jax.tree.structure(output)),
    )
    return pair


def _norm(tree: PyTree) -> Array:
    """The l2 norm of all leaves together; squares can neither under- nor overflow."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        return jnp.zeros([], jnp.float32)
    largest = [jnp.max(jnp.abs(leaf), initial=0.0) for leaf in leaves]
    scale = jnp.max(jnp.stack(largest))
    safe = jnp.where(scale > 0, scale, 1.0)
    squares = [jnp.sum(jnp.square(leaf / safe)) for leaf in leaves]
    return scale * jnp.sqrt(jnp.sum(jnp.stack(squares)))


def _cosine(first: PyTree, second: PyTree, norms: tuple[Array, Array]) -> Array:
    """The cosine between two trees with these norms; 0 if either is zero."""
    one, other = (jnp.where(norm > 0, norm, 1.0) for norm in norms)
    products = jax.tree.map(
        lambda a, b: jnp.sum(
            (a.astype(jnp.float32) / one) * (b.astype(jnp.float32) / other)
        ),
        first,
        second,
    )
    return jax.tree.reduce(jnp.add, products, jnp.zeros([], jnp.float32))
