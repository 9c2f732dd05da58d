"""FAB: the fast adaptive boundary attack, toward one class after another.

It looks for the smallest perturbation rather than for one of a given size. Each step
replaces the boundary between the label and a target class by its tangent hyperplane,
steps a little beyond the plane, both from the iterate and from the original image, and
mixes the two; from a misclassified point it walks back to the original. As part of
AutoAttack (`fab_targeted`) it counts what it finds within a radius, and alone
(`fab_minimal`) it measures distances to the decision boundary. A score is minus the
distance here: see `BestSoFar`.

Reference: Croce and Hein (2020), arXiv 1907.02044; the targeted version and its place
in AutoAttack: Croce and Hein (2020), arXiv 2003.01690.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from samrobust.attacks import draws
from samrobust.attacks.balls import Ball
from samrobust.attacks.calls import Call, attack_of, check_set, check_target
from samrobust.attacks.hyperplanes import step_onto_hyperplane
from samrobust.attacks.losses import logit_of, misclassified
from samrobust.attacks.numbers import real, seen, whole
from samrobust.attacks.per_example import (
    BestSoFar,
    better,
    factor,
    filled,
    likeliest_wrong,
    repeat_while,
    select,
    spread,
    unseen,
)
from samrobust.checks import check
from samrobust.types import Array, CheckedAttack, LogitsFn

__all__ = ["fab_minimal", "fab_targeted"]

_LEAST_STEP = 1e-8  # upstream's floor of a step's norm where two are compared


def fab_targeted(
    ball: Ball,
    *,
    num_targets: int = 9,
    first_target: int | Array = 0,
    num_steps: int = 100,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    box: tuple[float, float] = (0.0, 1.0),
) -> CheckedAttack:
    """Builds FAB-T, the third attack of AutoAttack: what it finds within a ball.

    With `z` the logits, `y` the label and `t` a target class, a step from `x` is

        d, d0  =  the smallest steps from x and from x0 onto the tangent plane of
                  z_t - z_y = 0 at x, within the box
        alpha  =  min(||d|| / (||d|| + ||d0||), alpha_max)
        x     <-  clip((1 - alpha) (x + eta d) + alpha (x0 + eta d0))
        x     <-  x0 + beta (x - x0)     where x is misclassified, as any class

    The targets are the classes of the highest logits at the image, one run for each.

    Args:
      ball: the allowed perturbations, from `linf` or `l2`.
      num_targets: number of target classes, >= 1; of K classes at most K - 1 are used.
      first_target: how many of the highest wrong classes are skipped, >= 0 and below
        K - 1. May be traced, unlike the rest: a caller that drops broken examples
        between targets compiles once for all of them.
      num_steps: number of steps of a run, >= 0, each of one gradient and one more
        forward pass.
      restarts: number of runs toward each target, >= 1. The first starts at the image,
        the others at a random point half a radius away, within the box.
      alpha_max: the most that the step from the original image counts, in [0, 1].
      eta: how far a step goes, relative to the distance of the plane, >= 1.
      beta: the share of a perturbation that the walk back leaves, in (0, 1).
      box: the range of pixel values.

    Returns:
      `attack(logits_fn, images, labels, *, key) -> images` on images [B, ...] in the
      box, float32 (or float64), and labels int [B]; wrap it in `jax.jit`.

      **Guarantees.** Shape and dtype are kept. An example is returned with the smallest
      misclassified perturbation of the first run that found one within the radius, and
      else unchanged, as are images that are misclassified already and all images if
      the radius is 0. It lies in the box, and in the ball as `ball.norm` measures it.
      An example's outcome does not depend on the others of its batch; with one key for
      all it depends on its place there. Runs end once every example of the batch is
      broken. No gradient flows through the result. What is found lies close to the
      boundary, so another program may judge it differently where the logits tie up to
      rounding.

    Raises:
      ValueError: if an argument is outside its range; when called, if the images are of
        another dtype or the classifier has fewer than two classes.

    Reference: Croce and Hein (2020), arXiv 1907.02044, Algorithm 1; targets and
    defaults as in the standard version of AutoAttack, arXiv 2003.01690. As in their
    code a run takes all its steps where it breaks an example earlier. *Our deviation*:
    the offsets of the planes are computed from differences of pixels, which keeps them
    exact close to the boundary in float32; and see `step_onto_hyperplane`.

    >>> from samrobust.attacks import linf
    >>> weights = jnp.array([[1.0, -1.0], [0.5, 0.0]])
    >>> adversarial = fab_targeted(linf(0.1), num_steps=5)(
    ...     lambda x: (x - 0.48) @ weights, jnp.full([1, 2], 0.5), jnp.array([0]),
    ...     key=jax.random.key(0))
    >>> bool(jnp.all(jnp.abs(adversarial - (0.5 - 0.02)) <= 0.0011))
    True
    """
    box, num_targets = check_set(ball, box), whole(1, num_targets=num_targets)
    make_run = _run_maker(ball, num_steps, restarts, alpha_max, eta, beta, box)

    def attacked(call: Call) -> Array:
        radius = filled(call.images, ball.radius)
        return _search(make_run, call, num_targets, first_target, radius, radius)

    return attack_of(attacked, box=box, ball=ball)


def fab_minimal(
    ball: Ball,
    *,
    num_targets: int = 9,
    num_steps: int = 100,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    box: tuple[float, float] = (0.0, 1.0),
) -> CheckedAttack:
    """Builds FAB-T without a radius: to measure how far the boundary is.

    Args:
      ball: says in which norm a perturbation is small. **The result may lie outside
        it**: its radius is only the scale of random starts, and must not be 0 if there
        are any.
      num_targets: as for `fab_targeted`, as are the arguments that follow.
      num_steps: see there.
      restarts: see there.
      alpha_max: see there.
      eta: see there.
      beta: see there.
      box: see there.

    Returns:
      An attack as `fab_targeted` returns it. **Guarantees.** Shape and dtype are kept;
      the result lies in the box. An example is returned with the smallest misclassified
      perturbation of all runs, so that more targets and more restarts never make it
      larger, and unchanged where there is none or where it is misclassified already.
      `ball.norm(result - images)` is an upper bound of the distance to the boundary
      where the result is misclassified, and says nothing where it is not.

    Raises:
      ValueError: as for `fab_targeted`, and for random starts of radius 0.

    Reference: as for `fab_targeted`. *Our deviation*: their code has no such mode; it
    stops at the first target that is reached within a radius.

    >>> from samrobust.attacks import l2
    >>> image, ball = jnp.full([1, 2], 0.5), l2(1.0)
    >>> adversarial = fab_minimal(ball, num_steps=20)(
    ...     lambda x: jnp.stack([x[:, 0], 0.9 - x[:, 0]], -1), image, jnp.array([0]),
    ...     key=jax.random.key(0))
    >>> ball.norm(adversarial - image).round(3)  # of a plane 0.05 away
    Array([0.05], dtype=float32)
    """
    box, num_targets = check_set(ball, box), whole(1, num_targets=num_targets)
    make_run = _run_maker(ball, num_steps, restarts, alpha_max, eta, beta, box)
    check(
        restarts == 1 or bool(np.all(seen(ball.radius) > 0)),
        "ball.radius > 0 when restarts > 1",
        "Random starts lie half a radius away.",
        radius=ball.radius,
        restarts=restarts,
    )

    def attacked(call: Call) -> Array:
        return _search(make_run, call, num_targets, 0, 0.0, float("inf"))

    return attack_of(attacked, box=box, ball=ball, is_minimal=True)


class _FabRun(NamedTuple):
    """Options and data of a run: what it depends on beside its start and its target."""

    ball: Ball
    num_steps: int
    restarts: int
    alpha_max: float
    eta: float
    beta: float
    box: tuple[float, float]
    logits_fn: LogitsFn
    images: Array
    labels: Array

    def start(self, restart: Array, key: Array) -> Array:
        """Returns the images, or from the second run on points half a radius away."""
        if self.restarts == 1:
            return self.images
        # As upstream: half a radius in a random direction, whatever the draw's length.
        noise = self.ball.sample(key, self.images.shape).astype(self.images.dtype)
        length = spread(self.ball.norm(noise), noise)
        half = 0.5 * factor(self.ball.radius, noise)
        noise = noise / jnp.where(length > 0, length, 1.0) * half
        start = jnp.clip(self.images + noise, *self.box)
        return jnp.where(restart == 0, self.images, start)

    def outcome(self, start: Array, targets: Array) -> BestSoFar:
        """Returns the smallest misclassified images among the iterates."""

        def step(_: Array, carry: tuple[Array, BestSoFar]) -> tuple[Array, BestSoFar]:
            current, best = carry
            return self.judge(self.advance(current, targets), best)

        carry = (start, unseen(self.images))
        return jax.lax.fori_loop(0, self.num_steps, step, carry)[1]

    def advance(self, current: Array, targets: Array) -> Array:
        """Returns the iterate after a step beyond the boundary's tangent plane."""
        ball, eta = self.ball, self.eta
        gradient, gap = jax.grad(self.total_gap, has_aux=True)(current, targets)
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)  # w of the plane
        axes = tuple(range(1, current.ndim))
        # Of the plane <w, z> = b through x0 only <w, x0 - x> is new: exact near x.
        from_images = gap + jnp.sum(gradient * (self.images - current), axis=axes)
        step = self.onto_plane(current, gradient, gap)
        step_of_images = self.onto_plane(self.images, gradient, from_images)
        # alpha, the share of x0's step: small near the boundary, where x's own decides.
        length = jnp.maximum(ball.norm(step), _LEAST_STEP)
        total = length + jnp.maximum(ball.norm(step_of_images), _LEAST_STEP)
        alpha = spread(jnp.minimum(length / total, self.alpha_max), current)
        # Both overshoot by eta: at 1 rounding could leave them short of the plane.
        mixed = (1 - alpha) * (current + eta * step)
        mixed += alpha * (self.images + eta * step_of_images)
        return jnp.clip(mixed, *self.box)

    def onto_plane(self, points: Array, normal: Array, excess: Array) -> Array:
        """Returns the smallest step from the points onto the planes."""
        return step_onto_hyperplane(self.ball, points, normal, excess, box=self.box)

    def total_gap(self, current: Array, targets: Array) -> tuple[Array, Array]:
        """Returns the sum of `z_t - z_y`, and the gaps [B]."""
        logits = self.logits_fn(current).astype(self.images.dtype)
        gap = logit_of(logits, targets) - logit_of(logits, self.labels)
        return jnp.sum(gap), gap

    def judge(self, current: Array, best: BestSoFar) -> tuple[Array, BestSoFar]:
        """Remembers what is misclassified and smaller, and walks back from there."""
        wrong = misclassified(self.logits_fn(current), self.labels)
        distance = self.ball.norm(current - self.images)
        found = BestSoFar(current, jnp.where(wrong, -distance, -jnp.inf))
        # The backward step: nearer to the image, maybe to the right class again.
        back = self.images + self.beta * (current - self.images)
        return select(wrong, back, current), better(best, found)


