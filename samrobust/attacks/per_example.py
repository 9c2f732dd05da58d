"""Operations that treat each example of a batch as a problem of its own.

Images are [B, ...]; what belongs to an example is [B]. Nothing here mixes examples, so
an outcome does not depend on the batch, on padding or on devices. Random numbers of
this kind are in `samrobust.attacks.draws`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from samrobust.attacks.losses import misclassified
from samrobust.checks import check
from samrobust.types import Array

__all__ = [
    "BestSoFar",
    "any_is_left",
    "better",
    "factor",
    "filled",
    "judged_first",
    "likeliest_wrong",
    "repeat_while",
    "score",
    "select",
    "spread",
    "unseen",
]

_Tree = TypeVar("_Tree")


class BestSoFar(NamedTuple):
    """The most damaging images so far [B, ...] and how damaging they are [B].

    A score is a loss, infinity where the images are misclassified and minus infinity
    where nothing is known; or, of minimal attacks, minus the distance.
    """

    images: Array
    score: Array


def filled(
    images: Array, value: float | Array, dtype: jnp.dtype | type | None = None
) -> Array:
    """Returns the value for each example, [B], to start a loop over images from.

    It is split over devices as the images are, by default in their dtype. The
    value is one number, or numbers [B].

    >>> filled(jnp.zeros([2, 4, 4, 1]), 3.0)
    Array([3., 3.], dtype=float32)
    """
    one_each = jnp.sum(images, axis=tuple(range(1, images.ndim)))
    return jnp.full_like(one_each, value, dtype=dtype)


def spread(values: Array, images: Array) -> Array:
    """Returns values [B], one an example, as [B, 1, ...], to meet images [B, ...].

    >>> spread(jnp.array([2.0, 3.0]), jnp.zeros([2, 4, 4, 1])).shape
    (2, 1, 1, 1)
    """
    return jax.lax.expand_dims(values, range(1, images.ndim))


def factor(values: float | Array, images: Array) -> float | Array:
    """Returns one number, or numbers [B], as a factor of images, in their dtype.

    >>> factor(0.5, jnp.zeros([2, 3])), factor(jnp.array([0.5, 1]), jnp.zeros([2, 3]))
    (0.5, Array([[0.5],
           [1. ]], dtype=float32))
    """
    if isinstance(values, float):  # without a dtype of its own
        return values
    values = jnp.asarray(values, images.dtype)
    check(
        values.shape in ((), images.shape[:1]),
        "one number, or numbers [B], one an image",
        shape=values.shape,
        images_shape=images.shape,
    )
    return spread(values, images) if values.ndim else values


def select(take: Array, new: _Tree, old: _Tree) -> _Tree:
    """Returns `new` for the examples that `take` [B] says, `old` for the others.

    Both are arrays [B, ...] or trees of such.
    """

    def choose(new: Any, old: Any) -> Array:
        return jnp.where(spread(take, new), new, old)

    return jax.tree.map(choose, new, old)


def unseen(images: Array) -> BestSoFar:
    """Returns the images as the worst possible `BestSoFar`."""
    return BestSoFar(images, filled(images, -jnp.inf))


def judged_first(images: Array, logits: Array, labels: Array) -> BestSoFar:
    """Returns a `BestSoFar` that keeps the images that are misclassified already.

    Of the others, everything else is better: an attack may not stay where it is.
    """
    images, lowest = unseen(images)
    return BestSoFar(images, jnp.where(misclassified(logits, labels), jnp.inf, lowest))


def better(first: BestSoFar, second: BestSoFar) -> BestSoFar:
    """Returns per example the more damaging of two; the first where they tie."""
    return select(second.score > first.score, second, first)


def score(losses: Array, logits: Array, labels: Array) -> Array:
    """Returns scores [B]: infinity for mistakes, else the loss."""
    wrong = misclassified(logits, labels)
    return jnp.where(wrong, jnp.inf, jnp.where(jnp.isnan(losses), -jnp.inf, losses))


def any_is_left(best: BestSoFar) -> Array:
    """Returns whether an example is not misclassified yet."""
    return jnp.any(~jnp.isposinf(best.score))


def repeat_while(
    is_left: Callable[[_Tree], Array],
    limit: int | Array,
    function: Callable[[Array, _Tree], _Tree],
    start: _Tree,
) -> _Tree:
    """Returns `function(index, state)` done `limit` times, or until nothing is left.

    One `lax.while_loop`: the compiled size does not depend on the limit, which may be
    traced. In `shard_map` all devices go on until none has anything left, so that the
    function may communicate.
    """

    def carried(index: Array, state: _Tree) -> tuple[Array, Array, _Tree]:
        return index, _on_any_device((index < limit) & is_left(state)), state

    def goes_on(carry: tuple[Array, Array, _Tree]) -> Array:
        return carry[1]

    def step(carry: tuple[Array, Array, _Tree]) -> tuple[Array, Array, _Tree]:
        index, _, state = carry
        return carried(index + 1, function(index, state))

    return jax.lax.while_loop(goes_on, step, carried(jnp.int32(0), start))[2]


def _on_any_device(predicate: Array) -> Array:
    """Returns whether it holds on any of the devices of a `shard_map`."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return jax.lax.psum(predicate.astype(jnp.int32), axes) > 0 if axes else predicate


def likeliest_wrong(logits: Array, labels: Array) -> Array:
    """Returns all classes except the label, the highest logit first: [B, K - 1].

    >>> likeliest_wrong(jnp.array([[0.1, 0.3, 0.2]]), jnp.array([1]))
    Array([[2, 0]], dtype=int32)
    """
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jnp.where(is_label, -jnp.inf, logits)
    likeliest = jnp.argsort(others, axis=-1, descending=True)
    # The label last: a network may give other classes logits of -inf, too.
    last = jnp.argsort(jnp.take_along_axis(is_label, likeliest, -1), axis=-1)
    return jnp.take_along_axis(likeliest, last, -1)[:, :-1]
