"""The parts of a training method besides its optimizer.

    min_w  E [ max_{e in W}  max_{d in X}  loss(w + e; x + d, y) ]
               sharpness     adversary     objective

and averaging, which says what weights are evaluated. A part is a tuple of pure
functions with its configuration closed over and its state passed in and out. Sharpness
is an optax transformation, see `samrobust.sharpness`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from samrobust.checks import BATCH_NORM, check_choice
from samrobust.types import Array, Attack, LogitsFn, PyTree

__all__ = [
    "VIEWS",
    "Adversary",
    "Averaging",
    "Learn",
    "Objective",
    "Perturb",
    "as_adversary",
    "name_of",
]

VIEWS = ("natural", "adversarial")


class Perturb(Protocol):
    """An attack with a memory: makes images [B, H, W, C], and its next state."""

    def __call__(
        self,
        logits_fn: LogitsFn,
        images: Array,
        labels: Array,
        state: PyTree,
        /,
        *,
        key: Array,
    ) -> tuple[Array, PyTree]:
        """Returns the images, and the state for the next batch."""
        ...


class Learn(Protocol):
    """An update of the adversary's state from the step's first pass.

    `images` are the adversarial ones, `gradients` those of the mean loss with respect
    to them, [B, H, W, C]; `correct` is bool [B].
    """

    def __call__(
        self,
        state: PyTree,
        images: Array,
        labels: Array,
        gradients: Array,
        correct: Array,
        /,
    ) -> PyTree:
        """Returns the state for the next batch."""
        ...


class Adversary(NamedTuple):
    """Maker of the images that are trained on.

    Attributes:
      perturb: makes them. The key is consumed.
      init: zeros of a full batch, float32 [B, H, W, C], to the state before the first
        step; () without a memory.
      learn: if given, computes the next state from the results of the first pass over
        the images. An incomplete last batch of an epoch has fewer examples.
      weigh: if given, `(state, labels) -> [B]`, a number for each example that the
        objective's loss takes after the labels; of the state that `perturb` returned.
      batch_norm: `train`: the attacked network behaves as in the passes: it normalizes
        by its batch and drops the same units. `eval`: it normalizes by the running
        statistics and drops nothing. Neither updates the statistics.
    """

    perturb: Perturb
    init: Callable[[Array], PyTree] = lambda _: ()
    learn: Learn | None = None
    weigh: Callable[[PyTree, Array], Array] | None = None
    batch_norm: str = "train"


class Objective(NamedTuple):
    """Loss of each example, from the logits of one view of the images or of several.

    Attributes:
      loss: `loss(*logits, labels)`, the logits [B, K] of each of the views, to [B]. Its
        mean is minimized. With an adversary that has `weigh`, `loss(*logits, labels,
        weights)`.
      views: `natural` or `adversarial`, each one forward pass; BatchNorm's running
        statistics are updated by all of them, in order. A repeated view updates the
        statistics again. On CPUs that is all it costs; elsewhere it is a forward pass
        more, since BatchNorm's sums there start from the statistics of the moment.
    """

    loss: Callable[..., Array]
    views: tuple[str, ...] = ("adversarial",)


class Averaging(NamedTuple):
    """Weights that are evaluated in place of the last ones.

    Attributes:
      init: `variables -> average`, of parameters and statistics. The average is a dict
        with trees alike under the names of the variables; under other names it keeps
        what else it remembers.
      update: `(average, variables, step) -> average`, after each step; `step` is the
        number of steps before it, int32.
      admit: if given, `(average, variables, worst) -> average`, after each epoch (see
        `after_epoch` of `samrobust.training.fit`); `worst` is the accuracy, in [0, 1],
        of the trained variables on the held-out images of their worst class.
      join: if given, `(method, natural) -> method`, for one that averages over two:
        from a method and from standard training, both with this averaging, it makes
        the `samrobust.training.Method` that trains both.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, PyTree, Array], PyTree]
    admit: Callable[[PyTree, PyTree, Array], PyTree] | None = None
    join: Callable[[Any, Any], Any] | None = None


def as_adversary(attack: Attack, *, batch_norm: str = "train") -> Adversary:
    """Lifts an attack to an adversary without a memory.

    Args:
      attack: of `samrobust.attacks`, or any that is called like those.
      batch_norm: see `Adversary`.

    Raises:
      ValueError: for a `batch_norm` of another name.
    """
    check_choice(BATCH_NORM, batch_norm=batch_norm)

    def perturb(
        logits_fn: LogitsFn, images: Array, labels: Array, state: PyTree, *, key: Array
    ) -> tuple[Array, PyTree]:
        return attack(logits_fn, images, labels, key=key), state

    function: Any = getattr(attack, "func", attack)  # of a functools.partial
    perturb.__module__ = function.__module__
    perturb.__qualname__ = getattr(function, "__qualname__", type(function).__name__)
    return Adversary(perturb, batch_norm=batch_norm)


def name_of(function: Any) -> str:
    """Returns where a function is defined, for messages: `mine.noisy.perturb`."""
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{function.__module__}.{name}".replace(".<locals>", "")
