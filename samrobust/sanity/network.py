"""What is measured of a network without an attack: logits, gradients, precision."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from samrobust.attacks import cross_entropy, margin
from samrobust.evaluation import BatchFn
from samrobust.types import Array, LogitsFn, LossFn, PyTree

__all__ = ["float32_copy", "logits_of", "measure_gradients", "measure_logits"]


def logits_of(
    model: nn.Module, variables: PyTree, key: Array | None = None
) -> LogitsFn:
    """The network as a function of images, its random numbers (if any) held fixed.

    Args:
      model: `apply(variables, images, train=False)` gives logits.
      variables: of the model.
      key: what the draws of a random network depend on; the same one makes it
        deterministic. None: one and the same for all.
    """
    key = jax.random.key(0) if key is None else key

    def logits_fn(images: Array) -> Array:
        # Flax takes `params` for every stream that it is not given by name.
        rngs = {"params": key}
        return cast(Array, model.apply(variables, images, train=False, rngs=rngs))

    return logits_fn


def float32_copy(model: nn.Module) -> nn.Module | None:
    """The model in float32; None if it has no `dtype` to set or is in float32."""
    dtype: Any = getattr(model, "dtype", None)
    if dtype is None or jnp.dtype(dtype) == jnp.float32:
        return None
    return model.clone(dtype=jnp.float32)


def measure_logits(model: nn.Module) -> BatchFn:
    """Measures `logits` [B, K] in float32, with random numbers of the key."""

    def measure(
        variables: PyTree, images: Array, labels: Array, *, key: Array
    ) -> dict[str, Array]:
        del labels
        logits = logits_of(model, variables, key)(images)
        return {"logits": logits.astype(jnp.float32)}

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
            "correct": jnp.argmax(logits, axis=-1) == labels,
            "saturated": cross_entropy(logits, labels) == 0,
            "margin": margin(logits, labels),
            "zero": is_flat(cross_entropy),
            "zero_margin": is_flat(margin),
        }

    return measure
