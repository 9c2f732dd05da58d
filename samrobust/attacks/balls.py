"""The sets of allowed perturbations: l-inf and l2 balls around each image.

A ball is a few pure functions of perturbations [B, ...], one ball an example: all axes
but the first belong to an example. Radii are in pixel units (8/255, not 8).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from samrobust.attacks import draws
from samrobust.attacks.numbers import real, real_or_each, seen
from samrobust.attacks.per_example import factor
from samrobust.checks import check
from samrobust.types import Array, ArrayLike

__all__ = ["Ball", "into_set", "l2", "linf"]


class Ball(NamedTuple):
    """A norm ball as a few pure functions; `linf` and `l2` make one.

    A random start of another kind is `ball._replace(sample=...)`; what it draws is
    projected onto ball and box.

    Attributes:
      project: perturbations [B, ...] to the nearest ones in the ball.
      sample: `sample(key, shape)` draws perturbations [B, ...] in the ball, up to the
        rounding of float32, in which they are. The key, one or one an example, is
        consumed.
      steepest_ascent: gradients [B, ...] to the directions of unit norm that increase
        the loss fastest; a gradient of zero or NaN gives a zero direction.
      norm: perturbations [B, ...] to their norms [B].
      radius: the radius, in pixel units: a float, or an array that is traced or [B].
        The functions hold it themselves: for another one, build another ball.
      order: of the norm, `inf` or 2, for attacks that are made for one norm.
    """

    project: Callable[[Array], Array]
    sample: Callable[[Array, tuple[int, ...]], Array]
    steepest_ascent: Callable[[Array], Array]
    norm: Callable[[Array], Array]
    radius: float | Array
    order: float


def linf(radius: ArrayLike) -> Ball:
    """Builds the ball `max_i |d_i| <= radius`; steps follow the gradient's sign.

    Args:
      radius: in pixel units, >= 0. A float, or a floating array: one number, which may
        be traced, or [B], one an example. An attack leaves an example of radius 0 as it
        is.

    Returns:
      The ball. `sample` is uniform in it.

    Raises:
      ValueError: if the radius is not a number, negative or not finite; what is traced
        cannot be looked at.

    >>> linf(0.5).project(jnp.array([[0.2, -0.7]]))
    Array([[ 0.2, -0.5]], dtype=float32)
    """
    radius = _checked(radius)

    def project(delta: Array) -> Array:
        most = factor(radius, delta)
        return jnp.clip(delta, -most, most)

    def sample(key: Array, shape: tuple[int, ...]) -> Array:
        return draws.uniform(key, shape, -radius, radius)

    def norm(delta: Array) -> Array:
        return jnp.max(jnp.abs(delta), axis=_example_axes(delta))

    def steepest_ascent(gradient: Array) -> Array:
        # argmax of <g, d> over max |d_i| <= 1: a corner of the cube.
        return jnp.sign(jnp.where(jnp.isnan(gradient), 0.0, gradient))

    return Ball(project, sample, steepest_ascent, norm, radius, float("inf"))


def l2(radius: ArrayLike, *, gradient_floor: float = 0.0) -> Ball:
    """Builds the ball `||d||_2 <= radius`; steps follow the normalized gradient.

    Args:
      radius: in pixel units, >= 0; a float or an array, as for `linf`.
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
      ValueError: if an argument is not a number, negative or not finite.

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
        # Scaled by min(1, r / ||d||), exactly 1 inside: no rounding moves what fits.
        length = _norm(delta)
        most = factor(radius, delta)
        return delta * jnp.minimum(1.0, most / jnp.where(length > 0, length, 1.0))

    def sample(key: Array, shape: tuple[int, ...]) -> Array:
        # A normal vector's direction is uniform on the sphere.
        direction_key, length_key = draws.split(key)
        direction = draws.normal(direction_key, shape)
        lengths = (shape[0],) + (1,) * (len(shape) - 1)
        length = draws.uniform(length_key, lengths, 0.0, radius)
        return _unit(direction, 0.0) * length

    def steepest_ascent(gradient: Array) -> Array:
        return _unit(gradient, gradient_floor)

    return Ball(project, sample, steepest_ascent, norm, radius, 2.0)


def into_set(
    candidates: Array, images: Array, ball: Ball, box: tuple[float, float]
) -> Array:
    """Projects candidates onto the ball around the images, then onto the box."""
    return jnp.clip(images + ball.project(candidates - images), *box)


def _checked(radius: ArrayLike) -> float | Array:
    radius = real_or_each(radius=radius)
    numbers = seen(radius)
    check(
        bool(np.all((numbers >= 0) & (numbers < np.inf))),
        "0 <= radius < inf",
        "Radii are in pixel units: write 8/255 as `8 / 255`.",
        radius=radius,
    )
    return radius


def _example_axes(array: Array) -> tuple[int, ...]:
    return tuple(range(1, array.ndim))


def _norm(array: Array) -> Array:
    """Returns the l2 norm of each example, [B, 1, ...].

    Dividing by the largest entry keeps squares from underflowing below 1e-19.
    """
    axes = _example_axes(array)
    scale = jnp.max(jnp.abs(array), axis=axes, keepdims=True)
    safe = jnp.where(scale > 0, scale, 1.0)
    squares = jnp.sum(jnp.square(array / safe), axis=axes, keepdims=True)
    return scale * jnp.sqrt(squares)


def _unit(array: Array, floor: float) -> Array:
    length = _norm(array)  # NaN, as of a NaN gradient, is not > 0: a zero direction
    return jnp.where(
        length > 0, array / jnp.where(length > 0, length + floor, 1.0), 0.0
    )
