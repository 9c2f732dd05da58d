"""Measures of what a network says: confidence, and flatness of its last layer.

Each is of one example, [B]; the measure of a network is their mean.
"""

import jax
import jax.numpy as jnp

from samrobust.checks import check
from samrobust.sharpness.trees import at_least_float32
from samrobust.types import Array

__all__ = ["logit_gap", "logit_norm", "relative_flatness"]


def logit_norm(logits: Array) -> Array:
    """Returns the norm of the centered logits, `|| z - mean(z) ||_2`.

    The scale of the logits, to which a temperature is proportional: a softmax does not
    see their mean. Confidence, whether right or wrong.

    Args:
      logits: [B, K].

    Returns:
      [B], float32 or wider, not negative.

    >>> logit_norm(jnp.array([[3.0, 1.0, 2.0]])).round(4)
    Array([1.4142], dtype=float32)
    """
    logits = at_least_float32(logits)
    centered = logits - jnp.mean(logits, axis=-1, keepdims=True)
    return jnp.linalg.norm(centered, axis=-1)


def logit_gap(logits: Array) -> Array:
    """Returns how far the highest logit is above the second, `z_(1) - z_(2)`.

    Confidence in what is said, right or wrong: no label is looked at.

    Args:
      logits: [B, K] with K >= 2.

    Returns:
      [B], float32 or wider, not negative.

    >>> logit_gap(jnp.array([[3.0, 1.0, 2.5]]))
    Array([0.5], dtype=float32)
    """
    top, _ = jax.lax.top_k(at_least_float32(logits), 2)
    return top[:, 0] - top[:, 1]


def relative_flatness(logits: Array, features: Array, kernel: Array) -> Array:
    """Returns the relative flatness of the penultimate layer, for the cross entropy.

        kappa  =  sum_{s,s'} <w_s, w_s'> tr H_{s,s'}

    with `w_s` the weights [M] of class s in the last layer, `z_s = <w_s, f> + b_s`, and
    `H_{s,s'}` the second derivatives of the mean loss in w_s and w_s'. Of the cross
    entropy these are known, and `kappa` is the mean over examples of

        ||f||^2  sum_{s < s'} p_s p_s' ||w_s - w_s'||^2,    p = softmax(z)

    A large value is sharp. The measure does not change where f is scaled up and w down.

    Args:
      logits: [B, K], the last layer's.
      features: [B, M], what goes into it.
      kernel: [M, K], its weights; biases are no part of w.

    Returns:
      [B], float32 or wider, not negative; its mean is kappa.

    Raises:
      ValueError: for other shapes.

    Reference: Petzka, Kamp, Adilova, Sminchisescu and Boley (2021), "Relative Flatness
    and Generalization", arXiv 2001.00939. The sum over pairs is ours: a variance
    written as it is has no cancellation where a network is sure.

    >>> relative_flatness(jnp.zeros([1, 2]), jnp.array([[3.0, 4.0]]), jnp.eye(2))
    Array([12.5], dtype=float32)
    """
    logits, features, kernel = map(at_least_float32, (logits, features, kernel))
    shapes = {"logits": logits.shape, "features": features.shape}
    check(
        features.shape[:1] + kernel.shape[1:] == logits.shape
        and features.shape[1:] == kernel.shape[:1],
        "shapes [B, K] of logits, [B, M] of features and [M, K] of a kernel",
        **shapes,
        kernel=kernel.shape,
    )
    gram = kernel.T @ kernel
    squares = jnp.diag(gram)
    apart = jnp.maximum(squares[:, None] + squares - 2 * gram, 0.0)
    apart = jnp.where(jnp.eye(len(squares), dtype=bool), 0.0, apart)
    chances = jax.nn.softmax(logits)
    spread = jnp.einsum("bs,bt,st->b", chances, chances, apart) / 2
    return jnp.sum(jnp.square(features), axis=-1) * spread
