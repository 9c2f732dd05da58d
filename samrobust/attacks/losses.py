"""Losses per example, for training (their mean is minimized) and attacks (maximized).

Logits are [B, K], labels are int [B]; every loss is computed and returned in float32,
shape [B], whatever the dtype of the logits, but in float64 where they are float64.
"""

import jax
import jax.numpy as jnp

from samrobust.checks import check
from samrobust.types import Array, LossFn

__all__ = [
    "LOSSES",
    "cross_entropy",
    "dlr",
    "is_finite",
    "logit_of",
    "margin",
    "misclassified",
    "normalized",
    "targeted_dlr",
]

_BFLOAT16 = 1e-2  # what rounding to 8 bits leaves of a sum of probabilities, and more
_DLR_FLOOR = 1e-12  # the paper's code adds it to the denominators of both DLR losses


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns the cross entropy `logsumexp(z) - z_y` of each example.

    Args:
      logits: [B, K].
      labels: int [B], in 0 .. K-1.

    Returns:
      float32 [B], not negative.

    Raises:
      ValueError: unless there is one label an example.

    >>> cross_entropy(jnp.zeros([1, 4]), jnp.array([2])).round(4)
    Array([1.3863], dtype=float32)
    """
    logits = _precise(logits, labels=labels)
    # Beside the highest logit: a small loss is exact however large the logits are.
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    logits -= jnp.where(jnp.isfinite(highest), highest, 0.0)
    # A gather, and not `logit_of`: the gradient has the bits that optax's has.
    of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) - of_label


def is_finite(logits: Array) -> Array:
    """Tells which logits decide, bool [B]: none is NaN, the highest is finite."""
    return jnp.isfinite(jnp.max(logits, axis=-1))


def misclassified(logits: Array, labels: Array) -> Array:
    """Tells which examples have another class than the label as their highest logit.

    Of tied logits the first class decides.

    Logits whose highest is NaN or infinite are no decision, and count as a mistake:
    `argmax` alone would take them for one class, and call that right.

    Args:
      logits: [B, K].
      labels: int [B], in 0 .. K-1.

    Returns:
      bool [B].

    >>> misclassified(jnp.array([[2.0, 1.0], [jnp.nan, 1.0]]), jnp.array([0, 0]))
    Array([False,  True], dtype=bool)
    """
    decided = jnp.argmax(logits, axis=-1)  # of more classes than uint8 labels can name
    return ~is_finite(logits) | (decided != labels.astype(decided.dtype))


def normalized(logits: Array) -> Array:
    """Tells which outputs [B, K] are probabilities: not negative, with the sum 1.

    Up to rounding, in bfloat16 too.

    Returns:
      bool [B].

    >>> normalized(jnp.array([[0.7, 0.3], [2.0, -1.0]]))
    Array([ True, False], dtype=bool)
    """
    logits = _precise(logits)
    is_whole = jnp.abs(jnp.sum(logits, axis=-1) - 1) < _BFLOAT16
    return is_whole & (jnp.min(logits, axis=-1) >= 0)


def margin(logits: Array, labels: Array) -> Array:
    """Returns the margin loss `max_{k != y} z_k - z_y` of each example.

    Positive where the example is misclassified, negative where it is not, 0 where two
    logits tie. Unlike that of the cross entropy, its gradient does not vanish when the
    classifier is confident.

    Args:
      logits: [B, K] with K >= 2.
      labels: int [B], in 0 .. K-1.

    Returns:
      float32 [B].

    Raises:
      ValueError: unless there is one label an example.

    Reference: Carlini and Wagner (2017), arXiv 1608.04644, f_6 with kappa = inf.

    >>> margin(jnp.array([[1.0, 3.0, 2.0]]), jnp.array([0]))
    Array([2.], dtype=float32)
    """
    logits = _precise(logits, labels=labels)
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)  # max_{k != y} z_k
    return others - logit_of(logits, labels)


def dlr(logits: Array, labels: Array) -> Array:
    """Returns the DLR loss `(max_{k != y} z_k - z_y) / (z_(1) - z_(3))`.

    `z_(i)` is the i-th largest logit. Neither a shift nor a positive factor of the
    logits changes the loss, so that a classifier cannot hide by scaling them. Not
    positive where the example is classified correctly, 0 where the two largest tie.

    Its limits: it needs three classes. Where the example is classified correctly it
    lies in [-1, 0], and is -1 as soon as the second and third logit tie, however sure
    the classifier is. Where the three largest logits tie, the floor of 1e-12 alone
    bounds the gradient. It is no loss to train with.

    Args:
      logits: [B, K] with K >= 3.
      labels: int [B], in 0 .. K-1.

    Returns:
      float32 [B].

    Raises:
      ValueError: if K < 3, or unless there is one label an example.

    Reference: Croce and Hein (2020), arXiv 2003.01690, equation (4); 1e-12 is added to
    the denominator as in the authors' code.

    >>> dlr(jnp.array([[4.0, 3.0, 2.0, 0.0]]), jnp.array([0]))
    Array([-0.5], dtype=float32)
    """
    _check_classes(logits, 3, "the DLR loss", "`margin` needs 2.")
    top = _largest(_precise(logits), 3)  # z_(1), z_(2), z_(3)
    return margin(logits, labels) / (top[0] - top[2] + _DLR_FLOOR)


def targeted_dlr(logits: Array, labels: Array, targets: Array) -> Array:
    """Returns the targeted DLR loss `(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)`.

    Positive where the target outweighs the label, whichever class is the largest. The
    limits are those of `dlr`, but it needs four classes, and the denominator vanishes
    only where the four largest logits tie.

    Args:
      logits: [B, K] with K >= 4.
      labels: int [B], in 0 .. K-1.
      targets: int [B], in 0 .. K-1: the classes to be mistaken for.

    Returns:
      float32 [B].

    Raises:
      ValueError: if K < 4, or unless there is one label and target an example.

    Reference: Croce and Hein (2020), arXiv 2003.01690, equation (5); 1e-12 is added to
    the denominator as in the authors' code.

    >>> logits = jnp.array([[4.0, 3.0, 2.0, 0.0]])
    >>> targeted_dlr(logits, jnp.array([0]), jnp.array([2])).round(4)
    Array([-0.6667], dtype=float32)
    """
    _check_classes(logits, 4, "the targeted DLR loss", "`dlr` needs 3, `margin` 2.")
    logits = _precise(logits, labels=labels, targets=targets)
    top = _largest(logits, 4)
    rise = logit_of(logits, targets) - logit_of(logits, labels)
    return rise / (top[0] - 0.5 * (top[2] + top[3]) + _DLR_FLOOR)


def _precise(logits: Array, **classes: Array) -> Array:
    """Returns the logits in float32, or in float64 if they are float64.

    Raises:
      ValueError: unless there is one class an example; others would broadcast.
    """
    for name, one in classes.items():
        shapes = {f"{name}_shape": jnp.shape(one), "logits_shape": logits.shape}
        check(jnp.shape(one) == logits.shape[:-1], f"{name} [B] of logits", **shapes)
    return logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)


def _check_classes(logits: Array, least: int, what: str, instead: str) -> None:
    classes = logits.shape[-1]
    check(classes >= least, f"{least} classes for {what}", instead, classes=classes)


def logit_of(logits: Array, classes: Array) -> Array:
    """Returns the logit [B] of one class per example, without a gather: it shards."""
    chosen = jax.nn.one_hot(classes, logits.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)


def _largest(logits: Array, number: int) -> list[Array]:
    """Returns the largest logits, each [B]; of tied ones, the lowest class first.

    Masks and not a sort: over few classes they are faster, also in the gradient.
    """
    largest = []
    for _ in range(number):
        first = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=bool)
        largest.append(jnp.sum(jnp.where(first, logits, 0.0), axis=-1))
        logits = jnp.where(first, -jnp.inf, logits)
    return largest


LOSSES: dict[str, LossFn] = {"cross_entropy": cross_entropy, "margin": margin}
