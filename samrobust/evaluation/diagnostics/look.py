"""The context that all checks share: network, images, effort, progress."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn

from samrobust.checks import check
from samrobust.data import Split
from samrobust.data.splits import spread
from samrobust.evaluation import BatchFn, make_measure
from samrobust.types import Array, PyTree

__all__ = ["Effort", "Look", "Surrogate", "some_of"]


@dataclasses.dataclass(frozen=True)
class Effort:
    """The effort of the checks; the default is for a verdict, less is for tests.

    Attributes:
      steps: numbers of PGD steps whose curve is looked at, rising, at least two.
      restarts: numbers of restarts, likewise.
      restart_steps: steps of each of these restarts, and of PGD elsewhere.
      apgd_steps: of APGD on the cross entropy and on DLR, the white-box attack.
      queries: of Square.
      radii: how many, from the ball's to that of the whole box.
      draws: of random noise.
    """

    steps: tuple[int, ...] = (1, 10, 20, 50, 100)
    restarts: tuple[int, ...] = (1, 5, 10)
    restart_steps: int = 20
    apgd_steps: int = 100
    queries: int = 1000
    radii: int = 5
    draws: int = 10

    def __post_init__(self):
        for name in ("steps", "restarts"):
            values = getattr(self, name)
            rising = all(a < b for a, b in itertools.pairwise(values))
            check(
                len(values) >= 2 and rising and values[0] >= 1,
                f"two or more rising numbers >= 1 for {name}",
                **{name: values},
            )
        check(self.radii >= 2, "radii >= 2", radii=self.radii)


class Surrogate(NamedTuple):
    """Another trained network, whose adversarial images are tried on this one."""

    model: nn.Module
    variables: PyTree


@dataclasses.dataclass
class Look:
    """A network under examination, and the measuring of it.

    Attributes:
      model, variables: the network.
      transfer: others, by name.
      split: the images.
      effort: how hard to try.
      batch_size: as `make_measure` takes it.
      num_measures: how often `measure` will be called.
      key: the randomness of all measurements.
      on_batch: called with the progress, see `run_sanity`.
      num_measured: how often `measure` was called.
    """

    model: nn.Module
    variables: PyTree
    transfer: Mapping[str, Surrogate]
    split: Split
    effort: Effort
    batch_size: int
    num_measures: int
    key: Array
    on_batch: Callable[[int, int], None]
    num_measured: int = 0

    def measure(
        self, batch_fn: BatchFn, variables: PyTree | None = None
    ) -> dict[str, np.ndarray]:
        """Measures something on all images, by default of the network itself."""
        return self.measuring(batch_fn)(variables)

    def measuring(
        self, batch_fn: BatchFn
    ) -> Callable[[PyTree | None], dict[str, np.ndarray]]:
        """Returns `measure` of one thing, which compiles once."""
        measure = make_measure(batch_fn, batch_size=self.batch_size)

        def on_batch(done: int, num_examples: int) -> None:
            total = self.num_measures * num_examples
            self.on_batch(self.num_measured * num_examples + done, total)

        def measured(variables: PyTree | None = None) -> dict[str, np.ndarray]:
            variables = self.variables if variables is None else variables
            own_key = jax.random.fold_in(self.key, self.num_measured)
            outcome = measure(variables, self.split, own_key, on_batch=on_batch)
            self.num_measured += 1
            return outcome

        return measured


def some_of(split: Split, num_examples: int) -> Split:
    """Selects at most `num_examples` of a split, evenly spread, in order.

    >>> split = Split(np.zeros([10, 1, 1, 1], np.uint8), np.arange(10, dtype=np.int32))
    >>> some_of(split, 4).labels.tolist()
    [1, 3, 5, 9]
    """
    count = min(num_examples, len(split))
    indices = spread(len(split), count)
    return Split(split.images[indices], split.labels[indices])
