"""Fates: which stage of which attack broke which example, and the file of them.

The file is replaced whole every few seconds during the attack: a killed evaluation
resumes where the file says. A file that is damaged, or of anything else, is moved
aside, and its evaluation starts over.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from samrobust.attacks import ATTACKS_VERSION
from samrobust.data import Split, fingerprint
from samrobust.evaluation.examples import ExamplesFile
from samrobust.system.distributed import broadcast_from_primary, is_primary
from samrobust.system.files import set_aside, write_bytes
from samrobust.system.provenance import checksum, random_bits
from samrobust.types import Array, PyTree

__all__ = ["MISCLASSIFIED", "STANDING", "Fates", "FatesFile", "Place", "identify"]

MISCLASSIFIED, STANDING = -2, -1

_VERSION = 2  # raised when the same attacks are given other images, keys or networks
_SECONDS_BETWEEN_WRITES = 5.0
_NAMES = ("broken_at", "non_finite")  # of the arrays


class Place(NamedTuple):
    """The next work item: a column, one of its stages, one of the split's examples.

    All examples before that one are through with the stage.
    """

    column: int = 0
    stage: int = 0
    example: int = 0


@dataclasses.dataclass
class Fates:
    """The fate of every example under every attack.

    Attributes:
      stages: by column, the name of each stage's member, as in `("apgd-ce", "apgd-t",
        "apgd-t", ...)`: a member has a stage for each of its targets.
      broken_at: int16 [columns, N] in the order of the split: the stage that broke an
        example, `STANDING` (-1) where none did, `MISCLASSIFIED` (-2) where it was not
        right as it was.
      non_finite: bool [columns, N]: broken by a highest logit that is NaN or infinite.
      place: how far the attack has come.
      provenance: of all processes that contributed, in order.
      path: of the file, if they are stored.
    """

    stages: Mapping[str, Sequence[str]]
    broken_at: np.ndarray
    non_finite: np.ndarray
    place: Place = dataclasses.field(default_factory=Place)
    provenance: tuple[dict[str, Any], ...] = ()
    path: pathlib.Path | None = None

    @classmethod
    def fresh(cls, stages: Mapping[str, Sequence[str]], num_examples: int) -> "Fates":
        """Returns the fates before any attack: all examples stand."""
        shape = len(stages), num_examples
        return cls(stages, np.full(shape, STANDING, np.int16), np.zeros(shape, bool))

    @property
    def is_whole(self) -> bool:
        """Says whether nothing is left to do."""
        return self.place.column >= len(self.stages)

    def num_begun(self, place: Place) -> tuple[int, int]:
        """Returns how many examples its member began with, and the stage there."""
        row, members = self.broken_at[place.column], list(self.stages.values())
        first = members[place.column].index(members[place.column][place.stage])

        def count(stage: int) -> int:
            return int(np.sum((row == STANDING) | (row >= stage)))

        return count(first), count(place.stage)

    def is_possible(self) -> bool:
        """Says whether an evaluation can produce these values."""
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
        """Returns which examples stand, bool [N] by column, `natural` first."""
        natural = self.broken_at[0] != MISCLASSIFIED
        columns = zip(self.stages, self.broken_at == STANDING, strict=True)
        return {"natural": natural, **dict(columns)}

    def num_non_finite(self) -> dict[str, int]:
        """Returns how many broke by a highest logit that is NaN or infinite."""
        counts = self.non_finite.sum(axis=1).tolist()
        return dict(zip(self.stages, counts, strict=True))

    def broken_by(self, column: str) -> np.ndarray:
        """Returns the names [N] of what broke each: a member, `natural` or empty."""
        names = np.array([*self.stages[column], "natural", ""])
        return names[self.broken_at[list(self.stages).index(column)]]

    def after_each(self, column: str) -> dict[str, float]:
        """Returns the accuracy in percent that each member left, by name, in order."""
        row = self.broken_at[list(self.stages).index(column)]
        left = {}
        for stage, member in enumerate(self.stages[column]):
            standing = (row == STANDING) | (row > stage)
            left[member] = 100 * float(np.mean(standing))
        return left

    def summary(self) -> dict[str, Any]:
        """Returns what to report, in JSON's types.

        That is the accuracy after each member, by column; of stored fates also their
        file, relative to the folder above its own, and the provenance of the process
        that began them.
        """
        path, begun_by = self.path, self.provenance[:1]
        return {
            "after_each": {name: self.after_each(name) for name in self.stages},
            **({"outcome": f"{path.parent.name}/{path.name}"} if path else {}),
            **({"begun_by": begun_by[0]} if begun_by else {}),
        }


class FatesFile:
    """The file of fates, and of the adversarial images if they are stored.

    Only process 0 touches it.

    Args:
      folder: receives `NAME.npz`, with NAME a hash of `identity`; None stores nothing.
      identity: all that the fates depend on, from `identify`. Another identity has
        another file.
    """

    def __init__(self, folder: pathlib.Path | None, identity: dict[str, Any]):
        self._about = json.dumps(identity, sort_keys=True)
        name = hashlib.sha256(self._about.encode()).hexdigest()[:12]
        self.path = None if folder is None else folder / f"{name}.npz"
        self._written = time.monotonic()
        self._examples: ExamplesFile | None = None

    def open(self, fresh: Fates, images: np.ndarray | None = None) -> Fates:
        """Returns the stored fates, or `fresh` if there are none that can be trusted.

        A file that cannot be trusted is moved aside, with a warning.

        Args:
          fresh: the fates before any attack.
          images: uint8 [N, ...], of the split, to store the adversarial images next to
            the file; None: they are not stored.
        """
        stored = broadcast_from_primary(lambda: self._open(fresh, images))
        return dataclasses.replace(stored or fresh, path=self.path)

    def _open(self, fresh: Fates, images: np.ndarray | None) -> Fates | None:
        if self.path is None:
            return None
        if images is not None:
            where, count = self._examples_path(self.path), len(fresh.stages)
            self._examples = ExamplesFile(where, images, count)
        try:
            return self._read(self.path, fresh)
        except FileNotFoundError:
            pass
        except _UnfitError as error:
            self._set_aside(self.path, str(error))
        if self._examples is not None:
            self._examples.create()
        self.write(fresh, now=True)  # a folder that cannot be written fails at once
        return None

    def _read(self, path: pathlib.Path, fresh: Fates) -> Fates:
        """Returns the stored fates.

        Raises:
          _UnfitError: if they are incomplete, of anything else, or impossible.
        """
        try:
            content = path.read_bytes()
        except IsADirectoryError as error:
            raise _UnfitError(f"{path} is a folder") from error
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                stored = {name: file[name] for name in file.files}
            is_ours = str(stored["about"]) == self._about
            place = Place(*map(int, stored["place"]))
            who = tuple(map(dict, json.loads(str(stored["provenance"]))))
            arrays = {
                name: _like(stored[name], getattr(fresh, name)) for name in _NAMES
            }
            found = dataclasses.replace(fresh, place=place, provenance=who, **arrays)
            is_possible = found.is_possible()
        except Exception as error:  # whatever a damaged file leads NumPy to
            text = " ".join(str(error).split()) or type(error).__name__
            raise _UnfitError(f"{path} is damaged ({text[:100]})") from error
        if not is_ours:
            raise _UnfitError(
                f"{path} is of another network, split or attack than its name says"
            )
        if not is_possible:
            raise _UnfitError(f"{path} holds impossible values")
        if self._examples is not None:
            sums = stored.get("sums", np.zeros(0))
            problem = self._examples.reopen(found.broken_at >= 0, sums)
            if problem:
                raise _UnfitError(f"{self._examples.path} {problem}")
        return found

    @staticmethod
    def _examples_path(path: pathlib.Path) -> pathlib.Path:
        return path.with_name(f"{path.stem}-examples.npy")

    def _set_aside(self, path: pathlib.Path, problem: str) -> None:
        both = path, self._examples_path(path)
        moved = " and ".join(set_aside(p).name for p in both if p.exists())
        warnings.warn(
            f"{problem}. AutoAttack starts over; what was there is kept as {moved}.",
            stacklevel=2,
        )

    def put_examples(
        self, column: int, indices: np.ndarray, images: Array, broken: np.ndarray
    ) -> None:
        """Stores the adversarial images that broke examples, if `open` got images.

        Args:
          column: of the attack.
          indices: positions [n] of the examples in the split.
          images: what the attack made of them, [B, ...] with B >= n.
          broken: bool [n].
        """
        if self._examples is not None:
            found = jax.device_get(images)[: len(indices)][broken]
            self._examples.put(column, indices[broken], found)

    def write(self, fates: Fates, *, now: bool) -> None:
        """Replaces the file, if `now` or a few seconds after the last time."""
        is_time = time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES
        if self.path is None or not is_primary() or not (now or is_time):
            return
        content: dict[str, Any] = {
            "broken_at": fates.broken_at,
            "non_finite": fates.non_finite,
            "place": np.array(fates.place),
            "columns": np.array(list(fates.stages)),
            "stages": np.array(json.dumps(dict(fates.stages))),
            "about": np.array(self._about),
            "provenance": np.array(json.dumps(fates.provenance)),
        }
        if self._examples is not None:
            self._examples.flush()
            content["sums"] = self._examples.sums
        self.path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, **content)
        write_bytes(self.path, buffer.getvalue())
        self._written = time.monotonic()


class _UnfitError(Exception):
    """The reason why an evaluation cannot resume from a file, and which file."""


def identify(
    model: nn.Module, variables: PyTree, split: Split, key: Array, **settings: Any
) -> dict[str, Any]:
    """Returns all that fates depend on, except rounding, in JSON's types.

    Args:
      model: its fields count: another normalization is another network.
      variables: of the model.
      split: the images.
      key: of the random numbers.
      **settings: of the attacks, in JSON's types.
    """
    return {
        "version": [_VERSION, ATTACKS_VERSION],
        "model": re.sub(r" at 0x[0-9a-f]+", "", repr(model)),
        "network": checksum(variables),
        "split": fingerprint(split),
        "key": jax.random.key_data(key).tolist(),
        "random": random_bits(),
        **settings,
    }


def _like(array: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Returns the array, if it has the shape and dtype that are expected."""
    if array.shape != expected.shape or array.dtype != expected.dtype:
        raise ValueError(
            f"{array.dtype} {array.shape}, not {expected.dtype} {expected.shape}"
        )
    return array
