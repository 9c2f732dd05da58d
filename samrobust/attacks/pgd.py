"""Projected gradient descent: the attack of the paper, in training and evaluation.

`x <- clip(x0 + project(x + step_size * steepest_ascent(grad loss) - x0))`, the paper's
equation (4), as a pure function: configuration at construction, data at call. The
steps run in `lax.fori_loop`, restarts too, so that the compiled size does not depend
on their numbers. Only gradients of the images are computed, never of the parameters.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from samrobust.attacks import draws
from samrobust.attacks.balls import Ball
from samrobust.attacks.calls import accept, check_ball, check_box, check_losses
from samrobust.attacks.examples import filled, spread
from samrobust.attacks.numbers import real, whole
from samrobust.checks import check, check_choice
from samrobust.objectives import cross_entropy, misclassified
from samrobust.types import Array, Attack, LogitsFn, LossFn

__all__ = ["JUDGES", "Problem", "Settings", "identity", "make_settings", "pgd"]

JUDGES = ("final", "any")

_Carry = TypeVar("_Carry")


class _Worst(NamedTuple):
    """The most damaging images so far and how damaging: [B, ...] and [B]."""

    images: Array
    score: Array


def identity(logits_fn: LogitsFn, images: Array, labels: Array, *, key: Array) -> Array:
    """The attack that changes nothing: standard training and natural accuracy."""
    del logits_fn, labels, key
    return images


def pgd(
    ball: Ball,
    *,
    step_size: float,
    num_steps: int,
    random_start: bool = True,
    restarts: int = 1,
    loss: LossFn = cross_entropy,
    judge: str = "final",
    box: tuple[float, float] = (0.0, 1.0),
) -> Attack:
    """Projected gradient descent on `loss` within a ball and a box.

    Args:
      ball: the allowed perturbations, from `linf` or `l2`.
      step_size: the length of a step in the ball's norm and pixel units, > 0 (any
        value if the radius or `num_steps` is 0).
      num_steps: number of gradient steps, >= 0.
      random_start: start at a random point of the ball instead of the image itself.
      restarts: number of independent runs, >= 1; needs a random start if > 1.
      loss: what is maximised, per example; `cross_entropy` or `margin`.
      judge: which images a run hands in: its `final` iterate (the reference code), or
        the first misclassified one of `any` iterates, the start included, and the one
        of highest loss where there is none.
      box: the range of pixel values, clipped to after every step.

    Returns:
      `attack(logits_fn, images, labels, *, key) -> images` on images [B, ...] in the
      box, float32 (or float64), and labels int [B]. Wrap it in `jax.jit`, alone or with
      what is around it: outside it compiles at every call.

      **Guarantees.** Shape and dtype of the images are kept. The result lies in the
      box, and in the ball up to a few units in the last place. Radius 0 returns the
      images unchanged. With several restarts each example gets its own worst case:
      a misclassified one wherever a run found one, so that more restarts never raise
      the accuracy. No gradient flows through the result.

    Raises:
      ValueError: if an argument is outside its range, the radius in other units than
        the box's among them. When called, for images of another dtype (8/255 cannot be
        told from 9/255 in bfloat16) or outside the box, for labels that are not int
        [B] or no classes, for logits that are not [B, K]; values are looked at where
        they are concrete, ranks and dtypes inside `jax.jit` too.

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
    restarts = whole(restarts=restarts)
    settings = make_settings(
        Settings(ball, step_size, num_steps, random_start, loss, judge, box), restarts
    )

    def attack(
        logits_fn: LogitsFn, images: Array, labels: Array, *, key: Array
    ) -> Array:
        call = accept(logits_fn, images, labels, key, box=settings.box, ball=ball)
        if ball.radius == 0:
            return call.images
        problem = Problem(settings, *call[:3])
        key = call.key

        def restart(index: Array | int, worst: _Worst) -> _Worst:
            return _worse(worst, problem.run(draws.fold_in(key, index)))

        unseen = _Worst(call.images, filled(call.images, -jnp.inf))
        if restarts > 1:
            worst = jax.lax.fori_loop(0, restarts, restart, unseen)
        elif judge == "final":  # nothing to compare: spare the forward pass
            return jax.lax.stop_gradient(problem.last(draws.fold_in(key, 0)))
        else:
            worst = restart(0, unseen)
        return jax.lax.stop_gradient(worst.images)

    return attack


