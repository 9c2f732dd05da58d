"""AutoAttack over a split: only what still stands goes on to the next part.

After each part of each member the survivors of the whole split are packed into batches
again, of three sizes alone, so that a part compiles at most thrice. The outcome is
written to a file as it grows: a killed evaluation goes on where it was.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from samrobust.attacks import AutoAttack, Member, draws, identity
from samrobust.data import Split
from samrobust.evaluation.evaluate import make_evaluator, warn_of_non_finite
from samrobust.evaluation.identity import identify
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
from samrobust.evaluation.outcome import MISCLASSIFIED, STANDING, Outcome, Place
from samrobust.evaluation.outcome_file import OutcomeFile
from samrobust.parallel import data_mesh, replicate
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
      batch_size: over all devices; at most the number of examples is used, rounded up
        to a multiple of the devices.

    Returns:
      `evaluate(variables, split, key, *, folder=None, keep_examples=False,
      provenance=None, on_batch=None, on_non_finite=None) -> Outcome`. With a `folder`
      the outcome is kept there, and a call with the same network, split, attacks and
      key goes on where the last one ended; with `keep_examples` the adversarial images
      are kept too. `provenance`, JSON, is kept with the outcome if this call has a part
      in it. `on_batch(done, num_examples, doing)` is called after every batch, and in
      between where one takes long: `done` of `num_examples` is the share of the
      expected work, `doing` says what was done. `on_non_finite` is that of
      `make_evaluator`.

      **Guarantees.** An example counts as right if it is classified rightly and no
      member breaks it. It is judged by the same network as `make_evaluator` judges by.
      Its random numbers depend on the key, the column, the stage and its position in
      the split alone: neither batches, devices nor a stop change the outcome, up to
      rounding. A file that is damaged, or of anything else, is moved aside with a
      warning and counts for nothing.

    Raises:
      ValueError: if batch_size < 1 or the split is empty.
    """
    natural = make_evaluator(model, {"natural": identity}, batch_size=batch_size)
    programs = {
        (column, member.name): _compile(model, column, member)
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
        provenance: dict[str, Any] | None = None,
        on_batch: Callable[..., None] = lambda *_: None,
        on_non_finite: Callable[[dict[str, int]], None] = warn_of_non_finite,
    ) -> Outcome:
        num_examples = len(split)
        num_classes = _num_classes(model, variables, split)
        stages = {
            name: _stages(attack, num_classes) for name, attack in attacks.items()
        }
        members = {
            column: tuple(stage.member.name for stage in each)
            for column, each in stages.items()
        }
        shape = len(attacks), num_examples
        fresh = Outcome(
            members, np.full(shape, STANDING, np.int16), np.zeros(shape, bool)
        )
        about = identify(
            *(model, variables, split, key),
            columns={c: [*map(str, s)] for c, s in stages.items()},
            attacks={
                column: [f"l{a.order:g}", a.radius, a.is_random, a.box]
                for column, a in attacks.items()
            },
            examples=keep_examples,
        )
        file = OutcomeFile(folder, about)
        outcome = file.open(fresh, split.images if keep_examples else None)
        if not outcome.is_whole:
            if provenance is not None:
                outcome.provenance += (provenance,)
            try:
                if outcome.place == Place():
                    right = natural(
                        *(variables, split, key),
                        on_batch=lambda *_: on_batch(0, num_examples, "natural"),
                    )["natural"]
                    outcome.broken_at[:, ~right] = MISCLASSIFIED
                data = replicate((variables, split.images, split.labels), data_mesh())
                size = batch_size_for(num_examples, batch_size)
                _Pursuit(programs, stages, size, outcome, file, on_batch).run(data, key)
            finally:
                file.write(outcome, now=True)
        counts = dict(
            zip(attacks, outcome.non_finite.sum(axis=1).tolist(), strict=True)
        )
        if any(counts.values()):
            on_non_finite({name: count for name, count in counts.items() if count})
        on_batch(num_examples, num_examples, "done")
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


def _compile(model: nn.Module, column: str, member: Member) -> Callable[..., Any]:
    """A part on examples of the split: images, whether broken, whether finite."""

    @jit_for_all
    def attack_batch(
        variables: PyTree,
        images: Array,
        labels: Array,
        indices: Array,
        key: Array,
        stage: Array,
        number: Array,
    ) -> tuple[Array, Array, Array]:
        images, labels, keys = examples_of(images, labels, indices, key)
        own_keys = draws.fold_in(of_name(keys, column), stage)
        classify = classifier(model, variables)

        def logits_fn(images: Array, *, key: Array | None = None) -> Array:
            del key  # random logits are asked for with one
            return classify(images)

        attacked = member.part(logits_fn, images, labels, number, key=own_keys)
        logits = classify(attacked)
        return attacked, ~is_correct(logits, labels), is_finite(logits)

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
        outcome, names = self._outcome, list(self._stages)
        while not outcome.is_whole:
            name = names[outcome.place.column]
            while outcome.place.stage < len(self._stages[name]):
                self._run_stage(data, name, key)
            outcome.place = Place(outcome.place.column + 1)

    def _run_stage(
        self, data: tuple[PyTree, Array, Array], name: str, key: Array
    ) -> None:
        outcome, place = self._outcome, self._outcome.place
        row, current = outcome.broken_at[place.column], self._stages[name][place.stage]
        alive = np.flatnonzero(row == STANDING)
        alive = alive[alive >= place.example]
        program = self._programs[name, current.member.name]
        numbers = np.int32(place.stage), np.int32(current.number)
        left = len(alive)
        for indices, count in _packed(alive, self._size):
            attacked, *flags = program(*data, indices, key, *numbers)
            flags = fetch(flags, self._report, name, place, left)
            broken, finite = (flag[:count] for flag in flags)
            found = indices[:count][broken]
            row[found] = place.stage
            outcome.non_finite[place.column, found] = ~finite[broken]
            if self._file.keeps_examples:
                examples = jax.device_get(attacked)[:count][broken]
                self._file.put_examples(place.column, found, examples)
            outcome.place = place._replace(example=int(indices[count - 1]) + 1)
            self._file.write(outcome, now=False)
            left -= count
            self._done += count * current.member.cost
            self._report(name, place, left)
        outcome.place = Place(place.column, place.stage + 1)

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
    smallest = batch_size_for(size, -(-size // _PARTS))
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
