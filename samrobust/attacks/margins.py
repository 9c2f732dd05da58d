"""Measures of a network around its images: slope, curvature, distance to a mistake.

For any `logits_fn`; images [B, ...] with pixels in [0, 1], radii and distances in pixel
units. Each is of one example, [B].
"""

import math

import jax
import jax.numpy as jnp

from samrobust.attacks.balls import Ball, into_set, l2
from samrobust.attacks.calls import accept, check_losses, check_set
from samrobust.attacks.losses import cross_entropy, misclassified
from samrobust.attacks.per_example import factor
from samrobust.checks import check, check_whole
from samrobust.types import Array, Attack, LogitsFn, LossFn

__all__ = ["boundary_distance", "input_gradient_norm", "local_linearity_error"]

_BOX = (0.0, 1.0)


def input_gradient_norm(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    order: float,
    loss: LossFn = cross_entropy,
) -> Array:
    """Returns the norm of the loss's gradient in the pixels, `|| grad_x l(f(x), y) ||`.

    To first order the loss rises by radius times the l1 norm within an l-inf ball, by
    radius times the l2 norm within an l2 ball.

    Args:
      logits_fn: see `samrobust.attacks`.
      images: [B, ...].
      labels: int [B].
      order: 1 or 2.
      loss: of an example.

    Returns:
      [B], in the unit of the loss per pixel unit.

    Raises:
      ValueError: for another order; and for images, labels, logits and losses as an
        attack does.

    >>> logits_fn = lambda x: jnp.stack([3 * x[:, 0] - 4 * x[:, 1], 0 * x[:, 0]], -1)
    >>> slope = lambda logits, labels: logits[:, 0]
    >>> image, label = jnp.full([1, 2], 0.5), jnp.array([0])
    >>> input_gradient_norm(logits_fn, image, label, order=1, loss=slope)
    Array([7.], dtype=float32)
    """
    check(order in (1, 2), "order in {1, 2}", order=order)
    key = jax.random.key(0)  # nothing is drawn
    logits_fn, images, labels, _ = accept(logits_fn, images, labels, key, box=_BOX)
    _, gradient = _losses_and_gradient(logits_fn, images, labels, loss)
    if order == 1:
        return jnp.sum(jnp.abs(gradient), axis=tuple(range(1, gradient.ndim)))
    return l2(1.0).norm(gradient)  # whose squares cannot underflow


def local_linearity_error(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    ball: Ball,
    num_steps: int = 10,
    loss: LossFn = cross_entropy,
    key: Array,
) -> Array:
    """Returns how far the loss is from its tangent plane, within a ball.

        max | l(x + d) - l(x) - <d, grad l(x)> |   over d in the ball, x + d in [0, 1]

    Found by ascent along the gradient, from a random point of the ball, with steps of a
    quarter of the radius; the largest of all iterates counts.

    Args:
      logits_fn: see `samrobust.attacks`.
      images: [B, ...].
      labels: int [B].
      ball: from `linf` or `l2`.
      num_steps: number of steps, >= 0.
      loss: of an example.
      key: of the start; one, or one an example.

    Returns:
      [B], in the unit of the loss. **Guarantees.** Not negative, not less with more
      steps, at most the maximum, 0 for a radius of 0.

    Raises:
      ValueError: if num_steps < 0; and for the others as an attack does.

    Reference: Qin et al. (2019), "Adversarial Robustness through Local Linearization",
    arXiv 1907.02610, their gamma(epsilon, x). *Our deviation*: images stay in the box.

    >>> from samrobust.attacks import linf
    >>> bowl = lambda logits, labels: logits[:, 0]
    >>> local_linearity_error(
    ...     lambda x: x**2, jnp.full([1, 2], 0.5), jnp.array([0]), ball=linf(0.1),
    ...     loss=bowl, key=jax.random.key(0)).round(4)
    Array([0.01], dtype=float32)
    """
    check_whole(0, num_steps=num_steps)
    check_set(ball, _BOX)
    call = accept(logits_fn, images, labels, key, box=_BOX, ball=ball)
    logits_fn, images, labels, _ = call
    start, gradient = _losses_and_gradient(logits_fn, images, labels, loss)

    def errors(moved: Array) -> Array:
        linear = jnp.sum((moved - images) * gradient, axis=tuple(range(1, images.ndim)))
        return jnp.abs(loss(logits_fn(moved), labels) - start - linear)

    def step(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        moved, largest = carry
        found, ascend = jax.vjp(errors, moved)
        (uphill,) = ascend(jnp.ones_like(found))
        moved = moved + factor(ball.radius, images) / 4 * ball.steepest_ascent(uphill)
        return into_set(moved, images, ball, _BOX), jnp.maximum(largest, found)

    noise = ball.sample(key, images.shape).astype(images.dtype)
    moved = into_set(images + noise, images, ball, _BOX)
    carry = (moved, jnp.zeros_like(start))
    moved, largest = jax.lax.fori_loop(0, num_steps, step, carry)
    return jnp.maximum(largest, errors(moved))


def boundary_distance(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    attack: Attack,
    ball: Ball,
    key: Array,
) -> Array:
    """Returns the distance to the nearest misclassified image that an attack finds.

    Args:
      logits_fn: see `samrobust.attacks`.
      images: [B, ...].
      labels: int [B].
      attack: one for smallest perturbations: `fab_minimal(ball)`, `ddn()` in l2.
      ball: whose norm measures; its radius does not matter.
      key: of the attack.

    Returns:
      [B], in pixel units: an upper bound of the distance, 0 where the image itself is
      misclassified, infinite where nothing was found.

    >>> from samrobust.attacks import fab_minimal, l2
    >>> logits_fn = lambda x: jnp.stack([x[:, 0], 0.9 - x[:, 0]], -1)
    >>> boundary_distance(
    ...     logits_fn, jnp.full([1, 2], 0.5), jnp.array([0]), ball=l2(1.0),
    ...     attack=fab_minimal(l2(1.0), num_steps=20), key=jax.random.key(0)).round(3)
    Array([0.05], dtype=float32)
    """
    broken = attack(logits_fn, images, labels, key=key)
    is_wrong = misclassified(logits_fn(broken), labels)
    return jnp.where(is_wrong, ball.norm(broken - images), math.inf)


def _losses_and_gradient(
    logits_fn: LogitsFn, images: Array, labels: Array, loss: LossFn
) -> tuple[Array, Array]:
    """Returns the losses [B] and their gradients in the images [B, ...]."""
    loss = check_losses(loss)
    losses, pull = jax.vjp(lambda x: loss(logits_fn(x), labels), images)
    return losses, pull(jnp.ones_like(losses))[0]
