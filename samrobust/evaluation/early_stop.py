"""The evaluation that leaves broken examples behind: same answer, less work.

When any misclassified iterate counts (`judge="any"`), an example is settled as soon as
it is broken. Here the attack pauses after a few steps, drops what is broken, and packs
the survivors of the whole split into full batches again: always the same shape, so
that nothing recompiles. On a network that breaks easily most of the attack falls away.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from flax import linen as nn

from samrobust.attacks import StagedPgd, identity
from samrobust.data import Split, evaluation_batches, take_batch
from samrobust.evaluation.evaluate import Evaluator, make_evaluator
from samrobust.evaluation.measure import (
    classifier,
    divisible_batch_size,
    jit_for_all,
)
from samrobust.parallel import data_mesh, replicate, shard_batch
from samrobust.types import Array, PyTree

__all__ = ["make_early_stop_evaluator"]


def make_early_stop_evaluator(
    model: nn.Module, attacks: Mapping[str, StagedPgd], *, batch_size: int
) -> Evaluator:
    """Builds the counterpart of `make_evaluator` for attacks in stages.

    Args:
      model: as there.
      attacks: by the names of the columns; `natural` is added in front.
      batch_size: over all devices; rounded up to a multiple of their number.

    Returns:
      `evaluate`, as from `make_evaluator`. **Guarantees**: the outcome of `pgd(...,
      judge="any")` under the same key, up to rounding: an example starts where it
      starts there and makes the same steps until it is broken.

    Raises:
      ValueError: if batch_size < 1 or the split is empty.
    """
    batch_size = divisible_batch_size(batch_size)
    pursuits = {
        name: _Pursuit(model, attack, name, batch_size)
        for name, attack in attacks.items()
    }
    natural = make_evaluator(model, {"natural": identity}, batch_size=batch_size)

    def evaluate(
        variables: PyTree,
        split: Split,
        key: Array,
        *,
        on_batch: Callable[[int, int], None] = lambda *_: None,
    ) -> dict[str, np.ndarray]:
        outcome = natural(variables, split, key)
        num_examples = len(split)
        data = replicate((variables, split.images, split.labels), data_mesh())
        for number, (name, pursuit) in enumerate(pursuits.items()):
            start = number * num_examples // len(pursuits)
            share = num_examples / len(pursuits)

            def on_share(done: float, start: int = start, share: float = share) -> None:
                on_batch(min(num_examples - 1, start + int(share * done)), num_examples)

            outcome[name] = pursuit.survivors(data, num_examples, key, on_share)
        on_batch(num_examples, num_examples)
        return outcome

    return evaluate


class _Pursuit:
    """One attack after its survivors."""

    def __init__(self, model: nn.Module, attack: StagedPgd, name: str, size: int):
        self._attack, self._size = attack, size
        self._stream = zlib.crc32(name.encode())

        def start(
            images: Array, labels: Array, indices: Array, key: Array, restart: Array
        ) -> Array:
            batch = take_batch(images, labels, indices, 0, size)
            batch_images, batch_labels = shard_batch(batch, data_mesh())
            return attack.start(batch_images, batch_labels, restart, key=key)

        def advance(
            variables: PyTree,
            images: Array,
            labels: Array,
            indices: Array,
            current: Array,
            num_steps: Array,
        ) -> tuple[Array, Array]:
            batch = take_batch(images, labels, indices, 0, size)
            batch_images, batch_labels = shard_batch(batch, data_mesh())

            logits_fn = classifier(model, variables)
            return attack.advance(
                logits_fn, current, batch_images, batch_labels, num_steps
            )

        self._start, self._advance = jit_for_all(start), jit_for_all(advance)

    def survivors(
        self,
        data: tuple[PyTree, Array, Array],
        num_examples: int,
        key: Array,
        on_share: Callable[[float], None],
    ) -> np.ndarray:
        """Which examples are classified rightly at every iterate of every restart."""
        alive = np.arange(num_examples)
        current = np.empty((num_examples, *data[1].shape[1:]), np.float32)
        stages = list(_stages(self._attack.num_steps))
        for restart in range(self._attack.restarts):
            self._begin(data, current, alive, key, restart)
            for number, num_steps in enumerate(stages):
                alive = self._stage(data, current, alive, num_steps)
                share = (number + 1) / len(stages)
                on_share((restart + share) / self._attack.restarts)
        survived = np.zeros(num_examples, bool)
        survived[alive] = True
        return survived

    def _begin(
        self,
        data: tuple[PyTree, Array, Array],
        current: np.ndarray,
        alive: np.ndarray,
        key: Array,
        restart: int,
    ) -> None:
        """Puts the survivors at the start of a restart: that of their first batch."""
        _, images, labels = data
        wanted = np.zeros(len(current), bool)
        wanted[alive] = True
        done = 0
        for indices, mask in evaluation_batches(len(current), self._size):
            batch_key = jax.random.fold_in(key, done)
            done += int(mask.sum())
            if wanted[indices[mask]].any():
                own_key = jax.random.fold_in(batch_key, self._stream)
                starts = self._start(images, labels, indices, own_key, restart)
                current[indices[mask]] = jax.device_get(starts)[mask]

    def _stage(
        self,
        data: tuple[PyTree, Array, Array],
        current: np.ndarray,
        alive: np.ndarray,
        num_steps: int,
    ) -> np.ndarray:
        """Some steps for the survivors; those that are left."""
        left = []
        for positions, mask in evaluation_batches(max(1, len(alive)), self._size):
            if len(alive) == 0:
                break
            indices = alive[positions].astype(np.int32)
            moved, broken = jax.device_get(
                self._advance(*data, indices, current[indices], num_steps)
            )
            current[indices[mask]] = moved[mask]
            left.append(indices[mask & ~broken])
        return np.concatenate(left) if left else alive


def _stages(num_steps: int) -> Iterator[int]:
    """Steps until the next pause: few at first, since most examples break at once.

    A pause costs a forward pass for all that are left.

    >>> list(_stages(10)), list(_stages(50)), list(_stages(0))
    ([1, 2, 7], [1, 2, 6, 18, 23], [0])
    """
    done, left = 0, num_steps
    while left:
        following = max(1, 2 * done)
        following = left if left < 1.5 * following else following
        yield following
        done, left = done + following, left - following
    if num_steps == 0:
        yield 0
