"""What attacks accept: looked at here for all of them, at construction and at call.

Ranks and dtypes are known inside `jax.jit` too and are always looked at; pixels and the
range of labels where they are concrete. Nothing here runs inside a compiled program.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from samrobust.attacks.balls import Ball
from samrobust.attacks.draws import check_key, one_an_example
from samrobust.attacks.numbers import real
from samrobust.checks import check
from samrobust.types import Array, LossFn

__all__ = [
    "Call",
    "accept",
    "check_ball",
    "check_box",
    "check_losses",
    "check_target",
]

_ROUNDING = 1e-6  # how far a pixel may lie outside the box, as a share of it
_UNITS = "Radii are in pixel units: did you mean {:g} / 255?"


class Call(NamedTuple):
    """The arguments of a call; all that came as other arrays are JAX's."""

    logits_fn: Callable[..., Array]
    images: Array
    labels: Array
    key: Array


def check_box(box: tuple[float, float]) -> tuple[float, float]:
    """The range of pixel values as two floats.

    Raises:
      ValueError: unless they are two finite numbers, the lower one first.
    """
    check(
        isinstance(box, (tuple, list)) and len(box) == 2,
        "box as two numbers",
        box=box,
    )
    low, high = (real(box=end) for end in box)
    check(low < high, "box[0] < box[1]", box=box)
    check(math.isfinite(high - low), "a finite box", box=box)
    return low, high


def check_ball(ball: Ball, box: tuple[float, float]) -> None:
    """Refuses what is no ball, and a radius in other units than the box's.

    Raises:
      ValueError: see above.
    """
    check(isinstance(ball, Ball), "a ball from `linf` or `l2`", ball=ball)
    check(
        ball.order == 2 or ball.radius <= _grown(box[1] - box[0]),
        "an l-inf radius within the range of the box",
        _UNITS.format(ball.radius),
        radius=ball.radius,
        box=box,
    )


def check_losses(loss: LossFn) -> LossFn:
    """The loss, which is looked at whenever it is asked.

    Raises:
      ValueError: unless it is a function; when called, unless it gives losses [B].
    """
    check(callable(loss), "loss as a function of logits and labels", loss=loss)

    def checked(logits: Array, labels: Array) -> Array:
        losses = loss(logits, labels)
        shape = jnp.shape(losses)
        check(shape == labels.shape, "a loss [B] of each example", loss_shape=shape)
        return losses

    return checked


def accept(
    logits_fn: Callable[..., Array],
    images: Array,
    labels: Array,
    key: Array,
    *,
    box: tuple[float, float],
    ball: Ball | None = None,
    is_random: bool = False,
) -> Call:
    """The arguments of a call, once they are what an attack can work on.

    Args:
      logits_fn: a function; what it returns is looked at whenever it is asked.
      images: [B, ...], float32 or float64, in the box where that can be seen.
      labels: int [B], classes of the logits where that can be seen.
      key: one, or one an example.
      box: the range of pixel values.
      ball: whose radius must not exceed the box's diagonal.
      is_random: whether `logits_fn` is given keys, so that one key remains one.

    Returns:
      The same, as arrays through which no gradient flows; the key as one an example,
      split over devices as the images are. What a loop starts from is to
      be made from the images: inside `jax.shard_map` they vary over all axes that one
      of the arguments varies over.

    Raises:
      ValueError: for anything else.
    """
    check(callable(logits_fn), "logits_fn as a function of images", logits_fn=logits_fn)
    images, labels = _as_array(images=images), _as_array(labels=labels)
    _check_images(images, box, ball)
    _check_labels(labels, images)
    labels = labels.astype(jnp.int32)  # uint8 cannot count to more than 256 classes
    check_key(key, len(images))
    images = _varying(images, labels, key)
    if not is_random:
        key = one_an_example(key, images)

    def checked(images: Array, **options: Array) -> Array:
        logits = logits_fn(images, **options)
        _check_logits(logits, labels)
        return logits

    return Call(checked, jax.lax.stop_gradient(images), labels, key)


