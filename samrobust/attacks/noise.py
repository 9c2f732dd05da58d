"""Random noise of full size: what an attack must beat to have attacked at all.

A model that noise of the radius misleads is not robust however few of its gradients
help, and an attack that misleads it less often than noise does is broken.
"""

import jax
import jax.numpy as jnp

from samrobust.attacks import draws
from samrobust.attacks.balls import Ball
from samrobust.attacks.calls import accept, check_ball, check_box
from samrobust.attacks.examples import filled, spread
from samrobust.attacks.numbers import whole
from samrobust.checks import check
from samrobust.objectives import cross_entropy, misclassified
from samrobust.types import Array, Attack, LogitsFn

__all__ = ["noise"]


def noise(
    ball: Ball,
    *,
    num_draws: int = 10,
    box: tuple[float, float] = (0.0, 1.0),
) -> Attack:
    """Random points at the full radius; any misclassified one counts.

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
      ball up to a few units in the last place. Handed in is the first
      misclassified draw and, where there is none, that of the highest cross entropy.
      Images that are misclassified already are unchanged, and all images if the radius
      is 0. More draws with the same key break every example that fewer do. Draws end
      once every example of the batch is broken. No gradient flows through the result.

    Raises:
      ValueError: if an argument is outside its range; when called, if the images are of
        another dtype.

    >>> from samrobust.attacks import linf
    >>> images, labels = jnp.full([1, 2], 0.5), jnp.array([0])
    >>> noisy = noise(linf(0.25))(
    ...     lambda x: jnp.stack([x[:, 0], x[:, 1] - 0.25], -1), images, labels,
    ...     key=jax.random.key(0))
    >>> noisy  # of four corners the one that is misclassified
    Array([[0.25, 0.75]], dtype=float32)
    """
    num_draws, box = whole(num_draws=num_draws), check_box(box)
    check_ball(ball, box)
    check(num_draws >= 1, "num_draws >= 1", num_draws=num_draws)

    def attack(
        logits_fn: LogitsFn, images: Array, labels: Array, *, key: Array
    ) -> Array:
        call = accept(logits_fn, images, labels, key, box=box, ball=ball)
        images = call.images
        if ball.radius == 0:
            return images

        def damage(current: Array) -> Array:
            logits = call.logits_fn(current)
            loss = jnp.nan_to_num(cross_entropy(logits, call.labels), nan=-jnp.inf)
            wrong = misclassified(logits, call.labels)
            return jnp.where(wrong, jnp.inf, loss).astype(images.dtype)

        def draw(index: Array) -> Array:
            values = draws.normal(draws.fold_in(call.key, index), images.shape)
            delta = ball.radius * ball.steepest_ascent(values.astype(images.dtype))
            return jnp.clip(images + delta, *box)

        def goes_on(carry: tuple[Array, Array, Array]) -> Array:
            index, _, worst = carry
            return (index < num_draws) & ~jnp.all(jnp.isposinf(worst))

        def body(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            index, best, worst = carry
            current = draw(index)
            reached = damage(current)
            take = reached > worst
            best = jnp.where(spread(take, images), current, best)
            return index + 1, best, jnp.where(take, reached, worst)

        lowest = filled(images, -jnp.inf)
        unseen = jnp.where(jnp.isposinf(damage(images)), jnp.inf, lowest)
        first = (jnp.int32(0), images, unseen)
        return jax.lax.stop_gradient(jax.lax.while_loop(goes_on, body, first)[1])

    return attack
