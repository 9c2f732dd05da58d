"""The loop over attacks in stages: only unbroken examples go on to the next stage.

After each stage the survivors of the whole split are packed into batches again. On a
network that breaks easily, most of the attack is skipped.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from flax import linen as nn

from samrobust.attacks.losses import is_finite
from samrobust.evaluation.fates import Fates, Place
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
      indices: int32 [n], the examples' positions in the split.
      images: [B, ...] with B >= n, on the devices; those beyond n are padding.
      broken: bool [n].
    """

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
    fates: Mapping[str, Fates],
    *,
    size: Callable[[int, int], int],
    on_batch: OnBatch,
) -> Iterator[tuple[str, Iterator[Attacked]]]:
    """Runs the rest of each attack, stage by stage, on the unbroken examples.

    Args:
      columns: the stages of each attack, by the names of the columns.
      fates: of the examples under each of them; work that is done is not repeated.
        Updated in place, with each batch before it is yielded.
      size: `size(at_first, now) -> int` of the batches of a stage, which the devices
        divide; of how many examples the first stage of its member began with, and it
        does itself, >= 1.
      on_batch: called after every batch, and during one that takes long, with the share
        that is done of what all attacks have to do if no more examples break.

    Yields:
      For each column its name and every batch after its stage. **Guarantees.** An
      example goes through the stages of an attack in order until it is broken, through
      each once.
    """
    done = 0.0

    def tell(column: str, more: float) -> None:
        """Tells the share of the work, after more forward passes in a column."""
        nonlocal done
        done += more
        left = sum(map(_work, columns.values(), fates.values()))
        own = fates[column]
        total, standing = len(own.broken_at), int(np.sum(own.correct))
        stage = columns[column][own.place.stage].name
        doing = f"{column}: {stage}, {standing:,} of {total:,} images survive"
        on_batch(min(total - 1, int(done / (done + left) * total)), total, doing)

    def batches(column: str) -> Iterator[Attacked]:
        own, tell_own = fates[column], functools.partial(tell, column)
        while not own.is_whole:
            stage = columns[column][own.place.stage]
            yield from _pass(stage, own, size, tell_own)
            own.place = Place(own.place.stage + 1)

    for column in columns:
        yield column, batches(column)


def _work(stages: Sequence[Stage], fates: Fates) -> float:
    """Returns what is left to do in a column, in forward passes."""
    if fates.is_whole:
        return 0.0
    current, *following = stages[fates.place.stage :]
    later = np.sum(fates.correct) * sum(stage.cost for stage in following)
    rest = np.sum(fates.correct[fates.place.example :])
    return float(rest * current.cost + later)


def _pass(
    stage: Stage,
    fates: Fates,
    size: Callable[[int, int], int],
    tell: Callable[[float], None],
) -> Iterator[Attacked]:
    """Runs the stage at `fates.place` on the unbroken examples."""
    place = fates.place
    alive = np.flatnonzero(fates.correct)
    alive = alive[alive >= place.example]
    if not len(alive):
        return
    # By the fates alone: resumed, a stage goes on with batches of the same size.
    for indices, count in packed(alive, size(*fates.num_begun())):
        images, *flags = stage.run(indices)
        broken, finite = (flag[:count] for flag in fetch(flags, tell, 0.0))
        own = indices[:count]
        fates.broken_at[own[broken]] = place.stage
        fates.non_finite[own[broken]] = ~finite[broken]
        fates.place = place._replace(example=int(own[-1]) + 1)
        yield Attacked(own, images, broken)
        tell(count * stage.cost)
