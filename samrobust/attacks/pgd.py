"""Projected gradient descent: the attack of the paper, in training and evaluation.

`x <- clip(x0 + project(x + step_size * steepest_ascent(grad loss) - x0))`, the paper's
equation (4), as a pure function: configuration at construction, data at call. The
steps run in `lax.fori_loop`, restarts too, so that the compiled size does not depend
on their numbers. Only gradients of the images are computed, never of the parameters.

`staged_pgd` is `pgd(judge="any")` in pieces, so that a caller can drop examples between
the steps: once one is misclassified at an iterate, further steps on it are wasted. See
`samrobust.evaluation` for the loop around it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from samrobust.attacks import draws
from samrobust.attacks.balls import Ball, into_set
from samrobust.attacks.calls import (
    Call,
    accept,
    attack_of,
    check_losses,
    check_set,
    check_units,
    is_point,
    keep_still,
)
from samrobust.attacks.casts import cast_once
from samrobust.attacks.losses import cross_entropy
from samrobust.attacks.numbers import real_or_each, seen, whole
from samrobust.attacks.per_example import (
    BestSoFar,
    better,
    factor,
    filled,
    score,
    select,
    unseen,
)
from samrobust.checks import check, check_choice
from samrobust.types import Array, ArrayLike, CheckedAttack, LogitsFn, LossFn

__all__ = ["JUDGES", "LONGEST_STEP", "StagedPgd", "identity", "pgd", "staged_pgd"]

JUDGES = ("final", "any")
# In radii; longer steps only jump between the faces of the ball.
LONGEST_STEP = 10.0


def identity(logits_fn: LogitsFn, images: Array, labels: Array, *, key: Array) -> Array:
    """Returns the images: the attack of standard training and natural accuracy."""
    del logits_fn, labels, key
    return images


def pgd(
    ball: Ball,
    *,
    step_size: ArrayLike,
    num_steps: int,
    random_start: bool = True,
    restarts: int = 1,
    loss: LossFn = cross_entropy,
    judge: str = "final",
    box: tuple[float, float] = (0.0, 1.0),
) -> CheckedAttack:
    """Builds projected gradient descent on `loss` within a ball and a box.

    Args:
      ball: the allowed perturbations, from `linf` or `l2`.
      step_size: the length of a step in the ball's norm and pixel units, > 0 (any
        value if the radius or `num_steps` is 0); a float or an array, as a radius is.
      num_steps: number of gradient steps, >= 0.
      random_start: start at a random point of the ball instead of the image itself.
      restarts: number of independent runs, >= 1; needs a random start if > 1.
      loss: what is maximized, per example; `cross_entropy`, `margin` or your own
        function of logits and labels. It may close over arrays, traced ones too: the
        natural logits for TRADES, if the attack is built where they are computed.
      judge: which images a run returns: its `final` iterate (the reference code), or
        the first misclassified one of `any` iterates, the start included, or the one
        of highest loss where none is misclassified.
      box: the range of pixel values, clipped to after every step.

    Returns:
      `attack(logits_fn, images, labels, *, key) -> images` on images [B, ...] in the
      box, float32 (or float64), and labels int [B]. Wrap it in `jax.jit`, alone or with
      what is around it: outside it compiles at every call.

      **Guarantees.** Shape and dtype of the images are kept. The result lies in the
      box, and in the ball up to a few units in the last place. Radius 0 returns the
      images, or those examples that have it, unchanged. With several restarts each
      example gets its own worst case: a misclassified one wherever a run found one, so
      that more restarts never raise the accuracy. No gradient flows through the result.

    Raises:
      ValueError: if an argument is outside its range, or the radius, or an l-inf step
        of more than ten radii, in other units than the box's. When called, for images
        of another dtype (bfloat16 cannot tell 8/255 from 9/255) or outside the box, for
        labels that are not int [B] or not classes, for logits that are not [B, K];
        values are checked where they are concrete, ranks and dtypes inside `jax.jit`
        too.

    Reference: Madry et al. (2018), arXiv 1706.06083. *Our deviation* from the paper's
    code: the gradient is that of the sum of the losses, so that an example's steps do
    not depend on the batch it is in (see `l2` for the code's numerical floor).

    >>> from samrobust.attacks import linf
    >>> attack = pgd(linf(8 / 255), step_size=2 / 255, num_steps=10)
    >>> weights = jnp.array([[1.0, -1.0], [0.5, 0.0]])
    >>> adversarial = attack(
    ...     lambda x: x @ weights, jnp.full([1, 2], 0.5), jnp.array([0]),
    ...     key=jax.random.key(0))
    >>> jnp.round((adversarial - 0.5) * 255)
    Array([[-8., -8.]], dtype=float32)
    """
    box, restarts = check_set(ball, box), whole(1, restarts=restarts)
    make_run = _run_maker(
        ball, step_size, num_steps, random_start, restarts, loss, judge, box
    )

    def attacked(call: Call) -> Array:
        run = make_run(*call[:3])

        def restart(index: Array | int, best: BestSoFar) -> BestSoFar:
            return better(best, run.outcome(draws.fold_in(call.key, index)))

        best = unseen(call.images)
        if restarts > 1:
            return jax.lax.fori_loop(0, restarts, restart, best).images
        if judge == "final":  # nothing to compare: saves the last forward pass
            return run.last(draws.fold_in(call.key, 0))
        return restart(0, best).images

    return attack_of(attacked, box=box, ball=ball)


class StagedPgd(NamedTuple):
    """Pieces of an attack, between which a caller may drop examples.

    Attributes:
      start: `start(images, labels, restart, *, key) -> current`, the first iterates of
        a restart.
      advance: `advance(logits_fn, current, images, labels, num_steps) -> (current,
        broken)`: takes `num_steps` steps (may be traced); `broken` bool [B] says which
        examples were misclassified at one of the iterates, the first and the last one
        included: there they stay. An example's outcome does not depend on the batch it
        is in, up to rounding.
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
    step_size: ArrayLike,
    num_steps: int,
    random_start: bool = True,
    restarts: int = 1,
    loss: LossFn = cross_entropy,
    box: tuple[float, float] = (0.0, 1.0),
) -> StagedPgd:
    """Builds the pieces of `pgd(..., judge="any")`; the arguments are explained there.

    Raises:
      ValueError: as `pgd` does.
    """
    box, restarts = check_set(ball, box), whole(1, restarts=restarts)
    make_run = _run_maker(
        ball, step_size, num_steps, random_start, restarts, loss, "any", box
    )

    def start(
        images: Array, labels: Array, restart: Array | int, *, key: Array
    ) -> Array:
        call = accept(lambda images: images, images, labels, key, box=box, ball=ball)
        if is_point(ball):
            return call.images
        run = make_run(*call[:3])
        first = run.start(draws.fold_in(call.key, restart))
        return keep_still(ball, call.images, first)

    def advance(
        logits_fn: LogitsFn,
        current: Array,
        images: Array,
        labels: Array,
        num_steps: Array | int,
    ) -> tuple[Array, Array]:
        key = jax.random.key(0)  # nothing is drawn
        call = accept(logits_fn, images, labels, key, box=box, ball=ball)
        classifier = cast_once(call.logits_fn, current)
        run = make_run(classifier, call.images, call.labels)

        def step(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            current, broken = carry
            following, reached = run.ascend(current)
            broken = broken | jnp.isposinf(reached)
            following = keep_still(ball, current, following)
            return select(broken, current, following), broken

        unbroken = filled(current, 0, bool)
        final, broken = jax.lax.fori_loop(0, num_steps, step, (current, unbroken))
        return final, broken | jnp.isposinf(run.scored(final).score)

    return StagedPgd(start, advance, whole(0, num_steps=num_steps), restarts)


class _PgdRun(NamedTuple):
    """Options and data of a run: what it depends on beside its key."""

    ball: Ball
    step_size: float | Array
    num_steps: int
    random_start: bool
    loss: LossFn
    judge: str
    box: tuple[float, float]
    logits_fn: LogitsFn
    images: Array
    labels: Array

    def outcome(self, key: Array) -> BestSoFar:
        """Returns the images that the run ends with, and their score."""
        if self.judge == "final":
            return self.scored(self.last(key))

        def step(_: Array, carry: tuple[Array, BestSoFar]) -> tuple[Array, BestSoFar]:
            current, best = carry
            following, reached = self.ascend(current)
            return following, better(best, BestSoFar(current, reached))

        start = self.start(key)
        carry = (start, unseen(start))
        final, best = jax.lax.fori_loop(0, self.num_steps, step, carry)
        return better(best, self.scored(final))

    def last(self, key: Array) -> Array:
        """Returns the final iterate."""

        def step(_: Array, current: Array) -> Array:
            return self.ascend(current)[0]

        return jax.lax.fori_loop(0, self.num_steps, step, self.start(key))

    def start(self, key: Array) -> Array:
        """Returns a random point of the ball and the box, or the images themselves."""
        if not self.random_start:
            return self.images
        noise = self.ball.sample(key, self.images.shape)
        noise = noise.astype(self.images.dtype)
        return into_set(self.images + noise, self.images, self.ball, self.box)

    def ascend(self, current: Array) -> tuple[Array, Array]:
        """Takes a step, and returns the score [B] of where it started as well."""
        gradient, reached = jax.grad(self.total_loss, has_aux=True)(current)
        # Equation (4): a step of fixed length, then onto the ball, then onto the box.
        step = factor(self.step_size, current) * self.ball.steepest_ascent(gradient)
        moved = into_set(current + step, self.images, self.ball, self.box)
        return moved, reached

    def scored(self, current: Array) -> BestSoFar:
        """Returns images with their score."""
        return BestSoFar(current, self.total_loss(current)[1])

    def total_loss(self, current: Array) -> tuple[Array, Array]:
        """Returns the sum of the losses, and the scores [B].

        The gradient of the sum has in each example that of the example's own loss.
        """
        logits = self.logits_fn(current)
        losses = self.loss(logits, self.labels).astype(current.dtype)
        return jnp.sum(losses), score(losses, logits, self.labels)


def _run_maker(
    ball: Ball,
    step_size: ArrayLike,
    num_steps: int,
    random_start: bool,
    restarts: int,
    loss: LossFn,
    judge: str,
    box: tuple[float, float],
) -> Callable[..., _PgdRun]:
    """Refuses what `pgd` cannot mean; returns what makes a run of the data."""
    step_size = real_or_each(step_size=step_size)
    num_steps = whole(0, num_steps=num_steps)
    lengths = seen(step_size)
    # Among many an example's step may be 0, as its radius may be.
    is_long = lengths > 0 if isinstance(step_size, float) else lengths >= 0
    if num_steps > 0 and not is_point(ball):
        holds = bool(np.all(is_long & (lengths < np.inf)))
        check(holds, "0 < step_size < inf", step_size=step_size)
        longest = LONGEST_STEP * seen(ball.radius)
        is_beyond = longest < np.max(lengths, initial=0.0)
        if is_beyond.size and is_beyond.all():
            check_units(ball, box, step_size=step_size)
    check(
        restarts == 1 or random_start,
        "random_start when restarts > 1",
        "Without one all restarts are the same.",
        restarts=restarts,
        random_start=random_start,
    )
    check_choice(JUDGES, judge=judge)
    return functools.partial(
        _PgdRun,
        ball,
        step_size,
        num_steps,
        random_start,
        check_losses(loss),
        judge,
        box,
    )
