"""The smallest step inside a box onto a hyperplane, in the norm of a ball.

    min ||d||  such that  <w, x + d> = b  and  low <= x + d <= high

By its optimality conditions every pixel moves against `w` with one common length `t`,
scaled by the ball's steepest ascent `a` (1 for l-inf, |w| / ||w|| for l2), until the
box stops it: `|d_i| = min(t |a_i|, room_i)`. What `<w, d>` has gained by then is a
concave function of `t`, made of straight pieces, and Newton's method from `t = 0`
finds where it meets the demand in finitely many iterations, from below and without
sorting the pixels.
"""

import jax
import jax.numpy as jnp

from samrobust.attacks.balls import Ball
from samrobust.types import Array

__all__ = ["step_onto_hyperplane"]


def step_onto_hyperplane(
    ball: Ball,
    points: Array,
    normal: Array,
    excess: Array,
    *,
    box: tuple[float, float] = (0.0, 1.0),
) -> Array:
    """Computes the smallest step, in the ball's norm, from each point onto its plane.

    Args:
      ball: says in which norm a step is small; its radius plays no role.
      points: [B, ...], in the box.
      normal: [B, ...], the `w` of each example's hyperplane `<w, x> = b`; entries that
        are not finite count as zero.
      excess: [B], `<w, x> - b` at the points; NaN counts as zero.
      box: the range of pixel values.

    Returns:
      Steps [B, ...] in the dtype of the points. **Guarantees.** `points + step` lies in
      the box up to rounding, and on the hyperplane where the box reaches it. Where it
      does not, every pixel that counts moves to the end of the box that is nearer to
      the hyperplane. Pixels of zero weight stay. Scaling `normal` and `excess` by the
      same number changes nothing.

    Reference: Croce and Hein (2020), arXiv 1907.02044, the projection with box
    constraints. *Our deviation*: their code sorts the pixels, and for l2 does not move
    those of weights below 1e-8, where ours depend on ratios of weights alone.

    >>> from samrobust.attacks import linf
    >>> points, normal = jnp.array([[0.5, 0.875]]), jnp.array([[1.0, -1.0]])
    >>> step_onto_hyperplane(linf(1.0), points, normal, jnp.array([0.375]))
    Array([[-0.25 ,  0.125]], dtype=float32)
    """
    axes = tuple(range(1, points.ndim))
    lengths = (points.shape[0],) + (1,) * len(axes)
    normal = jnp.where(jnp.isfinite(normal), normal, 0.0)
    scale = jnp.max(jnp.abs(normal), axis=axes, keepdims=True)
    scale = jnp.where(scale > 0, scale, 1.0)
    excess = jnp.nan_to_num(excess, posinf=jnp.inf, neginf=-jnp.inf).reshape(lengths)
    weights, demand = normal / scale, jnp.abs(excess) / scale
    # Downhill: `weights` point to the side of the hyperplane where the point lies.
    weights = jnp.where(excess < 0, -weights, weights)
    room = jnp.where(weights > 0, points - box[0], box[1] - points)
    speed = jnp.abs(ball.steepest_ascent(weights))
    # A weight that underflows in the direction cannot gain anything either.
    size = jnp.where(speed > 0, jnp.abs(weights), 0.0)
    length = _common_length(size, speed, room, demand, axes)
    # An infinite length times a zero speed is NaN, and not chosen.
    moved = jnp.minimum(length * speed, room)
    return jnp.where(size > 0, -jnp.sign(weights) * moved, 0.0)


def _common_length(
    size: Array, speed: Array, room: Array, demand: Array, axes: tuple[int, ...]
) -> Array:
    """Finds the `t` [B, 1, ...] where `sum size * min(t * speed, room)` is the demand.

    Infinite where no `t` does. An example that has converged no longer changes,
    however many iterations the others of its batch need.
    """

    def newton(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        length, _ = carry
        stopped = length * speed >= room
        # The piece of the concave gain at this length: gained + slope * t.
        gained = jnp.sum(jnp.where(stopped, size * room, 0.0), axes, keepdims=True)
        slope = jnp.sum(jnp.where(stopped, 0.0, size * speed), axes, keepdims=True)
        rest = jnp.maximum(demand - gained, 0.0)
        following = jnp.where(
            slope > 0, rest / jnp.where(slope > 0, slope, 1.0), jnp.inf
        )
        # In exact arithmetic Newton's lengths never fall; rounding must not make them.
        following = jnp.maximum(length, following)
        return following, following > length

    def goes_on(carry: tuple[Array, Array]) -> Array:
        return jnp.any(carry[1])

    start = jnp.zeros_like(demand)
    return jax.lax.while_loop(goes_on, newton, (start, jnp.ones_like(start, bool)))[0]
