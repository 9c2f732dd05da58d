"""The evaluation by PGD that drops broken examples: the same answer, less work.

When any misclassified iterate counts (`judge="any"`), an example is settled as soon as
it is broken. Here the attack pauses after a few steps and drops what is broken.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from samrobust.attacks import StagedPgd
from samrobust.data import Split
from samrobust.evaluation import accuracy
from samrobust.evaluation.fates import Fates
from samrobust.evaluation.measure import OnBatch, batch_size_for, to_devices
from samrobust.evaluation.survivors import Stage, compile_attack, survivors
from samrobust.types import Array, LogitsFn, PyTree

__all__ = ["make_skip_broken_evaluator"]


def make_skip_broken_evaluator(
    model: nn.Module, attacks: Mapping[str, StagedPgd], *, batch_size: int
) -> accuracy.Evaluator:
    """Builds the counterpart of `make_evaluator` for attacks in stages.

    Args:
      model: as there.
      attacks: by the names of the columns; `natural` is added in front.
      batch_size: as there; all batches have this one size.

    Returns:
      The evaluator. **Guarantees**: the outcome of `pgd(..., judge="any")` under the
      same key, up to rounding: an example starts where it starts there and makes the
      same steps until it is broken.

    Raises:
      ValueError: if batch_size < 0.
    """
    is_right = accuracy.make_natural(model, batch_size=batch_size)
    programs = {
        name: compile_attack(model, name, _stretch(pgd))
        for name, pgd in attacks.items()
    }

    def evaluate(
        variables: PyTree,
        split: Split,
        key: Array,
        *,
        archive: accuracy.Archive | None = None,
        on_batch: OnBatch = lambda *_: None,
    ) -> accuracy.Outcome:
        del archive
        right = is_right(variables, split, key, on_batch)
        data = (*to_devices(variables, split), key)
        iterates = np.zeros(split.images.shape, np.float32)
        columns = {
            name: list(_stages(programs[name], pgd, data, iterates))
            for name, pgd in attacks.items()
        }
        fates = {
            name: Fates.fresh([stage.name for stage in stages], len(split))
            for name, stages in columns.items()
        }

        def size(*_: int) -> int:
            return batch_size_for(len(split), batch_size)

        for _, rest in survivors(columns, fates, size=size, on_batch=on_batch):
            for batch in rest:
                images = jax.device_get(batch.images)
                iterates[batch.indices] = images[: len(batch.indices)]
        on_batch(len(split), len(split), "done")
        # A misclassified natural image may be classified correctly at every iterate.
        correct = {"natural": right} | {n: own.correct for n, own in fates.items()}
        non_finite = {name: own.num_non_finite for name, own in fates.items()}
        return accuracy.conclude(correct, non_finite)

    return evaluate


def _stretch(pgd: StagedPgd) -> Callable[..., tuple[Array, Array]]:
    """Builds the attack of one stretch, from a restart's start or from an iterate."""

    def attack(
        logits_fn: LogitsFn,
        images: Array,
        labels: Array,
        keys: Array,
        current: Array,
        restart: Array,
        begin: Array,
        end: Array,
    ) -> tuple[Array, Array]:
        start = pgd.start(images, labels, restart, key=keys)
        current = jnp.where(begin == 0, start, current)
        return pgd.advance(logits_fn, current, images, labels, end - begin)

    return attack


def _stages(
    program: Callable[..., Any],
    pgd: StagedPgd,
    data: tuple[Any, ...],
    iterates: np.ndarray,
) -> Iterator[Stage]:
    """Yields the stretches of all restarts, which resume at `iterates` [N, ...]."""
    for restart in range(pgd.restarts):
        which = f" of restart {restart + 1}/{pgd.restarts}" if pgd.restarts > 1 else ""
        for begin, end in _stretches(pgd.num_steps):

            def run(
                indices: np.ndarray, numbers: tuple[int, ...] = (restart, begin, end)
            ) -> tuple[Array, Array, Array]:
                return program(*data, indices, iterates[indices], *numbers)

            cost = 3 * (end - begin) + 2  # a step is a forward and a backward pass
            yield Stage(f"step {end}/{pgd.num_steps}{which}", cost, run)


def _stretches(num_steps: int) -> Iterator[tuple[int, int]]:
    """Yields steps between pauses: few at first, since most examples break at once.

    A pause costs a forward pass for all that are left.

    >>> list(_stretches(10)), list(_stretches(0))
    ([(0, 1), (1, 3), (3, 10)], [(0, 0)])
    >>> list(_stretches(50))
    [(0, 1), (1, 3), (3, 9), (9, 27), (27, 50)]
    """
    begin = 0
    while begin < num_steps:
        following = max(1, 2 * begin)
        left = num_steps - begin
        end = begin + (left if left < 1.5 * following else following)
        yield begin, end
        begin = end
    if num_steps == 0:
        yield 0, 0
