"""PGD in stages, so that a caller can drop examples in between.

Once an example is misclassified at an iterate, the attack has succeeded, and further
steps on it are wasted when any iterate counts. `staged_pgd` is `pgd(judge="any")` cut
open: the same starts, the same steps, and after any number of them the question which
examples are broken. See `samrobust.evaluation` for the loop around it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from samrobust.attacks import draws
from samrobust.attacks.balls import Ball
from samrobust.attacks.calls import accept
from samrobust.attacks.examples import filled
from samrobust.attacks.numbers import whole
from samrobust.attacks.pgd import Problem, Settings, identity, make_settings
from samrobust.objectives import cross_entropy
from samrobust.types import Array, LogitsFn, LossFn

__all__ = ["StagedPgd", "staged_pgd"]


class StagedPgd(NamedTuple):
    """The pieces of an attack.

    Attributes:
      start: `start(images, labels, restart, *, key) -> current`, the first iterates of
        a restart.
      advance: `advance(logits_fn, current, images, labels, num_steps) -> (current,
        broken)`: goes on for `num_steps` (may be traced); `broken` bool [B] says which
        examples were misclassified at one of the iterates, the first and the last one
        included. An example's outcome does not depend on the batch it is in, up to
        rounding.
      num_steps: of a restart.
      restarts: of the attack.
    """

    start: Callable[..., Array]
    advance: Callable[..., tuple[Array, Array]]
    num_steps: int
    restarts: int


def staged_pgd(
    ball: Ball,
    *,
    step_size: float,
    num_steps: int,
    random_start: bool = True,
    restarts: int = 1,
    loss: LossFn = cross_entropy,
    box: tuple[float, float] = (0.0, 1.0),
) -> StagedPgd:
    """The pieces of `pgd(..., judge="any")`; the arguments are explained there.

    Raises:
      ValueError: as `pgd` does.
    """
    restarts = whole(restarts=restarts)
    settings = make_settings(
        Settings(ball, step_size, num_steps, random_start, loss, "any", box), restarts
    )

    def start(
        images: Array, labels: Array, restart: Array | int, *, key: Array
    ) -> Array:
        call = accept(identity, images, labels, key, box=settings.box, ball=ball)
        if ball.radius == 0:
            return call.images
        problem = Problem(settings, *call[:3])
        return problem.start(draws.fold_in(call.key, restart))

    def advance(
        logits_fn: LogitsFn,
        current: Array,
        images: Array,
        labels: Array,
        num_steps: Array | int,
    ) -> tuple[Array, Array]:
        key = jax.random.key(0)  # nothing is drawn
        call = accept(logits_fn, images, labels, key, box=settings.box, ball=ball)
        problem = Problem(settings, *call[:3])

        def step(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            current, broken = carry
            following, score = problem.ascend(current)
            if ball.radius == 0:
                following = current
            return following, broken | jnp.isposinf(score)

        unbroken = filled(current, 0, bool)
        final, broken = jax.lax.fori_loop(0, num_steps, step, (current, unbroken))
        return final, broken | jnp.isposinf(problem.scored(final).score)

    return StagedPgd(start, advance, settings.num_steps, restarts)
