"""Random noise of full size, the baseline that an attack must beat.

A model that noise of the radius misleads is not robust however few of its gradients
help, and an attack that misleads it less often than noise does is broken.
"""

import jax.numpy as jnp

from samrobust.attacks import draws
from samrobust.attacks.balls import Ball
from samrobust.attacks.calls import Call, attack_of, check_set
from samrobust.attacks.losses import cross_entropy
from samrobust.attacks.numbers import whole
from samrobust.attacks.per_example import (
    BestSoFar,
    any_is_left,
    better,
    factor,
    judged_first,
    repeat_while,
    score,
)
from samrobust.types import Array, CheckedAttack

__all__ = ["noise"]


def noise(
    ball: Ball,
    *,
    num_draws: int = 10,
    box: tuple[float, float] = (0.0, 1.0),
) -> CheckedAttack:
    """Builds random points at the full radius; any misclassified one counts.

    A draw is `clip(x0 + radius * a)`, with `a` the ball's steepest ascent of a random
    linear function: a random corner of the l-inf ball, where noise is as large as it
    can be, and a uniformly distributed point of the l2 sphere.

    Args:
      ball: the allowed perturbations, from `linf` or `l2`.
      num_draws: draws an example, >= 1, each of one forward pass.
      box: the range of pixel values, clipped to.

    Returns:
      `attack(logits_fn, images, labels, *, key) -> images` on images [B, ...] in the
      box, float32 (or float64), and labels int [B]; wrap it in `jax.jit`.

      **Guarantees.** Shape and dtype are kept. The result lies in the box, and in the
      ball up to a few units in the last place. The result is the first misclassified
      draw or, without one, that of the highest cross entropy. Images that are
      misclassified already are unchanged, and all images if the radius is 0. More
      draws with the same key break every example that fewer do. Draws end
      once every example of the batch is broken. No gradient flows through the result.

    Raises:
      ValueError: if an argument is outside its range; when called, if the images are of
        another dtype.

    >>> import jax
    >>> from samrobust.attacks import linf
    >>> images, labels = jnp.full([1, 2], 0.5), jnp.array([0])
    >>> noisy = noise(linf(0.25))(
    ...     lambda x: jnp.stack([x[:, 0], x[:, 1] - 0.25], -1), images, labels,
    ...     key=jax.random.key(0))
    >>> noisy  # of four corners the one that is misclassified
    Array([[0.25, 0.75]], dtype=float32)
    """
    num_draws, box = whole(1, num_draws=num_draws), check_set(ball, box)

    def attacked(call: Call) -> Array:
        images = call.images

        def draw(index: Array, best: BestSoFar) -> BestSoFar:
            values = draws.normal(draws.fold_in(call.key, index), images.shape)
            # Of a normal vector: a uniform corner of the cube, or point of the sphere.
            direction = ball.steepest_ascent(values.astype(images.dtype))
            delta = factor(ball.radius, images) * direction
            current = jnp.clip(images + delta, *box)
            logits = call.logits_fn(current)
            losses = cross_entropy(logits, call.labels).astype(images.dtype)
            reached = score(losses, logits, call.labels)
            return better(best, BestSoFar(current, reached))

        first = judged_first(images, call.logits_fn(images), call.labels)
        return repeat_while(any_is_left, num_draws, draw, first).images

    return attack_of(attacked, box=box, ball=ball)
