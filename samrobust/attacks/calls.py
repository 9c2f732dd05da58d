"""Checks that all attacks share: of their options, and of the arguments of a call.

`attack_of` turns a function into an attack; the function may rely on the checks. Ranks
and dtypes are always checked, inside `jax.jit` too; pixels, radii and the range of
labels where they are concrete. Nothing here runs inside a compiled program.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from samrobust.attacks.balls import Ball
from samrobust.attacks.casts import cast_once
from samrobust.attacks.draws import check_key, one_an_example
from samrobust.attacks.numbers import real, seen
from samrobust.attacks.per_example import filled, select
from samrobust.checks import check
from samrobust.types import Array, CheckedAttack, LogitsFn, LossFn, RandomLogitsFn

__all__ = [
    "PROBABILITIES",
    "Call",
    "accept",
    "attack_of",
    "check_box",
    "check_losses",
    "check_set",
    "check_target",
    "check_units",
    "is_point",
    "keep_still",
    "warn_of_probabilities",
]

PROBABILITIES = (
    "The network's outputs are in [0, 1] and sum to 1, as probabilities do. Attacks "
    "need logits: the gradient vanishes in a softmax, and robustness is overestimated. "
    "Leave the softmax out."
)

_ROUNDING = 1e-6  # how far a pixel may lie outside the box, as a share of it
_UNITS = "Radii and steps are in pixel units: did you mean {:g} / 255?"


class Call(NamedTuple):
    """The arguments of a call; all that came as other arrays are JAX's."""

    logits_fn: Callable[..., Array]
    images: Array
    labels: Array
    key: Array


def attack_of(
    function: Callable[[Call], Array],
    *,
    box: tuple[float, float],
    ball: Ball | None = None,
    is_random: bool = False,
    ndim: int | None = None,
    is_minimal: bool = False,
) -> CheckedAttack:
    """Builds the attack that checks a call and passes it to the function.

    No gradient flows through the result. Where the radius of the ball is 0 the images
    return unchanged; if that is all of them, the function is not called.

    Args:
      function: makes adversarial images [B, ...] of a call.
      box: as for `accept`, as are the three that follow.
      ball: see there.
      is_random: see there.
      ndim: see there.
      is_minimal: whether the ball is only a scale, so that radius 0 means nothing.

    Returns:
      The attack, which raises `ValueError` as `accept` does.
    """
    options: Any = {"box": box, "ball": ball, "is_random": is_random, "ndim": ndim}
    bound = None if is_minimal else ball

    def attack(
        logits_fn: LogitsFn | RandomLogitsFn,
        images: Array | np.ndarray,
        labels: Array | np.ndarray,
        *,
        key: Array,
    ) -> Array:
        call = accept(logits_fn, images, labels, key, **options)
        if bound is not None and is_point(bound):
            return call.images
        if not is_random:  # which is given keys, too
            call = call._replace(logits_fn=cast_once(call.logits_fn, call.images))
        found = jax.lax.stop_gradient(function(call))
        return found if bound is None else keep_still(bound, call.images, found)

    return attack


def is_point(ball: Ball) -> bool:
    """Returns whether the radius is known to be 0 for all examples."""
    return isinstance(ball.radius, float) and ball.radius == 0


def keep_still(ball: Ball, images: Array, moved: Array) -> Array:
    """Returns the moved images, but where the radius is 0 the images."""
    if isinstance(ball.radius, float):
        return images if is_point(ball) else moved
    return select(filled(images, ball.radius) > 0, moved, images)


