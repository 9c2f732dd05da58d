"""What is measured of a network without an attack: logits, gradients, precision."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import InvalidRngError

from samrobust.attacks import cross_entropy, margin
from samrobust.evaluation import BatchFn, is_correct, is_finite
from samrobust.types import Array, LogitsFn, LossFn, PyTree

__all__ = [
    "count_products",
    "float32_copy",
    "logits_of",
    "measure_gradients",
    "measure_logits",
]

_PRODUCTS = ("dot_general", "conv_general_dilated")


def logits_of(
    model: nn.Module, variables: PyTree, key: Array | None = None
) -> LogitsFn:
    """The network as a function of images, its random numbers (if any) held fixed.

    Args:
      model: `apply(variables, images, train=False)` gives logits.
      variables: of the model.
      key: what the draws of a random network depend on; the same one makes it
        deterministic. One for all images, or a key array [B]. None: one and the same.
    """
    key = jax.random.key(0) if key is None else key

    def drawn(image: Array, key: Array) -> Array:
        # Flax takes `params` for every stream that it is not given by name.
        rngs = {"params": key}
        return cast(Array, model.apply(variables, image[None], train=False, rngs=rngs))

    def logits_fn(images: Array) -> Array:
        try:
            return cast(Array, model.apply(variables, images, train=False))
        except InvalidRngError:  # one image at a time, whatever batch it stands in
            return jax.vmap(drawn, (0, 0 if key.ndim else None))(images, key)[:, 0]

    return logits_fn


def float32_copy(model: nn.Module) -> nn.Module | None:
    """The model in float32; None if it has no `dtype` to set or is in float32."""
    dtype: Any = getattr(model, "dtype", None)
    if dtype is None or jnp.dtype(dtype) == jnp.float32:
        return None
    return model.clone(dtype=jnp.float32)


def count_products(
    model: nn.Module, variables: PyTree, image_shape: tuple[int, ...]
) -> dict[str, int]:
    """Counts matrix products and convolutions by the precision of their factors.

    The names are `float32` (or `float64`) where the factors keep their precision on
    every backend; `float32 rounded` where GPUs and TPUs may round them to 10 or 7 bits,
    since the model asks for that; else the narrower factor's, as in `bfloat16`.
    """

    def logits(variables: PyTree, images: Array) -> Array:
        return logits_of(model, variables)(images)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with jax.default_matmul_precision("highest"):  # as an evaluation sets it
        traced = jax.make_jaxpr(logits)(variables, images)
    return dict(Counter(_products(traced.jaxpr)))


def _products(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        if equation.primitive.name in _PRODUCTS:
            dtypes = [operand.aval.dtype for operand in equation.invars]
            narrow = str(min(dtypes, key=lambda dtype: dtype.itemsize))
            asked = equation.params["precision"]
            exact = asked == (jax.lax.Precision.HIGHEST,) * 2
            yield f"{narrow} rounded" if narrow == "float32" and not exact else narrow
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _products(inner)


def measure_logits(model: nn.Module) -> BatchFn:
    """Measures `logits` [B, K] in float32 and whether they are `finite`, bool [B].

    A random network draws by the keys.
    """

    def measure(
        variables: PyTree, images: Array, labels: Array, *, key: Array
    ) -> dict[str, Array]:
        del labels
        logits = logits_of(model, variables, key)(images)
        return {"logits": logits.astype(jnp.float32), "finite": is_finite(logits)}

    return measure


def measure_gradients(model: nn.Module) -> BatchFn:
    """Measures where the losses are flat, in float32 whatever the model's precision.

    The outcome, each [B]: `correct`; `saturated`, whether the cross entropy is exactly
    zero; `margin`; `zero` and `zero_margin`, whether every entry of the gradient of the
    cross entropy and of the margin is exactly zero.
    """
    model = float32_copy(model) or model

    def measure(
        variables: PyTree, images: Array, labels: Array, *, key: Array
    ) -> dict[str, Array]:
        del key
        logits_fn = logits_of(model, variables)

        def is_flat(loss: LossFn) -> Array:
            gradient = jax.grad(lambda x: jnp.sum(loss(logits_fn(x), labels)))(images)
            return jnp.all(gradient == 0, axis=tuple(range(1, images.ndim)))

        logits = logits_fn(images)
        return {
            "correct": is_correct(logits, labels),
            "saturated": cross_entropy(logits, labels) == 0,
            "margin": margin(logits, labels),
            "zero": is_flat(cross_entropy),
            "zero_margin": is_flat(margin),
        }

    return measure
