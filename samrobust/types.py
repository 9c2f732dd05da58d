"""Names for the arrays and functions that the package passes around.

Conventions: images are float32 [B, H, W, C] (NHWC) with pixels in [0, 1]; labels are
int32 [B]; logits are float32 [B, K]; radii and step sizes are in pixel units, so that
8/255 is written `8 / 255`.
"""

from typing import Any, Protocol, TypeAlias

import jax

__all__ = ["Array", "Attack", "LogitsFn", "LossFn", "PyTree"]

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class LogitsFn(Protocol):
    """A classifier with its parameters closed over: [B, ...] images to [B, K] logits."""

    def __call__(self, images: Array, /) -> Array: ...


class LossFn(Protocol):
    """A loss per example: logits [B, K] and labels int [B] to losses [B].

    An attack maximises it, training minimises its mean.
    """

    def __call__(self, logits: Array, labels: Array, /) -> Array: ...


class Attack(Protocol):
    """Maps images [B, ...] to adversarial images of the same shape and dtype.

    `key` is consumed: pass a fresh one at every call.
    """

    def __call__(
        self, logits_fn: LogitsFn, images: Array, labels: Array, *, key: Array
    ) -> Array: ...