def _run_maker(
    ball: Ball,
    num_steps: int,
    restarts: int,
    alpha_max: float,
    eta: float,
    beta: float,
    box: tuple[float, float],
) -> Callable[..., _FabRun]:
    """Checks the options; returns a factory that makes a run for given data."""
    num_steps, restarts = whole(0, num_steps=num_steps), whole(1, restarts=restarts)
    alpha_max, eta, beta = real(alpha_max=alpha_max), real(eta=eta), real(beta=beta)
    check(0 <= alpha_max <= 1, "0 <= alpha_max <= 1", alpha_max=alpha_max)
    check(1 <= eta < float("inf"), "1 <= eta < inf", eta=eta)
    check(0 < beta < 1, "0 < beta < 1", beta=beta)
    return functools.partial(
        _FabRun, ball, num_steps, restarts, alpha_max, eta, beta, box
    )


def _search(
    make_run: Callable[..., _FabRun],
    call: Call,
    num_targets: int,
    first_target: int | Array,
    goal: float | Array,
    limit: float | Array,
) -> Array:
    """Runs until all distances reach the goal; drops what lies beyond the limit."""
    run = make_run(*call[:3])
    logits = call.logits_fn(call.images)
    check_target(first_target, logits.shape[-1])
    classes = likeliest_wrong(logits, call.labels)
    num_left = jnp.minimum(num_targets, classes.shape[1] - first_target)

    def is_sought(best: BestSoFar) -> Array:
        return -best.score > goal

    def pursue(index: Array, best: BestSoFar) -> BestSoFar:
        # All restarts toward a target before the next target: a run's number is both.
        own_key = draws.of_run(call.key, run.restarts, classes.shape[1], index)
        start = run.start(index % run.restarts, own_key)
        found = run.outcome(start, classes[:, first_target + index // run.restarts])
        closer = (found.score > best.score) & (-found.score <= limit)
        return select(closer & is_sought(best), found, best)

    unknown = unseen(call.images)
    wrong = misclassified(logits, call.labels)
    first = unknown._replace(score=jnp.where(wrong, 0.0, unknown.score))  # distance 0
    return repeat_while(
        lambda best: jnp.any(is_sought(best)), num_left * run.restarts, pursue, first
    ).images
