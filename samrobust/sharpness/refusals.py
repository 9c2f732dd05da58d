"""Checks of `two_pass`: of its strength, and of trees that must match each other.

Ranks, dtypes and structures are known while JAX traces, so that everything but a traced
radius is refused before anything is computed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from samrobust.checks import check
from samrobust.types import PyTree

__all__ = [
    "as_template",
    "as_transformation",
    "check_ascent",
    "check_gradients",
    "check_losses",
    "check_output",
    "check_present",
    "check_rho",
    "check_scheduled",
    "check_steps",
    "check_ungrouped",
    "check_whole_tree",
    "is_gap",
    "is_off",
    "kind_of",
]


def check_rho(rho: Any) -> None:
    """Refuses what is neither a schedule nor a radius; of a traced one checks the type.

    Raises:
      ValueError: unless rho is callable, or a real scalar in [0, inf).
    """
    if callable(rho):
        return
    check(
        _is_real_scalar(rho),
        "rho to be a real number, an array of rank 0, or a schedule",
        rho=_shown(rho),
    )
    if not isinstance(rho, Tracer):
        value = rho if isinstance(rho, int | float) else float(np.asarray(rho))
        check(0 <= value < float("inf"), "0 <= rho < inf", rho=value)


def check_ascent(
    ascent: optax.GradientTransformationExtraArgs, *, grouped: bool
) -> None:
    """Refuses groups of an ascent that has a memory, as each would need its own."""
    memory: PyTree = ()
    if grouped:
        memory = jax.eval_shape(ascent.init, jax.ShapeDtypeStruct((), jnp.float32))
    check(
        not jax.tree.leaves(memory),
        "an ascent without a memory for groups of examples",
        "Train with the whole batch as one group.",
        grouped=grouped,
    )


def check_ungrouped(method: str, *, grouped: bool) -> None:
    """Refuses groups of examples, by the name of the method that has none."""
    fix = "Train with the whole batch as one group."
    check(not grouped, f"no groups of examples with {method}", fix, grouped=grouped)


def check_scheduled(rho: Any) -> None:
    """Refuses a schedule's value that is not a real scalar."""
    holds = _is_real_scalar(rho)
    check(holds, "a schedule of rho to return a real scalar", returned=_shown(rho))


def _is_real_scalar(value: Any) -> bool:
    if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array):
        return False
    dtype = jnp.result_type(value)
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    return real and np.ndim(value) == 0


def _shown(value: Any) -> Any:
    is_array = isinstance(value, np.ndarray | jax.Array)
    return kind_of(value) if is_array else value


def check_present(**values: Any) -> None:
    """Refuses a `None` among the arguments of `update`."""
    lacking = [n for n, v in values.items() if v is None and n not in _IN_ANY_CALL]
    more = "".join(f", {name}={name}" for name in lacking)
    call = f"Call `tx.update(grads, opt_state, params, grad_fn=grad_fn{more})`"
    for name, value in values.items():
        check(
            value is not None,
            f"{name} in the update",
            f"{call}. Flax's `apply_gradients` drops grad_fn.",
            **{name: value},
        )


_IN_ANY_CALL = ("params", "grad_fn")


def check_losses(**values: Any) -> None:
    """Refuses what is not a loss of each example; a mean would broadcast unnoticed."""
    shapes = {getattr(value, "shape", ()) for value in values.values()}
    holds = len(shapes) == 1 and len(*shapes) == 1
    kinds = {name: kind_of(value) for name, value in values.items()}
    check(holds, "a loss of each example, [B], and not their mean", **kinds)


def as_transformation(**one: Any) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer as one that takes extra arguments.

    Raises:
      ValueError: for what is no optax transformation, such as a constructor of one.
    """
    ((name, tx),) = one.items()
    is_one = all(callable(getattr(tx, part, None)) for part in ("init", "update"))
    fix = "A constructor is called first: `optax.sgd(0.1)`."
    check(is_one, "an optax transformation", fix, **{name: tx})
    if isinstance(tx, optax.MultiSteps):  # whose `update` passes all arguments on
        update: Any = tx.update
        return optax.GradientTransformationExtraArgs(tx.init, update)
    return optax.with_extra_args_support(tx)


def check_whole_tree(updates: PyTree, params: PyTree) -> None:
    """Refuses gradients that leave a parameter out, by name."""
    gaps = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_gap)
        if is_gap(leaf)
    ]
    given = jax.tree.structure(updates) == jax.tree.structure(params)
    fix = "Give zeros for frozen ones, or wrap it in `optax.masked`."
    check(given or not gaps, "a gradient of every parameter", fix, without=gaps)


def check_steps(state: PyTree) -> None:
    """Refuses an optimizer whose update is 0 while it accumulates gradients.

    Whoever looks ahead along that update would stand still at all micro-batches but
    the first.
    """

    def accumulates(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    check(
        not any(map(accumulates, jax.tree.leaves(state, is_leaf=accumulates))),
        "an optimizer that moves at every update",
        "Put the accumulation around: `optax.MultiSteps(msam(rho, optimizer), k)`.",
        optimizer="optax.MultiSteps",
    )


def is_gap(node: Any) -> bool:
    """Tells a place of a tree that holds nothing: `None`, or optax's masked node."""
    return node is None or isinstance(node, optax.MaskedNode)


