"""Square: a black-box attack by random search, which asks for logits alone.

At each query a window of every image is changed at random, and an example keeps the
change where it raises the loss. No gradient is asked for, so the attack tells
whether a network that holds against gradients merely hides them. The queries run in
one `lax.while_loop`; windows of all sizes are masks of one shape.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from samrobust.attacks import draws
from samrobust.attacks.balls import Ball
from samrobust.attacks.calls import accept, check_ball, check_box, check_losses
from samrobust.attacks.examples import spread
from samrobust.attacks.moves import L2Moves, LinfMoves
from samrobust.attacks.numbers import real, whole
from samrobust.attacks.windows import window_sizes
from samrobust.checks import check
from samrobust.objectives import margin, misclassified
from samrobust.types import Array, Attack, LogitsFn, LossFn

__all__ = ["square"]


def square(
    ball: Ball,
    *,
    num_queries: int = 5000,
    p_init: float = 0.8,
    rescale_schedule: bool = False,
    restarts: int = 1,
    loss: LossFn = margin,
    box: tuple[float, float] = (0.0, 1.0),
) -> Attack:
    """The Square attack: random search over square windows, without gradients.

    A query changes a window of side `sqrt(p H W)` at a random place, another one in
    every example; p falls from `p_init` in steps. In the l-inf ball each channel of the
    window goes to one side of the ball. In the l2 ball two opposite pulses are added to
    the window's perturbation, and what a second window holds is spent on them. An
    example takes the change where its loss rises or its label no longer has the one
    highest logit, and is left alone once it is misclassified.

    Args:
      ball: the allowed perturbations, from `linf` or `l2`.
      num_queries: how many changes are tried in a run, >= 1; the search ends earlier
        when all examples of the batch are misclassified. The start is one query more.
      p_init: the share of the image that the first window covers, in (0, 1].
      rescale_schedule: stretch the schedule of p, which is made for 10,000 queries, to
        `num_queries`. AutoAttack leaves it: its 5000 queries end at `p_init / 128`.
      restarts: number of independent runs, >= 1.
      loss: what is maximised, per example; `margin` (AutoAttack) or `cross_entropy`. It
        need not be differentiable, nor need the classifier.
      box: the range of pixel values.

    Returns:
      `attack(logits_fn, images, labels, *, key) -> images` on images [B, H, W, C] in
      the box, float32 (or float64), and labels int [B]. Wrap it in `jax.jit`.

      **Guarantees.** Shape and dtype of the images are kept. The result lies in the
      box, and in the ball up to the rounding of a norm. Radius 0 and
      misclassified images return unchanged. An example handed in is misclassified
      wherever a query found one, else it is the one of highest loss seen, the image
      itself included. An example's outcome does not depend on its batch. No gradient
      flows through the result.

    Raises:
      ValueError: if an argument is outside its range; when called, if the images are of
        another shape or dtype, or the logits of fewer than 2 classes.

    Reference: Andriushchenko et al. (2020), arXiv 1912.00049, Algorithms 1 to 3, as in
    the standard AutoAttack of Croce and Hein (2020), arXiv 2003.01690. Kept from its
    code: windows never reach the last row and column unless they are as large as the
    image; where H and W differ, sides derive from the area and stop at the shorter one,
    and the l2 start lays its tiles out from H alone. *Our deviations*: an example whose
    label ties for the highest logit and is still predicted goes on, where upstream
    stops and counts it as robust; an example that was not broken is handed in as the
    one of highest loss, not as the image; every example has windows of its own, where
    upstream's batch shares places, signs and turns; l2 tiles that do not fit are cut
    off at the edge, where upstream fails.

    >>> from samrobust.attacks import linf
    >>> attack = square(linf(8 / 255), num_queries=50)
    >>> def logits_fn(images):  # a step: its gradient is zero everywhere
    ...     bright = jnp.floor(100 * jnp.mean(images, (1, 2, 3)))
    ...     return jnp.stack([bright, jnp.full_like(bright, 49.5)], -1)
    >>> images, labels = jnp.full([1, 8, 8, 1], 0.5), jnp.array([0])
    >>> adversarial = attack(logits_fn, images, labels, key=jax.random.key(0))
    >>> jnp.argmax(logits_fn(images), -1), jnp.argmax(logits_fn(adversarial), -1)
    (Array([0], dtype=int32), Array([1], dtype=int32))
    """
    num_queries, restarts = whole(num_queries=num_queries), whole(restarts=restarts)
    p_init, box, loss = real(p_init=p_init), check_box(box), check_losses(loss)
    check_ball(ball, box)
    check(num_queries >= 1, "num_queries >= 1", num_queries=num_queries)
    check(0 < p_init <= 1, "0 < p_init <= 1", p_init=p_init)
    check(restarts >= 1, "restarts >= 1", restarts=restarts)

    def attack(
        logits_fn: LogitsFn, images: Array, labels: Array, *, key: Array
    ) -> Array:
        logits_fn, images, labels, key = accept(
            logits_fn, images, labels, key, box=box, ball=ball
        )
        check(images.ndim == 4, "images [B, H, W, C]", shape=images.shape)
        if ball.radius == 0:
            return images
        moves_of = LinfMoves if math.isinf(ball.order) else L2Moves
        sizes = window_sizes(
            num_queries,
            p_init,
            images.shape[1:],
            rescale=rescale_schedule,
            odd=moves_of is L2Moves,
        )
        search = _Search(
            logits_fn, labels, loss, moves_of(images, ball.radius, box, sizes)
        )

        def restart(index: Array | int, best: _Best) -> _Best:
            return search.run(best, draws.fold_in(key, index))

        natural, _ = search.judged(images)
        return jax.lax.fori_loop(0, restarts, restart, natural).images

    return attack


class _Best(NamedTuple):
    """The most damaging images so far."""

    images: Array
    loss: Array  # [B]
    broken: Array  # bool [B]: misclassified


class _Search(NamedTuple):
    """What a run depends on beside its key."""

    logits_fn: LogitsFn
    labels: Array
    loss: LossFn
    moves: LinfMoves | L2Moves

    def run(self, best: _Best, key: Array) -> _Best:
        """A run on what is not broken yet, and the best of it and before."""
        start_key, query_key = draws.split(key)
        start, _ = self.judged(self.moves.start(start_key))

        def unfinished(carry: tuple[Array, _Best]) -> Array:
            query, current = carry
            return (query < len(self.moves.sizes)) & ~jnp.all(current.broken)

        def ask(carry: tuple[Array, _Best]) -> tuple[Array, _Best]:
            query, current = carry
            drawn = self.moves.draw(query, draws.fold_in(query_key, query))
            candidate, level = self.judged(self.moves.move(current.images, **drawn))
            return query + 1, _better(current, candidate, level)

        start = start._replace(broken=start.broken | best.broken)
        _, found = jax.lax.while_loop(unfinished, ask, (jnp.int32(0), start))
        return _better(best, found, found.broken)

    def judged(self, images: Array) -> tuple[_Best, Array]:
        """Images with their loss, and whether another logit is as high, [B]."""
        logits = jax.lax.stop_gradient(self.logits_fn(images))
        losses = self.loss(logits, self.labels).astype(images.dtype)
        losses = jnp.where(jnp.isnan(losses), -jnp.inf, losses)
        broken = misclassified(logits, self.labels)
        level = broken | (margin(logits, self.labels) >= 0)
        return _Best(images, losses, broken), level


def _better(best: _Best, candidate: _Best, always: Array) -> _Best:
    """What is broken stays; else the candidate where its loss is higher or `always`."""
    take = ~best.broken & (always | (candidate.loss > best.loss))
    return _Best(
        jnp.where(spread(take, best.images), candidate.images, best.images),
        jnp.where(take, jnp.maximum(candidate.loss, best.loss), best.loss),
        best.broken | (take & candidate.broken),
    )
