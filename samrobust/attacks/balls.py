"""The sets of allowed perturbations: l-inf and l2 balls around each image.

A ball is three pure functions of perturbations [B, ...], one ball an example: all axes
but the first belong to an example. Radii are in pixel units (8/255, not 8).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from samrobust.attacks import draws
from samrobust.attacks.numbers import real
from samrobust.checks import check
from samrobust.types import Array

__all__ = ["Ball", "l2", "linf"]


class Ball(NamedTuple):
    """A norm ball as three pure functions; `linf` and `l2` make one.

    Attributes:
      project: perturbations [B, ...] to the nearest ones in the ball.
      sample: `sample(key, shape)` draws perturbations [B, ...] in the ball, up to the
        rounding of float32, in which they are. The key, one or one an example, is
        consumed.
      steepest_ascent: gradients [B, ...] to the directions of unit norm that increase
        the loss fastest; a gradient of zero or NaN gives a zero direction.
      norm: perturbations [B, ...] to their norms [B].
      radius: the radius, in pixel units.
      order: of the norm, `inf` or 2, for attacks that are made for one norm.
    """

    project: Callable[[Array], Array]
    sample: Callable[[Array, tuple[int, ...]], Array]
    steepest_ascent: Callable[[Array], Array]
    norm: Callable[[Array], Array]
    radius: float
    order: float


def linf(radius: float) -> Ball:
    """The ball `max_i |d_i| <= radius`; steps follow the gradient's sign.

    Args:
      radius: in pixel units, >= 0.

    Returns:
      The ball. `sample` is uniform in it.

    Raises:
      ValueError: if the radius is no number, negative or not finite.

    >>> linf(0.5).project(jnp.array([[0.2, -0.7]]))
    Array([[ 0.2, -0.5]], dtype=float32)
    """
    radius = _checked(radius)

    def project(delta: Array) -> Array:
        return jnp.clip(delta, -radius, radius)

    def sample(key: Array, shape: tuple[int, ...]) -> Array:
        return draws.uniform(key, shape, -radius, radius)

    def norm(delta: Array) -> Array:
        return jnp.max(jnp.abs(delta), axis=_example_axes(delta))

    def steepest_ascent(gradient: Array) -> Array:
        return jnp.sign(jnp.where(jnp.isnan(gradient), 0.0, gradient))

    return Ball(project, sample, steepest_ascent, norm, radius, float("inf"))


def l2(radius: float, *, gradient_floor: float = 0.0) -> Ball:
    """The ball `||d||_2 <= radius`; steps follow the normalised gradient.

    Args:
      radius: in pixel units, >= 0.
      gradient_floor: >= 0, added to the norm of each example's loss gradient before
        dividing by it. The default 0 takes a full step however small the gradient is.
        The paper's reference code divides the gradient of the MEAN loss over a batch
        of B by its norm + 1e-10, which equals a floor of `B * 1e-10` here, and which
        shortens the steps on examples that are classified with great confidence.

    Returns:
      The ball. `sample` draws the direction uniformly and the length uniformly in
      [0, radius], as the reference code does; this is not uniform in the ball, where
      nearly all volume lies at the surface.

    Raises:
      ValueError: if an argument is no number, negative or not finite.

    >>> l2(1.0).project(jnp.array([[3.0, 4.0]]))
    Array([[0.6, 0.8]], dtype=float32)
    """
    radius, gradient_floor = _checked(radius), real(gradient_floor=gradient_floor)
    check(
        0 <= gradient_floor < float("inf"),
        "0 <= gradient_floor < inf",
        gradient_floor=gradient_floor,
    )

    def norm(delta: Array) -> Array:
        return _norm(delta).reshape(delta.shape[0])

    def project(delta: Array) -> Array:
        length = _norm(delta)
        return delta * jnp.minimum(1.0, radius / jnp.where(length > 0, length, 1.0))

    def sample(key: Array, shape: tuple[int, ...]) -> Array:
        direction_key, length_key = draws.split(key)
        direction = draws.normal(direction_key, shape)
        lengths = (shape[0],) + (1,) * (len(shape) - 1)
        length = draws.uniform(length_key, lengths, 0.0, radius)
        return _unit(direction, 0.0) * length

    def steepest_ascent(gradient: Array) -> Array:
        return _unit(gradient, gradient_floor)

    return Ball(project, sample, steepest_ascent, norm, radius, 2.0)


def _checked(radius: float) -> float:
    radius = real(radius=radius)
    check(
        0 <= radius < float("inf"),
        "0 <= radius < inf",
        "Radii are in pixel units: write 8/255 as `8 / 255`.",
        radius=radius,
    )
    return radius


def _example_axes(array: Array) -> tuple[int, ...]:
    return tuple(range(1, array.ndim))


def _norm(array: Array) -> Array:
    """The l2 norm of each example, [B, 1, ...]; exact for entries far below 1e-19."""
    axes = _example_axes(array)
    scale = jnp.max(jnp.abs(array), axis=axes, keepdims=True)
    safe = jnp.where(scale > 0, scale, 1.0)
    squares = jnp.sum(jnp.square(array / safe), axis=axes, keepdims=True)
    return scale * jnp.sqrt(squares)


def _unit(array: Array, floor: float) -> Array:
    length = _norm(array)
    return jnp.where(
        length > 0, array / jnp.where(length > 0, length + floor, 1.0), 0.0
    )
