"""The evaluation that leaves broken examples behind: same answer, less work.

When any misclassified iterate counts (`judge="any"`), an example is settled as soon as
it is broken. Here the attack pauses after a few steps, drops what is broken, and packs
the survivors of the whole split into full batches again: always the same shape, so
that nothing recompiles. On a network that breaks easily most of the attack falls away.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from flax import linen as nn

from samrobust.attacks import StagedPgd, identity
from samrobust.data import Split, evaluation_batches
from samrobust.evaluation.evaluate import (
    Evaluator,
    make_evaluator,
    warn_of_non_finite,
)
from samrobust.evaluation.measure import (
    batch_size_for,
    classifier,
    examples_of,
    fetch,
    is_correct,
    is_finite,
    jit_for_all,
    of_name,
)
from samrobust.parallel import data_mesh, replicate
from samrobust.types import Array, PyTree

__all__ = ["make_early_stop_evaluator"]


def make_early_stop_evaluator(
    model: nn.Module, attacks: Mapping[str, StagedPgd], *, batch_size: int
) -> Evaluator:
    """Builds the counterpart of `make_evaluator` for attacks in stages.

    Args:
      model: as there.
      attacks: by the names of the columns; `natural` is added in front.
      batch_size: as there.

    Returns:
      `evaluate`, as from `make_evaluator`. **Guarantees**: the outcome of `pgd(...,
      judge="any")` under the same key, up to rounding: an example starts where it
      starts there and makes the same steps until it is broken.

    Raises:
      ValueError: if batch_size < 1 or the split is empty.
    """
    natural = make_evaluator(model, {"natural": identity}, batch_size=batch_size)
    pursuits = {
        name: _Pursuit(model, attack, name, batch_size)
        for name, attack in attacks.items()
    }

    def evaluate(
        variables: PyTree,
        split: Split,
        key: Array,
        *,
        on_batch: Callable[[int, int], None] = lambda *_: None,
        on_non_finite: Callable[[dict[str, int]], None] = warn_of_non_finite,
    ) -> dict[str, np.ndarray]:
        num_examples, counts = len(split), {}
        outcome = natural(
            variables, split, key, on_batch=lambda *_: on_batch(0, num_examples)
        )
        data = replicate((variables, split.images, split.labels), data_mesh())
        for number, (name, pursuit) in enumerate(pursuits.items()):

            def on_share(done: float, number: int = number) -> None:
                reached = int((number + done) / len(pursuits) * num_examples)
                on_batch(min(num_examples - 1, reached), num_examples)

            outcome[name], counts[name] = pursuit(data, num_examples, key, on_share)
        if any(counts.values()):
            on_non_finite({name: count for name, count in counts.items() if count})
        on_batch(num_examples, num_examples)
        return outcome

    return evaluate


class _Pursuit:
    """One attack after its survivors."""

    def __init__(self, model: nn.Module, attack: StagedPgd, name: str, size: int):
        self._attack, self._size = attack, size

        def start(
            images: Array, labels: Array, indices: Array, key: Array, restart: Array
        ) -> Array:
            images, labels, keys = examples_of(images, labels, indices, key)
            return attack.start(images, labels, restart, key=of_name(keys, name))

        def advance(
            variables: PyTree,
            images: Array,
            labels: Array,
            indices: Array,
            key: Array,
            current: Array,
            num_steps: Array,
        ) -> tuple[Array, Array, Array]:
            images, labels, _ = examples_of(images, labels, indices, key)
            logits_fn = classifier(model, variables)
            moved, broken = attack.advance(
                logits_fn, current, images, labels, num_steps
            )
            logits = logits_fn(moved)
            return moved, broken | ~is_correct(logits, labels), is_finite(logits)

        self._start, self._advance = jit_for_all(start), jit_for_all(advance)

    def __call__(
        self,
        data: tuple[PyTree, Array, Array],
        num_examples: int,
        key: Array,
        on_share: Callable[[float], None],
    ) -> tuple[np.ndarray, int]:
        """Who is classified rightly at every iterate; how many not by finite logits."""
        size = batch_size_for(num_examples, self._size)
        alive, non_finite = np.arange(num_examples, dtype=np.int32), 0
        current = np.empty((num_examples, *data[1].shape[1:]), np.float32)
        stages = list(_stages(self._attack.num_steps)) * self._attack.restarts
        per_restart = len(stages) // self._attack.restarts
        for number, num_steps in enumerate(stages):
            restart, standing, done = number // per_restart, [alive[:0]], 0
            for padded, count in _batches(alive, size):
                share, own = (number + done / len(alive)) / len(stages), padded[:count]
                if number % per_restart == 0:
                    starts = self._start(*data[1:], padded, key, restart)
                    current[own] = fetch(starts, on_share, share)[:count]
                values = self._advance(*data, padded, key, current[padded], num_steps)
                moved, broken, finite = fetch(values, on_share, share)
                current[own] = moved[:count]
                standing.append(own[~broken[:count]])
                non_finite += int(np.sum(~finite[:count]))
                done += count
                on_share((number + done / len(alive)) / len(stages))
            alive = np.concatenate(standing)
        return np.isin(np.arange(num_examples), alive), non_finite


def _batches(alive: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Examples in batches of one shape, and how many of each are not padding."""
    if len(alive):
        for positions, mask in evaluation_batches(len(alive), size):
            yield alive[positions], int(mask.sum())


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