def check_box(box: tuple[float, float]) -> tuple[float, float]:
    """Returns the range of pixel values as two floats.

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


def check_set(ball: Ball, box: tuple[float, float]) -> tuple[float, float]:
    """Returns the box as two floats.

    Raises:
      ValueError: as `check_box` does; for what is no ball, and for a radius in other
        units than the box's.
    """
    check(isinstance(ball, Ball), "a ball from `linf` or `l2`", ball=ball)
    box = check_box(box)
    check_units(ball, box, radius=ball.radius)
    return box


def check_units(ball: Ball, box: tuple[float, float], **one: Any) -> None:
    """Refuses a length in an l-inf ball in other units than the box's.

    Raises:
      ValueError: see above.
    """
    ((name, lengths),) = one.items()
    largest = float(np.max(seen(lengths), initial=0.0))
    check(
        ball.order == 2 or largest <= _grown(box[1] - box[0]),
        f"an l-inf {name} within the range of the box",
        _UNITS.format(largest),
        **{name: largest},
        box=box,
    )


def check_losses(loss: LossFn) -> LossFn:
    """Returns the loss with a check of what it returns at every call.

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
    logits_fn: LogitsFn | RandomLogitsFn,
    images: Array | np.ndarray,
    labels: Array | np.ndarray,
    key: Array,
    *,
    box: tuple[float, float],
    ball: Ball | None = None,
    is_random: bool = False,
    ndim: int | None = None,
) -> Call:
    """Returns the arguments of a call, checked.

    Args:
      logits_fn: a function; what it returns is checked at every call.
      images: [B, ...], float32 or float64, in the box where that can be seen.
      labels: int [B], classes of the logits where that can be seen.
      key: one, or one an example.
      box: the range of pixel values.
      ball: whose radius must not exceed the box's diagonal, and be one or one an image.
      is_random: whether `logits_fn` is given keys, so that one key remains one.
      ndim: of the images, if only 4 will do: [B, H, W, C].

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
    check(ndim in (None, images.ndim), "images [B, H, W, C]", shape=images.shape)
    images = _varying(images, labels, key)
    if not is_random:
        key = one_an_example(key, images)

    def checked(images: Array, **options: Array) -> Array:
        logits = logits_fn(images, **options)
        _check_logits(logits, labels)
        return logits

    return Call(checked, jax.lax.stop_gradient(images), labels, key)


def check_target(first_target: int | Array, num_classes: int) -> None:
    """Refuses to skip all wrong classes, where the number is concrete.

    Raises:
      ValueError: see above.
    """
    for first in seen(first_target):
        check(
            0 <= first < num_classes - 1,
            "0 <= first_target < the number of wrong classes",
            first_target=int(first),
            classes=num_classes,
        )


def warn_of_probabilities(normalized: np.ndarray) -> None:
    """Warns if all outputs are normalized, bool [B]; of none nothing is known."""
    if normalized.size and normalized.all():
        warnings.warn(PROBABILITIES, stacklevel=3)


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
    if ball is not None:
        _check_radius(ball, images, box)
    pixels = seen(images)
    if pixels.size:
        low, high = float(pixels.min()), float(pixels.max())
        slack = _grown(box[1] - box[0]) - (box[1] - box[0])
        check(
            box[0] - slack <= low and high <= box[1] + slack,
            f"images with pixels in the box, {box[0]:g} to {box[1]:g}",
            "Bytes become pixels by `/ 255`; normalization belongs in `logits_fn`.",
            lowest=low,
            highest=high,
        )


def _check_radius(ball: Ball, images: Array, box: tuple[float, float]) -> None:
    shape = jnp.shape(ball.radius)
    check(
        shape in ((), images.shape[:1]),
        "one radius, or radii [B], one an image",
        radius_shape=shape,
        images_shape=images.shape,
    )
    diagonal = (box[1] - box[0]) * math.sqrt(math.prod(images.shape[1:]))
    largest = float(np.max(seen(ball.radius), initial=0.0))
    check(
        ball.order != 2 or len(images) == 0 or largest <= _grown(diagonal),
        "an l2 radius within the diagonal of the box",
        _UNITS.format(largest),
        radius=largest,
        diagonal=round(diagonal, 4),
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
    values = seen(labels)
    if values.size:
        low, high = int(values.min()), int(values.max())
        check(
            low >= 0 and high < shape[1],
            "labels in 0 .. K-1",
            lowest=low,
            highest=high,
            classes=shape[1],
        )


def _varying(images: Array, labels: Array, key: Array) -> Array:
    """Returns the images, varying inside `jax.shard_map` over what one of them does.

    JAX aligns this where two arrays meet, so here they meet; XLA drops the rest.
    """
    numbers = jax.random.key_data(key)
    always = jnp.all(labels == labels) & jnp.all(numbers == numbers)
    return jnp.where(always, images, images)


def _grown(length: float) -> float:
    return length * (1 + _ROUNDING)
