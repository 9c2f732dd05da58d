"""AutoAttack over a split: only what still stands goes on to the next part.

After each part of each member the survivors of the whole split are packed into batches
again, of three sizes alone, so that a part compiles at most thrice. The outcome is
written to a file as it grows: a killed evaluation goes on where it was.
"""

import functools
import hashlib
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from samrobust.attacks import AutoAttack, Member, identity
from samrobust.data import Split, take_batch
from samrobust.evaluation.evaluate import make_evaluator
from samrobust.evaluation.measure import (
    classifier,
    divisible_batch_size,
    jit_for_all,
)
from samrobust.evaluation.outcome import (
    MISCLASSIFIED,
    STANDING,
    Outcome,
    OutcomeFile,
    Place,
)
from samrobust.parallel import data_mesh, replicate, shard_batch
from samrobust.types import Array, PyTree

__all__ = ["make_autoattack_evaluator"]

_PARTS = 4  # the smallest batch is this part of a full one


def make_autoattack_evaluator(
    model: nn.Module, attacks: Mapping[str, AutoAttack], *, batch_size: int
) -> Callable[..., Outcome]:
    """Builds a function that runs AutoAttack on a trained network over a split.

    Args:
      model: `apply(variables, images, train=False)` gives logits.
      attacks: by the names of the columns.
      batch_size: over all devices; rounded up to a multiple of their number.

    Returns:
      `evaluate(variables, split, key, *, folder=None, keep_examples=False,
      on_batch=None) -> Outcome`. With a `folder` the outcome is kept there, and a call
      with the same network, split, attacks, batch size and key goes on where the last
      one ended; with `keep_examples` the adversarial images are kept too.
      `on_batch(done, num_examples, doing)` is called after every batch: `done` of
      `num_examples` is the share of the expected work, `doing` says what was done.

      **Guarantees.** An example counts as right if it is classified rightly and no
      member breaks it. It is judged by the same network as `make_evaluator` judges by.
      A stopped and continued evaluation has the outcome of one that was not stopped.

    Raises:
      ValueError: if batch_size < 1 or the split is empty.
    """
    batch_size = divisible_batch_size(batch_size)
    natural = make_evaluator(model, {"natural": identity}, batch_size=batch_size)
    programs = {
        (column, member.name): _compile(model, member)
        for column, attack in attacks.items()
        for member in attack.members
    }

    def evaluate(
        variables: PyTree,
        split: Split,
        key: Array,
        *,
        folder: pathlib.Path | None = None,
        keep_examples: bool = False,
        on_batch: Callable[..., None] = lambda *_: None,
    ) -> Outcome:
        stages = {
            column: _stages(attack, _num_classes(model, variables, split))
            for column, attack in attacks.items()
        }
        about = {
            "columns": {c: [*map(str, s)] for c, s in stages.items()},
            "radii": {column: attack.radius for column, attack in attacks.items()},
            "batch_sizes": _batch_sizes(batch_size),
            "key": jax.random.key_data(key).tolist(),
            "network": _checksum(variables),
            "dtype": str(getattr(model, "dtype", None)),
            "split": _checksum((split.images, split.labels)),
            "examples": keep_examples,
        }
        file = OutcomeFile(folder, about)
        names = {
            column: tuple(stage.member.name for stage in each)
            for column, each in stages.items()
        }
        unknown = np.full((len(attacks), len(split)), STANDING, np.int16)
        outcome = file.read(Outcome(names, unknown))
        if outcome.place == Place():
            right = natural(variables, split, key)["natural"]
            outcome.broken_at[:, ~right] = MISCLASSIFIED
        if keep_examples:
            file.keep_examples(split.images, len(attacks))
        pursuit = _Pursuit(programs, stages, batch_size, outcome, file, on_batch)
        data = replicate((variables, split.images, split.labels), data_mesh())
        try:
            pursuit.run(data, key)
        finally:
            file.write(outcome, now=True)
        on_batch(len(split), len(split), "done")
        return outcome

    return evaluate


class _Stage(NamedTuple):
    """A part of a member."""

    member: Member
    number: int
    num_parts: int

    def __str__(self) -> str:
        several = f" {self.number + 1}/{self.num_parts}" if self.num_parts > 1 else ""
        return self.member.name + several


def _stages(attack: AutoAttack, num_classes: int) -> tuple[_Stage, ...]:
    return tuple(
        _Stage(member, number, member.num_parts(num_classes))
        for member in attack.members
        for number in range(member.num_parts(num_classes))
    )


def _num_classes(model: nn.Module, variables: PyTree, split: Split) -> int:
    image = jax.ShapeDtypeStruct((1, *split.images.shape[1:]), jnp.float32)
    apply = functools.partial(model.apply, train=False)
    return cast(jax.ShapeDtypeStruct, jax.eval_shape(apply, variables, image)).shape[-1]


def _checksum(tree: PyTree) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


