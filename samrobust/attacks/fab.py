"""FAB: the fast adaptive boundary attack, towards one class after another.

It looks for the smallest perturbation rather than for one of a given size. Each step
replaces the boundary between the label and a target class by its tangent hyperplane,
steps a little beyond the plane, both from the iterate and from the original image, and
mixes the two; from a misclassified point it walks back to the original. As part of
AutoAttack (`fab_targeted`) it counts what it finds within a radius, and alone
(`fab_minimal`) it measures distances to the decision boundary.

Reference: Croce and Hein (2020), arXiv 1907.02044; the targeted version and its place
in AutoAttack: Croce and Hein (2020), arXiv 2003.01690.
"""

import jax
import jax.numpy as jnp

from samrobust.attacks.balls import Ball
from samrobust.attacks.calls import accept, check_target
from samrobust.attacks.examples import filled
from samrobust.attacks.fab_run import Found, Problem, Settings, choose, make_settings
from samrobust.checks import check
from samrobust.objectives import misclassified
from samrobust.types import Array, Attack, LogitsFn

__all__ = ["fab_minimal", "fab_targeted"]


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
) -> Attack:
    """FAB-T, the third attack of AutoAttack: what it finds within a ball.

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
      first_target: how many of the highest ones are left out before them, >= 0 and
        below K - 1. May be traced, unlike the rest: a caller that drops broken examples
        between targets compiles once for all of them.
      num_steps: number of steps of a run, >= 0, each of one gradient and one more
        forward pass.
      restarts: number of runs towards each target, >= 1. The first starts at the image,
        the others at a random point half a radius away, within the box.
      alpha_max: the most that the step from the original image counts, in [0, 1].
      eta: how far a step goes, relative to the distance of the plane, >= 1.
      beta: the share of a perturbation that the walk back leaves, in (0, 1).
      box: the range of pixel values.

    Returns:
      `attack(logits_fn, images, labels, *, key) -> images` on images [B, ...] in the
      box, float32 (or float64), and labels int [B]; wrap it in `jax.jit`.

      **Guarantees.** Shape and dtype are kept. An example is handed in as the smallest
      misclassified perturbation of the first run that found one within the radius, and
      else unchanged, as are images that are misclassified already and all images if
      the radius is 0. It lies in the box, and in the ball as `ball.norm` measures it.
      An example's outcome does not depend on the others of its batch. Runs end once
      every example of the batch is broken. No gradient flows through the result. What
      is found lies close to the boundary, so another program may judge it differently
      where the logits tie but for rounding.

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
    counts = num_targets, num_steps, restarts
    settings = make_settings(ball, *counts, alpha_max, eta, beta, box)
    return _make_attack(
        settings, goal=ball.radius, limit=ball.radius, first_target=first_target
    )


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
) -> Attack:
    """FAB-T without a radius: small misclassified perturbations, to measure distances.

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
      the result lies in the box. An example is handed in as the smallest misclassified
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
    counts = num_targets, num_steps, restarts
    settings = make_settings(ball, *counts, alpha_max, eta, beta, box)
    check(
        restarts == 1 or ball.radius > 0,
        "ball.radius > 0 when restarts > 1",
        "Random starts lie half a radius away.",
        radius=ball.radius,
        restarts=restarts,
    )
    return _make_attack(settings, goal=0.0, limit=float("inf"))


def _make_attack(
    settings: Settings, *, goal: float, limit: float, first_target: int | Array = 0
) -> Attack:
    """Runs until all distances reach the goal; drops what lies beyond the limit."""

    def attack(
        logits_fn: LogitsFn, images: Array, labels: Array, *, key: Array
    ) -> Array:
        logits_fn, images, labels, key = accept(
            logits_fn, images, labels, key, box=settings.box, ball=settings.ball
        )
        if limit == 0:
            return images
        logits = logits_fn(images)
        targets = _targets(logits, labels)
        check_target(first_target, logits.shape[-1])
        num_targets = jnp.minimum(settings.num_targets, len(targets) - first_target)
        problem = Problem(settings, logits_fn, images, labels)

        def goes_on(carry: tuple[Array, Found]) -> Array:
            index, best = carry
            unfinished = jnp.any(best.distance > goal)
            return (index < num_targets * settings.restarts) & unfinished

        def body(carry: tuple[Array, Found]) -> tuple[Array, Found]:
            index, best = carry
            start = problem.start(index % settings.restarts, index, key)
            target = targets[first_target + index // settings.restarts]
            found = problem.run(start, target)
            better = (found.distance < best.distance) & (found.distance <= limit)
            return index + 1, choose(better & (best.distance > goal), found, best)

        unknown = filled(images, jnp.inf)
        distance = jnp.where(misclassified(logits, labels), 0.0, unknown)
        first = (jnp.int32(0), Found(images, distance))
        best = jax.lax.while_loop(goes_on, body, first)[1]
        return jax.lax.stop_gradient(best.images)

    return attack


def _targets(logits: Array, labels: Array) -> Array:
    """The classes but the label, that of the highest logit first: int32 [K - 1, B]."""
    num_classes = logits.shape[-1]
    is_label = jax.nn.one_hot(labels, num_classes, dtype=bool)
    order = jnp.argsort(jnp.where(is_label, jnp.inf, -logits), axis=-1)
    return order[:, :-1].T
