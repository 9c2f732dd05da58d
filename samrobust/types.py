"""Names for the arrays and functions that the package passes around.

Conventions: images are float32 [B, H, W, C] (NHWC) with pixels in [0, 1]; labels are
int32 [B]; logits are float32 [B, K]; radii and step sizes are in pixel units, so that
8/255 is written `8 / 255`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax
import jax.typing
import numpy as np

__all__ = [
    "Array",
    "ArrayLike",
    "Attack",
    "Augmentation",
    "CheckedAttack",
    "Config",
    "Entry",
    "Field",
    "LogitsFn",
    "LossFn",
    "PyTree",
    "RandomLogitsFn",
]

Array: TypeAlias = jax.Array
# A number or an array, of NumPy too.
ArrayLike: TypeAlias = jax.typing.ArrayLike
PyTree: TypeAlias = Any
# An `ml_collections.ConfigDict`; type checkers cannot see its fields.
Config: TypeAlias = Any


class LogitsFn(Protocol):
    """A classifier, its parameters closed over: images [B, ...] to logits [B, K]."""

    def __call__(self, images: Array, /) -> Array:
        """Returns the logits [B, K]."""
        ...


class RandomLogitsFn(Protocol):
    """A classifier with random logits: images [B, ...] and a key to logits [B, K]."""

    def __call__(self, images: Array, /, *, key: Array) -> Array:
        """Returns the logits [B, K]."""
        ...


class LossFn(Protocol):
    """A loss per example: logits [B, K] and labels int [B] to losses [B].

    An attack maximizes it, training minimizes its mean.
    """

    def __call__(self, logits: Array, labels: Array, /) -> Array:
        """Returns the losses [B]."""
        ...


class Attack(Protocol):
    """An attack: images [B, ...] to adversarial ones of the same shape and dtype.

    `key` is one PRNG key, or a key array [B] with one for each example. It is consumed:
    pass a fresh one at every call. Every random number of an example is a function of
    its own key, or of the one key and its position, never of the batch that it is in.
    """

    def __call__(
        self, logits_fn: LogitsFn, images: Array, labels: Array, *, key: Array
    ) -> Array:
        """Returns the adversarial images [B, ...]."""
        ...


class Augmentation(Protocol):
    """A random change of training images [B, H, W, C] that keeps shape and dtype.

    A function of the images and `key` alone, for the inside of jit. Labels stay as they
    are, pixels in [0, 1].
    """

    def __call__(self, images: Array, /, *, key: Array) -> Array:
        """Returns the changed images [B, H, W, C]."""
        ...


class CheckedAttack(Attack, Protocol):
    """An attack that checks its arguments, as all of `samrobust.attacks` do.

    It takes NumPy's arrays too and, built to draw gradients of random logits, a
    `RandomLogitsFn`.
    """

    def __call__(
        self,
        logits_fn: LogitsFn | RandomLogitsFn,
        images: Array | np.ndarray,
        labels: Array | np.ndarray,
        *,
        key: Array,
    ) -> Array:
        """Returns the adversarial images [B, ...]."""
        ...


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config section.

    Attributes:
      default: its value unless set; None for a field of type `kind`.
      rule: called as `rule(**{name: value})`, raises `ValueError` for other values.
      kind: the type of a value that is None by default.
    """

    default: Any
    rule: Callable[..., None]
    kind: type | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """The meaning of a name in rows of tables and in configs.

    Attributes:
      make: the constructor. Its parameters without a default are the options of a row,
        in order; all of them are the fields of a config section, except for what the
        training provides (see `samrobust.experiments.methods`).
      label: of a row in tables, a format of the options; empty: name and options.
      options: names of options in rows to fields, if not all parameters without a
        default are options under their own names.
      fields: the rules of parameters, called as `rule(**{name: value})`, which raise
        `ValueError` for other values; and whole fields, of what is no parameter or has
        another default in configs. A parameter without a default has 0 there: off.
      section: of the config; empty: the name.
      attack_passes: the cost of a step beside its passes over the images, such as that
        of attacking them, in passes with weight gradients, or a function from the
        section's values to that. None: of a part that makes images, unknown.
      check: of a row's options, by their names; raises `ValueError`.
      passes: how many a sharpness method adds to each pass over the images, or a
        function from the section's values to that. None: what a `two_pass` says; of any
        other, unknown.
      chosen: from the section's values and the size of a batch to how many of its
        examples have passes of their own; 0: none.
    """

    make: Callable[..., Any]
    label: str = ""
    options: Mapping[str, str] | None = None
    fields: Mapping[str, Field | Callable[..., None]] = dataclasses.field(
        default_factory=dict
    )
    section: str = ""
    attack_passes: float | Callable[[Mapping[str, Any]], float] | None = None
    check: Callable[..., None] = lambda **_: None
    passes: float | Callable[[Mapping[str, Any]], float] | None = None
    chosen: Callable[[Mapping[str, Any], int], int] = lambda *_: 0
