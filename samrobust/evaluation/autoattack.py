"""The evaluation by AutoAttack: only unbroken examples go on to the next part.

The outcome under each attack is written to a file of its own as it grows: a killed
evaluation resumes where it was, and another radius is attacked beside those before.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from samrobust.attacks import AutoAttack, Member, draws
from samrobust.data import Split
from samrobust.evaluation import accuracy
from samrobust.evaluation.fates import MISCLASSIFIED, Fates, FatesFile, identify
from samrobust.evaluation.measure import OnBatch, batch_size_for, to_devices
from samrobust.evaluation.survivors import (
    Attacked,
    Stage,
    compile_attack,
    survivors,
)
from samrobust.types import Array, LogitsFn, PyTree

__all__ = ["make_autoattack_evaluator"]

_MemberPart = tuple[Member, int, str]


def make_autoattack_evaluator(
    model: nn.Module, attacks: Mapping[str, AutoAttack], *, batch_size: int
) -> accuracy.Evaluator:
    """Builds the counterpart of `make_evaluator` for AutoAttack.

    Args:
      model: as there.
      attacks: by the names of the columns; `natural` is added in front.
      batch_size: as there, of the largest batches. Those of a member have the size that
        fits the examples it begins with, and shrink each time a quarter of them is
        gone: it rarely compiles more than twice for a network.

    Returns:
      The evaluator. With an archive the outcome under each attack is stored there, and
      a call with the same network, split, attack and key resumes where the last one
      ended, whatever other attacks there are.

      **Guarantees.** An example counts as right if it is classified correctly and no
      member breaks it. Its random numbers depend on the key, the column, the stage and
      its position in the split alone: neither batches, devices nor a stop change the
      outcome, up to rounding. A file that is damaged, or of anything else, is moved
      aside with a warning and ignored. An example that one stored outcome has as
      misclassified before the attack is so in all.

    Raises:
      ValueError: if batch_size < 0.
    """
    is_right = accuracy.make_natural(model, batch_size=batch_size)
    programs = {
        (column, member.name): compile_attack(model, column, _attack(member))
        for column, attack in attacks.items()
        for member in attack.members
    }

    def evaluate(
        variables: PyTree,
        split: Split,
        key: Array,
        *,
        archive: accuracy.Archive | None = None,
        on_batch: OnBatch = lambda *_: None,
    ) -> accuracy.Outcome:
        folder, examples, provenance = archive or (None, False, None)
        num_classes = _num_classes(model, variables, split)
        parts = {c: list(_parts(each, num_classes)) for c, each in attacks.items()}
        about = identify(model, variables, split, key, examples=examples)
        files = {
            column: FatesFile(folder, about | _identify(column, own, attacks[column]))
            for column, own in parts.items()
        }
        images = split.images if examples else None
        fates = {
            column: files[column].open(
                Fates.fresh([member.name for member, _, _ in own], len(split)), images
            )
            for column, own in parts.items()
        }
        right = np.ones(len(split), bool)
        if not any(own.is_begun for own in fates.values()):
            right = is_right(variables, split, key, on_batch)
        for own in fates.values():
            right = right & (own.broken_at != MISCLASSIFIED)
        for own in fates.values():
            own.leave_out(~right)
        stages = _stages(programs, parts, (*to_devices(variables, split), key))
        size = functools.partial(_batch_size, batch_size_for(len(split), batch_size))
        is_stored = all(own.is_whole for own in fates.values())
        for column, rest in survivors(stages, fates, size=size, on_batch=on_batch):
            _write_down(rest, fates[column], files[column], provenance)
        if not is_stored:
            on_batch(len(split), len(split), "done")
        correct = {"natural": right} | {c: own.correct for c, own in fates.items()}
        non_finite = {column: own.num_non_finite for column, own in fates.items()}
        return accuracy.conclude(correct, non_finite, fates)

    return evaluate


def _write_down(
    rest: Iterable[Attacked],
    fates: Fates,
    file: FatesFile,
    provenance: dict[str, Any] | None,
) -> None:
    """Attacks the rest of the examples, and stores what becomes of them."""
    if fates.is_whole:
        return
    fates.provenance += (provenance,) if provenance else ()
    try:
        for batch in rest:
            file.put_examples(*batch)
            file.write(fates, now=False)
    finally:
        file.write(fates, now=True)


def _parts(attack: AutoAttack, num_classes: int) -> Iterator[_MemberPart]:
    """Yields the members' parts, which are the stages of a column: number and name."""
    for member in attack.members:
        num_parts = member.num_parts(num_classes)
        for number in range(num_parts):
            which = f" {number + 1}/{num_parts}" if num_parts > 1 else ""
            yield member, number, member.name + which


def _identify(
    column: str, parts: Sequence[_MemberPart], attack: AutoAttack
) -> dict[str, Any]:
    """Returns what the fates under an attack depend on, of that, in JSON's types."""
    return {
        "column": column,
        "parts": [name for _, _, name in parts],
        "ball": [f"l{attack.order:g}", attack.radius, attack.is_random, attack.box],
    }


def _num_classes(model: nn.Module, variables: PyTree, split: Split) -> int:
    image = jax.ShapeDtypeStruct((1, *split.images.shape[1:]), jnp.float32)
    apply = functools.partial(model.apply, train=False)
    return cast(jax.ShapeDtypeStruct, jax.eval_shape(apply, variables, image)).shape[-1]


def _attack(member: Member) -> Callable[..., tuple[Array, bool]]:
    """Builds the attack by a part of a member."""

    def attack(
        classify: LogitsFn,
        images: Array,
        labels: Array,
        keys: Array,
        stage: Array,
        number: Array,
    ) -> tuple[Array, bool]:
        def logits_fn(images: Array, *, key: Array | None = None) -> Array:
            del key  # random logits are asked for with one
            return classify(images)

        own_keys = draws.fold_in(keys, stage)
        return member.part(logits_fn, images, labels, number, key=own_keys), False

    return attack


def _stages(
    programs: Mapping[tuple[str, str], Callable[..., Any]],
    parts: Mapping[str, Sequence[_MemberPart]],
    data: tuple[Any, ...],
) -> dict[str, list[Stage]]:
    """Returns the parts as stages on the network and the split in `data`."""

    def stage(column: str, stage_number: int, part: _MemberPart) -> Stage:
        member, number, name = part
        program = programs[column, member.name]
        numbers = np.int32(stage_number), np.int32(number)

        def run(indices: np.ndarray) -> tuple[Array, Array, Array]:
            return program(*data, indices, *numbers)

        return Stage(name, member.cost, run)

    return {
        column: [stage(column, number, part) for number, part in enumerate(each)]
        for column, each in parts.items()
    }


def _batch_size(largest: int, at_first: int, now: int) -> int:
    """Returns the size of a stage's batches, with little padding and few programs.

    Other networks leave about as many examples: an octave has eight sizes.

    Args:
      largest: that is allowed.
      at_first: how many examples the stage's member began with.
      now: how many the stage begins with.

    >>> [_batch_size(100, 49, now) for now in (49, 37, 36, 9)]
    [52, 52, 36, 11]
    >>> [_batch_size(100, n, n) for n in (400, 390, 330, 101, 100, 33)]
    [100, 100, 88, 52, 100, 36]
    """
    while 4 * now <= 3 * at_first:
        at_first = 3 * at_first // 4
    even = -(-at_first // -(-at_first // largest))
    step = max(1, 2 ** (even.bit_length() - 4))
    return batch_size_for(-(-even // step) * step, largest)