def _compile(model: nn.Module, member: Member) -> Callable[..., tuple[Array, Array]]:
    """A part on a batch of the split: the images, and whether they are broken."""

    @jit_for_all
    def attack_batch(
        variables: PyTree,
        images: Array,
        labels: Array,
        indices: Array,
        number: Array,
        key: Array,
    ) -> tuple[Array, Array]:
        batch = take_batch(images, labels, indices, 0, len(indices))
        batch_images, batch_labels = shard_batch(batch, data_mesh())
        classify = classifier(model, variables)

        def logits_fn(images: Array, *, key: Array | None = None) -> Array:
            del key  # random logits are asked for with one
            return classify(images)

        attacked = member.part(logits_fn, batch_images, batch_labels, number, key=key)
        broken = jnp.argmax(logits_fn(attacked), axis=-1) != batch_labels
        return attacked, broken

    return attack_batch


class _Pursuit:
    """One evaluation, from where its outcome stands to its end."""

    def __init__(
        self,
        programs: Mapping[tuple[str, str], Callable[..., Any]],
        stages: Mapping[str, tuple[_Stage, ...]],
        batch_size: int,
        outcome: Outcome,
        file: OutcomeFile,
        on_batch: Callable[..., None],
    ):
        self._programs, self._stages, self._size = programs, stages, batch_size
        self._outcome, self._file, self._on_batch = outcome, file, on_batch
        self._done = 0.0

    def run(self, data: tuple[PyTree, Array, Array], key: Array) -> None:
        """All that is left, stage by stage; the outcome and its file grow."""
        begin = self._outcome.place
        for column, name in list(enumerate(self._stages))[begin.column :]:
            own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            first = begin.stage if column == begin.column else 0
            for stage in range(first, len(self._stages[name])):
                batch = begin.batch if (column, stage) == begin[:2] else 0
                stage_key = jax.random.fold_in(own_key, stage)
                self._run_stage(data, name, Place(column, stage, batch), stage_key)
            self._outcome.place = Place(column + 1)

    def _run_stage(
        self, data: tuple[PyTree, Array, Array], name: str, place: Place, key: Array
    ) -> None:
        row, stage = self._outcome.broken_at[place.column], self._stages[name]
        current = stage[place.stage]
        alive = np.flatnonzero((row == STANDING) | (row >= place.stage))
        program = self._programs[name, current.member.name]
        left = len(alive)
        for batch, (indices, count) in enumerate(_packed(alive, self._size)):
            left -= count
            if batch < place.batch:
                continue
            own_key, number = jax.random.fold_in(key, batch), np.int32(current.number)
            attacked, broken = program(*data, indices, number, own_key)
            broken = jax.device_get(broken)[:count]
            found = indices[:count][broken]
            row[found] = place.stage
            if self._file.keeps_examples:
                examples = jax.device_get(attacked)[:count][broken]
                self._file.put_examples(place.column, found, examples)
            self._outcome.place = place._replace(batch=batch + 1)
            self._file.write(self._outcome, now=False)
            self._done += count * current.member.cost
            self._report(name, place, left)
        self._outcome.place = Place(place.column, place.stage + 1)

    def _report(self, name: str, place: Place, left: int) -> None:
        """Says how far it is, if as many go on standing as do now."""
        standing, right = (
            np.sum(self._outcome.broken_at == STANDING, axis=-1),
            np.sum(self._outcome.broken_at[-1] != MISCLASSIFIED),
        )
        work = left * self._stages[name][place.stage].member.cost
        for stage in self._stages[name][place.stage + 1 :]:
            work += standing[place.column] * stage.member.cost
        for later in list(self._stages)[place.column + 1 :]:
            work += right * sum(stage.member.cost for stage in self._stages[later])
        total = self._outcome.broken_at.shape[1]
        share = self._done / (self._done + work)
        doing = f"{name}: {self._stages[name][place.stage]}, "
        doing += f"{standing[place.column]:,} of {total:,} images stand"
        self._on_batch(min(total - 1, int(share * total)), total, doing)


def _batch_sizes(size: int) -> list[int]:
    """A full batch, the double of the smallest, the smallest; none above a full one."""
    smallest = divisible_batch_size(-(-size // _PARTS))
    return sorted({size, min(size, 2 * smallest), smallest}, reverse=True)


def _packed(positions: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of few sizes, with how many of each are not padding.

    As little padding as the smallest size allows, in as few batches as that takes.

    >>> [(len(i), n) for i, n in _packed(np.arange(21), 8)]
    [(8, 8), (8, 8), (4, 4), (2, 1)]
    >>> [(len(i), n) for i, n in _packed(np.arange(7), 8)]
    [(8, 7)]
    """
    sizes = _batch_sizes(size)
    smallest, done = sizes[-1], 0
    while done < len(positions):
        slots = -(-(len(positions) - done) // smallest) * smallest
        length = next(length for length in sizes if length <= slots)
        taken = positions[done : done + length]
        padded = np.resize(taken, length)
        yield padded.astype(np.int32), len(taken)
        done += len(taken)
