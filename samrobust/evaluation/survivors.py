"""The loop over attacks in stages: only unbroken examples go on to the next stage.

After each stage the survivors of the whole split are packed into batches again. On a
network that breaks easily, most of the attack is skipped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from flax import linen as nn

from samrobust.attacks.losses import is_finite
from samrobust.evaluation.fates import MISCLASSIFIED, STANDING, Fates, Place
from samrobust.evaluation.measure import (
    OnBatch,
    classifier,
    examples_of,
    fetch,
    is_correct,
    jit_for_all,
    of_name,
    packed,
)
from samrobust.types import Array, PyTree

__all__ = ["Attacked", "Stage", "compile_attack", "survivors"]


class Stage(NamedTuple):
    """A stretch of an attack, after which broken examples are dropped.

    Attributes:
      name: for progress displays.
      cost: on one example, in forward passes, at most.
      run: `run(indices) -> (images, broken, finite)`, each [B, ...] on the devices, of
        the examples at these positions of the split, int32 [B]: the attacked images,
        whether they are misclassified, whether their logits are finite.
    """

    name: str
    cost: float
    run: Callable[[np.ndarray], tuple[Array, Array, Array]]


class Attacked(NamedTuple):
    """A batch that has been through a stage.

    Attributes:
      column: the number of the attack.
      indices: int32 [n], the examples' positions in the split.
      images: [B, ...] with B >= n, on the devices; those beyond n are padding.
      broken: bool [n].
    """

    column: int
    indices: np.ndarray
    images: Array
    broken: np.ndarray


def compile_attack(
    model: nn.Module, column: str, attack: Callable[..., tuple[Array, Array | bool]]
) -> Callable[..., tuple[Array, Array, Array]]:
    """Compiles an attack on examples of a split, for `Stage.run`.

    Args:
      model: the network.
      column: of the attack; its name is folded into the keys.
      attack: `attack(logits_fn, images, labels, keys, *rest) -> (images, broken)`, with
        the examples that it broke on the way, even if their final images are right.

    Returns:
      `program(variables, images, labels, key, indices, *rest)`: see `Stage.run`.
    """

    @jit_for_all
    def program(
        variables: PyTree,
        images: Array,
        labels: Array,
        key: Array,
        indices: Array,
        *rest: Array,
    ) -> tuple[Array, Array, Array]:
        images, labels, keys = examples_of(images, labels, indices, key)
        logits_fn = classifier(model, variables)
        own_keys = of_name(keys, column)
        attacked, broken = attack(logits_fn, images, labels, own_keys, *rest)
        logits = logits_fn(attacked)
        return attacked, broken | ~is_correct(logits, labels), is_finite(logits)

    return program


def survivors(
    columns: Mapping[str, Sequence[Stage]],
    fates: Fates,
    *,
    size: Callable[[int, int], int],
    on_batch: OnBatch,
) -> Iterator[Attacked]:
    """Runs the rest of all attacks, stage by stage, on the unbroken examples.

    Args:
      columns: the stages of each attack, by the names of the columns.
      fates: of the examples; work that is done is not repeated. Updated in place, with
        each batch before it is yielded.
      size: `size(at_first, now) -> int` of the batches of a stage, which the devices
        divide; of how many examples the first stage of its member began with, and it
        does itself, >= 1.
      on_batch: called after every batch, and during one that takes long, with the share
        of the expected work that is done.

    Yields:
      Every batch after its stage. **Guarantees.** An example goes through the stages of
      a column in order until it is broken, through each once.
    """
    progress = _WorkShare(columns, fates, on_batch)
    names = list(columns)
    while not fates.is_whole:
        column, stages = fates.place.column, columns[names[fates.place.column]]
        while fates.place.stage < len(stages):
            yield from _pass(stages[fates.place.stage], fates, size, progress)
            fates.place = Place(column, fates.place.stage + 1)
        fates.place = Place(column + 1)


def _pass(
    stage: Stage,
    fates: Fates,
    size: Callable[[int, int], int],
    progress: "_WorkShare",
) -> Iterator[Attacked]:
    """Runs the stage at `fates.place` on the unbroken examples."""
    place, row = fates.place, fates.broken_at[fates.place.column]
    alive = np.flatnonzero(row == STANDING)
    alive = alive[alive >= place.example]
    left = len(alive)
    if not left:
        return
    # By the fates alone: resumed, a stage goes on with batches of the same size.
    for indices, count in packed(alive, size(*fates.num_begun(place))):
        images, *flags = stage.run(indices)
        broken, finite = (
            flag[:count] for flag in fetch(flags, progress.tell, place, left)
        )
        own = indices[:count]
        row[own[broken]] = place.stage
        fates.non_finite[place.column, own[broken]] = ~finite[broken]
        fates.place = place._replace(example=int(own[-1]) + 1)
        yield Attacked(place.column, own, images, broken)
        left -= count
        progress.done += count * stage.cost
        progress.tell(place, left)


class _WorkShare:
    """The share of the expected work that is done, if no more examples break."""

    def __init__(
        self, columns: Mapping[str, Sequence[Stage]], fates: Fates, on_batch: OnBatch
    ):
        self._names, self._stages = list(columns), list(columns.values())
        self._fates, self._on_batch = fates, on_batch
        self.done = 0.0

    def tell(self, place: Place, left: int) -> None:
        """Tells how far it is, with `left` examples before the end of a stage."""
        broken_at = self._fates.broken_at
        standing = np.sum(broken_at[place.column] == STANDING)
        current, *following = self._stages[place.column][place.stage :]
        work = left * current.cost + standing * sum(s.cost for s in following)
        right = np.sum(broken_at[-1] != MISCLASSIFIED)
        for stages in self._stages[place.column + 1 :]:
            work += right * sum(stage.cost for stage in stages)
        total = broken_at.shape[1]
        share = self.done / (self.done + work)
        doing = f"{self._names[place.column]}: {current.name}, "
        doing += f"{standing:,} of {total:,} images survive"
        self._on_batch(min(total - 1, int(share * total)), total, doing)