def check_gradients(grads: PyTree, params: PyTree, *, grouped: bool) -> None:
    """Refuses gradients that are not those of the parameters, or of groups of them.

    A gradient may be None: the parameters below it are frozen.
    """
    named, structure = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_gap)
    try:
        weights = structure.flatten_up_to(params)
    except ValueError:
        check(
            False,
            "gradients of the structure of the parameters in the update",
            gradients=_structure(grads),
            parameters=_structure(params),
        )
        raise
    first = int(grouped)
    groups = {np.shape(g)[:first] for _, g in named if not is_gap(g)}
    for (path, g), w in zip(named, weights, strict=True):
        check(
            not isinstance(g, optax.MaskedNode),
            "the gradients of all parameters in the update",
            "Put `optax.masked` and `optax.partition` after the sharpness "
            "transformation, not around it.",
            leaf=_name(path),
            gradient="MaskedNode",
        )
        fits = np.shape(g)[first:] == np.shape(w) and len(groups) == 1
        check(
            g is None or (fits and _field(g) == _field(w) is not None),
            _WANTED[grouped],
            _FIXES[grouped],
            leaf=_name(path),
            gradient=kind_of(g),
            parameter=kind_of(w),
        )


_WANTED = (
    "a gradient [...] for every parameter [...], both real or both complex",
    "a gradient [G, ...] of G groups for every parameter [...] with grouped=True",
)
_FIXES = (
    "Gradients of groups need grouped=True.",
    "Stack the gradients of the groups' mean losses along a new first axis.",
)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "(all)"


def _field(leaf: Any) -> type | None:
    """Returns whether a leaf is real or complex; None if it is neither."""
    if is_gap(leaf):
        return None
    kinds = (jnp.floating, jnp.complexfloating)
    dtype = jax.typeof(leaf).dtype
    return next((kind for kind in kinds if jnp.issubdtype(dtype, kind)), None)


def as_template(aux: PyTree) -> PyTree:
    """Returns the shapes and dtypes of an auxiliary output, as JAX would hold it."""
    return jax.tree.map(_as_struct, aux)


def _as_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)
    return jax.ShapeDtypeStruct(jax.typeof(leaf).shape, jax.typeof(leaf).dtype)


def check_output(output: Any, grads: PyTree, aux: PyTree) -> tuple[PyTree, PyTree]:
    """Returns the gradients and the auxiliary output of `grad_fn`, checked.

    Raises:
      ValueError: unless both are of the structure, shapes and dtypes that are expected.
    """
    pair = (output, None) if aux is None else output
    expected = (grads, aux)
    check(
        isinstance(pair, tuple)
        and jax.tree.structure(pair) == jax.tree.structure(expected),
        "grad_fn to return gradients alone, and (gradients, aux) with aux=..., of the "
        "structure of the parameters and of aux",
        expected="(grads, None)" if aux is None else "(grads, aux)",
        structure=_structure(output),
    )
    found = jax.tree_util.tree_leaves_with_path(pair)
    for (path, leaf), model in zip(found, jax.tree.leaves(expected), strict=True):
        check(
            kind_of(leaf) == kind_of(model),
            "grad_fn to return the shapes and dtypes of the gradients and of aux",
            leaf=_name(path[1:]),
            of=("gradients", "aux")[path[0].idx],
            returned=kind_of(leaf),
            expected=kind_of(model),
        )
    return pair


def kind_of(leaf: Any) -> str:
    """Returns dtype and shape, `float32[3,4]`; of what is no array, its type."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        dtype, shape = leaf.dtype, leaf.shape
    else:
        try:
            dtype, shape = jax.typeof(leaf).dtype, np.shape(leaf)
        except TypeError:
            return type(leaf).__name__
    return f"{dtype}[{','.join(map(str, shape))}]"


def _structure(tree: PyTree) -> str:
    text = str(jax.tree.structure(tree)).removeprefix("PyTreeDef(").removesuffix(")")
    return text if len(text) <= 200 else text[:200] + "..."


def is_off(rho: Any) -> bool:
    """Tells a strength that is 0 for good: a Python or NumPy number."""
    return not callable(rho) and not isinstance(rho, jax.Array) and bool(rho == 0)
