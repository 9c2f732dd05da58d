"""One run of FAB: the iteration towards a target class, from one start.

`samrobust.attacks.fab` makes attacks of such runs, and explains the formula.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from samrobust.attacks import draws
from samrobust.attacks.balls import Ball
from samrobust.attacks.calls import check_ball, check_box
from samrobust.attacks.examples import filled, spread
from samrobust.attacks.hyperplanes import step_onto_hyperplane
from samrobust.attacks.numbers import real, whole
from samrobust.checks import check
from samrobust.objectives import misclassified
from samrobust.types import Array, LogitsFn

__all__ = ["Found", "Problem", "Settings", "choose", "make_settings"]

_LEAST_STEP = 1e-8  # upstream's floor of a step's norm where two are compared


class Settings(NamedTuple):
    """The arguments of both attacks, checked."""

    ball: Ball
    num_targets: int
    num_steps: int
    restarts: int
    alpha_max: float
    eta: float
    beta: float
    box: tuple[float, float]


def make_settings(
    ball: Ball,
    num_targets: int,
    num_steps: int,
    restarts: int,
    alpha_max: float,
    eta: float,
    beta: float,
    box: tuple[float, float],
) -> Settings:
    """Refuses what the attacks cannot mean; see `fab_targeted`."""
    num_targets, num_steps = whole(num_targets=num_targets), whole(num_steps=num_steps)
    restarts, box = whole(restarts=restarts), check_box(box)
    alpha_max, eta, beta = real(alpha_max=alpha_max), real(eta=eta), real(beta=beta)
    check_ball(ball, box)
    check(num_targets >= 1, "num_targets >= 1", num_targets=num_targets)
    check(num_steps >= 0, "num_steps >= 0", num_steps=num_steps)
    check(restarts >= 1, "restarts >= 1", restarts=restarts)
    check(0 <= alpha_max <= 1, "0 <= alpha_max <= 1", alpha_max=alpha_max)
    check(1 <= eta < float("inf"), "1 <= eta < inf", eta=eta)
    check(0 < beta < 1, "0 < beta < 1", beta=beta)
    return Settings(ball, num_targets, num_steps, restarts, alpha_max, eta, beta, box)


class Found(NamedTuple):
    """The smallest misclassified images so far [B, ...] and their distances [B].

    The distance is infinite, and the image the original, where there is none.
    """

    images: Array
    distance: Array


class Problem(NamedTuple):
    """Settings and data: what a run depends on beside its start and its target."""

    settings: Settings
    logits_fn: LogitsFn
    images: Array
    labels: Array

    def start(self, restart: Array, index: Array, key: Array) -> Array:
        """The images, or from the second run on points half a radius away."""
        if self.settings.restarts == 1:
            return self.images
        ball = self.settings.ball
        noise = ball.sample(draws.fold_in(key, index), self.images.shape)
        noise = noise.astype(self.images.dtype)
        length = spread(ball.norm(noise), noise)
        noise = noise / jnp.where(length > 0, length, 1.0) * (0.5 * ball.radius)
        start = jnp.clip(self.images + noise, *self.settings.box)
        return jnp.where(restart == 0, self.images, start.astype(self.images.dtype))

    def run(self, start: Array, targets: Array) -> Found:
        """The smallest misclassified images among the iterates of a run."""

        def step(_: Array, carry: tuple[Array, Found]) -> tuple[Array, Found]:
            current, best = carry
            return self.judge(self.advance(current, targets), best)

        nothing = filled(start, jnp.inf)
        carry = (start, Found(self.images, nothing))
        return jax.lax.fori_loop(0, self.settings.num_steps, step, carry)[1]

    def advance(self, current: Array, targets: Array) -> Array:
        """A step beyond the tangent plane of the boundary to the targets."""
        ball, eta = self.settings.ball, self.settings.eta
        gradient, gap = jax.grad(self.total_gap, has_aux=True)(current, targets)
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
        axes = tuple(range(1, current.ndim))
        from_images = gap + jnp.sum(gradient * (self.images - current), axis=axes)
        step = self.onto_plane(current, gradient, gap)
        step_of_images = self.onto_plane(self.images, gradient, from_images)
        length = jnp.maximum(ball.norm(step), _LEAST_STEP)
        total = length + jnp.maximum(ball.norm(step_of_images), _LEAST_STEP)
        alpha = spread(jnp.minimum(length / total, self.settings.alpha_max), current)
        mixed = (1 - alpha) * (current + eta * step)
        mixed += alpha * (self.images + eta * step_of_images)
        return jnp.clip(mixed, *self.settings.box)

    def onto_plane(self, points: Array, normal: Array, excess: Array) -> Array:
        """The smallest step from the points onto the planes."""
        ball, box = self.settings.ball, self.settings.box
        return step_onto_hyperplane(ball, points, normal, excess, box=box)

    def total_gap(self, current: Array, targets: Array) -> tuple[Array, Array]:
        """The sum of `z_t - z_y`, and the gaps [B]."""
        logits = self.logits_fn(current).astype(self.images.dtype)
        gap = _logit(logits, targets) - _logit(logits, self.labels)
        return jnp.sum(gap), gap

    def judge(self, current: Array, best: Found) -> tuple[Array, Found]:
        """Remembers what is misclassified and smaller, and walks back from there."""
        wrong = misclassified(self.logits_fn(current), self.labels)
        distance = self.settings.ball.norm(current - self.images)
        smaller = wrong & (distance < best.distance)
        best = choose(smaller, Found(current, distance), best)
        back = self.images + self.settings.beta * (current - self.images)
        return jnp.where(spread(wrong, current), back, current), best


def choose(take: Array, first: Found, second: Found) -> Found:
    """Per example the first where `take`, else the second."""
    images = jnp.where(spread(take, first.images), first.images, second.images)
    return Found(images, jnp.where(take, first.distance, second.distance))


def _logit(logits: Array, classes: Array) -> Array:
    """The logit [B] of one class an example."""
    chosen = jax.nn.one_hot(classes, logits.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
