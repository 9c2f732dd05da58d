"""DDN: a minimal l2 attack that decouples the direction of a step from its length.

Each step follows the normalized gradient of the cross entropy and is then scaled onto
a sphere around the original image, whose radius shrinks where the iterate is
misclassified and grows where it is not.

Reference: Rony, Hafemann, Oliveira, Ben Ayed, Sabourin and Granger (2019), arXiv
1811.09600.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from samrobust.attacks import draws
from samrobust.attacks.balls import l2
from samrobust.attacks.calls import Call, attack_of, check_box
from samrobust.attacks.losses import cross_entropy, misclassified
from samrobust.attacks.numbers import real, whole
from samrobust.attacks.per_example import BestSoFar, select, spread
from samrobust.checks import check
from samrobust.types import Array, CheckedAttack

__all__ = ["ddn"]

_SPHERE = l2(1.0)
_LAST_STEP_SIZE = 0.01  # of the cosine schedule that starts at 1


def ddn(
    *,
    num_steps: int = 100,
    init_epsilon: float = 1.0,
    gamma: float = 0.05,
    box: tuple[float, float] = (0.0, 1.0),
) -> CheckedAttack:
    """Builds the DDN attack: small l2 perturbations that are misclassified.

        d    <-  d + step_size * g / ||g||      with g the gradient of the cross entropy
        eps  <-  (1 - gamma) eps where x is misclassified, else (1 + gamma) eps
        x    <-  clip(x0 + eps d / ||d||),  d <- x - x0

    The step size falls from 1 to 0.01 along a cosine; `eps` never exceeds the distance
    to the box's farthest corner.

    Args:
      num_steps: number of steps, >= 0; the iterate before each of them is judged, the
        image itself first, and the last step's outcome is not.
      init_epsilon: the radius of the first sphere in pixel units, > 0.
      gamma: the share by which the radius changes in a step, in (0, 1).
      box: the range of pixel values.

    Returns:
      `attack(logits_fn, images, labels, *, key) -> images` on images [B, ...] in the
      box, float32 (or float64), and labels int [B]; wrap it in `jax.jit`. The key is
      used only where a gradient is zero, for a random direction.

      **Guarantees.** Shape and dtype are kept; the result lies in the box. An example
      is returned as its smallest misclassified iterate, so that the norm of the change
      is an upper bound of the distance to the boundary, and unchanged where there is
      none or where it is misclassified already. An example's outcome does not depend on
      the others of its batch; with one key for all, a random direction depends on its
      place there. No gradient flows through the result.

    Raises:
      ValueError: if an argument is outside its range; when called, if the images are of
        another dtype.

    Reference: Rony et al. (2019), arXiv 1811.09600, Algorithm 1; random directions and
    the bound of the radius as in foolbox. *Our deviation*: no quantization of the
    result to 256 values.

    >>> image = jnp.full([1, 2], 0.5)
    >>> adversarial = ddn()(
    ...     lambda x: jnp.stack([x[:, 0], 0.9 - x[:, 0]], -1), image, jnp.array([0]),
    ...     key=jax.random.key(0))
    >>> jnp.linalg.norm(adversarial - image).round(2)  # of a plane 0.05 away
    Array(0.05, dtype=float32)
    """
    num_steps, box = whole(0, num_steps=num_steps), check_box(box)
    init_epsilon, gamma = real(init_epsilon=init_epsilon), real(gamma=gamma)
    check(
        0 < init_epsilon < float("inf"),
        "0 < init_epsilon < inf",
        "Radii are in pixel units.",
        init_epsilon=init_epsilon,
    )
    check(0 < gamma < 1, "0 < gamma < 1", gamma=gamma)

    def attacked(call: Call) -> Array:
        images = call.images
        # No perturbation in the box is longer than this: a larger radius means nothing.
        farthest = _SPHERE.norm(jnp.maximum(images - box[0], box[1] - images))

        def step(index: Array, state: _DdnState) -> _DdnState:
            current, epsilon, best = state
            gradient, wrong = jax.grad(total_loss, has_aux=True)(current)
            nearness = -_SPHERE.norm(current - images)
            # Of perturbations of equal length the last.
            take = wrong & (nearness >= best.score)
            best = select(take, BestSoFar(current, nearness), best)
            direction = _direction(gradient, draws.fold_in(call.key, index))
            # Cosine annealing of the step size, Algorithm 1's alpha, from 1 to 0.01.
            share = (1 + jnp.cos(jnp.pi * index / num_steps)) / 2
            step_size = _LAST_STEP_SIZE + (1 - _LAST_STEP_SIZE) * share
            delta = current - images + step_size.astype(images.dtype) * direction
            # The decoupling: direction from the gradient, length from success alone.
            epsilon = epsilon * jnp.where(wrong, 1 - gamma, 1 + gamma)
            epsilon = jnp.minimum(epsilon, farthest)
            delta = _SPHERE.steepest_ascent(delta) * spread(epsilon, images)
            return _DdnState(jnp.clip(images + delta, *box), epsilon, best)

        def total_loss(current: Array) -> tuple[Array, Array]:
            logits = call.logits_fn(current)
            wrong = misclassified(logits, call.labels)
            losses = cross_entropy(logits, call.labels)
            return jnp.sum(losses.astype(current.dtype)), wrong

        epsilon = jnp.full_like(farthest, init_epsilon)
        start = _DdnState(
            images, epsilon, BestSoFar(images, -farthest)
        )  # no mistake yet
        return jax.lax.fori_loop(0, num_steps, step, start).best.images

    return attack_of(attacked, box=box)


class _DdnState(NamedTuple):
    """Iterates, the radii of their spheres [B], and the smallest mistakes so far."""

    current: Array
    epsilon: Array
    best: BestSoFar


def _direction(gradient: Array, key: Array) -> Array:
    """Returns gradients at unit norm; a random direction where one is zero or NaN."""
    unit = _SPHERE.steepest_ascent(gradient)
    zero = _SPHERE.norm(unit) == 0

    def with_noise() -> Array:
        noise = draws.normal(key, gradient.shape).astype(gradient.dtype)
        noise = _SPHERE.steepest_ascent(noise)
        return jnp.where(spread(zero, gradient), noise, unit)

    return jax.lax.cond(jnp.any(zero), with_noise, lambda: unit)
