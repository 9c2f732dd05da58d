"""The ascent of APGD: momentum, and a step size that halves where the loss stalls.

One run from one start, cut into its first state and its steps, so that loops, restarts
and targets can be built around it (`samrobust.attacks.apgd`). All arrays of a state
have an example a row: a caller may drop rows between steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from samrobust.attacks import draws
from samrobust.attacks.balls import Ball
from samrobust.attacks.examples import filled, spread
from samrobust.objectives import misclassified
from samrobust.types import Array, LossFn

__all__ = ["Ascent", "State", "Worst", "select", "windows", "worse"]

_MOMENTUM = 0.75  # the share of the new step; the rest is the last one again
_FIRST_WINDOW, _LEAST_WINDOW, _SHRINKAGE = 0.22, 0.06, 0.03  # of the number of steps


class Worst(NamedTuple):
    """The most damaging images so far and how damaging: [B, ...] and [B].

    A score is the loss, or infinity where the images are misclassified.
    """

    images: Array
    score: Array


class State(NamedTuple):
    """Where a run stands; B examples.

    Attributes:
      current: the iterate, [B, ...].
      previous: the iterate before, [B, ...].
      gradient: of the loss at `current`, [B, ...].
      loss: [B], as measured last; 0 before the first step.
      best: the first misclassified iterate, or else the one of highest loss.
      best_gradient: the gradient there, [B, ...].
      step_size: [B].
      rises: int [B], how often the loss rose since the last checkpoint.
      last_score: [B], the best score at the last checkpoint.
      halved: bool [B], whether the step was halved there; at the start it counts as
        halved.
    """

    current: Array
    previous: Array
    gradient: Array
    loss: Array
    best: Worst
    best_gradient: Array
    step_size: Array
    rises: Array
    last_score: Array
    halved: Array


class Ascent(NamedTuple):
    """Settings and data of a run; see `samrobust.attacks.apgd.apgd`.

    `logits_fn` is called with a `key` where `eot` > 1.
    """

    ball: Ball
    num_steps: int
    rho: float
    eot: int
    box: tuple[float, float]
    loss: LossFn
    logits_fn: Callable[..., Array]
    images: Array
    labels: Array

    def start(self, key: Array) -> Array:
        """Random images at the surface of the ball, then clipped to the box."""
        noise = self.ball.sample(key, self.images.shape).astype(self.images.dtype)
        length = self.ball.norm(noise)
        scale = self.ball.radius / jnp.where(length > 0, length, 1.0)
        return jnp.clip(self.images + noise * spread(scale, noise), *self.box)

    def begin(self, start: Array, key: Array) -> State:
        """The state before the first step; the key is for random logits alone."""
        gradient, _, score = self.measure(start, key)
        return State(
            current=start,
            previous=start,
            gradient=gradient,
            loss=jnp.zeros_like(score),
            best=Worst(start, score),
            best_gradient=gradient,
            step_size=filled(start, 2 * self.ball.radius),
            rises=filled(start, 0, jnp.int32),
            last_score=score,
            halved=filled(start, 1, bool),
        )

    def step(self, state: State, index: Array, key: Array) -> State:
        """Step number `index`, the checkpoint behind it included if one is due."""
        current = self.moved(state, index)
        gradient, loss, score = self.measure(current, key)
        higher = score > state.best.score
        following = state._replace(
            current=current,
            previous=state.current,
            gradient=gradient,
            loss=loss,
            best=worse(state.best, Worst(current, score)),
            best_gradient=select(higher, gradient, state.best_gradient),
            rises=state.rises + (loss > state.loss).astype(jnp.int32),
        )
        return self.checked(following, jnp.asarray(windows(self.num_steps))[index])

    def moved(self, state: State, index: Array) -> Array:
        """The next iterate: a projected step, mixed with the last one, projected."""
        current, previous = state.current, state.previous
        direction = self.ball.steepest_ascent(state.gradient)
        length = spread(state.step_size, current)
        plain = self.into_set(current + length * direction)
        share = jnp.where(index > 0, _MOMENTUM, 1.0).astype(current.dtype)
        mixed = share * (plain - current) + (1 - share) * (current - previous)
        return self.into_set(current + mixed)

    def checked(self, state: State, window: Array) -> State:
        """Halves the step and goes back to the best iterate where the loss stalls.

        `window` is the number of steps since the last checkpoint, 0 where none is due.
        """
        seldom = state.rises.astype(jnp.float32) <= self.rho * window.astype(
            jnp.float32
        )
        in_vain = ~state.halved & (state.last_score >= state.best.score)
        due = window > 0
        halve = due & (seldom | in_vain)
        return state._replace(
            current=select(halve, state.best.images, state.current),
            gradient=select(halve, state.best_gradient, state.gradient),
            step_size=jnp.where(halve, state.step_size / 2, state.step_size),
            rises=jnp.where(due, 0, state.rises),
            last_score=jnp.where(due, state.best.score, state.last_score),
            halved=jnp.where(due, halve, state.halved),
        )

    def measure(self, current: Array, key: Array) -> tuple[Array, Array, Array]:
        """The gradient, mean over the draws, and the last draw's losses and scores."""
        gradient_of = jax.grad(self.total_loss, has_aux=True)
        if self.eot == 1:
            gradient, (losses, scores) = gradient_of(current, key)
            return gradient, losses, scores

        def draw(
            index: Array | int, carry: tuple[Array, Array, Array]
        ) -> tuple[Array, Array, Array]:
            own_key = draws.fold_in(key, index)
            gradient, (losses, scores) = gradient_of(current, own_key)
            return carry[0] + gradient, losses, scores

        none = filled(current, 0)
        nothing = (jnp.zeros_like(current), none, none)
        gradient, losses, scores = jax.lax.fori_loop(0, self.eot, draw, nothing)
        return gradient / self.eot, losses, scores

    def total_loss(
        self, current: Array, key: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        """The sum of the losses; the losses [B] and the scores [B]."""
        logits = self.logits(current, key)
        losses = self.loss(logits, self.labels).astype(current.dtype)
        wrong = misclassified(logits, self.labels)
        known = jnp.where(jnp.isnan(losses), -jnp.inf, losses)
        return jnp.sum(losses), (losses, jnp.where(wrong, jnp.inf, known))

    def logits(self, images: Array, key: Array) -> Array:
        """The logits, one draw of them where they are random."""
        if self.eot == 1:
            return self.logits_fn(images)
        return self.logits_fn(images, key=key)

    def into_set(self, candidates: Array) -> Array:
        """The projection onto the ball, then onto the box."""
        delta = self.ball.project(candidates - self.images)
        return jnp.clip(self.images + delta, *self.box)


def windows(num_steps: int) -> np.ndarray:
    """The checkpoints: for each step the length of the window it ends, or 0.

    The paper's recursion, in whole steps as its code rounds them. int32 [num_steps].

    >>> [(step + 1, k) for step, k in enumerate(windows(100).tolist()) if k]
    [(22, 22), (41, 19), (57, 16), (70, 13), (80, 10), (87, 7), (93, 6), (99, 6)]
    """
    least = max(int(_LEAST_WINDOW * num_steps), 1)
    shrinkage = max(int(_SHRINKAGE * num_steps), 1)
    ends = np.zeros(num_steps, np.int32)
    window = end = max(int(_FIRST_WINDOW * num_steps), 1)
    while end <= num_steps:
        ends[end - 1] = window
        window = max(window - shrinkage, least)
        end += window
    return ends


def worse(first: Worst, second: Worst) -> Worst:
    """Per example the more damaging of two; the first where they tie."""
    take = second.score > first.score
    images = select(take, second.images, first.images)
    return Worst(images, jnp.where(take, second.score, first.score))


def select(take: Array, new: Array, old: Array) -> Array:
    """`new` for the examples that `take` [B] says, `old` for the others."""
    return jnp.where(spread(take, new), new, old)