class Settings(NamedTuple):
    """The arguments of `pgd` that a single run needs."""

    ball: Ball
    step_size: float
    num_steps: int
    random_start: bool
    loss: LossFn
    judge: str
    box: tuple[float, float]


def make_settings(settings: Settings, restarts: int) -> Settings:
    """Refuses what `pgd` cannot mean; see there."""
    step_size = real(step_size=settings.step_size)
    num_steps, box = whole(num_steps=settings.num_steps), check_box(settings.box)
    check_ball(settings.ball, box)
    check(num_steps >= 0, "num_steps >= 0", num_steps=num_steps)
    check(
        0 < step_size < float("inf") or settings.ball.radius == 0 or num_steps == 0,
        "0 < step_size < inf",
        step_size=step_size,
    )
    check(restarts >= 1, "restarts >= 1", restarts=restarts)
    check(
        restarts == 1 or settings.random_start,
        "random_start when restarts > 1",
        "Without one all restarts are the same.",
        restarts=restarts,
        random_start=settings.random_start,
    )
    check_choice(JUDGES, judge=settings.judge)
    return settings._replace(
        step_size=step_size,
        num_steps=num_steps,
        loss=check_losses(settings.loss),
        box=box,
    )


class Problem(NamedTuple):
    """Settings and data: what a run from a random start depends on beside its key."""

    settings: Settings
    logits_fn: LogitsFn
    images: Array
    labels: Array

    def run(self, key: Array) -> _Worst:
        """The images that a run hands in, and their score."""
        if self.settings.judge == "final":
            return self.scored(self.last(key))

        def ascend_and_judge(carry: tuple[Array, _Worst]) -> tuple[Array, _Worst]:
            current, worst = carry
            following, score = self.ascend(current)
            return following, _worse(worst, _Worst(current, score))

        start = self.start(key)
        unseen = _Worst(start, filled(start, -jnp.inf))
        steps = self.settings.num_steps
        final, worst = _repeat(steps, ascend_and_judge, (start, unseen))
        return _worse(worst, self.scored(final))

    def last(self, key: Array) -> Array:
        """The final iterate of a run."""
        start = self.start(key)
        return _repeat(self.settings.num_steps, lambda x: self.ascend(x)[0], start)

    def start(self, key: Array) -> Array:
        """A random point of the ball and the box, or the images themselves."""
        if not self.settings.random_start:
            return self.images
        noise = self.settings.ball.sample(key, self.images.shape)
        return self.into_set(self.images + noise.astype(self.images.dtype))

    def into_set(self, candidates: Array) -> Array:
        """The projection onto the ball, then onto the box."""
        delta = self.settings.ball.project(candidates - self.images)
        return jnp.clip(self.images + delta, *self.settings.box)

    def ascend(self, current: Array) -> tuple[Array, Array]:
        """One step, and the score of the images it started from."""
        gradient, score = jax.grad(self.total_loss, has_aux=True)(current)
        direction = self.settings.ball.steepest_ascent(gradient)
        return self.into_set(current + self.settings.step_size * direction), score

    def scored(self, current: Array) -> _Worst:
        """Images with their score."""
        return _Worst(current, self.total_loss(current)[1])

    def total_loss(self, current: Array) -> tuple[Array, Array]:
        """The sum of the losses, and the scores [B]."""
        logits = self.logits_fn(current)
        losses = self.settings.loss(logits, self.labels).astype(current.dtype)
        return jnp.sum(losses), _score(losses, logits, self.labels)


def _repeat(
    num_steps: int, function: Callable[[_Carry], _Carry], start: _Carry
) -> _Carry:
    return jax.lax.fori_loop(0, num_steps, lambda _, carry: function(carry), start)


def _score(losses: Array, logits: Array, labels: Array) -> Array:
    """Orders outcomes: every misclassification above all else, then by the loss."""
    wrong = misclassified(logits, labels)
    return jnp.where(wrong, jnp.inf, jnp.where(jnp.isnan(losses), -jnp.inf, losses))


def _worse(first: _Worst, second: _Worst) -> _Worst:
    """Per example the more damaging of two; the first where they tie."""
    take = second.score > first.score
    images = jnp.where(spread(take, first.images), second.images, first.images)
    return _Worst(images, jnp.where(take, second.score, first.score))
