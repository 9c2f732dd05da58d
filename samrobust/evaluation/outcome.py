"""Which part of which attack broke which example; `OutcomeFile` keeps it."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["MISCLASSIFIED", "STANDING", "Outcome", "Place"]

MISCLASSIFIED, STANDING = -2, -1


class Place(NamedTuple):
    """What comes next: a column, one of its stages, one of the split's examples.

    Whoever stands before that example has been through the stage.
    """

    column: int = 0
    stage: int = 0
    example: int = 0


@dataclasses.dataclass
class Outcome:
    """What became of every example under every attack.

    Attributes:
      stages: by column, the name of each stage's member, as in `("apgd-ce", "apgd-t",
        "apgd-t", ...)`: a member has a stage for each of its targets.
      broken_at: int16 [columns, N] in the order of the split: the stage that broke an
        example, `STANDING` (-1) where none did, `MISCLASSIFIED` (-2) where it was not
        right as it was.
      non_finite: bool [columns, N]: it broke by a logit that is not finite.
      place: how far the attack has come.
      provenance: of whoever had a part in it, in order; what `evaluate` was given.
      path: of the file that it is kept in, if it is.
    """

    stages: Mapping[str, tuple[str, ...]]
    broken_at: np.ndarray
    non_finite: np.ndarray
    place: Place = dataclasses.field(default_factory=Place)
    provenance: tuple[dict[str, Any], ...] = ()
    path: pathlib.Path | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to do."""
        return self.place.column >= len(self.stages)

    def is_possible(self) -> bool:
        """Whether an evaluation can have come to these values."""
        nums = np.array([len(stages) for stages in self.stages.values()])
        columns = np.arange(len(nums))
        begun = np.where(columns == self.place.column, self.place.stage + 1, 0)
        begun = np.minimum(np.where(columns < self.place.column, nums, begun), nums)
        broken_at, wrong = self.broken_at, self.broken_at == MISCLASSIFIED
        return bool(
            min(self.place) >= 0
            and self.place <= Place(len(nums))
            and self.place.stage <= max(nums)
            and self.place.example <= broken_at.shape[1]
            and np.all(wrong == wrong[0])
            and np.all((broken_at >= MISCLASSIFIED) & (broken_at < begun[:, None]))
            and not np.any(self.non_finite & (broken_at < 0))
        )

    def correct(self) -> dict[str, np.ndarray]:
        """Bool [N] by column, `natural` first: what an `Evaluator` returns."""
        natural = self.broken_at[0] != MISCLASSIFIED
        columns = zip(self.stages, self.broken_at == STANDING, strict=True)
        return {"natural": natural, **dict(columns)}

    def broken_by(self, column: str) -> np.ndarray:
        """The names [N] of what broke each example: a member, `natural` or empty."""
        names = np.array([*self.stages[column], "natural", ""])
        return names[self.broken_at[list(self.stages).index(column)]]

    def after_each(self, column: str) -> dict[str, float]:
        """The accuracy in percent that each member left, by its name, in order."""
        row = self.broken_at[list(self.stages).index(column)]
        left = {}
        for stage, member in enumerate(self.stages[column]):
            standing = (row == STANDING) | (row > stage)
            left[member] = 100 * float(np.mean(standing))
        return left
