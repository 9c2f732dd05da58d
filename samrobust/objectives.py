"""Losses per example, for training (their mean is minimised) and attacks (maximised).

Logits are [B, K], labels are int [B]; every loss is computed and returned in float32,
shape [B], whatever the dtype of the logits.
"""

import jax
import jax.numpy as jnp
import optax

from samrobust.types import Array, LossFn

__all__ = ["LOSSES", "cross_entropy", "margin"]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The cross entropy `logsumexp(z) - z_y` of each example.

    Args:
      logits: [B, K].
      labels: int [B], in 0 .. K-1.

    Returns:
      float32 [B], not negative.

    >>> cross_entropy(jnp.zeros([1, 4]), jnp.array([2])).round(4)
    Array([1.3863], dtype=float32)
    """
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels
    )


def margin(logits: Array, labels: Array) -> Array:
    """The margin loss `max_{k != y} z_k - z_y` of each example.

    Positive where the example is misclassified, negative where it is not, 0 where two
    logits tie. Its gradient does not vanish
    when the classifier is confident, as that of the cross entropy does.

    Args:
      logits: [B, K] with K >= 2.
      labels: int [B], in 0 .. K-1.

    Returns:
      float32 [B].

    Reference: Carlini and Wagner (2017), arXiv 1608.04644, f_6 with kappa = inf.

    >>> margin(jnp.array([[1.0, 3.0, 2.0]]), jnp.array([0]))
    Array([2.], dtype=float32)
    """
    logits = logits.astype(jnp.float32)
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    label_logit = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    others = jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    return others - label_logit


LOSSES: dict[str, LossFn] = {"cross_entropy": cross_entropy, "margin": margin}
