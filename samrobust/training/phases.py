"""Phases of a training: parts of a method that come in late.

Each phase is a step of its own over one state, compiled by itself: before a part
begins, a step is the one without it bit for bit, and costs no more.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

import optax

from samrobust.attacks import identity
from samrobust.checks import LARGEST_COUNT, check, check_real, count
from samrobust.training.parts import Adversary, as_adversary
from samrobust.training.step import TrainStep
from samrobust.types import Field

__all__ = [
    "START",
    "Phase",
    "check_phases",
    "check_total_steps",
    "earlier_phases",
    "first_epoch",
    "phase_of",
    "waiting",
]


# Of a part that may come in late: the fraction of the epochs, rounded up to whole ones,
# after which it is on.
START = Field(0.0, functools.partial(check_real, 0, 0.999))

_Part = TypeVar("_Part", Adversary, optax.GradientTransformationExtraArgs)


class Phase(NamedTuple):
    """An early phase of a training: its step is taken until another begins.

    Attributes:
      until: the first step that is not of this phase; at the end of an epoch.
      train_step: as of `Method`.
    """

    until: int
    train_step: TrainStep


def first_epoch(fraction: float, epochs: int) -> int:
    """Returns ceil(fraction * epochs): the first epoch at or after that fraction."""
    # Rounded, as 0.55 * 100 is a little more than 55 in binary.
    return math.ceil(round(fraction * epochs, 6))


def waiting(part: _Part) -> _Part:
    """Returns a part that does nothing, with the state of the one that it waits for."""
    if isinstance(part, Adversary):
        return part._replace(perturb=as_adversary(identity).perturb, learn=None)
    nothing = optax.with_extra_args_support(optax.identity())
    return nothing._replace(init=part.init)


def earlier_phases(
    make: Callable[[Collection[str]], TrainStep], starts: Mapping[str, int]
) -> tuple[Phase, ...]:
    """Builds the phases before all parts of a method are on, for `fit`.

    Args:
      make: of the names of the parts that wait, the step; all steps of one state.
      starts: the first step of each part that begins late, by its name.
    """
    return tuple(
        Phase(until, make({name for name, start in starts.items() if start >= until}))
        for until in sorted(set(starts.values()))
    )


def phase_of(earlier: Sequence[Phase], step: int) -> int:
    """Returns the number of the phase that a step belongs to, from 0."""
    return sum(step >= phase.until for phase in earlier)


def check_phases(earlier: Sequence[Phase], steps_per_epoch: int) -> None:
    """Refuses phases out of order, or of which one does not end with an epoch.

    Raises:
      ValueError: see above.
    """
    ends = [phase.until for phase in earlier]
    check(
        ends == sorted(ends) and not any(end % steps_per_epoch for end in ends),
        f"phases in order that end with an epoch, of {steps_per_epoch} steps",
        until=ends,
    )


def check_total_steps(epochs: int, steps_per_epoch: int) -> None:
    """Refuses no epochs, and more steps than an int32 counts, as optimizers do.

    Raises:
      ValueError: see above.
    """
    count(epochs=epochs)
    check(
        epochs * steps_per_epoch <= LARGEST_COUNT,
        f"epochs <= {LARGEST_COUNT // steps_per_epoch}",
        f"An epoch has {steps_per_epoch} steps; they are counted in 32 bits.",
        epochs=epochs,
    )
