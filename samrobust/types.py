"""Names for the arrays and functions that the package passes around.

Conventions: images are float32 [B, H, W, C] (NHWC) with pixels in [0, 1]; labels are
int32 [B]; logits are float32 [B, K]; radii and step sizes are in pixel units, so that
8/255 is written `8 / 255`.
"""

from typing import Any, Protocol, TypeAlias

import jax

__all__ = ["Array", "Attack", "Config", "LogitsFn", "LossFn", "PyTree"]

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
# An `ml_collections.ConfigDict`; type checkers cannot see its fields.
Config: TypeAlias = Any


class LogitsFn(Protocol):
    """A classifier, its parameters closed over: images [B, ...] to logits [B, K]."""

    def __call__(self, images: Array, /) -> Array:
        """See the class."""
        ...


class LossFn(Protocol):
    """A loss per example: logits [B, K] and labels int [B] to losses [B].

    An attack maximises it, training minimises its mean.
    """

    def __call__(self, logits: Array, labels: Array, /) -> Array:
        """See the class."""
        ...


class Attack(Protocol):
    """Maps images [B, ...] to adversarial images of the same shape and dtype.

    `key` is one PRNG key, or a key array [B] of one an example. It is consumed: pass a
    fresh one at every call. Every random number of an example is a function of its own
    key, or of the one key and its position: never of the batch that it stands in.
    """

    def __call__(
        self, logits_fn: LogitsFn, images: Array, labels: Array, *, key: Array
    ) -> Array:
        """See the class."""
        ...