def check_target(first_target: int | Array, num_classes: int) -> None:
    """Refuses to leave out all wrong classes, where the number can be seen.

    Raises:
      ValueError: see above.
    """
    if _is_concrete(first_target):
        check(
            0 <= int(first_target) < num_classes - 1,
            "0 <= first_target < the number of wrong classes",
            first_target=int(first_target),
            classes=num_classes,
        )


def _as_array(**one: Any) -> Array:
    ((name, value),) = one.items()
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        text = f"Expected {name} as an array, got {name}={value!r}."
        raise ValueError(text) from error


def _check_images(images: Array, box: tuple[float, float], ball: Ball | None) -> None:
    whole_numbers = jnp.issubdtype(images.dtype, jnp.integer)
    check(
        images.dtype in (jnp.float32, jnp.float64),
        "float32 images with pixels in the box",
        "Bytes become pixels by `/ 255`." if whole_numbers else "",
        dtype=str(images.dtype),
    )
    check(
        images.ndim >= 2,
        "images [B, ...], a batch",
        "A single image needs an axis in front: `images[None]`.",
        images_shape=images.shape,
    )
    if ball is not None and ball.order == 2:
        diagonal = (box[1] - box[0]) * math.sqrt(math.prod(images.shape[1:]))
        check(
            len(images) == 0 or ball.radius <= _grown(diagonal),
            "an l2 radius within the diagonal of the box",
            _UNITS.format(ball.radius),
            radius=ball.radius,
            diagonal=round(diagonal, 4),
        )
    if _is_concrete(images) and images.size:
        pixels = np.asarray(images)
        low, high = float(pixels.min()), float(pixels.max())
        slack = _grown(box[1] - box[0]) - (box[1] - box[0])
        check(
            box[0] - slack <= low and high <= box[1] + slack,
            f"images with pixels in the box, {box[0]:g} to {box[1]:g}",
            "Bytes become pixels by `/ 255`; normalisation belongs into `logits_fn`.",
            lowest=low,
            highest=high,
        )


def _check_labels(labels: Array, images: Array) -> None:
    check(
        jnp.issubdtype(labels.dtype, jnp.integer),
        "int labels [B]",
        "One-hot labels become classes by `jnp.argmax(labels, -1)`."
        if labels.ndim == 2
        else "",
        labels_dtype=str(labels.dtype),
        labels_shape=labels.shape,
    )
    check(
        labels.shape == images.shape[:1],
        "labels [B], one an image",
        "A single image needs an axis in front: `images[None]`."
        if labels.ndim == 0
        else "",
        labels_shape=labels.shape,
        images_shape=images.shape,
    )


def _check_logits(logits: Any, labels: Array) -> None:
    is_array = isinstance(logits, (jax.Array, np.ndarray))
    found = type(logits).__name__
    check(is_array, "logits_fn to return an array [B, K]", logits=found)
    shape, dtype = logits.shape, logits.dtype
    check(
        len(shape) == 2 and shape[0] == len(labels) and shape[1] >= 2,
        "logits [B, K] of 2 classes or more, B as the images",
        logits_shape=shape,
        batch=len(labels),
    )
    check(jnp.issubdtype(dtype, jnp.floating), "real logits", logits_dtype=str(dtype))
    if _is_concrete(labels) and labels.size:
        values = np.asarray(labels)
        low, high = int(values.min()), int(values.max())
        check(
            low >= 0 and high < shape[1],
            "labels in 0 .. K-1",
            lowest=low,
            highest=high,
            classes=shape[1],
        )


def _varying(images: Array, labels: Array, key: Array) -> Array:
    """The images, which inside `jax.shard_map` vary over whatever one of them does.

    Where two arrays meet JAX sees to it, so here they meet, and nothing is computed.
    """
    numbers = jax.random.key_data(key)
    always = jnp.all(labels == labels) & jnp.all(numbers == numbers)
    return jnp.where(always, images, images)


def _is_concrete(value: Any) -> bool:
    """Whether its numbers are there to be looked at, all of them on this process."""
    if isinstance(value, Tracer):
        return False
    return getattr(value, "is_fully_addressable", True)


def _grown(length: float) -> float:
    return length * (1 + _ROUNDING)
